"""What tests of checkpoints save, and what they must find again."""

from pathlib import Path

import torch

from infra import storage
from infra.train import checkpoint
from infra.train.writer import Writer

META = {"updates": {"net": {"optimizer_step": 3.0}}, "of": {"10": [1, 2], "9": None}}


def state(step):
    ours = torch.Generator().manual_seed(step)  # workers are threads in some tests
    return {
        "net/w/a": torch.randn(3, 5, generator=ours), "net/exp_avg/a": torch.randn(3, 5, generator=ours),
        "net/b/count": torch.tensor(step), "net/b/none": torch.empty(0, 4),
        "net/b/mask": torch.tensor([True, False, True]), "net/w/half": torch.randn(7, generator=ours).bfloat16(),
    }  # fmt: skip


def save(folder, *steps, **options):
    with Writer(str(folder), **options) as writer:
        for step in steps:
            writer.save(step, state(step), META)


def found(folder):
    """What is found under a folder, which must be what its step saved; its step, or None."""
    url = checkpoint.newest(str(folder))
    if url is None:
        return None
    saved = checkpoint.Checkpoint(url)
    wanted = state(saved.step)
    assert saved.meta["updates"] == META["updates"]
    assert saved.meta["of"] == META["of"]
    assert sorted(saved.names) == sorted(wanted)
    for name, tensor in wanted.items():
        assert saved[name].dtype == tensor.dtype
        assert torch.equal(saved[name], tensor)
    assert saved.step == checkpoint.step_of(url)
    return saved.step


def files(folder):
    return sorted(path for path in Path(folder).rglob("*") if path.is_file())


def names(url):
    return {storage.name(file.url) for file in storage.listing(url)}
