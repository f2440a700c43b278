"""All conditions of a prior as one module: what its network is told in training, when asked, and by guidance."""

from collections.abc import Collection, Sequence

import torch
from torch import nn

from t2i.protocol import Asked, Batch, Condition, ConditionConfig, Space, Told, joined, stacked

TAKEN = ("values", "weight", "id", "step", "noise_key")  # what else a batch has
DROPPED = "dropped_"  # before a condition's name: the column of a batch that says where its null is told


class Conditions(nn.Module):
    """The conditions of a prior, in the config's order.

    `hears` are the fields of Told that the network knows of: a condition that says another is a ValueError.
    """

    def __init__(self, configs: Sequence[ConditionConfig], width: int, space: Space, hears: Collection[str]) -> None:
        super().__init__()
        names = [config.name for config in configs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"Two conditions are called '{twice[0]}': give each a name of its own.")
        taken = (*TAKEN, *dir(nn.ModuleDict()))
        if unfit := [name for name in names if not name.isidentifier() or name.startswith(DROPPED) or name in taken]:
            raise ValueError(
                f"A condition's name is a word of its own, such as text or depth_map, but not '{unfit[0]}'."
            )
        self.each = nn.ModuleDict()
        for config in configs:
            condition = config.build(width, space)
            if unheard := sorted(condition.says - set(hears)):
                raise ValueError(
                    f"The condition '{config.name}' says {', '.join(unheard)}, which this network does not hear. "
                    f"It hears {', '.join(sorted(hears)) or 'nothing'}."
                )
            assert isinstance(condition, nn.Module)
            self.each[config.name] = condition
        self.guided = tuple(config.name for config in configs if config.drop != 0)  # that training drops

    def load(self, folder: str) -> None:
        """Have each condition take what it keeps in a local folder."""
        for condition in self._modules_of():
            condition.load(folder)

    @property
    def length(self) -> int:
        """Of all tokens of a row, at most."""
        return sum(condition.length for condition in self._modules_of())

    @property
    def channels(self) -> int:
        """Of all planes."""
        return sum(condition.channels for condition in self._modules_of())

    @property
    def saying_tokens(self) -> int:
        """How many conditions say tokens."""
        return sum("tokens" in condition.says for condition in self._modules_of())

    def forward(self, batch: Batch) -> Told:
        """What rows of a training are told: the null of a condition where its column `dropped_<name>` says so."""
        return joined(condition(batch, self.dropped(batch, condition.name)) for condition in self._modules_of())

    def dropped(self, batch: Batch, name: str) -> torch.Tensor:
        """Where (B,) a condition's null is told in training."""
        column = batch.get(DROPPED + name)
        return torch.zeros_like(batch["weight"], dtype=torch.bool) if column is None else column

    def asked(self, asked: Asked) -> Told:
        """What is asked for."""
        return self._told(asked)

    def without(self, asked: Asked, guided: Sequence[str] | None = None) -> Told:
        """What guidance moves away from: negative prompts, or the nulls, of the conditions that are `guided`.

        By default these are the ones that training drops. ValueError where there are none.
        """
        guided = self.guided if guided is None else guided
        if unknown := [name for name in guided if name not in self.each]:
            raise ValueError(f"There is no condition '{unknown[0]}' to guide by: there are {', '.join(self.each)}.")
        if not guided:
            raise ValueError("Guidance moves away from what is told without a condition, but training dropped none.")
        return self._told(asked, guided)

    def pair(self, asked: Asked, guided: Sequence[str] | None = None) -> Told:
        """`asked`, then `without`, as 2B rows: for one pass of the network over both."""
        return stacked(self.asked(asked), self.without(asked, guided))

    def _told(self, asked: Asked, guided: Collection[str] = ()) -> Told:
        """With the nulls, or what is negated, of the conditions that are `guided`."""
        away, told = {**asked.batch, **asked.without}, []
        device = next((column.device for column in asked.batch.values()), None)
        for condition in self._modules_of():
            negated = condition.name in guided and condition.name in asked.negated
            dropped = torch.full((asked.rows,), condition.name in guided and not negated, device=device)
            told.append(condition(away if negated else asked.batch, dropped))
        return joined(told)

    def _modules_of(self) -> list[Condition]:
        return list(self.each.values())  # type: ignore[arg-type]
