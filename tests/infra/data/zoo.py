"""Small corpora in every format, healthy and broken, for the tests."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from infra import storage


def picture(seed, height=24, width=40):
    """A smooth (H, W, 3) uint8 picture, each seed another."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (3, 4, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encode(array, kind="PNG", **options):
    buffer = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def tar(members, **options):
    """A tar's bytes from (name, content) pairs; a content may be a whole TarInfo instead."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", **options) as archive:
        for name, content in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            if not isinstance(content, tarfile.TarInfo):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return buffer.getvalue()


def samples(count, first=0):
    """(key, PNG bytes, caption, meta) of healthy samples."""
    return [
        (f"{n:05d}", encode(picture(n)), f"picture number {n}, größer", {"split": "train", "scene": {"n": n}})
        for n in range(first, first + count)
    ]


def as_members(rows):
    for key, image, caption, meta in rows:
        yield f"{key}.png", image
        yield f"{key}.txt", caption.encode()
        yield f"{key}.json", json.dumps(meta).encode()


def write_tars(folder, shards=2, rows=6):
    for number in range(shards):
        storage.write_bytes(storage.join(folder, f"{number:05d}.tar"), tar(as_members(samples(rows, rows * number))))


def write_parquet(folder, shards=2, rows=6, hugging_face=False):
    for number in range(shards):
        keys, images, captions, metas = zip(*samples(rows, rows * number), strict=True)
        if hugging_face:
            images = [{"bytes": image, "path": f"{key}.png"} for key, image in zip(keys, images, strict=True)]
            columns = {"image": images, "text": captions, "split": [meta["split"] for meta in metas]}
            columns["scene"] = [meta["scene"] for meta in metas]
        else:
            columns = {"key": keys, "jpg": images, "caption": captions, "json": [json.dumps(meta) for meta in metas]}
        sink = io.BytesIO()
        pq.write_table(pa.table({name: list(values) for name, values in columns.items()}), sink, row_group_size=4)
        storage.write_bytes(storage.join(folder, f"{number:05d}.parquet"), sink.getvalue())


def write_folder(folder, rows=12, table=None):
    lines = []
    for key, image, caption, meta in samples(rows):
        name = f"{int(key) // 5}/{key}"
        storage.write_bytes(storage.join(folder, f"{name}.png"), image)
        if table is None:
            storage.write_bytes(storage.join(folder, f"{name}.txt"), caption.encode())
            storage.write_bytes(storage.join(folder, f"{name}.json"), json.dumps(meta).encode())
        elif table == "jsonl":
            lines.append(json.dumps({"file_name": f"{name}.png", "text": caption, **meta}))
        else:
            lines.append(f'{name}.png,"{caption}",{meta["split"]}')
    if table:
        text = "\n".join((["file_name,caption,split"] if table == "csv" else []) + lines)
        storage.write_bytes(storage.join(folder, f"metadata.{table}"), text.encode())
