"""What a line may begin with, and the first line on each, read from the syntax trees: nothing heavy is imported."""

import ast
import difflib
import gc
import importlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from importlib.metadata import entry_points
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import Any

# Which function of which module answers a verb, and which module holds a step, a function of the step's own name.
VERBS = {
    "run": "verbs.run",
    "plan": "verbs.plan",
    "show": "look.show",
    "settings": "verbs.settings",
    "list": "look.list_artifacts",
    "shapes": "verbs.shapes",
    "convert_dvae": "converted.convert_dvae",
    "prompts": "prompted.write_prompts",
    "verify": "look.verify",
    "retry": "verbs.retry",
    "recaption": "verbs.recaption_corpus",
    "gallery": "verbs.gallery",
    "compare": "compared.compare_models",
    "rate": "rated.rate_pairs",
    "export": "verbs.export_corpus",
    "submit": "submit.submit",
    "status": "submit.status",
    "logs": "submit.logs",
    "stop": "submit.stop",
}
STEPS = {
    "ingest": "ingest",
    "train_captioner": "train_captioner",
    "recaption": "recaption",
    "mix": "mix",
    "train_tokenizer": "train_tokenizer",
    "encode": "encode",
    "train_prior": "train_prior",
    "train_clip": "train_clip",
    "sample": "sample",
    "evaluate": "evaluate",
    "encode_text": "encode_text",
    "hash_images": "deduplicate",
    "deduplicate": "deduplicate",
    "examine": "examine",
    "train_extractor": "yardstick",
    "calibrate": "yardstick",
    "measure": "yardstick",
    "rebuild": "rebuild",
}
# Recipes of other kinds than those of `recipes.py`: functions of the recipe's own name, and the module of each.
KINDS = {"cascade": "cascade", "clip": "clip", "tokenizers": "tokenizers", "yardstick": "yardstick"}
DECODE = ("recaption", "encode_text", "encode", "sample")  # steps whose actors hold models
COUNTS = ("rows_in", "accepted", "rejected", "failed", "shards")  # of rows, in this order, that a line tells
ON_RECIPES = ("run", "plan", "settings")  # verbs whose first word is a recipe
# The options of a recipe that are asked for most; `--help-all` lists all.
OPTIONS = {
    "--corpus PATTERN": "shards, a folder or a table, local or s3://, in the place of the recipe's corpus",
    "--seed N": "of every draw",
    "--store FOLDER": "where all that is made lies, local or s3:// (runs)",
    "--name NAME": "of this run, to be asked for by (the recipe's)",
    "--cluster NAME": "laptop, one_gpu, one_node or elastic; changes no result",
    "--cluster.workers LEAST MOST": "how many train",
    "--cluster.address ADDRESS": "of a Ray cluster that is up; auto: this machine's",
    "--corpus.image-size HEIGHT WIDTH": "that pictures are fitted to",
    "--captioner WHO": "a model's name or folder, vllm:NAME, a server (and its --model), an artifact, or none",
    "--captions FOLDER": "captions that are there",
    "--captions.batch N": "images that are captioned together",
    "--mix.weights STYLE=SHARE ...": "how often each style is read, in all 1; alt: the corpus's own texts",
    "--mix.min-words N": "of a caption that is read",
    "--tokenizer.train.steps N": "and --captioner.base.steps, --prior.train.steps",
    "--prior.optim.lr RATE": "and --tokenizer.optim.lr",
    "--sample.count N": "pictures that are drawn at the end",
    "--json": "the results as one object, last on standard output",
}

# Those of `plan` alone.
PLAN_OPTIONS = {
    "--probe": "run a piece of each step that is not done, and tell what all of it takes; nothing of it stays",
    "--price N": "of an hour of this machine, for the cost",
    "--probe-steps N": "of each training that are run (40); --probe-rows N of a shard (1,000)",
}


class ChoiceError(ValueError):
    """Several artifacts fit; the text has a line for each."""


def function(place: str) -> Callable[..., Any]:
    """The function at `<module>.<name>`, as VERBS has them; its module, and all that it needs, is imported here."""
    module, name = place.split(".")
    return getattr(load(module), name)


def load(module: str) -> ModuleType:
    """A module of `workflows`, with all that it needs.

    What is imported stays. So Python does not look through it for garbage, neither now nor when it ends: of `plan` that
    took 40 % of the time.
    """
    name = f"workflows.{module}"
    if name in sys.modules:
        return sys.modules[name]
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def recipes() -> dict[str, str]:
    """What each recipe is, by name: the functions of `recipes.py` and of KINDS, and what other packages add."""
    made = [node for node in _functions("recipes").values() if ast.unparse(node.returns or node) == "Recipe"]
    made += [_functions(module)[name] for name, module in KINDS.items()]
    added = entry_points(group="rescribe.recipes")
    return {each.name: f"Of {each.dist.name if each.dist else each.module}." for each in added} | {
        node.name: _first_line(node) for node in made
    }


def overview() -> str:
    """All verbs, steps and recipes, a line each."""
    verbs = [place.split(".") for place in VERBS.values()]
    told = {
        "Commands (each with --help)": zip(VERBS, [_first_line(_functions(m)[n]) for m, n in verbs], strict=True),
        "Steps (on finished artifacts)": [
            (n, _first_line(_functions(m)[n])) for n, m in STEPS.items() if n not in VERBS
        ],
        "Recipes": recipes().items(),
    }
    return "\n".join(line for title, lines in told.items() for line in ("", f"{title}:", *columns(lines)))


def help_of(verb: str) -> str:
    """How a verb on recipes is used: the recipes, and the options that are asked for most."""
    about = _first_line(_functions("verbs")[verb])
    lines = [about, "", f"usage: rescribe {verb} RECIPE [options]"]
    lines += ["", "Recipes, or a .json file that `show` wrote:", *columns(recipes().items())]
    lines += ["", "Options:", *columns((OPTIONS | (PLAN_OPTIONS if verb == "plan" else {})).items())]
    lines += ["", f"Any field of the recipe and of the cluster is one: rescribe {verb} RECIPE --help-all"]
    return "\n".join(lines)


def choose(name: str, known: dict[str, Any], what: str) -> Any:
    """What is known by a name; ValueError with the nearest name where none is."""
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(known)}."
    raise ValueError(f"There is no {what} '{name}'. {hint}")


def check_recipe(name: str) -> None:
    """ValueError where a word is neither a recipe's name nor could be its file."""
    if "/" in name or re.fullmatch(r".*\.js\w*", name):
        raise ValueError(
            f"{name} is no recipe: the file of one ends in .json, as `rescribe show demo > mine.json` writes it."
        )
    choose(name, recipes(), "recipe")


def check_quoted(arguments: Sequence[str]) -> None:
    """ValueError where a shell has put the names of many files in the place of a pattern."""
    for place, word in enumerate(arguments):
        if word not in ("--corpus", "--corpus.corpus"):
            continue
        given = list(takewhile(lambda each: not each.startswith("-"), arguments[place + 1 :]))
        if len(given) > 1:
            folders, endings = ({part(name) for name in given} for part in (os.path.dirname, _ending))
            ending = endings.pop() if len(endings) == 1 else ""
            pattern = os.path.join(folders.pop() if len(folders) == 1 else "*", f"*{ending}")
            raise ValueError(
                f"{word} has {len(given)} values, as when the shell spells out a pattern. Quote it: {word} '{pattern}'"
            )


def _ending(name: str) -> str:
    return os.path.splitext(name)[1]


def numbered(names: Iterable[str]) -> list[str]:
    """Names of which later ones of a kind are numbered, as the priors of a cascade: `train_prior`, `train_prior 2`."""
    found: Counter[str] = Counter()
    told = []
    for name in names:
        found[name] += 1
        told.append(name if found[name] == 1 else f"{name} {found[name]}")
    return told


def say(text: str) -> None:
    """Tell the user, beside the results."""
    print(text, file=sys.stderr, flush=True)


def columns(lines: Iterable[tuple[str, str]]) -> list[str]:
    """Names, and beside them what is said of each."""
    lines = list(lines)
    width = max(len(name) for name, _ in lines)
    return [f"  {name:<{width}}  {about}" for name, about in lines]


@cache
def _functions(module: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text())
    return {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}


def _first_line(node: ast.FunctionDef) -> str:
    return (ast.get_docstring(node) or "").partition("\n")[0]
