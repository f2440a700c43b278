import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig
from t2i.conditions.codes import CodesConfig
from t2i.conditions.labels import LabelConfig
from t2i.conditions.words import WordsConfig
from t2i.nn.transformer import Attention, rotary
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.sampling import SamplingConfig, draw
from t2i.priors.task import PriorShape, PriorTask, load_prior, save_vocabulary
from t2i.protocol import Asked, Space
from t2i.tokenizers.finite_scalar import FiniteScalarConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.task import build_tokenizer, save_tokenizer
from t2i.vocabulary import NULL, TextVocabulary

pytestmark = pytest.mark.family("prior")
GRID, CODES, WORDS = (3, 4), 11, 17
TEXT = WordsConfig(vocabulary_size=WORDS, length=9)
PRIORS = {
    "autoregressive": AutoregressiveConfig(width=32, layers=2, heads=2),
    "autoregressive, text learned": AutoregressiveConfig(width=32, layers=2, heads=2, text_loss=True),
}


@pytest.fixture(params=PRIORS)
def prior(request):
    """Every weight random: a fresh prior predicts nothing, since its outputs start at zero."""
    shape = PriorShape(model=PRIORS[request.param], space=Space(GRID, codes=CODES), conditions=(TEXT,))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = shape.build()
        for parameter in prior.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval().requires_grad_(False)


def inputs(rows=3, length=5):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, WORDS, (rows, length), generator=generator)
    text[0, 3:] = 0
    return text, torch.randint(CODES, (rows, GRID[0] * GRID[1]), generator=generator)


def asked(text):
    return Asked(len(text), {"text": text})


def logits(prior, text, codes):
    return prior.logits(prior.conditions.asked(asked(text)), codes)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=1e-4)


def test_a_code_is_predicted_from_those_before_it_alone(prior):
    text, codes = inputs()
    for n in (0, 4, 10):
        changed = codes.clone()
        changed[:, n] = (changed[:, n] + 1) % CODES
        before, after = logits(prior, text, codes[:, :-1]), logits(prior, text, changed[:, :-1])
        close(before[:, : n + 1], after[:, : n + 1])
        assert (before[:, n + 1] - after[:, n + 1]).abs().max() > 1e-3
    close(logits(prior, text, codes[:, :4]), logits(prior, text, codes[:, :-1])[:, :5])


def test_padding_is_never_looked_at(prior):
    text, codes = inputs()
    close(logits(prior, text, codes[:, :-1]), logits(prior, functional.pad(text, (0, 4)), codes[:, :-1]))
    alone = logits(prior, text[:1, :3], codes[:1, :-1])
    close(logits(prior, text, codes[:, :-1])[:1], alone)


def test_losses_are_sums_over_counted_targets(prior):
    text, codes = inputs()
    batch = {"text": text, "values": codes, "weight": torch.tensor([1.0, 1.0, 0.0])}
    losses, counts = prior(batch), prior.targets(batch)
    assert losses.keys() == counts.keys()
    said = logits(prior, text[:2], codes[:2, :-1])
    close(losses["codes"], functional.cross_entropy(said.flatten(0, 1), codes[:2].flatten(), reduction="sum"))
    assert counts["codes"] == 2 * 12
    if "text" in counts:
        assert counts["text"] == 2 + 4  # all words but the first of each caption


def test_a_learned_caption_is_read_in_order():
    prior = PRIORS["autoregressive, text learned"].build(Space(GRID, codes=CODES), (TEXT,))
    text, _ = inputs()
    mask = prior._mask(text > 0, torch.empty(3, 6, 32))
    assert mask[1, 0, :5, :5].tolist() == torch.ones(5, 5).tril().bool().tolist()
    assert mask[0, 0, 5].tolist() == [True, True, True, False, False, True]


def greedy(prior, text, null, guidance):
    """Without cache: the likeliest code, one after the other."""
    codes = text.new_empty(len(text), 0)
    for _ in range(prior.space.places):
        conditional = logits(prior, text, codes)[:, -1]
        without = logits(prior, null.expand(len(text), -1), codes)[:, -1]
        codes = torch.cat([codes, (without + guidance * (conditional - without)).argmax(1, keepdim=True)], dim=1)
    return codes.view(-1, *prior.space.shape)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 3.0])
def test_cached_sampling_is_the_plain_one(prior, guidance):
    text, _ = inputs()
    sampled = prior.sample(asked(text), [0, 1, 2], SamplingConfig(temperature=0, guidance=guidance))
    assert sampled.shape == (3, *GRID)
    assert torch.equal(sampled, greedy(prior, text, torch.tensor([[NULL]]), guidance))


def test_guidance_of_one_is_the_conditional(prior):
    text, _ = inputs()
    plain = prior.sample(asked(text), [3, 4, 5], SamplingConfig())
    nearly = prior.sample(asked(text), [3, 4, 5], SamplingConfig(guidance=1 + 1e-9))
    assert torch.equal(plain, nearly)


def test_a_picture_does_not_depend_on_its_batch(prior):
    text, _ = inputs()
    sampling = SamplingConfig(guidance=2.0, top_k=7, top_p=0.9)
    together = prior.sample(asked(text), [7, 8, 9], sampling)
    alone = torch.cat([prior.sample(asked(text[i : i + 1]), [7 + i], sampling) for i in range(3)])
    assert torch.equal(together, alone)
    twins = prior.sample(asked(text[[1, 1]]), [1, 2], sampling)
    assert not torch.equal(twins[0], twins[1])


@pytest.fixture(params=["several", "a vector alone", "nothing"])
def told(request):
    """A prior of other conditions than words alone, and four rows of what it is told."""
    conditions = {
        "several": (TEXT, LabelConfig(labels=("cat", "dog")), CodesConfig(name="map", codes=5, places=3, column="map")),
        "a vector alone": (LabelConfig(labels=("cat", "dog")),),
        "nothing": (),
    }[request.param]
    prior = PRIORS["autoregressive"].build(Space(GRID, codes=CODES), conditions)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.normal_(std=0.3, generator=generator)
    text = torch.tensor([[3, 4, 0, 0, 0, 0], [5, 6, 7, 8, 9, 2], [3, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]])
    batch = {"text": text, "label": torch.tensor([0, 1, 2, 0]), "map": torch.arange(12).view(4, 3) % 5}
    names = {"text", "label", "map"} & {condition.name for condition in conditions}
    return prior.eval().requires_grad_(False), {name: batch[name] for name in names}


def test_what_is_told_of_a_row_does_not_depend_on_others(told):
    prior, batch = told
    codes = torch.arange(4 * 5).view(4, 5) % CODES
    together = prior.logits(prior.conditions.asked(Asked(4, batch)), codes)
    for row in range(4):
        alone = {name: column[row : row + 1] for name, column in batch.items()}
        if "text" in alone:  # as its own batch would pad it
            alone["text"] = alone["text"][:, : int((alone["text"] > 0).sum())]
        close(prior.logits(prior.conditions.asked(Asked(1, alone)), codes[row : row + 1])[0], together[row])


def test_each_condition_is_heard_and_guided_by(told):
    prior, batch = told
    plain = prior.logits(prior.conditions.asked(Asked(4, batch)), torch.zeros(4, 3, dtype=torch.int64))
    for name in batch:
        away = prior.conditions.without(Asked(4, batch), [name])
        changed = (prior.logits(away, torch.zeros(4, 3, dtype=torch.int64)) - plain).abs().amax((1, 2))
        assert (changed[:2] > 1e-3).all(), name
    seeds = [1, 2, 3, 4]
    drawn = prior.sample(Asked(4, batch), seeds, SamplingConfig())
    assert drawn.shape == (4, *GRID)
    if batch:
        guided = prior.sample(Asked(4, batch), seeds, SamplingConfig(guidance=4.0, guided=(next(iter(batch)),)))
        assert not torch.equal(drawn, guided)
    else:
        with pytest.raises(ValueError, match="training dropped none"):
            prior.sample(Asked(4, batch), seeds, SamplingConfig(guidance=2.0))


def test_draw_follows_the_distribution():
    logits = torch.tensor([[0.0, 2.0, 1.0, -1.0]])
    chances = (torch.arange(10_000) + 0.5) / 10_000
    many = logits.expand(len(chances), -1)

    def shares(**settings):
        return torch.bincount(draw(many, chances, SamplingConfig(**settings)), minlength=4) / len(chances)

    close(shares(), logits[0].softmax(0))
    close(shares(temperature=2.0), (logits[0] / 2).softmax(0))
    torch.testing.assert_close(shares(top_k=2), torch.tensor([0.0, 0.7311, 0.2689, 0.0]), rtol=0, atol=2e-4)
    torch.testing.assert_close(shares(top_p=0.7), torch.tensor([0.0, 0.7311, 0.2689, 0.0]), rtol=0, atol=2e-4)
    assert shares(top_p=0.1).tolist() == shares(top_k=1).tolist() == shares(temperature=0).tolist() == [0, 1, 0, 0]


def test_our_attention_is_torchs():
    attention = Attention(32, 2).requires_grad_(False)
    x, turns = torch.randn(2, 6, 32), rotary(torch.arange(6)[:, None], 16)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    ours = attention(x, turns, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "t2i.nn.transformer._attend",
            lambda q, k, v, m: functional.scaled_dot_product_attention(q, k, v, attn_mask=m),
        )
        close(ours, attention(x, turns, mask))


def test_rotary_knows_distances_only():
    x = torch.randn(16)

    def product(a, b):
        turned = []
        for place in (a, b):
            cos, sin = rotary(torch.tensor([place]), 16)[:, 0]
            turned.append(torch.cat([x[:8] * cos - x[8:] * sin, x[:8] * sin + x[8:] * cos]))
        return turned[0] @ turned[1]

    close(product([2, 5], [3, 9]), product([0, 1], [1, 5]))
    assert (product([2, 5], [3, 9]) - product([2, 5], [3, 8])).abs() > 1e-3


def test_wrong_sizes_are_told():
    with pytest.raises(ValueError, match="multiple of the heads"):
        AutoregressiveConfig(width=30, heads=4)
    with pytest.raises(ValueError, match="top_p"):
        SamplingConfig(top_p=0)


CAPTIONS = ["a red circle", "a blue circle", "a red square", "a blue square"]


@pytest.fixture
def task(tmp_path):
    vocabulary = TextVocabulary.train(CAPTIONS, 64, 8)
    save_vocabulary(vocabulary, str(tmp_path / "words"))
    shape = PriorShape(
        model=AutoregressiveConfig(width=32, layers=2, heads=2),
        space=Space((2, 2), codes=CODES),
        conditions=(WordsConfig(vocabulary_size=len(vocabulary), length=8),),
    )
    return PriorTask(
        shape=shape,
        folder=str(tmp_path / "words"),
        styles=("alt", "short"),
        optim=OptimConfig(lr=1e-2),
        drop=0.25,
    )


def rows():
    return {
        "codes": [np.full(4, i, np.int32) for i in range(4)],
        "caption_alt": CAPTIONS,
        "weight_alt": [1.0] * 4,
        "caption_short": [None] * 4,
        "weight_short": [0.0] * 4,
    }


def collate(task, chances=0.5):
    arrays = task.collate(rows(), lambda salt: np.full(4, chances))
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"weight": torch.ones(4)}


def test_the_task_travels_and_its_first_weights_come_from_its_seed(task):
    other = pickle.loads(pickle.dumps(task))
    assert other == task
    first, again = (t.updates()[0].module.state_dict() for t in (task, other))
    assert all(torch.equal(first[name], again[name]) for name in first)
    kept = task.where({"split": np.array(["train", "test", "train"], object), "keep": np.array([1, 1, 0], object)})
    assert kept.tolist() == [True, False, False]


def test_captions_are_dropped_by_the_draw(task):
    words = task.shape.build().conditions.each["text"]
    for chances, dropped in ((0.5, False), (0.1, True)):
        batch = collate(task, chances)
        ids = words.ids(batch, batch["dropped_text"])
        assert batch["dropped_text"].tolist() == [dropped] * 4
        assert ids[:, 0].eq(NULL).all() == dropped
        assert (ids[:, 1:] > 0).any() != dropped


def test_a_prior_learns_four_pictures_and_comes_back(task, tmp_path):
    (update,) = task.updates()
    engine, batch = PlainEngine(update), collate(task)
    for _ in range(60):
        loss = engine(batch)["codes"] / update.module.targets(batch)["codes"]
        engine.backward(loss)
        engine.step(1e-2)
    assert loss < 0.05
    task.export({"prior": update.module.eval()}, str(tmp_path))
    assert json.loads((tmp_path / "config.json").read_text())["space"]["codes"] == CODES
    prior, ask = load_prior(str(tmp_path))
    drawn = prior.sample(ask({"caption": CAPTIONS}, [0, 1, 2, 3]), [0, 1, 2, 3], SamplingConfig(temperature=0.5))
    assert torch.equal(drawn, torch.arange(4).view(4, 1, 1).expand(4, 2, 2))


def test_a_prior_draws_where_its_weights_are(prior):
    """Of two devices that meet torch tells, on the meta device, too."""
    text, _ = inputs()
    drawn = prior.to("meta").sample(asked(text), [1, 2, 3], SamplingConfig(guidance=2.0, top_k=5))
    assert drawn.device.type == "meta"
    assert drawn.shape == (3, *GRID)


def test_pictures_are_drawn_while_it_trains_by_the_tokenizer_of_its_codes(task, tmp_path):
    tokenizer = build_tokenizer(PatchVQGANConfig(patch=4, channels=8, quantizer=FiniteScalarConfig(levels=(3, 4))))
    (tmp_path / "tokenizer").mkdir()
    save_tokenizer(tokenizer, str(tmp_path / "tokenizer"))
    shown = replace(task, decoder=str(tmp_path / "tokenizer"))
    assert (task.paints, shown.paints) == (0, 8)
    arrays = shown.asks(rows(), lambda salt: np.zeros(4))  # a draw at which all conditions are dropped in training
    assert arrays.pop("prompt").tolist() == CAPTIONS
    assert arrays.keys() == {"text"}
    prior = task.updates()[0].module.eval()
    torch.nn.init.normal_(prior.head.weight, generator=torch.Generator().manual_seed(0))
    text = torch.from_numpy(arrays["text"])
    pictures = shown.paint({"prior": prior}, {"text": text, "weight": torch.ones(4), "id": torch.arange(4)})
    codes = prior.sample(asked(text), range(4), SamplingConfig(temperature=0.7))
    assert len(codes.unique()) > 1
    decoded = tokenizer.eval().decode(codes).detach()
    assert np.array_equal(pictures, ((decoded + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
