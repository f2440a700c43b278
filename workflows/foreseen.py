"""What can be known to be wrong before any step begins: of a recipe, and of this machine for it."""

from collections.abc import Collection, Sequence

from captioner.backends.endpoint import EndpointConfig
from captioner.backends.vllm import VLLMConfig
from infra import storage
from infra.artifact import Artifact
from infra.capacity import WITHOUT_VLLM, has_vllm, lacks_here
from infra.cluster import Cluster
from infra.config import from_dict
from t2i.priors.task import ALT
from workflows.commands import DECODE
from workflows.line import batches, strings
from workflows.recaption import RecaptionConfig, check_asked
from workflows.text_to_image import Recipe
from workflows.train_captioner import Backend, TrainCaptionerConfig

WEIGHTS = ("model", "matcher", "clip", "tokenizer")  # fields that name published weights, or a folder of some
USERS = {  # a part of the recipe, and the steps that load what it names
    "captioner": ("train_captioner", "recaption"),
    "captions": ("recaption",),
    "text_features": ("encode_text",),
    "prior": ("train_prior", "sample"),
}


def check_captions(recipe: Recipe) -> None:
    """ValueError where a style is read that nobody writes, or the captioner cannot be asked for one."""
    written = _written(recipe)
    if written is None:
        return
    if not written and isinstance(recipe.captions, RecaptionConfig):
        raise ValueError(
            "Nothing says in which styles to caption: the captioner was tuned for none, and captions.styles is empty. "
            'Give captions.styles, such as [{"name": "short"}].'
        )
    read = {"mix.weights": [style for style, weight in recipe.mix.weights.items() if weight > 0]}
    read |= {f"text_features.{place}.styles": [*each.styles] for place, each in enumerate(recipe.text_features)}
    there = (ALT, *written)
    for field, styles in read.items():
        if unwritten := [style for style in styles if style not in there]:
            raise ValueError(
                f"{field} reads captions of the style '{unwritten[0]}', which nobody writes; there are "
                f"{', '.join(there)}. Change {field}, or have captions.styles name it."
            )


def lacks(recipe: Recipe, cluster: Cluster, doing: Collection[str]) -> list[str]:
    """What the steps that are to be done would ask of this machine in vain, a sentence each."""
    if not doing:
        return []
    told, captioner = [], recipe.captioner
    backend = captioner.model if isinstance(captioner, TrainCaptionerConfig) else None
    for field, name in strings(recipe):
        part, last = field.partition(".")[0], field.rpartition(".")[2]
        served = part == "captioner" and isinstance(backend, EndpointConfig)  # what it names is the server's
        loaded = last in WEIGHTS and not served and not {*doing}.isdisjoint(USERS.get(part, ()))
        if loaded and _is_folder(name) and not storage.exists(name):
            told.append(f"{field} is {name}, and there is no such folder.")
    asks_vllm = isinstance(backend, VLLMConfig) and "recaption" in doing and not cluster.address
    told += [WITHOUT_VLLM] if asks_vllm and not has_vllm() else []
    trained = {
        "train_captioner": None if isinstance(backend, Backend) else captioner,
        "train_tokenizer": recipe.tokenizer,
        "train_prior": recipe.prior,
    }
    rows = [batch for step, part in trained.items() if step in doing for batch in batches(part)]
    return told + lacks_here(cluster, rows, decodes=not {*doing}.isdisjoint(DECODE))


def _is_folder(name: str) -> bool:
    """Whether a name of weights can be nothing but a folder; others may be a hub's."""
    return name.startswith(("/", "./", "../", "~", "file://", "s3://")) or name.endswith("/")


def _written(recipe: Recipe) -> Sequence[str] | None:
    """The styles that the recipe's captions come in; None where that is not to be known yet."""
    captions, captioner = recipe.captions, recipe.captioner
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
