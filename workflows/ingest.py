"""Index a corpus: where each sample lies, what it says, and why it is unusable if it is."""

import hashlib
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import pyarrow as pa

from infra import storage
from infra.cluster import Cluster, connect
from infra.config import fingerprint, setting
from infra.data.ahead import ahead
from infra.data.fitting import Fit, Size, bucket_name, check_fit, frame, nearest
from infra.data.growth import Pieces, listed_sources, of_sources
from infra.data.images import decode, encode_png, measure
from infra.data.ledger import Ledger, Record, counting
from infra.data.listing import LINKS
from infra.data.readers import find_corpus, list_corpus, read_entries_of, read_source, write_sources
from infra.data.run import Report, run_shards
from infra.data.samples import NAMED, Reading, Sample, Source
from infra.data.shards import OPTIONAL
from infra.data.stage import ACCEPTED, REJECTED
from infra.data.text import check_encoding
from infra.store import Artifact, step
from workflows.conditions import ConditionsConfig, read_conditions
from workflows.corpora.shapes import ShapesConfig, write_shard
from workflows.judge import label_by_json, named_splits, read_captions, read_meta

CORPUS = "corpus"  # the folder of a rendered corpus within the artifact
PASSED = "passed_over.json"  # the files that are no part of the corpus, by kind
SHOWN = 3  # of each kind in the log

INDEX = pa.schema(
    {
        "sample_id": pa.string(),
        "key": pa.string(),
        "state": pa.string(),
        "reason": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
        "caption_alt": pa.string(),  # null where there is none, and why
        "alt_fault": pa.string(),
        "split": pa.string(),  # train, test, or a name that is neither trained on nor tested with
        "split_fault": pa.string(),
        "reference_short": pa.string(),
        "reference_descriptive": pa.string(),
        "scene": pa.string(),
        "meta": pa.string(),
        "meta_fault": pa.string(),
        "other_pictures": pa.string(),  # of the same sample, that are not read
        "source": pa.string(),  # absolute, or within the artifact
        "offset": pa.int64(),
        "length": pa.int64(),
        "sha256": pa.string(),
    }
)
BUCKET = pa.field("bucket", pa.string())
# In order; only in shards where a row has several.
SEVERAL = pa.field("captions_alt", pa.list_(pa.string()), metadata=OPTIONAL)
COUNTED = ("split", "alt_fault", "split_fault", "meta_fault", "other_pictures")


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """Which corpus is read, and how its rows are labelled.

    `corpus` is a path or pattern of WebDataset tars, Parquet files or folders of images, local or s3://, or the
    built-in Shapes. `labels` says where splits, reference captions and scenes come from: each row's own json, or what
    is known of a published corpus. With `image_size` (height, width) the index carries resized PNG copies; with
    `buckets`, several such sizes, each copy has the one whose aspect ratio is nearest to the picture's, and the column
    `bucket` says which. `fit` is how a picture comes to its size.
    """

    corpus: str | ShapesConfig = ""  # to be given
    labels: Literal["json", "nlvr", "emoji"] = "json"
    image_size: tuple[int, int] | None = None
    shard_rows: int = 1000  # of folders; other corpora come in shards
    test_fraction: float = 0.05  # of rows whose json does not say their split
    image_column: str | None = None  # of Parquet; by default found by name and type
    caption_column: str | None = None  # of Parquet and tables; by default found by name
    file_column: str | None = setting(None, since="0.2")  # of tables: what names the pictures
    caption_field: str | None = setting(None, since="0.2")  # of a sample's JSON, or a path into it: meta.captions.0
    image_part: str | None = setting(None, since="0.2")  # the ending of the picture, where a sample has several
    splits: tuple[str, ...] = setting((), since="0.2")  # what splits of other names become: restval=train
    encoding: str = setting("", since="0.2")  # of texts that are not UTF-8: cp1252
    follow_links: bool = setting(False, since="0.2")  # symbolic links that leave the corpus
    fit: Fit = setting("stretch", since="0.2")
    buckets: tuple[Size, ...] = setting((), since="0.2")  # instead of an image_size
    conditions: ConditionsConfig = setting(default_factory=ConditionsConfig, since="0.2")

    def __post_init__(self) -> None:
        if not self.corpus:
            raise ValueError("Say which corpus: a path or pattern of WebDataset tars, Parquet files or image folders.")
        check_fit(self.fit, self.image_size, self.buckets)
        if self.shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, but it is {self.shard_rows}.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction must be from 0 to below 1, but it is {self.test_fraction}.")
        named_splits(self.splits)
        check_encoding(self.encoding)

    @property
    def reading(self) -> Reading:
        """How the files of the corpus are read."""
        return Reading(**{name: getattr(self, name) for name in NAMED}, parts=self.conditions.endings)

    @property
    def sizes(self) -> tuple[Size, ...]:
        """The sizes of the copies; none, where none are made."""
        return self.buckets or ((self.image_size,) if self.image_size else ())


def corpus_key(config: IngestConfig) -> str | None:
    """A hash of the corpus's sources, so that a corpus that changed under its pattern is a new artifact."""
    if not isinstance(config.corpus, str):
        return None
    return fingerprint(list_corpus(config.corpus, config.shard_rows, config.reading))


def corpus_shards(config: IngestConfig, inputs: Sequence[Artifact], path: str | None) -> Pieces:
    """What each shard of an index is made of: its source, as it was noted at `path`, or as it lies now."""
    if not isinstance(config.corpus, str):
        return {}  # what is rendered is made of nothing
    if path is not None:
        return of_sources(listed_sources(path))
    return of_sources(find_corpus(config.corpus, config.shard_rows, config.reading).sources)


@step(version=2, key=corpus_key, shards=corpus_shards, listed="corpus")
def ingest(config: IngestConfig, *, out: str, cluster: Cluster, report: Report) -> dict[str, Any]:
    """Write the index of a corpus, one Parquet file a shard; every row is in it, accepted, rejected or failed.

    A row is accepted if its picture can be used. What is wrong with its texts stands in `alt_fault`, `split_fault` and
    `meta_fault`.
    """
    passed: dict[str, list[str]] = {}
    if isinstance(config.corpus, str):
        corpus = find_corpus(config.corpus, config.shard_rows, config.reading)
        write_sources(corpus, out)
        sources, passed = corpus.sources, corpus.passed
        tell_passed(passed, out)
    else:
        sources = _rendered_sources(config.corpus)
    connect(cluster)
    work = IngestWork(config, sources, out)
    counts = run_shards(work, list(sources), out, actors=cluster.actors, report=report)
    if isinstance(config.corpus, ShapesConfig):
        write_sources(find_corpus(storage.join(out, CORPUS)), out)
    if not counts[ACCEPTED]:
        why = ", ".join(f"{reason} ({count})" for reason, count in counts["reasons"].items())
        raise ValueError(f"None of the {counts['rows_in']} rows of {config.corpus} can be used: {why}.")
    totals = value_counts(Ledger(out).complete().values())
    found = {"splits": totals["split"]} | {f"{name}s": totals[name] for name in COUNTED[1:4]}
    others = {"other_pictures": sum(totals["other_pictures"].values())}
    return counts | found | others | {"ignored_files": sum(map(len, passed.values())), "passed_over": brief(passed)}


def tell_passed(passed: dict[str, list[str]], out: str) -> None:
    """Name in the log and in a file what is no part of the corpus."""
    storage.write_json(storage.join(out, PASSED), passed)
    for kind, paths in passed.items():
        more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
        advice = " To follow them: --follow-links." if kind == LINKS else ""
        print(f"Passed over {kind}: {', '.join(paths[:SHOWN])}{more}.{advice}", file=sys.stderr, flush=True)


def brief(passed: dict[str, list[str]]) -> dict[str, int]:
    """How many files of each kind."""
    return {kind: len(paths) for kind, paths in passed.items()}


def value_counts(records: Iterable[Record]) -> dict[str, dict[str, int]]:
    """How often each value of the counted columns stands in the accepted rows of all shards."""
    totals: dict[str, Counter[str]] = {name: Counter() for name in COUNTED}
    for record in records:
        for name, counts in record.get("counts", {}).items():
            totals[name].update(counts)
    return {name: dict(counter.most_common()) for name, counter in totals.items()}


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
        schema = INDEX
        for held in (SEVERAL, BUCKET if self.config.buckets else None, *self.config.conditions.fields):
            if held and (held is not SEVERAL or any("captions_alt" in row for row in rows)):
                schema = schema.append(held)
        if self.config.sizes:
            schema = schema.append(pa.field("image", pa.binary()))
        return counting(pa.Table.from_pylist(rows, schema), COUNTED, first=["split"])

    def _samples(self, name: str) -> Iterator[Sample]:
        source = self.sources[name]
        if isinstance(self.config.corpus, str):
            yield from read_source(source, read_entries_of(self.out, name) if source.kind == "folder" else None)
            return
        with tempfile.TemporaryDirectory(prefix="rescribe-") as folder:
            tar = str(write_shard(self.config.corpus, int(name), folder))
            storage.upload(tar, storage.join(self.out, CORPUS, source.name))
            parts = self.config.conditions.endings
            for sample in read_source(Source(kind="tar", name=source.name, url=tar, size=0, tag="", parts=parts)):
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
            size = nearest((row["height"], row["width"]), self.config.sizes) if self.config.sizes else None
            pixels = decode(sample.image, size, fit=self.config.fit)
        except ValueError as error:
            return row | {"state": REJECTED, "reason": _printable(str(error))}
        if size is not None:
            row["image"] = encode_png(pixels)
            row["bucket"] = bucket_name(size)  # left out of an index without buckets
        return row | {"state": ACCEPTED} | self._judge_texts(sample_id, sample) | self._conditions(sample, row, size)

    def _judge_texts(self, sample_id: str, sample: Sample) -> dict[str, Any]:
        """What a captioner does without: nothing here decides whether a picture is accepted."""
        captions, fault = read_captions(sample.captions, self.config.encoding)
        meta, text, meta_fault = read_meta(sample.meta, self.config.encoding)
        row: dict[str, Any] = {"alt_fault": sample.fault or fault, "meta": text, "meta_fault": meta_fault}
        row |= {"caption_alt": captions[0] if captions else None, "other_pictures": ", ".join(sample.others) or None}
        if len(captions) > 1:
            row["captions_alt"] = [_printable(caption) for caption in captions]
        try:
            if self.config.labels == "json":
                row |= label_by_json(sample_id, meta, self.config.test_fraction, named_splits(self.config.splits))
            else:
                label = import_module(f"workflows.corpora.{self.config.labels}").label
                row |= label(sample.key, captions[0] if captions else None, meta or None)
        except Exception as error:  # the rules of one corpus applied to whatever another may hold
            row["split_fault"] = f"labels: {type(error).__name__}: {error}"
        return {name: _printable(value) if isinstance(value, str) else value for name, value in row.items()}

    def _conditions(self, sample: Sample, row: dict[str, Any], size: Size | None) -> dict[str, Any]:
        source = (row["height"], row["width"])
        shown = frame(source, size or source, self.config.fit)
        meta, _, _ = read_meta(sample.meta, self.config.encoding)
        return read_conditions(self.config.conditions, meta, sample.parts, shown)


def make_sample_id(shard: str, key: str, occurrence: int) -> str:
    """24 hexadecimal digits of a hash: of a shard's path within the corpus, a key, and which of its namesakes it is."""
    return hashlib.sha256(f"{shard}\0{key}\0{occurrence}".encode(errors="replace")).hexdigest()[:24]


def _rendered_sources(config: ShapesConfig) -> dict[str, Source]:
    names = [f"{number:05d}.tar" for number in range(config.shards)]
    return {
        f"{number:06d}": Source(kind="tar", name=name, url=storage.join(CORPUS, name), size=0, tag="")
        for number, name in enumerate(names)
    }


def _printable(text: str) -> str:
    """The text without lone surrogates, which JSON escapes and undecodable file names bring and UTF-8 cannot hold."""
    return text.encode(errors="replace").decode()
