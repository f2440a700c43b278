"""The logit-Laplace distribution of pixels, which lie within bounds (DALL-E's dVAE, arXiv 2102.12092, appendix A.3).

Shapes: B rows, images (B, 3, H, W) in [-1, 1]. A decoder says (B, 6, H, W): mu, then ln b; or mu alone, (B, 3, H, W),
where b is 1.
"""

import math

import torch

EPSILON = 0.1  # how far pixels are kept from 0 and 1, where the density has no end


def squeezed(images: torch.Tensor) -> torch.Tensor:
    """phi of eq. 4: from [-1, 1] into [epsilon, 1 - epsilon]."""
    return (images + 1) * ((1 - 2 * EPSILON) / 2) + EPSILON


def unsqueezed(values: torch.Tensor) -> torch.Tensor:
    """Back from [epsilon, 1 - epsilon] to [-1, 1], not clamped."""
    return (values - EPSILON) * (2 / (1 - 2 * EPSILON)) - 1


def pictures(output: torch.Tensor) -> torch.Tensor:
    """The image of a decoder's logits: phi^-1 of sigmoid(mu)."""
    return unsqueezed(output[:, :3].float().sigmoid())


def log_density(values: torch.Tensor, mu: torch.Tensor, log_b: torch.Tensor) -> torch.Tensor:
    """ln f(x | mu, b) of eq. 2, element by element, of x in (0, 1)."""
    distance = (torch.logit(values) - mu).abs()
    return -distance * (-log_b).exp() - log_b - math.log(2) - values.log() - torch.log1p(-values)


def negative_log_likelihood(output: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Of each row, (B,): the mean over pixels and channels, in nats."""
    with torch.autocast(output.device.type, enabled=False):
        mu, log_b = output[:, :3].float(), output[:, 3:].float()
        log_b = log_b if log_b.shape[1] else torch.zeros_like(mu)
        return -log_density(squeezed(images.float()), mu, log_b).flatten(1).mean(1)
