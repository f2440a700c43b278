"""Caption a corpus as it lies, in one line: its index, the captioner, the captions."""

from dataclasses import dataclass, field
from typing import Literal

from captioner.backends.endpoint import EndpointConfig
from captioner.model import CONFIG, About
from captioner.styles import DESCRIPTIVE, SHORT, Style
from captioner.task import about
from infra import storage
from infra.cluster import Cluster, laptop
from infra.data.samples import NAMED
from infra.store import Artifact, Plan, Store
from workflows import asked
from workflows.asked import captioner_of
from workflows.caption_with import CaptionWithConfig, caption_with
from workflows.foreseen import silent
from workflows.ingest import IngestConfig, ingest
from workflows.recaption import RecaptionConfig, recaption
from workflows.train_captioner import MODEL, Backend, TrainCaptionerConfig, named, train_captioner


@dataclass(frozen=True, kw_only=True)
class DirectOptions:
    """`captioner` is an artifact's folder, BLIP weights or another model of transformers by folder or hub's name,
    `vllm:NAME`, or the address of a server that speaks OpenAI's chat API, whose model `model` names.
    """

    corpus: str  # path or pattern of shards, local or s3://
    captioner: str  # who captions
    out: str  # a store of its own: the index of the corpus and the captions go there
    styles: str = ""  # short,descriptive: by name; none: those that the captioner was tuned for, or both
    prompt: str = ""  # what a model that follows instructions is asked, in place of these
    style: str = "caption"  # the name of what it says then: it is written to `caption_<style>`
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
    concurrency: int = 16  # requests to a server that one actor has under way
    requests_per_minute: float | None = None  # of all actors together
    cluster: Cluster = field(default_factory=laptop)
    json: bool = False


def direct(options: DirectOptions) -> Artifact:
    """The captions; what was done before is found again."""
    store = Store(options.out, options.cluster)
    pace = {"concurrency": options.concurrency, "requests_per_minute": options.requests_per_minute}
    chosen = captioner_of(options.captioner, options.model, options.key_variable, **pace)
    columns = {name: getattr(options, name) for name in NAMED}
    index = IngestConfig(corpus=options.corpus, shard_rows=options.shard_rows, **columns)
    backend, tuned = _who(chosen)
    known = (asked.SHORT, asked.DESCRIPTIVE) if backend else (SHORT, DESCRIPTIVE, *tuned)
    styles = _styles(options, known if backend else tuned or (SHORT,), known)  # what is not known costs no index
    config = RecaptionConfig(styles=styles, batch=options.batch, precision=options.precision)
    if isinstance(backend, EndpointConfig):
        _greet(backend, options, index, chosen, config)
    images = store.step(ingest, index)
    captioner = store.step(train_captioner, chosen, images)
    if backend is not None:
        before = CaptionWithConfig(
            backend=backend, styles=config.styles, batch=config.batch, precision=config.precision
        )
        if Artifact.begun(storage.join(store.root, caption_with.name, caption_with.identity(before, [images]))):
            return store.step(caption_with, before, images)  # answers that were paid for are not asked for again
    return store.step(recaption, config, images, captioner)


def _who(chosen: TrainCaptionerConfig | str) -> tuple[Backend | None, tuple[Style, ...]]:
    """Somebody else's model, if it is that; else the styles that the captioner was tuned for."""
    if isinstance(chosen, str):
        made = Artifact.open(chosen)
        backend = named(made)
        return backend, () if backend else about(made.url(MODEL)).styles
    if isinstance(chosen.model, Backend):
        return chosen.model, ()
    assert isinstance(chosen.model, str), "a word names what there is"
    url = storage.join(chosen.model, CONFIG)  # of a hub's name there is none here
    told = storage.read_json(url) if storage.exists(url) else {}
    return None, About.of(told).styles if "styles" in told else ()


def _greet(
    server: EndpointConfig,
    options: DirectOptions,
    index: IngestConfig,
    chosen: TrainCaptionerConfig | str,
    config: RecaptionConfig,
) -> None:
    """ConnectionError where there is something to ask of a server, and it could not be asked from here."""
    plan = Plan(options.out)
    images = plan.step(ingest, index)
    plan.step(recaption, config, images, plan.step(train_captioner, chosen, images))
    if plan.lines[-1][2] != "done" and (unheard := silent(server, options.cluster)):
        raise ConnectionError(unheard)


def _styles(options: DirectOptions, own: tuple[Style, ...], known: tuple[Style, ...]) -> tuple[Style, ...]:
    """The styles that are asked for: one by its prompt, some by name, or the captioner's own."""
    if options.prompt:
        return (Style(name=options.style, prompt=options.prompt, max_tokens=asked.DESCRIPTIVE.max_tokens),)
    by_name = {style.name: style for style in known}
    names = [name for name in options.styles.split(",") if name]
    if unknown := [name for name in names if name not in by_name]:
        raise ValueError(f"There is no style '{unknown[0]}'; this captioner knows {', '.join(by_name)}.")
    return tuple(by_name[name] for name in names) or own
