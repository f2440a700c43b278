"""Imports point down, and each heavy engine has one door."""

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("infra", "captioner", "t2i", "workflows")
ALLOWED = {
    "infra": {"infra"},
    "captioner": {"captioner", "infra"},
    "t2i": {"t2i", "infra"},
    "workflows": {"workflows", "captioner", "t2i", "infra"},
}
GLUE = ("task.py", "stages.py")  # of a domain package: the only files that know infra
DOORS = {
    "deepspeed": ["infra/train/zero.py"],
    "ray.data": ["infra/data/llm.py", "infra/data/run.py", "infra/train/feed.py"],
    "ray.train": ["infra/train/trainer.py"],
    "ray.job_submission": ["infra/jobs.py"],
    "mlflow": ["infra/track.py"],
    "wandb": ["infra/track.py"],
}
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imports(path: Path) -> set[str]:
    """Full names of all that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def top(name: str) -> str:
    return name.split(".")[0]


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {top(name) for name in imports(path)} & set(PACKAGES)
    assert ours <= ALLOWED[package]


def test_tests_are_not_imported_by_the_code():
    assert not [path for path in FILES if any(within(name, "tests") for name in imports(path))]


@pytest.mark.parametrize("path", [f for f in FILES if f.relative_to(ROOT).parts[0] in ("captioner", "t2i")], ids=str)
def test_models_know_no_engine(path):
    names = {top(name) for name in imports(path)}
    assert not names & {"ray", "deepspeed", "fsspec", "s3fs", "pyarrow", "tyro"}
    if path.name not in GLUE:
        assert "infra" not in names


@pytest.mark.parametrize(("engine", "doors"), DOORS.items())
def test_each_engine_has_its_doors(engine, doors):
    found = [path for path in FILES if any(within(name, engine) for name in imports(path))]
    assert sorted(str(path.relative_to(ROOT)) for path in found) == doors


def test_the_design_names_the_doors():
    design = (ROOT / "docs" / "design.md").read_text()
    sentence = design.partition("Each heavy engine has one door: ")[2].partition("`tests/")[0]
    said, engine = defaultdict(list), ""
    for name in re.findall(r"`([^`]+)`", sentence):
        if name.endswith(".py"):
            said[engine].append(name)
        else:
            engine = name
    assert {engine: sorted(doors) for engine, doors in said.items()} == {each: DOORS[each] for each in said}
    assert len(said) == 4


def test_nobody_imports_the_commands():
    users = defaultdict(list)
    for path in FILES:
        for name in imports(path):
            if within(name, "workflows.__main__"):
                users[name].append(path)
    assert not users


def test_no_code_in_init_files():
    offered = ROOT / "workflows" / "python" / "rescribe" / "__init__.py"  # what `import rescribe` finds
    assert not [path for path in FILES if path.name == "__init__.py" and path != offered and path.read_text().strip()]


def test_every_file_opens_with_a_sentence():
    for path in FILES:
        if path.name != "__init__.py":
            docstring = ast.get_docstring(ast.parse(path.read_text()))
            assert docstring, path


def test_no_torchvision():
    assert not [path for path in FILES if any(within(name, "torchvision") for name in imports(path))]


FLOORS = (  # of t2i, from the ground up; who stands on one floor imports from it and below
    ("protocol", "random", "captions", "vocabulary", "values", "pixels", "partners", "infotext"),
    ("nn", "conditions"),
    ("tokenizers", "diffusion", "clip"),
    ("priors", "gans"),
    ("adapters", "chain", "stages", "evaluate"),
)
BESIDE = ("task",)  # glue: makes Updates of any of them, and knows none


def floor(name: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if name.split(".")[1] in floor)


def test_t2i_is_built_from_the_ground_up():
    for path in (ROOT / "t2i").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        theirs = {each for each in imports(path) if within(each, "t2i") and each.count(".")}
        if name == "t2i":
            continue
        if name.split(".")[1] in BESIDE:
            assert {each.split(".")[1] for each in theirs} <= {"nn", "protocol"}
            continue
        for each in theirs:
            assert each.split(".")[1] in BESIDE or floor(each) <= floor(name), f"{name} imports {each}"


def test_no_package_imports_in_a_circle():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(path)
    graph = {name: {each for each in theirs if each in graph and each != name} for name, theirs in graph.items()}
    left = dict(graph)
    while free := [name for name, theirs in left.items() if not theirs & left.keys()]:
        for name in free:
            del left[name]
    assert not {name: sorted(theirs & left.keys()) for name, theirs in left.items()}
