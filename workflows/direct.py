"""Caption a corpus as it lies, in one line: its index, the captioner, the captions."""

from dataclasses import dataclass, field, replace
from typing import Literal

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.vllm import VLLMConfig
from captioner.model import published
from captioner.styles import DESCRIPTIVE, SHORT, Style
from captioner.task import about
from infra import storage
from infra.cluster import Cluster, laptop
from infra.data.samples import NAMED
from infra.store import MANIFEST, Artifact, Store
from workflows import caption_with as asked
from workflows.ingest import IngestConfig, ingest
from workflows.recaption import RecaptionConfig, recaption
from workflows.train_captioner import MODEL, TrainCaptionerConfig, train_captioner

VLLM = "vllm:"  # before a model's name: vLLM runs it


@dataclass(frozen=True, kw_only=True)
class DirectOptions:
    """`captioner` is an artifact's folder, BLIP weights or another model of transformers by folder or hub's name,
    `vllm:NAME`, or the address of a server that speaks OpenAI's chat API, whose model `model` names.
    """

    corpus: str  # path or pattern of shards, local or s3://
    captioner: str  # who captions
    out: str  # a store of its own: the index of the corpus and the captions go there
    styles: str = ""  # short,descriptive: by name; none: those that the captioner was tuned for, or both
    shard_rows: int = 1000  # of a folder: how many rows make a shard
    image_column: str | None = None  # of Parquet; these seven as `ingest` has them
    caption_column: str | None = None  # of Parquet and tables
    file_column: str | None = None  # of tables: what names the pictures
    caption_field: str | None = None  # of a sample's JSON, or a path into it
    image_part: str | None = None  # the ending of the picture, where a sample has several
    encoding: str = ""  # of texts that are not UTF-8
    follow_links: bool = False  # symbolic links that leave the corpus
    batch: int = 128  # images that are captioned together
    precision: Literal["fp32", "bf16"] = "fp32"
    model: str = ""  # of a server
    key_variable: str = ""  # the environment variable that holds a server's key
    cluster: Cluster = field(default_factory=laptop)
    json: bool = False


def direct(options: DirectOptions) -> Artifact:
    """The captions; what was done before is found again."""
    store = Store(options.out, options.cluster)
    names = tuple(name for name in options.styles.split(",") if name)
    backend = _backend(options)
    named = {name: getattr(options, name) for name in NAMED}
    corpus = IngestConfig(corpus=options.corpus, shard_rows=options.shard_rows, **named)
    exact = {"batch": options.batch, "precision": options.precision}
    if backend is not None:
        styles = _named(names, (asked.SHORT, asked.DESCRIPTIVE)) or (asked.SHORT, asked.DESCRIPTIVE)
        config = asked.CaptionWithConfig(backend=backend, styles=styles, **exact)
        return store.step(asked.caption_with, config, store.step(ingest, corpus))
    images = store.step(ingest, corpus)
    if storage.exists(storage.join(options.captioner, MANIFEST)):
        captioner = Artifact.open(storage.absolute(options.captioner))
    else:
        published = TrainCaptionerConfig(model=options.captioner, base=None, styles=())
        captioner = store.step(train_captioner, published, images)
    tuned = about(captioner.url(MODEL)).styles
    styles = _named(names, (SHORT, DESCRIPTIVE, *tuned)) or tuned or (SHORT,)
    return store.step(recaption, replace(RecaptionConfig(**exact), styles=styles), images, captioner)


def _backend(options: DirectOptions) -> TransformersConfig | EndpointConfig | VLLMConfig | None:
    """Whose captioner it is; None for one of ours or for BLIP weights."""
    name = options.captioner
    if name.startswith(("http://", "https://")):
        return EndpointConfig(base_url=name, model=options.model, key_variable=options.key_variable)
    if name.startswith(VLLM):
        return VLLMConfig(model=name.removeprefix(VLLM))
    if storage.exists(storage.join(name, MANIFEST)) or "://" in name or published(name).model_type == "blip":
        return None
    return TransformersConfig(model=storage.anchored(name))


def _named(names: tuple[str, ...], styles: tuple[Style, ...]) -> tuple[Style, ...]:
    known = {style.name: style for style in styles}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"There is no style '{unknown[0]}'; this captioner knows {', '.join(known)}.")
    return tuple(known[name] for name in names)
