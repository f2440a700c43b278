"""The line that makes a report again: that of a recipe, if one makes the very same, else that of its last step."""

import shlex
from contextlib import suppress
from typing import Any

from infra import storage
from infra.artifact import Artifact
from infra.config import from_dict, to_dict
from infra.store import Plan
from workflows.line import flags

RECIPE = "recipe.json"


def line_again(config: Any, images: Artifact, captions: Artifact, *models: Artifact | None, out: str) -> str:
    """`rescribe run <out>/recipe.json`, where a recipe's steps end in `out`, which is written there; else `evaluate`.

    `models` are what `evaluate` takes besides: captioner, tokenizer, prior and samples.
    """
    root = out.rsplit("/", 2)[0]
    if (recipe := _recipe(config, images, captions, *models)) is not None:
        plan = Plan(root)
        with suppress(OSError, ValueError):  # what it is made of lies elsewhere, or is no recipe's
            recipe.run(plan)
        if plan.lines and plan.lines[-1][:2] == ("evaluate", storage.name(out)):
            storage.write_json(storage.join(out, RECIPE), to_dict(recipe))
            return shlex.join(["rescribe", "run", storage.join(out, RECIPE), "--store", root])
    names = ("images", "captions", "captioner", "tokenizer", "prior", "samples")
    words = [
        word
        for name, each in zip(names, (images, captions, *models), strict=True)
        if each
        for word in (f"--{name}", each.path)
    ]
    return shlex.join(["rescribe", "evaluate", *words, *flags(to_dict(config), type(config)()), "--store", root])


def _recipe(
    config: Any,
    images: Artifact,
    captions: Artifact,
    captioner: Artifact | None = None,
    tokenizer: Artifact | None = None,
    prior: Artifact | None = None,
    samples: Artifact | None = None,
) -> Any:
    """The recipe of the first kind whose steps these are; None where they are those of none."""
    from workflows.text_to_image import Recipe  # which knows this step

    if tokenizer is None or prior is None or samples is None:
        return None
    with suppress(OSError, ValueError, KeyError):
        beside = {each.step: each.manifest["config"] for each in prior.inputs}
        made = {
            "name": "again",
            "corpus": images.manifest["config"],
            "captioner": captioner and captioner.manifest["config"],
            "captions": None if captions.path == images.path else captions.manifest["config"],
            "mix": beside["mix"],
            "tokenizer": tokenizer.manifest["config"],
            "codes": beside["encode"],
            "prior": prior.manifest["config"],
            "sample": samples.manifest["config"],
            "report": to_dict(config),
            "text_features": [each.manifest["config"] for each in prior.inputs if each.step == "encode_text"],
        }
        return from_dict(Recipe, made)
    return None
