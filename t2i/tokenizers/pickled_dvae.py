"""OpenAI's dVAE from the pickled modules that it was published as, without their code.

Their files name classes of the package dall_e and of torch.nn. In the place of each an empty object takes what the file
says of it, and torch's reader of weights alone knows no other name: what a file asks for beside is refused.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from t2i.tokenizers import layouts, sizes
from t2i.tokenizers.dvae import DVAE

NAMES = (
    "dall_e.encoder.Encoder",
    "dall_e.encoder.EncoderBlock",
    "dall_e.decoder.Decoder",
    "dall_e.decoder.DecoderBlock",
    "dall_e.utils.Conv2d",
    "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.linear.Identity",
    "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
)


class Husk:
    """What stands for a module: its weights and its parts are all that is looked at."""

    _parameters: dict[str, Any]
    _modules: dict[str, Any]

    def weights(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights by name."""
        for name, value in self._parameters.items():
            yield prefix + name, value.detach()
        for name, part in self._modules.items():
            yield from part.weights(f"{prefix}{name}.")


def load_pickled(encoder: Path, decoder: Path) -> DVAE:
    """The dVAE of `encoder.pkl` and `decoder.pkl`; ValueError where a file holds anything else."""
    theirs: dict[str, torch.Tensor] = {}
    for name, file in (("encoder", encoder), ("decoder", decoder)):
        theirs |= _read(file, name)
    files = f"{encoder} and {decoder}"
    try:
        config, ours = sizes.of_dalle(theirs), layouts.of_dalle(theirs)
    except KeyError as error:
        raise ValueError(f"{files} lack {error}.") from error
    tokenizer = DVAE(config)
    wanted = {name: value.shape for name, value in tokenizer.state_dict().items()}
    if wrong := {name for name, shape in wanted.items() if name not in ours or ours[name].shape != shape}:
        raise ValueError(f"{files} lack {len(wrong)} weights of a dVAE like this, such as {min(wrong)}, or its shape.")
    tokenizer.load_state_dict(ours)
    return tokenizer


def _read(file: Path, part: str) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals([(Husk, name) for name in NAMES]):
        try:
            found = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(
                f"{file} cannot be read as the {part} of OpenAI's dVAE, of whose classes alone objects are made: "
                f"{str(error)[:200]}"
            ) from error
    if not isinstance(found, Husk):
        raise ValueError(f"{file} is not the {part} of OpenAI's dVAE: it holds a {type(found).__name__}.")
    return dict(found.weights(f"{part}."))
