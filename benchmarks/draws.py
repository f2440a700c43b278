"""What do keyed random numbers cost, against PyTorch's own generator, alone and in a training step?

    python -m benchmarks.draws

`alone`: nanoseconds a number of normals, uniforms and dropout masks, and of torch's, for latents, for pictures (and
activations of that size) and for one row, on one thread. `step`: one training step (forward, backward, AdamW) of a
pre-norm transformer that predicts the noise of latents, with a dropout after each attention and each network; its
noise, times and dropout masks are keyed, or torch's. The two run in turns, now one first and now the other; the median
of the ratios of pairs counts.
`cuda` is the same where there is a GPU. Prints one JSON object.
"""

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import tyro
from torch import nn
from torch.nn import functional

from t2i.nn.dropout import Dropout
from t2i.nn.transformer import Block, rotary
from t2i.random import keys_of, normals, uniforms

SHAPES = {"latents": (16, 4 * 32 * 32), "pictures": (16, 3 * 64 * 64), "one": (1, 4096)}


@dataclass(frozen=True, kw_only=True)
class Config:
    pairs: int = 60
    warm: int = 5
    batch: int = 16
    width: int = 192
    layers: int = 6
    dropout: float = 0.1


class Denoiser(nn.Module):
    """Predicts the noise of latents (B, S, 4) of S = 64 patches."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.enter = nn.Linear(16, config.width)
        self.blocks = nn.ModuleList(Block(config.width, config.width // 32) for _ in range(config.layers))
        self.drops = nn.ModuleList(Dropout(config.dropout, str(place)) for place in range(2 * config.layers))
        self.leave = nn.Linear(config.width, 16)
        self.register_buffer("turns", rotary(torch.cartesian_prod(torch.arange(8), torch.arange(8)), 32))

    def forward(self, x: torch.Tensor, drop: Callable[[Dropout, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        x = self.enter(x)
        for block, first, second in zip(self.blocks, self.drops[::2], self.drops[1::2], strict=True):
            x = x + drop(first, block.attention(block.norm_attention(x), self.turns, None))
            x = x + drop(second, block.down(functional.relu(block.up(block.norm_mlp(x))).square()))
        return self.leave(x)


def clock(work: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(ours: Callable[[], Any], theirs: Callable[[], Any], config: Config, device: str) -> dict[str, float]:
    """Milliseconds of both, medians; and the median of ratios of pairs, with its quartiles."""
    for _ in range(config.warm):
        ours(), theirs()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for pair in range(config.pairs):
        for name, work in (("ours", ours), ("theirs", theirs))[:: -1 if pair % 2 else 1]:
            seconds[name].append(clock(work, device))
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: round(statistics.median(each) * 1000, 4) for name, each in seconds.items()}
    return {**medians, "ratio": round(middle, 3), "quartiles": [round(low, 3), round(high, 3)]}  # type: ignore[dict-item]


def pairs_of(rows: int, count: int, device: str) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    keys, layer, x = keys_of(range(rows), device), Dropout(0.1, "layer"), torch.ones(rows, count, device=device)
    return {
        "normals": (lambda: normals(keys, (count,), "a", 1), lambda: torch.randn(rows, count, device=device)),
        "uniforms": (lambda: uniforms(keys, (count,), "a", 1), lambda: torch.rand(rows, count, device=device)),
        "dropout": (lambda: layer(x, keys, 1), lambda: functional.dropout(x, 0.1)),
    }


def alone(config: Config, device: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for name, (rows, count) in SHAPES.items():
        for kind, (ours, theirs) in pairs_of(rows, count, device).items():
            found = in_turns(ours, theirs, config, device)
            each = {side: round(found[side] * 1e6 / (rows * count), 2) for side in ("ours", "theirs")}
            figures[f"{kind}, {name} {rows}x{count}"] = {"ns": each, "ratio": found["ratio"]}
    return figures


def step(config: Config, device: str, dropout: bool) -> dict[str, float]:
    torch.manual_seed(0)
    model = Denoiser(config).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    data = torch.randn(config.batch, 64, 16, device=device)
    keys, count = keys_of(range(config.batch), device), iter(range(10**9))

    def train(keyed: bool) -> None:
        number = next(count)
        if keyed:
            noise, t = normals(keys, (64, 16), "noise", number), uniforms(keys, (), "time", number)
        else:
            noise, t = torch.randn_like(data), torch.rand(config.batch, device=device)

        def drop(layer: Dropout, x: torch.Tensor) -> torch.Tensor:
            if not dropout:
                return x
            return layer(x, keys, number) if keyed else functional.dropout(x, config.dropout)

        t = t[:, None, None]
        loss = (model((1 - t) * data + t * noise, drop) - noise + data).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return in_turns(lambda: train(True), lambda: train(False), config, device)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    figures: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    for device in devices:
        figures[device] = {
            "alone": alone(config, device),
            "step, noise and times": step(config, device, dropout=False),
            "step, dropout too": step(config, device, dropout=True),
        }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
