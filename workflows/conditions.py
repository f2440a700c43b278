"""What a row shows beside its caption, as columns that conditions read: class, attributes, boxes, maps."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from PIL import Image

from infra.data.fields import follow
from infra.data.fitting import Frame

MAP = "map_"  # before the name of a map's column


@dataclass(frozen=True, kw_only=True)
class ConditionsConfig:
    """Where a row's class, attributes, boxes and maps stand; none is looked for that is not named.

    Fields are of the row's JSON (or columns), or paths into it: `annotation.class`. Maps are files of the sample by
    their ending, or columns of Parquet, and become columns `map_<name>`: `--conditions.maps segmentation=seg.png`.
    """

    class_field: str = ""
    attributes_field: str = ""  # a list of words, or a text with commas
    boxes_field: str = ""  # a list of boxes, or of records with `box` or `bbox`, and `class`, `label` or `category`
    boxes_as: Literal["xyxy", "xywh"] = "xyxy"  # in pixels of the upright picture: two corners, or a corner and a size
    maps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unclear := [each for each in self.maps if not all(each.partition("=")[::2])]:
            raise ValueError(f"A map is named as in segmentation=seg.png, but '{unclear[0]}' was found.")

    @property
    def named_maps(self) -> dict[str, str]:
        """Endings or columns of the maps, by name."""
        return dict(each.split("=", 1) for each in self.maps)

    @property
    def endings(self) -> tuple[str, ...]:
        """What readers are to read beside the picture."""
        return tuple(self.named_maps.values())

    @property
    def fields(self) -> list[pa.Field]:
        """The columns that an index has of them."""
        held = [pa.field("class_label", pa.string())] if self.class_field else []
        held += [pa.field("attributes", pa.list_(pa.string()))] if self.attributes_field else []
        if self.boxes_field:
            held += [
                pa.field("boxes", pa.list_(pa.list_(pa.float32()))),
                pa.field("box_classes", pa.list_(pa.string())),
            ]
        return held + [pa.field(MAP + name, pa.binary()) for name in self.named_maps]


def read_conditions(
    config: ConditionsConfig, meta: Mapping[str, Any], parts: Mapping[str, bytes], frame: Frame
) -> dict[str, Any]:
    """The columns of one row; null where it does not have them.

    Boxes are (left, top, right, bottom) as shares of the width and height of the copy, which `frame` says; those of
    which nothing is left are dropped with their classes. Maps are PNG files of the copy's size, by the nearest value.
    """
    row: dict[str, Any] = {}
    if config.class_field:
        row["class_label"] = _word(follow(meta, config.class_field))
    if config.attributes_field:
        found = follow(meta, config.attributes_field)
        words = found.split(",") if isinstance(found, str) else found if isinstance(found, list) else None
        row["attributes"] = None if words is None else [word for each in words if (word := _word(each))]
    if config.boxes_field:
        row |= _boxes(config, follow(meta, config.boxes_field), frame)
    for name, ending in config.named_maps.items():
        row[MAP + name] = _map(parts.get(ending), frame)
    return row


def _word(value: Any) -> str | None:
    if value is None or isinstance(value, dict | list):
        return None
    return str(value).strip() or None


def _boxes(config: ConditionsConfig, found: Any, frame: Frame) -> dict[str, Any]:
    boxes, classes = [], []
    for each in found if isinstance(found, list) else []:
        record = each if isinstance(each, dict) else {"box": each}
        box = record.get("box", record.get("bbox"))
        if isinstance(box, list) and len(box) == 4 and all(isinstance(side, int | float) for side in box):
            boxes.append([*box[:2], box[0] + box[2], box[1] + box[3]] if config.boxes_as == "xywh" else box)
            classes.append(
                next((_word(record[name]) for name in ("class", "label", "category") if name in record), None)
            )
    if not isinstance(found, list):
        return {"boxes": None, "box_classes": None}
    shown, kept = frame.boxes(np.array(boxes, np.float64).reshape(-1, 4))
    height, width = frame.size
    shares = shown / np.array([width, height, width, height])
    return {"boxes": shares.tolist(), "box_classes": [classes[place] for place in kept]}


def _values(image: Image.Image) -> np.ndarray:
    """A map as it is: a palette's numbers are the labels, and depths may have 16 bits: neither is a colour."""
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        with np.errstate(invalid="ignore"):
            plain = values.astype(np.uint16)
        if not np.array_equal(plain, values):
            raise ValueError("a PNG cannot hold its values")
        return plain
    kept = ("L", "P", "RGB", "I;16")
    return np.asarray(image if image.mode in kept else image.convert("L" if image.mode in ("1", "LA") else "RGB"))


def _map(data: bytes | None, frame: Frame) -> bytes | None:
    if data is None:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            values = frame.map(_values(image))
    except Exception:  # Pillow's parsers raise all sorts; the picture is well without its map
        return None
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()
