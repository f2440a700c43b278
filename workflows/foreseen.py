"""What can be known to be wrong before any step begins: of a recipe, and of this machine for it."""

import difflib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.vllm import VLLMConfig
from infra import storage
from infra.artifact import Artifact
from infra.capacity import WITHOUT_VLLM, has_vllm, lacks_here
from infra.cluster import Cluster
from infra.config import from_dict
from t2i.priors.task import ALT
from workflows.commands import DECODE, say
from workflows.encode_text import EncodeTextConfig
from workflows.kinds import Part, Recipe, parts_of
from workflows.line import strings
from workflows.mix import MixConfig, weights_of
from workflows.recaption import RecaptionConfig, check_asked
from workflows.train_captioner import Backend, TrainCaptionerConfig

LISTED = 10  # models of a server that a message names
WEIGHTS = ("model", "matcher", "clip", "judge", "tokenizer")  # fields that name published weights, or a folder of some
USERS = {  # by a step of the recipe, the steps that load what its config names
    "train_captioner": ("train_captioner", "recaption"),
    "recaption": ("recaption",),
    "encode_text": ("encode_text",),
    "train_prior": ("train_prior", "sample"),
    "sample": ("sample",),
    "evaluate": ("evaluate",),
    "calibrate": ("calibrate",),
}


def check_captions(recipe: Recipe) -> None:
    """ValueError where a style is read that nobody writes, or the captioner cannot be asked for one."""
    parts = parts_of(recipe)
    captions = _config_of("recaption", parts)
    written = written_styles(captions, _config_of("train_captioner", parts))
    if written is None:
        return
    if not written and isinstance(captions, RecaptionConfig):
        raise ValueError(
            "Nothing says in which styles to caption: the captioner was tuned for none, and captions.styles is empty. "
            'Give captions.styles, such as [{"name": "short"}].'
        )
    there = (ALT, *written)
    for field, styles in _read(parts):
        if unwritten := [style for style in styles if style not in there]:
            raise ValueError(
                f"{field} reads captions of the style '{unwritten[0]}', which nobody writes; there are "
                f"{', '.join(there)}. Change {field}, or have captions.styles name it."
            )


def unread(recipe: Recipe) -> list[str]:
    """Of captions that are made, or given, and of which no style is read: a sentence for each mixture."""
    parts = parts_of(recipe)
    written = written_styles(_config_of("recaption", parts), _config_of("train_captioner", parts)) or ()
    told = list[str]()
    for field, styles in _read(parts):
        if written and field.endswith("weights") and {*written}.isdisjoint(styles):
            example = " ".join(f"{style}={weight:.3g}" for style, weight in weights_of(written, {}).items())
            told.append(
                f"{field} reads none of the captions ({', '.join(written)}), only {', '.join(styles)}. "
                f"To learn from them: --{field} {example}"
            )
    return told


def lacks(recipe: Recipe, cluster: Cluster, doing: Collection[str]) -> list[str]:
    """What the steps that are to be done would ask of this machine in vain, a sentence each."""
    if not doing:
        return []
    told, parts = list[str](), parts_of(recipe)
    captioner = _config_of("train_captioner", parts)
    backend = captioner.model if isinstance(captioner, TrainCaptionerConfig) else None
    for part in parts:
        served = part.config is captioner and isinstance(backend, EndpointConfig)  # what it names is the server's
        if served or isinstance(part.config, str) or {*doing}.isdisjoint(USERS.get(part.work.name, ())):
            continue
        for field, name in strings(part.config, part.field):
            if field.rpartition(".")[2] in WEIGHTS and _is_folder(name) and not storage.exists(name):
                told.append(f"{field} is {name}, and there is no such folder.")
    asks_vllm = isinstance(backend, VLLMConfig) and "recaption" in doing and not cluster.address
    told += [WITHOUT_VLLM] if asks_vllm and not has_vllm() else []
    trained = [each for part in parts if part.work.name in doing for each in getattr(part.config, "trainings", [])]
    if isinstance(backend, EndpointConfig) and "recaption" in doing and (unheard := silent(backend, cluster)):
        told.append(unheard)
    rows = [each.config.batch for each in trained]
    return told + lacks_here(cluster, rows, decodes=not {*doing}.isdisjoint(DECODE))


def silent(server: EndpointConfig, cluster: Cluster) -> str:
    """Why a server could not be asked from here; empty where it could, or where others than this machine will ask.

    That it does not list the model is said, and no more: many take aliases too (`llava` for `llava:latest`), or any.
    """
    try:
        if not cluster.address and (listed := server.greet()) and server.model not in listed:
            near = difflib.get_close_matches(server.model, listed, n=LISTED, cutoff=0.4)
            shown = ", ".join([*near, *(name for name in listed if name not in near)][:LISTED])
            more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
            say(
                f"{server.base_url} does not list the model '{server.model}'; it lists {shown}{more}. "
                "If it knows no such model, every row will fail: stop, and give --model with one of these."
            )
    except (ConnectionError, ValueError) as problem:
        return str(problem)
    return ""


def _config_of(step: str, parts: Sequence[Part]) -> Any:
    """The config of a step, or the path in its place; None where it is left out."""
    return next((part.config for part in parts if part.work.name == step), None)


def _read(parts: Sequence[Part]) -> Iterator[tuple[str, list[str]]]:
    """The fields of a recipe that name styles of captions to read, and these."""
    for part in parts:
        if isinstance(part.config, MixConfig):
            yield f"{part.field}.weights", [style for style, weight in part.config.weights.items() if weight > 0]
        elif isinstance(part.config, EncodeTextConfig):
            yield f"{part.field}.styles", [*part.config.styles]


def _is_folder(name: str) -> bool:
    """Whether a name of weights can be nothing but a folder; others may be a hub's."""
    return name.startswith(("/", "./", "../", "~", "file://", "s3://")) or name.endswith("/")


def written_styles(captions: Any, captioner: Any) -> Sequence[str] | None:
    """The styles that a recipe's captions come in; None where that is not to be known yet."""
    if captions is None:
        return ()
    if isinstance(captions, str):
        made = Artifact.begun(storage.absolute(captions))
        return [style["name"] for style in made.summary.get("styles", ())] if made else None
    made = Artifact.begun(storage.absolute(captioner)) if isinstance(captioner, str) else None
    config = from_dict(TrainCaptionerConfig, made.manifest["config"]) if made else captioner
    if not isinstance(config, TrainCaptionerConfig):
        return None
    if isinstance(config.model, Backend):
        return [style.name for style in check_asked(captions, config.model)]
    if captions.styles or config.styles:
        return [style.name for style in captions.styles or config.styles]
    told = storage.join(config.model, "config.json") if isinstance(config.model, str) else ""
    return (
        [style["name"] for style in storage.read_json(told).get("styles", ())] if told and storage.exists(told) else ()
    )
