"""Index a corpus: where each sample lies, what it says, and why it is unusable if it is."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import pyarrow as pa

from infra import storage
from infra.cluster import Cluster, connect
from infra.config import fingerprint
from infra.data.ahead import ahead
from infra.data.growth import Pieces, listed_sources, of_sources
from infra.data.images import decode, encode_png, measure
from infra.data.readers import find_corpus, list_corpus, read_entries_of, read_source, write_sources
from infra.data.run import Report, run_shards
from infra.data.samples import MAX_TEXT_BYTES, Sample, Source
from infra.data.stage import ACCEPTED, FAILED, REJECTED
from infra.store import Artifact, step
from workflows.corpora.shapes import ShapesConfig, write_shard

MAX_CAPTION_CHARACTERS = 10_000
CORPUS = "corpus"  # the folder of a rendered corpus within the artifact
TEST_SPLITS = ("test", "val", "valid", "validation", "dev", "eval")

INDEX = pa.schema(
    {
        "sample_id": pa.string(),
        "key": pa.string(),
        "state": pa.string(),
        "reason": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "caption_alt": pa.string(),
        "split": pa.string(),
        "reference_short": pa.string(),
        "reference_descriptive": pa.string(),
        "scene": pa.string(),
        "meta": pa.string(),
        "source": pa.string(),  # absolute, or within the artifact
        "offset": pa.int64(),
        "length": pa.int64(),
        "sha256": pa.string(),
    }
)


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Which corpus is read, and how its rows are labelled.

    `corpus` is a path or pattern of WebDataset tars, Parquet files or folders of images, local or s3://, or the
    built-in Shapes. `labels` says where splits, reference captions and scenes come from: each row's own json, or what
    is known of a published corpus. With `image_size` (height, width) the index carries resized PNG copies.
    """

    corpus: str | ShapesConfig = ""  # to be given
    labels: Literal["json", "nlvr", "emoji"] = "json"
    image_size: tuple[int, int] | None = None
    shard_rows: int = 1000  # of folders; other corpora come in shards
    test_fraction: float = 0.05  # of rows whose json does not say their split
    image_column: str | None = None  # of Parquet; by default found by name and type
    caption_column: str | None = None  # of Parquet and tables; by default found by name

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("Say which corpus: a path or pattern of WebDataset tars, Parquet files or image folders.")
        if self.image_size is not None and not all(1 <= side <= 8192 for side in self.image_size):
            raise ValueError(f"image_size is (height, width), each from 1 to 8192, but it is {self.image_size}.")
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, but it is {self.shard_rows}.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be from 0 to below 1, but it is {self.test_fraction}.")


def corpus_key(config: IngestConfig) -> str | None:
    """A hash of the corpus's listing, so that a corpus that changed under its pattern is a new artifact."""
    return fingerprint(list_corpus(config.corpus)) if isinstance(config.corpus, str) else None


def corpus_shards(config: IngestConfig, inputs: Sequence[Artifact], path: str | None) -> Pieces:
    """What each shard of an index is made of: its source, as it was noted at `path`, or as it lies now."""
    if not isinstance(config.corpus, str):
        return {}  # what is rendered is made of nothing
    if path is not None:
        return of_sources(listed_sources(path))
    return of_sources(find_corpus(config.corpus, config.shard_rows, config.image_column, config.caption_column).sources)


@step(version=1, key=corpus_key, shards=corpus_shards, listed="corpus")
def ingest(config: IngestConfig, *, out: str, cluster: Cluster, report: Report) -> dict[str, Any]:
    """Write the index of a corpus, one Parquet file a shard; every row is in it, accepted, rejected or failed."""
    if isinstance(config.corpus, str):
        corpus = find_corpus(config.corpus, config.shard_rows, config.image_column, config.caption_column)
        write_sources(corpus, out)
        sources, ignored = corpus.sources, corpus.ignored
    else:
        sources, ignored = _rendered_sources(config.corpus), 0
    connect(cluster)
    work = IngestWork(config, sources, out)
    counts = run_shards(work, list(sources), out, actors=cluster.actors, report=report)
    if isinstance(config.corpus, ShapesConfig):
        write_sources(find_corpus(storage.join(out, CORPUS)), out)
    if not counts[ACCEPTED]:
        why = ", ".join(f"{reason} ({count})" for reason, count in counts["reasons"].items())
        raise ValueError(f"None of the {counts['rows_in']} rows of {config.corpus} can be used: {why}.")
    return counts | {"ignored_files": ignored}


@dataclass(frozen=True)
class IngestWork:
    """Reads one source, judges each sample, and returns the index of the shard."""

    config: IngestConfig
    sources: dict[str, Source]
    out: str

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, name: str) -> pa.Table:
        """All samples of the source, in its order."""
        source = self.sources[name]
        rows = list(ahead(lambda sample: self._judge(source, sample), self._samples(name), threads=4, depth=8))
        schema = INDEX if self.config.image_size is None else INDEX.append(pa.field("image", pa.binary()))
        return pa.Table.from_pylist(rows, schema)

    def _samples(self, name: str) -> Iterator[Sample]:
        source = self.sources[name]
        if isinstance(self.config.corpus, str):
            yield from read_source(source, read_entries_of(self.out, name) if source.kind == "folder" else None)
            return
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            tar = str(write_shard(self.config.corpus, int(name), folder))
            storage.upload(tar, storage.join(self.out, CORPUS, source.name))
            for sample in read_source(Source(kind="tar", name=source.name, url=tar, size=0, tag="")):
                sample.source = storage.join(CORPUS, source.name)
                yield sample

    def _judge(self, source: Source, sample: Sample) -> dict[str, Any]:
        sample_id = make_sample_id(source.name, sample.key, sample.occurrence)
        row: dict[str, Any] = {
            "sample_id": sample_id,
            "key": _printable(sample.key),
            "source": sample.source,
            "offset": sample.offset,
            "length": sample.length,
        }
        if sample.source and sample.source != (printable := _printable(sample.source)):
            return row | {"source": printable, "state": REJECTED, "reason": "the file's name is not UTF-8"}
        if sample.state is not None:
            return row | {"state": sample.state, "reason": _printable(sample.reason or "")}
        try:
            assert sample.image is not None
            row["sha256"] = hashlib.sha256(sample.image).hexdigest()
            row["height"], row["width"] = measure(sample.image)
            pixels = decode(sample.image, self.config.image_size)
            row["caption_alt"] = read_caption(sample.caption)
            meta, row["meta"] = read_meta(sample.meta)
        except ValueError as error:
            return row | {"state": REJECTED, "reason": _printable(str(error))}
        try:
            row |= self._label(sample_id, sample.key, row["caption_alt"], meta)
        except Exception as error:  # the rules of one corpus applied to whatever another may hold
            return row | {"state": FAILED, "reason": _printable(f"labels: {type(error).__name__}: {error}")}
        if self.config.image_size is not None:
            row["image"] = encode_png(pixels)
        return row | {"state": ACCEPTED}

    def _label(self, sample_id: str, key: str, caption: str, meta: dict[str, Any] | None) -> dict[str, str | None]:
        if self.config.labels == "json":
            labels = label_by_json(sample_id, meta or {}, self.config.test_fraction)
        else:
            labels = import_module(f"workflows.corpora.{self.config.labels}").label(key, caption, meta)
        return {name: None if value is None else _printable(value) for name, value in labels.items()}


def make_sample_id(shard: str, key: str, occurrence: int) -> str:
    """24 hexadecimal digits of a hash: of a shard's path within the corpus, a key, and which of its namesakes it is."""
    return hashlib.sha256(f"{shard}\0{key}\0{occurrence}".encode(errors="replace")).hexdigest()[:24]


def read_caption(caption: bytes | str | None) -> str:
    """The caption as text; ValueError with the reason if it cannot be one."""
    if caption is None:
        raise ValueError("no caption")
    if not isinstance(caption, bytes | str):
        raise ValueError(f"caption is not text: {type(caption).__name__}")
    if len(caption) > MAX_CAPTION_CHARACTERS * (4 if isinstance(caption, bytes) else 1):
        raise ValueError(f"caption too long: more than {MAX_CAPTION_CHARACTERS} characters")
    text = _decode_text(caption, "caption is not UTF-8").strip()
    if not text:
        raise ValueError("empty caption")
    if len(text) > MAX_CAPTION_CHARACTERS:
        raise ValueError(f"caption too long: more than {MAX_CAPTION_CHARACTERS} characters")
    return text


def read_meta(meta: bytes | str | dict[str, Any] | None) -> tuple[dict[str, Any] | None, str | None]:
    """The row's own json, parsed and as text; ValueError with the reason if it is none."""
    if meta is None:
        return None, None
    if isinstance(meta, dict):
        meta = json.dumps(meta, default=str)
    if len(meta) > MAX_TEXT_BYTES:
        raise ValueError(f"broken metadata: more than {MAX_TEXT_BYTES} bytes")
    text = _decode_text(meta, "broken metadata: not UTF-8")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("broken metadata: not JSON") from None
    if not isinstance(value, dict):
        raise ValueError("broken metadata: not a JSON object")
    return value, text


def label_by_json(sample_id: str, meta: dict[str, Any], test_fraction: float) -> dict[str, str | None]:
    """Split, references and scene as the row's json has them; without a split there, one drawn by the sample's id."""
    split = meta.get("split")
    if split is None:
        split = "test" if int(sample_id[:8], 16) / 2**32 < test_fraction else "train"
    elif split in TEST_SPLITS:
        split = "test"
    elif split != "train":
        raise ValueError(f"unknown split {split!r}; there are train and {', '.join(TEST_SPLITS)}")
    scene = meta.get("scene")
    return {
        "split": split,
        "reference_short": _text_or_none(meta.get("caption_short")),
        "reference_descriptive": _text_or_none(meta.get("caption_descriptive")),
        "scene": None if scene is None else json.dumps(scene),
    }


def _rendered_sources(config: ShapesConfig) -> dict[str, Source]:
    names = [f"{number:05d}.tar" for number in range(config.shards)]
    return {
        f"{number:06d}": Source(kind="tar", name=name, url=storage.join(CORPUS, name), size=0, tag="")
        for number, name in enumerate(names)
    }


def _decode_text(text: bytes | str, refusal: str) -> str:
    try:
        # A str may hold lone surrogates, which no file can.
        return (text if isinstance(text, bytes) else text.encode()).decode("utf-8-sig")
    except UnicodeError:
        raise ValueError(refusal) from None


def _text_or_none(value: Any) -> str | None:
    return value.strip() or None if isinstance(value, str) else None


def _printable(text: str) -> str:
    """The text without lone surrogates, which JSON escapes and undecodable file names bring and UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
