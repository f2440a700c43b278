"""Turn every picture into codes or latents, once, so that a prior never sees pixels."""

from dataclasses import dataclass
from typing import Any

from infra.cluster import Cluster, connect
from infra.config import setting
from infra.data.fitting import Size, bucket_name
from infra.data.run import run_stages
from infra.metrics import Report
from infra.store import Artifact, by_shard, step
from t2i.diffusion.prior import DiffusionConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.protocol import Space
from t2i.stages import Encode, code_dtype
from t2i.tokenizers.pixels import Pixels
from t2i.tokenizers.task import load_tokenizer
from workflows.train_tokenizer import MODEL, image_sizes


@dataclass(frozen=True, kw_only=True)
class EncodeConfig:
    """What of pictures is written, and how many of them are encoded together."""

    batch: int = 256
    column: str = setting("codes", since="0.2")  # another name, where codes of several tokenizers meet in one training
    latents: bool = setting(False, since="0.2")  # of a tokenizer with codes, what it has before them (LDM's VQ, MAR)
    deviations: bool = setting(False, since="0.2")  # of latents, too: then training draws them, else it takes the mode

    def __post_init__(self) -> None:
        if not self.column.isidentifier():
            raise ValueError(f"A column is called by a word, such as codes or map_codes, but not '{self.column}'.")
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")


@step(version=2, shards=by_shard)
def encode(
    config: EncodeConfig, images: Artifact, tokenizer: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write a sidecar with codes or latents for every shard of a corpus; the grid of a row's is that of its bucket.

    Codes are uint16 where they fit, latents the bits of bf16, as uint16, too: which it is `codebook_size` says, 0 of
    latents.
    """
    model, sizes = load_tokenizer(tokenizer.url(MODEL)), image_sizes(images)
    spaces = {bucket_name(size): _space(config, model, tokenizer, size) for size in sizes}
    codes = next(iter(spaces.values())).codes
    grids = {name: list(space.shape) for name, space in spaces.items()}
    connect(cluster)
    stage = Encode(
        tokenizer.url(MODEL),
        cluster.cpus_per_actor,
        cluster.gpus_per_actor,
        config.column,
        latents=config.latents,
        deviations=config.deviations,
        dtype=code_dtype(codes) if codes else "uint16",
    )
    counts = run_stages([stage], [images.path], out, batch_size=config.batch, actors=cluster.actors, report=report)
    grid = {"grids": grids} if len(sizes) > 1 else {"grid": grids[bucket_name(sizes[0])]}
    return counts | {**grid, "codebook_size": codes} | ({"deviations": True} if config.deviations else {})


def _space(config: EncodeConfig, model: Any, tokenizer: Artifact, size: Size) -> Space:
    """Of what is written of pictures of a size; ValueError where the tokenizer has no such values."""
    if isinstance(model, Pixels):
        raise ValueError(
            f"The tokenizer {tokenizer.path} has no codes to write. A prior that draws pixels takes the pictures as "
            "they are: train it without `codes`."
        )
    space = model.space(size)
    if config.deviations and (space.codes or not hasattr(model, "moments")):
        raise ValueError(f"The tokenizer {tokenizer.path} says no distribution of its values: leave out deviations.")
    if not config.latents or not space.codes:
        return space
    if not hasattr(model, "latent_space"):
        raise ValueError(f"The tokenizer {tokenizer.path} shows nothing before its codes: leave out latents.")
    return model.latent_space(size)


def check_values(config: EncodeConfig, tokenizer: Any, prior: Any) -> None:
    """ValueError where, by their configs, a prior does not draw what is written of a tokenizer's values.

    Of a tokenizer or a prior that says nothing of codes in its config it is told when it is built.
    """
    size = getattr(getattr(tokenizer, "quantizer", None), "size", None)
    if size and config.deviations:
        raise ValueError("A tokenizer with codes says no distribution of its values: leave out codes.deviations.")
    if size == 0 and isinstance(prior, AutoregressiveConfig):
        raise ValueError(
            "The prior draws codes, but the tokenizer has none: choose a prior of latents, as a diffusion."
        )
    if size and not config.latents and isinstance(prior, DiffusionConfig):
        raise ValueError("The prior draws latents, but codes are written of pictures: give codes.latents.")
    if size and config.latents and isinstance(prior, AutoregressiveConfig):
        raise ValueError("The prior draws codes, but latents are written of pictures: leave out codes.latents.")


def space_of(encoded: Artifact) -> Space:
    """Of the values of an artifact of pictures of one size."""
    return Space(tuple(encoded.summary["grid"]), codes=encoded.summary["codebook_size"])
