"""Corpora that nobody thought of: drawn names, formats, captions, junk; each picture is found with what is said of it.

`RESCRIBE_EXAMPLES=3000 python -m pytest tests/corpora/test_any.py` draws more of them.
"""

import base64
import csv
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from infra.data.readers import find_corpus, write_sources
from tests.infra.data.zoo import encode, tar
from workflows.ingest import IngestConfig, IngestWork

EXAMPLES = int(os.environ.get("RESCRIBE_EXAMPLES", "100"))
KINDS = {
    "jpg": "JPEG",
    "JPG": "JPEG",
    "png": "PNG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "avif": "AVIF",
    "jfif": "JPEG",
}
OPENED: list[str] | None = None


def _watch(event, arguments):
    if OPENED is not None and event in ("open", "os.scandir", "os.listdir") and isinstance(arguments[0], str):
        OPENED.append(arguments[0])


sys.addaudithook(_watch)  # there is no way to take it off again: it looks only while a corpus is read

texts = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc", "Cf", "Zl", "Zp", "Zs", "Cn"]), min_size=1)
captions = st.lists(st.tuples(texts, texts).map(" ".join), max_size=3)
words = st.sampled_from(["a", "dog", "Straße", "犬", "two words", "x (1)", "[b]", "100%", "it's", "-d", "v1.5", "#7"])
folders = st.sampled_from(["", "", "sub/", "00.1/", "Ordner ö/"])


@st.composite
def pictures(draw):
    """Pictures with a name, an ending, their captions, and whether their file is torn."""
    count = draw(st.integers(1, 5))
    found = []
    for number in range(count):
        ending = draw(st.sampled_from(sorted(KINDS)))
        color = np.full((6, 9, 3), [number * 40, 255 - number * 40, draw(st.integers(0, 255))], np.uint8)
        data = encode(color, KINDS[ending])
        name = f"{draw(folders)}{draw(words)}{number}"
        name += draw(st.sampled_from(["", f".{number}", ".2024.01"]))
        found.append((name, ending, data, draw(captions)))
    return found


def in_utf(text, way):
    return text.encode({"plain": "utf-8", "mark": "utf-8-sig", "wide": "utf-16"}[way])


def beside(draw, name, ending, said):
    """Files that say the captions of one picture, and what of them a reader is to find."""
    if not said:
        return draw(st.sampled_from([{}, {f"{name}.txt": b" \n"}, {f"{name}.json": b"{}"}, {f"{name}.json": b"{"}]))
    way = draw(st.sampled_from(["plain", "mark", "wide"]))
    if len(said) > 1:
        several = [{"captions": said}, said, {"sentences": [{"raw": text} for text in said]}, {"texts": said, "n": 1}]
        return {f"{name}.json": in_utf(json.dumps(draw(st.sampled_from(several))), way)}
    (text,) = said
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": text}]
    forms = [
        {f"{name}.txt": in_utf(text, way)},
        {f"{name}.caption": in_utf(text, way)},
        {f"{name}.txt": in_utf(text, way), f"{name}.json": b'{"caption": "not this one"}'},
        *({f"{name}.json": in_utf(json.dumps(each), way)} for each in [{"caption": text}, {"prompt": text}]),
        {f"{name}.json": json.dumps({"conversations": talk, "score": float("nan")}).encode()},
    ]
    return draw(st.sampled_from(forms))


def folder_of(draw, root, found):
    """Some captions stand beside their pictures, the others in a table."""
    files, rows = {}, []
    in_table = draw(st.booleans())
    for name, ending, data, said in found:
        files[f"{name}.{ending}"] = data
        if in_table and said:
            rows += [(f"{name}.{ending}", text) for text in said]
        else:
            files |= beside(draw, name, ending, said)
    if rows:
        kind = draw(st.sampled_from([",", "\t", ";", "|", "jsonl", "json", "parquet"]))
        if kind == "parquet":
            sink = io.BytesIO()
            pq.write_table(pa.table({"file_name": [a for a, _ in rows], "text": [b for _, b in rows]}), sink)
            files["metadata.parquet"] = sink.getvalue()
        elif kind in ("jsonl", "json"):
            records = [json.dumps({"file_name": a, "text": b}) for a, b in rows]
            joined = "\n".join(records) if kind == "jsonl" else f"[{','.join(records)}]"
            files[f"metadata.{kind}"] = joined.encode()
        else:
            sink = io.StringIO()
            writer = csv.writer(sink, delimiter=kind)
            writer.writerows([("file_name", "text"), *rows])
            files[draw(st.sampled_from(["metadata.csv", "captions.tsv"]))] = sink.getvalue().encode()
    for path, data in files.items():
        write(root / path, data)


def tar_of(draw, root, found):
    members = []
    for name, ending, data, said in found:
        files = {f"{name}.{ending}": data, **beside(draw, name, ending, said)}
        if draw(st.booleans()) and "." not in name.rsplit("/", 1)[-1]:
            files[f"{name}.seg.png"] = encode(np.zeros((6, 9), np.uint8))
        members += files.items()
    order = draw(st.permutations(range(len(members))))
    members = [members[place] for place in order]
    if draw(st.booleans()):
        members.insert(0, ("._junk.jpg", b"\0\5\x16\7"))
    data = tar(members)
    if draw(st.booleans()):
        import gzip

        write(root / draw(st.sampled_from(["0.tar", "0.tar.gz", "0.tgz"])), gzip.compress(data))
    else:
        write(root / "0.tar", data)


def parquet_of(draw, root, found):
    form = draw(st.sampled_from(["bytes", "struct", "list", "base64", "path"]))
    images = []
    for name, ending, data, _ in found:
        if form == "path":
            write(root / "pictures.d" / f"{name}.{ending}.bin", data)
        images.append(
            {
                "bytes": data,
                "struct": {"bytes": data, "path": f"{name}.{ending}"},
                "list": [data],
                "base64": base64.b64encode(data).decode(),
                "path": f"pictures.d/{name}.{ending}.bin",
            }[form]
        )
    several = any(len(said) > 1 for *_, said in found) or draw(st.booleans())
    told = [said if several else (said or [None])[0] for *_, said in found]
    column = pa.array(told, pa.list_(pa.string()) if several else pa.string())
    if not several and draw(st.booleans()):
        column = column.dictionary_encode()
    sink = io.BytesIO()
    splits = [draw(st.sampled_from(["train", "Val ", "restval", None, ""])) for _ in found]
    pq.write_table(
        pa.table({"image": images, draw(st.sampled_from(["text", "caption"])): column, "split": splits}), sink
    )
    write(root / "0.parquet", sink.getvalue())


def junk(draw, root, outside):
    """What is no part of any corpus."""
    write(root / ".hidden.jpg", b"x")
    write(root / ".ipynb_checkpoints/a-checkpoint.jpg", encode(np.zeros((4, 4, 3), np.uint8)))
    write(root / "README.md", b"# Pictures")
    write(root / "train.log", b"step 1")
    if draw(st.booleans()):
        write(root / "loss.csv", b"step,loss\n1,0.5\n2,0.4\n")
    if draw(st.booleans()):
        write(root / "runs/recaption/0123456789abcdef/manifest.json", b"{}")
        write(root / "runs/ingest/0123456789abcdef/manifest.json", b"{}")
        write(
            root / "runs/ingest/0123456789abcdef/corpus/00000.tar",
            tar([("k.png", encode(np.zeros((4, 4, 3), np.uint8)))]),
        )
    write(outside / "secret.jpg", encode(np.zeros((4, 4, 3), np.uint8)))
    os.symlink(outside / "secret.jpg", root / "link.jpg")
    os.symlink(outside, root / "linked")


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def read(config, out):
    global OPENED
    OPENED = []
    try:
        corpus = find_corpus(config.corpus, config.shard_rows, config.reading)
        write_sources(corpus, out)
        work = IngestWork(config, corpus.sources, out)
        rows = [row for name in corpus.sources for row in work(name).to_pylist()]
        return rows, OPENED
    finally:
        OPENED = None


@settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
@given(st.data())
def test_every_picture_is_found_with_what_was_said_of_it(data):
    found = data.draw(pictures())
    torn = data.draw(st.sets(st.integers(0, len(found) - 1), max_size=1)) if len(found) > 1 else set()
    found = [
        (name, ending, image[: len(image) // 2] if number in torn else image, said)
        for number, (name, ending, image, said) in enumerate(found)
    ]
    place = Path(tempfile.mkdtemp())
    try:
        root, outside = place / "corpus", place / "outside"
        data.draw(st.sampled_from([folder_of, tar_of, parquet_of]))(data.draw, root, found)
        junk(data.draw, root, outside)
        rows, opened = read(IngestConfig(corpus=str(root)), str(place / "out"))
    finally:
        shutil.rmtree(place)
    assert len(rows) == len(found)
    accepted = [row for row in rows if row["state"] == "accepted"]
    told = {
        row["sha256"]: row.get("captions_alt") or [row["caption_alt"]] * (row["caption_alt"] is not None)
        for row in accepted
    }
    assert told == {
        hashlib.sha256(image).hexdigest(): [text.strip() for text in said]
        for number, (_, _, image, said) in enumerate(found)
        if number not in torn
    }
    assert all(row["caption_alt"] or row["alt_fault"] for row in accepted)
    assert [path for path in opened if path.startswith(str(outside))] == []
