"""What `rescribe` does: run and plan recipes, run single steps, prove, retry, show and export what was made."""

import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import tyro

from infra import storage, strict
from infra.config import from_dict, to_dict
from infra.data.ledger import LEDGER
from infra.data.verify import unlisted, verify_files, verify_shards
from infra.store import Artifact, Plan, Step, Store
from workflows import recipes, text_to_image
from workflows.corpora.shapes import write_shards
from workflows.direct import direct
from workflows.export import export
from workflows.exported import DATA, NAMES
from workflows.foreseen import check_captions, lacks
from workflows.gallery import gallery as draw_gallery
from workflows.lookup import CAPTIONED, Line, contents, current, finished, furthest, inputs_of, one, only, rephrased
from workflows.options import (
    OLDER,
    ONE_KIND,
    WORK,
    GalleryOptions,
    ListOptions,
    ShapesOptions,
    VerifyOptions,
    direct_options,
    export_options,
    further_inputs,
    named_fields,
    recipe_options,
    retry_options,
    step_options,
)
from workflows.recaption import recaption
from workflows.sample import as_trained, sample
from workflows.settings import settings_of

MODELS = {"captioner": "train_captioner", "tokenizer": "train_tokenizer", "prior": "train_prior"}
TRAINED = "train_captioner"  # the step of captioners that were trained here
COUNTS = ("rows_in", "accepted", "rejected", "failed", "shards")


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a recipe: `rescribe run demo`. Run it again and it continues, or says that all is done."""
    options = recipe_options(arguments, "run")
    check_captions(options.recipe)
    plan = Plan(options.store)
    text_to_image.run(options.recipe, plan)
    if lacking := lacks(options.recipe, options.cluster, [line[0] for line in plan.lines if line[2] != "done"]):
        raise ValueError(" ".join(lacking))
    store = Store(options.store, options.cluster, steps=len(plan.lines))
    started = time.time()
    evaluation = text_to_image.run(options.recipe, store)
    made = {artifact.step: artifact.path for artifact in store.made}
    results = {
        **evaluation.summary,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": max(artifact.manifest["peak_memory_gb"] for artifact in store.made),
        "report": evaluation.url("report.html"),
        **{name: made[step] for name, step in MODELS.items() if step in made},
    }
    done = "All was done already." if all(line[2] == "done" for line in plan.lines) else "Done."
    say(f"{done} Open {results['report']}")
    return results


def plan(arguments: list[str]) -> dict[str, Any]:
    """Say what `run` would do, and why: `rescribe plan demo --mix.min-words 4`."""
    options = recipe_options(arguments, "plan")
    check_captions(options.recipe)
    drawn = Plan(options.store)
    text_to_image.run(options.recipe, drawn)
    for step, identity, reason in drawn.lines:
        print(f"{step:<16} {identity}  {'done' if reason == 'done' else 'RUN: ' + reason}")
        for line in drawn.told[identity]:
            print(f"{'':<16} {line}")
    lacking = lacks(options.recipe, options.cluster, [line[0] for line in drawn.lines if line[2] != "done"])
    for sentence in lacking:
        say(f"`run` would refuse: {sentence}")
    steps = [dict(zip(("step", "id", "reason"), line, strict=True)) for line in drawn.lines]
    steps = [each | ({"told": told} if (told := drawn.told[each["id"]]) else {}) for each in steps]
    return {"steps": steps} | ({"lacks": lacking} if lacking else {})


def show(arguments: list[str]) -> dict[str, Any]:
    """Print a recipe or an artifact's manifest: `rescribe show demo`, `rescribe show runs/mix`."""
    if not arguments:
        raise ValueError("Say what to show: a recipe's name or an artifact's folder.")
    target, rest = arguments[0], arguments[1:]
    if target in recipes.RECIPES or target.endswith(".json"):
        shown = to_dict(recipe_options([target, *rest], "show").recipe)
    else:
        shown = one(target, (), rephrased("show", arguments, target)).manifest
    if "--json" not in rest:
        print(strict.dumps(shown, indent=2))
    return shown


def settings(arguments: list[str]) -> dict[str, Any]:
    """Print what DeepSpeed is given: `rescribe settings demo --cluster one_node --cluster.zero-stage 3`."""
    options = recipe_options(arguments, "settings")
    shown = settings_of(options.recipe, options.cluster)
    if not options.json:
        print(strict.dumps(shown, indent=2))
    return shown


def list_artifacts(arguments: list[str]) -> dict[str, Any]:
    """List the finished artifacts of a store, or of one step in it: `rescribe list runs`."""
    options = tyro.cli(ListOptions, args=arguments, prog="rescribe list")
    place, found = options.path or options.store, []
    with suppress(FileNotFoundError):
        found = finished(place)
    for artifact in found:
        print(f"{artifact.manifest['started']}  {artifact.manifest['seconds']:>8,.1f} s  {artifact.path}")
    if not found:
        say(f"There is nothing finished in {place} yet. Start with `rescribe run debug`.")
    return {"artifacts": [artifact.path for artifact in found]}


def verify(arguments: list[str]) -> dict[str, Any]:
    """Prove that an artifact is whole, row by row, or all of a store: `rescribe verify captions`."""
    options = tyro.cli(VerifyOptions, args=arguments, prog="rescribe verify")
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
        faults += verify_shards(artifact.path, [source.path for source in artifact.inputs], artifact.summary)
    if artifact.step == "export":
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


def retry(arguments: list[str]) -> dict[str, Any]:
    """Try failed rows again, as a new revision: `rescribe retry captions --only oom timeout`."""
    options = retry_options(arguments)
    known = WORK | OLDER
    found = current(options.path, tuple(known))
    if len(found) > 1 and not (found := [artifact for artifact in found if _failures(artifact)]):
        raise ValueError(f"No row of any artifact in {options.path} failed.")
    artifact = only(found, options.path, rephrased("retry", arguments, options.path))
    work = known[artifact.step]
    if LEDGER not in artifact.manifest["files"]:
        raise ValueError(f"{artifact.path} has no rows: retry is for what ingest, recaption, mix and encode make.")
    config = from_dict(work.config_class, artifact.manifest["config"])
    store = Store(artifact.path.rsplit("/", 2)[0], options.cluster)
    renewed = store.retry(artifact, work, config, tuple(word for part in options.only for word in part.split(",")))
    counts = {name: renewed.summary[name] for name in COUNTS}
    before = artifact.summary["failed"]
    say(f"{before - counts['failed']} of {before} failed rows were mended: {renewed.path}")
    return counts | {"artifact": renewed.path}


def recaption_corpus(arguments: list[str]) -> dict[str, Any]:
    """Caption a corpus as it lies: `rescribe recaption --corpus PATTERN --captioner PATH_OR_NAME --out PATH`."""
    if "--images" in arguments:  # the plain step, on artifacts
        return run_step(recaption, arguments)
    options = direct_options(arguments)
    if not options.captioner.startswith(("http://", "https://")) and TRAINED in contents(options.captioner):
        line = rephrased("recaption", arguments, options.captioner, "--captioner")
        options = replace(options, captioner=one(options.captioner, (TRAINED,), line).path)
    captions = direct(options)
    counts = {name: captions.summary[name] for name in COUNTS}
    rate = counts["accepted"] / max(captions.manifest["seconds"], 1e-9)
    say(f"Captions of {counts['accepted']} images: {captions.path}")
    return counts | {"images_per_second": round(rate, 2), "captions": captions.path}


def gallery(arguments: list[str]) -> dict[str, Any]:
    """Show captioned rows, good and bad, on one page: `rescribe gallery captions --out rows.html`."""
    options = tyro.cli(GalleryOptions, args=arguments, prog="rescribe gallery")
    artifact = _captioned(options.path, rephrased("gallery", arguments, options.path))
    mixture = artifact if artifact.step == "mix" else None
    images, captions = artifact.inputs[:2] if mixture else (artifact.inputs[0], artifact)
    out = storage.absolute(options.out)
    results = draw_gallery(
        images, captions, mixture, out=out, count=options.count, seed=options.seed, whole=options.whole
    )
    say(f"{results['rows']} rows: {results['page']}")
    return results


def export_corpus(arguments: list[str]) -> dict[str, Any]:
    """Write a captioned corpus for others to read: `rescribe export captions --out set`."""
    options = export_options(arguments)
    if options.path:
        options = replace(options, path=_captioned(options.path, rephrased("export", arguments, options.path)).path)
    for name in ("images", "captions", "mixture"):
        if given := getattr(options, name):
            found = inputs_of(name, given, rephrased("export", arguments, given, f"--{name}"))
            options = replace(options, **{name: found[0].path})
    manifest = export(options)
    summary = manifest["summary"]
    say(f"{summary['exported']} of {summary['rows_in']} rows: {storage.absolute(options.out)}")
    return {"export": storage.absolute(options.out), **summary}


def shapes(arguments: list[str]) -> dict[str, Any]:
    """Render the built-in corpus as WebDataset tars: `rescribe shapes --out shapes --samples 1000`."""
    options = tyro.cli(ShapesOptions, args=arguments, prog="rescribe shapes", config=ONE_KIND)
    paths = write_shards(options.shapes, options.out)
    say(f"{len(paths)} shards in {options.out}")
    return {"shards": [str(path) for path in paths]}


def run_step(work: Step, arguments: list[str]) -> dict[str, Any]:
    """Run one step on finished artifacts: `rescribe mix --images captions --captions captions --min-words 4`."""
    parsed = step_options(work, arguments)
    given = [(name, getattr(parsed, name)) for name in work.input_names]
    given += [(name, path) for name in further_inputs(work) for path in getattr(parsed, name)]
    inputs: list[Artifact | None] = []
    for name, path in given:
        line = rephrased(work.name, arguments, path, f"--{name}")
        inputs += inputs_of(name, path, line) if path else [None]
    config = parsed.config
    if work is sample and (prior := inputs[1]):
        config = as_trained(config, prior, named_fields(arguments, "--sampling."))
    artifact = Store(parsed.store, parsed.cluster).step(work, config, *inputs)
    if work is sample:
        say(f"{artifact.summary['samples']} pictures: {artifact.url('images')}")
    return {**artifact.summary, "artifact": artifact.path}


def _captioned(given: str, line: Line) -> Artifact:
    """The captions, or the mixture of them, that a folder stands for."""
    return only(furthest(current(given, CAPTIONED)), given, line)


def _failures(artifact: Artifact) -> int:
    """How many rows failed in an artifact that had not failed in its inputs."""
    return artifact.summary.get("failed", 0) - max(
        (each.summary.get("failed", 0) for each in artifact.inputs), default=0
    )


def say(text: str) -> None:
    """Tell the user, beside the results."""
    print(text, file=sys.stderr, flush=True)
