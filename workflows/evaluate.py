"""The last step: score captions, reconstructions and samples on held-out rows, and write the report page."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

from captioner.habits import faulty, styles, table
from infra import storage, strict
from infra.cluster import Cluster
from infra.config import setting
from infra.data.ahead import ahead
from infra.data.images import decode, encode_png
from infra.data.shards import ShardReader, joined_names
from infra.metrics import FLOPS, HELD_OUT, PICTURES, PROMPTS, Report, read_scalars
from infra.store import Artifact, step
from t2i.evaluate import report as pages
from t2i.evaluate.codes import code_scores
from t2i.evaluate.reconstruction import mean_squared_error, psnr, reconstruction_scores
from workflows.aligned import alignment_scores
from workflows.clips import key_of
from workflows.commands import numbered
from workflows.corpora.scoring import Corpus, Pictures, Row, Scores, caption_scores, picture_scores
from workflows.habits import habits
from workflows.held_out import first_held_out
from workflows.judge import TEST
from workflows.remade import line_again
from workflows.samples import read_samples
from workflows.train_tokenizer import MODEL, rebuilds

TRUTH = ("reference_short", "reference_descriptive", "scene")
RESULTS = "results.jsonl"
COURSE_STEPS = 8  # checkpoints whose pictures are shown, at most
MAX_SIDE = 480  # pixels of a picture on the page; a larger one is reduced, so that the page stays a few megabytes

HEADLINES = {  # score: its name on the page, and the score that it is to be read against
    "caption_f1": ("Captions, F1", ("alt_text_f1", "chance_f1")),
    "short_caption_f1": ("Short captions, F1", ()),
    "caption_exact": ("Captions wholly right", ()),
    "scene_score": ("Sampled pictures wholly right", ("rebuilt_scene_score",)),
    "object_score": ("Sampled objects right", ("rebuilt_object_score",)),
    "clip_score": ("Sampled pictures, CLIP score", ("real_clip_score",)),
    "retrieval_text_r@1": ("Sampled pictures that find their prompt", ("real_retrieval_text_r@1",)),
    "reconstruction_psnr": ("Reconstruction, PSNR", ()),
}
SECTIONS: dict[str, str] = {  # others are of captions
    **dict.fromkeys(("scene", "object", "clip", "retrieval_text"), "samples"),
    "reconstruction": "reconstructions",
}
SCALES = {"clip_score": 100.0, "reconstruction_psnr": None}  # of others the highest is 1
BASELINES = {
    "alt_text_f1": "the alt texts",
    "chance_f1": "captions of other images",
    "rebuilt_scene_score": "rebuilt originals",
    "rebuilt_object_score": "rebuilt originals",
    "real_clip_score": "real pictures",
    "real_retrieval_text_r@1": "real pictures",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is scored, and what the page shows."""

    title: str = "Rescribe"
    summary: str = ""  # a sentence under the title
    corpus: Corpus = "words"  # how captions and pictures are scored: by the scene, or by their words
    rows: int = 2000  # held-out rows whose captions are scored, at most
    rebuilt: int = 256  # of them, those whose images go through the tokenizer
    captions_shown: int = 12
    samples_shown: int = 24
    rebuilt_shown: int = 8
    targets: dict[str, float] = field(default_factory=dict)  # what a score ought to reach, by its name
    clip: str = setting("", since="0.2")  # scores pictures and prompts: what train_clip made, a folder or a hub's name

    def __post_init__(self) -> None:
        for name in ("rows", "rebuilt", "captions_shown", "samples_shown", "rebuilt_shown"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, but it is {getattr(self, name)}.")


@step(version=3, key=lambda config: key_of(config.clip))
def evaluate(
    config: ReportConfig,
    images: Artifact,
    captions: Artifact,
    captioner: Artifact | None = None,
    tokenizer: Artifact | None = None,
    prior: Artifact | None = None,
    samples: Artifact | None = None,
    *,
    out: str,
    cluster: Cluster,
    report: Report,
) -> Scores:
    """Write `report.html`, `scores.json` and `habits.json` into `out`; returns the scores and the address of the page.

    Where pictures can be judged, `results.jsonl` has a line of each, as GenEval writes them. A CLIP scores what was
    drawn, and the real pictures of the same rows.

    At most `config.rows` rows of the `test` split are scored, the first by sample id: ids are hashes, so the draw is
    fair and always the same. How alike captions are, and what is wrong with them, is counted over all rows. What is not
    there is not scored: images stand for captions where the corpus has only its own.
    """
    rows = held_out(images, captions, config.rows)
    scores = caption_scores(config.corpus, rows)
    report(1, 4, "parts")

    encoded = fetch_images(images, captions, rows[: max(config.rebuilt, config.captions_shown)])
    learned = tokenizer if tokenizer and rebuilds(tokenizer) else None
    originals = [decode(image) for image in encoded[: config.rebuilt]] if learned else []
    rebuilt, codes = reconstruct(learned, originals) if learned else ([], {})
    scores |= reconstructed_scores(config.corpus, rows, originals, rebuilt) | codes
    report(2, 4, "parts")

    drawn = list(read_samples(samples)) if samples else []
    asked = [asked_of(one) for one in drawn]
    pictures = picture_scores(config.corpus, asked, [decode(one["image"]) for one in drawn])
    scores |= pictures.scores
    if pictures.lines:
        lines = "".join(strict.dumps(line) + "\n" for line in pictures.lines)
        storage.write_bytes(storage.join(out, RESULTS), lines.encode())
    if config.clip:
        scores |= alignment_scores(config.clip, drawn, real_pairs(images, captions, rows, drawn))
    report(3, 4, "parts")

    whole = habits(images, captions)
    path = ancestors([made for made in (images, captions, captioner, tokenizer, prior, samples) if made is not None])
    named = dict(zip(numbered(artifact.step for artifact in path), path, strict=True))
    called = {artifact.path: name for name, artifact in named.items()}
    sources = {"captions": captions, "samples": samples, "reconstructions": tokenizer}
    sources = {section: called[made.path] for section, made in sources.items() if made is not None}
    page = pages.Page(
        title=config.title,
        summary=config.summary,
        facts=_facts(path, images),
        figures=figures(scores, config.targets, sources),
        captioned=[
            _captioned(image, row, styles_of(captions))
            for image, row in zip(encoded[: config.captions_shown], rows, strict=False)
        ],
        styles=[pages.Style(**style) for style in styles(whole.collapse)],
        habits=[pages.Habit(**row) for row in table(whole.collapse)],
        faults=[pages.Faulty(**style) for style in faulty(whole.faults)],
        sampled=_sampled(drawn, pictures)[: config.samples_shown],
        rebuilt=[_pair(*both) for both in zip(originals, rebuilt, strict=True)][: config.rebuilt_shown],
        curves=[curve for name, artifact in named.items() for curve in _curves(name, artifact)],
        courses=[course for name, artifact in named.items() for course in _courses(name, artifact)],
        work=[_work(name, artifact) for name, artifact in named.items()],
        sources=sources,
        command=line_again(config, images, captions, captioner, tokenizer, prior, samples, out=out),
        recipe={name: artifact.manifest["config"] for name, artifact in named.items()},
        provenance=_provenance(named),
    )
    storage.write_bytes(storage.join(out, "report.html"), pages.render(page).encode())
    storage.write_json(storage.join(out, "scores.json"), scores)
    storage.write_json(storage.join(out, "habits.json"), asdict(whole))
    report(4, 4, "parts")
    return {**scores, "report": storage.join(out, "report.html")}


def held_out(images: Artifact, captions: Artifact, count: int) -> list[Row]:
    """The first rows of the `test` split, with captions old and new, the truth that is known, and their place."""
    inputs = [images.path, captions.path]
    joined_names(inputs)  # that they are of one ingest

    def read(shard: str) -> Iterator[Row]:
        reader = ShardReader(inputs, shard)
        test = np.flatnonzero(reader.columns(["split"])["split"] == TEST)
        columns = reader.stored(["sample_id", "caption_alt", *TRUTH], test)
        columns |= reader.stored([f"caption_{style}" for style in styles_of(captions)], test)
        for place, values in zip(test, zip(*columns.values(), strict=True), strict=True):
            yield {**dict(zip(columns, values, strict=True)), "shard": shard, "place": int(place)}

    return first_held_out(images, count, read, lambda row: row["sample_id"])


def styles_of(captions: Artifact) -> list[str]:
    """The styles that an artifact has captions in; none where a corpus's own texts stand for captions."""
    return [style["name"] for style in captions.summary.get("styles", ())]


def fetch_images(images: Artifact, captions: Artifact, rows: Sequence[Row]) -> list[bytes]:
    """The encoded images of `held_out` rows, in their order."""

    def fetch(shard: str) -> dict[str, bytes]:
        here = [row for row in rows if row["shard"] == shard]
        reader = ShardReader([images.path, captions.path], shard)
        stored = reader.rows(["image"], [row["place"] for row in here])["image"]
        return {row["sample_id"]: image for row, image in zip(here, stored, strict=True)}

    found: dict[str, bytes] = {}
    for fetched in ahead(fetch, sorted({row["shard"] for row in rows}), threads=8):
        found |= fetched
    return [found[row["sample_id"]] for row in rows]


def real_pairs(
    images: Artifact, captions: Artifact, rows: Sequence[Row], drawn: Sequence[Row]
) -> list[tuple[str, np.ndarray]]:
    """The prompts of drawn pictures that are captions of `held_out` rows, each once, and the pictures of these rows."""
    prompts = {one["sample_id"]: one["prompt"] for one in drawn}
    known = [row for row in rows if row["sample_id"] in prompts]
    encoded = fetch_images(images, captions, known)
    return [(prompts[row["sample_id"]], decode(image)) for row, image in zip(known, encoded, strict=True)]


def reconstruct(tokenizer: Artifact, images: Sequence[np.ndarray], batch: int = 64) -> tuple[list[np.ndarray], Scores]:
    """(H, W, 3) uint8 images through the tokenizer and back, those of one size together; and how it uses its codes."""
    import torch  # slow to import: `plan` does without

    from t2i.pixels import scale, to_pixels
    from t2i.tokenizers.task import load_tokenizer

    model = load_tokenizer(tokenizer.url(MODEL))
    rebuilt, codes = list(images), list[np.ndarray]()
    for shape in dict.fromkeys(image.shape for image in images):
        places = [place for place, image in enumerate(images) if image.shape == shape]
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            pixels = torch.from_numpy(np.stack([images[place] for place in part])).permute(0, 3, 1, 2)
            with torch.inference_mode():
                values = model.encode(scale(pixels))
                made = to_pixels(model.decode(values))
            codes += [] if values.is_floating_point() else list(values.numpy())  # latents are no codes
            for place, image in zip(part, made, strict=True):
                rebuilt[place] = image
    size = model.space(images[0].shape[:2]).codes if images else 0
    scores: Scores = {}
    for name, each in (code_scores(codes, size) if size else {}).items():
        scores |= {name: each.value, f"{name}_interval": each.interval}
    return rebuilt, scores


def reconstructed_scores(
    corpus: Corpus, rows: Sequence[Row], originals: Sequence[np.ndarray], rebuilt: Sequence[np.ndarray]
) -> Scores:
    """Pixel error of reconstructions, and whether their scenes can still be read: the most that samples can reach."""
    if not originals:
        return {}
    pixels = {f"reconstruction_{name}": value for name, value in reconstruction_scores(originals, rebuilt).items()}
    read = picture_scores(corpus, rows[: len(rebuilt)], rebuilt).scores
    kept = {name: value for name, value in read.items() if name.startswith(("scene_score", "object_score", "skill_"))}
    return pixels | {f"rebuilt_{name}": value for name, value in kept.items()}


def ancestors(artifacts: Sequence[Artifact]) -> list[Artifact]:
    """The artifacts and all that they were made from, each once, in the order in which they were begun."""
    found: dict[str, Artifact] = {}

    def visit(artifact: Artifact) -> None:
        if artifact.path not in found:
            for parent in artifact.inputs:
                visit(parent)
            found[artifact.path] = artifact

    for artifact in artifacts:
        visit(artifact)
    return sorted(found.values(), key=lambda made: made.manifest.get("started", ""))


def figures(scores: Scores, targets: dict[str, float], sources: Mapping[str, str]) -> list[pages.Figure]:
    """The headline scores that there are, and by section what they are of."""
    shown = []
    for name, (title, against) in HEADLINES.items():
        if name not in scores:
            continue
        of = name.rsplit("_", 1)[0]
        trials = next((scores[n] for n in (f"{name}_n", f"{of}_n", "caption_n") if n in scores), None)
        baseline = next(((BASELINES[other], scores[other]) for other in against if other in scores), None)
        shown.append(
            pages.Figure(
                name=title,
                value=scores[name],
                target=targets.get(name),
                interval=scores.get(f"{name}_interval"),
                n=trials,
                unit="dB" if name == "reconstruction_psnr" else "",
                scale=SCALES.get(name, 1.0),
                baseline=baseline,
                source=sources.get(SECTIONS.get(of, "captions"), ""),
            )
        )
    return shown


def asked_of(drawn: Row) -> Row:
    """What a picture was asked for: by its row or, of a file of prompts, by the metadata of its line."""
    told = json.loads(drawn.get("metadata") or "{}")
    name = f"images/{drawn['number']:05d}.png"
    return {
        "prompt": drawn["prompt"],
        "scene": drawn["scene"] or told.get("scene"),
        "tag": told.get("tag"),
        "name": name,
    }


def _captioned(image: bytes, row: Row, styles: Sequence[str]) -> pages.Captioned:
    truth = row["reference_descriptive"] or row["reference_short"]
    known_scene = row["scene"] is not None and row["reference_descriptive"] is not None
    alt = row["caption_alt"]
    lines = [pages.Line(kind="Alt text", text=alt, against=truth if known_scene else None)] if alt else []
    for style in styles:
        text, against = row[f"caption_{style}"], row.get(f"reference_{style}")
        lines.append(pages.Line(kind=f"{style.capitalize()}, rewritten", text=text, against=against))
    return pages.Captioned(image=reduced(image), lines=lines, truth=truth if truth != alt else None)


def _sampled(drawn: Sequence[Row], pictures: Pictures) -> list[pages.Sampled]:
    return [
        pages.Sampled(prompt=one["prompt"], image=reduced(one["image"]), right=right, note=note)
        for one, right, note in zip(drawn, pictures.right, pictures.notes, strict=True)
    ]


def _pair(original: np.ndarray, rebuilt: np.ndarray) -> pages.Rebuilt:
    error = mean_squared_error(original, rebuilt)
    images = [reduced(encode_png(image)) for image in (original, rebuilt)]
    return pages.Rebuilt(image=images[0], rebuilt=images[1], psnr=psnr(error) if error else None)


def reduced(image: bytes) -> bytes:
    """An encoded picture as a page has it."""
    opened = Image.open(BytesIO(image))
    if max(opened.size) <= MAX_SIDE:
        return image
    opened = Image.fromarray(decode(image))
    opened.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = BytesIO()
    opened.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()


def _curves(title: str, artifact: Artifact) -> list[pages.Curve]:
    """Of every training below the artifact: a captioner has three."""
    return [
        curve
        for name, folder in _trainings(title, artifact)
        for curve in pages.curves(name, read_scalars(folder), read_scalars(storage.join(folder, HELD_OUT)), title)
    ]


def _courses(title: str, artifact: Artifact) -> list[pages.Course]:
    """Pictures by checkpoints of every training below the artifact that drew some."""
    courses = []
    for name, folder in _trainings(title, artifact):
        drawn = storage.join(folder, HELD_OUT, PICTURES)
        names = [name for name in sorted(storage.list_names(drawn)) if name.endswith(".png")]
        if not names:
            continue
        shown = [names[round(place)] for place in np.linspace(0, len(names) - 1, min(COURSE_STEPS, len(names)))]
        prompts = storage.read_json(storage.join(folder, HELD_OUT, PROMPTS))
        strips = [np.split(decode(storage.read_bytes(storage.join(drawn, name))), len(prompts), 1) for name in shown]
        pictures = [[reduced(encode_png(picture)) for picture in strip] for strip in strips]
        steps = [int(name.removesuffix(".png")) for name in shown]
        courses.append(
            pages.Course(
                title=name,
                steps=steps,
                drawn=list(zip(prompts, zip(*pictures, strict=True), strict=True)),
                source=title,
            )
        )
    return courses


def _trainings(title: str, artifact: Artifact) -> list[tuple[str, str]]:
    """The name and the folder of every training below the artifact that a page calls by a title."""
    if not artifact.step.startswith("train"):
        return []
    found = [
        file.url.rsplit("/", 1)[0] for file in storage.listing(artifact.path) if file.url.endswith("/metrics.jsonl")
    ]
    return [
        (f"{title} {folder.removeprefix(artifact.path).strip('/')}".strip(), folder)
        for folder in found
        if storage.name(folder) != HELD_OUT
    ]


def _work(called: str, artifact: Artifact) -> pages.Work:
    summary = artifact.summary
    known = {"steps": "steps", "samples": "samples", "rows_in": "rows", "rows": "rows"}
    name = next((name for name in known if isinstance(summary.get(name), int)), None)
    return pages.Work(
        step=called,
        artifact=artifact.id[:8],
        path=artifact.path,
        seconds=artifact.manifest.get("seconds"),
        amount=summary[name] if name else None,
        unit=known[name] if name else "",
        peak_gb=artifact.manifest.get("peak_memory_gb"),
        flops=flops_of(artifact) or None,
    )


def flops_of(artifact: Artifact) -> float:
    """Floating point operations of models, of training and of frozen ones, as far as a step tells them."""
    return sum(artifact.summary.get(name, 0.0) for name in FLOPS)


def _facts(path: Sequence[Artifact], images: Artifact) -> dict[str, str]:
    manifests = [artifact.manifest for artifact in path]
    facts = {"Time": pages.duration(sum(manifest.get("seconds", 0) for manifest in manifests))}
    facts["Peak memory"] = f"{max(manifest.get('peak_memory_gb', 0) for manifest in manifests):.1f} GB"
    if isinstance(images.summary.get("accepted"), int):
        facts["Images"] = f"{images.summary['accepted']:,}"
    seeds = sorted({str(seed) for manifest in manifests for seed in _values(manifest["config"], "seed")})
    return facts | ({"Seed": ", ".join(seeds)} if seeds else {}) | {"Date": manifests[-1].get("started", "")[:10]}


def _provenance(named: Mapping[str, Artifact]) -> dict[str, Any]:
    last = list(named.values())[-1].manifest
    return {
        "Libraries": ", ".join(f"{name} {version}" for name, version in last.get("libraries", {}).items()),
        "Cluster": last.get("cluster", {}).get("name", ""),
        **{name: f"{made.path} (made {made.manifest.get('started', '')})" for name, made in named.items()},
    }


def _values(config: Any, name: str) -> Iterator[Any]:
    if isinstance(config, dict):
        for key, value in config.items():
            yield from [value] if key == name else _values(value, name)
    elif isinstance(config, list):
        for value in config:
            yield from _values(value, name)
