"""When training is started anew after a fault, where, and when it is given up."""

import time
from collections.abc import Callable, Mapping

from infra.trouble import is_device_error

FADE_SECONDS = 3600  # in which a fault comes to weigh half against its node
TOO_MUCH = 1.5  # where a fault weighs 1, or 2 if a device failed: that one, or two within an hour

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
ELSEWHERE = (*ECHOES, "The feed ", "could not save its part")  # no fault of the node where it is said


class Restarts:
    """Counts starts in a row that came no further than the one before."""

    def __init__(self, most: int, reached: int) -> None:
        self._most, self._reached, self._vain = most, reached, 0

    def again(self, failures: Mapping[int, BaseException], reached: int, elsewhere: bool = False) -> bool:
        """Whether to start again after these failures of workers by rank, `reached` steps being committed by now.

        Where the next group will do without the node at fault, `elsewhere`, the start was not in vain.
        """
        if any(isinstance(failure, LASTING) for failure in failures.values()):
            return False
        self._vain = 0 if reached > self._reached else self._vain + (not elsewhere)
        self._reached = reached
        return self._vain <= self._most


class Faults:
    """What befell groups of workers on which node: one bad node stops all of them. It fades, as nodes are mended."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._of: dict[str, tuple[float, float]] = {}  # how much weighs against a node, and since when

    def note(self, node: str, failure: BaseException | None) -> None:
        """The worker that fell first sat on this node, if known; a store or a feed that fails is held against none."""
        if not node or failure is None or isinstance(failure, OSError):
            return
        if not any(word in str(failure) for word in ELSEWHERE):
            self._of[node] = (self._weight(node) + (2 if is_device_error(failure) else 1), self._clock())

    def bad(self) -> frozenset[str]:
        """The nodes that are better done without for now."""
        return frozenset(node for node in self._of if self._weight(node) >= TOO_MUCH)

    def _weight(self, node: str) -> float:
        weight, since = self._of.get(node, (0.0, 0.0))
        return weight * 0.5 ** ((self._clock() - since) / FADE_SECONDS)


def root(failures: Mapping[int, BaseException]) -> BaseException | None:
    """The failure that explains the others: when one worker falls, its peers' collectives break."""
    return min(failures.values(), key=lambda one: (not isinstance(one, LASTING), _is_echo(one)), default=None)


def _is_echo(failure: BaseException) -> bool:
    return any(word in str(failure) for word in ECHOES)


def sentence(error: BaseException | None) -> str:
    """The error's own last line, not the traceback around it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
