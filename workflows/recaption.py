"""Rewrite every caption of a corpus: one encoding an image, one caption a style, and a score for each."""

import hashlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from captioner.stages import Caption
from captioner.styles import Style
from captioner.task import load_captioner
from infra import storage
from infra.cluster import Cluster, connect
from infra.data.run import run_stages
from infra.metrics import Report
from infra.store import Artifact, step
from workflows.train_captioner import MODEL


@dataclass(frozen=True, kw_only=True)
class RecaptionConfig:
    """In which styles every image is captioned, and how exactly."""

    styles: tuple[Style, ...] = ()  # none: those that the captioner was tuned for
    batch: int = 128  # images that are encoded and captioned together
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")
        check_names(self.styles)


@step(version=1)
def recaption(
    config: RecaptionConfig, images: Artifact, captioner: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write a sidecar with `caption_<style>`, `logp_<style>` and `logp_alt` for every shard of a corpus."""
    model = captioner.url(MODEL)
    styles = config.styles or load_captioner(model).styles
    if not styles:
        raise ValueError(f"The captioner {captioner.path} was tuned for no style; give `styles`.")
    connect(cluster)
    stage = Caption(model, styles, config.precision, cluster.cpus_per_actor, cluster.gpus_per_actor)
    counts = run_stages([stage], [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)
    weights = storage.read_bytes(storage.join(model, "model.safetensors"))
    return counts | {
        "captioner": captioner.id,
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "styles": [asdict(style) for style in styles],
        "precision": config.precision,
        "seed": None,  # greedy and beam search draw nothing
    }


def check_names(styles: tuple[Style, ...]) -> None:
    """ValueError where two styles would write the same column, or one the alt text's."""
    names = [style.name for style in styles]
    if len(set(names)) < len(names) or "alt" in names:
        raise ValueError(f"Styles need names of their own, other than 'alt'; found {', '.join(names)}.")
