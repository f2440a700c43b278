"""The loss scale of fp16: one number, the same on every worker, that a checkpoint restores exactly."""

from typing import Any

START = 2.0**16
PATIENCE = 2000  # steps that go well before a larger scale is tried


class LossScale:
    """Losses are multiplied by it so that small gradients do not vanish in fp16 (arXiv 1710.03740, section 3.2).

    It halves after every step whose gradient is no finite number, which is then left out, and doubles after
    `PATIENCE` steps that went well. DeepSpeed's own (0.19.8) will not do: with the one of its autocast, gradients are
    clipped before they are divided by the scale, and each worker judges its own part alone; with the one of its fp16
    mode, they are divided by the scale of the next step.
    """

    def __init__(self, value: float = START, good_steps: int = 0) -> None:
        self.value, self._good_steps = value, good_steps

    def update(self, finite: bool) -> None:
        """After a step. Raises FloatingPointError where a smaller scale cannot help: the gradient itself is broken."""
        if not finite:
            if self.value <= 1:
                raise FloatingPointError(
                    "The gradient is no finite number even with a loss scale of 1. Lower the learning rate, or train "
                    "in bf16 or fp32."
                )
            self.value, self._good_steps = self.value / 2, 0
            return
        self._good_steps += 1
        if self._good_steps == PATIENCE:
            self.value, self._good_steps = self.value * 2, 0

    def meta(self) -> dict[str, Any]:
        """All there is to know of it, for a checkpoint: the arguments of another that goes on just so."""
        return {"value": self.value, "good_steps": self._good_steps}
