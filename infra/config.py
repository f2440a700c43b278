"""Configs are frozen dataclasses: this file turns them into plain data, back, and into a fingerprint."""

import dataclasses
import difflib
import hashlib
import json
import types
import typing
from typing import Any


def to_dict(config: Any) -> Any:
    """Plain data (dicts, lists, strings, numbers, None) that says the same as `config`; `from_dict` is the way back.

    A dataclass that stands where its field admits several classes carries its class name under `"class"`.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        hints = typing.get_type_hints(type(config))
        return {
            field.name: _tagged(getattr(config, field.name), hints[field.name]) for field in dataclasses.fields(config)
        }
    if isinstance(config, dict):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    if isinstance(config, float):
        return config + 0.0  # the zero below zero is the same choice
    if config is None or isinstance(config, (bool, int, str)):
        return config
    raise TypeError(
        f"A config may hold dataclasses, dicts, lists, strings and numbers, but not {type(config).__name__}."
    )


def from_dict(cls: Any, data: Any) -> Any:
    """The value of type `cls` that `to_dict` wrote as `data`.

    Raises ValueError, naming the nearest field, where `data` has a key that `cls` lacks; a typo is never ignored.
    """
    origin, args = typing.get_origin(cls), typing.get_args(cls)
    if dataclasses.is_dataclass(cls) and isinstance(cls, type):
        return _dataclass_from_dict(cls, data)
    if origin in (typing.Union, types.UnionType):
        return _union_from_dict(args, data)
    if origin is typing.Literal and data not in args:
        raise ValueError(f"Expected one of {', '.join(map(repr, args))} but found {data!r}.")
    if origin is tuple:
        inner = [args[0]] * len(data) if len(args) == 2 and args[1] is Ellipsis else args
        return tuple(from_dict(kind, value) for kind, value in zip(inner, data, strict=True))
    if origin is list:
        return [from_dict(args[0], value) for value in data]
    if origin is dict:
        return {key: from_dict(args[1], value) for key, value in data.items()}
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if isinstance(cls, type) and cls is not object and not isinstance(data, cls):
        raise ValueError(f"Expected {cls.__name__} but found {data!r}.")
    return data


def fingerprint(config: Any) -> str:
    """SHA-256 (hex) of the config's canonical JSON: equal choices, equal fingerprint, on every machine."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _dataclass_from_dict(cls: type, data: dict) -> Any:
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} is written as a table of its fields, but {data!r} was found.")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in data:
        if key not in names and key != "class":
            near = difflib.get_close_matches(key, names, n=1)
            hint = f" Did you mean '{near[0]}'?" if near else f" It has: {', '.join(names)}."
            raise ValueError(f"{cls.__name__} has no field '{key}'.{hint}")
    return cls(**{name: from_dict(hints[name], data[name]) for name in names if name in data})


def _union_from_dict(kinds: tuple, data: Any) -> Any:
    if data is None and type(None) in kinds:
        return None
    classes = {str(getattr(kind, "__name__", kind)): kind for kind in kinds if dataclasses.is_dataclass(kind)}
    if isinstance(data, dict) and classes:
        name = data.get("class") or (next(iter(classes)) if len(classes) == 1 else None)
        if name not in classes:
            raise ValueError(f'This table needs "class": one of {", ".join(classes)}; found {name!r}.')
        return from_dict(classes[name], data)
    others = [kind for kind in kinds if kind is not type(None) and not dataclasses.is_dataclass(kind)]
    for kind in others:
        try:
            return from_dict(kind, data)
        except (TypeError, ValueError):
            continue
    raise ValueError(f"Expected one of {', '.join(str(getattr(k, '__name__', k)) for k in kinds)} but found {data!r}.")


def _tagged(value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else ()
    several = sum(kind is not type(None) for kind in kinds) > 1
    plain = to_dict(value)
    return {"class": type(value).__name__, **plain} if several and dataclasses.is_dataclass(value) else plain
