"""Rewrite every caption of a corpus: one encoding an image, one caption a style, and a score for each."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from captioner.decoding import decoder_of
from captioner.detect import FAULTS, DetectConfig
from captioner.provenance import Author, Sign, public_name, record
from captioner.retry import WORDS, decodings
from captioner.scoring import Match
from captioner.stages import Caption
from captioner.styles import RETRIES, Search, Style
from captioner.task import about
from captioner.tower import Tower
from infra import storage
from infra.cluster import Cluster, connect
from infra.data.ledger import Ledger, Record
from infra.data.run import run_stages
from infra.data.stage import Stage
from infra.metrics import Report, counting
from infra.store import Artifact, by_shard, step
from workflows.asked import DESCRIPTIVE, SHORT, caption_by, check_names, tell_copies
from workflows.clips import weights_of
from workflows.train_captioner import MODEL, Backend, named


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig:
    """In which styles every image is captioned, how exactly, and what is done about a caption that looks wrong.

    A faulty caption is decoded again by each of `retries` in turn; the least faulty is kept, with its flag. Somebody
    else's model goes by `styles`, `batch` and `precision` alone.
    """

    styles: tuple[Style, ...] = ()  # none: those that the captioner was tuned for, or a short and a descriptive one
    batch: int = 128  # images that are encoded and captioned together
    precision: Literal["fp32", "bf16"] = "fp32"
    detect: DetectConfig = field(default_factory=DetectConfig)
    words: dict[str, tuple[int, int]] = field(default_factory=dict)  # fewest and most by style; else 1 to 200
    retries: tuple[Search, ...] = RETRIES
    score_alt: bool = True  # also the log-probability of the alt text, for a tenth more time with BLIP-base
    matcher: str = ""  # published retrieval weights that judge the captions; none: the captioner's own head, if any
    clip: str = ""  # a CLIP, by folder or hub's name, whose similarity is written beside

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")
        check_names(self.styles)


@step(version=3, shards=by_shard)
def recaption(
    config: RecaptionConfig, images: Artifact, captioner: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `caption_<style>` with its `logp`, `flag` (what is wrong with it), `tries` and `provenance`, and scores.

    `match_<style>` comes where the captioner has a matching head or `matcher` names one, `clip_<style>` with a `clip`.
    Somebody else's model, which `captioner` only names, writes `caption_<style>` and `provenance_<style>`.
    """
    if (backend := named(captioner)) is not None:
        model = (backend, check_asked(config, backend), config.batch, config.precision)
        counts = caption_by(*model, images, out=out, cluster=cluster, report=report)
        return counts | {"captioner": captioner.id}
    model = captioner.url(MODEL)
    known = about(model)
    styles = config.styles or known.styles
    if not styles:
        raise ValueError(f"The captioner {captioner.path} was tuned for no style; give `styles`.")
    if _is_published(captioner):
        tell_copies(images)
    connect(cluster)
    cpus, gpus = cluster.cpus_per_actor, cluster.gpus_per_actor
    tower = Tower(model, config.precision, gpus)
    author = _author(config, captioner)
    records = {
        style.name: [
            record(author, replace(style, decoder=decoder_of(known, style)), decoding)
            for decoding in decodings(style, config.words.get(style.name, WORDS), config.retries)
        ]
        for style in styles
    }
    # Signed before anything else can fail a row: its captions stay, and so must what is known of them.
    stages: list[Stage] = [
        Caption(tower, styles, cpus, gpus, config.detect, config.words, config.retries, config.score_alt),
        Sign(records, cpus, gpus),
    ]
    if config.matcher or config.clip or (known.matching is not None and known.matching.match):
        matcher = Tower(storage.anchored(config.matcher), config.precision, gpus) if config.matcher else None
        clip = weights_of(config.clip) or None
        stages.append(Match(tower, tuple(style.name for style in styles), matcher, clip, cpus, gpus))
    report = counting(report, "captions", of="accepted", times=len(styles))
    counts = run_stages(stages, [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)
    captioned = Ledger(out).complete()
    return counts | {
        "captioner": captioner.id,
        "weights_sha256": author.weights_sha256,
        "provenance": records,
        "styles": [asdict(style) for style in styles],
        "precision": config.precision,
        "faults": {style.name: _faults(captioned, style.name) for style in styles},
        "seed": None,  # greedy and beam search draw nothing
    }


def check_written(captions: RecaptionConfig | str | None, captioner: Any) -> None:
    """ValueError where a recipe has captions written, and nobody to write them."""
    if isinstance(captions, RecaptionConfig) and captioner is None:
        raise ValueError("Nobody writes the captions: give a `captioner`, or no `captions`.")


def check_asked(config: RecaptionConfig, backend: Backend) -> tuple[Style, ...]:
    """The styles that somebody else's model is asked for; ValueError where it cannot be."""
    styles = config.styles or (SHORT, DESCRIPTIVE)
    backend.check(styles)
    if config.matcher or config.clip:
        raise ValueError("`matcher` and `clip` score beside a captioner of ours, and this one only names a model.")
    return styles


def _is_published(captioner: Artifact) -> bool:
    """Whether nothing of a captioner was trained here but, perhaps, what judges its captions."""
    config = captioner.manifest["config"]
    return config.get("base") is None and not config.get("styles")


def _author(config: RecaptionConfig, captioner: Artifact) -> Author:
    base = captioner.manifest["config"].get("model")  # a name of published weights, or the size of what began with none
    return Author(
        model=f"{captioner.step}/{captioner.id}",
        backend="rescribe",
        dtype=config.precision,
        weights_sha256=storage.digest(captioner.url(MODEL, "model.safetensors"))["sha256"],
        settings={"base": public_name(base)} if isinstance(base, str) else {},
    )


def _faults(records: Mapping[str, Record], style: str) -> dict[str, Any]:
    """Of a style's captions: the share of each fault, of those decoded again, and of faults in the worst shard."""
    flags: Counter[str] = Counter()
    rows, again, worst, shard = 0, 0, 0.0, None
    for name, shard_record in records.items():
        found, tries = (shard_record["counts"][f"{kind}_{style}"] for kind in ("flag", "tries"))
        said = sum(tries.values())
        share = sum(found.values()) / max(said, 1)
        if share > worst:
            worst, shard = share, name
        rows, again = rows + said, again + said - tries.get("1", 0)
        flags.update(found)
    shares = {fault: round(flags[fault] / rows, 6) for fault in FAULTS if flags[fault]}
    again_share = round(again / max(rows, 1), 6)
    return {"faults": shares, "decoded_again": again_share, "worst": round(worst, 6), "worst_shard": shard}
