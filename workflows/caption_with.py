"""Caption a corpus with a model that was not trained here: of transformers, of vLLM, or served by others."""

from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.stages import CaptionWith
from captioner.backends.vllm import Questions, VLLMConfig
from captioner.provenance import Author, Record, Sign, identify, record
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from infra import storage
from infra.cluster import Cluster, connect
from infra.data.llm import run_requests
from infra.data.run import run_stages
from infra.metrics import Report, counting
from infra.store import Artifact, by_shard, step
from workflows.recaption import check_names, tell_copies

# A model that follows instructions has to be told what a style is; a tuned decoder of ours knows.
SHORT = Style(name="short", prompt="Describe the main subject of this picture in one short sentence.", max_tokens=40)
DESCRIPTIVE = Style(
    name="descriptive",
    prompt="Describe this picture in detail: its subjects, their number, colours and places, the background, "
    "any text in it, and its style. Write plain sentences, without a preamble.",
    max_tokens=200,
)


@dataclass(frozen=True, kw_only=True)
class CaptionWithConfig:
    """Which model, and what it is asked: `[ ... {alt} ... ]` in a prompt is there for rows with an alt text."""

    backend: TransformersConfig | EndpointConfig | VLLMConfig
    styles: tuple[Style, ...] = (SHORT, DESCRIPTIVE)
    batch: int = 64  # images that are handed to the model together
    precision: Literal["fp32", "bf16"] = "fp32"

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise ValueError(f"batch must be at least 1, but it is {self.batch}.")
        check_names(self.styles)
        self.backend.check(self.styles)


@step(version=2, shards=by_shard)
def caption_with(
    config: CaptionWithConfig, images: Artifact, *, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `caption_<style>` and its `provenance` for every row of a corpus, by a published or a served model."""
    tell_copies(images)
    connect(cluster)
    backend, inputs = config.backend, [images.path]
    report = counting(report, "captions", of="accepted", times=len(config.styles))
    records = sources(config)
    sign = Sign({style: (each,) for style, each in records.items()})
    if not isinstance(backend, EndpointConfig):  # actors may run in another folder than the command did
        backend = replace(backend, model=storage.anchored(backend.model))
    if isinstance(backend, VLLMConfig):
        questions = Questions(backend, config.styles, ALT_COLUMN)
        counts = run_requests(questions, backend.engine(), inputs, out, actors=cluster.actors, report=report, sign=sign)
    else:
        gpus = 0 if isinstance(backend, EndpointConfig) else cluster.gpus_per_actor
        cpus, most = cluster.cpus_per_actor, cluster.actors[1]
        stage = CaptionWith(backend, config.styles, config.precision, cpus, gpus, most, sign)
        counts = run_stages([stage], inputs, out, batch_size=config.batch, actors=cluster.actors, report=report)
    styles = [asdict(style) for style in config.styles]
    return counts | {"styles": styles, "precision": config.precision, "provenance": records}


def sources(config: CaptionWithConfig) -> dict[str, Record]:
    """Where the captions of each style come from: its record, but for the versions of libraries."""
    author, decoding, taken = _author(config.backend, config.precision)
    asked = {style.name: decoding | {name: getattr(style, name) for name in taken} for style in config.styles}
    return {style.name: record(author, style, asked[style.name]) for style in config.styles}


def _author(
    backend: TransformersConfig | EndpointConfig | VLLMConfig, precision: str
) -> tuple[Author, dict[str, Any], tuple[str, ...]]:
    """Who captions, how it decodes whatever the style, and which fields of a style it goes by."""
    if isinstance(backend, TransformersConfig):
        known = identify(backend.model, backend.revision)
        return Author(backend="transformers", dtype=precision, **known), {}, ("beams", "min_tokens", "max_tokens")
    seen: dict[str, Any] = {"images": {"max_side": backend.max_side, "encoding": backend.encoding}}
    if isinstance(backend, VLLMConfig):
        known = identify(backend.model)
        # "auto" is vLLM's word for the precision that the weights were saved in.
        author = Author(backend="vllm", dtype="auto", seed=backend.seed, settings=seen, **known)
        return author, {"temperature": 0.0}, ("min_tokens", "max_tokens")
    # Which weights answer, in what precision and by which libraries, a server does not say.
    settings = {"endpoint": backend.base_url, **seen}
    author = Author(model=backend.model, backend="endpoint", dtype=None, seed=backend.seed, settings=settings)
    return author, {"temperature": 0.0}, ("max_tokens",)
