"""Nothing is done twice, and progress is seen, within a shard."""

from collections import Counter

import pytest

from infra.metrics import Progress
from tests.corpora.make import captions_by_key, photo, recaption_by


def fill(corpus, count):
    for n in range(count):
        corpus.put({f"p{n:02d}.png": photo(n, "PNG"), f"p{n:02d}.txt": "an alt text"})
    return {f"p{n:02d}": f"this is {n}" for n in range(count)}


@pytest.mark.timeout(240)
def test_a_folder_is_cut_into_shards_and_what_is_done_is_not_done_again(ray_cluster, corpus, served, capsys):
    """ray-project/ray#55008: after each failure the whole job begins again, rows that were done included."""
    wanted = fill(corpus, 6)
    served.refuses = 4
    code, _, err = recaption_by(capsys, served, corpus, "--shard-rows", "2")
    assert (code, served.captioned[:2]) in ((1, [0, 1]), (1, [1, 0]))
    assert "Traceback" not in err
    served.mend()
    code, results, _ = recaption_by(capsys, served, corpus, "--shard-rows", "2")
    assert code == 0
    assert captions_by_key(results["captions"]) == wanted
    times = Counter(served.captioned)
    assert (times[0], times[1]) == (1, 1)
    assert times.total() <= 6 + 1


@pytest.mark.timeout(240)
def test_progress_counts_rows(ray_cluster, corpus, served, capsys, monkeypatch):
    """1038lab/ComfyUI-QwenVL#140: "if i had a folder should be easy progress ever single image"."""
    told = []
    monkeypatch.setattr(Progress, "_write", lambda self, line, **_: told.append(line))
    fill(corpus, 6)
    assert recaption_by(capsys, served, corpus)[0] == 0
    assert any("caption_with" in line and "6/6 rows" in line for line in told), told


@pytest.mark.long
@pytest.mark.timeout(400)
def test_of_one_shard_at_most_a_minute_of_work_is_lost(ray_cluster, corpus, served, capsys):
    """jiayev/GPT4V-Image-Captioner#27: a folder, and after 200 pictures the server says 429 for good."""
    wanted = fill(corpus, 80)
    served.seconds, served.refuses = 20, 65  # of 16 requests at once: 64 answers in 80 s
    code, _, _ = recaption_by(capsys, served, corpus)
    assert code == 1
    first = list(served.captioned)
    assert len(first) == 64
    served.mend()
    code, results, _ = recaption_by(capsys, served, corpus)
    assert code == 0
    assert captions_by_key(results["captions"]) == wanted
    again = Counter(served.captioned)
    assert {again[n] for n in first[:16]} == {1}, "what was answered more than a minute before the end"
