"""What the pages show of captions as a whole: figures with the words for them, as plain data for any template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

PHRASES = 8  # openings and runs of three words that are listed

Report = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Habit:
    """A figure of `Collapse.report`, at `path` in it, and what it warns of in a sentence."""

    path: tuple[str, ...]
    label: str
    warns: str
    kind: Literal["count", "share", "number", "ratio"]


HABITS = (
    Habit(
        path=("count",),
        label="Captions",
        warns="All captions that were accepted and say something; the figures below are of these.",
        kind="count",
    ),
    Habit(
        path=("begins_with_article",),
        label="Begin with “a” or “an”",
        warns="Near 100 %, a text-to-image model takes prompts that begin otherwise for strangers.",
        kind="share",
    ),
    Habit(
        path=("begins_with_capital",),
        label="Begin with a capital",
        warns="All or none teaches one way of writing, which prompts will not keep to.",
        kind="share",
    ),
    Habit(
        path=("lower_case",),
        label="All in lower case",
        warns="Near 100 %, names and signs have lost the capitals that prompts write them with.",
        kind="share",
    ),
    Habit(
        path=("final_stop",),
        label="End with a full stop",
        warns="All or none, and the stop itself tells this style from prompts.",
        kind="share",
    ),
    Habit(
        path=("duplicates",),
        label="Repeat another caption",
        warns="A caption that is said again, word for word, does not tell its image from the other.",
        kind="share",
    ),
    Habit(
        path=("words", "mean"),
        label="Words, mean",
        warns="A model draws best from prompts about as long as the captions that it was trained on.",
        kind="number",
    ),
    Habit(
        path=("words", "median"),
        label="Words, median",
        warns="Far from the mean, a few very long captions carry it.",
        kind="number",
    ),
    Habit(
        path=("words", "p95"),
        label="Words, 95th percentile",
        warns="What exceeds a text encoder's bound (CLIP's is 77 tokens) is cut off unseen.",
        kind="number",
    ),
    Habit(
        path=("distinct_1",),
        label="Distinct-1 (words)",
        warns="The share of words that are new; near 0, few words say everything. It falls as a corpus grows.",
        kind="ratio",
    ),
    Habit(
        path=("distinct_2",),
        label="Distinct-2 (pairs)",
        warns="The same of two words in a row; far below the alt text's, phrases are stock.",
        kind="ratio",
    ),
    Habit(
        path=("distinct_3",),
        label="Distinct-3 (runs of three)",
        warns="The same of three; near 0, whole captions follow one pattern.",
        kind="ratio",
    ),
)


def table(collapse: Mapping[str, Report]) -> list[dict[str, Any]]:
    """A row a figure: `label`, `warns`, `kind` and `values`, one a style in order; None where a style has no text."""
    return [
        {
            "label": habit.label,
            "warns": habit.warns,
            "kind": habit.kind,
            "values": [
                _at(report, habit.path) if report["count"] or habit.kind == "count" else None
                for report in collapse.values()
            ],
        }
        for habit in HABITS
    ]


def styles(collapse: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Of each style its `style`, `lengths`, [bin, captions, share of the captions] of each bin, and frequent phrases.

    The bins are those of all styles from the shortest caption to the longest, so that their bars can be compared.
    `openings` and `trigrams` are [words, count], `undercount` by how much those counts may be too low.
    """
    histograms = [report["words"]["histogram"] for report in collapse.values()]
    used = [name for name in (histograms or [{}])[0] if any(histogram[name] for histogram in histograms)]
    names = list(histograms[0]) if used else []
    names = names[names.index(used[0]) : names.index(used[-1]) + 1] if used else []
    return [
        {
            "style": style,
            "lengths": [
                [name, report["words"]["histogram"][name], report["words"]["histogram"][name] / max(report["count"], 1)]
                for name in names
            ],
            "openings": [list(entry) for entry in report["openings"][:PHRASES]],
            "trigrams": [list(entry) for entry in report["trigrams"][:PHRASES]],
            "undercount": max(report["undercount"].values()),
        }
        for style, report in collapse.items()
    ]


def faulty(faults: Mapping[str, Report]) -> list[dict[str, Any]]:
    """Of each style the report of `Faults`, with its `style`, the histogram by names and without what none reached."""
    return [{"style": style, **report, "histogram": _named(report["histogram"])} for style, report in faults.items()]


def _named(histogram: Sequence[Sequence[float]]) -> list[list[Any]]:
    most = max((place for place, (_, count) in enumerate(histogram) if count), default=-1)
    return [[f"at most {100 * end:g} %" if end else "none", count] for end, count in histogram[: most + 1]]


def _at(report: Report, path: tuple[str, ...]) -> float:
    found: Any = report
    for name in path:
        found = found[name]
    return found
