"""Shapes, the built-in corpus: rendered scenes with alt texts as noisy as the web's."""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from infra import strict
from infra.config import setting
from t2i.evaluate import scenes
from t2i.evaluate.scenes import BACKGROUNDS, COLORS, COLUMNS, OUTLINES, PLACES, ROWS, SHAPES, SIZES, Scene, Thing

_SUPERSAMPLE = 4
_FILE_NAMES = ("IMG_{}.jpg", "DSC{}.JPG", "image-{}.png", "{}.jpeg", "untitled {}")
_SUFFIXES = (" | free stock photo", " - buy online", " hd wallpaper", " (photo by admin)", " ... read more")
_VALUES = {"shape": SHAPES, "color": tuple(COLORS), "size": tuple(SIZES), "place": PLACES}


@dataclass(frozen=True, kw_only=True)
class NoiseConfig:
    """How an alt text fails its picture: every rate is a probability in [0, 1].

    The defaults leave an alt text with an object-attribute F1 of about 0.7, yet name every attribute often
    enough that a captioner trained on alt texts alone has to see all of them.
    """

    file_name: float = 0.08  # nothing but a file name
    swapped: float = 0.12  # the caption of another picture
    dropped_object: float = 0.12  # each object, though never all of them
    wrong_attribute: float = 0.06  # each shape, color, size and place
    dropped_attribute: float = 0.20  # each color, size and place
    dropped_background: float = 0.40
    truncated: float = 0.10  # cut off in the middle
    suffix: float = 0.30  # " | free stock photo" and its like

    def __post_init__(self) -> None:
        for rate in fields(self):
            if not 0 <= getattr(self, rate.name) <= 1:
                raise ValueError(f"{rate.name} is {getattr(self, rate.name)}; a rate must lie between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ShapesConfig:
    """A corpus of rendered scenes, every byte of it a function of this config."""

    samples: int = 12_000
    size: tuple[int, int] = (32, 32)  # height, width in pixels
    seed: int = 0
    max_objects: int = 3
    labelled: int = 1_000  # training rows with reference captions; test rows always have them
    test_fraction: float = 0.05  # of all scenes: a scene is drawn for testing or for training, never for both
    shard_size: int = 1_000
    jitter: float = 1 / 16  # of a cell's shorter side: one pixel at 32x32
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    # Write what conditions hear, too: the json's `class`, `attributes` and `boxes`, and the files seg.png and edge.png.
    conditions: bool = setting(False, since="0.2")

    def __post_init__(self) -> None:
        if self.samples < 1 or self.shard_size < 1:
            raise ValueError(f"samples is {self.samples}, shard_size {self.shard_size}; both must be at least 1.")
        if len(self.size) != 2 or min(self.size) < 16:
            raise ValueError(f"size is {self.size}; it must be (height, width), each at least 16 pixels.")
        if not 1 <= self.max_objects <= len(PLACES):
            raise ValueError(f"max_objects is {self.max_objects}; it must be 1 to {len(PLACES)}, one object a place.")
        if not 0 <= self.test_fraction < 1:
            raise ValueError(f"test_fraction is {self.test_fraction}; it must be at least 0 and below 1.")
        most = int(self.samples * (1 - self.test_fraction))
        if not 0 <= self.labelled <= most:
            raise ValueError(f"labelled is {self.labelled}; of {self.samples} samples 0 to {most} can be labelled.")
        if not 0 <= self.jitter <= (1 - max(SIZES.values())) / 2:
            raise ValueError(f"jitter is {self.jitter}; objects stay in their cells from 0 to 0.075.")

    @property
    def shards(self) -> int:
        """How many shards the corpus has; the last may be short."""
        return -(-self.samples // self.shard_size)


def draw_scene(rng: np.random.Generator, max_objects: int = 3) -> Scene:
    """A random scene of one to `max_objects` objects, every attribute uniform."""
    count = int(rng.integers(1, max_objects + 1))
    places = rng.permutation(len(PLACES))[:count]
    things = tuple(
        Thing(_pick(rng, SHAPES), _pick(rng, tuple(COLORS)), _pick(rng, tuple(SIZES)), PLACES[int(place)])
        for place in places
    )
    return Scene(things, _pick(rng, tuple(BACKGROUNDS)))


def _pick(rng: np.random.Generator, values: Sequence[str]) -> str:
    return values[int(rng.integers(len(values)))]


def split_of(scene: Scene, test_fraction: float) -> str:
    """Says "test" or "train" by a hash of the scene, so that a scene held out is held out wherever it occurs."""
    digest = hashlib.sha256(strict.dumps(scene.to_dict(), sort_keys=True).encode()).digest()
    return "test" if int.from_bytes(digest[:8], "big") / 2**64 < test_fraction else "train"


def scenes_of(config: ShapesConfig, split: str) -> Iterator[Scene]:
    """The scenes of the rows of a split, in the order of the rows, without their pictures."""
    for index in range(config.samples):
        scene = draw_scene(np.random.default_rng([config.seed, index]), config.max_objects)
        if split_of(scene, config.test_fraction) == split:
            yield scene


def render(
    scene: Scene, size: tuple[int, int], rng: np.random.Generator | None = None, jitter: float = 1 / 16
) -> np.ndarray:
    """The scene as an antialiased (height, width, 3) uint8 image; `size` is (height, width).

    With an `rng` each object moves off the centre of its cell by up to `jitter` of the cell's shorter side
    (1/16 is one pixel at 32x32), uniformly in both directions.
    """
    return paint(outlines(scene, size, rng, jitter), size, scene.background)


Outlines = list[tuple[Thing, list[tuple[float, float]]]]


def outlines(scene: Scene, size: tuple[int, int], rng: np.random.Generator | None, jitter: float) -> Outlines:
    """Each object with the corners (x, y) of its outline in pixels; pixel i covers [i, i + 1)."""
    height, width = size
    cell_height, cell_width = height / len(ROWS), width / len(COLUMNS)
    side = min(cell_height, cell_width)
    placed: Outlines = []
    for thing in scene.objects:
        row, column = divmod(PLACES.index(thing.place), len(COLUMNS))
        dy, dx = rng.uniform(-jitter, jitter, 2) * side if rng is not None else (0.0, 0.0)
        y, x = (row + 0.5) * cell_height + dy, (column + 0.5) * cell_width + dx
        radius = SIZES[thing.size] * side / 2
        placed.append((thing, [(x + radius * u, y + radius * v) for u, v in OUTLINES[thing.shape]]))
    return placed


def paint(placed: Outlines, size: tuple[int, int], background: str) -> np.ndarray:
    """Outlines filled with their colours, antialiased, (height, width, 3) uint8."""
    height, width = size
    canvas = Image.new("RGB", (width * _SUPERSAMPLE, height * _SUPERSAMPLE), BACKGROUNDS[background])
    pen = ImageDraw.Draw(canvas)
    for thing, corners in placed:
        # Pillow paints the pixels whose centres a polygon holds, and counts coordinates from a pixel's centre.
        pen.polygon([(x * _SUPERSAMPLE - 0.5, y * _SUPERSAMPLE - 0.5) for x, y in corners], fill=COLORS[thing.color])
    return np.array(canvas.resize((width, height), Image.Resampling.BOX))


def labels_of(placed: Outlines, size: tuple[int, int]) -> np.ndarray:
    """(height, width) uint8: 0 is the background, 1 + the number of its shape among SHAPES where an object lies.

    A pixel is an object's whose outline holds its centre.
    """
    y, x = np.ogrid[0.5 : size[0], 0.5 : size[1]]
    labels = np.zeros(size, np.uint8)
    for thing, corners in placed:
        labels[scenes.inside(y, x, tuple(corners))] = 1 + SHAPES.index(thing.shape)
    return labels


def edges_of(labels: np.ndarray) -> np.ndarray:
    """(height, width) uint8: 255 where an object's pixel has a neighbour, to a side or above or below, that is none."""
    padded = np.pad(labels, 1)
    beside = [padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:]]
    return np.where((labels > 0) & np.any([each != labels for each in beside], axis=0), 255, 0).astype(np.uint8)


def truth_of(placed: Outlines, background: str) -> dict[str, Any]:
    """`class`, the colour and shape of the first object by place; `boxes`, one an object, corners in pixels.

    `attributes` are the words that hold of the scene, in alphabetical order: of each object its shape, colour and size,
    and the background's colour, which no object can have.
    """
    ordered = sorted(placed, key=lambda each: PLACES.index(each[0].place))
    boxes = [
        {
            "class": f"{thing.color} {thing.shape}",
            "box": [f(axis) for f in (min, max) for axis in zip(*corners, strict=True)],
        }
        for thing, corners in ordered
    ]
    words = {background}.union(*({thing.shape, thing.color, thing.size} for thing, _ in placed))
    return {"class": boxes[0]["class"], "attributes": sorted(words), "boxes": boxes}


def alt_text(scene: Scene, other_scene: Scene, rng: np.random.Generator, noise: NoiseConfig) -> str:
    """An alt text for the scene as the web has it; `other_scene` is what a swapped one speaks of."""
    if rng.random() < noise.file_name:
        return _pick(rng, _FILE_NAMES).format(int(rng.integers(1000, 10_000)))
    scene = other_scene if rng.random() < noise.swapped else scene
    kept = [thing for thing in scene.objects if rng.random() >= noise.dropped_object]
    kept = kept or [scene.objects[int(rng.integers(len(scene.objects)))]]
    background = None if rng.random() < noise.dropped_background else scene.background
    text = scenes.phrase(scenes.ParsedScene(tuple(_misstate(thing, rng, noise) for thing in kept), background))
    if rng.random() < noise.truncated:
        words = text.split()
        text = " ".join(words[: int(rng.integers(len(words) // 3, len(words))) or 1])
    if rng.random() < noise.suffix:
        text += _pick(rng, _SUFFIXES)
    return text


def _misstate(thing: Thing, rng: np.random.Generator, noise: NoiseConfig) -> scenes.ParsedThing:
    """The object with some attributes wrong or left unsaid."""
    said: dict[str, str | None] = {}
    for name, value in asdict(thing).items():
        if rng.random() < noise.wrong_attribute:
            value = _pick(rng, [word for word in _VALUES[name] if word != value])
        said[name] = None if name != "shape" and rng.random() < noise.dropped_attribute else value
    return scenes.ParsedThing(**said)


def write_shards(config: ShapesConfig, folder: str | Path) -> list[Path]:
    """Writes the whole corpus as `00000.tar`, `00001.tar` ... into a local folder."""
    return [write_shard(config, number, folder) for number in range(config.shards)]


def write_shard(config: ShapesConfig, number: int, folder: str | Path) -> Path:
    """Writes one shard, a WebDataset tar whose bytes depend on the config and the number alone.

    KEY.png is the image and KEY.txt its alt text. KEY.json holds "split" ("train" or "test") and "scene", the truth;
    test rows, and `labelled` of the training rows spread evenly over the shards, also have "caption_short" and
    "caption_descriptive".
    """
    if not 0 <= number < config.shards:
        raise ValueError(f"Shard {number} does not exist: the corpus has {config.shards} shards, counted from 0.")
    path = Path(folder) / f"{number:05d}.tar"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    with tarfile.open(unfinished, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in _files(config, number):
            member = tarfile.TarInfo(name)  # its defaults for time and owner are 0, so a rerun is byte-identical
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return unfinished.replace(path)


def _files(config: ShapesConfig, number: int) -> Iterator[tuple[str, bytes]]:
    first = number * config.shard_size
    last = min(first + config.shard_size, config.samples)
    unlabelled = config.labelled * last // config.samples - config.labelled * first // config.samples
    for index in range(first, last):
        rng = np.random.default_rng([config.seed, index])
        scene = draw_scene(rng, config.max_objects)
        split = split_of(scene, config.test_fraction)
        other = draw_scene(rng, config.max_objects)
        while split_of(other, config.test_fraction) != split:  # a held-out scene is not even spoken of in training
            other = draw_scene(rng, config.max_objects)
        text = alt_text(scene, other, rng, config.noise)
        row = {"split": split, "scene": scene.to_dict()}
        if split == "test" or unlabelled > 0:
            unlabelled -= split == "train"
            row |= {f"caption_{style}": scenes.describe(scene, style) for style in scenes.STYLES}
        placed = outlines(scene, config.size, rng, config.jitter)
        key = f"{index:08d}"
        yield f"{key}.png", _png(paint(placed, config.size, scene.background))
        if config.conditions:
            row |= truth_of(placed, scene.background)
            labels = labels_of(placed, config.size)
            yield f"{key}.seg.png", _png(labels)
            yield f"{key}.edge.png", _png(edges_of(labels))
        yield f"{key}.txt", text.encode()
        yield f"{key}.json", strict.dumps(row).encode()


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()
