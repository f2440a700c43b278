"""What `rescribe` does: run and plan recipes, run single steps, retry and caption, draw and export what was made."""

import shlex
import time
from dataclasses import replace
from functools import partial
from typing import Any

from infra import storage, strict
from infra.config import from_dict
from infra.data.ledger import LEDGER
from infra.store import Artifact, Plan, Step, Store, as_folder
from infra.trouble import explained
from workflows import text_to_image
from workflows.clips import with_clips
from workflows.commands import COUNTS, say
from workflows.corpora.shapes import write_shards
from workflows.direct import direct
from workflows.export import export
from workflows.export_samples import export_samples
from workflows.foreseen import check_captions, lacks, unread
from workflows.gallery import gallery as draw_gallery
from workflows.kinds import written
from workflows.lookup import (
    CAPTIONED,
    MAKERS,
    STORE,
    Line,
    check_name,
    contents,
    current,
    furthest,
    in_store,
    inputs_of,
    keep_name,
    made_by,
    names,
    one,
    only,
    rephrased,
    tail,
)
from workflows.options import (
    OLDER,
    WORK,
    GalleryOptions,
    ShapesOptions,
    direct_options,
    export_options,
    further_inputs,
    named_fields,
    recipe_options,
    retry_options,
    step_options,
)
from workflows.parse import parse
from workflows.recaption import recaption
from workflows.sample import as_trained, sample, tokenizer_of, with_links
from workflows.samples import IMAGES, check_folder, show
from workflows.settings import settings_of

REPORT = "report.html"  # of a recipe that ends with one
TRAINED = "train_captioner"  # the step of captioners that were trained here


def run(arguments: list[str]) -> dict[str, Any]:
    """Run a recipe: `rescribe run demo`. Run it again and it continues, or says that all is done."""
    options = recipe_options(arguments, "run")
    as_folder(options.store)
    name = options.recipe.name
    check_name(name)
    check_captions(options.recipe)
    for sentence in unread(options.recipe):
        say(sentence)
    plan = Plan(options.store)
    options.recipe.run(plan)
    if lacking := lacks(options.recipe, options.cluster, [line[0] for line in plan.lines if line[2] != "done"]):
        raise ValueError(" ".join(lacking))
    store = Store(options.store, options.cluster, steps=len(plan.lines))
    started = time.time()
    last = options.recipe.run(store)
    keep_name(store.root, name, store.made)
    results = {
        **last.summary,
        "seconds": round(time.time() - started, 1),
        "peak_memory_gb": max(artifact.manifest["peak_memory_gb"] for artifact in store.made),
        **({"report": last.url(REPORT)} if REPORT in last.manifest["files"] else {"artifact": last.path}),
        **{made.step.removeprefix("train_"): made.path for made in store.made if made.step.startswith("train_")},
    }
    done = "All was done already." if all(line[2] == "done" for line in plan.lines) else "Done."
    say(f"{done} Open {results['report']}" if "report" in results else f"{done} {last.path}")
    if isinstance(options.recipe, text_to_image.Recipe):
        beside = "" if options.store == STORE else f" --store {shlex.quote(options.store)}"
        say(f'Draw what you like: rescribe sample --prior {name} --prompts "..."{beside}')
    return results


def plan(arguments: list[str]) -> dict[str, Any]:
    """Say what `run` would do, and why: `rescribe plan demo --mix.min-words 4`."""
    options = recipe_options(arguments, "plan")
    check_captions(options.recipe)
    held = {name: {*map(tail, made_by(options.store, name))} for name in names(options.store)}
    before = held.pop(options.recipe.name, set())
    drawn = Plan(options.store, before, apart=set().union(*held.values()) - before)
    options.recipe.run(drawn)
    for step, identity, reason in drawn.lines:
        print(f"{step:<16} {identity}  {'done' if reason == 'done' else 'RUN: ' + reason}")
        for line in drawn.told[identity]:
            print(f"{'':<16} {line}")
    for sentence in unread(options.recipe):
        say(sentence)
    lacking = lacks(options.recipe, options.cluster, [line[0] for line in drawn.lines if line[2] != "done"])
    for sentence in lacking:
        say(f"`run` would refuse: {sentence}")
    steps = [dict(zip(("step", "id", "reason"), line, strict=True)) for line in drawn.lines]
    steps = [each | ({"told": told} if (told := drawn.told[each["id"]]) else {}) for each in steps]
    results: dict[str, Any] = {"steps": steps} | ({"lacks": lacking} if lacking else {})
    if getattr(options, "probe", False):
        from workflows.probe import told_of  # what it needs is slow to import, and a plan by itself does without

        results["probe"] = told_of(options)
    return results


def recipe_of(arguments: list[str]) -> dict[str, Any]:
    """The recipe that a line of `show` names, as data."""
    return written(recipe_options(arguments, "show").recipe)


def settings(arguments: list[str]) -> dict[str, Any]:
    """Print what DeepSpeed is given: `rescribe settings demo --cluster one_node --cluster.zero-stage 3`."""
    options = recipe_options(arguments, "settings")
    shown = settings_of(options.recipe, options.cluster)
    if not options.json:
        print(strict.dumps(shown, indent=2))
    return shown


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
    as_folder(options.out)
    if not options.captioner.startswith(("http://", "https://")) and TRAINED in contents(options.captioner):
        line = rephrased("recaption", arguments, options.captioner, "--captioner")
        options = replace(options, captioner=one(options.captioner, (TRAINED,), line).path)
    if options.name:
        check_name(options.name)
    captions = direct(options)
    if options.name:
        keep_name(options.out, options.name, [*captions.inputs, captions])
    counts = {name: captions.summary[name] for name in COUNTS}
    rate = counts["accepted"] / max(captions.manifest["seconds"], 1e-9)
    say(f"Captions of {counts['accepted']} images: {captions.path}")
    return counts | {"images_per_second": round(rate, 2), "captions": captions.path}


def gallery(arguments: list[str]) -> dict[str, Any]:
    """Show captioned rows, good and bad, on one page: `rescribe gallery captions --out rows.html`."""
    options = parse(GalleryOptions, arguments, "rescribe gallery")
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
    as_folder(options.out)
    if options.format == "geneval":
        drawn = one(options.path or STORE, MAKERS["samples"], rephrased("export", arguments, options.path or STORE))
        summary = export_samples(drawn, options)["summary"]
        say(f"{summary['exported']} pictures of {summary['prompts']} prompts: {storage.absolute(options.out)}")
        return {"export": storage.absolute(options.out), **summary}
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
    options = parse(ShapesOptions, arguments, "rescribe shapes")
    with explained(options.out, local=True):
        paths = write_shards(options.shapes, options.out)
    say(f"{len(paths)} shards in {options.out}")
    return {"shards": [str(path) for path in paths]}


def run_step(work: Step, arguments: list[str]) -> dict[str, Any]:
    """Run one step on finished artifacts: `rescribe mix --images captions --captions captions --min-words 4`."""
    parsed = step_options(work, arguments)
    as_folder(parsed.store)
    if shown := getattr(parsed, "out", ""):
        check_folder(shown)
    called = getattr(parsed, "name", "")
    if called:
        check_name(called)
    given = [(name, getattr(parsed, name)) for name in work.input_names]
    given += [(name, path) for name in further_inputs(work) for path in getattr(parsed, name)]
    inputs: list[Artifact | None] = []
    for name, path in given:
        line = rephrased(work.name, arguments, path, f"--{name}")
        inputs += inputs_of(name, in_store(path, parsed.store), line) if path else [None]
    config = with_clips(parsed.config, parsed.store, partial(rephrased, work.name, arguments))
    if work is sample and (prior := inputs[1]):
        inputs[2] = inputs[2] or tokenizer_of(prior)
        chain = [each for each in inputs[3:] if each is not None]
        config = with_links(as_trained(config, prior, named_fields(arguments, "--sampling.")), chain)
    artifact = Store(parsed.store, parsed.cluster).step(work, config, *inputs)
    if called:
        keep_name(parsed.store, called, [artifact])
    if work is sample:
        images = artifact.url(IMAGES)
        if shown:
            images = storage.absolute(shown)
            show(artifact.path, images, "")
        say(f"{artifact.summary['samples']} pictures: {images if storage.exists(images) else artifact.path}")
    else:
        say(artifact.path)
    return {**artifact.summary, "artifact": artifact.path}


def _captioned(given: str, line: Line) -> Artifact:
    """The captions, or the mixture of them, that a folder stands for."""
    return only(furthest(current(given, CAPTIONED)), given, line)


def _failures(artifact: Artifact) -> int:
    """How many rows failed in an artifact that had not failed in its inputs."""
    return artifact.summary.get("failed", 0) - max(
        (each.summary.get("failed", 0) for each in artifact.inputs if not artifact.has_own_rows), default=0
    )
