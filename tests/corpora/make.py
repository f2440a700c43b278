"""Corpora as people have them, each drawn anew by its test, and read, stored and exported without Ray."""

import contextlib
import io
import json
import signal
import tarfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from captioner.provenance import Author, Sign, record
from captioner.styles import Style
from infra import storage
from infra.cluster import Cluster
from infra.data.ledger import Ledger, commit, pending, tally, total
from infra.data.readers import find_corpus, write_sources
from infra.data.shards import ShardReader, shard_names, shard_url
from infra.store import Artifact, Store, step
from tests import kills
from tests.captioner.backends import server
from tests.infra.data.zoo import encode, picture, tar
from workflows import export as export_module
from workflows.__main__ import main
from workflows.export import ExportOptions
from workflows.ingest import IngestConfig, IngestWork, brief, corpus_key, tell_passed
from workflows.ingest import ingest as ingest_step
from workflows.options import step_options

CLUSTER = Cluster(name="test", actors=(1, 1))
RECORD = record(Author(model="org/name", backend="test", dtype="fp32", revision="c0ffee"), Style(name="short"), {})


def photo(number, kind="JPEG", **options):
    """A file of a picture of 16 x 16, each number another."""
    return encode(picture(number, 16, 16), kind, **options)


def lines(*rows):
    """The text of a JSONL file."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@dataclass(frozen=True)
class Found:
    """What a corpus was read as: the index's rows, counts as of a summary, and what was said on the way."""

    rows: list[dict]
    counts: dict
    said: str

    @property
    def captions(self):
        """The captions of each accepted row, by its key; none where it has no alt text."""
        return {row["key"]: captions_of(row) for row in self.rows if row["state"] == "accepted"}

    @property
    def refused(self):
        """The reasons of all other rows, by their keys."""
        return {row["key"]: row["reason"] for row in self.rows if row["state"] != "accepted"}

    def column(self, name):
        return {row["key"]: row[name] for row in self.rows if row["state"] == "accepted"}


def captions_of(row):
    first = row["caption_alt"]
    every = row.get("captions_alt") or ([] if first is None else [first])
    assert every[:1] == ([] if first is None else [first]), "caption_alt stays the first"
    return every


@dataclass(frozen=True)
class Corpus:
    """A folder below `place` that a test fills, and what can be done with it.

    Options are those of the command `ingest`, as words.
    """

    place: Path
    name: str = "corpus"

    @property
    def folder(self):
        return self.place / self.name

    def put(self, files):
        """Write files by their names within the corpus; a text as UTF-8."""
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def tar(self, name, members):
        """Write a tar of files by their names within it."""
        pairs = [(key, text.encode() if isinstance(text, str) else text) for key, text in members.items()]
        self.put({name: tar(pairs)})

    def parquet(self, name, **columns):
        """Write a Parquet file of columns, which may be arrays of Arrow."""
        sink = io.BytesIO()
        pq.write_table(pa.table(columns), sink)
        self.put({name: sink.getvalue()})

    def link(self, name, target):
        """Make a symbolic link within the corpus; a relative target is one as seen from the link."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)

    def config(self, *options):
        if not options:
            return IngestConfig(corpus=str(self.folder))
        return step_options(ingest_step, ["--corpus", str(self.folder), *options]).config

    def read(self, *options):
        """Find the corpus, read it and judge its rows in this process."""
        out, said = str(self.place / "index"), io.StringIO()
        with contextlib.redirect_stderr(said):
            counts = write_index(self.config(*options), out)
        tables = [pq.read_table(storage.open_read(shard_url(out, name))) for name in shard_names(out)]
        rows = pa.concat_tables(tables, promote_options="default").to_pylist()
        storage.remove(out)
        return Found(rows, counts, said.getvalue())

    def identity(self, *options):
        """What changes when the corpus does."""
        return corpus_key(self.config(*options))

    def stored(self, store, *options):
        """The artifact of its index in a store, which is found if it is there."""
        return Store(str(store), CLUSTER).step(ingest, self.config(*options))


def write_index(config, out):
    """The index of a corpus below `out`, and its counts: the one place here that knows the readers' interface."""
    corpus = find_corpus(config.corpus, config.shard_rows, config.reading)
    write_sources(corpus, out)
    tell_passed(corpus.passed, out)
    work = IngestWork(config, corpus.sources, out)
    for name in corpus.sources:
        commit(out, name, work(name))
    Ledger(out).close()
    return tally(out) | {"ignored_files": brief(corpus.passed)}


def passed_over(counts):
    """How many files or links were passed over, by kind."""
    told = counts["ignored_files"]
    return told if isinstance(told, dict) else {"files": told}


@step(version=ingest_step.version, key=corpus_key)
def ingest(config: IngestConfig, *, out, cluster, report):
    """As the step of that name, without Ray."""
    return write_index(config, out)


@step(version=1)
def recaption(config: dict, images: Artifact, *, out, cluster, report):
    """Captions that name their rows, without a captioner."""
    sign = Sign({"short": (RECORD,)})
    sign.setup()
    for name in shard_names(images.path):
        reader = ShardReader([images.path], name, every=True)
        keys = reader.columns(["key"])["key"].tolist()
        said = [f"this is {k}" if s == "accepted" else None for k, s in zip(keys, reader.states, strict=True)]
        columns = {"sample_id": reader.sample_ids, "state": list(reader.states)}
        columns |= {"reason": pa.array(reader.reasons, pa.string()), "caption_short": pa.array(said, pa.string())}
        commit(out, name, pa.table(columns | sign({"caption_short": said})))
    Ledger(out).close()
    return tally(out) | {"provenance": {"short": [RECORD]}}


def captioned(corpus, store, **config):
    """The artifacts of a corpus's index and captions in a store; another config makes other captions."""
    images = corpus.stored(store)
    return images, Store(str(store), CLUSTER).step(recaption, config, images)


def export_here(monkeypatch):
    """Exports are written in this process."""

    def here(work, names, out, **_):
        for name in pending(out, names):
            commit(out, name, work(name))
        return total(Ledger(out).close().values())

    monkeypatch.setattr(export_module, "run_shards", here)
    monkeypatch.setattr(export_module, "connect", lambda cluster: None)


def exported(monkeypatch, corpus, form):
    """Rows of the exported table, or files by name of the exported tars, and the card."""
    export_here(monkeypatch)
    images, captions = captioned(corpus, corpus.place / "store")
    out = corpus.place / f"export-{form}"
    given = {"images": images.path, "captions": captions.path, "out": str(out), "cluster": CLUSTER}
    export_module.export(ExportOptions(**given, format=form))
    card = (out / "README.md").read_text()
    if form == "parquet":
        return pa.concat_tables(map(pq.read_table, sorted((out / "data").iterdir()))).to_pylist(), card
    files = {}
    for path in sorted((out / "data").iterdir()):
        with tarfile.open(path) as archive:
            files |= {member.name: archive.extractfile(member).read() for member in archive}
    return files, card


def command(capsys, *words):
    """The exit code of a command in this process, and what it said on standard output and standard error."""
    code = 0
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    return code, told.out, told.err


class Served:
    """A captioner behind a chat endpoint that notes which pictures, by number, it was asked for, in order.

    Each answer takes `seconds`; before that of request number `at`, `then` is called.
    """

    def __init__(self, pictures):
        self.seconds, self.at, self.then, self.asked = 0.0, 0, None, []
        self._known = np.stack([picture(n, 16, 16).astype(int) for n in range(pictures)])
        self._endpoint = server.Endpoint(self._answer)
        self.url, self.close = self._endpoint.url, self._endpoint.close

    def _answer(self, body, number):
        pixels = np.asarray(server.picture(body).convert("RGB")).astype(int)
        found = int(np.abs(self._known - pixels).sum((1, 2, 3)).argmin())
        self.asked.append(found)
        if number == self.at:
            self.then()
        time.sleep(self.seconds)
        return server.completion(f"this is {found}", finish_reason="stop")


def line_of(served, corpus, *options):
    """The line that captions a corpus."""
    words = [
        "recaption",
        "--corpus",
        str(corpus.folder),
        "--captioner",
        served.url,
        "--model",
        "m",
        "--styles",
        "short",
    ]
    words += ["--out", str(corpus.place / "captions"), "--cluster.actors", "1", "1", "--json"]
    return [*words, *options]


def recaption_by(capsys, served, corpus, *options):
    """Give that line in this process; exit code, results and what was said."""
    code, out, err = command(capsys, *line_of(served, corpus, *options))
    return code, json.loads(out.splitlines()[-1]) if code == 0 else {}, err


def interrupted(served, corpus, at, *options):
    """Give that line in a process of its own, which has a Ctrl-C at request number `at`; its exit code."""
    with kills.started(*line_of(served, corpus, *options)) as (process, seen):
        served.at, served.then = at, partial(process.send_signal, signal.SIGINT)
        while process.poll() is None:
            seen |= {each.pid: each for each in kills.family(process)}
            time.sleep(0.2)
        served.at = 0
        return process.returncode


def captions_by_key(path):
    """The new caption of each row of an artifact, by the row's key."""
    captions = Artifact.open(path)
    found = {}
    for name in shard_names(captions.path):
        reader = ShardReader([captions.inputs[0].path, captions.path], name)
        columns = reader.columns(["key", "caption_short"])
        found |= dict(zip(columns["key"].tolist(), columns["caption_short"].tolist(), strict=True))
    return found
