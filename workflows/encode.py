"""Turn every picture into codes, once, so that a prior never sees pixels."""

from dataclasses import dataclass
from typing import Any

from infra.cluster import Cluster, connect
from infra.config import setting
from infra.data.fitting import bucket_name
from infra.data.run import run_stages
from infra.metrics import Report
from infra.store import Artifact, by_shard, step
from t2i.stages import Encode
from t2i.tokenizers.task import load_tokenizer
from workflows.train_tokenizer import MODEL, image_sizes


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """How many pictures are encoded together."""

    batch: int = 256
    column: str = setting("codes", since="0.2")  # another name, where codes of several tokenizers meet in one training

    def __post_init__(self) -> None:
        if not self.column.isidentifier():
            raise ValueError(f"A column is called by a word, such as codes or map_codes, but not '{self.column}'.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")


@step(version=1, shards=by_shard)
def encode(
    config: EncodeConfig, images: Artifact, tokenizer: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write a sidecar with codes for every shard of a corpus; the grid of a row's codes is that of its bucket."""
    model, sizes = load_tokenizer(tokenizer.url(MODEL)), image_sizes(images)
    spaces = {bucket_name(size): model.space(size) for size in sizes}
    codes = next(iter(spaces.values())).codes
    if not codes:
        raise ValueError(
            f"The tokenizer {tokenizer.path} has no codes to write. A prior that draws pixels takes the pictures as "
            "they are: train it without `codes`."
        )
    grids = {name: list(space.shape) for name, space in spaces.items()}
    connect(cluster)
    stage = Encode(tokenizer.url(MODEL), cluster.cpus_per_actor, cluster.gpus_per_actor, config.column)
    counts = run_stages([stage], [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)
    grid = {"grids": grids} if len(sizes) > 1 else {"grid": grids[bucket_name(sizes[0])]}
    return counts | {**grid, "codebook_size": codes}
