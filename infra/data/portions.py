"""Cut work into portions that grow smaller, so that they are few and yet all actors end at about the same time."""

from collections.abc import Sequence


def split(names: Sequence[str], shares: int) -> list[list[str]]:
    """Names in portions, each a `shares`-th of what is left, rounded up, in order.

    There are at most 1 + shares * (1 + ln(names / shares)) portions, and the last shares - 1 are of one name, so that
    no actor has much left when the others have none (guided self-scheduling, Polychronopoulos and Kuck 1987). `shares`
    is some times the number of actors, each of which holds one portion.
    """
    portions: list[list[str]] = []
    start = 0
    while start < len(names):
        size = -(-(len(names) - start) // shares)
        portions.append(list(names[start : start + size]))
        start += size
    return portions
