"""`rescribe`: run and plan recipes, run single steps, list and show what was made."""

import dataclasses
import difflib
import inspect
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import tyro

from infra import storage
from infra.cluster import CLUSTERS, Cluster, laptop
from infra.config import from_dict, to_dict
from infra.data.ledger import LEDGER
from infra.data.verify import unlisted, verify_files, verify_shards
from infra.store import MANIFEST, Artifact, Plan, Step, Store
from workflows import recipes, text_to_image
from workflows.caption_with import caption_with
from workflows.corpora.shapes import ShapesConfig, write_shards
from workflows.deduplicate import deduplicate, hash_images
from workflows.direct import DirectOptions, direct
from workflows.examine import examine
from workflows.export import ExportOptions, export
from workflows.exported import DATA
from workflows.gallery import gallery as draw_gallery
from workflows.recaption import recaption
from workflows.settings import settings_of
from workflows.submit import logs, send, status, stop
from workflows.text_to_image import STEPS, Recipe

STORE = "runs"
WORK: dict[str, Step] = {work.name: work for work in (*STEPS, caption_with, hash_images, deduplicate, examine)}
COUNTS = ("rows_in", "accepted", "rejected", "failed", "shards")
_FLAT = tyro.conf.arg(name="")  # its fields are options of the command itself
_ONE_KIND = (tyro.conf.AvoidSubcommands,)  # a field of several types keeps that of its default


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a recipe: `rescribe run demo`. Run it again and it continues, or says that all is done."""
    options = _recipe_options(arguments, "run")
    plan = Plan(options.store)
    text_to_image.run(options.recipe, plan)
    store = Store(options.store, options.cluster, steps=len(plan.lines))
    started = time.time()
    evaluation = text_to_image.run(options.recipe, store)
    made = {artifact.step: artifact for artifact in store.made}
    results = {
        **evaluation.summary,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": max(artifact.manifest["peak_memory_gb"] for artifact in store.made),
        "report": evaluation.url("report.html"),
        "captioner": made["train_captioner"].path,
        "tokenizer": made["train_tokenizer"].path,
        "prior": made["train_prior"].path,
    }
    done = "All was done already." if all(line[2] == "done" for line in plan.lines) else "Done."
    _say(f"{done} Open {results['report']}")
    return results


def plan(arguments: list[str]) -> dict[str, Any]:
    """Say what `run` would do, and why: `rescribe plan demo --mix.min-words 4`."""
    options = _recipe_options(arguments, "plan")
    drawn = Plan(options.store)
    text_to_image.run(options.recipe, drawn)
    for step, identity, reason in drawn.lines:
        print(f"{step:<16} {identity}  {'done' if reason == 'done' else 'RUN: ' + reason}")
    return {"steps": [dict(zip(("step", "id", "reason"), line, strict=True)) for line in drawn.lines]}


def show(arguments: list[str]) -> dict[str, Any]:
    """Print a recipe or an artifact's manifest: `rescribe show demo`, `rescribe show runs/mix/0123456789abcdef`."""
    if not arguments:
        raise ValueError("Say what to show: a recipe's name or an artifact's folder.")
    target, rest = arguments[0], arguments[1:]
    if target in recipes.RECIPES or target.endswith(".json"):
        shown = to_dict(_recipe_options([target, *rest], "show").recipe)
    else:
        shown = Artifact.open(target).manifest
    if "--json" not in rest:
        print(json.dumps(shown, indent=2))
    return shown


def settings(arguments: list[str]) -> dict[str, Any]:
    """Print what DeepSpeed is given: `rescribe settings demo --cluster one_node --cluster.zero-stage 3`."""
    options = _recipe_options(arguments, "settings")
    shown = settings_of(options.recipe, options.cluster)
    if not options.json:
        print(json.dumps(shown, indent=2))
    return shown


def list_artifacts(arguments: list[str]) -> dict[str, Any]:
    """List the finished artifacts of a store: `rescribe list --store runs`."""
    options = tyro.cli(_ListOptions, args=arguments, prog="rescribe list")
    found = []
    for step in storage.list_names(options.store):
        for identity in storage.list_names(storage.join(options.store, step)):
            url = storage.join(options.store, step, identity)
            if storage.exists(storage.join(url, MANIFEST)):
                found.append(Artifact.open(url))
    found.sort(key=lambda artifact: artifact.manifest["started"])
    for artifact in found:
        print(f"{artifact.manifest['started']}  {artifact.manifest['seconds']:>8,.1f} s  {artifact.path}")
    if not found:
        _say(f"There is nothing finished in {options.store} yet. Start with `rescribe run debug`.")
    return {"artifacts": [artifact.path for artifact in found]}


def verify(arguments: list[str]) -> dict[str, Any]:
    """Prove that an artifact is whole, row by row: `rescribe verify runs/recaption/0123456789abcdef`."""
    options = tyro.cli(_VerifyOptions, args=arguments, prog="rescribe verify")
    artifact = Artifact.open(storage.absolute(options.path))
    faults = list(verify_files(artifact.path, artifact.manifest["files"]))
    if LEDGER in artifact.manifest["files"]:
        faults += verify_shards(artifact.path, [source.path for source in artifact.inputs], artifact.summary)
    if artifact.step == "export":
        faults += unlisted(artifact.path, DATA, artifact.manifest["files"])
    for fault in faults:
        _say(f"{artifact.path}: {fault}")
    results = {"artifact": artifact.path, "whole": not faults, "faults": faults}
    if faults:
        if options.json:
            print(json.dumps(results))
        raise SystemExit(1)
    counts = {name: artifact.summary[name] for name in COUNTS if name in artifact.summary}
    said = ", ".join(f"{name} {value}" for name, value in counts.items())
    _say(f"{artifact.path} is whole" + (f": {said}." if said else "."))
    return results | counts


def retry(arguments: list[str]) -> dict[str, Any]:
    """Try failed rows again, as a new revision: `rescribe retry runs/recaption/0123456789abcdef --only oom timeout`."""
    options = _retry_options(arguments)
    artifact = Artifact.open(storage.absolute(options.path))
    work = WORK[artifact.step]
    if LEDGER not in artifact.manifest["files"]:
        raise ValueError(f"{artifact.path} has no rows: retry is for what ingest, recaption, mix and encode make.")
    config = from_dict(work.config_class, artifact.manifest["config"])
    store = Store(artifact.path.rsplit("/", 2)[0], options.cluster)
    renewed = store.retry(artifact, work, config, tuple(word for part in options.only for word in part.split(",")))
    counts = {name: renewed.summary[name] for name in COUNTS}
    before = artifact.summary["failed"]
    _say(f"{before - counts['failed']} of {before} failed rows were mended: {renewed.path}")
    return counts | {"artifact": renewed.path}


def recaption_corpus(arguments: list[str]) -> dict[str, Any]:
    """Caption a corpus as it lies: `rescribe recaption --corpus PATTERN --captioner PATH_OR_NAME --out PATH`."""
    if "--images" in arguments:  # the plain step, on artifacts
        return run_step(recaption, arguments)
    captions = direct(_direct_options(arguments))
    counts = {name: captions.summary[name] for name in COUNTS}
    rate = counts["accepted"] / max(captions.manifest["seconds"], 1e-9)
    _say(f"Captions of {counts['accepted']} images: {captions.path}")
    return counts | {"images_per_second": round(rate, 2), "captions": captions.path}


def gallery(arguments: list[str]) -> dict[str, Any]:
    """Show captioned rows, good and bad, on one page: `rescribe gallery runs/mix/0123456789abcdef --out rows.html`."""
    options = tyro.cli(_GalleryOptions, args=arguments, prog="rescribe gallery")
    artifact = Artifact.open(storage.absolute(options.path))
    if artifact.step == "mix":
        images, captions = artifact.inputs[:2]
        mixture: Artifact | None = artifact
    elif artifact.step in ("recaption", "caption_with"):
        images, captions, mixture = artifact.inputs[0], artifact, None
    else:
        raise ValueError(f"{artifact.path} was made by {artifact.step}; give the folder of a recaption or of a mix.")
    out = storage.absolute(options.out)
    results = draw_gallery(
        images, captions, mixture, out=out, count=options.count, seed=options.seed, whole=options.whole
    )
    _say(f"{results['rows']} rows: {results['page']}")
    return results


def export_corpus(arguments: list[str]) -> dict[str, Any]:
    """Write a captioned corpus for others to read: `rescribe export --images PATH --captions PATH --out PATH`."""
    options = _export_options(arguments)
    manifest = export(options)
    summary = manifest["summary"]
    _say(f"{summary['exported']} of {summary['rows_in']} rows: {storage.absolute(options.out)}")
    return {"export": storage.absolute(options.out), **summary}


def shapes(arguments: list[str]) -> dict[str, Any]:
    """Render the built-in corpus as WebDataset tars: `rescribe shapes --out shapes --samples 1000`."""
    options = tyro.cli(_ShapesOptions, args=arguments, prog="rescribe shapes", config=_ONE_KIND)
    paths = write_shards(options.shapes, options.out)
    _say(f"{len(paths)} shards in {options.out}")
    return {"shards": [str(path) for path in paths]}


def run_step(work: Step, arguments: list[str]) -> dict[str, Any]:
    """Run one step on finished artifacts: `rescribe mix --images PATH --captions PATH --min-words 4`."""
    parsed = _step_options(work, arguments)
    given = [getattr(parsed, name) for name in work.input_names]
    given += [path for name in _further(work) for path in getattr(parsed, name)]
    inputs = [Artifact.open(storage.absolute(path)) for path in given]
    artifact = Store(parsed.store, parsed.cluster).step(work, parsed.config, *inputs)
    return {**artifact.summary, "artifact": artifact.path}


def submit(arguments: list[str]) -> dict[str, Any]:
    """Send a recipe or a step to a Ray cluster: `rescribe submit --address http://HEAD:8265 -- run demo --store s3://...`."""
    return send(arguments, _understand)


VERBS: dict[str, Callable[[list[str]], dict[str, Any]]] = {
    "run": run,
    "plan": plan,
    "show": show,
    "settings": settings,
    "list": list_artifacts,
    "shapes": shapes,
    "verify": verify,
    "retry": retry,
    "recaption": recaption_corpus,
    "gallery": gallery,
    "export": export_corpus,
    "submit": submit,
    "status": status,
    "logs": logs,
    "stop": stop,
}


def main(arguments: list[str] | None = None) -> None:
    """The command line; ends the process with 0, or with 1 or 2 and a sentence on standard error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        if not arguments or arguments[0] in ("-h", "--help", "help"):
            print(_help())
            return
        results = _dispatch(arguments[0], arguments[1:])
        if "--json" in arguments:
            print(json.dumps(results))
    except KeyboardInterrupt:
        _say("Stopped. Give the same command again to continue.")
        sys.exit(130)
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if os.environ.get("RESCRIBE_TRACEBACK"):
            traceback.print_exc()
        _say(f"rescribe: {_sentence(error)}")
        sys.exit(1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RecipeOptions:
    recipe: Annotated[Recipe, _FLAT]
    store: str = STORE  # folder or s3:// address of all artifacts
    cluster: Cluster = dataclasses.field(default_factory=laptop)
    json: bool = False  # the results as one JSON object, last on standard output


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ListOptions:
    store: str = STORE
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _VerifyOptions:
    path: tyro.conf.Positional[str]  # an artifact's folder
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _RetryOptions:
    path: tyro.conf.Positional[str]  # an artifact's folder
    only: tuple[str, ...] = ()  # decode_error, read_error, oom, timeout, error; none: whatever failed
    cluster: Cluster = dataclasses.field(default_factory=laptop)
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _GalleryOptions:
    path: tyro.conf.Positional[str]  # folder of a recaption, or of a mix, whose verdicts are shown too
    out: str = "gallery.html"
    count: int = 500  # rows at most, evenly of those kept, rejected and failed
    seed: int = 0  # of the draw
    whole: bool = True  # also read every caption, for the habits that they have in common
    json: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class _ShapesOptions:
    out: str  # folder to write to
    shapes: Annotated[ShapesConfig, _FLAT] = dataclasses.field(default_factory=ShapesConfig)
    json: bool = False


def _recipe_options(arguments: list[str], verb: str) -> _RecipeOptions:
    """`NAME [--corpus PATH] [--seed N] [--cluster NAME]` and any field of the recipe, as `--prior.train.steps 100`."""
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"Say which recipe: rescribe {verb} {'|'.join(recipes.RECIPES)}, or a .json file of `show`.")
    name, rest = arguments[0], arguments[1:]
    cluster, rest = _named_cluster(rest)
    if name.endswith(".json"):
        recipe = from_dict(Recipe, storage.read_json(name))
    else:
        make = _choose(name, recipes.RECIPES, "recipe")
        given, rest = _take_parameters(make, name, rest)
        recipe = make(**given)
    default = _RecipeOptions(recipe=recipe, cluster=cluster)
    return tyro.cli(_RecipeOptions, default=default, args=rest, prog=f"rescribe {verb} {name}", config=_ONE_KIND)


def _retry_options(arguments: list[str]) -> _RetryOptions:
    cluster, arguments = _named_cluster(arguments)
    default = _RetryOptions(path=tyro.MISSING, cluster=cluster)
    return tyro.cli(_RetryOptions, default=default, args=arguments, prog="rescribe retry", config=_ONE_KIND)


def _direct_options(arguments: list[str]) -> DirectOptions:
    cluster, arguments = _named_cluster(arguments)
    default = DirectOptions(corpus=tyro.MISSING, captioner=tyro.MISSING, out=tyro.MISSING, cluster=cluster)
    return tyro.cli(DirectOptions, default=default, args=arguments, prog="rescribe recaption", config=_ONE_KIND)


def _step_options(work: Step, arguments: list[str]) -> Any:
    cluster, arguments = _named_cluster(arguments)
    hints = get_type_hints(work.work)
    config = next(iter(hints.values()))
    fields: list[Any] = [("config", Annotated[config, _FLAT])]
    fields += [(name, str) for name in work.input_names]
    fields += [(name, tuple[str, ...], ()) for name in _further(work)]
    fields += [("store", str, STORE), ("cluster", Cluster, cluster), ("json", bool, False)]
    options = dataclasses.make_dataclass("Options", fields, kw_only=True, namespace={"__doc__": work.work.__doc__})
    return tyro.cli(options, args=arguments, prog=f"rescribe {work.name}", config=_ONE_KIND)


def _further(work: Step) -> list[str]:
    """The parameter of a step that takes any number of artifacts, if it has one."""
    return [p.name for p in inspect.signature(work.work).parameters.values() if p.kind is p.VAR_POSITIONAL]


def _export_options(arguments: list[str]) -> ExportOptions:
    cluster, arguments = _named_cluster(arguments)
    default = ExportOptions(images=tyro.MISSING, captions=tyro.MISSING, out=tyro.MISSING, cluster=cluster)
    return tyro.cli(ExportOptions, default=default, args=arguments, prog="rescribe export", config=_ONE_KIND)


def _understand(line: list[str]) -> Any:
    """The options of a line that a cluster can run; nothing is done."""
    verb, arguments = line[0], line[1:]
    if verb == "run":
        return _recipe_options(arguments, "run")
    if verb == "retry":
        return _retry_options(arguments)
    if verb == "recaption" and "--images" not in arguments:
        return _direct_options(arguments)
    if verb == "export":
        return _export_options(arguments)
    if verb in VERBS and verb not in WORK:
        raise ValueError(f"`{verb}` is done here, without a cluster. Submit run, retry, recaption, export or a step.")
    return _step_options(_choose(verb, {**VERBS, **WORK}, "command"), arguments)


def _take_parameters(make: Callable, name: str, arguments: list[str]) -> tuple[dict[str, Any], list[str]]:
    """The parameters of a recipe's function (`--seed 1`, `--corpus PATH`), taken out of the arguments."""
    given: dict[str, Any] = {}
    for parameter in inspect.signature(make).parameters.values():
        value, arguments = _take(f"--{parameter.name}", arguments)
        if value is not None:
            given[parameter.name] = int(value) if parameter.annotation is int else value
        elif parameter.default is parameter.empty and not {"-h", "--help"} & set(arguments):
            raise ValueError(
                f"The recipe '{name}' needs --{parameter.name}, as in: rescribe run {name} --{parameter.name} PATH."
            )
        elif parameter.default is parameter.empty:
            given[parameter.name] = f"<{parameter.name}>"
    return given, arguments


def _named_cluster(arguments: list[str]) -> tuple[Cluster, list[str]]:
    name, arguments = _take("--cluster", arguments)
    return (_choose(name, CLUSTERS, "cluster")() if name else laptop()), arguments


def _take(flag: str, arguments: list[str]) -> tuple[str | None, list[str]]:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(flag + "="):
            return argument.removeprefix(flag + "="), arguments[:index] + arguments[index + 1 :]
    return None, arguments


def _dispatch(verb: str, arguments: list[str]) -> dict[str, Any]:
    if verb in VERBS:
        return VERBS[verb](arguments)
    return run_step(_choose(verb, {**WORK, **VERBS}, "command"), arguments)


def _choose(name: str, known: dict[str, Any], what: str) -> Any:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean '{near[0]}'?" if near else f"There are: {', '.join(known)}."
    raise ValueError(f"There is no {what} '{name}'. {hint}")


def _help() -> str:
    lines = [__doc__ or "", "", "Commands (each with --help):"]
    lines += [f"  {name:<16} {(verb.__doc__ or '').splitlines()[0]}" for name, verb in VERBS.items()]
    lines += ["", "Steps (on finished artifacts):"]
    lines += [f"  {work.name:<16} {(work.work.__doc__ or '').splitlines()[0]}" for work in WORK.values()]
    lines += ["", "Recipes:"]
    lines += [f"  {name:<16} {(make.__doc__ or '').splitlines()[0]}" for name, make in recipes.RECIPES.items()]
    return "\n".join(lines)


def _sentence(error: BaseException) -> str:
    """What went wrong, without the layers of other processes around it."""
    cause = getattr(error, "cause", None)
    text = str(cause if isinstance(cause, BaseException) else error).strip() or repr(error)
    return text if len(text) < 600 else text[:600] + " ..."


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
