"""Every condition: rows to arrays, its null, and that a row is told the same whoever stands beside it."""

from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from infra.config import from_dict, to_dict
from infra.train.draw import uniforms
from t2i.conditions.codes import CodesConfig
from t2i.conditions.hearing import Conditions
from t2i.conditions.labels import LabelConfig
from t2i.conditions.layout import LayoutConfig
from t2i.conditions.pictures import EdgesConfig, HoleConfig, MapConfig, SmallerConfig
from t2i.conditions.text_features import bits_of
from t2i.conditions.vectors import VectorConfig
from t2i.conditions.words import WordsConfig
from t2i.nn.weights import initialize
from t2i.priors.asking import Asking
from t2i.priors.task import ConditionKind
from t2i.protocol import Asked, Space, joined, stacked
from t2i.values import as_floats
from t2i.vocabulary import TextVocabulary

pytestmark = pytest.mark.family("condition")
CAPTIONS = ["a red circle", "blue", "a very small green square", "two dots"]
SPACE, WIDTH, ROWS = Space((4, 8, 12)), 16, 4
EVERY = frozenset({"vector", "tokens", "seen", "planes"})
CONDITIONS = {
    "words": WordsConfig(vocabulary_size=64, length=8),
    "label": LabelConfig(labels=("cat", "dog")),
    "vector": VectorConfig(size=5),
    "vector as tokens": VectorConfig(size=5, tokens=3),
    "codes": CodesConfig(codes=7, places=6, column="map_codes"),
    "layout": LayoutConfig(classes=("cat", "dog"), boxes=2),
    "smaller": SmallerConfig(size=(4, 6)),
    "smaller, corrupted": SmallerConfig(size=(4, 6), blur=1.0, noise=0.5),
    "map of labels": MapConfig(column="map_parts", size=(16, 24), labels=3),
    "map of depths": MapConfig(column="map_depth", size=(16, 24)),
    "edges": EdgesConfig(size=(16, 24)),
    "hole": HoleConfig(size=(16, 24)),
}


def png(values):
    buffer = BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def rows():
    generator = np.random.default_rng(0)
    pictures = [generator.integers(0, 255, (32, 48, 3)).astype(np.uint8) for _ in range(ROWS)]
    boxes = [[[0, 0, 0.5, 0.5], [0.2, 0.2, 0.4, 0.4], [0, 0, 1, 1]], [], None, [[0.1, 0.1, 0.2, 0.3]]]
    return {
        "caption": CAPTIONS,
        "class_label": ["cat", "dog", "cow", None],
        "embedding": [generator.normal(size=5).astype(np.float32) for _ in range(ROWS)],
        "map_codes": [generator.integers(0, 7, 6).astype(np.int32) for _ in range(ROWS)],
        "boxes": [None if each is None else [np.array(box, np.float32) for box in each] for each in boxes],
        "box_classes": [["cat", "owl", "dog"], [], None, [None]],
        "pixels": pictures,
        "map_parts": [png((each[:, :, 0] % 3).astype(np.uint8)) for each in pictures[:3]] + [None],
        "map_depth": [png(each[:, :, 0].astype(np.uint16) * 256) for each in pictures[:3]] + [None],
    }


def draw_of(epoch, places=slice(None)):
    ids = np.arange(ROWS, dtype=np.uint64)[places]
    return lambda salt: uniforms(7, np.full(len(ids), epoch), ids, salt)


@dataclass(frozen=True)
class Saved:
    conditions: tuple[ConditionKind, ...]


@pytest.fixture(params=CONDITIONS)
def config(request):
    return CONDITIONS[request.param]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("words"))
    TextVocabulary.train(CAPTIONS * 3, 64, 8).save(folder)
    return folder


@pytest.fixture
def heard(config):
    conditions = Conditions((config,), WIDTH, SPACE, EVERY)
    initialize(conditions, 3)
    return conditions.requires_grad_(False)


def batch_of(config, folder, places=slice(None), epoch=0):
    columns = {name: column[places] for name, column in rows().items()}
    arrays = config.rows(folder)(columns, draw_of(epoch, places))
    batch = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    keys = torch.arange(100, 100 + ROWS)[places]
    return batch | {"weight": torch.ones(len(keys)), "noise_key": keys}


def tellings(told):
    """What each row is told: its vector, its seen tokens, its planes."""
    count = next(len(each) for each in (told.vector, told.tokens, told.planes) if each is not None)
    for row in range(count):
        parts = [] if told.vector is None else [told.vector[row]]
        parts += [] if told.tokens is None else [told.tokens[row][told.seen[row]]]
        yield parts + ([] if told.planes is None else [told.planes[row]])


def equal(one, other):
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True)
    )


def test_it_says_what_it_says_it_says(config, heard, folder):
    told, condition = heard(batch_of(config, folder)), heard.each[config.name]
    assert told.said == condition.says
    if told.tokens is not None:
        assert told.tokens.shape[:2] == told.seen.shape
        assert told.tokens.shape[1] <= condition.length == heard.length
        assert told.seen.any(dim=1).all()
        assert told.tokens.shape[2] == WIDTH
    if told.planes is not None:
        assert told.planes.shape == (ROWS, condition.channels, 8, 12)
        assert told.planes.abs().max() <= (1 if not getattr(config, "noise", 0) else 6)
    if told.vector is not None:
        assert told.vector.shape == (ROWS, WIDTH)


def test_its_null_says_nothing_of_the_row(config, heard, folder):
    batch = batch_of(config, folder)
    dropped = torch.tensor([True, True, False, True])
    told = list(tellings(heard(batch | {f"dropped_{config.name}": dropped})))
    plain = list(tellings(heard(batch)))
    assert equal(told[0], told[1])
    assert equal(told[0], told[3])
    assert equal(told[2], plain[2])
    assert not equal(told[0], plain[0])


def test_a_row_is_told_the_same_whoever_stands_beside_it(config, heard, folder):
    together = list(tellings(heard(batch_of(config, folder))))
    for row in range(ROWS):
        (alone,) = tellings(heard(batch_of(config, folder, slice(row, row + 1))))
        assert equal(alone, together[row])


def test_it_comes_back_from_json(config):
    saved = Saved((config, config))
    assert from_dict(Saved, to_dict(saved)) == saved


def test_nothing_is_drawn_when_pictures_are_asked_for(config, heard, folder):
    seeds, columns = list(range(ROWS)), rows()
    if isinstance(config, HoleConfig):
        with pytest.raises(ValueError, match="wants to be told where to paint"):
            Asking((config,), (config.rows(folder),))(columns, seeds)
        columns["hole"] = [np.ones((32, 48), bool)] * ROWS
    asking = Asking((config,), (config.rows(folder),))
    asked = asking(columns, seeds)
    heard.eval()
    pair = list(tellings(heard.pair(asked, [config.name])))
    again = list(tellings(heard.asked(asking(columns, [seed + 100 for seed in seeds]))))
    assert all(equal(a, b) for a, b in zip(pair[:ROWS], again, strict=True))
    assert all(equal(pair[ROWS], each) for each in pair[ROWS:])
    if isinstance(config, SmallerConfig):
        sharp = SmallerConfig(size=config.size)
        plain = Conditions((sharp,), WIDTH, SPACE, EVERY)(batch_of(sharp, folder))
        torch.testing.assert_close(heard.asked(asked).planes, plain.planes)


def test_conditions_without_parameters_stand_where_their_batch_is():
    config = EdgesConfig(size=(16, 24))
    conditions = Conditions((config,), WIDTH, SPACE, EVERY)
    with torch.device("meta"):
        batch = {"edges": torch.zeros(2, 2, 16, 24, dtype=torch.uint8)}
    assert conditions.asked(Asked(2, batch)).planes.device.type == "meta"


def test_a_network_that_does_not_hear_it_says_so(config):
    says = config.build(WIDTH, SPACE).says
    with pytest.raises(ValueError, match="does not hear"):
        Conditions((config,), WIDTH, SPACE, says - {next(iter(says))})


def test_several_are_joined_in_their_order(folder):
    several = (WordsConfig(vocabulary_size=64, length=8), VectorConfig(size=5, tokens=3), LabelConfig(labels=("cat",)))
    conditions = Conditions((*several, *[EdgesConfig(size=(16, 24)), SmallerConfig(size=(4, 6))]), WIDTH, SPACE, EVERY)
    batch = {}
    for config in (*several, EdgesConfig(size=(16, 24)), SmallerConfig(size=(4, 6))):
        batch |= batch_of(config, folder)
    told = conditions(batch)
    each = [module(batch, torch.zeros(ROWS, dtype=torch.bool)) for module in conditions.each.values()]
    words = each[0].tokens.shape[1]
    assert torch.equal(told.tokens[:, :words], each[0].tokens)
    assert torch.equal(told.tokens[:, words:], each[1].tokens)
    assert torch.equal(told.seen[:, :words], each[0].seen)
    assert torch.equal(told.vector, each[1].vector + each[2].vector)
    assert torch.equal(told.planes, torch.cat([each[3].planes, each[4].planes], dim=1))
    assert conditions.length == 8 + 3
    assert conditions.channels == 2 + 3
    assert joined([]).said == frozenset()


def test_two_of_one_name_are_refused():
    with pytest.raises(ValueError, match="Two conditions are called 'vector'"):
        Conditions((VectorConfig(size=5), VectorConfig(size=3)), WIDTH, SPACE, EVERY)
    with pytest.raises(ValueError, match="not 'a map'"):
        Conditions((VectorConfig(size=5, name="a map"),), WIDTH, SPACE, EVERY)
    for taken in ("values", "noise_key", "dropped_x", "keys", "training"):
        with pytest.raises(ValueError, match="a word of its own"):
            Conditions((VectorConfig(size=5, name=taken),), WIDTH, SPACE, EVERY)


def test_negative_prompts_stand_in_the_nulls_place(folder):
    words, label = WordsConfig(vocabulary_size=64, length=8), LabelConfig(labels=("cat", "dog"), drop=0)
    conditions = Conditions((words, label), WIDTH, SPACE, EVERY).requires_grad_(False)
    batch = batch_of(words, folder) | batch_of(label, folder)
    negative = words.rows(folder)({"caption": ["dots"] * ROWS}, draw_of(0))
    negative = {name: torch.from_numpy(array) for name, array in negative.items()}
    assert conditions.guided == ("text",)  # a label was never dropped: it stays
    negated = frozenset({"text"})
    without = conditions.without(Asked(ROWS, batch, negative, negated))
    kept = conditions.without(Asked(ROWS, batch, negative, negated), ["label"])  # words are not guided: they stay
    assert torch.equal(kept.tokens, conditions.asked(Asked(ROWS, batch)).tokens)
    assert torch.equal(without.vector, conditions.asked(Asked(ROWS, batch)).vector)
    said = conditions.asked(Asked(ROWS, batch | negative))
    assert all(equal(a, b) for a, b in zip(tellings(without), tellings(said), strict=True))
    plain = conditions.without(Asked(ROWS, batch))
    assert not any(equal(a, b) for a, b in zip(tellings(without), tellings(plain), strict=True))
    with pytest.raises(ValueError, match="no condition 'txt'"):
        conditions.without(Asked(ROWS, batch), ["txt"])
    with pytest.raises(ValueError, match="training dropped none"):
        Conditions((label,), WIDTH, SPACE, EVERY).without(Asked(ROWS, batch))
    both = stacked(conditions.asked(Asked(ROWS, batch)), plain)
    assert both.tokens.shape[0] == both.seen.shape[0] == both.vector.shape[0] == 2 * ROWS


def test_unknown_classes_are_the_null_and_the_largest_boxes_stay(folder):
    label = LabelConfig(labels=("cat", "dog"))
    assert batch_of(label, folder)["label"].tolist() == [0, 1, 2, 2]
    layout = batch_of(CONDITIONS["layout"], folder)
    assert layout["layout_class"].tolist() == [[2, 3], [0, 0], [0, 0], [1, 0]]
    assert layout["layout"][0].tolist() == [[0, 0, 0.5, 0.5], [0, 0, 1, 1]]


def test_wrong_columns_are_told(folder):
    with pytest.raises(ValueError, match="4 were said"):
        batch_of(VectorConfig(size=4), folder)
    with pytest.raises(ValueError, match="5 were said"):
        batch_of(CodesConfig(codes=7, places=5, column="map_codes"), folder)
    with pytest.raises(ValueError, match="labels below 2"):
        batch_of(MapConfig(column="map_parts", size=(32, 48), labels=2), folder)
    colours = png(rows()["pixels"][0])
    with pytest.raises(ValueError, match="holds colours"):
        MapConfig(column="map", size=(4, 4), labels=3).rows("")({"map": [colours]}, None)
    with pytest.raises(ValueError, match="at most 256 labels"):
        MapConfig(column="map", size=(4, 4), labels=300)
    with pytest.raises(ValueError, match="no labels"):
        LabelConfig().build(WIDTH, SPACE)
    with pytest.raises(ValueError, match="rows and columns"):
        EdgesConfig(size=(4, 4)).build(WIDTH, Space((7,)))


def test_a_smaller_picture_is_noised_by_its_amount():
    config = SmallerConfig(size=(8, 12), noise=1.0)
    conditions = Conditions((config,), WIDTH, SPACE, EVERY)
    grey = np.full((2000, 3, 8, 12), 255, np.uint8)
    chances = torch.linspace(0, 0.999, 2000)
    batch = {
        "smaller": torch.from_numpy(grey), "smaller_chance": chances, "noise_key": torch.arange(2000),
        "weight": torch.ones(2000),
    }  # fmt: skip
    planes = conditions(batch).planes
    torch.testing.assert_close(planes.mean((1, 2, 3)), (1 - chances**2).sqrt(), rtol=0, atol=0.3)
    torch.testing.assert_close(planes.std((1, 2, 3)), chances, rtol=0, atol=0.15)
    again = conditions({name: column[700:900] for name, column in batch.items()}).planes
    assert torch.equal(again, planes[700:900])
    asked = {name: column for name, column in batch.items() if name != "smaller_chance"}
    assert torch.equal(conditions(asked).planes, torch.ones(2000, 3, 8, 12))
    amounts = asked | {"smaller_amount": chances}
    assert torch.equal(conditions(amounts).planes, planes)


def test_a_blur_keeps_the_mean_and_takes_the_detail():
    sharp = SmallerConfig(size=(32, 48)).rows("")(rows(), draw_of(0))["smaller"].astype(float)
    config = SmallerConfig(size=(32, 48), blur=3.0)
    blurred = config.rows("")(rows(), draw_of(0))["smaller"].astype(float)
    assert np.allclose(blurred.mean((1, 2, 3)), sharp.mean((1, 2, 3)), atol=4)
    strong = draw_of(0)("smaller/blur") > 0.3
    assert strong.any()
    assert (blurred.std((1, 2, 3)) < 0.5 * sharp.std((1, 2, 3)))[strong].all()


def test_edges_are_where_a_square_begins():
    square = np.zeros((32, 32, 3), np.uint8)
    square[8:24, 8:24] = 255
    told = EdgesConfig(size=(32, 32)).rows("")({"pixels": [square]}, draw_of(0))["edges"][0]
    places = np.argwhere(told[0] == 255)
    assert told[1].min() == 255
    assert 40 < len(places) < 140
    assert {min(abs(y - edge) for edge in (7.5, 23.5)) < 2 or min(abs(x - edge) for edge in (7.5, 23.5)) < 2
            for y, x in places} == {True}  # fmt: skip
    flat = np.full((32, 32, 3), 77, np.uint8)
    assert EdgesConfig(size=(32, 32)).rows("")({"pixels": [flat]}, draw_of(0))["edges"][0][0].max() == 0


def test_a_hole_is_drawn_or_said():
    config, pictures = HoleConfig(size=(32, 48), all=0.3), rows()["pixels"] * 100
    ids = np.arange(400, dtype=np.uint64)
    told = config.rows("")({"pixels": pictures}, lambda salt: uniforms(1, np.zeros(400), ids, salt))["hole"]
    holes = told[:, 3] == 255
    whole = holes.all((1, 2))
    assert 0.22 < whole.mean() < 0.38
    assert (holes.mean((1, 2)) >= 0.25**2 - 1e-9).all()
    assert (told[:, :3].transpose(0, 2, 3, 1)[holes] == 128).all()
    kept = ~holes[3]
    assert (told[3, :3].transpose(1, 2, 0)[kept] == pictures[3][kept]).all()
    said = np.zeros((32, 48), bool)
    said[3:5, 7:9] = True
    found = config.rows("")({"pixels": pictures[:1], "hole": [said]}, draw_of(0, slice(1)))["hole"]
    assert ((found[0, 3] == 255) == said).all()
    mixed = config.rows("")({"pixels": pictures[:2], "hole?": [said, None]}, lambda salt: np.array([0.1, 0.9]))["hole"]
    assert ((mixed[0, 3] == 255) == said).all()  # whoever stands beside it


def test_bfloat16_lies_as_sixteen_bits():
    numbers = np.random.default_rng(0).normal(size=(50, 40)).astype(np.float32) * 1e3
    there_and_back = as_floats(list(bits_of(torch.from_numpy(numbers).bfloat16())))
    assert np.array_equal(there_and_back, torch.from_numpy(numbers).bfloat16().float().numpy())
    assert as_floats([np.arange(3), np.arange(3)]).dtype == np.float32


def test_asking_tells_what_lacks(folder):
    words, label = WordsConfig(vocabulary_size=64, length=8), LabelConfig(labels=("cat", "dog"))
    asking = Asking((words, label), (words.rows(folder), label.rows("")))
    assert asking.reads == ("caption", "class_label")
    with pytest.raises(ValueError, match="hears of 'class_label', which nobody told: there is caption"):
        asking({"caption": ["blue"]}, [1])
    with pytest.raises(ValueError, match="2 pictures are asked for, but of 'caption' there are 1"):
        asking({"caption": ["blue"], "class_label": ["cat", "dog"]}, [1, 2])
    with pytest.raises(ValueError, match="of 'the negative prompts' there are 1"):
        asking({"caption": ["blue", "red"], "class_label": ["cat", "dog"]}, [1, 2], ["dots"])
    with pytest.raises(ValueError, match="hears no captions"):
        Asking((label,), (label.rows(""),))({"class_label": ["cat"]}, [1], ["dots"])
    asked = asking({"caption": ["blue"]}, [1], ["dots"], {"label": torch.tensor([1])})
    assert asked.batch["label"].tolist() == [1]
    assert asked.negated == {"text"}
    assert asked.without.keys() == {"text"}


def test_codes_come_as_a_grid_too():
    config = CodesConfig(codes=7, places=6, column="map_codes")
    condition = config.build(WIDTH, SPACE)
    grid = torch.arange(12).view(2, 2, 3) % 7
    nothing = torch.zeros(2, dtype=torch.bool)
    assert torch.equal(
        condition({"codes": grid}, nothing).tokens, condition({"codes": grid.flatten(1)}, nothing).tokens
    )
