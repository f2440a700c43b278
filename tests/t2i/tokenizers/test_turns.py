"""A critic's kinds and weights, in closed form."""

import pytest
import torch

from t2i.nn.critics import judge
from t2i.nn.weights import initialize
from t2i.pixels import scale
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.critic import Critic, CriticConfig
from t2i.tokenizers.losses import LossConfig
from t2i.tokenizers.patch_vqgan import PatchVQGANConfig
from t2i.tokenizers.turns import CriticTurn, GeneratorTurn

MODEL = PatchVQGANConfig(channels=8, groups=4, patch=2, quantizer=CodebookConfig(size=16, width=4))
AWAKE = {"channels": 8, "layers": 1, "start_step": 0}


def batch(rows=3):
    images = torch.randint(256, (rows, 3, 8, 12), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    return {"images": images, "weight": torch.ones(rows), "step": torch.tensor(0)}


def turns(losses, **critic):
    generator = GeneratorTurn(MODEL.build(), losses, [Critic(CriticConfig(**AWAKE, **critic))])
    modules = [each.module for each in generator.turns()]
    initialize(torch.nn.ModuleList(modules), 0)
    return modules


@pytest.mark.parametrize(("kind", "wanted"), [("hinge", 0.76666665), ("vanilla", 0.57164514)])
def test_a_critics_loss_of_known_logits(kind, wanted):
    real, made = torch.tensor([2.0, 0.5, -0.3]), torch.tensor([-2.0, 0.1, 0.7])
    both = judge(real.view(3, 1), True, kind) + judge(made.view(3, 1), False, kind)
    assert float(both.mean() / 2) == pytest.approx(wanted, abs=1e-7)


def test_a_critic_of_cross_entropy_is_called_so():
    generator, critic = turns(LossConfig(), adversary="vanilla")
    assert isinstance(critic, CriticTurn)
    assert critic.targets(batch()).keys() == critic(batch()).keys() == {"vanilla"}
    assert generator(batch()).keys() == generator.targets(batch()).keys()


def test_a_weight_of_known_gradients():
    generator, _ = turns(LossConfig())
    pulls = {"all_nll": torch.tensor([[3.0, 4.0]]), "all_adversarial": torch.tensor([[0.3, 0.4]])}
    plain = generator._sums(batch(), {"adversarial": generator._critics["adversarial"]})[0]["adversarial"]
    found = generator(batch() | pulls)["adversarial"]
    assert float((found / plain).detach()) == pytest.approx(0.8 * 9.9980001)


def test_a_critic_that_does_not_adapt_has_its_weight_and_asks_for_no_survey():
    generator, _ = turns(LossConfig(), adaptive=False, weight=0.1)
    assert [turn.mixes_rows for turn in generator.turns()] == [False, False]
    plain = generator._sums(batch(), {"adversarial": generator._critics["adversarial"]})[0]["adversarial"]
    torch.testing.assert_close(generator(batch())["adversarial"], plain * 0.1)


@pytest.mark.parametrize(("reconstruction", "reduction"), [(1.0, "mean"), (3.0, "mean"), (1.0, "sum")])
def test_the_weight_is_of_all_that_compares_pictures(reconstruction, reduction):
    """It follows the weighted sum, whatever that is reduced by."""
    generator, judging = turns(LossConfig(reconstruction=reconstruction, reduction=reduction))
    pixels = scale(batch()["images"])
    rebuilt = generator.tokenizer.reconstruct(generator.tokenizer.quantize(pixels).vectors)
    last = generator.tokenizer.last_layer
    rows = (rebuilt - pixels).abs().flatten(1)
    nll = reconstruction * (rows.sum(1) if reduction == "sum" else rows.mean(1)).sum()
    (of_nll,) = torch.autograd.grad(nll, last, retain_graph=True)
    (plain,) = torch.autograd.grad(judging.critic(rebuilt).flatten(1).mean(1).sum(), last)
    (of_critic,) = torch.autograd.grad(generator(batch())["adversarial"], last)
    torch.testing.assert_close(of_critic.norm(), 0.8 * of_nll.norm() * plain.norm() / (plain.norm() + 1e-4))


def test_losses_that_cannot_be_are_told():
    with pytest.raises(ValueError, match="learns from a loss of pictures"):
        LossConfig(reconstruction=0)
    with pytest.raises(ValueError, match="less than 0"):
        LossConfig(commitment=-1)
    with pytest.raises(ValueError, match="says pixels, not logits"):
        GeneratorTurn(MODEL.build(), LossConfig(logit_laplace=0.1))
