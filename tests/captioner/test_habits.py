from hypothesis import given
from hypothesis import strategies as st

from captioner.collapse import describe
from captioner.faults import Faults
from captioner.habits import HABITS, faulty, styles, table

captions = st.lists(st.none() | st.text("aA .\n", max_size=60), max_size=20)
corpora = st.dictionaries(st.text(max_size=5), captions, max_size=4)


def figures(report, before=()):
    """The paths of all single figures of a report."""
    for name, value in report.items():
        if isinstance(value, dict):
            yield from figures(value, (*before, name))
        elif not isinstance(value, list):
            yield (*before, name)


def test_every_figure_is_shown_with_a_warning_of_one_sentence():
    paths = {path for path in figures(describe(["a b"])) if "histogram" not in path}
    shown = {habit.path for habit in HABITS}
    assert paths - shown == {("blank",), ("undercount", "openings"), ("undercount", "trigrams")}
    assert shown < paths
    assert len({habit.label for habit in HABITS}) == len(HABITS)
    assert all(habit.warns.endswith(".") and habit.warns[0].isupper() for habit in HABITS)


@given(corpora)
def test_a_table_has_a_value_a_style(texts):
    reports = {style: describe(lines) for style, lines in texts.items()}
    rows = table(reports)
    assert [len(row["values"]) for row in rows] == [len(texts)] * len(HABITS)
    for row in rows:
        for value, report in zip(row["values"], reports.values(), strict=True):
            if value is None:
                assert report["count"] == 0
                assert row["kind"] != "count"
            else:
                assert report["count"] or value == 0
                assert row["kind"] not in ("share", "ratio") or 0 <= value <= 1


@given(corpora)
def test_bars_are_of_common_bins_and_hold_every_caption(texts):
    reports = {style: describe(lines) for style, lines in texts.items()}
    shown = styles(reports)
    assert [one["style"] for one in shown] == list(texts)
    bins = [[name for name, *_ in one["lengths"]] for one in shown]
    assert all(names == bins[0] for names in bins)
    for one in shown:
        assert sum(count for _, count, _ in one["lengths"]) == reports[one["style"]]["count"]
        assert abs(sum(share for *_, share in one["lengths"]) - bool(reports[one["style"]]["count"])) < 1e-9
    if bins and bins[0]:  # no bin that is empty in all styles stands at an end
        assert all(any(one["lengths"][end][1] for one in shown) for end in (0, -1))


def test_rates_are_named():
    faults = Faults()
    for flagged in (0, 1, 3):
        faults.add(str(flagged), ["empty"] * flagged + [None] * (200 - flagged))
    (shown,) = faulty({"short": faults.report()})
    assert shown["histogram"] == [["none", 1], ["at most 0.1 %", 0], ["at most 1 %", 1], ["at most 2 %", 1]]
    assert faulty({"short": Faults().report()})[0]["histogram"] == []
