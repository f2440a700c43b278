"""Pictures for prompts, of one's own or of a file, as a recipe draws: each by its own seed, with what it is told."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from infra import storage
from infra.cluster import Cluster
from infra.config import from_dict, to_dict
from infra.data.images import decode
from infra.data.run import run_here
from infra.data.shards import ShardReader
from infra.store import Artifact, Store
from t2i import stages
from t2i.chain import Link, paint
from t2i.clip.embedder import Embedder
from t2i.conditions.codes import CodesConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.prior import DiffusionSampling
from t2i.pixels import to_pixels
from t2i.priors.asking import CAPTION
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import PriorShape, PriorTask, load_prior, load_vocabulary
from t2i.protocol import Space
from t2i.tokenizers.task import load_tokenizer
from t2i.vocabulary import TextVocabulary
from tests import kills
from tests.t2i.clip import tiny
from tests.t2i.house.spot import trained
from workflows import look, samples
from workflows.options import WORK, named_fields, step_options
from workflows.sample import LinkConfig, SampleConfig, as_trained, links_of, sample, with_links

DATA = Path(__file__).parents[1] / "data" / "d3c69f4" / "store"
CLUSTER = Cluster(name="test", actors=(1, 1))
WARM = SamplingConfig(temperature=1.0)
SAID = ["a large red circle", "a small blue cross at the top", "two green squares, élan 漢字", "a cross"]


@pytest.fixture
def root(tmp_path):
    """A store that a recipe made."""
    shutil.copytree(DATA, tmp_path / "runs")
    return str(tmp_path / "runs")


def only(root: str, step: str) -> str:
    (name,) = storage.list_names(storage.join(root, step))
    return storage.join(root, step, name)


def sampling_of(path: str) -> SamplingConfig:
    return from_dict(SampleConfig, Artifact.open(path).manifest["config"]).sampling


def draw(root: str, *more: str) -> tuple[Any, Any, str]:
    return kills.here("sample", "--prior", only(root, "train_prior"), "--store", root, *more, "--json")


def test_without_a_mixture_as_the_recipe_draws(root):
    recipes = Artifact.open(only(root, "sample"))
    code, results, said = draw(root, "--prompts", "a large red circle", "a small blue cross")
    assert code == 0, said
    made = Artifact.open(results["artifact"])
    assert sampling_of(made.path) == sampling_of(recipes.path)
    assert [each.step for each in made.inputs] == ["train_prior", "train_tokenizer"]
    assert f"Drawn as {recipes.path} was: guidance" in said
    assert f"2 pictures: {made.path}/images" in said
    listed = json.loads(Path(made.url("samples.json")).read_text())
    assert [row["prompt"] for row in listed] == ["a large red circle", "a small blue cross"]
    assert all(Path(made.url(row["image"])).exists() for row in listed)
    assert draw(root, "--prompts", "a large red circle", "a small blue cross")[1] == results, "it is found again"


def test_pictures_in_a_folder_of_ones_own(root, tmp_path):
    out = tmp_path / "pictures"
    for prompts in (["a red circle", "a cross"], ["a cross"]):
        code, results, said = draw(root, "--prompts", *prompts, "--out", str(out))
        assert code == 0, said
        assert said.strip().endswith(str(out))
        names = [f"{n:05d}.png" for n in range(len(prompts))]
        assert sorted(each.name for each in out.iterdir()) == [*names, "grid.png", "samples.json"]
        images = Path(results["artifact"]) / "images"
        assert [(out / name).read_bytes() for name in names] == [(images / name).read_bytes() for name in names]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "00000.png").write_bytes(b"mine")
    for folder in (str(tmp_path / "mine"), results["artifact"]):
        code, _, said = draw(root, "--prompts", "two squares", "--out", folder)
        assert (code, "holds other things, such as" in said) == (1, True)
    assert (tmp_path / "mine" / "00000.png").read_bytes() == b"mine"


def test_a_tokenizer_that_is_not_beside_its_prior(root):
    shutil.rmtree(only(root, "train_tokenizer"))
    code, _, said = draw(root, "--prompts", "a circle")
    assert code == 1
    assert said.rstrip().endswith("is not beside it: give --tokenizer FOLDER.")


def test_what_is_told_by_name_on_the_line(root):
    line = ["--prior", "p", "--prompts", "a", "--told", "class_label=cat", "place=a b"]
    assert step_options(sample, line).config.told == {"class_label": "cat", "place": "a b"}
    assert step_options(sample, [*line[:4], "--told", "class_label", "cat"]).config.told == {"class_label": "cat"}


def test_options_stand_before_the_recipe_and_other_prompts_are_no_recipe(root):
    recipes = sampling_of(only(root, "sample"))
    _, made, _ = draw(root, "--prompts", "a red circle", "--sampling.top-k", "3", "--sampling.temperature=0.5")
    assert sampling_of(made["artifact"]) == replace(recipes, top_k=3, temperature=0.5)
    _, made, _ = draw(root, "--prompts", "a blue circle")
    assert sampling_of(made["artifact"]) == recipes


def test_without_a_recipes_pictures_the_defaults_count(root):
    shutil.rmtree(storage.join(root, "sample"))
    code, results, said = draw(root, "--prompts", "a red circle")
    assert code == 0
    assert sampling_of(results["artifact"]) == SamplingConfig()
    assert "Drawn as" not in said


def test_nothing_to_draw(root):
    code, _, said = draw(root)
    assert code == 1
    assert "Say what to draw: give prompts, or a mixture" in said


def test_words_that_the_vocabulary_does_not_have(root):
    code, results, said = draw(root, "--prompts", "two large Squares, red!", "a red elephant")
    assert code == 0
    assert results["unknown_words"] == ["two", "squares", "elephant"]
    assert "has no word 'two' nor 'squares' nor 'elephant'" in said
    assert "unknown_words" not in draw(root, "--prompts", "a LARGE red circle.")[1]


def test_what_is_no_word_of_a_vocabulary():
    vocabulary = TextVocabulary.train(["a red circle, at the top-left"] * 3, 1000, 20)
    assert vocabulary.unknown(["Red   circle; at top", "a... (red)", ""]) == []
    assert vocabulary.unknown(["redder circles", "red élan 7", "redder"]) == ["redder", "circles", "élan", "7"]


def models(root):
    return [Artifact.open(str(next(Path(root).glob(f"{step}/*")))) for step in ("train_prior", "train_tokenizer")]


def painted(root, **config):
    """An artifact of pictures, drawn warm."""
    return Store(root, CLUSTER).step(sample, SampleConfig(**{"sampling": WARM, **config}), None, *models(root))


def pixels_of(made):
    return [decode(row["image"]) for row in samples.read_samples(made)]


def written(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_pictures_are_what_the_prior_draws_of_their_seeds(root):
    """As before pictures were a stage: number n is drawn from seed * 2^32 + n."""
    prior, tokenizer = models(root)
    made = painted(root, prompts=tuple(SAID), seed=5)
    model, ask = load_prior(prior.url("model"))
    seeds = [5 * 2**32 + number for number in range(4)]
    values = model.sample(ask({CAPTION: SAID}, seeds), seeds, WARM)
    wanted = to_pixels(load_tokenizer(tokenizer.url("model")).decode(values))
    assert all(map(np.array_equal, pixels_of(made), wanted))
    assert len({picture.tobytes() for picture in wanted}) == 4
    assert all(
        map(
            np.array_equal,
            pixels_of(made),
            [decode(Path(made.url(f"images/{n:05d}.png")).read_bytes()) for n in range(4)],
        )
    )
    assert decode(Path(made.url("grid.png")).read_bytes()).shape == (2 * 18 + 2, 2 * 18 + 2, 3)
    read = ShardReader([made.url("prompts"), made.path], "000000")  # as any stage reads pictures
    assert all(map(np.array_equal, read.pixels(np.arange(4)), wanted))


def test_a_line_has_its_own_seed_count_and_settings(root, tmp_path):
    lines = [
        {"prompt": SAID[0], "seed": 7, "count": 2},
        {"prompt": SAID[1], "settings": {"temperature": 0}},
        {"prompt": SAID[1], "settings": {"guidance": 3.0}, "negative": SAID[0], "id": "x"},
        {"prompt": SAID[1], "settings": {"guidance": 3.0}},
        {"prompt": SAID[0], "seed": 8},
    ]
    made = painted(root, prompts_file=written(tmp_path, *lines))
    found = pixels_of(made)
    assert made.summary["samples"] == len(found) == 6
    assert np.array_equal(found[1], found[5]), "the second picture of seed 7 is that of seed 8"
    assert not np.array_equal(found[0], found[1])
    assert not np.array_equal(found[3], found[4]), "it moves away from the negative prompt"
    for number, settings in ((2, {"temperature": 0.0}), (4, {"guidance": 3.0})):
        alone = {"prompt": SAID[1], "seed": number, "settings": settings}
        assert np.array_equal(found[number], pixels_of(painted(root, prompts_file=written(tmp_path, alone)))[0])
    rows = list(samples.read_samples(made))
    assert [row["seed"] for row in rows] == [7, 8, 2, 3, 4, 8]
    assert [row["prompt_id"] for row in rows] == ["00000", "00000", "00001", "x", "00003", "00004"]


def test_several_pictures_of_each_prompt(root):
    twice = painted(root, prompts=tuple(SAID[:2]), pictures=2)
    assert [row["prompt"] for row in samples.read_samples(twice)] == [SAID[0], SAID[0], SAID[1], SAID[1]]
    once = painted(root, prompts=(SAID[0], SAID[0], SAID[1], SAID[1]))
    assert all(map(np.array_equal, pixels_of(twice), pixels_of(once)))


def test_the_hash_of_a_file_is_in_the_key(root, tmp_path):
    path = written(tmp_path, {"prompt": "a"})
    first = painted(root, prompts_file=path)
    assert painted(root, prompts_file=path).path == first.path
    written(tmp_path, {"prompt": "b"})
    assert painted(root, prompts_file=path).path != first.path
    Path(path).unlink()
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        painted(root, prompts_file=path)


def test_a_file_that_changes_while_it_is_read_is_read_again(root, tmp_path, monkeypatch):
    path = written(tmp_path, {"prompt": "a"})
    reads = iter(["as it was"] * 3 + ["as it is"])  # of the id, the manifest, before and after
    monkeypatch.setattr("workflows.sample.digest_of", lambda url: next(reads))
    with pytest.raises(RuntimeError, match=r"changed while it was read\. Give the same line again"):
        painted(root, prompts_file=path)
    monkeypatch.undo()
    assert painted(root, prompts_file=path).summary["samples"] == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "b", "settings": {"steps": 3}}, "Line 2 of .*SamplingConfig has no field 'steps'"),
        ({"prompt": "b", "settings": {"top_p": 0}}, r"Line 2 of .*top_p must lie in \(0, 1\]"),
        ({"prompt": "b", "settings": [{}, {}]}, "Line 2 of .*settings for 2 links, but there are 1"),
        ({"prompt": "b", "negative": "c"}, "Line 2 of .*give guidance above 1"),
    ],
)
def test_a_line_that_cannot_be_drawn_is_named_and_nothing_is_begun(root, tmp_path, line, said):
    before = storage.list_names(f"{root}/sample")
    with pytest.raises(ValueError, match=said):
        painted(root, prompts_file=written(tmp_path, {"prompt": "a"}, line))
    assert storage.list_names(f"{root}/sample") == before


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"prompts": ("a",), "prompts_file": "b"}, "not both"),
        ({"told": {"a": "b"}}, "goes with prompts"),
        ({"negative": "a"}, "give sampling.guidance above 1"),
        ({"pictures": 0}, "at least 1"),
        ({"prompts": (b"a\xff".decode(errors="surrogateescape"),)}, "not UTF-8"),
    ],
)
def test_configs_that_cannot_be(config, said):
    with pytest.raises(ValueError, match=said):
        SampleConfig(**config)


def failing(monkeypatch, *prompts):
    def fails(links, told, *arguments, **options):
        if {*told[CAPTION]} & {*prompts}:
            raise RuntimeError("it cannot be")
        return paint(links, told, *arguments, **options)

    monkeypatch.setattr(stages, "paint", fails)


def test_a_picture_that_fails_is_a_row_with_its_reason_and_is_tried_again(root, monkeypatch, capsys):
    whole = pixels_of(painted(root, prompts=tuple(SAID), seed=1, batch=4))
    shutil.rmtree(f"{root}/sample")
    failing(monkeypatch, SAID[1])
    made = painted(root, prompts=tuple(SAID), seed=1, batch=4)
    assert (made.summary["samples"], made.summary["failed"], made.summary["reasons"]) == (3, 1, {"error": 1})
    assert "1 of 4 pictures could not be drawn: error" in capsys.readouterr().err
    rows = ShardReader([made.url("prompts"), made.path], "000000", every=True)
    assert rows.reasons[1] == "error: Paint: RuntimeError: it cannot be"
    assert storage.list_names(made.url("images")) == ["00000.png", "00002.png", "00003.png"]
    assert [row["number"] for row in samples.read_samples(made)] == [0, 2, 3]
    assert all(map(np.array_equal, pixels_of(made), [whole[0], *whole[2:]]))
    assert look.verify([made.path])["whole"]
    monkeypatch.undo()
    code, results, said = kills.here("retry", made.path, "--json")
    assert code == 0, said
    again = Artifact.open(f"{made.path}.1")
    assert results["artifact"] == again.path
    assert all(map(np.array_equal, pixels_of(again), whole))
    assert len(storage.list_names(again.url("images"))) == 4
    assert look.verify([again.path])["whole"]


def test_where_nothing_can_be_drawn_the_first_reason_is_said_and_the_line_can_be_given_again(root, monkeypatch):
    failing(monkeypatch, *SAID)
    with pytest.raises(
        ValueError, match=r"None of the 2 pictures could be drawn. The first: error: Paint: .*it cannot be"
    ):
        painted(root, prompts=tuple(SAID[:2]))
    monkeypatch.undo()
    assert painted(root, prompts=tuple(SAID[:2])).summary["samples"] == 2


@pytest.mark.parametrize("shard", ["prompts/shards/000000.parquet", "shards/000000.parquet", "images/00001.png"])
def test_what_is_no_longer_as_it_was_written_is_seen(root, shard, capsys):
    made = painted(root, prompts=tuple(SAID))
    assert look.verify([made.path])["rows_in"] == 4
    path = Path(made.url(shard))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SystemExit):
        look.verify([made.path])
    assert shard.removesuffix(".parquet").rpartition("/")[2] in capsys.readouterr().err


def test_rows_are_proved_against_the_prompts_that_they_are_of(root, capsys):
    made, other = painted(root, prompts=tuple(SAID)), painted(root, prompts=tuple(SAID[:3]))
    for name in ("prompts/shards/000000.parquet", "prompts/ledger.json"):
        shutil.copy(other.url(name), made.url(name))
    made.manifest["files"]["prompts/ledger.json"] = storage.digest(made.url("prompts/ledger.json"))
    storage.write_json(made.url("manifest.json"), made.manifest)
    with pytest.raises(SystemExit):
        look.verify([made.path])
    assert "lacks 0 rows of" in capsys.readouterr().err


def test_a_picture_says_how_it_was_drawn(root):
    """In JSON of ours, and as viewers of generated pictures read it; whatever letters the prompt has."""
    prior, _ = models(root)
    prompt, negative = 'um "Ärger": 漢字 😀\x00,', "grau, Ω"
    sampling = SamplingConfig(guidance=2.5, top_k=9)
    made = painted(root, prompts=(prompt, SAID[0]), negative=negative, seed=2, sampling=sampling)
    texts = Image.open(made.url("images/00000.png")).text
    own = json.loads(texts["rescribe"])
    assert (own["prompt"], own["negative"], own["seed"]) == (prompt, negative, 2 * 2**32)
    (link,) = own["links"]
    assert link["model"] == f"train_prior/{prior.id}"
    assert link["weights_sha256"] == storage.digest(prior.url("model", "model.safetensors"))["sha256"]
    assert from_dict(SamplingConfig, link["sampling"]) == sampling
    first, second, settings = texts["parameters"].split("\n")
    assert first == prompt.replace("\x00", "")
    assert second == f"Negative prompt: {negative}"
    said = dict(part.split(": ") for part in settings.split(", "))
    assert said["CFG scale"] == "2.5"
    assert said["Seed"] == str(2 * 2**32)
    assert said["Size"] == "16x16"
    assert said["Top k"] == "9"
    assert said["Model hash"] == link["weights_sha256"][:10]
    assert Image.open(made.url("images/00001.png")).text["parameters"].startswith(SAID[0] + "\nNegative prompt")


def test_in_bf16_matrices_are_multiplied_in_16_bits(root, monkeypatch):
    seen = []

    def looks(*arguments, **options):
        seen.append(torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        return paint(*arguments, **options)

    monkeypatch.setattr(stages, "paint", looks)
    full, half = (painted(root, prompts=(SAID[0],), precision=precision) for precision in ("fp32", "bf16"))
    assert seen == [False, torch.bfloat16]
    assert full.id != half.id
    assert json.loads(Image.open(half.url("images/00000.png")).text["rescribe"])["precision"] == "bf16"


def test_over_batch_sizes_logits_agree_and_nearly_all_pictures_are_equal(root):
    """Sums come out in another order: of logits on the same codes 1e-4 is allowed, and a code may fall otherwise."""
    model, ask = load_prior(only(root, "train_prior") + "/model")
    said = [f"a {colour} {shape}" for colour in ("red", "blue", "green", "black") for shape in ("circle", "cross") * 8]
    seeds = list(range(len(said)))
    codes = model.sample(ask({CAPTION: said}, seeds), seeds, WARM).flatten(1)
    together = model.logits(model.conditions.asked(ask({CAPTION: said}, seeds)), codes[:, :-1])
    alone = [
        model.logits(model.conditions.asked(ask({CAPTION: [text]}, [seed])), codes[seed : seed + 1, :-1])
        for seed, text in enumerate(said)
    ]
    assert (together - torch.cat(alone)).abs().max() <= 1e-4
    many = painted(root, prompts=tuple(said))
    stage = stages.Paint(links_of(SampleConfig(sampling=WARM), *models(root)))
    run_here([stage], [many.url("prompts")], f"{root}/by_five", batch_size=5)
    one = ShardReader([f"{root}/by_five"], "000000").pixels(np.arange(len(said)))
    share = np.mean([np.array_equal(*pair) for pair in zip(one, pixels_of(many), strict=True)])
    print(f"{share:.1%} of {len(said)} pictures are equal over batch sizes")
    assert share >= 0.95


def test_geneval_reads_what_is_exported(root, tmp_path):
    lines = [
        {"tag": "counting", "include": [{"class": "cow", "count": 2}], "prompt": "a photo of two cows"},
        {"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"},
    ]
    made = painted(root, prompts_file=written(tmp_path, *lines), pictures=3)
    out = tmp_path / "geneval"
    line = ("export", made.path, "--format", "geneval", "--out", str(out), "--json")
    code, results, said = kills.here(*line)
    assert code == 0, said
    assert (results["exported"], results["prompts"]) == (6, 2)
    assert sorted(path.name for path in out.iterdir()) == ["00000", "00001", "manifest.json"]
    found = pixels_of(made)
    for number, metadata in enumerate(lines):
        folder = out / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == metadata
        names = sorted(path.name for path in (folder / "samples").iterdir())
        assert names == ["0000.png", "0001.png", "0002.png"]
        for picture, name in enumerate(names):
            assert np.array_equal(decode((folder / "samples" / name).read_bytes()), found[3 * number + picture])
        grid = decode((folder / "grid.png").read_bytes())
        assert np.array_equal(grid[2:18, 20:36], found[3 * number + 1])
    assert look.verify([str(out)])["whole"]
    assert "done already" in kills.here(*line)[2]
    code, _, said = kills.here(*line, "--only", "all")
    assert code
    assert "give the folder of a sample, and no only" in said
    other = kills.here("export", only(root, "train_prior"), "--format", "geneval", "--out", str(tmp_path / "x"))
    assert "was made by train_prior" in other[2]


def test_pictures_of_before_are_read_and_exported(root, tmp_path):
    old = Artifact.open(only(root, "sample"))
    assert old.manifest["version"] == 2
    rows = list(samples.read_samples(old))
    assert [row["prompt_number"] for row in rows] == [0, 1, 2, 3]
    assert all(json.loads(row["scene"]) for row in rows)
    code, results, said = kills.here(
        "export", old.path, "--format", "geneval", "--out", str(tmp_path / "out"), "--json"
    )
    assert code == 0, said
    assert results["exported"] == 4
    told = json.loads((tmp_path / "out" / "00002" / "metadata.jsonl").read_text())
    assert told == {"prompt": rows[2]["prompt"], "id": "00002", "scene": json.loads(rows[2]["scene"])}


@pytest.fixture
def second(root):
    """A prior of random weights that hears, beside captions, the codes that the first one draws."""
    vocabulary, tokenizer = f"{only(root, 'train_prior')}/vocabulary", models(root)[1]
    told = (
        WordsConfig(vocabulary_size=len(load_vocabulary(vocabulary)), length=24),
        CodesConfig(name="first", column="first_codes", codes=240, places=16, drop=0.0),
    )
    shape = PriorShape(
        model=AutoregressiveConfig(width=16, layers=1, heads=2),
        space=Space((4, 4), codes=240),
        conditions=told,
        given={"first": tokenizer.id},
    )
    task = PriorTask(shape=shape, folder=vocabulary, styles=("short",), optim=None)
    torch.manual_seed(0)
    prior = shape.build(vocabulary)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    out = f"{root}/second/00000000000000aa"  # its step's folder has one in all else here
    Path(out, "model").mkdir(parents=True)
    task.export({"prior": prior}, f"{out}/model")
    manifest = {"step": "train_prior", "id": "00000000000000aa", "config": {}, "inputs": [], "summary": {}, "files": {}}
    storage.write_json(f"{out}/manifest.json", manifest)
    return Artifact.open(out)


def test_a_chain_draws_link_after_link(root, second):
    """The second prior hears the first one's codes, each by its own seed; and both say how they drew."""
    first, tokenizer = models(root)
    decoder = load_tokenizer(tokenizer.url("model"))
    hot, cold = SamplingConfig(temperature=2.0), SamplingConfig(temperature=0.7)
    config = SampleConfig(prompts=tuple(SAID), seed=4, sampling=hot, links=(LinkConfig(sampling=cold),))
    made = Store(root, CLUSTER).step(sample, config, None, first, tokenizer, second, tokenizer)
    links = [
        Link(prior, ask, sampling, decoder, tokenizer.id, ask.given)
        for (prior, ask), sampling in zip(
            (load_prior(one.url("model")) for one in (first, second)), (hot, cold), strict=True
        )
    ]
    assert links[1].given == {"first": tokenizer.id}
    wanted = paint(links, {CAPTION: SAID}, [4 * 2**32 + n for n in range(4)]).pictures
    assert all(map(np.array_equal, pixels_of(made), to_pixels(wanted)))
    texts = json.loads(Image.open(made.url("images/00003.png")).text["rescribe"])
    assert [link["model"] for link in texts["links"]] == [f"train_prior/{one.id}" for one in (first, second)]
    assert [link["sampling"]["temperature"] for link in texts["links"]] == [2.0, 0.7]


def test_links_draw_as_their_chains_recipe_does_else_as_their_families(root, second):
    first, tokenizer = models(root)
    hot, cold = SamplingConfig(temperature=2.0), SamplingConfig(guidance=3.0)
    recipes = Artifact.open(only(root, "sample"))
    config = to_dict(SampleConfig(sampling=hot, links=(LinkConfig(sampling=cold),)))
    inputs = [f"mix/{'0' * 16}", *(f"{each.step}/{each.id}" for each in (first, tokenizer, second, tokenizer))]
    manifest = {**recipes.manifest, "config": config, "inputs": inputs, "started": "2027-01-01T00:00:00Z"}
    storage.write_json(f"{root}/sample/{'1' * 16}/manifest.json", manifest)
    whole = as_trained(SampleConfig(prompts=("a",)), first, ())
    assert whole.samplings == (hot, cold)
    alone = as_trained(SampleConfig(), Artifact(f"{root}/train_prior/{second.id}", second.manifest), ["top_k"])
    assert alone.samplings == (cold,)
    assert with_links(whole, []).samplings == (hot,)
    assert with_links(whole, [second, tokenizer]) == whole
    assert with_links(alone, [second, tokenizer]).samplings == (cold, SamplingConfig())


def test_of_candidates_the_judge_keeps_one(root, tmp_path):
    prior, tokenizer = models(root)
    task = tiny.task()
    module, _ = trained(task, steps=1, batch=4)
    (tmp_path / "clip" / "model").mkdir(parents=True)
    task.export({"clip": module}, str(tmp_path / "clip" / "model"))
    made = painted(root, prompts=tuple(SAID), candidates=3, judge=str(tmp_path / "clip"))
    judge = Embedder(str(tmp_path / "clip" / "model")).judge
    link = Link(
        *load_prior(prior.url("model")), WARM, load_tokenizer(tokenizer.url("model")), candidates=3, judge=judge
    )
    wanted = paint([link], {CAPTION: SAID}, list(range(4))).pictures
    assert all(map(np.array_equal, pixels_of(made), to_pixels(wanted)))
    assert not all(map(np.array_equal, pixels_of(made), pixels_of(painted(root, prompts=tuple(SAID)))))
    with pytest.raises(ValueError, match="Of several candidates a judge keeps one"):
        SampleConfig(candidates=2)
    with pytest.raises(ValueError, match="Of several candidates a judge keeps one"):
        LinkConfig(judge="x")


def test_chains_that_cannot_be(root, second):
    first, tokenizer = models(root)
    step = Store(root, CLUSTER).step
    config = SampleConfig(prompts=("a",), links=(LinkConfig(),))
    with pytest.raises(ValueError, match="has 1 links, but it is said of 2 how they draw"):
        step(sample, config, None, first, tokenizer)
    with pytest.raises(ValueError, match="by turns, but these were made by train_prior, train_tokenizer, train_prior"):
        step(sample, config, None, first, tokenizer, second)
    other = Artifact(f"{root}/train_tokenizer/{'2' * 16}", tokenizer.manifest)
    with pytest.raises(ValueError, match=f"draws for the tokenizer train_tokenizer/{tokenizer.id}, and not for"):
        step(sample, SampleConfig(prompts=("a",)), None, first, other)
    with pytest.raises(ValueError, match="draws as a SamplingConfig says, but its sampling is a DiffusionSampling"):
        step(sample, SampleConfig(prompts=("a",), sampling=DiffusionSampling()), None, first, tokenizer)
    with pytest.raises(ValueError, match=r"None of the 1 .*hears values of .*, but nothing was drawn or brought there"):
        step(sample, SampleConfig(prompts=("a",)), None, second, tokenizer)


def test_more_pictures_than_people_look_through_lie_in_shards_alone(root, monkeypatch):
    monkeypatch.setattr("workflows.sample.FEW", 3)
    made = painted(root, prompts=tuple(SAID))
    assert not storage.exists(made.url("images"))
    assert "samples.json" not in storage.list_names(made.path)
    assert len(pixels_of(made)) == 4


def test_which_inputs_a_step_does_without():
    assert WORK["sample"].input_names == {"mixture": True, "prior": False, "tokenizer": False}
    assert [name for name, without in WORK["evaluate"].input_names.items() if not without] == ["images", "captions"]
    assert named_fields(["--sampling.top-k", "3", "--sampling.guidance=2", "--seed", "1"], "--sampling.") == [
        "top_k",
        "guidance",
    ]
