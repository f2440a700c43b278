"""Model FLOPs agree with closed forms and with torch's own counter, and counting changes nothing."""

import math
from contextlib import nullcontext

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from infra.train import loop
from infra.train.flops import Flops, peak
from infra.train.recompute import recompute
from t2i.conditions.words import WordsConfig
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.protocol import Space
from tests.infra.train import toy

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
    flops = Flops()
    with flops.counted("prior", rows):
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
    x, flops = torch.randn(3, 16), Flops()
    with flops.counted("net", 3):
        with torch.no_grad():
            seen = frozen(x)
        head(seen).sum().backward()
    assert flops.figures(1.0, 1)["model_flops_per_second"] == 2 * 16 * 8 + 2 * 2 * 8 * 4


def test_torchs_fused_attention_counts_on_the_cpu_too():
    q, k, v = (torch.randn(2, 4, 32, 8, requires_grad=True) for _ in range(3))
    flops = Flops()
    with flops.counted("net", 1):
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
    monkeypatch.setattr(Flops, "counted", lambda *_: nullcontext())
    plain, plain_losses = toy.plain(str(tmp_path / "plain"))
    assert losses == plain_losses
    assert all(torch.equal(state[name], plain[name]) for name in plain)


def test_an_update_is_counted_once_and_a_late_one_when_it_wakes(tmp_path, monkeypatch):
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


def test_the_share_of_the_peak(monkeypatch):
    flops = Flops()
    with flops.counted("net", 2):
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
