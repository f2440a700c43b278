"""Guidance: functions that take a denoiser and return one. They change what it predicts and leave its variance alone.

    denoise = classifier_free(process, apart(told, told_nothing), scale=7.5, rescale=0.7)
    denoise = thresholded(process, denoise, percentile=0.995)
    x_B = ddim(process, denoise, x_B, steps)

A negative prompt is what the second denoiser of a pair is told in place of nothing.
"""

import math
from collections.abc import Callable

import torch

from t2i.diffusion.process import Denoised, Denoiser, Process
from t2i.diffusion.samplers import Shift
from t2i.diffusion.schedules import alpha_sigma

Pair = Callable[[torch.Tensor, torch.Tensor], tuple[Denoised, Denoised]]  # what it says when told, and without
LogP = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t (B, ...), t (B,)) -> log p(condition | x_t) (B,)


def apart(told: Denoiser, without: Denoiser) -> Pair:
    """Two denoisers, one after the other. Where memory allows one pass over twice the rows, see `at_once`."""
    return lambda x, t: (told(x, t), without(x, t))


def at_once(denoise: Denoiser) -> Pair:
    """The pair of a denoiser that is told 2B rows: first what is asked, then without; both see the same x."""

    def pair(x: torch.Tensor, t: torch.Tensor) -> tuple[Denoised, Denoised]:
        prediction, share = denoise(torch.cat([x, x]), torch.cat([t, t]))
        (first, second), shares = prediction.chunk(2), (None, None) if share is None else share.chunk(2)
        return (first, shares[0]), (second, shares[1])

    return pair


def classifier_free(
    process: Process,
    pair: Pair,
    scale: float | torch.Tensor,
    *,
    interval: tuple[float, float] = (0.0, math.inf),
    alone: Denoiser | None = None,
    rescale: float = 0.0,
    channels: int | None = None,
) -> Denoiser:
    """without + scale (told - without) (arXiv 2207.12598): 1 is the plain conditional. `scale` may be one a row, (B,).

    `interval`: guide only where sigma / alpha lies within (low, high] (arXiv 2404.07724); elsewhere `alone`, if given,
    is asked in place of the pair. `rescale` is phi of arXiv 2305.08891, eq. 15-16: how far a row's standard deviation
    is moved back to that of the conditional. `channels`: guide only the first so many (DiT's samples: 3 of 4).
    """

    def guided(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        noise = torch.exp(-process.schedule.lambda_at(t))
        within_B = (interval[0] < noise) & (noise <= interval[1])
        if alone is not None and not within_B.any():
            return alone(x, t)
        (told, share), (without, _) = pair(x, t)
        rows = (-1, *[1] * (x.dim() - 1))
        scales = torch.where(within_B, scale, torch.ones_like(noise)).to(told.dtype).view(rows)
        mixed = without + scales * (told - without)
        if rescale:
            kept = _deviation(told) / _deviation(mixed).clamp(min=torch.finfo(mixed.dtype).tiny)
            mixed = mixed * (rescale * kept + 1 - rescale).view(rows)
        if channels is not None:
            mixed = torch.cat([mixed[:, :channels], told[:, channels:]], dim=1)
        # Outside it is the conditional to the bit, not up to rounding.
        return torch.where(within_B.view(rows), mixed, told), share

    return guided


def by_gradient(process: Process, denoise: Denoiser, log_p: LogP, scale: float) -> Denoiser:
    """epsilon - sigma scale grad log p(condition | x_t) (arXiv 2105.05233, algorithm 2), for the samplers of an ODE.

    Where nothing of the data is left (zero terminal SNR, a flow's first time) the denoiser is left alone.
    """
    gradient = shift_of(log_p, scale)

    def guided(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        prediction, share = denoise(x, t)
        lambda_ = process.schedule.lambda_at(t)
        alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
        nearer_B = (sigma**2 / alpha).where(alpha > 0, 0.0).to(x.dtype)
        return process.moved(prediction, nearer_B.view(-1, *[1] * (x.dim() - 1)) * gradient(x, t), lambda_), share

    return guided


def shift_of(log_p: LogP, scale: float) -> Shift:
    """scale grad log p(condition | x_t): for `ancestral`, which moves the mean by the variance times this."""

    def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(log_p(x, t).sum(), x)[0] * scale

    return gradient


def thresholded(process: Process, denoise: Denoiser, bound: float = 1.0, percentile: float | None = None) -> Denoiser:
    """The estimate of x_0 held within `bound`, for values that are: pixels.

    Static: clipped. Dynamic, with a `percentile` in (0, 1): clipped to s, that share of a row's absolute values but at
    least `bound`, and divided by s / bound (Imagen, arXiv 2205.11487, section 2.3).
    """
    if bound <= 0 or (percentile is not None and not 0 < percentile < 1):
        raise ValueError(f"A bound is above 0, and a percentile within (0, 1), not {bound} and {percentile}.")

    def guided(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        prediction, share = denoise(x, t)
        lambda_ = process.schedule.lambda_at(t)
        x0 = process.estimate(prediction, x, lambda_).x0
        s_B = x0.new_full((len(x),), bound)
        if percentile is not None:
            sizes_BN = x0.flatten(1).abs().to(torch.promote_types(x0.dtype, torch.float32))
            s_B = sizes_BN.quantile(percentile, dim=1).clamp(min=bound).to(x0.dtype)
        s = s_B.view(-1, *[1] * (x.dim() - 1))
        held = torch.minimum(torch.maximum(x0, -s), s) * (bound / s)
        return process.moved(prediction, held - x0, lambda_), share

    return guided


def held(process: Process, denoise: Denoiser, values: torch.Tensor, keep: torch.Tensor) -> Denoiser:
    """The estimate of x_0 is `values` where `keep` (bool, broadcast to x) says so: what is known stays, as in GLIDE."""

    def guided(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        prediction, share = denoise(x, t)
        lambda_ = process.schedule.lambda_at(t)
        x0 = process.estimate(prediction, x, lambda_).x0
        return process.moved(prediction, torch.where(keep, values - x0, 0.0), lambda_), share

    return guided


def _deviation(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).std(dim=1)
