"""The mathematics stand on torch and on keyed randomness alone."""

import pytest

from tests.test_layers import ROOT, imports, top

FILES = sorted((ROOT / "t2i" / "diffusion").glob("*.py"))
OURS = ("t2i.diffusion", "t2i.random")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_diffusion_imports(path):
    for name in imports(path):
        assert name.startswith(OURS) if top(name) == "t2i" else top(name) in STANDARD, name


STANDARD = {"torch", "math", "dataclasses", "typing", "collections", "functools"}
