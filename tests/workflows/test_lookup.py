"""One way to a folder: a verb takes that of an artifact, a step or a store, and acts on it or says what there is."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest

from infra import storage
from infra.store import Store
from tests.workflows import test_export as plain  # its steps need no Ray
from workflows import lookup, verbs
from workflows.__main__ import main
from workflows.lookup import MAKERS, Artifact, ChoiceError, check_name, contents, current, finished, keep_name, one
from workflows.options import OLDER, WORK, further_inputs

here = plain.here
IDS = {name: f"{number:016x}" for number, name in enumerate(["images", "a", "b", "mixed", "grown", "seen"], start=1)}


def put(store, step, name, inputs=(), revision=0, minute=0, ended=True, **config):
    """An artifact without rows; its path."""
    identity = IDS[name] + (f".{revision}" if revision else "")
    path = storage.join(store, step, identity)
    manifest = {"step": step, "id": identity, "version": 1, "config": config, "key": None, "summary": {"failed": 0}}
    manifest |= {"inputs": ["/".join(each.split("/")[-2:]) for each in inputs], "files": {}, "seconds": 1.0}
    manifest["started"] = f"2026-11-30T06:{minute:02d}:00Z"
    storage.write_json(storage.join(path, "manifest.json" if ended else "lease.json"), manifest)
    return path


def line(path):
    return f"rescribe look {path}"


def test_every_input_of_every_step_is_known():
    named = {name for work in WORK.values() for name in [*work.input_names, *further_inputs(work)]}
    assert named == set(MAKERS)
    assert {step for makers in MAKERS.values() for step in makers} | {"measure", "rebuild", "evaluate"} == {
        *WORK,
        *OLDER,
    }


def test_a_store_a_steps_folder_and_an_artifact(place):
    store = storage.join(place, "captions")
    images = put(store, "ingest", "images")
    captions = put(store, "recaption", "a", [images], minute=1)
    for given in (store, store + "/", storage.join(store, "recaption"), captions, captions + "/"):
        assert one(given, MAKERS["captions"], line).path == captions
    assert contents(store) == {"ingest": [images], "recaption": [captions]}
    assert [artifact.path for artifact in finished(store)] == [images, captions]


def test_paths_are_told_as_they_were_given(tmp_path, monkeypatch):
    images = put(str(tmp_path / "runs"), "ingest", "images")
    for minute, name in enumerate("ab"):
        put(str(tmp_path / "runs"), "recaption", name, [images], minute=minute, batch=minute)
    for folder, given, told in (("", "runs", "runs/"), ("runs", ".", "./"), ("", "runs/recaption/", "runs/")):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(ChoiceError) as choice:
            one(given, MAKERS["captions"], line)
        assert f"rescribe look {told}recaption/{IDS['a']} " in str(choice.value)


def test_of_several_each_is_told_with_what_is_its_own(tmp_path):
    store = str(tmp_path)
    images, grown = put(store, "ingest", "images"), put(store, "ingest", "grown", corpus="more")
    put(store, "recaption", "a", [images], minute=1, batch=64, detect={"words": 3}, seed=7)
    put(store, "recaption", "b", [grown], minute=2, batch=128, detect={"words": 4}, seed=7)
    with pytest.raises(ChoiceError) as choice:
        one(store, MAKERS["captions"], line)
    head, first, second = str(choice.value).split("\n")
    assert "2 artifacts" in head
    own = f"2026-11-30T06:01:00Z, batch 64, detect.words 3, of ingest/{IDS['images']}"
    assert first.strip() == f"{line(store)}/recaption/{IDS['a']}    # {own}"
    assert "batch 128, detect.words 4" in second
    assert "seed" not in second
    with pytest.raises(ChoiceError, match=f"ingest/{IDS['grown']}"):
        one(store, MAKERS["images"], line)


def test_what_was_made_anew_does_not_count(tmp_path):
    store = str(tmp_path)
    images = put(store, "ingest", "images")
    put(store, "recaption", "a", [images], minute=1, batch=64)
    again = put(store, "recaption", "a", [images], revision=1, minute=1, batch=64)
    put(store, "recaption", "a", [images], revision=2, minute=3, batch=64, ended=False)
    assert one(store, MAKERS["captions"], line).path == again
    for revision in range(3, 12):  # 10 comes after 9, though not by its letters
        again = put(store, "recaption", "a", [images], revision=revision, minute=4, batch=64)
    assert one(store, MAKERS["captions"], line).path == again
    # The index was retried, and captioned again: another id, but the same captions made anew.
    renewed = put(store, "ingest", "images", revision=1, minute=5)
    assert one(store, MAKERS["images"], line).path == renewed
    last = put(store, "recaption", "b", [renewed], minute=6, batch=64)
    assert one(store, MAKERS["captions"], line).path == last
    assert len(finished(store, ("recaption",))) == 12  # verify proves all of them
    put(store, "recaption", "grown", [renewed], minute=7, batch=32)  # another config is another thing
    assert len(current(store, ("recaption",))) == 2


@pytest.fixture
def named(tmp_path, monkeypatch):
    """Captions twice, a mixture of the first, and a run `first` that found these."""
    monkeypatch.chdir(tmp_path)
    images = put("runs", "ingest", "images", corpus="photos/*.tar")
    first = put("runs", "recaption", "a", [images], minute=1, batch=1)
    last = put("runs", "recaption", "b", [images], minute=3, batch=2)
    mixture = put("runs", "mix", "mixed", [images, first], minute=2)
    keep_name("runs", "first", [Artifact.open(os.path.abspath(path)) for path in (images, first, mixture)])
    return images, first, last, mixture


@pytest.mark.parametrize("given", ["first", "runs/first", "runs/recaption/first", "runs/first/"])
def test_a_name_stands_for_what_its_run_found(named, given):
    _, first, _, _ = named
    assert one(given, MAKERS["captions"], line).path == os.path.abspath(first)


@pytest.mark.parametrize("given", ["latest", "runs/latest", "runs/recaption/latest"])
def test_latest_is_what_was_begun_last(named, given):
    images, _, last, mixture = named
    assert one(given, MAKERS["captions"], line).path == os.path.abspath(last)
    if "recaption" not in given:
        assert one(given, MAKERS["mixture"], line).path == os.path.abspath(mixture)
        assert one(given, MAKERS["images"], line).path == os.path.abspath(images)
    with pytest.raises(FileNotFoundError, match="no finished artifact of encode"):
        one(given, ("encode",), line)


def test_a_run_may_have_found_what_lies_elsewhere_and_its_store_be_moved(named, tmp_path):
    images, first, _, _ = named
    other = put(str(tmp_path / "other"), "recaption", "grown", [images])
    keep_name("runs", "second", [Artifact.open(os.path.abspath(images)), Artifact.open(other)])
    os.rename("runs", "moved")
    assert one("moved/second", MAKERS["captions"], line).path == other
    assert one("moved/first", MAKERS["captions"], line).path == os.path.abspath(first.replace("runs", "moved"))


def test_a_path_that_is_there_comes_before_a_name(named):
    put("latest", "recaption", "grown", minute=9)
    assert "/latest/recaption/" in one("latest", MAKERS["captions"], line).path
    with pytest.raises(FileNotFoundError, match="no finished artifact at secnd"):
        one("secnd", (), line)
    with pytest.raises(ChoiceError, match="rescribe look runs/mix/"):
        one("first", (), line)


@pytest.mark.parametrize("name", ["latest", "names", "mix", "a/b", "", ".x", "-x", "a b"])
def test_what_a_run_cannot_be_called(name):
    with pytest.raises(ValueError, match="cannot be called"):
        check_name(name)


def test_list_tells_what_each_is(named, capsys):
    trained = put("runs", "train_captioner", "a", [named[0]], model="Salesforce/blip")
    put("runs", "recaption", "grown", [named[0], trained], minute=5)
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].endswith(f"runs/ingest/{IDS['images']}  photos/*.tar, run first")
    assert lines[-1].endswith(f"{IDS['grown']}  photos/*.tar, captions by Salesforce/blip")
    served = {"class": "EndpointConfig", "base_url": "http://localhost:8000/v1", "model": "a model that is served"}
    asked = put("runs", "train_captioner", "b", [named[0]], minute=6, model=served)
    put("runs", "recaption", "b", [named[0], asked], minute=7)
    main(["list"])
    assert capsys.readouterr().out.splitlines()[-1].endswith("captions by a model that is served")
    told = run(capsys, "list", "runs/recaption")[1]["told"]  # what is above lies in other folders
    assert [each["captioner"] for each in told[-2:]] == ["Salesforce/blip", "a model that is served"]
    assert told[0] | {"names": ["first"], "corpus": "photos/*.tar"} == told[0]


def test_a_step_is_given_and_makes_names(store, capsys):
    words = ["--images", "latest", "--captions", "captions/recaption/latest", "--store", "captions"]
    words += ["--weights.alt", "0.5", "--weights.short", "0.5", "--weights.descriptive", "0", "--name", "mine"]
    told = verbs.run_step(plain.mix, words)
    assert capsys.readouterr().err.splitlines()[-1] == told["artifact"]
    assert run(capsys, "show", "captions/mine")[1]["id"] == told["artifact"].split("/")[-1]
    assert {tuple(each["names"]) for each in run(capsys, "list", "captions")[1]["told"]} == {(), ("mine",)}


def test_inputs_that_are_not_there_do_not_matter(tmp_path):
    for revision in range(2):
        captions = put(
            str(tmp_path), "recaption", "a", ["elsewhere/ingest/" + IDS["images"]], revision, minute=revision
        )
    assert one(str(tmp_path), MAKERS["captions"], line).path == captions


@pytest.mark.parametrize(
    ("made", "steps", "wanted"),
    [
        ((), ("mix",), "There is no finished artifact at"),
        (("ingest",), ("mix",), "holds no finished artifact of mix, but 1 of ingest."),
        (("ingest", "recaption cut"), ("recaption", "mix"), f"recaption/{IDS['a']} was begun"),
        (("recaption cut",), (), "holds no finished artifact. "),
    ],
)
def test_what_is_not_there_is_said_with_what_is(tmp_path, made, steps, wanted):
    for step in made:
        put(str(tmp_path), step.split()[0], "a", ended="cut" not in step)
    with pytest.raises(FileNotFoundError, match=re.escape(wanted)):
        one(str(tmp_path), steps, line)


def test_an_artifact_of_another_step_is_named(tmp_path):
    images = put(str(tmp_path), "ingest", "images")
    with pytest.raises(ValueError, match="was made by ingest; give what recaption or caption_with made"):
        one(images, MAKERS["captions"], line)


def test_a_folder_that_is_no_store_is_not_mistaken_for_one(tmp_path):
    (tmp_path / "ingest").mkdir()
    (tmp_path / "ingest" / "manifest.json").write_text("{}")
    (tmp_path / ("0" * 15)).mkdir()
    with pytest.raises(FileNotFoundError, match="no finished artifact at"):
        one(str(tmp_path), (), line)


def test_verdicts_are_one_of_each_step(tmp_path):
    store = str(tmp_path)
    images = put(store, "ingest", "images")
    seen = put(store, "examine", "seen", [images])
    found = lookup.inputs_of("verdicts", store, line)
    assert [artifact.path for artifact in found] == [seen]
    twice = put(store, "deduplicate", "a", [images], distance=4)
    assert [artifact.path for artifact in lookup.inputs_of("verdicts", store, line)] == [twice, seen]
    put(store, "deduplicate", "b", [images], distance=8)
    with pytest.raises(ChoiceError, match="distance 8"):
        lookup.inputs_of("verdicts", store, line)


def test_lines_are_said_again_with_the_path_in_its_place():
    words = ["--images", "set", "--captions", "set", "--title", "my set"]
    assert lookup.rephrased("mix", words, "set", "--captions")("set/recaption/1") == (
        "rescribe mix --images set --captions set/recaption/1 --title 'my set'"
    )
    assert lookup.rephrased("mix", ["--images=set"], "set", "--images")("x y") == "rescribe mix '--images=x y'"
    assert lookup.rephrased("gallery", ["set", "--out", "set"], "set")("a") == "rescribe gallery a --out set"
    several = ["--verdicts", "one", "set", "--seed", "1"]
    assert lookup.rephrased("mix", several, "set", "--verdicts")("a") == "rescribe mix --verdicts one a --seed 1"


@pytest.fixture
def store(tmp_path, monkeypatch):
    """An ingest, captions and a mixture of them, in the store `captions` of the present folder."""
    monkeypatch.chdir(tmp_path)
    corpus = plain.write_corpus(str(tmp_path))
    made = plain.artifacts(str(tmp_path), corpus)
    os.rename("store", "captions")
    return [path.replace("/store/", "/captions/") for path in (artifact.path for artifact in made)]


def run(capsys, *words):
    """The exit code, the last line's object, and what was said."""
    code = 0
    try:
        main([*words, "--json"])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, json.loads(out.strip().splitlines()[-1]) if out.strip() else None, err


def test_gallery_shows_the_mixture_or_the_captions(store, capsys):
    code, _, err = run(capsys, "gallery", "captions")
    assert (code, "gallery.html" in err) == (0, True)
    assert "mix" in (page := Path("gallery.html").read_text())
    assert "rejected" in page
    code, told, _ = run(capsys, "gallery", "captions/recaption", "--out", "some.html")
    assert (code, os.path.basename(told["page"])) == (0, "some.html")


def test_export_needs_nothing_but_the_store(store, capsys, here):
    _, captions, mixture = store
    for given, wanted in (("captions", 3), ("captions/recaption", 2), (mixture, 3), (captions, 2)):
        out = f"set-{wanted}-{len(given)}"
        code, _, _ = run(capsys, "export", given, "--out", out)
        assert code == 0
        manifest = storage.read_json(f"{out}/manifest.json")
        assert manifest["inputs"] == ["/".join(path.split("/")[-2:]) for path in store[:wanted]]
        assert manifest["config"]["only"] == ("kept" if wanted == 3 else "accepted")
    code, told, _ = run(capsys, "export", "--images", "captions", "--captions", "captions", "--out", "old")
    assert (code, told["exported"]) == (0, 4)
    code, told, _ = run(capsys, "export", "--mixture", "captions", "--out", "mixed")
    assert code == 0
    assert storage.read_json("mixed/manifest.json")["inputs"] == manifest["inputs"] + [f"mix/{mixture.split('/')[-1]}"]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--out", "x"], "Say what to export"),
        (["captions/recaption", "--only", "kept", "--out", "x"], "give --only accepted"),
        (["captions/ingest", "--out", "x"], "holds no finished artifact of mix or recaption or caption_with"),
    ],
)
def test_export_says_what_it_lacks(store, capsys, here, words, wanted):
    code, _, err = run(capsys, "export", *words)
    assert code == 1
    assert wanted in err
    assert not os.path.exists("x")
    with pytest.raises(ValueError, match="Give captions alone"):
        plain.ExportOptions(path="captions", captions="captions", out="x")


def test_every_line_that_is_told_can_be_given(store, capsys, here):
    """Two captionings of one corpus, one of them mixed: three verbs ask, and each of their lines works."""
    made = Store("captions", plain.CLUSTER)
    images = made.step(plain.ingest, plain.IngestConfig(corpus=os.path.abspath("corpus")))
    other = made.step(plain.recaption, {"fails": ["two"], "flagged": []}, images)
    for words in (["gallery", "captions", "--out", "a.html"], ["export", "captions", "--out", "set"]):
        code, _, err = run(capsys, *words)
        assert code == 1
        lines = re.findall(r"^  rescribe (.*?)    # ", err, re.MULTILINE)
        assert {text.split()[1].split("/")[1] for text in lines} == {"mix", "recaption"}
        for number, text in enumerate(lines):
            code, _, err = run(capsys, *shlex.split(text.replace("set", f"set{number}")))
            assert code == 0, err
    words = ["mix", "--images", "captions", "--captions", "captions", "--store", "captions"]
    with pytest.raises(ChoiceError, match=f"--captions captions/recaption/{other.id} .*fails"):
        verbs.run_step(plain.mix, words[1:])


def test_steps_take_stores(store):
    images, captions, _ = store
    words = ["--images", "captions", "--captions", "captions", "--store", "captions", "--max-words", "9"]
    words += ["--weights.alt", "0.5", "--weights.short", "0.5", "--weights.descriptive", "0"]
    made = verbs.run_step(plain.mix, words)
    manifest = storage.read_json(made["artifact"] + "/manifest.json")
    assert manifest["inputs"] == ["/".join(path.split("/")[-2:]) for path in (images, captions)]


def test_verify_proves_all_that_is_there(store, capsys):
    code, told, err = run(capsys, "verify", "captions")
    assert (code, told["whole"], len(told["artifacts"])) == (0, True, 3)
    assert err.count(" is whole") == len(err.strip().splitlines()) == 3
    code, told, _ = run(capsys, "verify", *store[:2])  # as a shell gives captions/*/*
    assert (code, len(told["artifacts"])) == (0, 2)
    code, told, _ = run(capsys, "verify", "captions/mix")
    assert (code, told["artifact"]) == (0, store[2])
    shard = storage.join(store[2], "shards", "000000.parquet")
    with open(shard, "r+b") as file:
        file.truncate(os.path.getsize(shard) - 1)
    code, told, err = run(capsys, "verify", "captions")
    assert (code, told["whole"]) == (1, False)
    assert [each["whole"] for each in told["artifacts"]] == [True, True, False]
    assert err.count(" is whole") == 2


def test_list_and_show(store, capsys):
    _, captions, mixture = store
    assert run(capsys, "list", "captions")[1]["artifacts"] == store
    assert run(capsys, "list", "--store", "captions")[1]["artifacts"] == store
    assert run(capsys, "list", "captions/recaption")[1]["artifacts"] == [captions]
    assert run(capsys, "show", "captions/mix")[1]["id"] == mixture.split("/")[-1]
    code, _, err = run(capsys, "show", "captions")
    assert code == 1
    assert [text.split()[2] for text in err.splitlines()[1:]] == [
        f"captions/{'/'.join(p.split('/')[-2:])}" for p in store
    ]


def test_retry_finds_where_rows_failed(store, capsys, monkeypatch):
    assert "No row of any artifact in captions failed." in run(capsys, "retry", "captions")[2]
    made = Store("captions", plain.CLUSTER)
    images = made.step(plain.ingest, plain.IngestConfig(corpus=os.path.abspath("corpus")))
    failed = made.step(plain.recaption, {"fails": ["two"], "flagged": []}, images)
    made.step(plain.mix, plain.MixConfig(weights={"alt": 0.5, "short": 0.5}), images, failed)  # its row failed before
    seen = []
    monkeypatch.setattr(verbs.Store, "retry", lambda self, artifact, *_: seen.append(artifact.path) or artifact)
    monkeypatch.setattr(verbs, "from_dict", lambda kind, config: config)
    assert run(capsys, "retry", "captions")[0] == 0
    assert seen == [failed.path]


def test_a_captioner_is_found_in_the_store_that_it_was_trained_in(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(verbs, "direct", lambda options: asked.append(options.captioner) or 1 / 0)
    trained = put(str(tmp_path / "runs"), "train_captioner", "a")
    words = ["--corpus", "x", "--out", "y", "--captioner"]
    for name in (str(tmp_path / "runs"), trained, "Salesforce/blip", "vllm:x", "http://localhost:1/v1", "s"):
        with pytest.raises(ZeroDivisionError):
            verbs.recaption_corpus([*words, name])
    assert asked == [trained, trained, "Salesforce/blip", "vllm:x", "http://localhost:1/v1", "s"]
    put(str(tmp_path / "runs"), "train_captioner", "b", seed=1)
    with pytest.raises(ChoiceError, match=f"--captioner {trained}  .*\n.*seed 1"):
        verbs.recaption_corpus([*words, str(tmp_path / "runs")])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("latset", "Did you mean 'latest'?"),
        ("onw", "Did you mean 'own'?"),
        ("train_prio", "Did you mean 'train_prior'?"),
        ("train_prior/lates", "Did you mean 'latest'?"),
        ("train_prior/owm", "Did you mean 'own'?"),
        ("zzz", "There are: own, latest, train_prior."),
    ],
)
def test_a_name_that_is_mistyped(place, given, told):
    store = storage.join(place, "runs")
    keep_name(store, "own", [Artifact.open(put(store, "train_prior", "a"))])
    with pytest.raises(FileNotFoundError) as said:
        one(storage.join(store, given), MAKERS["prior"], line)
    folder, _, word = storage.join(store, given).rpartition("/")
    assert str(said.value) == f"Nothing in {folder} is called '{word}'. {told}"
