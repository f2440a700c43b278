"""What `encode`'s stage writes and a prior's feed reads: codes, latents in 16 bits, and draws around them."""

import pickle

import numpy as np
import pyarrow as pa
import pytest
import torch

from infra.data.images import encode_png
from infra.data.ledger import commit
from infra.data.run import run_here
from infra.data.shards import ShardReader
from infra.data.stage import Stage
from infra.train.optim import OptimConfig
from t2i.conditions.labels import LabelConfig
from t2i.diffusion.prior import DiffusionConfig
from t2i.nn.weights import initialize
from t2i.pixels import scale
from t2i.priors.autoregressive import AutoregressiveConfig
from t2i.priors.task import PriorShape, PriorTask
from t2i.protocol import Space
from t2i.random import normals
from t2i.stages import Encode, Measure, code_dtype
from t2i.tokenizers.clip import ClipConfig
from t2i.tokenizers.codebook import CodebookConfig
from t2i.tokenizers.gaussian import GaussianConfig
from t2i.tokenizers.scale import Scale, measured, sums_of
from t2i.tokenizers.task import load_tokenizer, save_tokenizer
from t2i.tokenizers.vqgan import VQGANConfig
from t2i.values import as_floats
from tests.infra.data.zoo import picture
from tests.t2i.clip import tiny

SMALL = {"channels": 8, "groups": 4, "multipliers": (1, 2), "blocks": 1, "latent_channels": 3, "attention_levels": ()}
MODELS = {
    "kl": VQGANConfig(**SMALL, quantizer=GaussianConfig(width=3)),
    "codebook": VQGANConfig(**SMALL, quantizer=CodebookConfig(size=16, width=3)),
    "large codebook": VQGANConfig(**SMALL, quantizer=CodebookConfig(size=2**16 + 1, width=3)),
}
SIZES = [(8, 16), (16, 8), (8, 8)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for name, config in MODELS.items():
        found[name] = str(tmp_path_factory.mktemp("model"))
        tokenizer = config.build()
        initialize(tokenizer, 0)
        tokenizer.scale = Scale(factor=(3.0,), shift=(0.1,))
        save_tokenizer(tokenizer, found[name])
    return found


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder, task = str(tmp_path_factory.mktemp("clip")), tiny.task()
    task.export({"clip": task.updates()[0].module.eval()}, folder)
    return folder


def pictures(rows=9):
    return [picture(number, *SIZES[number % 3]) for number in range(rows)]


def images_of(pixels):
    return scale(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])


def near(found, wanted, most=2.0**-8):
    """As bf16 rounds."""
    assert np.abs(found - wanted).max() <= most * np.abs(wanted).max() + 1e-6


@pytest.mark.parametrize(
    ("model", "options"),
    [("kl", {}), ("kl", {"deviations": True}), ("codebook", {"latents": True})],
    ids=["kl", "moments", "before codes"],
)
def test_latents_are_written_in_16_bits(folders, model, options):
    stage, loaded = pickle.loads(pickle.dumps(Encode(folders[model], **options))), load_tokenizer(folders[model])
    assert isinstance(stage, Stage)
    stage.setup()
    columns = stage({"pixels": pictures()})
    assert list(columns) == list(stage.writes)
    for place, pixels in enumerate(pictures()):
        alone = images_of(pixels)
        wanted = loaded.moments(alone) if "deviations" in options else (loaded.latents(alone),)
        for name, each in zip(stage.writes, wanted, strict=True):
            assert columns[name][place].dtype == np.uint16
            near(as_floats([columns[name][place]])[0], each.flatten().numpy())


@pytest.mark.parametrize(("codes", "dtype"), [(2, "uint16"), (2**16, "uint16"), (2**16 + 1, "int32"), (2**40, "int64")])
def test_codes_take_no_more_than_they_must(codes, dtype):
    assert code_dtype(codes) == dtype
    assert np.iinfo(dtype).max >= codes - 1


@pytest.fixture
def rows(tmp_path):
    """An index of two shards, one of whose rows cannot be read."""
    place = str(tmp_path / "rows")
    for shard in range(2):
        numbers = range(6 * shard, 6 * shard + 6)
        columns = {
            "sample_id": [f"{number:024x}"[::-1] for number in numbers],
            "state": ["accepted"] * 5 + ["rejected"],
            "reason": [None] * 5 + ["small: 1x1"],
            "split": ["train"] * 6,
            "image": [encode_png(picture(number, *SIZES[number % 3])) for number in numbers],
        }
        commit(place, f"{shard:06d}", pa.table(columns))
    return place


@pytest.mark.parametrize("model", ["codebook", "large codebook", "kl"])
def test_shards_are_of_the_type_and_the_same_again(folders, rows, tmp_path, model):
    loaded = load_tokenizer(folders[model])
    codes = loaded.space((8, 8)).codes
    dtype = code_dtype(codes) if codes else "uint16"
    for out in ("one", "two"):
        run_here([Encode(folders[model], dtype=dtype)], [rows], str(tmp_path / out), batch_size=4)
    first, second = ((tmp_path / out / "shards" / "000000.parquet").read_bytes() for out in ("one", "two"))
    assert first == second
    reader = ShardReader([rows, str(tmp_path / "one")], "000000")
    found = reader.rows(["codes"], np.arange(5))["codes"]
    assert {each.dtype.name for each in found} == {dtype}
    for number, each in enumerate(found):
        wanted = loaded.encode(images_of(picture(number, *SIZES[number % 3]))).flatten().numpy()
        assert np.array_equal(each, wanted) if codes else near(as_floats([each])[0], wanted) is None


def test_a_scale_is_measured_on_what_is_not_scaled(folders, rows):
    stage = Measure(folders["kl"], rows)
    stage.setup()
    found = stage({"shard": ["000001", "000000", "000001"], "place": [4, 0, 1]})
    loaded = load_tokenizer(folders["kl"])
    loaded.scale = None
    numbers = [10, 0, 7]
    wanted = [sums_of(loaded.latents(images_of(picture(n, *SIZES[n % 3])))[0].numpy()) for n in numbers]
    for place, row in enumerate(wanted):
        assert found["count"][place] == row.count
        assert found["means"][place] == pytest.approx(row.means, rel=1e-5)
        assert found["squares"][place] == pytest.approx(row.squares, rel=1e-4)
    assert measured(wanted).factor[0] > 0


def task(space, **options):
    model = AutoregressiveConfig() if space.codes else DiffusionConfig()
    shape = PriorShape(model=model, space=space, conditions=(LabelConfig(labels=("a", "b")),))
    return PriorTask(shape=shape, styles=(), optim=OptimConfig(lr=1e-3), **options)


def draw(salt):
    return np.array([0.25, 0.75]) if salt == "noise" else np.zeros(2)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "int64"])
def test_whole_numbers_are_codes_where_the_space_says_so(dtype):
    """16-bit ones, too, which are bits of floats elsewhere; int32 is what the step wrote before."""
    codes = [np.array([0, 65_535 if dtype == "uint16" else 70_000, 7, 16_256]).astype(dtype)] * 2
    batch = task(Space((2, 2), codes=80_000)).collate({"codes": codes, "class_label": ["a", "b"]}, draw)
    assert batch["values"].dtype == np.int64
    assert np.array_equal(batch["values"], np.stack(codes))


def test_latents_are_drawn_by_a_rows_key():
    space, rng = Space((3, 2, 2)), np.random.default_rng(0)
    mean, deviation = (torch.from_numpy(rng.normal(size=(2, 12))).bfloat16() for _ in range(2))
    bits = [list(each.view(torch.uint16).numpy()) for each in (mean, deviation.abs())]
    rows = {"codes": bits[0], "codes_deviation": bits[1], "class_label": ["a", "b"]}
    mode = task(space)
    assert mode.reads == ("codes", "class_label")
    assert np.array_equal(mode.collate(rows, draw)["values"], mean.float().view(2, 3, 2, 2).numpy())
    drawing = task(space, deviations=True)
    assert drawing.reads == ("codes", "codes_deviation", "class_label")
    batch = drawing.collate(rows, draw)
    noise = normals(torch.from_numpy(batch["noise_key"]), (3, 2, 2), "posterior")
    wanted = mean.float().view(2, 3, 2, 2) + deviation.abs().float().view(2, 3, 2, 2) * noise
    assert batch["values"].dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(batch["values"]), wanted)
    other = drawing.collate(rows, lambda salt: draw(salt) / 3)
    assert not np.array_equal(other["values"], batch["values"])


def test_a_clip_is_a_tokenizer_without_a_way_back(clip, tmp_path):
    tokenizer = ClipConfig(path=clip).build()
    tokenizer.scale = Scale(factor=(4.0,), shift=(0.0,))
    save_tokenizer(tokenizer, str(tmp_path))
    loaded = load_tokenizer(str(tmp_path))
    stage = Encode(str(tmp_path))
    stage.setup()
    embeddings = as_floats(stage({"pixels": pictures()})["codes"])
    space = loaded.space((8, 16))
    assert (embeddings.shape, space.codes, loaded.decodes) == ((9, *space.shape), 0, False)
    assert np.linalg.norm(embeddings, axis=1) == pytest.approx(np.full(9, 4.0), rel=1e-2)
    wanted = loaded.scale.to(loaded._embedder.embed_images(pictures())).numpy()
    near(embeddings, wanted, 0.02)  # pictures travel as floats, and are rounded once more
    assert not loaded.state_dict(), "no copy of the CLIP"
    with pytest.raises(ValueError, match="does not decode"):
        loaded.decode(torch.zeros(1, *space.shape))
