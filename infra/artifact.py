"""An artifact is an immutable folder that knows what made it; a step makes one of a config and other artifacts."""

import hashlib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from infra import storage, strict
from infra.config import fingerprint
from infra.data.growth import Pieces, of_inputs
from infra.data.ledger import LEDGER, Ledger, Record

MANIFEST = "manifest.json"  # written last: its presence means that the step finished
OWN_ROWS = "prompts"  # rows that a step made up lie in it, as those of an artifact do; no input has them
BEGUN = "begun.json"  # what of it is known before: shards of an artifact that was cut may be of use to others


@dataclass(frozen=True)
class Artifact:
    """An immutable folder that knows the config and the inputs that made it."""

    path: str
    manifest: dict[str, Any] = field(repr=False)

    @staticmethod
    def open(path: str) -> "Artifact":
        """The finished artifact at `path`, local or s3://; FileNotFoundError where there is none."""
        try:
            return Artifact(path.rstrip("/"), storage.read_json(storage.join(path, MANIFEST)))
        except FileNotFoundError:
            raise FileNotFoundError(
                f"There is no finished artifact at {path}: it has no {MANIFEST}. Give the folder of a step that ended."
            ) from None

    @staticmethod
    def begun(path: str) -> "Artifact | None":
        """The artifact at `path`, whether it was finished or cut; None where neither is known."""
        for name in (MANIFEST, BEGUN):
            with suppress(FileNotFoundError):
                return Artifact(path, storage.read_json(storage.join(path, name)))
        return None

    @property
    def step(self) -> str:
        """The name of the step that made it."""
        return self.manifest["step"]

    @property
    def id(self) -> str:
        """The hash of all that went into it."""
        return self.manifest["id"]

    @property
    def summary(self) -> dict[str, Any]:
        """What the step said of its result: counts, scores."""
        return self.manifest["summary"]

    @cached_property
    def inputs(self) -> list["Artifact"]:
        """The artifacts that it was made from, in the order of the step's parameters."""
        root = self.path.rsplit("/", 2)[0]
        named = self.manifest["inputs"]
        return [Artifact.open(url if "://" in url or url.startswith("/") else storage.join(root, url)) for url in named]

    @property
    def content(self) -> Any:
        """What is equal where all that lies in it is: its files, wherever they came from; else its id.

        One that holds none, as the name of somebody else's model, is what its config says.
        """
        files = self.manifest.get("files")
        return [self.step, self.manifest["config"] if files == {} else files or self.id]

    def records(self) -> Mapping[str, Record | None] | None:
        """The records of its shards; None where it has none."""
        return Ledger(self.path).complete() if LEDGER in self.manifest.get("files", {}) else None

    @property
    def has_own_rows(self) -> bool:
        """Whether its rows are none of its inputs'."""
        return f"{OWN_ROWS}/{LEDGER}" in self.manifest.get("files", {})

    @property
    def rows_of(self) -> list[str]:
        """The folders whose rows those of its shards are."""
        return [self.url(OWN_ROWS)] if self.has_own_rows else [each.path for each in self.inputs]

    def url(self, *parts: str) -> str:
        """A path within the artifact."""
        return storage.join(self.path, *parts)


@dataclass(frozen=True)
class Planned(Artifact):
    """Stands for an artifact that is not made yet; of its shards those are known that it will take over."""

    foreseen: Mapping[str, Record | None] | None = None

    def records(self) -> Mapping[str, Record | None] | None:
        """None in place of a record that is yet to be made."""
        return self.foreseen


@dataclass(frozen=True)
class Step:
    """A function from a config and artifacts to a folder and its summary; `version` rises when its result changes.

    A step that makes each shard by itself says of what (`shards`, see `infra/data/growth.py`): of the artifact at a
    path, or of one to be made now. One with more to say in a plan than whether it will run has lines of it (`told`):
    of its artifact, or of one that is not made yet.
    """

    work: Callable[..., dict[str, Any]]
    version: int
    key: Callable[[Any], Any] | None
    shards: Callable[[Any, Sequence[Artifact], str | None], Pieces] | None = None
    listed: str = ""  # the field of the config that says no more than which shards there are
    told: Callable[[Any, Sequence[Artifact], Artifact | None], list[str]] | None = None

    @property
    def name(self) -> str:
        """The name of the command and of the folder."""
        return self.work.__name__

    @property
    def config_class(self) -> type:
        """The class of its config."""
        return next(iter(inspect.signature(self.work).parameters.values())).annotation

    @property
    def input_names(self) -> dict[str, bool]:
        """The artifacts that it takes, by parameter, and whether it does without."""
        parameters = list(inspect.signature(self.work).parameters.values())[1:]
        without = {p.name: type(None) in get_args(p.annotation) for p in parameters}
        return {p.name: without[p.name] for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}

    def arranged(self, inputs: Sequence[Artifact], without: Collection[str]) -> list[Artifact | None]:
        """The inputs of an artifact as the step takes them, None in the place of those that it was made `without`."""
        there = iter(inputs)
        named = [None if name in without else next(there, None) for name in self.input_names]
        return [*named, *there]

    def identity(self, config: Any, inputs: Sequence[Artifact | None]) -> str:
        """The artifact's id: 16 hexadecimal digits of a hash of name, version, config, inputs and own key."""
        ids = [artifact.id for artifact in inputs if artifact is not None]  # that of an input says its step, too
        made_of = [self.name, self.version, fingerprint(config), ids]
        made_of.append(self.key(config) if self.key else None)
        return hashlib.sha256(strict.dumps(made_of).encode()).hexdigest()[:16]


def by_shard(config: Any, inputs: Sequence[Artifact], path: str | None) -> Pieces:
    """Of a step whose shards are made of those of its inputs."""
    return of_inputs(inputs)


def step(
    version: int = 1,
    key: Callable[[Any], Any] | None = None,
    shards: Callable[[Any, Sequence[Artifact], str | None], Pieces] | None = None,
    listed: str = "",
    told: Callable[[Any, Sequence[Artifact], Artifact | None], list[str]] | None = None,
) -> Callable[[Callable], Step]:
    """Make a Step of `work(config, *artifacts, out, cluster, report) -> summary`.

    `key(config)` adds what the config does not say to the artifact's id, as the listing of a corpus.
    """
    return lambda work: Step(work, version, key, shards, listed, told)
