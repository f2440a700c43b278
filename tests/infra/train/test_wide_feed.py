"""Of wide columns a feed reads the bytes that its rows need, in few requests, and holds few of them at a time."""

import tracemalloc
import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pytest

from infra import storage
from infra.data import wide
from infra.data.images import encode_png
from infra.data.ledger import commit
from infra.data.shards import count_rows
from infra.train import prepare
from infra.train.draw import uniforms
from infra.train.feed import Feed
from infra.train.plan import BatchPlan
from tests.infra.train import toy

SHARDS, ROWS, BATCH = 4, 64, 128
STYLES = ("short", "long")


@dataclass(frozen=True)
class Drawn(toy.Toy):
    """Latents of every row, and the features of the caption that is drawn; every fifth row goes without."""

    reads: tuple[str, ...] = ("row", "latents", "codes")

    def picks(self, rows, draw):
        assert {"row", "codes", "sample_id"} <= set(rows)
        longs = draw("caption") < 0.5
        names = [f"features_{STYLES[int(long)]}" for long in longs]
        return {"features": [None if row % 5 == 0 else name for row, name in zip(rows["row"], names, strict=True)]}

    def collate(self, rows, draw):
        assert rows["row"] == [codes[0] for codes in rows["codes"]]
        sums = [0 if each is None else zlib.crc32(each) for each in rows["features"]]
        assert all(each is None or each.dtype == np.uint16 for each in rows["features"])
        return {"row": np.array(rows["row"]), "latents": np.stack(rows["latents"]), "sums": np.array(sums)}


def latents(row):
    return np.random.default_rng(row).standard_normal(2048, dtype=np.float32)


def features(row, style):
    """Of a length of its own; now and then of none."""
    generator = np.random.default_rng([row, STYLES.index(style)])
    return generator.integers(0, 2**16, 0 if row % 31 == 0 else int(generator.integers(1500, 9000)), np.uint16)


def write(artifact, least=wide.LEAST):
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(wide, "LEAST", least)
        for shard in range(SHARDS):
            rows = list(range(shard * ROWS, (shard + 1) * ROWS))
            columns = {"sample_id": [f"{row:016x}" for row in rows], "state": ["accepted"] * ROWS}
            columns |= {"reason": pa.nulls(ROWS, pa.string()), "row": rows, "codes": [[row, 1] for row in rows]}
            columns["latents"] = pa.array([latents(row) for row in rows])
            columns |= {f"features_{style}": pa.array([features(row, style) for row in rows]) for style in STYLES}
            commit(artifact, f"{shard:06d}", pa.table(columns))
    return artifact


def workers(task, artifact, world, epochs=1, padding=0):
    """The batches of each worker, without Ray, an epoch a chunk; of a step `padding` rows or more have weight 0."""
    counts = count_rows([artifact], task.where, task.where_reads)
    plan = BatchPlan(list(counts.values()), BATCH, 0, 2)
    steps = plan.rows_per_epoch * epochs // BATCH
    for rank in range(world):
        feed = Feed(task, [artifact], list(counts), plan, steps, rank, world, BATCH // world + padding, 1)
        work = prepare.Prepare(task, [artifact], 0, feed.rows, 0, feed.key)
        yield [batch for chunk in feed.chunks(0, steps, steps // epochs) for batch in work.batches(chunk)]


class Counter:
    """Requests for ranges and their bytes, and bytes that went through files, as Parquet's do."""

    def __init__(self, monkeypatch):
        self.requests = self.bytes = self.others = 0
        read_bytes, open_read, counter = storage.read_bytes, storage.open_read, self

        def counted(url, offset=0, length=None):
            data = read_bytes(url, offset, length)
            counter.requests += 1
            counter.bytes += len(data)
            return data

        class File:
            def __init__(self, url):
                self.file = open_read(url)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

            def __getattr__(self, name):
                return getattr(self.file, name)

            def read(self, size=-1):
                data = self.file.read(size)
                counter.others += len(data)
                return data

        monkeypatch.setattr(storage, "read_bytes", counted)
        monkeypatch.setattr(storage, "open_read", File)


def needed(epochs=1):
    """The sum of each row's picked features by (epoch, row), and the bytes and values of all that is wanted."""
    ids = np.arange(SHARDS * ROWS, dtype=np.uint64)
    sums, size, values = {}, 0, 0
    for epoch in range(epochs):
        longs = uniforms(0, np.full(len(ids), epoch), ids, "caption") < 0.5
        for row, long in enumerate(longs):
            picked = None if row % 5 == 0 else features(row, STYLES[int(long)])
            sums[epoch, row] = 0 if picked is None else zlib.crc32(picked)
            sizes = [latents(row).nbytes, 0 if picked is None else picked.nbytes]
            size, values = size + sum(sizes), values + sum(each > 0 for each in sizes)
    return sums, size, values


@pytest.mark.parametrize(("where", "world"), [("tmp_path", 1), ("tmp_path", 8), ("tmp_path", 64), ("s3", 8)])
def test_an_epoch_reads_what_its_rows_need(request, monkeypatch, where, world):
    """Over two epochs, that draw other captions; on S3 what is counted are its requests."""
    artifact, epochs = write(storage.join(str(request.getfixturevalue(where)), "a")), 2
    sums, size, values = needed(epochs)
    counter = Counter(monkeypatch)
    calls = requests_to_s3(monkeypatch)
    found = list(workers(Drawn(), artifact, world, epochs))
    assert size <= counter.bytes <= 1.2 * size
    assert counter.requests <= max(values, size / 2**18)
    if artifact.startswith("s3://"):
        assert sum("Range" in kwargs for kwargs in calls if "/wide/" in kwargs["Key"]) == counter.requests
    if world == 1:
        assert counter.requests <= values / 3, "rows that lie together are one request"
    seen = []
    for step in range(len(found[0])):
        for batches in found:
            seen += list(zip(batches[step]["row"].tolist(), batches[step]["sums"].tolist(), strict=True))
            for row, each in zip(batches[step]["row"], batches[step]["latents"], strict=True):
                assert np.array_equal(each, latents(row))
    per_epoch = SHARDS * ROWS
    assert [told for _, told in seen] == [sums[place // per_epoch, row] for place, (row, _) in enumerate(seen)]
    plan = BatchPlan([ROWS] * SHARDS, BATCH, 0, 2).steps(0, per_epoch * epochs // BATCH)
    assert [row for row, _ in seen] == (plan.shard * ROWS + plan.row).tolist(), "the order is the plan's"


def requests_to_s3(monkeypatch):
    import s3fs

    calls, call = [], s3fs.S3FileSystem._call_s3

    async def count(self, method, *args, **kwargs):
        if method == "get_object":
            calls.append({**(args[0] if args and isinstance(args[0], dict) else {}), **kwargs})
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", count)
    return calls


@pytest.mark.timeout(120)
def test_ray_gives_what_was_picked(ray_cluster, tmp_path):
    artifact = write(f"{tmp_path}/a")
    plan = BatchPlan([ROWS] * SHARDS, BATCH, 0, 2)
    feed = Feed(Drawn(), [artifact], [f"{shard:06d}" for shard in range(SHARDS)], plan, 2, 0, 1, BATCH, 1)
    (wanted,) = workers(Drawn(), artifact, 1)
    for (found,), batch in zip(feed(0), wanted, strict=True):
        assert all(np.array_equal(found[name], batch[name]) for name in batch)


def test_rows_that_fill_a_batch_are_not_read_for_its_sake(tmp_path, monkeypatch):
    artifact = write(f"{tmp_path}/a")
    _, size, _ = needed()
    counter = Counter(monkeypatch)
    for batches in workers(Drawn(), artifact, 64, padding=1):
        assert all(batch["weight"].tolist() == [1, 1, 0] for batch in batches)
    assert counter.bytes == size


def test_without_side_files_an_epoch_reads_many_times_as_much(tmp_path, monkeypatch):
    """As artifacts lie that were made before; what comes of it is the same."""
    old, new = write(f"{tmp_path}/old", least=2**62), write(f"{tmp_path}/new")
    counter = Counter(monkeypatch)
    found = list(workers(Drawn(), old, 8))
    assert counter.requests == 0
    assert counter.others > 5 * needed()[1]
    for batches, others in zip(found, workers(Drawn(), new, 8), strict=True):
        for batch, other in zip(batches, others, strict=True):
            assert all(np.array_equal(batch[name], other[name]) for name in batch)


@dataclass(frozen=True)
class Looks(toy.Toy):
    reads: tuple[str, ...] = ("pixels", "row")

    def collate(self, rows, draw):
        return {"means": np.array([pixels.mean() for pixels in rows["pixels"]]), "row": np.array(rows["row"])}


@pytest.mark.parametrize("side", [64, 8])
def test_copies_of_pictures_are_read_as_they_are_needed(tmp_path, monkeypatch, side):
    """Large ones by range, small ones whole, once."""
    shape = (side, side, 3)
    images = [encode_png(np.random.default_rng(n).integers(0, 256, shape, dtype=np.uint8)) for n in range(ROWS)]
    for shard in range(SHARDS):
        rows = list(range(shard * ROWS, (shard + 1) * ROWS))
        columns = {"sample_id": [f"{row:016x}" for row in rows], "state": ["accepted"] * ROWS, "row": rows}
        columns |= {"reason": pa.nulls(ROWS, pa.string()), "offset": [0] * ROWS, "image": images}
        commit(str(tmp_path), f"{shard:06d}", pa.table(columns))
    size = SHARDS * sum(map(len, images))
    counter, others = Counter(monkeypatch), []
    for epochs in (1, 5):
        counter.requests = counter.bytes = counter.others = 0
        for batches in workers(Looks(), str(tmp_path), 8, epochs):
            assert all(len(set(batch["means"].tolist())) > 1 for batch in batches)
        others.append(counter.others)
        if side == 64:
            assert epochs * size <= counter.bytes <= 1.2 * epochs * size
            assert counter.requests <= epochs * SHARDS * ROWS
        else:
            assert counter.bytes == 0
    assert others[0] == others[1], "what is read whole is read once"


@dataclass(frozen=True)
class Heavy(toy.Toy):
    reads: tuple[str, ...] = ("row", "features")

    def collate(self, rows, draw):
        return {"first": np.array([each[0] for each in rows["features"]])}


def test_what_a_task_holds_does_not_grow_with_its_rows(tmp_path, monkeypatch):
    """48 rows of 1.2 MB, two a step, and 4 MiB that may be read at a time."""
    size, count, bound = 600_000, 48, 2**22
    rows = list(range(count))
    columns = {"sample_id": [f"{row:016x}" for row in rows], "state": ["accepted"] * count, "row": rows}
    columns |= {"reason": pa.nulls(count, pa.string())}
    columns["features"] = pa.array([np.full(size, row, np.uint16) for row in rows])
    commit(str(tmp_path), "000000", pa.table(columns))
    del columns
    monkeypatch.setattr(prepare, "WIDE_BYTES", bound)
    chunk = prepare.Chunk(
        ["000000"], np.zeros(count, int), np.random.default_rng(0).permutation(count), np.zeros(count, int),
        np.ones(count, np.float32),
    )  # fmt: skip
    work = prepare.Prepare(Heavy(), [str(tmp_path)], 0, 2, 0, "heavy")
    list(work.batches(chunk.part(slice(2))))  # what is imported and opened stays
    tracemalloc.start()
    try:
        found = [int(batch["first"][0]) for batch in work.batches(chunk)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == chunk.row[::2].tolist()
    assert peak <= 1.2 * bound + 2**18


def test_a_batch_of_more_bytes_than_32_bits_count_travels():
    """Of memory that nobody has touched, so that none is taken."""
    batch = {"features": np.zeros((2, 2**30 + 4), np.uint8), "weight": np.ones(2, np.float32)}
    (table,) = prepare.pack([batch])
    (found,) = prepare.unpack(table)
    assert found["features"].shape == (2, 2**30 + 4)
    assert found["weight"].tolist() == [1, 1]
    assert table["0"].type == pa.large_binary()


def test_picks_that_do_not_fit_are_said(tmp_path):
    artifact = write(f"{tmp_path}/a")

    @dataclass(frozen=True)
    class Wrong(Drawn):
        named: str = "features"
        column: str = "features_short"

        def picks(self, rows, draw):
            return {self.named: [self.column] * len(rows["row"])}

    with pytest.raises(AssertionError, match="'latents' is one of the columns that are read"):
        next(workers(Wrong(named="latents"), artifact, 1))
    with pytest.raises(ValueError, match="no column 'features_tall' in the inputs"):
        next(workers(Wrong(column="features_tall"), artifact, 1))
