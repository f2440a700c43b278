"""Read the options of a line; what is wrong with one is said in the words of our pages."""

import contextlib
import dataclasses
import difflib
import io
import sys
import types
from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from infra.config import FieldError, expected

ONE_KIND = (tyro.conf.AvoidSubcommands,)  # a field of several types keeps that of its default
LIKE = 0.7  # how much a name is like another from here on, of 1
NAMED = 5  # options that a message names
_READS = {int: int, float: float, str: str, bool: {"True": True, "False": False}.__getitem__, object: str}


def parse(kind: Any, arguments: Sequence[str], prog: str, default: Any = None, more: Sequence[str] = ()) -> Any:
    """The options of class `kind`; ValueError where the line has an option that is not there, or a wrong value.

    `more` are options that the command takes beside, and that may be meant. `--help`, and an option that is wanted and
    is not there, end the process as tyro does it.
    """
    told, known = io.StringIO(), {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(told):
            return tyro.cli(kind, args=arguments, prog=prog, config=ONE_KIND, **known)
    except SystemExit as end:
        if end.code:
            _check(arguments, dict(_options(kind, default)), more, prog)
            _check_made(end)
        raise
    finally:
        if not isinstance(sys.exc_info()[1], ValueError):
            sys.stderr.write(told.getvalue())


def _check(arguments: Sequence[str], known: dict[str, Any], more: Sequence[str], prog: str) -> None:
    """ValueError with what is wrong with the first option that is."""
    if "" not in known and (stray := list(takewhile(lambda word: not word.startswith("--"), arguments))):
        raise ValueError(f"'{stray[0]}' belongs to no option.")
    for place, word in enumerate(arguments):
        if not word.startswith("--"):
            continue
        flag, equals, value = word.partition("=")
        plain = flag.replace("_", "-")
        name = plain if plain in known else _positive(plain)
        if name not in known:
            hint = _meant(plain, [*more, *filter(None, known)]) or f"See {prog} --help."
            raise ValueError(f"There is no option {flag}. {hint}")
        values = list(takewhile(lambda each: not each.startswith("--"), arguments[place + 1 :]))
        values = [value, *values] if equals else values
        if wrong := _wrong(known[name], values, several="" in known):
            raise FieldError(wrong, flag)


def _check_made(end: SystemExit) -> None:
    """ValueError where it was a config that would not have its values."""
    place, cause = "", end.__context__
    while cause is not None and not isinstance(cause, ValueError):
        place, cause = getattr(cause, "arg", place), cause.__context__
    if cause is not None:
        raise FieldError(str(cause), place.removeprefix("recipe").lstrip(".") if isinstance(place, str) else "")


def _options(kind: Any, default: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """The options of a class with their types; "" stands for those that have no name on the line."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        field = {each.name: each for each in dataclasses.fields(kind)}.get(name)
        if field is None:
            continue
        hint, marks = (get_args(hint)[0], get_args(hint)[1:]) if get_origin(hint) is Annotated else (hint, ())
        value = getattr(default, name, dataclasses.MISSING)
        if value is dataclasses.MISSING or default is None:
            value = field.default
            with contextlib.suppress(ValueError):  # a config that has to be told something has no default
                value = value if field.default_factory is dataclasses.MISSING else field.default_factory()
        flag = prefix + name.replace("_", "-")
        inner = type(value) if dataclasses.is_dataclass(value) else hint
        if any(each is tyro.conf.Positional for each in marks):
            yield "", hint
        elif isinstance(inner, type) and dataclasses.is_dataclass(inner):
            flat = any(getattr(each, "name", None) == "" for each in marks)
            there = value if dataclasses.is_dataclass(value) else None
            yield from _options(inner, there, prefix if flat else f"{flag}.")
        elif isinstance(value, tuple) and value and all(map(dataclasses.is_dataclass, value)):
            for place, each in enumerate(value):
                yield from _options(type(each), each, f"{flag}.{place}.")
        elif isinstance(value, dict) and value:
            yield from ((f"{flag}.{key}".replace("_", "-"), get_args(hint)[-1]) for key in value)
        else:
            yield flag, hint


def _positive(flag: str) -> str:
    """The option that `--mix.no-floor` says no to."""
    before, dot, last = flag.removeprefix("--").rpartition(".")
    return f"--{before}{dot}{last.removeprefix('no-')}"


def _meant(flag: str, known: Sequence[str]) -> str:
    """The options that are most like one, the likest first: by their last word, then by all of them."""

    def like(other: str) -> tuple[float, float]:
        pairs = ((flag.rpartition(".")[2].lstrip("-"), other.rpartition(".")[2].lstrip("-")), (flag, other))
        last, whole = (difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)
        return last + whole if "." in flag else last, whole

    found = sorted({each: like(each) for each in known}.items(), key=lambda pair: pair[1], reverse=True)
    least = 2 * LIKE if "." in flag else LIKE
    near = [name for name, (score, _) in found[:NAMED] if score >= least]
    return f"Did you mean {' or '.join([', '.join(near[:-1]), near[-1]] if near[1:] else near)}?" if near else ""


def _wrong(hint: Any, values: list[str], several: bool) -> str:
    """What is wrong with the words after an option; `several`: words may follow that are not its own."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if "None" in values and type(None) in kinds:
        return ""
    kinds = tuple(kind for kind in kinds if kind is not type(None))
    if any(get_origin(kind) not in (None, Literal, tuple) or dataclasses.is_dataclass(kind) for kind in kinds):
        return ""  # a table
    rows = [each for each in kinds if get_origin(each) is tuple]
    if rows and len(rows) == len(kinds) == 1:
        inner = get_args(rows[0])
        if inner[-1] is not Ellipsis and len(values) != len(inner) and not (several and len(values) > len(inner)):
            return f"expected {len(inner)} values, found {len(values)}"
        pairs = zip([inner[0]] * len(values) if inner[-1] is Ellipsis else inner, values, strict=False)
        return next((wrong for kind, value in pairs if (wrong := _wrong(kind, [value], several))), "")
    if rows or (not values and bool in kinds):
        return ""
    said = " or None" if type(None) in get_args(hint) else ""
    if not values:
        return expected(Union[kinds], said)  # noqa: UP007
    if not any(_is(kind, values[0]) for kind in kinds):
        return expected(Union[kinds], said, values[0])  # noqa: UP007
    return "" if several or not values[1:] else f"expected one value, found {len(values)}: {' '.join(values)}"


def _is(kind: Any, word: str) -> bool:
    if get_origin(kind) is Literal:
        return word in map(str, get_args(kind))
    with contextlib.suppress(ValueError, KeyError):
        _READS.get(kind, str)(word)
        return True
    return False
