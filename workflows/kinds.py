"""What recipes of every kind have in common: a name, and that they run themselves in a store."""

import dataclasses
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from infra.artifact import Artifact, Planned, Step
from infra.config import FieldError, from_dict, to_dict
from infra.store import Plan, Store
from workflows import recipes, text_to_image


class Recipe(Protocol):
    """Every choice that changes the numbers of a run; a frozen keyword-only dataclass, of a class name of its own."""

    @property
    def name(self) -> str:
        """Of the runs, if the command says no other."""
        ...

    def run(self, store: Store | Plan) -> Artifact:
        """Make what it describes, or find it, by `store.step` alone; returns the last artifact.

        What it does may not depend on what artifacts hold: a plan has none.
        """
        ...


class Part(NamedTuple):
    """A step of a recipe, its config, or what stands in its place, and the field of the recipe that has it."""

    field: str  # as an option names it: `links.0.prior`
    work: Step
    config: Any


def parts_of(recipe: Recipe) -> list[Part]:
    """The steps of a recipe that are not left out, in their order; nothing is made, and nothing is read."""
    listed = _Listed()
    recipe.run(listed)
    fields = {id(value): name for name, value in _fields(recipe)}
    return [Part(fields.get(id(config), work.name), work, config) for work, config in listed.steps]


def written(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data, with the name of its kind, but for that of `text_to_image.py`."""
    kind = {} if isinstance(recipe, text_to_image.Recipe) else {"class": type(recipe).__name__}
    return kind | to_dict(recipe)


def read(data: Any) -> Recipe:
    """The recipe that `written` wrote; FieldError where there is no such kind, or a field that it lacks."""
    kinds = {kind.__name__: kind for kind in _kinds()}
    name = data.get("class", text_to_image.Recipe.__name__) if isinstance(data, dict) else text_to_image.Recipe.__name__
    if name not in tuple(kinds):  # it may be anything
        raise FieldError(f'expected "class": one of {", ".join(kinds)}, found {name!r}')
    return from_dict(kinds[name], data)


def _kinds() -> Iterator[type]:
    """That of `text_to_image.py`, and what functions of recipes say they return."""
    yield text_to_image.Recipe
    for make in recipes.RECIPES.values():
        kind = typing.get_type_hints(make).get("return")
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield kind


class _Listed(Plan):
    """Stands where a plan stands, and only lists what it is given."""

    def __init__(self) -> None:
        super().__init__(".")
        self.steps: list[tuple[Step, Any]] = []

    def step(self, work: Step, config: Any, *inputs: Artifact | None) -> Any:
        if config is None:
            return None
        self.steps.append((work, config))
        return Planned(work.name, {"step": work.name, "id": work.name, "inputs": [], "config": {}, "summary": {}})


def _fields(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All that stands in the fields of a recipe, in their tuples and in what stands there, with the names."""
    for field in dataclasses.fields(value):
        yield from _elements(getattr(value, field.name), f"{name}{field.name}")


def _elements(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    yield name, value
    if isinstance(value, tuple):
        for place, each in enumerate(value):
            yield from _elements(each, f"{name}.{place}")
    elif dataclasses.is_dataclass(value):
        yield from _fields(value, f"{name}.")
