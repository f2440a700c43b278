"""What installed packages add to ours: classes of models, and recipes, by entry points."""

import dataclasses
from functools import cache, reduce
from importlib.metadata import entry_points
from operator import or_
from typing import Any, get_args


@cache
def others(group: str) -> dict[str, Any]:
    """What the entry points of a group name, by their names; ValueError where one cannot be imported."""
    found = {}
    for point in entry_points(group=group):
        try:
            found[point.name] = point.load()
        except Exception as error:
            whose = point.dist.name if point.dist else "A package"
            raise ValueError(
                f"{whose} adds {point.name} = {point.value} to {group}, which cannot be imported: {error}. Mend it, or "
                f"uninstall {whose}. A config's module must not import a recipe's, nor `workflows`."
            ) from error
    return found


def with_others(kinds: Any, group: str) -> Any:
    """The type of a config's field that holds one of `kinds`, or of the dataclasses of a group.

    ValueError for what is no dataclass, and for a name that is taken: by its class's name a config is read again.
    """
    ours = {kind.__name__: kind for kind in get_args(kinds) or (kinds,)}
    for kind in others(group).values():
        if not (isinstance(kind, type) and dataclasses.is_dataclass(kind)):
            raise ValueError(f"{group} is for configs, which are frozen dataclasses; found {kind!r}.")
        if ours.setdefault(kind.__name__, kind) is not kind:
            raise ValueError(f"{group} has a second {kind.__name__}, of {kind.__module__}: give it another name.")
    return reduce(or_, ours.values())
