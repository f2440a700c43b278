"""OpenAI's dVAE from the pickled modules that it was published as, without their code.

Their files name classes of the package dall_e and of torch.nn. In the place of each an empty object takes what the file
says of it. Beside these only what tensors are made of is known, and what else a file asks for is refused.
"""

import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._utils import _rebuild_parameter, _rebuild_tensor_v2

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
TENSORS = {
    "collections.OrderedDict": OrderedDict,
    "builtins.set": set,
    "torch.device": torch.device,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
}


class Husk:
    """What stands for a module: its weights and its parts are all that is looked at."""

    dump_patches = False  # torch asks a class for it, whose source lies in a file of before version 1.6

    def weights(self, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights by name."""
        for name, value in vars(self).get("_parameters", {}).items():
            if isinstance(value, torch.Tensor):
                yield prefix + name, value.detach()
        for name, part in vars(self).get("_modules", {}).items():
            if isinstance(part, Husk):
                yield from part.weights(f"{prefix}{name}.")


class Unpickler(pickle.Unpickler):
    """One that imports nothing. Storages torch finds by itself, before it asks."""

    def find_class(self, module: str, name: str) -> Any:
        """What stands for a name; UnpicklingError where nothing does."""
        whole = f"{module.replace('__builtin__', 'builtins')}.{name}"
        if whole in NAMES:
            return Husk
        if whole not in TENSORS:
            raise pickle.UnpicklingError(f"it asks for {whole}")
        return TENSORS[whole]


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
    module = SimpleNamespace(
        __name__=__name__, Unpickler=Unpickler, load=lambda opened, **given: Unpickler(opened, **given).load()
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of before torch 1.6, that a husk's source is not that of its class
            found = torch.load(file, map_location="cpu", weights_only=False, pickle_module=module)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{file} cannot be read as the {part} of OpenAI's dVAE: {str(error)[:200]}") from error
    if not isinstance(found, Husk):
        raise ValueError(f"{file} is not the {part} of OpenAI's dVAE: it holds a {type(found).__name__}.")
    return dict(found.weights(f"{part}."))
