"""JSON as its standard has it (RFC 8259), which other programs read: what is no finite number is null."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps`, with null in the place of NaN and the infinities, wherever they stand."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def restated(text: str) -> str:
    """A JSON text, of others perhaps, as `dumps` would have it; as it is where it is strict, or no JSON at all."""
    if "NaN" not in text and "Infinity" not in text:
        return text
    found: list[str] = []
    try:
        value = json.loads(text, parse_constant=lambda name: found.append(name))
    except (ValueError, RecursionError):
        return text
    return dumps(value) if found else text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key) if isinstance(key, float) else key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return value
