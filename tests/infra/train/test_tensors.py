"""Tensors in files of the safetensors format, against the library that made it."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from infra import storage
from infra.train.tensors import TYPES, TensorFile, pieces


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8),
        st.tuples(st.sampled_from(sorted(TYPES)), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    ),
    st.randoms(use_true_random=False),
)
def test_the_format_is_that_of_the_library(tmp_path_factory, kinds, rng):
    folder = tmp_path_factory.mktemp("format")
    tensors = {}
    for name, (kind, shape) in kinds.items():
        data = bytearray(rng.randbytes(TYPES[kind].itemsize * torch.Size(shape).numel()))
        if kind == "BOOL":
            data = bytearray(byte % 2 for byte in data)
        tensors[name] = torch.frombuffer(data, dtype=TYPES[kind]) if data else torch.empty(0, dtype=TYPES[kind])
        tensors[name] = tensors[name].reshape(shape)

    def same(found):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            bits = [one.contiguous().reshape(-1).view(torch.uint8) for one in (found[name], tensor)]
            assert torch.equal(*bits)

    ours, theirs = str(folder / "ours"), str(folder / "theirs")
    storage.write_pieces(ours, pieces(tensors))
    with safe_open(ours, "pt") as opened:
        same({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    same(safetensors.torch.load(Path(ours).read_bytes()))
    safetensors.torch.save_file(tensors, theirs, {"a": "note"})
    for path in (ours, theirs):
        opened = TensorFile(path)
        same({name: opened[name] for name in opened.names})


def test_views_and_other_strides_are_saved_as_they_are_seen(tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    odd = {"t": whole.T, "row": whole[1], "grad": torch.nn.Parameter(whole[:, ::2])}
    storage.write_pieces(str(tmp_path / "x"), pieces(odd))
    opened = TensorFile(str(tmp_path / "x"))
    assert all(torch.equal(opened[name], tensor) for name, tensor in odd.items())
    with pytest.raises(ValueError, match=r"'c' is of torch.complex64, which cannot be saved\. Use one of F64"):
        list(pieces({"c": torch.zeros(1, dtype=torch.complex64)}))


def test_a_large_tensor_comes_in_pieces_that_are_views():
    tensor = torch.zeros(10 * 2**20)
    _, *data = pieces({"a": tensor})
    assert [len(piece) for piece in data] == [16 * 2**20, 16 * 2**20, 8 * 2**20]
    tensor[0] = 1.0  # no second copy of what is saved
    assert bytes(data[0][:4]) == b"\0\0\x80?"


@pytest.mark.parametrize("text", [b"", b"\1\0", b"\xff" * 8, b"\5\0\0\0\0\0\0\0{", b"\2\0\0\0\0\0\0\0{x"])
def test_what_is_no_such_file_is_said(tmp_path, text):
    (tmp_path / "x").write_bytes(text)
    with pytest.raises(ValueError, match=r"x is (cut: it ends at byte|no safetensors file: its header)"):
        TensorFile(str(tmp_path / "x"))
