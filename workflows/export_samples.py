"""Write pictures that were drawn as GenEval's evaluation reads them (arXiv 2310.11513): a folder a prompt."""

import hashlib
import json
import time
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from infra import storage, strict
from infra.data.ahead import ahead
from infra.data.images import decode, encode_png
from infra.gauges import Gauges
from infra.lease import Lease
from infra.metrics import Progress
from infra.store import MANIFEST, Artifact, libraries
from t2i.pixels import sheet
from workflows.export import BEGUN, WORK, ExportOptions, is_done
from workflows.samples import read_samples

VERSION = 1
COLUMNS = 2  # of a grid


def export_samples(samples: Artifact, options: ExportOptions) -> dict[str, Any]:
    """Write `<prompt>/metadata.jsonl`, `samples/<picture>.png` and `grid.png`; returns the manifest, which is put last.

    Prompts and pictures are numbered as they were given; one that could not be drawn leaves a gap. The metadata are the
    line of GenEval's file; of other prompts `prompt`, `id` and what is known of the scene. One prompt's pictures are in
    memory at a time. A line that was cut begins anew, one that is done is found done.
    """
    out = storage.absolute(options.out)
    plan = {"config": {"format": options.format}, "inputs": [f"{samples.step}/{samples.id}"]}
    begun = {"id": hashlib.sha256(strict.dumps([VERSION, plan]).encode()).hexdigest()[:16], **plan}
    progress = Progress(
        f"{'export':<15}", gauges=Gauges("export", begun["id"]), stall_seconds=options.cluster.stall_seconds
    )
    if is_done(out, begun):
        progress.close(f"done already: {out}")
        storage.remove(storage.join(out, WORK))
        return storage.read_json(storage.join(out, MANIFEST))
    with Lease(out), progress:
        storage.write_json(storage.join(out, WORK, BEGUN), begun)
        started, prompts, pictures = time.time(), 0, 0
        files: dict[str, dict[str, Any]] = {}
        for written in ahead(lambda rows: _write(out, rows), _prompts(samples), threads=8, depth=8):
            files |= written
            prompts, pictures = prompts + 1, pictures + len(written) - 2  # beside the metadata and the grid
            progress(pictures, samples.summary["samples"], "pictures")
        manifest = {
            "step": "export",
            "version": VERSION,
            **begun,
            "summary": {"exported": pictures, "prompts": prompts},
            "libraries": libraries(),
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(started)),
            "seconds": round(time.time() - started, 2),
            "files": files,
        }
        storage.write_json(storage.join(out, MANIFEST), manifest)
    storage.remove(storage.join(out, WORK))
    progress.close(f"{manifest['seconds']:,.1f} s  exported {pictures}  prompts {prompts}")
    return manifest


def _prompts(samples: Artifact) -> Iterator[list[dict[str, Any]]]:
    """The pictures of each prompt."""
    for _, rows in groupby(read_samples(samples), key=lambda row: row["prompt_number"]):
        yield list(rows)


def _write(out: str, rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The files of a prompt: size and hash of each."""
    folder, first = f"{rows[0]['prompt_number']:05d}", rows[0]
    files = {f"{folder}/metadata.jsonl": strict.dumps(_metadata(first)).encode()}
    files |= {f"{folder}/samples/{row['picture']:04d}.png": row["image"] for row in rows}
    files[f"{folder}/grid.png"] = encode_png(sheet([decode(row["image"]) for row in rows], COLUMNS))
    for name, data in files.items():
        storage.write_bytes(storage.join(out, name), data)
    return {name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}


def _metadata(row: dict[str, Any]) -> dict[str, Any]:
    """The very line of the file of prompts, where that is GenEval's."""
    if row["metadata"]:
        return {**json.loads(row["metadata"]), "prompt": row["prompt"]}
    scene = {"scene": json.loads(row["scene"])} if row["scene"] else {}
    return {"prompt": row["prompt"], "id": row["prompt_id"], **scene}
