"""Features of frozen text encoders: cached is as computed, whatever the null, the styles and the batch."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from infra.config import from_dict, to_dict
from infra.train.draw import uniforms
from infra.train.optim import OptimConfig
from t2i.captions import choose, choose_styles, texts_of
from t2i.conditions.encoders import TextEncoder, TextEncoderConfig
from t2i.conditions.text_features import TextFeaturesConfig, column, null_file, save_null
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig
from t2i.priors.task import PriorShape, PriorTask, load_prior, save_vocabulary
from t2i.protocol import Space
from t2i.stages import EncodeText
from t2i.vocabulary import TextVocabulary
from tests.t2i.conditions import tiny

pytestmark = pytest.mark.family("kind")
KINDS = {
    "clip": ("clip", {}),
    "clip, a vector beside": ("clip", {"pooled": "plain", "layer": 2}),
    "clip, a vector alone": ("clip", {"pooled": "projected", "tokens": False}),
    "clip, masked": ("clip", {"masked": True}),
    "t5": ("t5", {}),
    "t5, without a mask": ("t5", {"masked": False}),
}
ROWS = 6
ALTS = ["a red circle", "the red dot on the left", "a small dot"]
COLUMNS = {
    "caption_alt": ["a red circle", "a blue circle", " ", "the dot", "a dot", None],
    "caption_short": ["circle", None, "a square", "dot", "green dot", "blue square"],
    "weight_alt": [0.6, 1.0, 0.0, 0.5, 0.5, 0.0],
    "weight_short": [0.4, 0.0, 1.0, 0.5, 0.5, 1.0],
    "captions_alt?": [ALTS, None, None, ["the dot", tiny.LONG], None, None],
    "weights_alt?": [[0.2, 0.0, 0.4], None, None, [0.1, 0.4], None, None],
    "codes": [np.arange(4, dtype=np.int32) + row for row in range(ROWS)],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {"clip": tiny.clip, "t5": tiny.t5}
    return {name: make(tmp_path_factory.mktemp(name)) for name, make in made.items()}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def condition(kind, folders):
    family, fields = KINDS[kind]
    encoder = TextEncoderConfig(model=folders[family], precision="fp32", **fields)
    return TextFeaturesConfig(name="told", encoder=encoder, drop=0.3).resolved()


def encoded(condition, texts=2):
    """The columns of a step, by a stage without its actors; what it reads is what a shard's reader gives."""
    stage = EncodeText(condition.encoder, condition.name, ("alt", "short"), 3, texts)
    stage.setup()
    assert set(stage.writes) == set(stage.types)
    return stage({name: COLUMNS[name] for name in stage.reads})


def kept(condition, folder):
    folder.mkdir(exist_ok=True)
    save_null(TextEncoder(condition.encoder).read([""]), folder / null_file(condition.name))
    return str(folder)


def task_of(*conditions, folder="", cached=(), **fields):
    shape = PriorShape(
        model=AutoregressiveConfig(width=16, layers=1, heads=2), space=Space((2, 2), codes=11), conditions=conditions
    )
    return PriorTask(shape=shape, folder=folder, styles=("alt", "short"), optim=OptimConfig(), cached=cached, **fields)


def draw_of(epoch=0, places=slice(None)):
    ids = np.arange(ROWS, dtype=np.uint64)[places]
    return lambda salt: uniforms(7, np.full(len(ids), epoch), ids, salt)


def fed(task, columns=None, epoch=0, places=slice(None)):
    """What a feed does: the task picks of narrow columns, the wide ones are read, and the task collates."""
    draw = draw_of(epoch, places)
    rows = {name: values[places] for name, values in COLUMNS.items() if name in task.reads}
    narrow = {name: values for name, values in rows.items() if name != "codes"}
    for name, picked in task.picks(narrow, draw).items():
        rows[name] = [None if one is None else columns[one][places][row] for row, one in enumerate(picked)]
    arrays = task.collate(rows, draw)
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()} | {
        "weight": torch.ones(len(rows["codes"]))
    }


def learned(task, batch):
    """Losses and gradients of a prior none of whose outputs begin at zero."""
    (update,) = task.updates()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in update.module.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    losses = update.module(batch)
    sum(losses.values()).backward()
    return losses["codes"].detach(), {name: each.grad for name, each in update.module.named_parameters()}


def near(a, b):
    torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-7 * float(b.abs().max()))


def test_cached_trains_as_the_encoder_does(condition, tmp_path):
    columns = encoded(condition)
    cached = task_of(condition, cached=("told",), folder=kept(condition, tmp_path / "kept"))
    through = task_of(condition)
    dropped = 0
    for epoch in range(2):
        batch, computed = fed(cached, columns, epoch), fed(through, None, epoch)
        assert torch.equal(batch["dropped_told"], computed["dropped_told"])
        dropped += int(batch["dropped_told"].sum())
        (loss, gradients), (other, theirs) = learned(cached, batch), learned(through, computed)
        near(loss, other)
        assert gradients.keys() == theirs.keys()
        assert gradients["conditions.each.told.vector.weight" if not condition.encoder.tokens else
                         "conditions.each.told.tokens.weight"].abs().max() > 1e-2  # fmt: skip
        for name in gradients:
            near(gradients[name], theirs[name])
    assert 0 < dropped < 2 * ROWS


def test_a_row_is_told_the_same_whoever_stands_beside_it(condition, tmp_path):
    columns, folder = encoded(condition), kept(condition, tmp_path / "kept")
    for task in (task_of(condition, cached=("told",), folder=folder), task_of(condition, folder=folder)):
        heard = task.shape.build(task.folder).conditions.requires_grad_(False)
        together = heard(fed(task, columns))
        for row in range(ROWS):
            alone = heard(fed(task, columns, places=slice(row, row + 1)))
            if together.vector is not None:
                near(alone.vector[0], together.vector[row])
            if together.tokens is not None:
                seen = slice(None) if together.seen is None else together.seen[row]
                near(alone.tokens[0][slice(None) if alone.seen is None else alone.seen[0]], together.tokens[row][seen])
        assert together.said | {"seen"} == heard.each["told"].says | {"seen"}
        assert (together.seen is None) == ("seen" not in heard.each["told"].says)


@pytest.mark.parametrize("null", ["empty", "zeros"])
def test_the_null(condition, null, tmp_path):
    condition = replace(condition, null=null)
    batch = fed(task_of(condition, cached=("told",)), encoded(condition))
    kept_one = condition.build(8, Space((2, 2), codes=11)).requires_grad_(False)
    kept_one.load(kept(condition, tmp_path / "kept"))
    asked = condition.build(8, Space((2, 2), codes=11)).requires_grad_(False)
    asked.load_state_dict(kept_one.state_dict())
    every = torch.ones(ROWS, dtype=torch.bool)
    told, other = kept_one(batch, every), asked(batch, every)
    read = TextEncoder(condition.encoder).read([""])
    if told.vector is not None:
        assert torch.equal(told.vector, other.vector)
        pooled = read.pooled.float() * (null == "empty")
        near(told.vector, kept_one.vector(pooled).expand(ROWS, -1))
    if told.tokens is not None:
        assert torch.equal(told.tokens, other.tokens)
        tokens = read.tokens.float() * (null == "empty")
        seen = tokens.shape[1]
        near(told.tokens[:, :seen], kept_one.tokens(tokens).expand(ROWS, -1, -1))
        if told.seen is not None:
            assert told.seen.sum(dim=1).tolist() == [seen if null == "empty" else 1] * ROWS


def test_the_encoder_is_no_part_of_the_prior(condition):
    task = task_of(condition)
    (update,) = task.updates()
    update.module(fed(task))
    ours = [name for name in update.module.state_dict() if "told" in name]
    parts = ["tokens"] * condition.encoder.tokens + ["vector"] * (condition.encoder.pooled != "none")
    assert ours == [f"conditions.each.told.{part}.{kind}" for part in parts for kind in ("weight", "bias")]


def test_of_several_alt_texts_the_one_that_is_heard(condition):
    columns, task = encoded(condition), task_of(condition, cached=("told",))
    kinds = [""] * condition.encoder.tokens + ["_pooled"] * (condition.encoder.pooled != "none")
    heard = set()
    for epoch in range(40):
        draw = draw_of(epoch)
        picks = task.picks({name: values for name, values in COLUMNS.items() if name != "codes"}, draw)
        assert set(picks) == {"told" + kind for kind in kinds}
        captions = texts_of(COLUMNS, task._heard(COLUMNS, draw))
        for row, text in enumerate(captions):
            style, _, place = picks["told" + kinds[0]][row].removeprefix("told" + kinds[0] + "_").partition("_")
            expected = COLUMNS["captions_alt?"][row][int(place)] if place else COLUMNS[f"caption_{style}"][row]
            assert text == expected
            assert columns[picks["told" + kinds[0]][row]][row] is not None
            heard.add((row, style, place))
    assert {("alt", ""), ("alt", "2"), ("short", "")} == {each[1:] for each in heard if each[0] == 0}  # not of weight 0
    assert {each[1:] for each in heard if each[0] == 2} == {("short", "")}


def test_what_is_written(condition):
    columns = encoded(condition)
    cut = ["told_cut_alt", "told_cut_short"]
    assert [columns[name] for name in cut] == [[False, False, None, True, False, None], [False, None, *[False] * 4]]
    for name in set(columns) - set(cut):
        assert all(each is None or (each.dtype, each.ndim) == (np.uint16, 1) for each in columns[name])
    base = "told" if condition.encoder.tokens else "told_pooled"
    assert [each is None for each in columns[base + "_alt"]] == [False, False, True, False, False, True]
    assert [each is None for each in columns[base + "_alt_1"]] == [False, True, True, False, True, True]
    assert [each is None for each in columns[base + "_alt_2"]] == [False, *[True] * 5]
    once = encoded(condition, texts=64)
    for name in set(columns) - set(cut):
        for one, other in zip(columns[name], once[name], strict=True):
            if one is not None:
                a, b = (torch.from_numpy(each.copy()).view(torch.bfloat16).float() for each in (one, other))
                near(a, b)


def test_an_exported_prior_hears_prompts(condition, tmp_path):
    folder = kept(condition, tmp_path / "kept")
    task = task_of(condition, cached=("told",), folder=folder)
    (update,) = task.updates()
    torch.manual_seed(0)
    for parameter in update.module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    (tmp_path / "model").mkdir()
    task.export({"prior": update.module}, str(tmp_path / "model"))
    assert json.loads((tmp_path / "model/config.json").read_text())["conditions"][0]["class"] == "TextFeaturesConfig"
    assert set(load_file(tmp_path / "model/null_told.safetensors")) <= {"tokens", "seen", "pooled"}
    prior, ask = load_prior(str(tmp_path / "model"))
    prompts, seeds = ["a red circle", "a green dot on the left"], [1, 2]
    guided = SamplingConfig(guidance=3.0)
    plain = prior.sample(ask({"caption": prompts}, seeds), seeds, guided)
    against = prior.sample(ask({"caption": prompts}, seeds, ["blue square", "to the right"]), seeds, guided)
    empty = prior.sample(ask({"caption": prompts}, seeds, ["", ""]), seeds, guided)
    assert torch.equal(plain, empty)  # the null is the features of no words
    assert not torch.equal(plain, against)
    for row in range(2):
        alone = ask({"caption": prompts[row : row + 1]}, seeds[row : row + 1])
        assert torch.equal(prior.sample(alone, seeds[row : row + 1], guided)[0], plain[row])


def test_two_encoders_and_words_hear_the_same_caption(folders, tmp_path):
    words = TextVocabulary.train([*ALTS, "circle a square dot green blue"] * 3, 64, 8)
    save_vocabulary(words, str(tmp_path / "kept"))
    clip = TextFeaturesConfig(name="clip", encoder=TextEncoderConfig(model=folders["clip"], pooled="plain")).resolved()
    t5 = TextFeaturesConfig(name="t5", encoder=TextEncoderConfig(model=folders["t5"])).resolved()
    task = task_of(
        WordsConfig(vocabulary_size=len(words), length=8), clip, t5, cached=("clip",), folder=str(tmp_path / "kept")
    )
    columns = encoded(replace(clip, encoder=clip.encoder))
    for epoch in range(4):
        batch = fed(task, columns, epoch)
        captions = texts_of(COLUMNS, task._heard(COLUMNS, draw_of(epoch)))
        assert torch.equal(batch["text"], torch.from_numpy(words.encode(captions)))
        read = TextEncoder(clip.encoder).read(captions)
        near(batch["clip"].view(torch.bfloat16).float(), read.tokens.float())
        near(batch["clip_pooled"].view(torch.bfloat16).float(), read.pooled.float())
        assert batch["t5"].dtype == torch.int64
        assert task.shape.build(task.folder)(batch)["codes"] > 0
        shares = {batch[f"dropped_{name}"].float().mean() for name in ("text", "clip", "t5")}
    assert len(shares) > 1


def test_styles_are_those_of_the_captions_that_are_chosen():
    captions = {style: COLUMNS[f"caption_{style}"] for style in ("alt", "short")}
    weights = {style: np.array(COLUMNS[f"weight_{style}"]) for style in ("alt", "short")}
    for epoch in range(20):
        chances = draw_of(epoch)("caption")
        styles = choose_styles(captions, weights, chances)
        assert choose(captions, weights, chances) == [captions[style][row] for row, style in enumerate(styles)]


def test_it_comes_back_from_json(condition):
    shape = task_of(WordsConfig(), condition).shape
    told = to_dict(shape)
    assert "class" not in told["conditions"][0]  # as before there were others
    assert from_dict(PriorShape, told) == shape


def test_what_lacks_is_told(folders):
    with pytest.raises(ValueError, match=r"whose features the condition 'clip' hears"):
        TextFeaturesConfig(name="clip").build(8, Space((2, 2), codes=11))
    with pytest.raises(ValueError, match="not 'caption'"):
        TextFeaturesConfig(name="caption")
    condition = TextFeaturesConfig(name="told", encoder=TextEncoderConfig(model=folders["clip"])).resolved()
    columns = {name: [None] * ROWS for name in encoded(condition)}
    with pytest.raises(ValueError, match="no features 'told' of the caption"):
        fed(task_of(condition, cached=("told",)), columns)
    assert column("a", "alt", 2) == "a_alt_2"
