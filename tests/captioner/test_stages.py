import pickle

import pytest
import torch

from captioner.detect import FAULTS, DetectConfig
from captioner.stages import Caption
from captioner.styles import Search, Style
from captioner.tower import Tower
from infra.data.stage import ACCEPTED, Runner, Stage

STYLES = (Style(name="short", max_tokens=15), Style(name="long", decoder="alt", max_tokens=20))


@pytest.fixture
def folder(make_captioner, tmp_path):
    model = make_captioner(decoders=("alt", "short"), layers=3, hidden=128)
    with torch.no_grad():
        model.decoders["short"].cls.predictions.decoder.bias[model.vocabulary.sep] += 13
    model.save(str(tmp_path))
    return str(tmp_path)


@pytest.fixture
def batch(pixels, folder):
    alts = ["a red circle"] * (len(pixels) - 1) + [None]
    seen = {Tower(folder).view: list(pixels.numpy())}
    return seen | {"caption_alt": alts, "captions_alt?": [None] * len(pixels)}


def run(stage, batch):
    stage = pickle.loads(pickle.dumps(stage))
    stage.setup()
    return stage(batch)


def test_columns_are_of_a_kind_and_a_style(folder, batch):
    stage = Caption(Tower(folder), STYLES)
    assert isinstance(stage, Stage)
    assert set(stage.writes) == {
        *("caption_short", "logp_short", "flag_short", "tries_short", "attempt_short"),
        *("caption_long", "logp_long", "flag_long", "tries_long", "attempt_long"),
        *("logp_alt", "logps_alt"),
    }
    columns = run(stage, batch)
    assert set(columns) == set(stage.writes)
    assert {len(column) for column in columns.values()} == {len(batch["caption_alt"])}
    assert set(columns["flag_short"]) <= {None, *FAULTS}
    assert all(isinstance(tries, int) and 1 <= tries <= 3 for tries in columns["tries_short"])


def test_faulty_captions_stay_accepted_with_their_flag(folder, batch):
    rows = len(batch["caption_alt"])
    stage = Caption(Tower(folder), STYLES)
    stage.setup()
    results = Runner([stage])(batch | {"state": [ACCEPTED] * rows, "reason": [None] * rows})
    assert set(results["state"]) == {ACCEPTED}
    assert any(results["flag_short"])
    assert all(text is not None for text in results["caption_short"])


def test_images_are_encoded_once(folder, batch, monkeypatch):
    stage = Caption(Tower(folder), STYLES)
    stage.setup()
    calls = []
    encode = stage.tower.model.encode
    monkeypatch.setattr(stage.tower.model, "encode", lambda pixels: calls.append(len(pixels)) or encode(pixels))
    assert max(stage(batch)["tries_short"]) > 1
    assert calls == [len(batch["caption_alt"])]


def test_retries_leave_clean_rows_as_they_were(folder, batch):
    judged = run(Caption(Tower(folder), STYLES, retries=()), batch)
    redone = run(Caption(Tower(folder), STYLES), batch)
    assert set(judged["tries_short"]) == {1}
    assert judged["logp_alt"] == redone["logp_alt"]
    clean = [row for row, flag in enumerate(judged["flag_short"]) if flag is None]
    assert clean
    for name in ("caption_short", "logp_short", "flag_short", "tries_short"):
        assert [redone[name][row] for row in clean] == [judged[name][row] for row in clean]
    assert sum(map(bool, redone["flag_short"])) < sum(map(bool, judged["flag_short"]))


def test_words_and_detectors_are_the_styles(folder, batch):
    columns = run(Caption(Tower(folder), STYLES, words={"short": (0, 1)}, retries=()), batch)
    assert "too long" in columns["flag_short"]
    assert "too long" not in columns["flag_long"]
    lenient = DetectConfig(repeats=99, characters=99, ngram_share=1)
    columns = run(Caption(Tower(folder), STYLES, detect=lenient, retries=(Search(beams=2),)), batch)
    assert set(columns["flag_short"]) <= {None, "cut off", "empty"}
    assert max(columns["tries_short"]) <= 2


def test_wrong_bounds_are_refused():
    with pytest.raises(ValueError, match="words names medium, but the styles are short, long"):
        Caption(Tower("nowhere"), STYLES, words={"medium": (1, 2)})
    with pytest.raises(ValueError, match="order the bounds of 'short'"):
        Caption(Tower("nowhere"), STYLES, words={"short": (3, 2)})


def test_alt_texts_are_scored_where_that_is_asked_for(folder, batch):
    stage = Caption(Tower(folder), STYLES, score_alt=False)
    assert "logp_alt" not in stage.writes
    plain, scored = run(stage, batch), run(Caption(Tower(folder), STYLES), batch)
    assert scored.keys() - plain.keys() == {"logp_alt", "logps_alt"}
    assert all(plain[name] == scored[name] for name in plain)
    assert set(scored["logps_alt"]) == {None}


def test_each_of_several_alt_texts_has_a_score(folder, batch):
    several: list = [None] * len(batch["caption_alt"])
    several[0], several[2] = ["a red circle", "a blue square", "two dogs"], ["a red circle", "a tree"]
    stage = Caption(Tower(folder), STYLES)
    told = run(stage, batch | {"captions_alt?": several})
    assert told["logp_alt"] == run(stage, batch)["logp_alt"]
    for row, texts in enumerate(several):
        if texts is None:
            assert told["logps_alt"][row] is None
            continue
        alone = [run(stage, {name: [v[row]] for name, v in batch.items()} | {"caption_alt": [text]}) for text in texts]
        assert told["logps_alt"][row] == pytest.approx([each["logp_alt"][0] for each in alone], rel=1e-4)
