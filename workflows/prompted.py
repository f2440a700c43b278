"""`rescribe prompts`: prompts of Shapes that training does not answer, as a file that `sample` and `compare` take."""

import shlex
from dataclasses import dataclass
from typing import Any

import tyro

from infra import storage, strict
from workflows.commands import say
from workflows.corpora.prompts import Kind, held_out_prompts, prompt_line
from workflows.lookup import MAKERS, STORE, in_store, one, rephrased
from workflows.parse import parse
from workflows.real_pictures import shapes_of


@dataclass(frozen=True, kw_only=True)
class PromptsOptions:
    """Prompts of Shapes that no training scene says: short, long, or of two objects that never met so."""

    kind: tyro.conf.Positional[Kind]
    images: str = ""  # what ingest made of the Shapes that were trained on, or a run, or a store; else the store
    out: str = ""  # the file; by itself <kind>.jsonl
    count: int = 256
    seed: int = 0
    store: str = STORE
    json: bool = False


def write_prompts(arguments: list[str]) -> dict[str, Any]:
    """Write prompts that a corpus of Shapes holds out: `rescribe prompts compositional --images demo`."""
    options = parse(PromptsOptions, arguments, prog="rescribe prompts")
    given = options.images or options.store
    line = rephrased("prompts", arguments, given, "--images")
    images = one(in_store(given, options.store), MAKERS["images"], line)
    if (shapes := shapes_of(images)) is None:
        raise ValueError(
            f"{images.path} is no index of the built-in Shapes, of whose training alone all scenes are known."
        )
    asked = held_out_prompts(shapes, options.kind, options.count, options.seed)
    out = storage.absolute(options.out or f"{options.kind}.jsonl")
    storage.write_bytes(out, "".join(strict.dumps(prompt_line(each)) + "\n" for each in asked).encode())
    say(f"{len(asked)} prompts: {out}")
    say(f"Draw them: rescribe sample --prior NAME --prompts-file {shlex.quote(out)}")
    return {"prompts": len(asked), "file": out}
