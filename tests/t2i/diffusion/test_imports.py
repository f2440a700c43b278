"""The mathematics stand on torch and on keyed randomness alone."""

import pytest

from tests.test_layers import ROOT, imports, top

MODELS = ("prior.py", "consistency.py", "unet.py")  # that stand on the mathematics
FILES = sorted(path for path in (ROOT / "t2i" / "diffusion").glob("*.py") if path.name not in MODELS)
NAMES = ("schedules", "process", "ladder", "samplers", "guidance")
OURS = (*(f"t2i.diffusion.{name}" for name in NAMES), "t2i.random")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_diffusion_imports(path):
    for name in imports(path):
        assert name.startswith(OURS) if top(name) == "t2i" else top(name) in STANDARD, name


STANDARD = {"torch", "math", "dataclasses", "typing", "collections", "functools"}
