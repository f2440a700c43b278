"""Configs are frozen dataclasses: this file turns them into plain data, back, and into a fingerprint."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class FieldError(ValueError):
    """What is wrong in plain data, and in which field: `prior.train.steps: expected a whole number, found "many"`."""

    def __init__(self, said: str, path: str = "") -> None:
        super().__init__(f"{path}: {said}" if path else said)
        self.said, self.path = said, path


def setting(
    default: Any = dataclasses.MISSING,
    *,
    default_factory: Any = dataclasses.MISSING,
    since: str = "",
    was: type | None = None,
) -> Any:
    """A field of a config that artifacts were already made with, so that what was made before stays good.

    `since` is the version in which the field was added. While it has its default, the fingerprint leaves it out: that
    default says what was done before, and must never change. `was` is the class that the field held alone before it
    held several: one of that class is written and fingerprinted without its name, and a table without a name is one.
    """
    if since and default is dataclasses.MISSING and default_factory is dataclasses.MISSING:
        raise TypeError("A field that was added later needs a default: what was done before there was a choice.")
    told: dict[str, Any] = {"default": default, "default_factory": default_factory}
    return dataclasses.field(**told, metadata={"since": since, "was": was})


def to_dict(config: Any) -> Any:
    """Plain data (dicts, lists, strings, numbers, None) that says the same as `config`; `from_dict` is the way back.

    A dataclass carries its class name under `"class"` where its field, or the list, tuple or dict in it, admits
    several kinds of value. TypeError for what could not be told apart again: a class that the field does not name,
    two classes of one name in a field, keys that are no strings, `"class"` as a key where a dataclass may stand, too.
    """
    return _plain(config, type(config) if dataclasses.is_dataclass(config) else _UNKNOWN)


def from_dict(cls: Any, data: Any) -> Any:
    """The value of type `cls` that `to_dict` wrote as `data`, of the same fingerprint.

    An integer in the field of a float stays one, as Python lets it.

    Raises FieldError, naming the nearest field, where `data` has a key that `cls` lacks; a typo is never ignored.
    """
    return _read(cls, data, None)


def fingerprint(config: Any) -> str:
    """SHA-256 (hex) of the config's canonical JSON: unequal choices, unequal fingerprints, on every machine.

    Choices are equal where `to_dict` writes equal JSON and their fields have one type. So `1`, `1.0` and `True` are
    three choices, though Python calls them equal; a tuple and a list of the same values are one choice, and so are
    0.0 and -0.0. Two dataclasses with equal fields are two choices, by the names of their classes. A field that was
    added later (`setting(since=...)`) counts only when it has not its default.
    """
    type_ = type(config) if dataclasses.is_dataclass(config) else _UNKNOWN
    text = json.dumps(_plain(config, type_, brief=True), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def with_floats(config: Any) -> Any:
    """`config` with floats for the integers in its fields of floats: so `from_dict` read them before 0.2."""
    return _floats(config, type(config))


_UNKNOWN = object()  # the type of what stands in no field
_hints = cache(typing.get_type_hints)


def _plain(value: Any, hint: Any, was: type | None = None, brief: bool = False) -> Any:
    """`value` of a field of type `hint` as plain data; `brief` leaves out what counts as not there."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _table(value, hint, was, brief)
    if isinstance(value, dict):
        if any(not isinstance(key, str) for key in value):
            raise TypeError(f"The keys of a dict in a config are strings, but {list(value)!r} has others.")
        if "class" in value and _classes(hint):
            raise TypeError("A dict cannot have the key 'class' where a dataclass may stand in its place.")
        inner = _inside(hint, dict)
        return {key: _plain(each, inner(1), was, brief) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        inner = _inside(hint, list, tuple)
        return [_plain(each, inner(place), was, brief) for place, each in enumerate(value)]
    if isinstance(value, float):
        return value + 0.0  # the zero below zero is the same choice
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TypeError(f"A config holds dataclasses, dicts, lists, strings and numbers, but no {type(value).__name__}.")


def _floats(value: Any, hint: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = _hints(type(value))
        told = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **{name: _floats(each, hints[name]) for name, each in told.items()})
    if isinstance(value, dict):
        inner = _inside(hint, dict)
        return {key: _floats(each, inner(1)) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        inner = _inside(hint, list, tuple)
        return type(value)(_floats(each, inner(place)) for place, each in enumerate(value))
    kinds = _kinds(hint)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    return value


def _table(value: Any, hint: Any, was: type | None, brief: bool) -> dict[str, Any]:
    cls, hints, table = type(value), _hints(type(value)), {}
    for field in dataclasses.fields(value):
        plain = _plain(getattr(value, field.name), hints[field.name], field.metadata.get("was"), brief)
        if not (brief and field.metadata.get("since") and same(plain, _default(field, hints[field.name]))):
            table[field.name] = plain
    if hint is _UNKNOWN:
        return {"class": cls.__name__, **table}
    kinds = _kinds(hint)
    if cls not in kinds:
        raise TypeError(f"A field of type {hint} holds a {cls.__name__}, which it does not name: it could not be read.")
    if sum(getattr(kind, "__name__", "") == cls.__name__ for kind in kinds) > 1:
        raise TypeError(f"A field of type {hint} names two classes {cls.__name__}, which could not be told apart.")
    if cls is was and any(typing.get_origin(kind) is dict for kind in kinds):
        raise TypeError(f"A field that was a {cls.__name__} cannot become {hint}: a dict could be read as one.")
    return table if len(kinds) == 1 or cls is was else {"class": cls.__name__, **table}


def _default(field: dataclasses.Field, hint: Any) -> Any:
    """A field's default as plain data."""
    known = field.default is not dataclasses.MISSING
    default: Any = field.default if known else field.default_factory()  # type: ignore[misc]
    return _plain(default, hint, field.metadata.get("was"), brief=True)


def same(a: Any, b: Any) -> bool:
    """Whether plain data is the same, 1 and True being two things."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types that a field admits, beside None."""
    several = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return tuple(kind for kind in (typing.get_args(hint) if several else (hint,)) if kind is not type(None))


def _classes(hint: Any) -> dict[str, type]:
    """The dataclasses that a field admits, by name."""
    return {kind.__name__: kind for kind in _kinds(hint) if isinstance(kind, type) and dataclasses.is_dataclass(kind)}


def _inside(hint: Any, *origins: type) -> Callable[[int], Any]:
    """`inside(place)`: the type of what stands at a place of the containers that a field admits."""
    containers = [typing.get_args(kind) for kind in _kinds(hint) if typing.get_origin(kind) in origins]

    def inside(place: int) -> Any:
        admitted = [args[0] if len(args) == 1 or args[-1] is Ellipsis else args[place] for args in containers if args]
        return typing.Union[tuple(admitted)] if admitted else _UNKNOWN if hint is _UNKNOWN else object  # noqa: UP007

    return inside


def _read(cls: Any, data: Any, was: type | None) -> Any:
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        return _dataclass_from_dict(cls, data)
    if origin in (typing.Union, types.UnionType):
        return _union_from_dict(cls, data, was)
    if origin is typing.Literal and data not in args:
        raise _expected(cls, data)
    if origin in (tuple, list):
        if not isinstance(data, (list, tuple)):
            raise _expected(cls, data)
        inner = [args[0]] * len(data) if origin is list or args[-1] is Ellipsis else args
        if len(inner) != len(data):
            raise FieldError(f"expected {len(inner)} values, found {_shown(data)}")
        return origin(_read_at(place, kind, data[place], was) for place, kind in enumerate(inner))
    if origin is dict:
        if not isinstance(data, dict):
            raise _expected(cls, data)
        return {key: _read_at(key, args[1], value, was) for key, value in data.items()}
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return data  # as it was written: a float would be another choice to `fingerprint`
    if isinstance(cls, type) and cls is not object and not isinstance(data, cls):
        raise _expected(cls, data)
    return data


def _read_at(name: Any, cls: Any, data: Any, was: type | None) -> Any:
    """What stands in a field, whose name an error carries."""
    with _named(name):
        return _read(cls, data, was)


@contextmanager
def _named(name: Any) -> Iterator[None]:
    try:
        yield
    except FieldError as error:
        raise FieldError(error.said, f"{name}.{error.path}" if error.path else str(name)) from error
    except ValueError as error:  # a config's own
        raise FieldError(str(error), str(name)) from error


def _dataclass_from_dict(cls: type, data: dict) -> Any:
    if not isinstance(data, dict):
        raise _expected(cls, data)
    if data.get("class", cls.__name__) != cls.__name__:
        raise FieldError(f'A table of a {cls.__name__} was expected, but its "class" is {data["class"]!r}.')
    hints = _hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in data:
        if key not in fields and key != "class":
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" It has: {', '.join(fields)}."
            raise FieldError(f"{cls.__name__} has no field '{key}'.{hint}")
    nothing = dataclasses.MISSING
    for name, field in fields.items():
        if name not in data and field.default is nothing and field.default_factory is nothing:
            raise FieldError(expected(hints[name]), name)
    told = {
        name: _read_at(name, hints[name], data[name], fields[name].metadata.get("was"))
        for name in fields
        if name in data
    }
    return cls(**told)


def _union_from_dict(hint: Any, data: Any, was: type | None) -> Any:
    kinds, classes = _kinds(hint), _classes(hint)
    if data is None and type(None) in typing.get_args(hint):
        return None
    if len(kinds) == 1:
        return _read(kinds[0], data, was)
    others = [kind for kind in kinds if kind not in classes.values()]
    tables = any(typing.get_origin(kind) is dict for kind in others)
    if isinstance(data, dict) and classes and ("class" in data or not tables):
        only = next(iter(classes.values())) if len(classes) == 1 else None
        name = data.get("class") or getattr(was if was in classes.values() else only, "__name__", None)
        if name not in tuple(classes):  # it may be anything
            raise FieldError(f'expected "class": one of {", ".join(classes)}, found {_shown(name)}')
        return _dataclass_from_dict(classes[name], data)
    found = []
    for kind in others:
        try:
            found.append(_read(kind, data, was))
        except (TypeError, ValueError):
            continue
    if not found:
        raise _expected(hint, data)
    # What may be read in several ways is read as what says the same again.
    return next((value for value in found if same(_plain(value, hint, was), data)), found[0])


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", type(None): "null"}
_CONTAINERS = {dict: "an object", list: "a list", tuple: "a list"}


def expected(hint: Any, further: str = "", *found: Any) -> str:
    """What is said of a value that does not fit a field's type: what might stand there, and what does, if anything."""
    return f"expected {_words(hint)}{further}, found {_shown(found[0]) if found else 'nothing'}"


def _expected(hint: Any, data: Any) -> FieldError:
    return FieldError(expected(hint, "", data))


def _words(hint: Any) -> str:
    """A field's type as a page would say it."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(json.dumps(each) for each in args)
    if classes := _classes(hint):
        others = [_words(kind) for kind in args if kind not in classes.values()]
        return " or ".join([*others, f"an object ({' or '.join(classes)})"])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_words, args)))
    return _CONTAINERS.get(origin or hint) or _WORDS.get(hint) or str(getattr(hint, "__name__", hint))


def _shown(data: Any) -> str:
    text = json.dumps(data, default=str)
    return text if len(text) <= 80 else f"{text[:80]} ..."
