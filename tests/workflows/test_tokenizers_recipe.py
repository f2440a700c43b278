"""The comparison of tokenizers: equal FLOPs, a name each, and corpora that have no yardstick."""

from dataclasses import replace

import pytest

from t2i.tokenizers.vqgan import VQGANConfig
from workflows.flops import forecast
from workflows.kinds import parts_of
from workflows.tokenizers import tokenizers

RECIPE = tokenizers()
NAMED = dict(zip(RECIPE.table.names, RECIPE.tokenizers, strict=True))


@pytest.mark.long
@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", NAMED)
def test_each_is_trained_for_20_tflop(name):
    config = NAMED[name]
    assert forecast(config, size=(32, 32)).of(config.train.steps) == pytest.approx(20e12, rel=0.03)


def test_without_a_yardstick_pictures_of_the_index_are_rebuilt():
    plain = replace(RECIPE, extractor=None, sets=None)
    assert [part.work.name for part in parts_of(plain)] == ["ingest", *["train_tokenizer"] * len(NAMED), "rebuild"]
    with pytest.raises(ValueError, match="give both, or neither"):
        replace(RECIPE, sets=None)


def test_what_cannot_be_compared_is_said():
    with pytest.raises(ValueError, match="at least one tokenizer"):
        replace(RECIPE, tokenizers=())
    twice = replace(RECIPE.table, names=("a",) * len(NAMED))
    with pytest.raises(ValueError, match="a name of its own"):
        replace(RECIPE, table=twice)
    deep = replace(RECIPE.tokenizers[0], model=VQGANConfig(multipliers=(1,) * 8, attention_levels=()))
    with pytest.raises(ValueError, match="do not divide"):
        replace(RECIPE, tokenizers=(deep,), table=replace(RECIPE.table, names=()))
