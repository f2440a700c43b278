"""Whether a run goes on, and where: what ends it is a rate, and a node that fails again and again is left out."""

import sys
from collections.abc import Callable
from typing import NamedTuple

MAX_BAD = 16  # items that failed beyond those that went well: no few bad shards but a broken set-up
MAX_AWAY = 4  # the same of a server that fails or refuses, or a full disk: the others would fare no better
STRIKES = 3  # in a row, and over as many shards, are a place's own fault where another has none

# How an item ended: it is done; there was nothing left to do but to merge it; it raised; too many processes died over
# it; its files' place is away; a bound of the run is reached; no process could be set up for it; its process's device
# failed; it was not tried, since that had happened before.
WELL, IDLE, RAISED, SPENT, AWAY, HALT = "well", "idle", "raised", "spent", "away", "halt"
SETUP, BROKEN, BACK = "setup", "broken", "back"


class Place(NamedTuple):
    """Where a process works: the id of a node, its name, and the numbers of the process's GPUs there, as `0,1`."""

    node: str
    host: str
    gpus: str

    def __str__(self) -> str:
        return f"Node {self.node[:12]} ({self.host})"


class Rate:
    """Over as soon as some stretch of outcomes has more failures than what went well and `most` (Page's CUSUM, 1954).

    So a run that fails throughout is over after `most` + 1, and one that fails less than half the time goes on.
    """

    def __init__(self, most: int) -> None:
        self.over, self._most, self._beyond = False, most, 0

    def told(self, well: bool) -> None:
        """The next outcome."""
        self._beyond = max(0, self._beyond + (-1 if well else 1))
        self.over = self.over or self._beyond > self._most


class Health:
    """What a driver learns from how items end; `nodes` asks which nodes could do the work, by their ids."""

    def __init__(self, nodes: Callable[[], set[str]]) -> None:
        self.well: set[Place] = set()  # places that did something well
        self.out: dict[str, str] = {}  # nodes that are left out, by id, and why, in a sentence
        self._nodes, self._bad, self._away, self._broken = nodes, Rate(MAX_BAD), Rate(MAX_AWAY), False
        self._strikes: dict[Place, set[object]] = {}  # since something went well there: what failed there
        self._moves = False

    def begin(self) -> None:
        """A round begins, of which nothing went well yet."""
        self._moves = False

    @property
    def over(self) -> bool:
        """Whether to give up."""
        return self._bad.over or self._away.over or self._broken

    def heard(self, place: Place, shard: str, ended: str, why: str = "", news: bool = True) -> bool:
        """Note how an item of a shard ended; whether that says something of the item, and not of its place alone.

        Without `news` a device failed over a shard that is known for it, which says nothing of the run.
        """
        if ended in (IDLE, BACK, HALT):  # of a bound others hear by themselves, when what they are at is done
            return False
        if ended == WELL:
            self._moves = True
            self.well.add(place)
            self._strikes[place] = set()
        elif ended in (SETUP, BROKEN):
            strikes = self._strikes.setdefault(place, set())
            strikes.add(shard if ended == BROKEN else len(strikes))
            sound = self._sound()
            if len(strikes) >= STRIKES and sound:
                if place.node not in self.out and sound - {place.node}:
                    self._leave_out(place, len(strikes), why)
                if place.node in self.out or self._moves:
                    return False  # a bad card of a good node: others do what it gives back
            self._broken = ended == SETUP and len(strikes) >= STRIKES and not self.well
        if ended == AWAY:
            self._away.told(well=False)
        elif news:
            self._bad.told(ended == WELL)
            if ended == WELL:
                self._away.told(well=True)
        return ended != SETUP

    def _sound(self) -> set[str]:
        """The nodes that have a place which did not fail lately, or of which nothing was heard yet."""
        nodes = self._nodes() - self.out.keys()
        unheard = nodes - {place.node for place in self._strikes}
        return unheard | {place.node for place, strikes in self._strikes.items() if not strikes and place.node in nodes}

    def _leave_out(self, place: Place, times: int, why: str) -> None:
        why = why.rstrip(".")
        sentence = f"{place} is left out: what it did failed {times} times in a row, the last time with {why}."
        self.out[place.node] = sentence
        print(f"rescribe: {sentence} The other nodes go on.", file=sys.stderr, flush=True)
