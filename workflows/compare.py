"""Compare what several models drew for the same prompts: scores with intervals, paired differences, one sheet."""

import json
import shlex
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from infra import storage
from infra.cluster import Cluster
from infra.config import setting
from infra.data.images import decode, encode_png
from infra.metrics import Report
from infra.store import Artifact, step
from t2i.evaluate import comparison, intervals
from t2i.evaluate.alignment import clip_rows, ranks
from t2i.evaluate.comparison import Cell, between, figure
from t2i.evaluate.intervals import Estimate, Interval
from t2i.evaluate.skills import skill_rows
from t2i.priors.task import sampling_of
from workflows.commands import say
from workflows.corpora.scoring import Corpus, Pictures, Row, picture_scores
from workflows.evaluate import ancestors, asked_of, flops_of, reduced
from workflows.line import flags
from workflows.sample import SampleConfig, sample
from workflows.samples import read_samples
from workflows.train_tokenizer import MODEL
from workflows.yardstick import TABLE

PAGE, FIGURES, SHEET = "compare.html", "compare.json", "sheet.png"
WEIGHTS = f"{MODEL}/model.safetensors"
DISTANCES = ("fid", "kid", "precision", "recall", "density", "coverage")
NAMES = {
    "scene_score": ("Pictures wholly right", ""),
    "object_score": ("Objects right", ""),
    "clip_score": ("CLIP score", "100 times the cosine of picture and prompt, from 0 to 100"),
    "retrieval": ("Pictures that find their prompt", "by CLIP, nearest among all prompts"),
    "parameters": ("Parameters", "of the priors"),
    "tokenizer_parameters": ("Parameters", "of the tokenizers"),
    "training_flops": ("Training FLOPs", "of the priors"),
    "flops_beside": (
        "FLOPs beside",
        "of what else was trained, and of frozen models at work, as far as their steps tell",
    ),
    "training_seconds": ("Training seconds", "of the priors, on the machine where they were trained"),
    "seconds_a_picture": ("Seconds a picture", "with the time in which models load, on the machine that drew"),
}
COSTS = (
    "parameters",
    "tokenizer_parameters",
    "training_flops",
    "flops_beside",
    "training_seconds",
    "seconds_a_picture",
)

Columns = dict[str, tuple[np.ndarray, np.ndarray]]
"""By score, how much of each picture is right (N,), and of how much (N,)."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What the models are called, in the order of their pictures, and by what these are scored."""

    names: tuple[str, ...] = ()  # none: by the ids of their pictures
    corpus: Corpus = "words"  # scenes of Shapes are read back from pixels
    clip: str = ""  # folder or hub's name of a CLIP that scores pictures against their prompts
    shown: int = 24  # prompts on the page and on the sheet
    retrieval: bool = setting(False, since="0.2")  # whether the CLIP also finds each picture's prompt among all

    def __post_init__(self) -> None:
        if self.shown < 1:
            raise ValueError(f"At least one prompt is shown, but shown is {self.shown}.")
        if self.retrieval and not self.clip:
            raise ValueError("Prompts are found by a CLIP: give clip, too.")


@step(version=1)
def compare(
    config: CompareConfig, measured: Artifact | None, *samples: Artifact, out: str, cluster: Cluster, report: Report
) -> dict[str, Any]:
    """Write `compare.html`, `compare.json` and `sheet.png` of pictures that were drawn for the same prompts.

    Pictures are paired by their number; one that not all models drew is left out. `measured` holds the distances of
    these models from real pictures, in their order. ValueError where prompts differ.
    """
    names = config.names or tuple(f"{each.step} {each.id[:8]}" for each in samples)
    if len(samples) < 2 or len(names) != len(samples) or len(set(names)) != len(names):
        raise ValueError(
            f"A comparison is of at least two models, each with a name of its own: {len(samples)} are here, named "
            f"{', '.join(names)}."
        )
    drawn, lost = paired(samples)
    columns, judged = [], []
    for number, rows in enumerate(drawn):
        pictures = [decode(row["image"]) for row in rows]
        seen = picture_scores(config.corpus, [asked_of(row) for row in rows], pictures)
        columns.append(_columns(seen, rows, pictures, config))
        judged.append(seen.right)
        report(number + 1, len(samples), "models")
    distances = storage.read_json(measured.url(TABLE)) if measured is not None else []
    models = [
        {"name": name, "samples": f"{made.step}/{made.id}"}
        | _flat({score: _estimate(score, *rows) for score, rows in each.items()})
        | {score: line[score] for score in line if score.removesuffix("_interval") in DISTANCES}
        | costs_of(made)
        for name, made, each, line in zip(names, samples, columns, distances[1:] or [{}] * len(samples), strict=True)
    ]
    apart = [_flat(_differences(columns[0], each)) for each in columns[1:]]
    found = {"prompts": len({row["prompt_number"] for row in drawn[0]}), "pictures": len(drawn[0])}
    found |= {"left_out": lost} if lost else {}
    told: dict[str, Any] = found | {
        "models": models,
        "differences": [{"name": n} | a for n, a in zip(names[1:], apart, strict=True)],
    }
    if measured is not None:
        told["yardstick"] = distances[0] | {"id": f"{measured.inputs[0].step}/{measured.inputs[0].id}"}
    storage.write_json(storage.join(out, FIGURES), told)
    first = [rows[: config.shown] for rows in drawn]
    shown = [(row[0]["prompt"], [decode(each["image"]) for each in row]) for row in zip(*first, strict=True)]
    storage.write_bytes(storage.join(out, SHEET), encode_png(comparison.contact_sheet(names, shown)))
    page = comparison.Comparison(
        title=" and ".join([", ".join(names[:-1]), names[-1]]),
        models=[_model(name, made) for name, made in zip(names, samples, strict=True)],
        drawn=[
            comparison.Drawn(
                prompt=row[0]["prompt"],
                images=[reduced(each["image"]) for each in row],
                right=[right[number] for right in judged],
            )
            for number, row in enumerate(zip(*first, strict=True))
        ],
        lines=_lines(models, apart, told.get("yardstick", {})),
        facts={"Prompts": f"{found['prompts']:,}", "Pictures of each": f"{found['pictures']:,}"},
        notes=_notes(samples, told),
        command=_command(config, names, measured, samples),
    )
    storage.write_bytes(storage.join(out, PAGE), comparison.render(page).encode())
    return found | {"models": len(samples), "page": storage.join(out, PAGE)}


def paired(samples: Sequence[Artifact]) -> tuple[list[list[Row]], int]:
    """The pictures that all have, by number, of each; and how many others there are. ValueError for other prompts."""
    drawn = [{row["number"]: row for row in read_samples(made)} for made in samples]
    shared = [number for number in drawn[0] if all(number in each for each in drawn)]
    for made, each in zip(samples, drawn, strict=True):
        for number in shared:
            if each[number]["prompt"] != (wanted := drawn[0][number]["prompt"]):
                raise ValueError(
                    f"Models are compared on the same prompts, but picture {number} is of '{wanted}' in "
                    f"{samples[0].path} and of '{each[number]['prompt']}' in {made.path}."
                )
    if not shared:
        raise ValueError(f"No picture of {samples[0].path} has its like in the others.")
    lost = len(set().union(*drawn)) - len(shared)
    if lost:
        say(f"{lost} pictures are left out, since not every model has them: {len(shared)} are compared.")
    return [[each[number] for number in shared] for each in drawn], lost


def costs_of(samples: Artifact) -> dict[str, float]:
    """What the models of some pictures took: parameters, FLOPs and seconds of training, seconds a picture.

    Those of priors are of all links of a chain. What a manifest does not say is left out. `flops_beside` are those of
    all else that the priors were made of: what else was trained, and what frozen models computed.
    """
    priors, tokenizers = (
        [each for each in samples.inputs if each.step == name] for name in ("train_prior", "train_tokenizer")
    )
    costs: dict[str, float] = {}
    for name, made in (("parameters", priors), ("tokenizer_parameters", tokenizers)):
        if made:
            costs[name] = sum(parameters_of(each) for each in made)
    for name, values in (
        ("training_flops", [each.summary.get("training_flops") for each in priors]),
        ("training_seconds", [each.manifest.get("seconds") for each in priors]),
    ):
        known = [value for value in values if isinstance(value, int | float)]
        if known and len(known) == len(values):
            costs[name] = sum(known)
    beside = [flops_of(each) for each in ancestors(priors) if each.step != "train_prior"]
    beside += [each.summary.get("frozen_flops", 0.0) for each in priors]
    if "training_flops" in costs and any(beside):
        costs["flops_beside"] = sum(beside)
    if samples.summary.get("samples") and "seconds" in samples.manifest:
        costs["seconds_a_picture"] = samples.manifest["seconds"] / samples.summary["samples"]
    return costs


def parameters_of(model: Artifact) -> int:
    """How many numbers the weights of a trained model are, from the head of their file; 0 where it has none."""
    url = model.url(WEIGHTS)
    if not storage.exists(url):
        return 0
    (size,) = struct.unpack("<Q", storage.read_bytes(url, 0, 8))
    head = json.loads(storage.read_bytes(url, 8, size))
    return sum(
        int(np.prod(each["shape"], dtype=np.int64))
        for name, each in head.items()
        if name != "__metadata__" and each["dtype"].startswith(("F", "BF"))
    )


def _columns(seen: Pictures, rows: Sequence[Row], pictures: Sequence[np.ndarray], config: CompareConfig) -> Columns:
    by_score = skill_rows(seen.judged) if seen.judged else {}
    columns = {name: (np.array(right), np.array(asked)) for name, (right, asked) in by_score.items()}
    if config.clip:
        from t2i.clip.embedder import Embedder  # brings transformers

        embedder, prompts, each = Embedder(config.clip), [row["prompt"] for row in rows], np.ones(len(rows))
        images, texts = embedder.embed_images(pictures).numpy(), embedder.embed_texts(prompts).numpy()
        columns["clip_score"] = clip_rows(images, texts), each
        if config.retrieval:
            columns["retrieval"] = (ranks(images, texts, prompts, prompts) < 1).astype(float), each
    return columns


def _estimate(name: str, right: np.ndarray, of: np.ndarray) -> Estimate:
    return intervals.mean(right) if name == "clip_score" else intervals.share(right, of)


def _differences(first: Columns, other: Columns) -> dict[str, Estimate]:
    """Of another model's scores from the first's, on the pictures that both are of."""
    return {
        name: intervals.difference(*(other[name][0], first[name][0]), *(other[name][1], first[name][1]))
        for name in first
    }


def _flat(estimates: Mapping[str, Estimate]) -> dict[str, Any]:
    """An interval without ends, of a single picture, is none."""
    flat: dict[str, Any] = {}
    for name, each in estimates.items():
        flat |= each.named(name)
        if not np.isfinite(each.interval).all():
            del flat[f"{name}_interval"]
    return flat


def _lines(
    models: Sequence[Mapping[str, Any]], apart: Sequence[Mapping[str, Any]], real: Mapping[str, Any]
) -> list[comparison.Line]:
    scores = dict.fromkeys(
        name for model in models for name, value in model.items() if f"{name}_n" in model or name in DISTANCES
    )
    lines = []
    for name in (*scores, *COSTS):
        title, note = NAMES.get(name, (name.removeprefix("skill_").capitalize(), "share that is right"))
        if name in DISTANCES:
            title, note = name.upper() if len(name) == 3 else name.capitalize(), _real(real, name)
        cells = [_cell(model, name, other) for model, other in zip(models, [{}, *apart], strict=True)]
        if any(cell.value for cell in cells) or name == "training_flops":
            lines.append(comparison.Line(name=title, cells=cells, note=note))
    return lines


def _cell(model: Mapping[str, Any], name: str, apart: Mapping[str, Any]) -> Cell:
    if name not in model:
        return Cell()
    interval = model.get(f"{name}_interval")
    cell = Cell(value=figure(model[name]), interval=between(interval) if interval else "")
    if name not in apart:
        return cell
    low, high = apart.get(f"{name}_interval", (-np.inf, np.inf))
    by = f"{apart[name]:+.3f}" + (f" ({between((low, high))})" if np.isfinite((low, high)).all() else "")
    return Cell(value=cell.value, interval=cell.interval, apart=by, better=None if low <= 0 <= high else low > 0)


def _real(real: Mapping[str, Any], name: str) -> str:
    said: Interval | None = real.get(f"{name}_interval")
    return f"real against real {figure(real[name])}" + (f" ({between(said)})" if said else "")


def _notes(samples: Sequence[Artifact], told: Mapping[str, Any]) -> list[str]:
    notes = []
    if len({str(made.manifest["config"].get("seed")) for made in samples}) > 1:
        notes.append("The models drew from other seeds, so that pictures are paired by their prompts alone.")
    if "left_out" in told:
        notes.append(f"{told['left_out']} pictures are left out: not every model has them.")
    if by := told.get("yardstick"):
        notes.append(
            f"Distances are by the yardstick {by['id']}: {by['rows']} real pictures of {by['corpus']}, as "
            f"{by['extractor']} sees them, and of pictures drawn for the prompts of as many others."
        )
    return notes


def _model(name: str, samples: Artifact) -> comparison.Model:
    made = {f"{each.step} {number}".removesuffix(" 1"): each for number, each in _numbered(samples.inputs)}
    there = {title: each.path for title, each in made.items()} | {"sample": samples.path}
    return comparison.Model(name=name, made=there, lines=[line] if (line := line_of(samples)) else [])


def _numbered(made: Sequence[Artifact]) -> list[tuple[int, Artifact]]:
    return [(sum(other.step == each.step for other in made[: place + 1]), each) for place, each in enumerate(made)]


def line_of(samples: Artifact) -> str:
    """The line that draws these pictures again, or finds them; none where options do not say all of it."""
    config = samples.manifest["config"]
    priors = [each for each in samples.inputs if each.step == "train_prior"]
    if not priors or config.get("links") or config.get("told") or samples.manifest["version"] != sample.version:
        return ""
    words = ["rescribe", sample.name]
    named = [each for each in sample.input_names if each not in samples.manifest.get("without", ())]
    for name, each in zip(named, samples.inputs, strict=False):
        words += [f"--{name}", each.path]
    default = SampleConfig(sampling=sampling_of(priors[0].url(MODEL))())
    words += flags(config, default, whole=("sampling",))
    return shlex.join([*words, "--store", samples.path.rsplit("/", 2)[0]])


def _command(
    config: CompareConfig, names: Sequence[str], measured: Artifact | None, samples: Sequence[Artifact]
) -> str:
    words = ["rescribe", "compare", *(made.path for made in samples), "--names", *names]
    words += ["--clip", config.clip] if config.clip else []
    words += ["--yardstick", measured.inputs[0].path] if measured is not None else []
    return shlex.join([*words, "--shown", str(config.shown), "--store", samples[0].path.rsplit("/", 2)[0]])
