from hypothesis import given
from hypothesis import strategies as st

from infra.data.health import AWAY, BACK, BROKEN, MAX_BAD, RAISED, SETUP, WELL, Health, Place, Rate

A, B = Place("a" * 20, "one", ""), Place("b" * 20, "two", "")


def health(*places):
    return Health(lambda: {place.node for place in places})


@given(st.lists(st.booleans(), max_size=60), st.integers(0, 5))
def test_a_rate_is_over_when_some_stretch_has_too_many_failures(outcomes, most):
    rate = Rate(most)
    for number, well in enumerate(outcomes, 1):
        rate.told(well)
        sums = [2 * outcomes[first:number].count(False) - (number - first) for first in range(number)]
        assert rate.over == (max(sums) > most) or rate.over, "what is over stays so"
        if rate.over:
            assert any(
                2 * outcomes[first:end].count(False) - (end - first) > most
                for end in range(1, number + 1)
                for first in range(end)
            )
            break
        assert max(sums) <= most


def test_what_fails_throughout_ends_soon_and_what_fails_now_and_then_goes_on():
    run = health(A)
    for number in range(MAX_BAD):
        run.heard(A, str(number), RAISED)
    assert not run.over
    run.heard(A, "17", RAISED)
    assert run.over
    run = health(A)
    for number in range(10_000):
        run.heard(A, str(number), RAISED if number % 3 == 0 else WELL)
    assert not run.over


def test_a_store_that_is_away_ends_a_run_sooner():
    run = health(A)
    for _ in range(100):
        run.heard(A, "0", AWAY)
        run.heard(A, "0", WELL)
    assert not run.over
    for _ in range(5):
        assert not run.over
        run.heard(A, "0", AWAY)
    assert run.over


def test_a_node_that_fails_alone_is_left_out_and_named(capsys):
    run = health(A, B)
    for number in range(50):  # once in a while is no matter
        run.heard(A, "7", BROKEN, "ill")
        run.heard(A, "8", BACK)
        run.heard(A, str(number), WELL)
    assert not run.out
    run.heard(A, "100", BROKEN, "ill")
    run.heard(A, "100", BROKEN, "ill")
    run.heard(A, "101", BROKEN, "ill")
    assert not run.out, "over two shards only"
    assert run.heard(A, "102", BROKEN, "the end.") is False
    assert run.out.keys() == {A.node}
    assert run.out[A.node] == (
        "Node aaaaaaaaaaaa (one) is left out: what it did failed 3 times in a row, the last time with the end."
    )
    assert capsys.readouterr().err == f"rescribe: {run.out[A.node]} The other nodes go on.\n"
    for number in range(3):  # it is the last one: nothing is left out, and failures count
        assert run.heard(B, str(number), BROKEN, "ill") is True
    assert run.out.keys() == {A.node}


def test_where_all_fail_no_node_is_to_blame():
    run = health(A, B)
    for number in range(8):
        for place in (A, B):
            assert run.heard(place, str(number), BROKEN) is True
    assert not run.out
    run.heard(A, "8", BROKEN)
    assert run.over


def test_one_bad_card_of_a_node_ends_nothing_though_it_fails_more_often_than_the_others_do_well():
    bad, good = A._replace(gpus="0"), A._replace(gpus="1")
    run = health(A)
    run.heard(good, "0", WELL)
    counted = [run.heard(bad, str(number), BROKEN) for number in range(100)]
    assert counted.count(True) == 2
    assert not run.over
    assert not run.out


def test_a_set_up_that_fails_everywhere_ends_at_once():
    run = health(A)
    for number in range(3):
        assert not run.over
        assert run.heard(A, str(number), SETUP) is False
    assert run.over


def test_a_set_up_that_fails_on_one_node_is_no_word_on_the_others():
    run = health(A, B)
    for number in range(3):
        run.heard(A, str(number), SETUP, "no driver.")
    assert run.out.keys() == {A.node}
    assert not run.over
    run.heard(B, "0", WELL)
    for number in range(12):
        run.heard(B, str(number), SETUP)
        assert not run.over, "it went well before: it may again"
