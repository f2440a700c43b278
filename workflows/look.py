"""What `rescribe` tells of what was made: `show`, `list` and `verify`, without models, recipes and Ray."""

import json
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import tyro

from infra import storage, strict
from infra.artifact import OWN_ROWS, Artifact
from infra.data.ledger import LEDGER
from infra.data.verify import unlisted, verify_files, verify_shards
from workflows.commands import COUNTS, function, recipes, say
from workflows.lookup import STORE, as_given, contents, finished, in_store, leaves, made_by, names, one, rephrased, tail
from workflows.parse import parse


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """The finished artifacts of a store, or of one step; `rescribe list models`: the models that have a name."""

    path: tyro.conf.Positional[str] = ""  # a store's folder, or a step's in it; none: that of --store
    store: str = STORE
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """Every row accounted for, every byte as it was written; ends with 1 where that is not so."""

    paths: tyro.conf.Positional[tuple[str, ...]]  # folders of artifacts, of steps, of stores: whatever is in them
    json: bool = False


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """An artifact's manifest."""

    store: str = STORE  # in which a word alone is a name
    json: bool = False


def show(arguments: list[str]) -> dict[str, Any]:
    """Print a recipe, an artifact's manifest or a model: `rescribe show demo`, `show runs/mix`, `show model mar_b`."""
    if not arguments or arguments[0].startswith("-"):
        if {"-h", "--help"}.isdisjoint(arguments):
            raise ValueError("Say what to show: a recipe's name, an artifact's folder, or model NAME.")
        print(
            "usage: rescribe show RECIPE [its options] | PATH_OR_NAME [--store FOLDER] | model NAME  [--json]\n\n"
            "Print a recipe as a file for `run`, the manifest of an artifact, by its folder or its name in a store, or "
            "a model's config."
        )
        return {}
    target = arguments[0]
    if target == "model":
        return function("models.show_model")(arguments[1:])
    if target in recipes() or target.endswith(".json"):
        shown = function("verbs.recipe_of")(arguments)  # takes seconds, as every line does that makes a recipe
    else:
        store = parse(StoreOptions, arguments[1:], "rescribe show").store
        shown = one(in_store(target, store), (), rephrased("show", arguments, target)).manifest
    if "--json" not in arguments:
        print(strict.dumps(shown, indent=2))
    return shown


def list_artifacts(arguments: list[str]) -> dict[str, Any]:
    """List the finished artifacts of a store, or of one step in it: `rescribe list runs`; `list models`: all sizes."""
    if arguments[:1] == ["models"]:
        return function("models.list_models")(arguments[1:])
    options = parse(ListOptions, arguments, "rescribe list")
    place = options.path or options.store
    try:
        found = finished(place)
    except FileNotFoundError:
        if contents(place):  # what is there was begun, and that is said
            raise
        there = f"There is nothing finished in {place} yet." if storage.exists(place) else f"There is no store {place}."
        raise FileNotFoundError(
            f"{there} Start with `rescribe run debug`, or on pictures of yours: `rescribe run own --corpus FOLDER`."
        ) from None
    roots = {artifact.path.rsplit("/", 2)[0] for artifact in found}
    named = {name: {*made_by(root, name)} for root in roots for name in names(root)}
    known: dict[str, list[Artifact]] = {}
    told = [_facts(artifact, _lineage(artifact, known), named) for artifact in found]
    for each in told:
        facts = [f"{each['rows']:,} rows" if "rows" in each else "", each.get("corpus", "")]
        facts += [
            f"captions by {each['captioner']}" if "captioner" in each else "",
            f"run {', '.join(each['names'])}" if each["names"] else "",
        ]
        line = f"{each['started']}  {each['seconds']:>8,.1f} s  {as_given(place, each['path'])}"
        print(f"{line}  {', '.join(filter(None, facts))}".rstrip())
    return {"artifacts": [artifact.path for artifact in found], "told": told}


def _lineage(artifact: Artifact, known: dict[str, list[Artifact]]) -> list[Artifact]:
    """The artifact, and all that it was made of as far as that is to be seen; `known` so far, by `<step>/<id>`."""
    made_of = [tail(path) for path in artifact.manifest.get("inputs", ())]
    if not {*made_of} <= {*known}:
        with suppress(OSError, KeyError):
            for each in artifact.inputs:
                _lineage(each, known)
    known[tail(artifact.path)] = [artifact, *(one for path in made_of for one in known.get(path, ()))]
    return known[tail(artifact.path)]


def _facts(artifact: Artifact, lineage: list[Artifact], named: dict[str, set[str]]) -> dict[str, Any]:
    """What an artifact is known by beside its id."""
    manifest = artifact.manifest
    facts = {"path": artifact.path, "started": manifest.get("started", ""), "seconds": manifest.get("seconds", 0.0)}
    if isinstance(rows := manifest.get("summary", {}).get("rows_in"), int):
        facts["rows"] = rows
    config = {each.step: dict(leaves(each.manifest.get("config"))) for each in reversed(lineage)}
    if "ingest" in config:
        facts["corpus"] = json.loads(config["ingest"].get("corpus", '"shapes"'))  # the built-in one is a config
    for step in ("caption_with", "train_captioner"):
        if step in config:
            models = (
                config[step].get(name, '""') for name in ("model", "model.model", "backend.model", "backend.base_url")
            )
            facts["captioner"] = next(filter(None, map(json.loads, models)), "one trained here")
            break
    return facts | {"names": [name for name, paths in named.items() if artifact.path in paths]}


def verify(arguments: list[str]) -> dict[str, Any]:
    """Prove that an artifact is whole, row by row, or all of a store: `rescribe verify captions`."""
    options = parse(VerifyOptions, arguments, "rescribe verify")
    if not options.paths:
        raise ValueError("Say what to verify: folders of artifacts, of steps or of stores, such as runs.")
    found = {artifact.path: artifact for path in options.paths for artifact in finished(path)}
    told = [_verify(artifact) for artifact in found.values()]
    results = told[0] if len(told) == 1 else {"whole": all(each["whole"] for each in told), "artifacts": told}
    if not results["whole"]:
        if options.json:
            print(strict.dumps(results))
        raise SystemExit(1)
    return results


def _verify(artifact: Artifact) -> dict[str, Any]:
    """What is wrong with an artifact, said and returned."""
    faults = list(verify_files(artifact.path, artifact.manifest["files"]))
    if LEDGER in artifact.manifest["files"]:
        own = verify_shards(artifact.url(OWN_ROWS), [], {}) if artifact.has_own_rows else ()
        faults += [f"{OWN_ROWS}: {fault}" for fault in own]
        faults += verify_shards(artifact.path, artifact.rows_of, artifact.summary)
    if artifact.step == "export":
        from workflows.exported import DATA, NAMES

        for folder in (DATA, NAMES):
            faults += unlisted(artifact.path, folder, artifact.manifest["files"])
    for fault in faults:
        say(f"{artifact.path}: {fault}")
    results = {"artifact": artifact.path, "whole": not faults, "faults": faults}
    if faults:
        return results
    counts = {name: artifact.summary[name] for name in COUNTS if name in artifact.summary}
    said = ", ".join(f"{name} {value}" for name, value in counts.items())
    say(f"{artifact.path} is whole" + (f": {said}." if said else "."))
    return results | counts
