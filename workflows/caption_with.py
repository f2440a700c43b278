"""The step that captioned by models not trained here before `recaption` took them all: what it made can be retried."""

from dataclasses import dataclass
from typing import Any

from captioner.styles import Style
from infra.cluster import Cluster
from infra.metrics import Report
from infra.store import Artifact, by_shard, step
from workflows.asked import DESCRIPTIVE, SHORT, Precision, caption_by, check_names
from workflows.train_captioner import Backend


@dataclass(frozen=True, kw_only=True)
class CaptionWithConfig:
    """Which model, and what it is asked."""

    backend: Backend
    styles: tuple[Style, ...] = (SHORT, DESCRIPTIVE)
    batch: int = 64  # images that are handed to the model together
    precision: Precision = "fp32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")
        check_names(self.styles)
        self.backend.check(self.styles)


@step(version=2, shards=by_shard)
def caption_with(
    config: CaptionWithConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Caption a corpus with a published or a served model, as `recaption` does."""
    model = (config.backend, config.styles, config.batch, config.precision)
    return caption_by(*model, images, whole=False, out=out, cluster=cluster, report=report)
