"""Muon is torch's own, at every ZeRO stage and world size, saved and gone on with."""

import pytest
import torch
from torch import nn

from infra.train.optim import AdamW, OptimConfig, parameter_groups
from tests.infra.train import toy
from tests.infra.train.workers import distance, final_state, newest, run_workers

MOVED = "tests.infra.train.toy:Moved"
STAGES = (0, 1, 2, 3)


class Mixed(nn.Module):
    """A matrix of each sort."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.wide, self.tall = nn.Linear(8, 24), nn.Linear(24, 8, bias=False)
        self.square = nn.Linear(8, 8)
        self.conv = nn.Conv2d(8, 6, 3)
        self.place = nn.Parameter(torch.randn(1, 5, 8))
        self.tied = nn.Linear(8, 11, bias=False)
        self.tied.weight = self.embed.weight


def test_only_linear_and_convolution_layers_that_embed_nothing_are_muons():
    module = Mixed()
    groups = parameter_groups(module, OptimConfig(muon=True, weight_decay=0.1))
    names = {parameter: name for name, parameter in module.named_parameters()}
    moved = [group for group in groups if "shapes" in group]
    assert [[names[p] for p in group["params"]] for group in moved] == [
        ["wide.weight", "tall.weight", "square.weight", "conv.weight"]
    ]
    assert moved[0]["shapes"] == [(24, 8), (8, 24), (8, 8), (6, 8, 3, 3)]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    held = [names[p] for group in groups for p in group["params"]]
    assert sorted(held) == sorted(names.values())
    assert not any("shapes" in group for group in parameter_groups(module, OptimConfig()))


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_it_steps_as_torchs_muon_and_adamw_do(decay):
    torch.manual_seed(0)
    module, config = Mixed(), OptimConfig(lr=1e-2, muon=True, weight_decay=decay, ema_decay=0.9)
    twins = {name: nn.Parameter(parameter.detach().clone()) for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, config)
    ours = AdamW(groups, config)
    moved = set(groups[0]["params"])
    named = dict(module.named_parameters())
    # Torch's takes matrices alone: a convolution is one of its outputs against all that each sees.
    flat = {name: nn.Parameter(twins[name].detach().flatten(1)) for name in named if named[name] in moved}
    muon = torch.optim.Muon(flat.values(), lr=1e-2, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
    rest = [{"params": [twins[name]], "weight_decay": decay if named[name].dim() > 1 else 0.0}
            for name in named if name not in flat]  # fmt: skip
    adamw = torch.optim.AdamW(rest, lr=1e-2, betas=config.betas)
    for _ in range(20):
        for name, parameter in named.items():
            parameter.grad = torch.randn_like(parameter)
            twin = flat.get(name, twins[name])
            twin.grad = parameter.grad.view_as(twin).clone()
        ours.step()
        muon.step()
        adamw.step()
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.view_as(flat.get(name, twins[name])), flat.get(name, twins[name]))
    assert {frozenset(ours.state[named[name]]) for name in flat} == {frozenset({"step", "exp_avg", "ema"})}


def test_a_step_makes_singular_values_equal_at_the_size_of_a_step_of_adamw():
    torch.manual_seed(0)
    layer = nn.Linear(64, 16, bias=False)
    before = layer.weight.detach().clone()
    config = OptimConfig(lr=1.0, muon=True)
    optimizer = AdamW(parameter_groups(layer, config), config)
    layer.weight.grad = torch.randn(16, 64) * torch.logspace(0, -2, 16)[:, None]  # of very unequal rows
    optimizer.step()
    values = torch.linalg.svdvals(before - layer.weight.detach()) / (0.2 * 64**0.5)
    assert 0.6 < values.min() < values.max() < 1.3


@pytest.mark.timeout(240)
@pytest.mark.parametrize("world", [1, 2, pytest.param(3, marks=pytest.mark.long)])
def test_every_stage_trains_like_one_plain_process(tmp_path, world):
    jobs = [{"folder": str(tmp_path / f"{stage}"), "stage": stage, "micro_steps": 1 + stage % 2, "task": MOVED}
            for stage in STAGES]  # fmt: skip
    if world == 2:
        jobs += [{**jobs[stage], "folder": str(tmp_path / f"{stage}-host"), "offload": "optimizer"} for stage in (2, 3)]
    wanted, losses = toy.plain(str(tmp_path / "plain"), toy.Moved())
    assert losses[-1] < losses[0]
    assert sum(name.startswith("net/exp_avg_sq/") for name in wanted) < sum("/exp_avg/" in name for name in wanted)
    for job, found in zip(jobs, run_workers(tmp_path, world, jobs), strict=True):
        state = final_state(job["folder"])
        # Sums of gradients are rounded in another order, and then to bf16.
        assert found == pytest.approx(losses, rel=2e-3)
        assert state.keys() == wanted.keys()
        assert distance(state, wanted) < 5e-3
        assert newest(job["folder"]).meta["updates"]["net"] == {"optimizer_step": 12}


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("others", [1, 3])
def test_a_cut_run_is_bit_equal_and_what_is_saved_is_exact_at_any_stage_and_world_size(tmp_path, others):
    jobs = []
    for stage in STAGES:
        whole = {"folder": str(tmp_path / f"whole{stage}"), "stage": stage, "task": MOVED}
        cut = {**whole, "folder": str(tmp_path / f"cut{stage}"), "config": {"save_every_steps": 5}}
        jobs += [{**whole, "config": {"save_every_steps": 12}}, cut, {**cut, "do": "tear"}, cut]
    results = run_workers(tmp_path, 2, jobs)
    for stage in STAGES:
        losses, before, _, after = results[4 * stage : 4 * stage + 4]
        assert before == losses
        assert after == losses[-2:]
        state, whole = (final_state(tmp_path / f"{kind}{stage}") for kind in ("cut", "whole"))
        assert state.keys() == whole.keys()
        assert all(torch.equal(state[name], whole[name]) for name in whole)
    copies = [
        {"do": "copy", "task": MOVED, "folder": jobs[4 * stage]["folder"], "out": str(tmp_path / f"{stage}-{other}"),
         "stage": other}
        for stage in STAGES for other in STAGES
    ]  # fmt: skip
    run_workers(tmp_path, others, copies)
    for job in copies:
        wanted, copy = final_state(job["folder"]), final_state(job["out"])
        assert wanted.keys() == copy.keys()
        assert all(torch.equal(wanted[name], copy[name]) for name in wanted)
