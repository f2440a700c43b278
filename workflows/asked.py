"""Captions by a model that was not trained here: of transformers, of vLLM, or served by others."""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.http import Budget
from captioner.backends.pretrained import TransformersConfig
from captioner.backends.stages import TOKENS, CaptionWith
from captioner.backends.vllm import Questions, VLLMConfig
from captioner.model import published
from captioner.provenance import Author, Record, Sign, identify, record
from captioner.styles import Style
from captioner.task import ALT_COLUMN
from infra import storage
from infra.cluster import Cluster, connect
from infra.data.ledger import Ledger
from infra.data.llm import run_requests
from infra.data.run import run_stages
from infra.metrics import Report, counting
from infra.shared import Shared
from infra.store import MANIFEST, Artifact
from workflows.commands import say
from workflows.train_captioner import Backend, TrainCaptionerConfig

Precision = Literal["fp32", "bf16"]

# A model that follows instructions has to be told what a style is; a tuned decoder of ours knows.
SHORT = Style(name="short", prompt="Describe the main subject of this picture in one short sentence.", max_tokens=40)
DESCRIPTIVE = Style(
    name="descriptive",
    prompt="Describe this picture in detail: its subjects, their number, colours and places, the background, "
    "any text in it, and its style. Write plain sentences, without a preamble.",
    max_tokens=200,
)


VLLM = "vllm:"  # before a model's name: vLLM runs it
ADDRESS = re.compile(r"[\w.-]+:\d+(/.*)?")  # of a server, without a protocol


def captioner_of(name: str, model: str = "", key_variable: str = "", **pace: Any) -> TrainCaptionerConfig | str:
    """Who captions, by the word that a command is given: an artifact's path, or the config that takes a model as it is.

    The word is the folder of an artifact, BLIP weights or another model of transformers by folder or hub's name,
    `vllm:NAME`, or the address of a server that speaks OpenAI's chat API, whose model `model` names; `pace` are further
    fields of an `EndpointConfig`.
    """
    if name.startswith(("http://", "https://")):
        if not model:
            raise ValueError(f"Name the model that {name} is to caption with: --model NAME.")
        taken: str | Backend = EndpointConfig(base_url=name, model=model, key_variable=key_variable, **pace)
    elif name.startswith(VLLM):
        taken = VLLMConfig(model=name.removeprefix(VLLM))
    elif storage.exists(storage.join(name, MANIFEST)):
        return storage.absolute(name)
    elif ADDRESS.fullmatch(name) and not os.path.exists(name):
        raise ValueError(f"{name} looks like the address of a server: give it with its protocol, as http://{name}.")
    elif "://" in name or published(name).model_type == "blip":
        taken = name
    else:
        taken = TransformersConfig(model=storage.anchored(name))
    return TrainCaptionerConfig(model=taken, base=None, styles=())


def caption_by(
    backend: Backend,
    styles: tuple[Style, ...],
    batch: int,
    precision: Precision,
    images: Artifact,
    *,
    whole: bool = True,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Write `caption_<style>` and its `provenance` for every row of a corpus; returns counts and records.

    `[ ... {alt} ... ]` in a style's prompt is there for rows with an alt text. `whole` pictures are those of the
    corpus, not the index's smaller copies.
    """
    if not whole:
        tell_copies(images)
    connect(cluster)
    inputs = [images.path]
    report = counting(report, "captions", of="accepted", times=len(styles))
    records = sources(backend, styles, precision)
    sign = Sign({style: (each,) for style, each in records.items()})
    if not isinstance(backend, EndpointConfig):  # actors may run in another folder than the command did
        backend = replace(backend, model=storage.anchored(backend.model))
    if isinstance(backend, VLLMConfig):
        questions = Questions(backend, styles, ALT_COLUMN, whole)
        counts = run_requests(questions, backend.engine(), inputs, out, actors=cluster.actors, report=report, sign=sign)
    else:
        gpus = 0 if isinstance(backend, EndpointConfig) else cluster.gpus_per_actor
        cpus, most = cluster.cpus_per_actor, cluster.actors[1]
        limits = (cluster.max_requests, cluster.max_tokens)
        budget: Any = Shared(Budget, *limits) if any(limits) and isinstance(backend, EndpointConfig) else None
        stage = CaptionWith(backend, styles, precision, cpus, gpus, most, sign, whole, budget)
        counts = run_stages([stage], inputs, out, batch_size=batch, actors=cluster.actors, report=report)
    return (
        counts
        | _spent(out, cluster)
        | {
            "styles": [asdict(style) for style in styles],
            "precision": precision,
            "provenance": records,
        }
    )


def _spent(out: str, cluster: Cluster) -> dict[str, float]:
    """The tokens that were read and written for the captions that there are, and their price where one was given."""
    sums = [record.get("sums", {}) for record in Ledger(out).complete().values()]
    tokens = {
        name: int(sum(each[name] for each in sums)) for name in TOKENS if sums and all(name in each for each in sums)
    }
    if not tokens or not any(cluster.token_prices):
        return dict(tokens)
    price = sum(price * tokens[name] for price, name in zip(cluster.token_prices, TOKENS, strict=True)) / 1e6
    return tokens | {"price": round(price, 4)}


def sources(backend: Backend, styles: Sequence[Style], precision: Precision) -> dict[str, Record]:
    """Where the captions of each style come from: its record, but for the versions of libraries."""
    author, decoding, taken = _author(backend, precision)
    asked = {style.name: decoding | {name: getattr(style, name) for name in taken} for style in styles}
    return {style.name: record(author, style, asked[style.name]) for style in styles}


def _author(backend: Backend, precision: Precision) -> tuple[Author, dict[str, Any], tuple[str, ...]]:
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


def tell_copies(images: Artifact) -> None:
    """Say that a captioner sees copies that were made to train others on."""
    config = images.manifest["config"]
    if sizes := config.get("buckets") or [size for size in [config.get("image_size")] if size]:
        copies = ", ".join(f"{height}x{width}" for height, width in sizes) + f", {config.get('fit', 'stretch')}"
        say(
            f"The captioner, which was not trained here, sees the copies of the index ({copies}). "
            "Caption an index without image_size and buckets for it to see whole pictures."
        )


def check_names(styles: tuple[Style, ...]) -> None:
    """ValueError where two styles would write the same column, or one the alt text's."""
    names = [style.name for style in styles]
    if len(set(names)) < len(names) or "alt" in names:
        raise ValueError(f"Styles need names of their own, other than 'alt'; found {', '.join(names)}.")
