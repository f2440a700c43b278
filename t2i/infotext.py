"""How a picture was drawn, in the words that viewers of generated pictures read: the text `parameters` of a PNG."""

import json
from typing import Any

PARAMETERS = "parameters"  # the keyword under which they look for it


def infotext(
    prompt: str, negative: str, seed: int, size: tuple[int, int], sampling: Any, model: str, sha256: str
) -> str:
    """The prompt, what was not wanted, and a line of settings, as AUTOMATIC1111's web UI writes and parses them.

    `size` is (height, width) in pixels, `sampling` the config of a prior's family, whose fields by other names than
    theirs come under their own. Of the weights' hash stand the first 10 digits there.
    """
    height, width = size
    codes = not hasattr(sampling, "steps")  # drawn one after another
    told: dict[str, Any] = {} if codes else {"Steps": sampling.steps}
    drawn = "Greedy" if getattr(sampling, "temperature", 1) == 0 else "Multinomial"
    told["Sampler"] = drawn if codes else getattr(sampling, "sampler", "ancestral")
    told |= {"CFG scale": f"{sampling.guidance:g}", "Seed": seed, "Size": f"{width}x{height}"}
    told |= {"Model hash": sha256[:10], "Model": model}
    known = ("steps", "sampler", "guidance")
    more = {
        name: value for name, value in vars(sampling).items() if name not in known and value not in (None, "", {}, ())
    }
    told |= {name.replace("_", " ").capitalize(): value for name, value in more.items()}
    line = ", ".join(f"{name}: {_quoted(str(value))}" for name, value in told.items())
    return "\n".join([prompt, *([f"Negative prompt: {negative}"] if negative else []), line])


def _quoted(value: str) -> str:
    """As JSON where it would be taken for several settings."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False) if any(mark in value for mark in ',:\n"') else value
