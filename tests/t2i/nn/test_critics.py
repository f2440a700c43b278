"""Losses of critics in closed form, and a critic that is a constant."""

import math

import pytest
import torch
from torch import nn

from t2i.nn.critics import constant, judge, of_each, please

LOGITS = torch.tensor([[2.0, 0.5], [-0.3, -2.0]])


def test_losses_in_closed_form():
    assert judge(LOGITS, real=True).tolist() == pytest.approx([0.25, (1.3 + 3) / 2])
    assert judge(LOGITS, real=False).tolist() == pytest.approx([(3 + 1.5) / 2, 0.35])
    assert please(LOGITS).tolist() == pytest.approx([-1.25, 1.15])
    soft = [[math.log1p(math.exp(-value)) for value in row] for row in LOGITS.tolist()]
    assert judge(LOGITS, real=True, kind="vanilla").tolist() == pytest.approx([sum(row) / 2 for row in soft])
    assert please(LOGITS, "vanilla").tolist() == pytest.approx([sum(row) / 2 for row in soft])
    other = [(sum(row) + sum(values)) / 2 for row, values in zip(soft, LOGITS.tolist(), strict=True)]
    assert judge(LOGITS, real=False, kind="vanilla").tolist() == pytest.approx(other)


@pytest.mark.parametrize("kind", ["hinge", "vanilla"])
def test_what_pleases_is_what_a_critic_takes_for_real(kind):
    """Both sides pull logits apart."""
    logits = torch.zeros(1, 3, requires_grad=True)
    (of_maker,) = torch.autograd.grad(please(logits, kind).sum(), logits)
    (of_critic,) = torch.autograd.grad(judge(logits, real=False, kind=kind).sum(), logits)
    assert (of_maker < 0).all()
    assert (of_critic > 0).all()


def test_a_constant_has_no_gradient_and_remembers_nothing():
    torch.manual_seed(0)
    critic = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), nn.BatchNorm1d(3)).train()
    before = {name: value.clone() for name, value in critic.state_dict().items()}
    x = torch.randn(5, 4, requires_grad=True)
    constant(critic, x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0
    assert all(parameter.grad is None for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())
    critic(x)
    assert not all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


def test_a_loss_is_called_by_its_critic_where_there_are_several():
    assert of_each("hinge", 1) == ["hinge"]
    assert of_each("hinge", 3) == ["hinge_0", "hinge_1", "hinge_2"]
    assert of_each("hinge", 0) == []
