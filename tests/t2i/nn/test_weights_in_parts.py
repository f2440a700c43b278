"""First weights of a model that is built in parts (`zero.Init` of ZeRO 3) are those of the whole one."""

import json
import os

import pytest
import torch

from t2i.conditions.words import WordsConfig
from t2i.nn.weights import fill_own, initialize
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.protocol import Space
from tests.infra.train.workers import run_workers


def build():
    config = AutoregressiveConfig(width=24, layers=2, heads=2, text_loss=True)
    return config.build(Space((2, 3), codes=7), (WordsConfig(vocabulary_size=9, length=5),))


def in_parts(jobs, result):
    """One worker: it holds a part of each parameter, which is put together to be filled, and to be told."""
    import deepspeed

    from infra.train import world, zero

    torch.set_num_threads(1)
    zero.start("gloo")
    with deepspeed.zero.Init(config_dict_or_path={"train_batch_size": 2, "zero_optimization": {"stage": 3}}):
        model = build()
    held = sum(parameter.ds_tensor.numel() for parameter in model.parameters())
    seen, told = set(), {}
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(own, modifier_rank=0):
            fill_own(module, name, 3, seen)
    for name, parameter in model.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            told[name] = parameter.detach().double().sum().item(), parameter.flatten()[-1].item()
    if world.rank() == 0:
        with open(result, "w") as file:
            json.dump({"held": held, "told": told}, file)
    world.gather(None)
    os._exit(0)


@pytest.mark.long
@pytest.mark.timeout(120)
def test_parts_are_those_of_the_whole(tmp_path):
    whole = build()
    initialize(whole, 3)
    found = run_workers(tmp_path, 2, [], work=in_parts)
    total = sum(parameter.numel() for parameter in whole.parameters())
    assert found["held"] < 0.6 * total
    wanted = {name: (each.double().sum().item(), each.flatten()[-1].item()) for name, each in whole.named_parameters()}
    assert found["told"].keys() == wanted.keys()
    for name, told in found["told"].items():
        assert told == pytest.approx(wanted[name], rel=1e-6, abs=1e-6), name
