"""A line is read before it is sent: its paths are made absolute or refused, its secrets are refused, unseen."""

import json
import os
import subprocess
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workflows import __main__ as command
from workflows import submit
from workflows.line import batches, placed, strings, with_options, words
from workflows.secret import refuse_secrets
from workflows.submit import ROOT, sources


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    for folder in ("corpus", "runs/mix/0123", "short", "demo"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run demo", "run demo --store HERE/runs"),
        ("run demo --store=x --seed 1", "run demo --store=HERE/x --seed 1"),
        ("run demo --store s3://bucket/x", "run demo --store s3://bucket/x"),
        ("run nlvr --corpus corpus/*.tar --store ~/x", "run nlvr --corpus HERE/corpus/*.tar --store HOME/x"),
        ("run nlvr --corpus s3://b/*.tar", "run nlvr --store HERE/runs --corpus s3://b/*.tar"),
        (
            "run demo --captioner.model corpus --captions.matcher corpus --captions.clip openai/clip",
            "run demo --store HERE/runs --captioner.model HERE/corpus --captions.matcher HERE/corpus "
            "--captions.clip openai/clip",
        ),
        ("ingest --corpus corpus", "ingest --store HERE/runs --corpus HERE/corpus"),
        ("retry runs/mix/0123 --only oom", "retry HERE/runs/mix/0123 --only oom"),
        (
            "recaption --corpus corpus --captioner Salesforce/blip --out out --styles short",
            "recaption --corpus HERE/corpus --captioner Salesforce/blip --out HERE/out --styles short",
        ),
        (
            "mix --images runs/mix/0123 --captions ./runs/x --store ../s",
            "mix --images HERE/runs/mix/0123 --captions HERE/runs/x --store UP/s",
        ),
    ],
)
def test_paths_are_made_absolute_and_nothing_else_is(here, line, wanted):
    line = line.split()
    for name, value in {"HERE": here, "HOME": os.path.expanduser("~"), "UP": os.path.dirname(here)}.items():
        wanted = wanted.replace(name, value)
    made = placed(line, command._understand(line), None)
    assert made == wanted.split()
    assert placed(made, command._understand(made), None) == made
    command._understand(with_options(made, ["--cluster.address", "auto"]))


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("run demo", "store"),
        ("run demo --store /elsewhere", "store"),
        ("run nlvr --corpus corpus/*.tar --store s3://b", "corpus"),
        ("retry runs/mix/0123", "path"),
        ("recaption --corpus s3://b/*.tar --captioner /models/blip --out s3://b/out", "captioner"),
    ],
)
def test_what_another_machine_does_not_see_is_refused(line, named):
    line = line.split()
    with pytest.raises(ValueError, match=f"{named} is .*does not see"):
        placed(line, command._understand(line), ("/mnt/shared",))


def test_shared_folders_are_seen(here):
    line = ["run", "nlvr", "--corpus", "corpus", "--store", "runs"]
    assert placed(line, command._understand(line), (here,))[-1] == f"{here}/runs"
    with pytest.raises(ValueError, match="does not see"):
        placed(line, command._understand(line), (here + "x", here + "/corpus"))


def test_the_trainings_of_a_line(here):
    assert list(batches(command._understand(["run", "demo"])))
    assert not list(batches(command._understand(["ingest", "--corpus", "corpus"])))


SECRETS = {
    "s3://AKIDEXAMPLE:hiddenhidden@bucket/x": "credentials",
    "http://user:hidden@host/v1": "credentials",
    "AKIAIOSFODNN7EXAMPLE": "AWS",
    "--x=hf_hiddenhiddenhiddenhidden": "Hugging Face",
    "sk-hidden0hidden0hidden": "API key",
    "https://b.s3.amazonaws.com/x?X-Amz-Signature=hidden": "signed",
    "prefix/hidden-by-environment": "MY_API_KEY",
}


@pytest.mark.parametrize(("token", "named"), SECRETS.items())
def test_secrets_are_refused_and_not_repeated(monkeypatch, token, named):
    monkeypatch.setenv("MY_API_KEY", "hidden-by-environment")
    with pytest.raises(ValueError, match=named) as refused:
        refuse_secrets(words(["run", "demo", "--corpus", token]))
    assert "hidden" not in str(refused.value)
    assert "AKIA" not in str(refused.value)
    assert "--corpus" in str(refused.value) or "--x" in str(refused.value)


def test_a_secret_within_a_recipes_file_is_refused(capsys):
    command.main(["show", "demo"])
    recipe = json.loads(capsys.readouterr().out)
    recipe["captions"]["matcher"] = "s3://AKIDEXAMPLE:hiddenhidden@bucket/x"
    Path("mine.json").write_text(json.dumps(recipe))
    with pytest.raises(ValueError, match=r"recipe\.captions\.matcher holds credentials"):
        refuse_secrets(strings(command._understand(["run", "mine.json"])))


@pytest.mark.parametrize(
    "arguments",
    [
        "--address A --follow run demo --seed 1",
        "run demo --address A --seed 1 --follow",
        "--follow --address A -- run demo --seed 1",
    ],
)
def test_the_options_of_submit_and_the_line(arguments):
    options, line = submit._split(arguments.split())
    assert (options.address, options.follow) == ("A", True)
    assert line == ["run", "demo", "--seed", "1"]


def test_what_is_no_secret_passes(monkeypatch):
    for name in [name for name in os.environ if "TOKEN" in name or "KEY" in name or "SECRET" in name]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    lines = [
        "run nlvr --corpus s3://bucket/data/{00000..00099}.tar --store s3://bucket/test",
        "recaption --corpus x@y/*.tar --captioner http://localhost:8000/v1 --key-variable OPENAI_API_KEY --out s3://b/o",
        "recaption --corpus s3://b/what?.tar --captioner vllm:Qwen/Qwen2-VL --out s3://b/o --styles short,descriptive",
    ]
    for line in lines:
        refuse_secrets(words(line.split()))


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8, max_size=40), st.text(max_size=5))
def test_no_value_of_a_secret_variable_gets_through(secret, around):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SOME_TOKEN", secret)
        if os.path.exists(secret):
            return
        with pytest.raises(ValueError, match="Word 2") as refused:
            refuse_secrets(words(["run", f"{around.replace('--', '')}x{secret}"]))
        assert f"x{secret}" not in str(refused.value)


def test_what_ray_would_install(monkeypatch, here):
    environment = submit._environment(pip=True)
    packages = environment["pip"]["packages"]
    assert any(line.startswith("torch==") for line in packages)
    assert all("==" in line for line in packages)
    assert not any(line.startswith("ray==") for line in packages)
    assert "pip" not in submit._environment(pip=False)
    monkeypatch.setattr(submit, "ROOT", Path(here))
    with pytest.raises(FileNotFoundError, match="a checkout"):
        submit._environment(pip=True)


def test_all_that_git_tracks_of_the_packages_is_sent():
    """And nothing else: what an installation would hold."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in setup["packages"]["find"]["include"]}
    kinds = {".py"} | {Path(name).suffix for name in setup["package-data"]["*"]}
    tracked = {Path(line) for line in listed.stdout.splitlines()}
    wanted = {path for path in tracked if path.parts[0] in packages and path.suffix in kinds}
    assert wanted <= set(sources())
    assert all(path.parts[0] in packages and path.suffix in kinds for path in sources())
    assert sum((ROOT / path).stat().st_size for path in sources()) < 2**21
