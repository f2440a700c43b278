"""When training is started anew after a fault, and when it is given up."""

from collections.abc import Mapping

# What a program raises once it raises again: such a fault is told at once.
LASTING = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
ECHOES = ("closed by peer", "reset by peer", "Broken pipe", "NCCL", "gloo")  # what a worker says when another one falls


class Restarts:
    """Counts starts in a row that came no further than the one before."""

    def __init__(self, most: int, reached: int) -> None:
        self._most, self._reached, self._vain = most, reached, 0

    def again(self, failures: Mapping[int, BaseException], reached: int) -> bool:
        """Whether to start again after these failures of workers by rank, `reached` steps being committed by now."""
        if any(isinstance(failure, LASTING) for failure in failures.values()):
            return False
        self._vain = 0 if reached > self._reached else self._vain + 1
        self._reached = reached
        return self._vain <= self._most


def root(failures: Mapping[int, BaseException]) -> BaseException | None:
    """The failure that explains the others: when one worker falls, its peers' collectives break."""
    return min(failures.values(), key=lambda one: (not isinstance(one, LASTING), _is_echo(one)), default=None)


def _is_echo(failure: BaseException) -> bool:
    return any(word in str(failure) for word in ECHOES)


def sentence(error: BaseException | None) -> str:
    """The error's own last line, not the traceback around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
