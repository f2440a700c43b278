"""Read a line of the command before it is sent away: the paths in it, the trainings that it asks for."""

import dataclasses
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from infra import storage
from infra.config import to_dict
from workflows.lookup import is_name

WRITTEN = ("store", "out")  # options that name a folder, whether it is there yet or not
READ = (
    "corpus",
    "images",
    "captions",
    "captioner",
    "model",
    "matcher",
    "clip",
    "judge",
    "mixture",
    "tokenizer",
    "codes",
    "prior",
    "samples",
    "hashes",
    "verdicts",
    "more",
    "chain",
    "extractor",
    "yardstick",
    "tokenizers",
    "prompts_file",
    "path",
    "paths",
)


def placed(line: list[str], asked: Any, shared: Sequence[str] | None) -> list[str]:
    """The line with absolute paths, for a driver that runs in another folder.

    `shared` are the folders that the cluster sees too; None: all of them, since it is this machine.
    """
    absolute = {}
    found = list(strings(asked))
    if line[0] == "run" and line[1].endswith(".json"):  # a recipe's file
        found.append(("path", line[1]))
    for name, value in found:
        if _is_place(name, value):
            path = storage.absolute(value)
            if shared is not None and not any(Path(path).is_relative_to(storage.absolute(one)) for one in shared):
                raise ValueError(
                    f"{name} is {value}, on this machine, which the cluster does not see. Give an s3:// address, or "
                    f"name the folder that every node mounts under the same path: --shared {os.path.dirname(path)}."
                )
            absolute[value] = path
    made: list[str] = []
    for word in line:
        flag, equals, value = word.partition("=")
        if word.startswith("--") and equals:
            made.append(f"{flag}={absolute.get(value, value)}")
        else:
            made.append(absolute.get(word, word) if made else word)
    store = getattr(asked, "store", None)
    if store is not None and not any(word.split("=")[0] == "--store" for word in line):
        made = with_options(made, ["--store", absolute.get(store, store)])
    return made


def with_options(line: list[str], more: list[str]) -> list[str]:
    """The line with options of the command itself, which stand before those of its subcommands."""
    place = 2 if line[0] == "run" else 1
    return line[:place] + more + line[place:]


def _is_place(name: str, value: str) -> bool:
    """Whether an option's value is a path of this machine."""
    if not storage.is_local(value) or not value:
        return False
    last = name.rpartition(".")[2]
    if last in WRITTEN or value.startswith(("/", "~/", "./", "../", "file://")):
        return True
    there = os.path.exists(value) or any(letter in value for letter in "*?[{")
    return last in READ and (there or ("/" in value and is_name(value)))


def words(line: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every word of a line, with the option that it belongs to."""
    for place, word in enumerate(line):
        before = line[place - 1] if place else ""
        if word.startswith("--"):
            yield word.partition("=")[0], word
        elif before.startswith("--") and "=" not in before:
            yield before, word
        else:
            yield f"Word {place + 1} of the line", word


def strings(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every string within options, with the name of its field."""
    if isinstance(value, str):
        yield name, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from strings(getattr(value, field.name), f"{name}.{field.name}".lstrip("."))
    elif isinstance(value, dict):
        for key, one in value.items():
            yield from strings(one, f"{name}.{key}".lstrip("."))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from strings(one, name)


def batches(value: Any) -> Iterator[int]:
    """The global batch of every training within options."""
    from infra.train.loop import TrainConfig  # brings torch, and who asks after a job does without

    if isinstance(value, TrainConfig):
        yield value.batch
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from batches(getattr(value, field.name))


def flags(config: Mapping[str, Any], default: Any, whole: Collection[str] = ()) -> list[str]:
    """Options that say what a config, as data, has otherwise than a default one, and all that stands in fields `whole`.

    Of a field that holds a config of another class than the default's, no option says which class it is.
    """
    there, words = to_dict(default), list[str]()
    before = dict(_leaves(there, there))
    for name, value in _leaves(config, there):
        if value == before.get(name) and name.partition(".")[0] not in whole:
            continue
        folder, dot, last = name.replace("_", "-").rpartition(".")
        if isinstance(value, bool):
            words.append(f"--{folder}{dot}{'' if value else 'no-'}{last}")
        else:
            pairs = [word for pair in value.items() for word in pair] if isinstance(value, Mapping) else value
            words += [f"--{folder}{dot}{last}", *map(str, pairs if isinstance(pairs, list) else [pairs])]
    return words


def _leaves(value: Mapping[str, Any], there: Mapping[str, Any], name: str = "") -> Iterator[tuple[str, Any]]:
    """By dotted name; a table of any names, as a default has it empty, is a leaf."""
    for key, each in value.items():
        if isinstance(each, Mapping) and there.get(key):
            yield from _leaves(each, there[key], f"{name}{key}.")
        elif key != "class":
            yield f"{name}{key}", each
