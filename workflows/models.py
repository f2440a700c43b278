"""The models that have a name: of each a function in its own file, which says what was published and where."""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import tyro

from infra import strict
from infra.config import to_dict
from infra.others import others
from workflows.commands import choose, columns
from workflows.parse import parse

ROOT = Path(__file__).parents[1]
# Of t2i, by folder; another's is called as its folder.
FAMILIES = {"tokenizers": "tokenizer", "priors": "prior", "conditions": "encoder"}
OTHERS = {"rescribe.tokenizers": "tokenizer", "rescribe.priors": "prior"}  # entry points of other packages


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """The models that have a name: how many parameters each has, in which paper it is, what it draws and hears."""

    json: bool = False


@dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """A model's config, and where its numbers are from."""

    name: tyro.conf.Positional[str]
    json: bool = False


@dataclass(frozen=True)
class Named:
    """A function without arguments that returns a config, or a config and what its `build` takes beside.

    Its docstring's first sentence ends with the number of its parameters; the others say where its numbers are from.
    """

    name: str
    family: str
    module: str
    about: str
    paper: str  # an arXiv number; none: no paper has it

    @property
    def parameters(self) -> int:
        """As its docstring says; tests hold it exact."""
        found = re.search(r"([\d,]+) parameters", self.about)
        return int(found[1].replace(",", "")) if found else 0

    def make(self) -> tuple[Any, ...]:
        """The config, and what its `build` takes beside."""
        made = getattr(importlib.import_module(self.module), self.name)()
        return made if isinstance(made, tuple) else (made,)

    def count(self) -> int:
        """Its parameters, counted on the meta device; a weight under two names counts once."""
        config, *beside = self.make()
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in config.build(*beside).parameters())

    def row(self) -> dict[str, Any]:
        """What `list models` tells."""
        draws, hears = _told(self.family, *self.make())
        told = {"name": self.name, "family": self.family, "paper": self.paper, "parameters": self.parameters}
        return told | {"draws": draws, "hears": hears}


def list_models(arguments: list[str]) -> dict[str, Any]:
    """List all models that have a name: `rescribe list models`."""
    parse(ListOptions, arguments, "rescribe list models")
    rows = [each.row() for each in named().values()]
    sizes = [f"{row['parameters']:>13,}  {row['family']:<9}  {row['paper'] or '-':<16}" for row in rows]
    told = [f"{size}  {row['draws']}, hears {row['hears']}" for size, row in zip(sizes, rows, strict=True)]
    print("\n".join(columns((row["name"], line) for row, line in zip(rows, told, strict=True))))
    return {"models": rows}


def show_model(arguments: list[str]) -> dict[str, Any]:
    """Print a model's config, and where its numbers are from: `rescribe show model vqgan_f16_1024`."""
    options = parse(ShowOptions, arguments, "rescribe show model")
    found = choose(options.name, named(), "model")
    config = found.make()[0]
    shown = found.row() | {"parameters": found.count(), "about": found.about, "module": found.module}
    shown |= {"class": type(config).__name__, "config": to_dict(config)}
    if not options.json:
        print(strict.dumps(shown, indent=2))
    return shown


@cache
def named() -> dict[str, Named]:
    """Every model that has a name, by it; found in the syntax trees, so that what has none is not imported."""
    found: dict[str, Named] = {}
    for family, module, path in _files():
        for each in _named(family, module, path):
            found.setdefault(each.name, each)  # ours come first, and keep their names
    return found


def _files() -> Iterator[tuple[str, str, Path]]:
    """The family, the module and the file of all that may hold models: ours, and those of other packages' configs."""
    for package in ("captioner", "t2i"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            family = parts[1] if package == "t2i" else package
            yield FAMILIES.get(family, family), ".".join(parts), path
    for group, family in OTHERS.items():
        for module in sorted({kind.__module__ for kind in others(group).values()}):
            yield family, module, Path(sys.modules[module].__file__ or "")


def _named(family: str, module: str, path: Path) -> Iterator[Named]:
    text = path.read_text()
    if not re.search(r"^def [a-z]\w*\(\) -> ", text, re.MULTILINE):  # to parse every file takes ten times as long
        return
    tree = ast.parse(text)
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_") or ast.unparse(node.args):
            continue
        if node.returns and re.match(r"(tuple\[)?\w+Config\b", ast.unparse(node.returns)):
            about = ast.get_docstring(node) or ""
            paper = re.search(r"arXiv (\d{4}\.\d{4,5})", about)
            yield Named(node.name, family, module, about, f"arXiv {paper[1]}" if paper else "")


def _told(family: str, config: Any, *beside: Any) -> tuple[str, str]:
    """What a model draws, and what it hears."""
    if family == "captioner":
        height, width = config.vision.image_size
        return f"texts of {config.text.max_length} tokens", f"pictures of {height}x{width}"
    if family == "clip":
        side = config.image_size
        return f"vectors of {config.width}", f"pictures of {side}x{side}, texts of {config.length} tokens"
    if family == "encoder":
        pooled = f", and one of {config.projection} a text" if getattr(config, "projection", 0) else ""
        return f"vectors of {config.width} a token{pooled}", f"texts of {config.length} tokens"
    if family == "tokenizer":
        side, size = 256 // config.grid((256, 256))[0], config.quantizer.size
        values = f"codes of {size:,}" if size else f"latents of {config.quantizer.width}"
        return f"{values}, each of {side}x{side} pixels", "pictures"
    if family == "prior":
        space, conditions = beside
        values = f"codes of {space.codes:,}" if space.codes else "pixels" if space.bound else "latents"
        heard = ", ".join(condition.name for condition in conditions)
        return f"{'x'.join(map(str, space.shape))} {values}", heard or "nothing"
    return "", ""
