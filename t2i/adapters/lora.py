"""LoRA: what a linear or convolution layer of a frozen network learns, at a low rank (arXiv 2106.09685), by `peft`."""

import warnings
from collections.abc import Sequence

from torch import nn

from t2i.diffusion.prior import DiffusionPrior
from t2i.nn.weights import begins, constant


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x for the layers whose names end in one of `layers`; B begins at zero.

    The matrices stand within the prior's network, so this module has no parameters of its own.
    """

    def __init__(self, layers: Sequence[str], rank: int = 4, alpha: float = 4.0, name: str = "lora") -> None:
        super().__init__()
        self._layers, self._rank, self._alpha, self._name = list(layers), rank, alpha, name

    def attach(self, prior: DiffusionPrior) -> None:
        """Inject the matrices, beside those of others. ValueError where no layer has such a name."""
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and seldom wanted
        from peft.tuners.lora import LoraLayer

        network = prior.network
        if any(isinstance(layer, LoraLayer) and self._name in layer.lora_A for layer in network.modules()):
            raise ValueError(f"The network has a LoRA called '{self._name}' already: give this one another name.")
        config = LoraConfig(r=self._rank, lora_alpha=self._alpha, target_modules=self._layers)  # type: ignore[arg-type]
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that there are several is meant
            inject_adapter_in_model(config, network, adapter_name=self._name)
        for layer in network.modules():
            if isinstance(layer, LoraLayer):
                layer.set_adapter(list(layer.lora_A))  # all of them, not the last alone
                if self._name in layer.lora_B:
                    begins(layer.lora_B[self._name], weight=constant(0.0))

    def begin(self, prior: DiffusionPrior) -> None:
        """A is drawn, and B zero, by their first weights."""
