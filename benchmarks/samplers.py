"""How fast does each sampler's error fall with the calls of the network?

    python -m benchmarks.samplers --picture docs/images/samplers.png

Data are two Gaussians on a line, so that the network of no error is known, and the true end of the ODE, too: in one
dimension it keeps every point's rank. 33 points of even rank are followed from the first place of a ladder to its last;
the error is the root of their mean squared distance from the truth, in units of the data. Three processes: EDM with
Karras' steps down to sigma 0.002, a flow with even steps from pure noise to data, and the cosine schedule with even
steps to its end. Float64 throughout: no figure depends on the machine. Prints one JSON object with errors and, between
the last two of each line, the slope; draws the lines.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from t2i.diffusion.ladder import Ladder, even, karras
from t2i.diffusion.process import Denoised, Process
from t2i.diffusion.samplers import ddim, dpm_solver_2m, dpm_solver_2s, heun
from t2i.diffusion.schedules import EDM, Cosine, Flow, alpha_sigma

MEANS, DEVIATION = torch.tensor([-0.6, 0.5], dtype=torch.float64), 0.15
RANKS = torch.linspace(0.02, 0.98, 33, dtype=torch.float64)
SAMPLERS = {"DDIM": ddim, "DPM-Solver++ 2S": dpm_solver_2s, "DPM-Solver++ 2M": dpm_solver_2m, "Heun": heun}
COLOURS = {"DDIM": "#8a8f98", "DPM-Solver++ 2S": "#c77c11", "DPM-Solver++ 2M": "#1a66b8", "Heun": "#a3195b"}
CASES: dict[str, tuple[Process, Callable[[int], Ladder]]] = {
    "EDM, Karras' steps": (Process(schedule=EDM(), prediction="v"), lambda n: karras(EDM(), n, to_zero=False)),
    "flow, even steps": (Process(schedule=Flow(), prediction="velocity"), lambda n: even(Flow(), n)),
    "cosine, even steps": (
        Process(schedule=Cosine(least=1e-4), prediction="v"),
        lambda n: even(Cosine(least=1e-4), n, to_zero=False),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Config:
    steps: tuple[int, ...] = (4, 8, 16, 32, 64, 128, 256, 512)
    picture: str = ""  # where to draw


def spread(process: Process, lambda_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    alpha, sigma = alpha_sigma(process.schedule.path, lambda_)
    return alpha, (alpha**2 * DEVIATION**2 + sigma**2).sqrt()


def denoiser(process: Process) -> Callable[[torch.Tensor, torch.Tensor], Denoised]:
    def denoise(x: torch.Tensor, t: torch.Tensor) -> Denoised:
        lambda_ = process.schedule.lambda_at(t)[:, None]
        alpha, deviation = spread(process, lambda_)
        offsets = x - alpha * MEANS
        shares = (-(offsets**2) / (2 * deviation**2)).softmax(dim=1)
        x0 = (shares * (MEANS + alpha * DEVIATION**2 * offsets / deviation**2)).sum(1, keepdim=True)
        _, sigma = alpha_sigma(process.schedule.path, lambda_)
        return process.target(x0, (x - alpha * x0) / sigma, lambda_[:, 0]), None

    return denoise


def places(process: Process, lambda_: torch.Tensor) -> torch.Tensor:
    """Where the points of each rank lie at lambda, by bisection."""
    alpha, deviation = spread(process, lambda_)
    low, high = torch.full_like(RANKS, -1e3), torch.full_like(RANKS, 1e3)
    for _ in range(120):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle[:, None] - alpha * MEANS) / deviation).mean(1) < RANKS
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low[:, None]


def measure(config: Config) -> dict[str, dict[str, list[tuple[int, float]]]]:
    figures: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for case, (process, ladder) in CASES.items():
        for name, sampler in SAMPLERS.items():
            for count in config.steps:
                steps = ladder(count)
                begun, truth = places(process, steps.lambdas[0]), places(process, steps.lambdas[-1])
                calls: list[int] = []
                denoise = denoiser(process)

                def counted(x: torch.Tensor, t: torch.Tensor, calls=calls, denoise=denoise) -> Denoised:
                    calls.append(1)
                    return denoise(x, t)

                error = (sampler(process, counted, begun, steps) - truth).square().mean().sqrt()
                figures.setdefault(case, {}).setdefault(name, []).append((len(calls), float(error)))
    return figures


def slope(points: list[tuple[int, float]]) -> float:
    (few, large), (many, small) = points[-2:]
    return math.log(large / small) / math.log(many / few)


def draw(figures: dict[str, dict[str, list[tuple[int, float]]]], path: str) -> None:
    """Both axes are logarithmic; drawn three times as large and scaled down, for smooth lines."""
    scale, width, height, left, top, bottom = 3, 400, 330, 58, 34, 44
    image = Image.new("RGB", (scale * (width * len(figures) + 10), scale * height), "white")
    pen, small = ImageDraw.Draw(image), ImageFont.load_default(11 * scale)
    low_x, high_x, low_y, high_y = math.log10(3), math.log10(1300), -6, 0.3

    for panel, (case, lines) in enumerate(figures.items()):
        x0 = panel * width + left

        def at(calls: float, error: float, x0: int = x0) -> tuple[float, float]:
            across = (math.log10(calls) - low_x) / (high_x - low_x)
            down = (high_y - math.log10(error)) / (high_y - low_y)
            return scale * (x0 + across * (width - left - 8)), scale * (top + down * (height - top - bottom))

        pen.text((scale * x0, scale * 10), f"{case}: error", fill="#222222", font=ImageFont.load_default(14 * scale))
        for power in range(low_y, 1):
            pen.line([at(10**low_x, 10.0**power), at(10**high_x, 10.0**power)], fill="#e4e6ea", width=scale)
            where = at(10**low_x, 10.0**power)
            label = "1" if power == 0 else f"1e{power}"
            pen.text((where[0] - 6 * scale, where[1]), label, fill="#555555", font=small, anchor="rm")
        for calls in (4, 16, 64, 256, 1024):
            pen.line([at(calls, 10.0**low_y), at(calls, 10.0**high_y)], fill="#e4e6ea", width=scale)
            where = at(calls, 10.0**low_y)
            pen.text((where[0], where[1] + 5 * scale), str(calls), fill="#555555", font=small, anchor="ma")
        where = at(64, 10.0**low_y)
        pen.text((where[0], where[1] + 22 * scale), "calls of the network", fill="#555555", font=small, anchor="ma")
        for row, (name, points) in enumerate(lines.items()):
            seen = [at(calls, max(error, 10.0**low_y)) for calls, error in points]
            pen.line(seen, fill=COLOURS[name], width=2 * scale, joint="curve")
            for x, y in seen:
                pen.ellipse([x - 3 * scale, y - 3 * scale, x + 3 * scale, y + 3 * scale], fill=COLOURS[name])
            x, y = at(10**low_x, 10.0**low_y)
            text = f"{name}: {slope(points):.2f}"
            place = (x + 8 * scale, y - (18 + 15 * (len(lines) - 1 - row)) * scale)
            pen.text(place, text, fill=COLOURS[name], font=small, stroke_width=3, stroke_fill="white")
    image = image.resize((image.width // scale * 2, image.height // scale * 2), Image.Resampling.LANCZOS)
    image.quantize(48, dither=Image.Dither.NONE).save(path, optimize=True)


def main(config: Config) -> None:
    torch.set_num_threads(1)
    figures = measure(config)
    if config.picture:
        draw(figures, config.picture)
    told = {
        case: {
            name: {
                "slope": round(slope(points), 2),
                "errors": {calls: float(f"{error:.3g}") for calls, error in points},
            }
            for name, points in lines.items()
        }
        for case, lines in figures.items()
    }
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config))
