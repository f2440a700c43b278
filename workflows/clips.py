"""A CLIP that judges or measures: where it lies, what it is, and which one a line of the command means.

It is named by an artifact of `train_clip`, by a folder, local or s3://, or by a hub's name.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

from infra import storage, strict
from infra.artifact import MANIFEST
from workflows.lookup import Line, contents, in_store, one
from workflows.train_tokenizer import weights_of

FIELDS = ("clip", "judge")  # of configs, that name one
MAKER = "train_clip"


def key_of(named: str) -> str | None:
    """A hash of all files in its folder, so that another CLIP in the same place is another; None for a hub's name."""
    folder = weights_of(named)
    if not folder or not storage.exists(folder):
        return None
    found = storage.listing(folder, follows=lambda path: True)  # in a hub's cache files are links
    files = [(file.url.removeprefix(folder).lstrip("/"), storage.digest(file.url)["sha256"]) for file in found]
    return hashlib.sha256(strict.dumps(sorted(files)).encode()).hexdigest()


def in_words(given: str, store: str, line: Line) -> str:
    """The artifact that a store, a step's folder or a name such as `latest` stands for; else what was given.

    ValueError for an artifact of another step, or where several fit.
    """
    place = in_store(given, store) if given else ""
    made = bool(place) and storage.exists(storage.join(place, MANIFEST))
    if place and (made or contents(place)):
        found = one(place, (MAKER,), line)
        return given if made else found.path  # where it is named by its folder, that is what a config says
    return given


def with_clips(config: Any, store: str, line_of: Callable[[str, str], Line]) -> Any:
    """A step's config with artifacts in the place of such words; `line_of(given, flag)` makes the line anew."""
    named = {each.name: getattr(config, each.name) for each in fields(config) if each.name in FIELDS}
    found = {name: in_words(given, store, line_of(given, f"--{name}")) for name, given in named.items() if given}
    return replace(config, **found) if found else config
