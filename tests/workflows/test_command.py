"""The command speaks to people: sentences, exit codes, and one JSON object where it is asked for."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager as Nvidia

from infra import device, storage
from infra.cluster import CLUSTERS, laptop
from workflows import options, parse
from workflows.__main__ import main
from workflows.options import WORK, recipe_options, step_options
from workflows.recipes import RECIPES, demo
from workflows.text_to_image import STEPS
from workflows.verbs import recipe_of

WHOLE = "'photos/*.png'"


def run(capsys, *arguments):
    code = 0
    try:
        main(list(arguments))
    except SystemExit as exit_:
        code = exit_.code
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (("rum", "demo"), "Did you mean 'run'?"),
        (("run", "dmeo"), "Did you mean 'demo'?"),
        (("run",), "Say which recipe"),
        (("run", "nlvr"), "--corpus"),
        (("plan", "demo", "--mix.min-words", "0"), "words"),
        (("plan", "nlvr", "--corpus", "/no/such/*.tar"), "matches no file"),
        (("plan", "demo", "--cluster", "lapptop"), "Did you mean 'laptop'?"),
        (("show", "/no/such/folder"), "no finished artifact"),
        (("show",), "Say what to show"),
        (("plan", "no/such.json"), "does not exist"),
        (("mix", "--images", "/no/images", "--captions", "/no/captions"), "no finished artifact"),
    ],
)
def test_errors_are_sentences(capsys, tmp_path, monkeypatch, arguments, wanted):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code != 0
    assert wanted in err
    assert "Traceback" not in err
    assert len(err) < 700
    assert out == ""


@pytest.mark.parametrize("line", [("run", "own"), ("plan", "own"), ("recaption", "--out", "o"), ("ingest",)])
def test_a_pattern_that_the_shell_spelled_out(capsys, line):
    code, _, err = run(capsys, *line, "--corpus", *(f"photos/{n}.png" for n in range(500)), "--captioner", "x")
    assert code == 1
    assert (
        err
        == f"rescribe: --corpus has 500 values, as when the shell spells out a pattern. Quote it: --corpus {WHOLE}\n"
    )


@pytest.mark.parametrize("said", [["--corpus", "x/*.tar"], ["--corpus=x/*.tar"], ["--corpus.corpus", "x/*.tar"]])
def test_any_recipe_takes_another_corpus(tmp_path, said):
    storage.write_json(str(tmp_path / "mine.json"), recipe_of(["demo"]))
    for recipe in ("demo", str(tmp_path / "mine.json")):
        assert recipe_options([recipe, *said], "plan").recipe.corpus.corpus == "x/*.tar"


def test_an_export_is_no_file(tmp_path, capsys):
    (tmp_path / "afile").write_text("mine")
    code, _, err = run(capsys, "export", "told", "--out", str(tmp_path / "afile"))
    assert (code, err.strip().endswith("is a file. Give a folder.")) == (1, True)


def test_an_unknown_option_is_named(capsys):
    code, out, err = run(capsys, "plan", "demo", "--mix.min-wrds", "4")
    assert (code, out) == (1, "")
    assert "There is no option --mix.min-wrds. Did you mean --mix.min-words" in err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("run demo --tokenizer.train.steps sixty", '--tokenizer.train.steps: expected a whole number, found "sixty"'),
        ("plan demo --tokenizer.train.steps=1e3", '--tokenizer.train.steps: expected a whole number, found "1e3"'),
        ("plan demo --tokenizer.train.steps", "--tokenizer.train.steps: expected a whole number, found nothing"),
        ("plan demo --tokenizer.train.steps 1 2", "--tokenizer.train.steps: expected one value, found 2: 1 2"),
        ("plan demo --prior.optim.lr fast", '--prior.optim.lr: expected a number, found "fast"'),
        ("plan demo --captions.precision fp17", '--captions.precision: expected one of "fp32", "bf16", found "fp17"'),
        ("plan demo --cluster.workers 1", "--cluster.workers: expected 2 values, found 1"),
        ("plan demo --cluster.workers 1 two", '--cluster.workers: expected a whole number, found "two"'),
        ("plan demo --mix.weights alt", "--mix.weights: expected names with numbers, such as short=0.9 alt=0.1, found"),
        ("verify", "Say what to verify"),
        ("plan demo --seed abc", '--seed: expected a whole number, found "abc"'),
        ("plan demo --sed 1", "There is no option --sed. Did you mean --seed, "),
        ("plan demo sixty", "'sixty' belongs to no option."),
        ("plan demo --sample.count 0", "sample: count, batch and pictures must be at least 1"),
        ("export x --out y --with-images", "A webdataset has the images in any case"),
        ("export --format tar --out x", '--format: expected one of "webdataset", "parquet", "folder", "geneval"'),
        ("retry --onli oom x", "There is no option --onli. Did you mean --only?"),
        ("gallery --count many x", '--count: expected a whole number, found "many"'),
        (
            "recaption --corpus a --captioner b --out c --requests-per-minute x",
            '--requests-per-minute: expected a number or None, found "x"',
        ),
    ],
)
def test_a_wrong_value_is_said_as_in_a_file(capsys, line, wanted):
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (1, "")
    assert err.startswith(f"rescribe: {wanted}")
    assert err.count("\n") == 1


@pytest.mark.parametrize("line", [*RECIPES, *WORK, "retry", "export", "recaption --corpus"])
def test_every_option_is_known_to_be_one(capsys, monkeypatch, line):
    known = set[str]()

    def watched(kind, arguments, prog, default=None, more=()):
        known.update(flag for flag, _ in parse._options(kind, default))
        return parse.parse(kind, arguments, prog, default, more)

    monkeypatch.setattr(options, "parse", watched)
    makers = {"retry": options.retry_options, "export": options.export_options}
    makers |= {"recaption --corpus": options.direct_options}
    makers |= {name: partial(step_options, work) for name, work in WORK.items()}
    makers |= {name: lambda rest: recipe_options([line, *rest], "plan") for name in RECIPES}
    with pytest.raises(SystemExit):
        makers[line](["--help"])
    listed = re.findall(r"(?<![\w-])(--[a-z][\w.-]*)", re.sub(r"│ |╭.*|╰.*", "", capsys.readouterr().out))
    assert len(known) > 5
    assert {flag for flag in listed if flag not in known and parse._positive(flag) not in known} <= {
        "--help",
        "--conditions.maps",  # these two are spoken of
        "--sampling",
    }


def test_the_likest_options_come_first(capsys):
    _, _, err = run(capsys, "plan", "demo", "--step", "60")
    named = err.partition("Did you mean ")[2].rstrip("?\n").replace(" or ", ", ").split(", ")
    assert 1 < len(named) <= 5
    assert all(name.endswith(".steps") for name in named), "and none of warmup-steps"
    _, _, err = run(capsys, "plan", "demo", "--tokeniser.train.steps", "60")
    assert "Did you mean --tokenizer.train.steps" in err


def test_a_recipe_that_was_shown_without_a_corpus_says_so(capsys, tmp_path):
    _, out, _ = run(capsys, "show", "own")
    (tmp_path / "own.json").write_text(out)
    path = str(tmp_path / "own.json")
    for verb in ("run", "plan"):
        code, out, err = run(capsys, verb, path, "--store", str(tmp_path / "store"))
        assert (code, out) == (1, "")
        assert f"does not say corpus: it has <corpus> there. Give it, as in: rescribe {verb} {path} --corpus" in err
    assert not (tmp_path / "store").exists()
    assert run(capsys, "show", path)[0] == 0
    assert recipe_options([path, "--corpus", "mine"], "run").recipe.corpus.corpus == "mine"


def test_the_plan_of_an_empty_store(capsys, tmp_path):
    code, out, _ = run(capsys, "plan", "demo", "--store", str(tmp_path), "--json")
    lines = out.strip().splitlines()
    steps = json.loads(lines[-1])["steps"]
    assert code == 0
    assert [step["step"] for step in steps] == [work.name for work in STEPS]
    assert {step["reason"] for step in steps} == {"first time"}


def test_a_shown_recipe_can_be_run(capsys, tmp_path):
    code, out, _ = run(capsys, "show", "debug")
    assert code == 0
    (tmp_path / "mine.json").write_text(out)
    code, out, _ = run(capsys, "plan", str(tmp_path / "mine.json"), "--store", str(tmp_path / "store"))
    assert code == 0
    assert out.count("first time") == len(STEPS)


def test_overrides_reach_the_step_and_what_follows_only(capsys, tmp_path):
    def ids(*more):
        _, out, _ = run(capsys, "plan", "demo", "--store", str(tmp_path), "--json", *more)
        return {step["step"]: step["id"] for step in json.loads(out.strip().splitlines()[-1])["steps"]}

    before, after = ids(), ids("--mix.min-words", "2")
    changed = {step for step in before if before[step] != after[step]}
    assert changed == {"mix", "train_prior", "sample", "evaluate"}
    for name in CLUSTERS:
        assert ids("--cluster", name) == before


def test_without_a_cluster_all_gpus_are_used(capsys, tmp_path, monkeypatch):
    def ids(*more):
        code, out, err = run(capsys, "plan", "debug", "--store", str(tmp_path), "--json", *more)
        assert code == 0
        return {step["step"]: step["id"] for step in json.loads(out.strip().splitlines()[-1])["steps"]}, err

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    before, told = ids()
    assert told == ""
    monkeypatch.setattr(device, "has_driver", lambda: True)
    monkeypatch.setattr(Nvidia, "get_current_node_num_accelerators", staticmethod(lambda: 2))
    after, told = ids()
    assert after == before
    assert told.count("2 GPUs") == 1
    assert recipe_options(["debug"], "run").cluster.workers == (2, 2)
    assert step_options(WORK["mix"], ["--images", "i", "--captions", "c"]).cluster.gpus_per_worker == 1
    capsys.readouterr()
    named = recipe_options(["debug", "--cluster", "laptop"], "run").cluster
    elsewhere = recipe_options(["debug", "--cluster.address", "auto"], "run").cluster
    assert (named, elsewhere) == (laptop(), replace(laptop(), address="auto"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("work", WORK.values(), ids=WORK)
def test_no_option_of_a_step_stands_twice(work, capsys):
    with pytest.raises(SystemExit) as ended:
        step_options(work, ["--help"])
    assert ended.value.code == 0
    assert "--store" in capsys.readouterr().out


def test_the_name_of_features_is_theirs():
    parsed = step_options(
        WORK["encode_text"], ["--images", "i", "--captions", "c", "--name", "t5", "--encoder.model", "m"]
    )
    assert parsed.config.name == "t5"


def test_help_names_everything(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for name in ("run", "plan", "list", "show", *RECIPES, *(work.name for work in STEPS)):
        assert name in out


def test_an_empty_store_is_said(capsys, tmp_path):
    code, out, err = run(capsys, "list", "--store", str(tmp_path / "none"))
    assert (code, out) == (1, "")
    assert "There is no store" in err
    code, out, err = run(capsys, "list", str(tmp_path))
    assert (code, out) == (1, "")
    assert "There is nothing finished in" in err


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("ingest --corpus folder", "folder holds no file"),
        ("recaption --corpus folder --captioner http://127.0.0.1:1/v1 --model m --out out", "folder holds no file"),
        (
            "recaption --corpus pictures --captioner http://127.0.0.1:1/v1 --model m --out file",
            "rescribe: file is a file.",
        ),
        ("run debug --store file", "rescribe: file is a file. Give a folder."),
        ("recaption --corpus pictures --captioner http://127.0.0.1:1/v1 --model m --out out", "Nobody answers at http"),
        ("recaption --corpus pictures --captioner http://127.0.0.1:1/v1 --out out", "with: --model NAME"),
        ("recaption --corpus pictures --captioner localhost:1/v1 --out out", "as http://localhost:1/v1."),
        (
            "recaption --corpus pictures --captioner http://127.0.0.1:1/v1 --model m --styles long --out out",
            "There is no style 'long'; this captioner knows short, descriptive.",
        ),
        ("list file", "is a file. Give a folder."),
        ("shapes --out file --samples 4 --labelled 0", "file already exists."),
        ("shapes --out /sys/kernel/x --samples 4 --labelled 0", "Access to /sys/kernel/x was denied"),
        ("verify folder", "There is no finished artifact at folder"),
    ],
)
def test_places_that_will_not_do(capsys, tmp_path, monkeypatch, line, wanted):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"none")
    (tmp_path / "file").write_text("")
    code, out, err = run(capsys, *line.split())
    assert (code, out) == (1, "")
    assert wanted in err
    assert "Errno" not in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder", "pictures"]


@pytest.mark.timeout(60)
def test_it_is_a_module_too():
    done = subprocess.run(
        [sys.executable, "-m", "workflows", "run", "dmeo"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Did you mean 'demo'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_field_of_a_text_or_a_config_takes_a_text(tmp_path, capsys):
    """The README says so of a corpus, and of published weights."""
    with pytest.raises(SystemExit):
        main(["ingest", "--corpus", str(tmp_path / "none-{0..3}.tar"), "--image-size", "32", "32"])
    assert "none-" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["ingest", "--image-size", "32", "32"])
    assert "Say which corpus" in capsys.readouterr().err
    name = "Salesforce/blip-image-captioning-base"
    recipe = recipe_options(["demo", "--captioner.model", name, "--captioner.matching.match", "1"], "run").recipe
    assert recipe.captioner.model == name
    assert recipe.captioner.matching.match == 1
    assert recipe_options(["demo"], "run").recipe == demo()


def test_a_recipe_is_shown_before_a_corpus_is_there(capsys):
    code, out, err = run(capsys, "show", "own")
    assert (code, err) == (0, "")
    assert json.loads(out)["corpus"]["corpus"] == "<corpus>"
    assert run(capsys, "settings", "own")[0] == 0
    assert "needs --corpus" in run(capsys, "plan", "own")[2]


def test_every_word_of_a_line_is_told_once(capsys):
    told = [line.split()[0] for line in run(capsys, "--help")[1].splitlines() if line.startswith("  ")]
    assert len({*told}) == len(told)
    assert "recaption" in told


@pytest.mark.parametrize(
    "line",
    [
        ("run", "debug", "--store"),
        ("ingest", "--corpus", "c", "--store"),
        ("recaption", "--corpus", "c", "--captioner", "x", "--out"),
    ],
)
def test_a_file_in_the_place_of_a_store(capsys, tmp_path, line):
    file = tmp_path / "afile"
    file.write_text("")
    assert run(capsys, *line, str(file)) == (1, "", f"rescribe: {file} is a file. Give a folder.\n")


@pytest.mark.parametrize("word", ["./mine.jsn", "mine.jsn", "folder/mine", "mine.jso"])
def test_a_file_that_is_no_recipes_file_is_told_so(capsys, word):
    code, _, told = run(capsys, "run", word)
    assert code == 1
    assert "is no recipe: the file of one ends in .json" in told


def test_show_says_what_it_takes(capsys):
    code, text, _ = run(capsys, "show", "--help")
    assert code == 0
    assert "usage: rescribe show RECIPE" in text


def test_show_looks_for_a_name_in_the_store_that_is_given(capsys, tmp_path):
    code, _, told = run(capsys, "show", "mine", "--store", str(tmp_path))
    assert code == 1
    assert f"{tmp_path}/mine" in told
