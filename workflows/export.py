"""Write a captioned corpus for others to read: tars, Parquet or folders, a card, and a manifest with hashes."""

import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

import pyarrow.parquet as pq
import tyro

from infra import storage, strict
from infra.cluster import Cluster, connect, laptop
from infra.config import from_dict, to_dict
from infra.data.ahead import ahead
from infra.data.run import run_shards
from infra.data.samples import Source
from infra.data.shards import ShardReader, joined_names, shard_url
from infra.gauges import Gauges
from infra.lease import Lease
from infra.metrics import Progress
from infra.store import MANIFEST, Artifact, libraries
from workflows.card import CARD, write_card
from workflows.exported import DATA, FILE, ExportWork
from workflows.exported_rows import ALT, ALTS, scores_of, styles_of
from workflows.ingest import CORPUS

VERSION = 3
WORK = "work"  # a folder of what is done, while the rest is not
BEGUN = "export.json"  # in it: what is being written


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """`kept` are the rows that the mixture keeps, `accepted` those that were captioned, `all` also what was rejected
    or failed, with its reason; `kept` is the default where a mixture is given, else `accepted`.

    A WebDataset holds the files of each sample as they were and, beside them, `<key>.<style>.txt` for each new caption
    and `<key>.captions.json` with scores, flags and provenance; `--prefix v2` makes that `<key>.v2.<style>.txt`.
    `--as-text short` leaves `<key>.jpg` and that caption as `<key>.txt` alone. A folder has a picture, its `.txt` and a
    line in `metadata.jsonl` of each row, as trainers read them. In every format `source_name` and `key` say which
    sample of the corpus it is. `--format geneval` is of pictures that `sample` drew, by its folder, and has a folder of
    each prompt, as GenEval's evaluation reads them.
    """

    path: tyro.conf.Positional[str] = ""  # folder of a mix, captions, pictures, or a store with one of them; or else:
    images: str = ""  # folder of the ingest; none: that which the captions are of
    captions: str = ""  # folder of a recaption or a caption_with; none: those of the mixture
    mixture: str = ""  # folder of a mix, whose verdicts and weights go along
    out: str  # where to write, local or s3://
    format: Literal["webdataset", "parquet", "folder", "geneval"] = "webdataset"
    only: Literal["", "kept", "accepted", "all"] = ""
    with_images: bool = False  # Parquet: put the image files into it as well
    prefix: str = ""  # WebDataset: before the names of new files, where a corpus has files of these names
    as_text: str = ""  # WebDataset and folder: the style that is the `.txt` beside each picture, or alt
    license: str = "unknown"  # for the card, as the hub spells it: cc-by-4.0
    title: str = "Recaptioned images"  # for the card
    cluster: Cluster = field(default_factory=laptop)
    json: bool = False

    def __post_init__(self) -> None:
        if self.path and (self.images or self.captions or self.mixture):
            raise ValueError(f"Give {self.path} alone, or --images, --captions and --mixture instead of it.")
        others = ("images", "captions", "mixture", "only", "with_images", "prefix", "as_text")
        if self.format == "geneval" and (given := [name for name in others if getattr(self, name)]):
            raise ValueError(
                f"--format geneval is of pictures that were drawn: give the folder of a sample, and no {given[0]}."
            )
        if self.only == "kept" and not (self.mixture or self.path):
            raise ValueError("Which rows are kept is for a mixture to say; give --mixture, or --only accepted.")
        if self.with_images and self.format != "parquet":
            raise ValueError(f"A {self.format} has the images in any case; with_images is for --format parquet.")
        if self.as_text and self.format == "parquet":
            raise ValueError("A table has a column for each style; as_text is for --format webdataset or folder.")
        if self.prefix and not self.prefix.isidentifier():
            raise ValueError(f"prefix becomes part of file names, so it must be a plain word; found '{self.prefix}'.")


def export(options: ExportOptions) -> dict[str, Any]:
    """Write the export and return its manifest; a line that was cut continues, one that is done is found done."""
    artifacts = _artifacts(options)
    out, only = storage.absolute(options.out), options.only or ("kept" if len(artifacts) > 2 else "accepted")
    if only == "kept" and len(artifacts) < 3:
        raise ValueError(
            f"{options.path} has captions and no mixture to say which rows are kept; give --only accepted."
        )
    inputs = tuple(artifact.path for artifact in artifacts)
    names = joined_names(inputs)
    columns = ShardReader(inputs, names[0]).names
    config = {name: getattr(options, name) for name in ("format", "with_images", "prefix", "license", "title")}
    if text := _text(options, styles_of(columns)):
        config["as_text"] = text
    plan = {"config": config | {"only": only}, "inputs": [f"{each.step}/{each.id}" for each in artifacts]}
    begun = {"id": hashlib.sha256(strict.dumps([VERSION, plan]).encode()).hexdigest()[:16], **plan}
    gauges, patience = Gauges("export", begun["id"]), options.cluster.stall_seconds
    progress = Progress(f"{'export':<15}", gauges=gauges, stall_seconds=patience)
    if is_done(out, begun):
        progress.close(f"done already: {out}")
        storage.remove(storage.join(out, WORK))
        return storage.read_json(storage.join(out, MANIFEST))
    with Lease(out), progress:
        storage.write_json(storage.join(out, WORK, BEGUN), begun)
        started = time.time()
        connect(options.cluster)
        work = ExportWork(
            inputs=inputs,
            sources=_sources(artifacts[0]),
            out=out,
            format=options.format,
            only=only,
            with_images=options.with_images,
            prefix=options.prefix,
            several=_has_several(artifacts[0], names),
            as_text=text,
        )
        counts = run_shards(work, names, storage.join(out, WORK), actors=options.cluster.actors, report=progress)
        files, further = _files(out, names)
        if not files:
            raise ValueError(f"None of the {counts['rows_in']} rows is {only}, so there is nothing to export.")
        data = {name: file for name, file in files.items() if name.startswith(f"{DATA}/")}
        summary = counts | {"exported": sum(file.get("rows", 0) for file in data.values())} | further
        manifest = {
            "step": "export",
            "version": VERSION,
            **begun,
            "summary": summary,
            "provenance": artifacts[1].summary.get("provenance"),
            "libraries": libraries(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 2),
        }
        scores = scores_of(columns) if work.several else None
        card = write_card(manifest, artifacts, styles_of(columns), data, scores).encode()
        storage.write_bytes(storage.join(out, CARD), card)
        files[CARD] = {"size": len(card), "sha256": hashlib.sha256(card).hexdigest()}
        storage.write_json(storage.join(out, MANIFEST), manifest | {"files": files})
    storage.remove(storage.join(out, WORK))
    progress.close(f"{manifest['seconds']:,.1f} s  exported {summary['exported']}  files {len(data)}")
    return manifest | {"files": files}


def _text(options: ExportOptions, styles: list[str]) -> str:
    """The style that is the one text of a picture; "" where each style has a file of its own."""
    text = options.as_text
    if options.format == "folder" and not text and len(styles) == 1:
        return styles[0]
    if text in (ALT, *styles) or (not text and options.format != "folder"):
        return text
    raise ValueError(f"Say which caption is the text of a picture: --as-text {'|'.join([*styles, ALT])}.")


def _artifacts(options: ExportOptions) -> list[Artifact]:
    """The index, the captions and the mixture, which must be of one another."""
    given = options.mixture or options.captions or options.path
    if not given:
        raise ValueError("Say what to export: the folder of captions, of a mix, or of a store with one of them.")
    last = Artifact.open(storage.absolute(given))
    mixed = [last] if options.mixture or last.step == "mix" else []
    captions = last.inputs[1] if mixed else last
    if options.captions:
        captions = Artifact.open(storage.absolute(options.captions))
    images = next(iter(captions.inputs), captions)
    if options.images:
        images = Artifact.open(storage.absolute(options.images))
    if images.step != "ingest":
        raise ValueError(f"{images.path} was made by {images.step}; give the folder of an ingest as --images.")
    if not captions.inputs or captions.inputs[0].id != images.id:
        raise ValueError(f"{captions.path} was not made of the images of {images.path}.")
    for mixture in mixed:
        if [each.id for each in mixture.inputs[:2]] != [images.id, captions.id]:
            raise ValueError(f"{mixture.path} was not mixed of {images.path} and {captions.path}.")
    return [images, captions, *mixed]


def is_done(out: str, begun: dict[str, Any]) -> bool:
    """Whether the very same export is there; ValueError if something else is."""
    for url in (storage.join(out, MANIFEST), storage.join(out, WORK, BEGUN)):
        if storage.exists(url):
            if storage.read_json(url).get("id") != begun["id"]:
                raise ValueError(f"{out} holds another export, or part of one. Give a folder of its own.")
            return storage.name(url) == MANIFEST
    if strange := [name for name in storage.list_names(out) if name not in (WORK, "lease.json")]:
        raise ValueError(f"{out} holds other things, such as {strange[0]}. Give a folder of its own.")
    return False


def _sources(images: Artifact) -> dict[str, Source]:
    """Where each shard comes from; a corpus that was rendered is found in the artifact, wherever that was moved."""
    found = {name: from_dict(Source, each) for name, each in storage.read_json(images.url("shards.json")).items()}
    if isinstance(images.manifest["config"]["corpus"], str):
        return found
    plain = {name: to_dict(source) | {"url": images.url(CORPUS, source.name)} for name, source in found.items()}
    return {name: from_dict(Source, each) for name, each in plain.items()}


def _has_several(images: Artifact, names: list[str]) -> bool:
    """Whether some picture of the corpus came with several texts: then all shards have a column of them."""

    def there(name: str) -> bool:
        with storage.open_read(shard_url(images.path, name)) as file:
            return ALTS in pq.read_schema(file).names

    return any(ahead(there, names, threads=8, depth=32))


def _files(out: str, names: list[str]) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Size, hash, rows and source of every file that was written, and how many rows were renamed or left out."""
    files: dict[str, dict[str, Any]] = {}
    further: Counter[str] = Counter()
    for name in names:
        with storage.open_read(shard_url(storage.join(out, WORK), name)) as file:
            told = json.loads((pq.read_schema(file).metadata or {})[FILE.encode()])
        further.update(told["further"])
        files.update(told["files"])
    return files, dict(further)
