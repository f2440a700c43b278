"""Who wrote a caption, and how: a record in JSON that stands beside the caption, in a column of its own.

The column `provenance_<style>` is text to every reader, goes where its row goes, whatever it is filtered by or joined
with, and costs some five bytes a row: Parquet keeps one copy of it for hundreds of rows.
"""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from captioner.styles import Style

PROVENANCE = "provenance"
# What computes a caption. Those that are not installed are left out of a record.
LIBRARIES = ("rescribe", "torch", "transformers", "tokenizers", "pillow", "vllm")
_WEIGHTS = ("*.safetensors", "*.bin", "*.pt")  # transformers takes the first sort that is there

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Author:
    """The model that wrote captions. `revision` or `weights_sha256` says which weights, where that can be known."""

    model: str  # a hub's name, a folder, an artifact, or what a server calls it
    backend: str  # what ran it: "rescribe", "transformers", "vllm" or "endpoint"
    dtype: str | None  # the precision that ran; None where a server decides
    revision: str | None = None  # a commit of a hub
    weights_sha256: str | None = None
    seed: int | None = None  # None: nothing is drawn
    settings: Mapping[str, Any] = field(default_factory=dict)  # what else changes a caption, such as a server's address


def record(author: Author, style: Style, decoding: Mapping[str, Any]) -> Record:
    """The whole truth of a caption but for the versions of libraries, which `Sign` adds where they are."""
    return {
        "model": author.model,
        "revision": author.revision,
        "weights_sha256": author.weights_sha256,
        "backend": author.backend,
        "style": style.name,
        "prompt": style.prompt,
        **({"decoder": style.decoder} if style.decoder else {}),
        "decoding": dict(decoding),
        **author.settings,
        "seed": author.seed,
        "dtype": author.dtype,
    }


@dataclass
class Sign:
    """A stage: writes `provenance_<style>` beside each caption, and None where there is none.

    `records` holds, by style, one record for each attempt at a caption. With more than one, `attempt_<style>` says
    which of them, counted from 1, wrote a row's caption.
    """

    records: Mapping[str, Sequence[Record]]
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(init=False)
    writes: tuple[str, ...] = field(init=False)
    types: dict[str, str] = field(init=False)
    _lines: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        several = tuple(f"attempt_{style}" for style, records in self.records.items() if len(records) > 1)
        self.reads = (*(f"caption_{style}" for style in self.records), *several)
        self.types = {f"{PROVENANCE}_{style}": "string" for style in self.records}
        self.writes = tuple(self.types)

    def setup(self) -> None:
        """Note the versions of the libraries that are installed here, where captions are made."""
        here = {"libraries": libraries()}
        self._lines = {
            style: [json.dumps(each | here, allow_nan=False) for each in each_of]
            for style, each_of in self.records.items()
        }

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """The records of a batch's captions."""
        return {f"{PROVENANCE}_{style}": self._of(style, lines, batch) for style, lines in self._lines.items()}

    def _of(self, style: str, lines: list[str], batch: dict[str, list]) -> list[str | None]:
        texts = batch[f"caption_{style}"]
        attempts = batch[f"attempt_{style}"] if len(lines) > 1 else [1] * len(texts)
        return [None if text is None else lines[attempt - 1] for text, attempt in zip(texts, attempts, strict=True)]


def libraries() -> dict[str, str]:
    """Versions of what computes captions, on this machine."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def public_name(model: str) -> str:
    """A model as it may be told to others: a folder by its last part, for where it lies is no matter; a hub's name."""
    return Path(model).name if Path(model).is_dir() else model


def identify(model: str, revision: str = "") -> dict[str, Any]:
    """`model`, `revision` and `weights_sha256` of published weights: a hub's name and commit, a folder's name and hash.

    A folder whose weights are several files has the hash of what `sha256sum *.safetensors` says of them. What cannot be
    found out is None.
    """
    if Path(model).is_dir():
        return {"model": public_name(model), "revision": None, "weights_sha256": _hash_folder(Path(model))}
    from transformers.utils.hub import cached_file  # slow, and wanted here alone

    try:
        path = cached_file(model, "config.json", revision=revision or None)
    except OSError:
        path = None
    parts = Path(path).parts if path else ()
    commit = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return {"model": model, "revision": commit or revision or None, "weights_sha256": None}


def _hash_folder(folder: Path) -> str | None:
    files = next((found for kind in _WEIGHTS if (found := sorted(folder.glob(kind)))), [])
    hashes = {file.name: _hash_file(file) for file in files}
    if len(hashes) < 2:
        return next(iter(hashes.values()), None)
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in hashes.items()).encode()).hexdigest()


def _hash_file(file: Path) -> str:
    with file.open("rb") as opened:  # read in pieces: weights may be larger than memory
        return hashlib.file_digest(opened, "sha256").hexdigest()
