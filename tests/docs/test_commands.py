"""Every command of README and docs is run, from the top of a page to its end, in one folder, as a reader would.

What stands in for a bucket, a server or a published model, and what is not run, and why, is in `lists.py`.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator

import pytest

from tests.captioner.backends import server, tiny
from tests.docs.lists import ELSEWHERE, INSTEAD, NOT_RUN
from tests.docs.pages import PAGES, ROOT, Command, Page
from tests.docs.shell import Ended, Shell, filled, without_settings
from tests.t2i.conditions import tiny as encoders
from workflows.corpora.shapes import ShapesConfig, write_shards

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]
MODEL_PAGE = "adding-a-model.md"


def is_run(command: Command) -> bool:
    return not without_settings(command.line).startswith((*NOT_RUN, *ELSEWHERE))


def walk(page: Page, shell: Shell, places: dict[str, str]) -> Iterator[tuple[str, Ended]]:
    """Run the page; each line as it stands on it, with what came of it."""
    for block in page.blocks:
        if block.language == "python" and not block.text.startswith("# ") and "store.step(" not in block.text:
            done = shell.python(filled(block.text, INSTEAD, places))
            assert done.code == 0, done.err
        for command in page.commands(block) if not block.language else ():
            if is_run(command):
                done = shell(filled(command.line, INSTEAD, places))
                said = f"{page}: {command.line}\nended with {done.code}\n{done.out[-3000:]}\n{done.err[-3000:]}"
                assert done.code == (1 if command.says else 0), said
                assert command.says in done.err, said
                assert "Traceback" not in done.err, said
                yield command.line, done


@pytest.fixture(scope="module")
def ray_for_pages(s3_server, request):
    """Ray's workers inherit what is exported before it starts, as they do where the line itself starts it."""
    os.environ["CAPTION_KEY"] = "a-key"
    request.getfixturevalue("ray_cluster")
    yield
    del os.environ["CAPTION_KEY"]


@pytest.fixture
def places(ray_for_pages, s3, tmp_path):
    """What is put in the place of a bucket, a server and published models."""

    def answer(body, number):  # the second refusal is of the second line on 24 pictures in two styles
        refused = number in (1, 50)
        return server.status(400) if refused else server.completion(f"caption {number}", finish_reason="stop")

    endpoint = server.Endpoint(answer)
    yield {
        "BUCKET": s3,
        "SERVER": endpoint.url,
        "BLIP": tiny.blip(tmp_path / "blip"),
        "LLAVA": tiny.llava(tmp_path / "llava"),
        "T5": encoders.t5(tmp_path / "t5", length=512),
    }
    endpoint.close()


@pytest.fixture(scope="module")
def first_run(ray_for_pages, tmp_path_factory):
    """docs/first-run.md, walked: what each line came to; and the store of its first line, for the other pages."""
    folder, store = tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("store") / "runs"
    ended = []
    for line, done in walk(Page(ROOT / "docs" / "first-run.md"), Shell(folder), {}):
        ended.append((line, done))
        if line == "rescribe run debug" and not store.exists():
            shutil.copytree(folder / "runs", store)
    return ended, store, folder


def test_the_first_run(first_run):
    ended, _, folder = first_run
    lines = [line for line, _ in ended]
    again = ended[lines.index("rescribe run debug") + 1]
    assert again[0] == "rescribe run debug"
    assert "All was done already." in again[1].err
    planned = next(done.out for line, done in ended if line.startswith("rescribe plan debug"))
    assert "RUN: min_words 1 -> 2" in planned
    assert len([line for line in planned.splitlines() if "RUN" in line]) == 4
    assert {path.name for path in folder.iterdir()} == {".bin"}  # it cleans up


WALKED = [page for page in PAGES if page.path.name not in ("first-run.md", MODEL_PAGE)]


@pytest.mark.parametrize("page", WALKED, ids=str)
def test_the_commands_of_a_page(page, request, tmp_path):
    commands = [each for block in page.blocks if not block.language for each in page.commands(block) if is_run(each)]
    if not commands:
        pytest.skip("it has none that are run here")
    folder, places = tmp_path / "page", {}
    if any(not re.match(r"rescribe (settings|show|shapes)\b", each.line) for each in commands):
        _, store, _ = request.getfixturevalue("first_run")
        places = request.getfixturevalue("places")
        shutil.copytree(store, folder / "runs")
        write_shards(
            ShapesConfig(samples=24, labelled=4, shard_size=12), str(folder / "data")
        )  # a corpus of the reader's
        if page.path.name == "README.md":  # and a folder of pictures, with texts beside them
            for path in (folder / "data").glob("*.tar"):
                with tarfile.open(path) as tar:
                    tar.extractall(folder / "photos", filter="data")
    shell = Shell(folder)
    assert [line for line, _ in walk(page, shell, places)] == [each.line for each in commands]


def test_a_model_is_added(first_run, tmp_path):
    """The page's own code, put where it says, into a copy of the project."""
    page, (_, store, _) = Page(ROOT / "docs" / MODEL_PAGE), first_run
    copy = tmp_path / "project"
    for name in ("workflows", "captioner", "t2i", "infra", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", copy)
    shutil.copytree(store, copy / "runs")
    for block in page.blocks:
        if block.language == "python":
            name, _, text = block.text.partition("\n")
            (copy / name[2:]).write_text(text)
            for check in (["check"], ["format", "--check"]):
                subprocess.run([sys.executable, "-m", "ruff", *check, name[2:]], cwd=copy, check=True, timeout=60)
        if block.language == "diff":
            subprocess.run(["git", "apply", "-"], input=block.text, text=True, cwd=copy, check=True, timeout=60)
    ended = dict(walk(page, Shell(copy, own=True), {}))
    assert "passed" in ended["python -m pytest tests/t2i/test_priors.py tests/test_layers.py"].out
    assert "Done." in ended["rescribe run pixels"].err
    assert ended["rescribe run pixels"].err.count("done already") == 6
    trained = [path.read_text() for path in (copy / "runs").glob("train_prior/*/model/config.json")]
    assert len([text for text in trained if '"reach"' in text]) == 1
