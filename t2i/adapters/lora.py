"""LoRA: what a linear or convolution layer of a frozen network learns, at a low rank (arXiv 2106.09685), by `peft`."""

from collections.abc import Sequence

from torch import nn

from t2i.diffusion.prior import DiffusionPrior
from t2i.nn.weights import begins, constant


class LoRA(nn.Module):
    """W x + (alpha / rank) B A x for the layers whose names end in one of `layers`; B begins at zero.

    The matrices stand within the prior's network, so this module has no parameters of its own.
    """

    def __init__(self, layers: Sequence[str], rank: int = 4, alpha: float = 4.0) -> None:
        super().__init__()
        self._layers, self._rank, self._alpha = list(layers), rank, alpha

    def attach(self, prior: DiffusionPrior) -> None:
        """Inject the matrices. ValueError where no layer has such a name."""
        from peft import LoraConfig, inject_adapter_in_model  # slow to import, and seldom wanted

        config = LoraConfig(r=self._rank, lora_alpha=self._alpha, target_modules=self._layers)  # type: ignore[arg-type]
        inject_adapter_in_model(config, prior.network)
        for name, module in prior.network.named_modules():
            if ".lora_B." in f".{name}." and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
                begins(module, weight=constant(0.0))

    def begin(self, prior: DiffusionPrior) -> None:
        """A is drawn, and B zero, by their first weights."""
