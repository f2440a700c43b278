"""What does not fit is halved at once, remembered, and grows back seldom; a single row that does not fit ends it."""

from types import SimpleNamespace

import pytest

from infra import storage
from infra.cluster import Cluster
from infra.train.limits import CALM_STEPS, Limits
from infra.train.loop import DoesNotFitError


@pytest.fixture
def out(tmp_path):
    return str(tmp_path / "out")


def of(out):
    said = []
    return Limits([SimpleNamespace(out=out)], said.append), said  # type: ignore[list-item]


def too_many(rows, out):
    return DoesNotFitError(f"{rows} rows at once do not fit.", rows, out)


def test_half_as_many_are_taken_and_the_next_run_knows_it(out):
    limit, said = of(out)
    assert limit.most() == {out: 0}
    for rows, most in [(64, 32), (32, 16), (5, 2), (3, 1)]:
        limit.failed(too_many(rows, out))
        assert limit.most() == {out: most} == of(out)[0].most()
    assert said[-1] == "3 rows at once do not fit. From now on 1 are taken at once; the results are the same."
    with pytest.raises(RuntimeError, match="a single row does not fit"):
        limit.failed(too_many(1, out))


def test_it_grows_back_where_it_was_felt_and_less_and_less_often(out):
    limit, _ = of(out)
    limit.failed(too_many(8, out))
    limit.passed(out, 2, 10**6)  # shares were smaller
    assert limit.most() == {out: 4}
    limit.passed(out, 8, CALM_STEPS - 1)
    assert limit.most() == {out: 4}
    limit = of(out)[0]
    limit.passed(out, 8, 1)
    assert limit.most() == {out: 8}
    limit.failed(too_many(8, out))
    limit.passed(out, 8, 2 * CALM_STEPS - 1)
    assert limit.most() == {out: 4}
    limit.passed(out, 8, 1)
    assert limit.most() == {out: 8}


def test_a_note_that_is_torn_or_cannot_be_written_is_none(out, monkeypatch):
    storage.write_bytes(f"{out}/micro_batch.json", b"{")
    limit, said = of(out)
    assert limit.most() == {out: 0}

    def full(*_):
        raise OSError("There is no room left.")

    monkeypatch.setattr(storage, "write_json", full)
    limit.failed(too_many(8, out))
    assert limit.most() == {out: 4}
    assert said[0] == "There is no room left."


@pytest.mark.parametrize(
    ("micro_batch", "most", "rows", "times"), [(0, 0, 8, 1), (0, 4, 4, 2), (3, 4, 3, 3), (6, 4, 4, 2), (0, 9, 8, 1)]
)
def test_the_limit_of_the_user_holds_too(micro_batch, most, rows, times):
    cluster = Cluster(name="test", micro_batch=micro_batch)
    assert cluster.micro_batches(64, 8, most) == (rows, times)
