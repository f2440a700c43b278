"""Look at the size of every image and the language of its alt texts, and say what is unfit; nothing is dropped."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from captioner.filters import Language, Size
from infra.cluster import Cluster, connect
from infra.data.ledger import recorded
from infra.data.run import run_stages
from infra.metrics import Report
from infra.store import Artifact, by_shard, step

VERDICTS = ("unfit_size", "unfit_language")


@dataclass(frozen=True, kw_only=True)
class ExamineConfig:
    """Which sizes and languages are fit; see `captioner.filters`."""

    min_side: int = 32  # pixels of the shorter side
    max_aspect: float = 4.0  # the longer side over the shorter
    languages: tuple[str, ...] = ()  # ISO 639 codes, as en; none: any
    min_probability: float = 0.002  # that a text is in one of them; captions of a word or two pass up to here
    batch: int = 1024

    def __post_init__(self) -> None:
        if self.min_side < 1:
            raise ValueError(f"min_side must be at least 1, but it is {self.min_side}.")
        if not self.max_aspect >= 1:
            raise ValueError(f"max_aspect is the longer side over the shorter, 1 or more, but it is {self.max_aspect}.")
        if not 0 <= self.min_probability <= 1:
            raise ValueError(f"min_probability is from 0 to 1, but it is {self.min_probability}.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")


@step(version=1, shards=by_shard)
def examine(config: ExamineConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report) -> dict[str, Any]:
    """Write `unfit_size`, `language_alt` and `unfit_language` for every row: a reason where it is unfit, else None.

    Sizes are of pictures. Languages are of texts: in shards where a row has several, `languages_alt` and
    `unfit_languages` say so of each, and a row is unfit by its language where all of its texts are.
    """
    stages = (Size(config.min_side, config.max_aspect), Language(config.languages, config.min_probability))
    stages[1].setup()  # an unknown language is said before work starts
    connect(cluster)
    counts = run_stages(stages, [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)
    return counts | summary(out)


def summary(out: str) -> dict[str, Any]:
    """How many rows are unfit, by verdict and by the reason before its colon."""
    reasons: dict[str, Counter[str]] = {verdict: Counter() for verdict in VERDICTS}
    for record in recorded(out, VERDICTS):
        for verdict, counts in reasons.items():
            counts.update(record["counts"][verdict])
    return {verdict: dict(counts.most_common()) for verdict, counts in reasons.items()}
