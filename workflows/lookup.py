"""From what a command was given, the folder of an artifact, a step or a store, or a name in one, to what is meant.

`latest` is what was begun last of what ended and fits. Another name stands for what one run made or found: a small file
in its store, `names/<name>.json`, written when the run ends. A name stands where a folder would, after its store or the
folder of a step (`runs/demo`, `runs/mix/latest`), or alone, in the store of the command. What lies there by the path
itself comes first.
"""

import difflib
import os
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from infra import storage, strict
from infra.artifact import MANIFEST, Artifact
from workflows.commands import ChoiceError

STORE = "runs"  # where nothing else is said
CAPTIONED = ("mix", "recaption", "caption_with")  # steps whose artifacts stand for captioned rows
# Which steps make what a parameter of a step takes.
MAKERS = {
    "images": ("ingest",),
    "captioner": ("train_captioner",),
    "captions": ("recaption", "caption_with"),
    "mixture": ("mix",),
    "tokenizer": ("train_tokenizer",),
    "codes": ("encode",),
    "more": ("encode_text", "encode"),
    "prior": ("train_prior",),
    "samples": ("sample",),
    "hashes": ("hash_images",),
    "verdicts": ("deduplicate", "examine"),
    "chain": ("train_prior", "train_tokenizer"),
    "extractor": ("train_extractor", "train_clip"),
    "yardstick": ("calibrate",),
    "tokenizers": ("train_tokenizer",),
}
_ORDER = [step for steps in MAKERS.values() for step in steps]
_KNOWN = {
    *_ORDER,
    "measure",
    "rebuild",
    "evaluate",
    "compare",
    "rate",
    "export",
}  # what a step of somebody else's made is taken by their word
MOST = 20  # artifacts that a message lists
_ID = re.compile(r"[0-9a-f]{16}(?:\.\d+)?")

LATEST, POINTERS = "latest", "names"

Line = Callable[[str], str]  # the line to give with a path in the folder's place


def in_store(given: str, store: str) -> str:
    """A word alone, which is no folder here, as a name in the store of the command."""
    return given if "/" in given or not given or storage.exists(given) else storage.join(store, given)


def check_name(name: str) -> None:
    """ValueError where a run cannot be called so."""
    if not re.fullmatch(r"\w[\w.-]*", name) or name in (LATEST, POINTERS, *_KNOWN):
        raise ValueError(
            f"A run cannot be called {name!r}: give --name letters, digits, '-', '_' and '.', and not the name of a "
            f"step or {LATEST!r}."
        )


def keep_name(store: str, name: str, made: Sequence[Artifact]) -> None:
    """From now on a name stands for these artifacts, by their paths within the store, so that it can be moved."""
    root = storage.absolute(store) + "/"
    paths = list(dict.fromkeys(artifact.path.removeprefix(root) for artifact in made))
    storage.write_json(_pointer(store, name), {"name": name, "artifacts": paths})


def made_by(store: str, name: str) -> list[str]:
    """The paths of what a name stands for in a store, in the order in which it was made; none without the name."""
    with suppress(FileNotFoundError):
        paths = storage.read_json(_pointer(store, name))["artifacts"]
        return [path if "://" in path or path.startswith("/") else storage.join(store, path) for path in paths]
    return []


def names(store: str) -> list[str]:
    """All names that a store knows."""
    return [name.removesuffix(".json") for name in storage.list_names(storage.join(store, POINTERS))]


def _pointer(store: str, name: str) -> str:
    return storage.join(store, POINTERS, f"{name}.json")


def is_name(given: str) -> bool:
    """Whether what was given is a name, by which nothing lies at its path."""
    return bool(_named(given)[1])


def _named(given: str) -> tuple[str, str, list[str]]:
    """The folder in which a name is looked for, the name, and the paths that it points to; a folder as it is given."""
    path = in_store(given, STORE).rstrip("/")
    place, _, name = path.rpartition("/")
    if not place or storage.exists(path):
        return given.rstrip("/") or "/", "", []
    if name == LATEST:
        return place, name, []
    for store, step in ((place, ""), (os.path.dirname(place), storage.name(place))):
        if made := [path for path in made_by(store, name) if step in ("", path.split("/")[-2])]:
            return place, name, made
    return given.rstrip("/"), "", []


def contents(given: str) -> dict[str, list[str]]:
    """The paths of artifacts by step, ended or not, in a store, in the folder of one step, or by a name."""
    given, _, pointed = _named(given)
    if pointed:
        by_step: dict[str, list[str]] = {}
        for path in pointed:
            by_step.setdefault(path.split("/")[-2], []).append(path)
        return by_step
    names = storage.list_names(given)
    if here := [name for name in names if _ID.fullmatch(name)]:
        return {storage.name(storage.absolute(given)): [storage.join(given, name) for name in here]}
    below = {step: storage.list_names(storage.join(given, step)) for step in names if step.isidentifier()}
    paths = {step: [storage.join(given, step, one) for one in ids if _ID.fullmatch(one)] for step, ids in below.items()}
    return {step: found for step, found in paths.items() if found}


def finished(given: str, steps: Sequence[str] = ()) -> list[Artifact]:
    """Every artifact of `steps` (none: of any) in a folder, superseded ones too, by the time they were begun.

    FileNotFoundError where there is none, with what there is; ValueError if the folder is an artifact of another step.
    """
    if storage.exists(storage.join(given, MANIFEST)):
        artifact = _open(given)
        if steps and artifact.step in _KNOWN.difference(steps):
            raise ValueError(
                f"{given} was made by {artifact.step}; give what {' or '.join(steps)} made, or the store that holds it."
            )
        return [artifact]
    place, name, _ = _named(given)
    if name == LATEST:
        return finished(place, steps)[-1:]
    there = contents(given)
    ended = {step: [path for path in paths if _has_ended(path)] for step, paths in there.items()}
    found = [_open(path) for step, paths in ended.items() if not steps or step in steps for path in paths]
    if found:
        return sorted(found, key=_age)
    if not there:
        if meant := _meant(given):
            raise FileNotFoundError(f"Nothing in {os.path.dirname(given)} is called '{storage.name(given)}'. {meant}")
        Artifact.open(given)  # says that nothing is there
    held = ", ".join(f"{len(paths)} of {step}" for step, paths in ended.items() if paths)
    cut = [path for step, paths in there.items() if not steps or step in steps for path in paths]
    raise FileNotFoundError(
        f"{given} holds no finished artifact"
        + (f" of {' or '.join(steps)}" if steps else "")
        + (f", but {held}." if held else ".")
        + (f" {cut[0]} was begun: give the line again that makes it." if cut else "")
    )


def _meant(given: str) -> str:
    """The name, or the step, that a path by which nothing lies is most like, or the names that there are."""
    place, _, word = given.rstrip("/").rpartition("/")
    if not place or not storage.exists(place):
        return ""
    above, step = os.path.dirname(place), storage.name(place)
    steps = [name for name in storage.list_names(place) if name in _KNOWN]
    known = [*names(place), *(each for each in names(above) if step in _KNOWN), LATEST, *steps]
    near = difflib.get_close_matches(word, known, n=1)
    return f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(known[:MOST])}." if known[1:] else ""


def current(given: str, steps: Sequence[str]) -> list[Artifact]:
    """What `finished` finds, without those that a revision, or a line on revised inputs, has made anew."""
    found = finished(given, steps)
    newest = {_lineage(artifact): artifact for artifact in found} if len(found) > 1 else dict(enumerate(found))
    return sorted(newest.values(), key=_age)


def furthest(found: Sequence[Artifact]) -> list[Artifact]:
    """The artifacts without those that others of them were made of: of captions and their mixture, the mixture."""
    used = {tail(path) for artifact in found for path in artifact.manifest.get("inputs", ())}
    return [artifact for artifact in found if tail(artifact.path) not in used]


def only(found: Sequence[Artifact], given: str, line: Line) -> Artifact:
    """The one artifact; ChoiceError with a line for each where there are several."""
    if len(found) == 1:
        return found[0]
    listed = "".join(
        f"\n  {line(as_given(given, artifact.path))}    # {_told(artifact, found)}" for artifact in found[-MOST:]
    )
    more = f"\n  and {len(found) - MOST} older ones" if len(found) > MOST else ""
    raise ChoiceError(f"{given} holds {len(found)} artifacts that fit. Say which one:{listed}{more}")


def one(given: str, steps: Sequence[str], line: Line) -> Artifact:
    """The artifact of `steps` that a folder stands for: itself, or the only one that is current."""
    return only(current(given, steps), given, line)


def inputs_of(name: str, given: str, line: Line) -> list[Artifact]:
    """What a folder stands for as the parameter `name` of a step: one artifact, of verdicts one of each step."""
    steps = MAKERS[name]
    if name == "captions" and storage.exists(storage.join(given, MANIFEST)):
        steps = (*steps, "ingest")  # the corpus's own texts
    if name != "verdicts":
        return [one(given, steps, line)]
    found = current(given, steps)
    made = [[artifact for artifact in found if artifact.step == step] for step in steps]
    return [only(artifacts, given, line) for artifacts in made if artifacts]


def rephrased(verb: str, arguments: Sequence[str], given: str, flag: str = "") -> Line:
    """What makes the line of the command again with a path in the place of `given`, which follows `flag` if any."""
    words = [verb, *arguments]
    places = [n for n, word in enumerate(words) if n and word == given and (not flag or _flag(words, n) == flag)]

    def line(path: str) -> str:
        if places:
            made = [*words[: places[0]], path, *words[places[0] + 1 :]]
        else:
            joined = f"{flag}={given}"
            made = [f"{flag}={path}" if flag and word == joined else word for word in words]
            made += [] if made != words else [flag, path] if flag else [path]
        return shlex.join(["rescribe", *made])

    return line


def _flag(words: Sequence[str], place: int) -> str:
    """The option that a word belongs to: the last one before it."""
    return next((word for word in reversed(words[:place]) if word.startswith("--")), "")


def _open(path: str) -> Artifact:
    return Artifact.open(storage.absolute(path))


def _has_ended(path: str) -> bool:
    return storage.exists(storage.join(path, MANIFEST))


def _age(artifact: Artifact) -> tuple[str, int, int]:
    """Orders artifacts by the second in which they were begun; within it what is made of others comes after them."""
    place = _ORDER.index(artifact.step) if artifact.step in _ORDER else len(_ORDER)
    return artifact.manifest.get("started", ""), place, int(artifact.id.partition(".")[2] or 0)


def tail(path: str) -> str:
    """`<step>/<id>`, which names an artifact wherever its store lies."""
    return "/".join(path.split("/")[-2:])


def _lineage(artifact: Artifact) -> str:
    """Equal for artifacts that differ only in that they, or what they were made of, were retried."""
    manifest = artifact.manifest
    try:
        inputs = [_lineage(each) for each in artifact.inputs]
    except (OSError, KeyError):  # it was made elsewhere, of what is not to be seen here
        inputs = [path.partition(".")[0] for path in map(tail, manifest.get("inputs", ()))]
    made_of = [manifest.get(name) for name in ("step", "version", "config", "key")]
    return strict.dumps([*made_of, inputs or artifact.id.partition(".")[0]], sort_keys=True)


def as_given(given: str, path: str) -> str:
    """A path below a folder, in the words that the folder was given in."""
    given = _named(given)[0]
    root = storage.absolute(given).rstrip("/")
    return storage.join(given, path.removeprefix(root).lstrip("/")) if path.startswith(root + "/") else path


def _told(artifact: Artifact, others: Sequence[Artifact]) -> str:
    """When it was made, of what, and where its config differs from those of the others of its step."""
    alike = [each for each in others if each.step == artifact.step]
    told = [artifact.manifest.get("started", "")]
    configs = [dict(leaves(each.manifest.get("config"))) for each in alike]
    own = dict(leaves(artifact.manifest.get("config")))
    told += [f"{name} {own.get(name)}"[:60] for name in own if len({each.get(name) for each in configs}) > 1][:3]
    made_of = [tuple(map(tail, each.manifest.get("inputs", ()))) for each in alike]
    own_inputs = [tail(path) for path in artifact.manifest.get("inputs", ())]
    shared = set(made_of[0]).intersection(*made_of)
    if differing := [path for path in own_inputs if path not in shared or len(alike) < len(others)]:
        told.append(f"of {' and '.join(differing)}")
    return ", ".join(filter(None, told))


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """What a config holds, by dotted name, as JSON."""
    if isinstance(value, dict) and value:
        for key, one in value.items():
            yield from leaves(one, f"{name}.{key}".lstrip("."))
    else:
        yield name, strict.dumps(value)
