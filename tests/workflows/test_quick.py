"""What is asked in passing is answered without the seconds that models and engines take to load, and ends quietly."""

import os
import re
import subprocess
import sys

import pytest

from tests.kills import ROOT
from tests.workflows.test_command import run
from workflows import commands
from workflows.options import WORK
from workflows.recipes import RECIPES

HEAVY = {"torch", "ray", "transformers", "diffusers", "deepspeed", "pandas"}
PROGRAM = f"""
import sys
from workflows.__main__ import main
try:
    main(sys.argv[1:])
finally:
    print("loaded:", *sorted({HEAVY} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--help", "Recipes:"),
        ("--version", "rescribe "),
        ("rum demo", "Did you mean 'run'?"),
        ("run dmeo", "Did you mean 'demo'?"),
        ("run --help", "--help-all"),
        ("plan demo --help", "--help-all"),
        ("run demo --dry-run", "rescribe plan demo"),
        ("list nowhere", "nowhere"),
        ("show nowhere", "nowhere"),
        ("verify nowhere", "nowhere"),
        ("verify --help", "Every row accounted for"),
        ("status", "Say where the job server is"),
    ],
)
def test_nothing_heavy_is_loaded(line, wanted, tmp_path):
    assert loaded(line, wanted, tmp_path) == ""


@pytest.mark.parametrize(
    ("line", "wanted"), [("plan demo", "train_prior"), ("show demo", '"prior"'), ("list models", "207,924,768")]
)
def test_of_what_holds_configs_torch_alone_is_loaded(line, wanted, tmp_path):
    """They stand in the files of their models."""
    assert loaded(line, wanted, tmp_path) == "torch"


def test_what_is_imported_is_not_looked_through_for_garbage():
    """That takes half as long as the imports, at the latest when Python ends."""
    told = (
        "import gc; from workflows import commands; commands.load('look'); print(gc.get_freeze_count(), gc.isenabled())"
    )
    frozen, enabled = subprocess.check_output([sys.executable, "-c", told], cwd=ROOT, text=True).split()
    assert int(frozen) > 10_000
    assert enabled == "True"


def loaded(line: str, wanted: str, folder) -> str:
    """What of HEAVY a command has loaded when it ends, having said what is wanted."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_API_SERVER_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *line.split()],
        env=environment | {"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert wanted in done.stdout + done.stderr
    return re.findall(r"loaded: ?(.*)", done.stderr)[-1]


def test_all_that_there_is_can_be_said():
    assert set(commands.STEPS) == set(WORK)
    assert set(commands.recipes()) == set(RECIPES)
    assert all(callable(commands.function(place)) for place in commands.VERBS.values())
    assert all(line.split(maxsplit=1)[1:] for line in commands.overview().splitlines() if line.startswith("  "))


def test_the_help_of_a_recipe_is_short_and_true(capsys):
    code, short, _ = run(capsys, "run", "--help")
    assert code == 0
    assert len(short.splitlines()) < 40
    assert all(name in short for name in RECIPES)
    code, whole, _ = run(capsys, "run", "--help-all")
    assert code == 0
    there = set(re.findall(r"--[a-z][\w.-]*", whole))
    there |= {"--seed", "--cluster", "--corpus", "--captioner.model", "--mix.weights"}  # taken out before tyro looks
    assert (
        set(re.findall(r"(--[a-z][\w.-]*[a-z])", short)) - {"--help-all", "--captioner", "--captions", "--model"}
        <= there
    )


def test_a_reader_that_goes_away_is_no_error():
    line = [sys.executable, "-m", "workflows", "--help"]
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait()) == ("", 141)
