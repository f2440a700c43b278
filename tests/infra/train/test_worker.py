"""What a training worker does beside training."""

import os
from pathlib import Path

from infra import storage
from infra.train.worker import _export
from tests.infra.train import toy
from tests.infra.train.workers import newest


def test_an_export_sweeps_what_one_that_was_killed_left(place, tmp_path):
    toy.plain(str(tmp_path / "plain"))
    out = storage.join(place, "model")
    if storage.is_local(place):
        os.makedirs(out)
        Path(out, ".net.safetensors.0123.tmp").write_bytes(b"half")
    else:
        files, path = storage._open(out)
        left = files.open(f"{path}/net.safetensors", "wb", block_size=5 * 2**20)
        left.write(bytes(6 * 2**20))
        assert files.list_multipart_uploads(path.split("/")[0])
    _export(toy.Toy(), newest(tmp_path / "plain"), out)
    assert storage.list_names(out) == ["net.safetensors"]
    if storage.is_local(place):
        assert os.listdir(out) == ["net.safetensors"]
    else:
        assert not files.list_multipart_uploads(path.split("/")[0])
        left.closed = True
