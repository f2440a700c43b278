"""The line that makes a report again: that of a recipe, if one makes the very same, else that of its last step."""

import shlex
from contextlib import suppress
from typing import Any

from infra import storage
from infra.artifact import Artifact
from infra.config import to_dict
from workflows.encode import encode
from workflows.encode_text import encode_text
from workflows.ingest import ingest
from workflows.line import flags
from workflows.mix import mix
from workflows.recaption import recaption
from workflows.sample import sample
from workflows.train_captioner import train_captioner
from workflows.train_prior import train_prior
from workflows.train_tokenizer import train_tokenizer

RECIPE = "recipe.json"
STEPS = (ingest, train_captioner, recaption, mix, train_tokenizer, encode, encode_text, train_prior, sample)
VERSIONS = {work.name: work.version for work in STEPS}


def line_again(config: Any, images: Artifact, captions: Artifact, *models: Artifact | None, out: str) -> str:
    """`rescribe run <out>/recipe.json`, which is written there, where a recipe of the first kind makes all of this.

    Else it is the line of `evaluate`, on artifacts that are there. `models` are what it takes besides: captioner,
    tokenizer, prior and samples.
    """
    root = out.rsplit("/", 2)[0]
    with suppress(OSError, ValueError, KeyError):  # what it is made of lies elsewhere, or is no recipe's
        if (recipe := _recipe(config, images, captions, *models)) is not None:
            storage.write_json(storage.join(out, RECIPE), recipe)
            return shlex.join(["rescribe", "run", storage.join(out, RECIPE), "--store", root])
    names = ("images", "captions", "captioner", "tokenizer", "prior", "samples")
    given = zip(names, (images, captions, *models), strict=True)
    words = [word for name, each in given if each for word in (f"--{name}", each.path)]
    return shlex.join(["rescribe", "evaluate", *words, *flags(to_dict(config), type(config)()), "--store", root])


def _recipe(
    config: Any,
    images: Artifact,
    captions: Artifact,
    captioner: Artifact | None = None,
    tokenizer: Artifact | None = None,
    prior: Artifact | None = None,
    samples: Artifact | None = None,
) -> dict[str, Any] | None:
    """The recipe whose steps these are, as data; None where one of them would be made otherwise, or of others."""
    if tokenizer is None or prior is None or samples is None:
        return None
    mixture, codes, _, *features = prior.inputs
    own = captions.path == images.path
    alike = [
        _alike(ingest.name, images),
        captioner is None or _alike(train_captioner.name, captioner, images),
        own or _alike(recaption.name, captions, images, captioner),
        _alike(mix.name, mixture, images, captions),
        _alike(train_tokenizer.name, tokenizer, images),
        _alike(encode.name, codes, images, tokenizer),
        all(_alike(encode_text.name, each, images, captions) for each in features),
        _alike(train_prior.name, prior, mixture, codes, tokenizer, *features),
        _alike(sample.name, samples, mixture, prior, tokenizer),
    ]
    if not all(alike):
        return None
    return {
        "name": "again",
        "corpus": images.manifest["config"],
        "captioner": captioner and captioner.manifest["config"],
        "captions": None if own else captions.manifest["config"],
        "mix": mixture.manifest["config"],
        "tokenizer": tokenizer.manifest["config"],
        "codes": codes.manifest["config"],
        "prior": prior.manifest["config"],
        "sample": samples.manifest["config"],
        "report": to_dict(config),
        "text_features": [each.manifest["config"] for each in features],
    }


def _alike(step: str, made: Artifact, *inputs: Artifact | None) -> bool:
    """Whether a step, as it is now, makes this artifact of these inputs: neither an older version nor a revision."""
    ids = [each.id for each in inputs if each is not None]
    return (made.step, made.manifest["version"]) == (step, VERSIONS[step]) and (
        "." not in made.id and [each.id for each in made.inputs] == ids
    )
