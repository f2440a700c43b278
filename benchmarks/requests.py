"""How many requests does S3 see for a shard, a listing, a resume? Counted at the client, against moto on this machine.

    python -m benchmarks.requests --rows 1000

Writes the built-in corpus to a bucket, indexes one shard of it and takes it through a stage that does nothing with the
decoded images, in this process and as an actor would. Prints one JSON object of counts by operation.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import tyro

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "none",
    "AWS_SECRET_ACCESS_KEY": "none",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True, kw_only=True)
class Config:
    rows: int = 1000


@dataclass
class Look:
    reads: tuple[str, ...] = ("pixels",)
    writes: tuple[str, ...] = ("height",)
    cpus: float = 1
    gpus: float = 0

    def setup(self) -> None: ...

    def __call__(self, batch: dict) -> dict:
        return {"height": [len(pixels) for pixels in batch["pixels"]]}


@contextmanager
def counted(into: dict[str, dict[str, int]], name: str) -> Iterator[None]:
    import s3fs

    counts: Counter[str] = Counter()
    call = s3fs.S3FileSystem._call_s3

    async def count(self, method, *args, **kwargs):
        counts[method] += 1
        return await call(self, method, *args, **kwargs)

    s3fs.S3FileSystem._call_s3 = count
    try:
        yield
    finally:
        s3fs.S3FileSystem._call_s3 = call
        into[name] = dict(sorted(counts.items())) | {"all": counts.total()}


def measure(rows: int, bucket: str) -> dict[str, dict[str, int]]:
    from infra import storage
    from infra.data.actor import Actor
    from infra.data.ledger import Ledger, pending
    from infra.data.readers import find_corpus
    from infra.data.shards import shard_names
    from infra.data.work import StageWork
    from workflows.corpora.shapes import ShapesConfig, write_shards
    from workflows.ingest import IngestConfig, IngestWork

    found: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_shards(ShapesConfig(samples=rows, labelled=0, shard_size=rows), f"{folder}/corpus")
        storage.upload(f"{folder}/corpus", f"{bucket}/corpus")
    corpus, images, out = f"{bucket}/corpus", f"{bucket}/images", f"{bucket}/out"
    sources = find_corpus(corpus).sources
    (name,) = sources
    works = {
        "ingest": Actor(IngestWork(IngestConfig(corpus=corpus), sources, images), images),
        "stages": Actor(StageWork((Look(),), (images,), 128), out),
    }
    for what, actor in works.items():
        with counted(found, f"{what}, one shard"):
            (result,) = actor({"names": np.array([[name]])})
            assert not result["error"][0], result
    ledger = Ledger(out)
    with counted(found, "a resume with all of 1 shard done"):
        assert pending(out, shard_names(images)) == []
        Ledger(out)
    ledger.add(name, json.loads(result["record"][0]))
    with counted(found, "a piece of the journal"):
        ledger.save()
    with counted(found, "the ledger's end"):
        ledger.close()
    return found


def main(config: Config) -> None:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        os.environ.update(SETTINGS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"})
        import s3fs

        s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"]).mkdir("counted")
        print(json.dumps(measure(config.rows, "s3://counted"), indent=1))
    finally:
        server.stop()


if __name__ == "__main__":
    main(tyro.cli(Config))
