"""The rows of the split `test` that are first by sample id: those that are scored, drawn and shown."""

from collections.abc import Callable, Iterable
from typing import TypeVar

from infra.data.first import first_rows
from infra.store import Artifact
from workflows.judge import TEST

Row = TypeVar("Row")


def first_held_out(
    images: Artifact, count: int, read: Callable[[str], Iterable[Row]], sample_id: Callable[[Row], str]
) -> list[Row]:
    """The first `count` by sample id of what `read` finds of the held-out rows of each shard."""
    return first_rows(images.path, "split", TEST, count, read, sample_id, images.records() or {})
