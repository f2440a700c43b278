"""A diffusion prior: halves of its ladder, what is kept, what it is told; and one of a U-Net on pixels."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from infra.config import from_dict, to_dict
from infra.train.engine import PlainEngine
from infra.train.optim import OptimConfig
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.conditions.pictures import SmallerConfig
from t2i.conditions.words import WordsConfig
from t2i.diffusion.ladder import even, ladder, spaced
from t2i.diffusion.prior import DiffusionConfig, DiffusionPrior, DiffusionSampling
from t2i.diffusion.process import Process
from t2i.diffusion.samplers import beginning
from t2i.diffusion.schedules import EDM, Betas, Flow, alpha_sigma
from t2i.diffusion.unet import UNetConfig
from t2i.nn.weights import initialize
from t2i.priors.task import PriorShape, PriorTask, load_prior, save_vocabulary
from t2i.protocol import Asked, Space, Start
from t2i.random import keys_of
from t2i.vocabulary import TextVocabulary
from tests.t2i.diffusion.gaussian import Gaussian
from tests.t2i.house.spot import Net, normal

pytestmark = pytest.mark.family("told")
LABEL = LabelConfig(labels=("left", "right"), drop=0.1)
WIDTH = 64
DATA = Gaussian(0.3, 0.5)
HALVES = {
    "betas": (Process(schedule=Betas(beta_last=0.02), prediction="v"), 500.0),
    "edm": (Process(schedule=EDM(), prediction="v"), 0.1),
    "flow": (Process(schedule=Flow(shift=2.0), prediction="velocity"), 0.47),
}


class Ideal(nn.Module):
    """The network of no error on Gaussian data."""

    def __init__(self, process, data):
        super().__init__()
        self.hears, self.times = frozenset(), []
        self.process, self.denoise = process, data.denoiser(process)
        self.nothing = nn.Parameter(torch.zeros(1))

    def forward(self, x, t, told):
        self.times.append(float(t[0]))
        scale = self.process.input_scale(self.process.schedule.lambda_at(t)).view(-1, 1)
        return self.denoise(x.double() / scale, t.double())[0]


def ideal(process, data=DATA):
    space = Space((1,))
    return DiffusionPrior(Ideal(process, data), process, space, Conditions((), 8, space, ()))


@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver_2m", "dpm_solver_2s", "heun"])
@pytest.mark.parametrize("name", HALVES)
def test_halves_of_two_ladders_lead_where_the_whole_leads(name, sampler):
    (process, stops), seeds = HALVES[name], list(range(200))
    prior = ideal(process)
    first = prior.ladder(DiffusionSampling(steps=10)).lambdas[0]
    begun = beginning(process, prior.ladder(DiffusionSampling(steps=10)), keys_of(seeds), (1,)).double()
    exact = DATA.led(process, begun, first, torch.tensor(torch.inf).double())

    def drawn(steps, start=None, **options):
        sampling = DiffusionSampling(sampler=sampler, steps=steps, **options)
        return prior.sample(Asked(200), seeds, sampling, start)

    def error(values):
        return float((values - exact).abs().mean())

    errors = [error(drawn(steps)) for steps in (10, 25)]
    for steps, others in ((10, 25), (25, 10)):
        left = drawn(steps, stops=stops)
        prior.network.times.clear()
        halves = drawn(others, Start(left, at=stops, noised=True))
        assert prior.network.times[0] == pytest.approx(stops)
        assert error(halves) < 1.5 * max(errors)


@pytest.mark.parametrize("sampler", ["ddim", "ancestral", "dpm_solver_2m", "dpm_solver_2s", "heun"])
@pytest.mark.parametrize("name", HALVES)
def test_what_is_left_has_the_noise_of_the_time_where_it_stops(name, sampler):
    """Of data of one value, what is left is alpha times that, and noise of deviation sigma."""
    process, stops = HALVES[name]
    prior, seeds = ideal(process, Gaussian(0.3, 1e-9)), list(range(4000))
    for steps in (1, 10, 25):
        left = prior.sample(Asked(4000), seeds, DiffusionSampling(sampler=sampler, steps=steps, stops=stops))
        alpha, sigma = map(float, alpha_sigma(process.schedule.path, process.schedule.lambda_at(torch.tensor(stops))))
        noise = (left - alpha * 0.3) / sigma
        assert float(noise.std()) == pytest.approx(1, abs=0.04)
        if sampler != "ancestral":  # an ODE's path keeps the very noise that it began with
            began = prior.sample(Asked(4000), seeds, DiffusionSampling(steps=1, stops=stops))
            torch.testing.assert_close(left, began, rtol=0, atol=1e-3 * sigma)


def test_parts_of_a_ladder_never_share_the_number_of_a_step():
    schedule = Betas()
    whole = ladder(schedule, spaced(schedule, 10, "trailing"))
    for time in (998.0, 960.0, 951.0, 899.0, 898.0, 500.0, 120.0, 99.0, 70.0, 20.0, 1.0):
        first, second = whole.until(schedule, time), whole.since(schedule, time)
        assert first.lambdas[-1] == second.lambdas[0] == schedule.lambda_at(torch.tensor(time))
        assert second.times[0] == time
        assert first.lambdas[0] == whole.lambdas[0]
        assert second.lambdas[-1] == torch.inf
        for part in (first, second):
            assert len(part.lambdas) == len(part.times) + 1
            assert (part.times[1:] < part.times[:-1]).all()
            assert (part.lambdas[1:] > part.lambdas[:-1]).all()
        assert first.begun == 0
        assert second.begun == len(first.times)
        assert len(first.times) + len(second.times) <= 11
    assert whole.since(schedule, 999.0).begun == 0
    assert all(torch.equal(*pair) for pair in zip(whole.since(schedule, 999.0)[:2], whole[:2], strict=True))
    assert torch.equal(whole.since(schedule, 499.0).lambdas, whole.lambdas[5:])
    middle = whole.since(schedule, 700.0).until(schedule, 301.0)
    assert middle.times.tolist() == [700, 599, 499, 399]
    for cut, said in (
        (lambda: whole.until(schedule, 999.0), "do not lead to"),
        (lambda: whole.since(schedule, 500.0).until(schedule, 600.0), "do not lead to"),
        (lambda: whole.since(schedule, 1000.0), "within"),
        (lambda: even(Flow(), 4).since(Flow(), 0.0), "nothing left"),
    ):
        with pytest.raises(ValueError, match=said):
            cut()


def test_what_is_kept_of_noised_values_is_without_noise():
    """The refiner's inpainting: it noises what it keeps, and what the base left is noised already."""
    process, stops = HALVES["betas"]
    prior, seen = ideal(process), []
    prior.network.register_forward_pre_hook(lambda module, told: seen.append(told[0]))
    values = torch.full((2000, 1), 0.9)
    keep = torch.arange(2000)[:, None] % 2 == 0
    start = Start(values, at=stops, noised=True, keep=keep)
    drawn = prior.sample(Asked(2000), list(range(2000)), DiffusionSampling(steps=10), start)
    assert torch.equal(drawn[::2], values[::2])
    assert torch.equal(seen[0][1::2], values[1::2])
    alpha, sigma = map(float, alpha_sigma("preserving", process.schedule.lambda_at(torch.tensor(stops))))
    assert float(seen[0][::2].mean()) == pytest.approx(alpha * 0.9, abs=0.1)
    assert float(seen[0][::2].std()) == pytest.approx(sigma, rel=0.08)


def test_a_network_is_told_what_it_hears():
    space, process = Space((2,)), Process(schedule=Flow(), prediction="velocity")
    silent = Conditions((LABEL,), WIDTH, space, {"vector"})
    with pytest.raises(ValueError, match="condition 'label' says vector, which this network does not hear"):
        DiffusionPrior(Net(2, hears=("tokens",)), process, space, silent)


@pytest.mark.parametrize("t", [1, 50, 500])
def test_in_16_bits_a_variance_is_learned_as_in_32(t):
    space, process = Space((6,)), Process(learned_variance=True)
    net = Net(6, outputs=12, times=1000.0)
    prior = DiffusionPrior(net, process, space, Conditions((LABEL,), WIDTH, space, {"vector"}))
    initialize(prior, 0)
    nn.init.normal_(net.leave.weight, std=0.02, generator=torch.Generator().manual_seed(0))
    rows = np.arange(64)
    x0, epsilon = (torch.from_numpy(normal(rows, salt, 6)) for salt in (0, 1))
    batch = {"label": torch.zeros(64, dtype=torch.int64)}
    times = torch.full((64,), float(t))
    x = process.noised(x0, epsilon, process.schedule.lambda_at(times))
    gradients = []
    for bits in (False, True):
        net.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bits):
            told = prior.conditions.asked(Asked(64, batch))
            process.losses(prior.denoise(x, times, told, batch), x0, epsilon, times)["bound"].sum().backward()
        gradients.append(net.leave.weight.grad[6:].clone())
    exact, found = gradients
    assert exact.norm() > 0
    assert (found - exact).norm() < 0.05 * exact.norm()
    shares = [torch.full((2, 3), 0.3).to(dtype).requires_grad_() for dtype in (torch.float32, torch.bfloat16)]
    for share in shares:
        of = [each[:2, :3].to(share.dtype) for each in (epsilon, x0, x)]
        process.bound((of[0], share), *of[1:], times[:2]).sum().backward()
    torch.testing.assert_close(shares[1].grad.float(), shares[0].grad, rtol=0.1, atol=0)


def test_what_would_change_nothing_is_refused():
    with pytest.raises(ValueError, match="eta is ddim's"):
        DiffusionSampling(sampler="heun", eta=0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        DiffusionSampling(noised={"smaller": 1.5})
    space, process = Space((2,)), Process(schedule=Flow(), prediction="velocity")
    prior = DiffusionPrior(Net(2), process, space, Conditions((LABEL,), WIDTH, space, {"vector"}))
    asked = Asked(1, {"label": torch.zeros(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="have none"):
        prior.sample(asked, [1], DiffusionSampling(steps=2, percentile=0.99))
    with pytest.raises(ValueError, match="did not learn one that is noised"):
        prior.sample(asked, [1], DiffusionSampling(steps=2, noised={"label": 0.5}))
    negative = Asked(1, asked.batch, {"label": torch.ones(1, dtype=torch.int64)})
    with pytest.raises(ValueError, match="but it is 1"):
        prior.sample(negative, [1], DiffusionSampling(steps=2))
    assert prior.sample(negative, [1], DiffusionSampling(steps=2, guidance=2.0)).isfinite().all()


PIXELS = Space((3, 8, 8), bound=1.0)
TEXT = WordsConfig(vocabulary_size=17, length=9, drop=0.1)
SMALLER = SmallerConfig(size=(4, 4), noise=0.5)
NET = UNetConfig(channels=16, width=64, blocks=1, head_width=8, groups=8, token_layers=1)
TOLD = {"words": (TEXT,), "words and a picture": (TEXT, SMALLER), "a class": (LABEL,), "nothing": ()}
FLOW = Process(schedule=Flow(), prediction="velocity")


def unet_prior(conditions, network=NET, process=FLOW, space=PIXELS, random=True):
    """Every weight random: a fresh network says nothing, since its last layer is zero."""
    prior = DiffusionConfig(network=network, process=process).build(space, conditions)
    initialize(prior, 3)
    with torch.no_grad():
        for name, parameter in prior.named_parameters() if random else ():
            if not parameter.any() and parameter.dim() > 1:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return prior.eval().requires_grad_(False)


def asked(conditions, rows=3, words=5):
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(2, 17, (rows, words), generator=generator)
    text[0, 3:] = 0
    batch = {
        "text": text,
        "smaller": torch.randint(256, (rows, 3, 4, 4), generator=generator, dtype=torch.uint8),
        "label": torch.tensor([0, 1, 1])[:rows],
    }
    names = {condition.name for condition in conditions}
    return Asked(rows, {"noise_key": torch.arange(rows), **{n: each for n, each in batch.items() if n in names}})


def said(prior, told, rows=3, start=0):
    x = torch.from_numpy(normal(np.arange(start, start + rows), 5, *prior.space.shape))
    t = torch.tensor([0.2, 0.5, 0.9])[start : start + rows]
    return prior.denoise(x, t, prior.conditions.asked(told), told.batch)[0]


@pytest.fixture(params=TOLD)
def told(request):
    return TOLD[request.param]


def test_what_a_unet_says_of_a_row_depends_on_that_row(told):
    prior, every = unet_prior(told), asked(told)
    together = said(prior, every)
    assert together.shape == (3, 3, 8, 8)
    assert together.abs().mean() > 0.01
    for row in range(3):
        alone = {name: column[row : row + 1] for name, column in every.batch.items()}
        if "text" in alone:  # as its own batch would pad it
            alone["text"] = alone["text"][:, : int((alone["text"] > 0).sum())]
        found = said(prior, Asked(1, alone), rows=1, start=row)
        torch.testing.assert_close(found[0], together[row], rtol=0, atol=1e-4)


def test_a_unet_hears_each_condition(told):
    prior, every = unet_prior(told), asked(told)
    plain = said(prior, every)
    for condition in told:
        changed = {**every.batch, condition.name: every.batch[condition.name].roll(1, 0)}
        assert (said(prior, Asked(3, changed)) - plain)[0].abs().max() > 1e-4, condition.name
    drawn = prior.sample(every, [1, 2, 3], DiffusionSampling(steps=2))
    assert drawn.shape == (3, 3, 8, 8)
    assert drawn.abs().max() <= 1 + 1e-5
    noised = {"noised": {"smaller": 0.9}} if SMALLER in told else {}
    if noised:
        assert not torch.equal(drawn, prior.sample(every, [1, 2, 3], DiffusionSampling(steps=2, **noised)))
    if LABEL in told or TEXT in told:
        guided = prior.sample(every, [1, 2, 3], DiffusionSampling(steps=2, guidance=3.0, **noised))
        assert not torch.equal(drawn, guided)


def test_a_unet_begins_as_nothing_and_from_its_seed():
    fresh, again = (unet_prior((TEXT,), random=False) for _ in range(2))
    assert not said(fresh, asked((TEXT,))).any()
    for one, other in zip(fresh.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_unet_folds_pixels_and_says_a_variance():
    network = UNetConfig(channels=16, multipliers=(1,), blocks=1, attention_levels=(), head_width=8, groups=8, patch=2)
    prior = unet_prior((SMALLER,), network, Process(learned_variance=True))
    x = torch.from_numpy(normal(np.arange(3), 5, 3, 8, 8))
    told = asked((SMALLER,))
    prediction, share = prior.denoise(x, torch.full((3,), 500), prior.conditions.asked(told), told.batch)
    assert prediction.shape == share.shape == (3, 3, 8, 8)


def test_a_unet_of_what_cannot_be():
    for wrong, message in (
        ({"channels": 20}, "norm groups the channels, but these are 20 and 256"),
        ({"attention_levels": (2,)}, "no level 2"),
        ({"multipliers": ()}, "at least one level"),
    ):
        with pytest.raises(ValueError, match=message):
            UNetConfig(**wrong)
    with pytest.raises(ValueError, match="do not divide into patches of 2"):
        DiffusionConfig(network=NET).build(Space((3, 9, 8)), ())
    with pytest.raises(ValueError, match="channels, rows and columns"):
        DiffusionConfig(network=NET).build(Space((8,)), ())
    with pytest.raises(ValueError, match="continuous values"):
        DiffusionConfig(network=NET).build(Space((8, 8), codes=5), ())


CAPTIONS = ["a red cat", "a blue dog", "the green tree", "one white house"]
PICTURES = [np.full((16, 16, 3), [40 + 60 * (row == c) * 3 for c in range(3)], np.uint8) for row in range(4)]


@pytest.fixture
def task(tmp_path):
    vocabulary = TextVocabulary.train(CAPTIONS * 3, size=64, length=8)
    save_vocabulary(vocabulary, str(tmp_path / "words"))
    words = WordsConfig(vocabulary_size=len(vocabulary), length=8, drop=0.0)
    shape = PriorShape(
        model=DiffusionConfig(
            network=replace(NET, multipliers=(1,), attention_levels=(0,), patch=2),
            process=Process(schedule=Flow(), prediction="x0"),
        ),
        space=PIXELS,
        conditions=(words, SMALLER),
        given={"smaller": "pixels"},
    )
    optim = OptimConfig(lr=1e-2)
    return PriorTask(shape=shape, folder=str(tmp_path / "words"), styles=("alt",), optim=optim, column="pixels")


def test_a_prior_of_pixels_learns_four_pictures_and_comes_back(task, tmp_path):
    assert sorted(task.reads) == ["caption_alt", "captions_alt?", "pixels", "weight_alt", "weights_alt?"]
    assert from_dict(PriorShape, json.loads(json.dumps(to_dict(task.shape)))) == task.shape
    rows = {"pixels": PICTURES, "caption_alt": CAPTIONS, "weight_alt": [1.0] * 4}
    keys = iter(np.random.default_rng(0).random((99, 4)))

    def batch():
        drawn = next(keys)
        arrays = task.collate(rows, lambda salt: drawn if salt == "noise" else np.full(4, 0.5))
        assert arrays["values"].dtype == np.uint8
        assert arrays["values"].shape == (4, 3, 8, 8)
        return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"weight": torch.ones(4)}

    (update,) = task.updates()
    engine = PlainEngine(update)
    for step in range(60):
        loss = engine(batch())["error"] / 4
        engine.backward(loss)
        engine.step(1e-2 * min(1, (step + 1) / 5, (60 - step) / 30))
    task.export({"prior": update.module.eval()}, str(tmp_path))
    prior, ask = load_prior(str(tmp_path))
    assert ask.given == {"smaller": "pixels"}
    told = {"caption": CAPTIONS, "pixels": PICTURES}
    drawn = prior.sample(ask(told, [0, 1, 2, 3]), [0, 1, 2, 3], DiffusionSampling(steps=8))
    wanted = torch.stack([torch.from_numpy(each[:8, :8]) for each in PICTURES]).permute(0, 3, 1, 2) / 127.5 - 1
    assert (drawn - wanted).abs().mean() < 0.15
