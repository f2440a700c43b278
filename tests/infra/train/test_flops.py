"""Model FLOPs agree with closed forms and with torch's own counter, and counting changes nothing."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.train import loop
from infra.train.buckets import BucketPlan
from infra.train.checkpoint import Checkpoint
from infra.train.flops import SAMPLES, Flops, again, asking, counting, of_training, peak, sampled
from infra.train.optim import OptimConfig
from infra.train.plan import BatchPlan
from infra.train.recompute import recompute
from infra.train.task import Update
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.protocol import Space
from tests.infra.train import toy
from tests.infra.train.workers import run_workers

NET = Update("net", torch.nn.Identity(), OptimConfig())
ROWS, WORDS, CODES, WIDTH, LAYERS = 5, 10, 16, 48, 3


@pytest.fixture
def prior():
    torch.manual_seed(0)
    config = AutoregressiveConfig(width=WIDTH, layers=LAYERS, heads=4, text_loss=True)
    return config.build(Space((4, 4), codes=32), (WordsConfig(vocabulary_size=50, length=WORDS),))


@pytest.fixture
def batch():
    words, codes = torch.randint(1, 50, (ROWS, WORDS)), torch.randint(0, 32, (ROWS, CODES))
    return {"text": words, "values": codes, "weight": torch.ones(ROWS)}


def passes(module, batch):
    sum(module(batch).values()).backward()


def counted(module, batch, rows=ROWS):
    flops = Flops(1)
    with flops.counted(NET, 0, rows):
        passes(module, batch)
    return flops.figures(1.0, 1)["model_flops_per_second"]


def by_hand():
    """6 FLOPs for each weight and place, and 12 for each width, place and place that it looks at, of one row."""
    places, weights = WORDS + CODES, LAYERS * 12 * WIDTH**2
    heads = WIDTH * (CODES * 32 + (WORDS - 1) * 50)
    return 6 * (weights * places + heads) + 12 * LAYERS * places**2 * WIDTH


def test_a_prior_costs_what_the_closed_form_says(prior, batch):
    assert counted(prior, batch) == by_hand()
    with FlopCounterMode(display=False) as torchs:
        passes(prior, batch)
    assert torchs.get_total_flops() == ROWS * by_hand()


def test_what_is_computed_again_is_not_counted(prior, batch):
    assert recompute(prior) == LAYERS
    assert counted(prior, batch) == by_hand()
    with FlopCounterMode(display=False) as torchs:
        passes(prior, batch)
    assert torchs.get_total_flops() > 1.2 * ROWS * by_hand(), "the check above would not see it"


def test_what_is_frozen_costs_its_forward_pass():
    frozen, head = torch.nn.Linear(16, 8, bias=False).requires_grad_(False), torch.nn.Linear(8, 4, bias=False)
    x, flops = torch.randn(3, 16), Flops(1)
    with flops.counted(NET, 0, 3):
        with torch.no_grad():
            seen = frozen(x)
        head(seen).sum().backward()
    assert flops.figures(1.0, 1)["model_flops_per_second"] == 2 * 16 * 8 + 2 * 2 * 8 * 4


def test_torchs_fused_attention_counts_on_the_cpu_too():
    q, k, v = (torch.randn(2, 4, 32, 8, requires_grad=True) for _ in range(3))
    flops = Flops(1)
    with flops.counted(NET, 0, 1):
        torch.nn.functional.scaled_dot_product_attention(q, k, v).sum().backward()
    forward = 2 * 2 * (2 * 4 * 32 * 32 * 8)
    # The backward pass of the fused one computes the scores again, as torch counts it: 5 products for 2.
    assert flops.figures(1.0, 1)["model_flops_per_second"] == forward * (1 + 2.5)


def test_counting_changes_no_gradient(prior, batch):
    passes(prior, batch)
    plain = {name: parameter.grad.clone() for name, parameter in prior.named_parameters()}
    prior.zero_grad()
    drawn = torch.random.get_rng_state()
    assert counted(prior, batch) > 0
    assert all(torch.equal(parameter.grad, plain[name]) for name, parameter in prior.named_parameters())
    assert torch.equal(torch.random.get_rng_state(), drawn)


def test_a_compiled_model_costs_the_same_and_stays_compiled(prior, batch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    prior.compile(backend=backend)
    assert counted(prior, batch) == by_hand()
    assert not graphs
    for _ in range(2):
        passes(prior, batch)
    assert len(graphs) == 1


def test_a_counted_training_is_bit_equal_to_one_that_is_not(tmp_path, monkeypatch):
    state, losses = toy.plain(str(tmp_path / "counted"))
    monkeypatch.setattr(Flops, "counted", lambda *_: nullcontext(lambda: None))
    plain, plain_losses = toy.plain(str(tmp_path / "plain"))
    assert losses == plain_losses
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_figures_are_of_updates_that_are_awake(tmp_path):
    class Figures(toy.Figure):
        def __call__(self, step, figures):
            self.append(figures)

    config, log = loop.TrainConfig(steps=8, batch=10, log_every_steps=1), Figures()
    feed = toy.feed(config, 0, 1, 2)
    loop.train(toy.Pair(), feed, toy.PlainEngine, 2, config, str(tmp_path), log)
    by_row = [row["model_flops_per_second"] / row["rows_per_second"] for row in log]
    assert by_row[:4] == pytest.approx([by_row[0]] * 4)
    assert by_row[4:] == pytest.approx([2 * by_row[0]] * 4), "the second update sleeps for four steps"
    assert by_row[0] > 0
    if not torch.cuda.is_available():
        assert "model_flops_utilization" not in log[0], "nothing is made up where no peak is known"


# Of the toy's net: forward, and backward to weights and inputs; what is frozen is not learned, but what is before it.
BY_ROW = 2 * 7 * (3 * (16 * 16 + 4 * 16 * 7 + 16 * 11) + 2 * 16 * 16)


def told(folder, steps, batch=10, **more):
    """What the summary of a toy's training would tell."""
    plan = BatchPlan([toy.ROWS // 2] * 2, batch, 0, 2)
    return of_training(Checkpoint(f"{folder}/{steps:09d}").meta["flops"], plan, steps) | more


@pytest.mark.parametrize("steps", [1, 6, 19, 20, 21, 47])
def test_a_training_costs_its_rows_and_a_late_update_those_since_it_woke(tmp_path, steps):
    toy.plain(str(tmp_path), toy.Pair(), steps=steps)
    assert told(tmp_path, steps) == {"training_flops": 10 * BY_ROW * (steps + max(0, steps - 4))}
    counted = Checkpoint(f"{tmp_path}/{steps:09d}").meta["flops"]
    assert counted["net"]["micro_batches"] == min(steps, SAMPLES)
    assert counted.get("late", {"micro_batches": 0})["micro_batches"] == min(max(0, steps - 4), SAMPLES)


def test_places_are_spread_over_what_is_awake():
    assert sampled(0, 5) == set(range(5))
    assert sampled(7, 7) == sampled(9, 7) == set()
    assert sampled(100, 300) == set(range(105, 300, 10))
    assert all(len(sampled(start, steps)) == min(20, steps - start) for steps in range(80) for start in range(steps))
    assert all(start <= step < 90 for start in range(90) for step in sampled(start, 90))


class Growing(toy.Net):
    """Costs more from step to step."""

    def forward(self, batch):
        x = torch.ones(len(batch["ids"]), int(batch["step"]) + 1)
        return {"token": super().forward(batch)["token"] + 0 * (x @ torch.ones(x.shape[1], 1)).sum()}


class Grows(toy.Toy):
    """What a row costs changes in the course of the training."""

    def updates(self):
        (update,) = super().updates()
        growing = Growing()
        growing.load_state_dict(update.module.state_dict())
        return [Update("net", growing, update.optim)]


def test_the_mean_is_over_the_whole_training(tmp_path):
    toy.plain(str(tmp_path), Grows(), steps=100)
    grown = 2 * sum(step + 1 for step in range(100)) * 10
    assert told(tmp_path, 100)["training_flops"] == pytest.approx(1000 * BY_ROW + grown, rel=1e-4)


def test_a_training_that_was_cut_counts_what_it_would_have_counted(tmp_path):
    toy.plain(str(tmp_path / "whole"), Grows(), steps=90)
    for stop in (6, 42, 84, 90):

        class Stops:
            def __init__(self, stop):
                self.stop, self.step = stop, 0

            def begin(self, step): ...
            def at(self, phase, *, step):
                self.step = step

            def uses(self, step, micro_batches): ...
            def leaving(self):
                return self.step >= self.stop

        config = loop.TrainConfig(steps=90, batch=10, log_every_steps=1, save_every_steps=6)
        arguments = (
            Grows(),
            toy.feed(config, 0, 1, 1),
            toy.PlainEngine,
            1,
            config,
            str(tmp_path / "cut"),
            toy.Figure(),
        )
        if stop < 90:
            with pytest.raises(loop.Left):
                loop.train(*arguments, Stops(stop))
        else:
            loop.train(*arguments)
    assert told(tmp_path / "cut", 90) == told(tmp_path / "whole", 90)


def test_of_a_checkpoint_that_says_nothing_what_is_left_stands_for_all(tmp_path):
    flops = Flops(1000)
    with flops.counted(NET, 999, 4):  # no step that is to be counted comes any more
        torch.ones(4, 3) @ torch.ones(3, 5)
    assert of_training(flops.state(), BatchPlan([50], 10, 0, 2), 1000) == {"training_flops": 10_000 * 2 * 3 * 5}
    assert of_training({}, BatchPlan([50], 10, 0, 2), 1000) == {}


def test_rows_that_only_fill_a_batch_are_none():
    plan = BucketPlan([{"a": 7, "b": 12}, {"a": 4}], 5, 0, 2)
    flops = Flops(1)
    with flops.counted(NET, 0, 5):
        torch.ones(5, 3) @ torch.ones(3, 5)
    for steps in (1, 4, 6, 13):
        rows = int(plan.steps(0, steps).weight.sum())
        assert plan.rows(0, steps) == rows
        assert of_training(flops.state(), plan, steps)["training_flops"] == 30 * rows
    for start in range(20):
        for stop in range(start, 20):
            assert plan.rows(start, stop) == plan.steps(start, stop).weight.sum() if stop > start else True
    assert BatchPlan([7, 3], 4, 0, 1).rows(3, 11) == 32
    assert BatchPlan([7, 3], 4, 0, 1).rows(11, 3) == plan.rows(9, 3) == 0


def test_what_is_only_asked_counts_by_itself(tmp_path):
    flops, x = Flops(1), torch.ones(4, 3)
    with flops.counted(NET, 0, 4):
        x @ torch.ones(3, 5)
        with asking():
            x @ torch.ones(3, 7)
            with again():
                x @ torch.ones(3, 9)
            x @ torch.ones(3, 1)
        x @ torch.ones(3, 2)
    plan = BatchPlan([50], 10, 0, 2)
    assert of_training(flops.state(), plan, 3) == {"training_flops": 30 * 2 * 3 * 7, "frozen_flops": 30 * 2 * 3 * 8}


def test_what_rows_show_beforehand_counts_where_it_is_no_forward_pass():
    """A pull at the last layer is computed in the forward pass or, of several micro-batches, before all of them."""
    x, w = torch.ones(4, 3), torch.ones(3, 5)

    def forward():
        return x @ w

    def pull():
        return x @ w[:, :2]

    whole, parts, plain = Flops(1), Flops(1), Flops(1)
    with whole.counted(NET, 0, 4) as forward_ends:
        forward(), pull(), forward_ends(), forward(), forward()
    with parts.surveyed(NET, 0, 12):
        for _ in range(3):
            forward(), pull()
    with parts.counted(NET, 0, 4) as forward_ends:
        forward(), forward_ends(), forward(), forward()
    assert parts.state() == whole.state()
    with plain.surveyed(NET, 0, 12):  # vectors alone, without the products in which they meet
        for _ in range(3):
            pull()
    with plain.counted(NET, 0, 4) as forward_ends:
        forward(), forward_ends()
    assert plain.state()["net"]["flops"] == 4 * 2 * 3 * 5


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
def test_layers_cost_their_closed_forms_in_any_mode(mode):
    linear, conv = torch.nn.Linear(6, 7), torch.nn.Conv2d(3, 8, 3, padding=1)
    q = torch.randn(2, 4, 32, 8)
    with mode(), counting() as count:
        linear(torch.ones(5, 4, 6))
    assert count.flops == 2 * 5 * 4 * 6 * 7
    with mode(), counting() as count:
        conv(torch.ones(2, 3, 10, 12))
    assert count.flops == 2 * 2 * 10 * 12 * 8 * 3 * 9
    with mode(), counting() as count:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert count.flops == 2 * 2 * (2 * 4 * 32 * 32 * 8)


@pytest.mark.parametrize(
    ("layers", "x", "forward", "first"),
    [
        ([torch.nn.Linear(6, 7), torch.nn.Linear(7, 4)], (5, 6), 2 * 5 * (6 * 7 + 7 * 4), 2 * 5 * 6 * 7),
        (
            [torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 1)],
            (2, 3, 10, 12),
            2 * 2 * 120 * (3 * 8 * 9 + 8 * 2),
            2 * 2 * 120 * 3 * 8 * 9,
        ),
    ],
    ids=["linear", "convolution"],
)
def test_backward_costs_twice_the_forward_less_the_gradient_of_the_input(layers, x, forward, first):
    with counting() as count:
        torch.nn.Sequential(*layers)(torch.randn(x)).sum().backward()
    assert count.flops == 3 * forward - first


@pytest.mark.long
@pytest.mark.timeout(300)
def test_workers_and_stages_tell_the_same(tmp_path):
    jobs = [{"folder": str(tmp_path / f"{{}}-{stage}"), "stage": stage, "micro_steps": 2} for stage in (0, 1, 2, 3)]
    jobs += [{"folder": str(tmp_path / "{}-bf16"), "stage": 2, "config": {"precision": "bf16"}}]
    jobs += [{"folder": str(tmp_path / "{}-again"), "stage": 2, "recompute": True}]
    jobs += [{"folder": str(tmp_path / "{}-late"), "stage": 1, "task": "tests.infra.train.toy:Pair"}]
    for world in (1, 2):
        run_workers(tmp_path, world, [job | {"folder": job["folder"].format(world)} for job in jobs])
        for name in (0, 1, 2, 3, "bf16", "again"):
            assert told(tmp_path / f"{world}-{name}", 12) == {"training_flops": 120 * BY_ROW}, (world, name)
        assert told(tmp_path / f"{world}-late", 12) == {"training_flops": (120 + 80) * BY_ROW}


@pytest.mark.long
@pytest.mark.timeout(120)
def test_a_training_cut_on_one_worker_goes_on_on_two(tmp_path):
    job = {"folder": str(tmp_path / "cut"), "stage": 1, "task": f"{__name__}:Grows"}
    config = {"steps": 24, "save_every_steps": 3}
    run_workers(tmp_path, 1, [job | {"config": config | {"steps": 24}}])
    whole = told(tmp_path / "cut", 24)
    for step in (24, 21):  # as a killed group leaves it
        for each in (tmp_path / "cut" / f"{step:09d}").iterdir():
            each.unlink()
    assert not (tmp_path / "cut" / f"{24:09d}" / "commit.json").exists()
    run_workers(tmp_path, 2, [job | {"config": config, "folder": str(tmp_path / "cut")}])
    assert told(tmp_path / "cut", 24) == whole


def test_the_share_of_the_peak(monkeypatch):
    flops = Flops(1)
    with flops.counted(NET, 0, 2):
        torch.randn(2, 1000) @ torch.randn(1000, 500)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    figures = flops.figures(1e9, 4)
    assert figures["model_flops_per_second"] == 1e15
    assert figures["model_flops_utilization"] == pytest.approx(1e15 / (4 * 989e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA T1000")
    assert flops.figures(1e9, 4).keys() == {"model_flops_per_second"}


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989), ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121), ("NVIDIA L40", 181), ("NVIDIA L40S", 362), ("NVIDIA A10", 125), ("Tesla T4", 65),
        ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-32GB", 112), ("NVIDIA GH200 480GB", 989),
        ("NVIDIA RTX A4000", math.nan), ("NVIDIA GeForce RTX 3090", math.nan), ("NVIDIA T400 4GB", math.nan),
    ],
)  # fmt: skip
def test_peaks_go_by_the_name_of_the_device(device, teraflops):
    found = peak(device)
    assert (math.isnan(teraflops) and found is None) or found == pytest.approx(teraflops * 1e12)
