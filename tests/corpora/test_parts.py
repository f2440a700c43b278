"""Nothing is done twice, and progress is seen, within a shard."""

from collections import Counter

import pytest

from infra.metrics import Progress
from tests import kills
from tests.corpora.make import captions_by_key, interrupted, line_of, photo, recaption_by


def fill(corpus, count):
    for n in range(count):
        corpus.put({f"p{n:02d}.png": photo(n, "PNG"), f"p{n:02d}.txt": "an alt text"})
    return {f"p{n:02d}": f"this is {n}" for n in range(count)}


@pytest.mark.timeout(240)
def test_progress_counts_rows(ray_cluster, corpus, served, capsys, monkeypatch):
    """1038lab/ComfyUI-QwenVL#140: "if i had a folder should be easy progress ever single image"."""
    told = []
    monkeypatch.setattr(Progress, "_write", lambda self, line, **_: told.append(line))
    fill(corpus, 6)
    assert recaption_by(capsys, served, corpus)[0] == 0
    assert any("recaption" in line and "6/6 rows" in line for line in told), told


@pytest.mark.faults
@pytest.mark.timeout(400)
def test_a_folder_is_cut_into_shards_and_what_is_done_is_not_done_again(corpus, served):
    """ray-project/ray#55008: after each failure the whole job begins again, rows that were done included."""
    wanted = fill(corpus, 6)
    served.seconds = 1
    code = interrupted(served, corpus, 3, "--shard-rows", "2")
    assert (code, sorted(served.asked[:2])) == (130, [0, 1])
    code, results, err = kills.run(*line_of(served, corpus, "--shard-rows", "2"), timeout=200)
    assert code == 0, err
    assert captions_by_key(results["captions"]) == wanted
    times = Counter(served.asked)
    assert (times[0], times[1]) == (1, 1)
    assert times.total() <= 6 + 2


@pytest.mark.long
@pytest.mark.timeout(500)
def test_of_one_shard_at_most_a_minute_of_work_is_lost(corpus, served):
    """jhc13/taggui#73: to stop a long captioning one closes the program and starts it again."""
    wanted = fill(corpus, 80)
    served.seconds = 20  # of 16 requests at once: 64 answers in 80 s
    assert interrupted(served, corpus, 65) == 130
    first = list(served.asked)
    served.seconds = 0
    code, results, err = kills.run(*line_of(served, corpus), timeout=200)
    assert code == 0, err
    assert captions_by_key(results["captions"]) == wanted
    times = Counter(served.asked)
    assert {times[n] for n in first[:16]} == {1}, "what was answered a minute before the end"
