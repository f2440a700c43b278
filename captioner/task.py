"""The captioner's trainings: a base on the corpus's own captions; then, on its frozen tower, a filter and decoders."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from captioner.altered import Alternatives
from captioner.capfilt import Filter
from captioner.images import fit_images
from captioner.matching import Matching, MatchingConfig
from captioner.model import BASE, CONFIG, About, Captioner, CaptionerConfig
from captioner.styles import Style, prompts_of
from captioner.vocabulary import Vocabulary
from infra import cache, storage
from infra.train import world
from infra.train.draw import pick
from infra.train.optim import OptimConfig
from infra.train.task import Draw, Update

ALT_COLUMN = "caption_alt"
ALTS_COLUMN = "captions_alt?"  # all captions of a row, in shards where some row has several
TRAIN = "train"  # the split that is trained on


@dataclass(frozen=True, kw_only=True)
class BaseTask:
    """Language modelling of the corpus's own captions: tower and decoder together (arXiv 2201.12086, section 3.2).

    `source` is the size of a captioner to begin with random weights, or where a trained one lies. `matching` adds the
    paper's two other losses, on the same encoding of an image.
    """

    source: CaptionerConfig | str
    vocabulary: Vocabulary
    image_size: tuple[int, int]
    max_length: int
    optim: OptimConfig
    seed: int = 0
    matching: MatchingConfig = field(default_factory=MatchingConfig)
    alternatives: Alternatives | None = None  # for altered texts; none are made without

    reads: tuple[str, ...] = ("pixels", ALT_COLUMN, ALTS_COLUMN)
    where_reads: tuple[str, ...] = ("split", ALT_COLUMN)
    bucket: str | None = None  # each picture is stretched to the size that the captioner sees
    whole_weights: bool = False

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that have a caption."""
        return (columns["split"] == TRAIN) & present(columns[ALT_COLUMN])

    def updates(self) -> list[Update]:
        """The whole captioner."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            captioner = (
                load_captioner(self.source).train()
                if isinstance(self.source, str)
                else Captioner(self.source.blip(self.vocabulary), self.vocabulary, matching=self.matching)
            )
            held = captioner.matching.config.losses if captioner.matching is not None else ()
            if not set(self.matching.losses) <= set(held):
                captioner.matching = Matching(captioner.config, self.matching, self.vocabulary)
        if captioner.matching is not None:
            captioner.matching.gather = world.rows
            captioner.matching.requires_grad_(bool(self.matching))
        weights = {"contrastive": self.matching.contrastive, "match": self.matching.match}
        return [Update("base", captioner, self.optim, weights, mixes_rows=bool(self.matching))]

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row is its picture and texts."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Pixels, the tokens of the alt text that is read, and where texts are matched what draws wrong partners."""
        captions = {BASE: (_alts(rows, draw), "")}
        batch = _collate(rows, captions, self.vocabulary, self.image_size, self.max_length)
        if self.matching:
            batch |= _partners(batch[f"ids_{BASE}"], self.vocabulary, self.alternatives, draw)
        return batch

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """The base as a captioner of its own."""
        _save(modules["base"], folder)


@dataclass(frozen=True, kw_only=True)
class FilterTask:
    """CapFilt's filter: the matching head alone, on a base's frozen tower (arXiv 2201.12086, section 3.3).

    The paper tunes it on human captions alone. But the head has to judge alt texts, which are worded otherwise: so its
    rows are all that have an alt text, sorted by the base's decoder (`captioner.capfilt`). A labelled row shows, by
    draw, its alt text or a reference caption.
    """

    source: str  # where the base lies
    styles: tuple[Style, ...]  # whose reference captions are right texts, too
    vocabulary: Vocabulary
    image_size: tuple[int, int]
    max_length: int
    optim: OptimConfig
    matching: MatchingConfig
    alternatives: Alternatives | None = None  # for altered texts; none are made without
    seed: int = 0

    where_reads: tuple[str, ...] = ("split", ALT_COLUMN)
    bucket: str | None = None  # each picture is stretched to the size that the captioner sees
    whole_weights: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        """Pixels, the alt texts and the styles' reference captions."""
        return ("pixels", ALTS_COLUMN, *self._columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        return (ALT_COLUMN, *(reference_column(style) for style in self.styles))

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that have a caption."""
        return (columns["split"] == TRAIN) & present(columns[ALT_COLUMN])

    def updates(self) -> list[Update]:
        """The matching head; where the base has none, it begins with the weights of the base's decoder."""
        captioner = load_captioner(self.source).train()
        captioner.requires_grad_(False)
        if captioner.matching is None or not set(self.matching.losses) <= set(captioner.matching.config.losses):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                captioner.matching = Matching(captioner.config, self.matching, self.vocabulary)
            captioner.matching.begin_as(captioner.decoders[BASE])
        captioner.matching.config = replace(captioner.matching.config, hard=self.matching.hard)
        captioner.matching.gather = world.rows
        captioner.matching.requires_grad_(True)
        weights = {"contrastive": self.matching.contrastive or 1.0, "match": self.matching.match}
        return [Update("filter", Filter(captioner), self.optim, weights, mixes_rows=True, rebuilt=("captioner",))]

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row is its picture and texts."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Pixels, the tokens of one of each row's texts, and its wrong partners: draws, and an altered text."""
        columns = [_alts(rows, draw), *(rows[name] for name in self._columns[1:])]
        texts = [[text for text in row if text] for row in zip(*columns, strict=True)]
        chosen = [int(place * len(row)) for row, place in zip(texts, draw("text"), strict=True)]
        shown = [row[number] for row, number in zip(texts, chosen, strict=True)]
        ids = self.vocabulary.sequences(shown, "", self.max_length)[0]
        known = np.array([number > 0 for number in chosen], np.float32)  # the first is the alt text
        batch = {"pixels": fit_images(rows["pixels"], self.image_size), "ids": ids, "known": known}
        further = rows.get(ALTS_COLUMN) or [None] * len(texts)  # they are right, too
        right = [[*known, *(more or ())] for known, more in zip(texts, further, strict=True)]
        return batch | _partners(ids, self.vocabulary, self.alternatives, draw, right)

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """The base with its matching head."""
        module = modules["filter"]
        assert isinstance(module, Filter)
        _save(module.captioner, folder)


@dataclass(frozen=True, kw_only=True)
class FinetuneTask:
    """One decoder a style, each from the base's, on labelled rows; the tower stays and encodes a row once for all.

    As DALL-E 3 (Betker et al. 2023, section 2.1) tunes its captioner twice from one base, but in one training: the
    styles share nothing that is trained, so their losses do not meet.
    """

    source: str  # where the base lies
    styles: tuple[Style, ...]
    vocabulary: Vocabulary
    image_size: tuple[int, int]
    max_length: int
    optim: OptimConfig

    bucket: str | None = None  # each picture is stretched to the size that the captioner sees
    whole_weights: bool = False

    @property
    def where_reads(self) -> tuple[str, ...]:
        """The split and the styles' reference captions."""
        return ("split", *self._columns)

    @property
    def reads(self) -> tuple[str, ...]:
        """Pixels, the styles' reference captions, and the alt text where a style's prompt holds it."""
        alt = (ALT_COLUMN,) if any(style.reads_alt for style in self.styles) else ()
        return ("pixels", *alt, *self._columns)

    @property
    def _columns(self) -> tuple[str, ...]:
        return tuple(reference_column(style) for style in self.styles)

    def where(self, columns: dict[str, np.ndarray]) -> np.ndarray:
        """Rows of the training split that are labelled in any of the styles."""
        labelled = np.any([present(columns[name]) for name in self._columns], axis=0)
        return (columns["split"] == TRAIN) & labelled

    def updates(self) -> list[Update]:
        """One Update for all styles, so that a row passes through the tower once."""
        captioner = load_captioner(self.source).train()
        captioner.branch([style.name for style in self.styles])
        captioner.styles = self.styles
        base = tuple(name for name, _ in captioner.named_children())  # but for the new decoders, which are trained
        return [Update("finetune", captioner, self.optim, rebuilt=base)]

    def picks(self, rows: dict[str, list], draw: Draw) -> dict[str, list[str | None]]:
        """Nothing: each row is its picture and texts."""
        return {}

    def collate(self, rows: dict[str, list], draw: Draw) -> dict[str, np.ndarray]:
        """Pixels and the tokens of each style's reference caption after the row's prompt."""
        alts = rows.get(ALT_COLUMN, [None] * len(rows["pixels"]))
        captions = {
            style.name: (rows[reference_column(style)], prompts_of(style, alts, self.vocabulary, self.max_length))
            for style in self.styles
        }
        return _collate(rows, captions, self.vocabulary, self.image_size, self.max_length)

    def export(self, modules: dict[str, torch.nn.Module], folder: str) -> None:
        """One tower, the base's decoder and one for each style."""
        _save(modules["finetune"], folder)


def reference_column(style: Style) -> str:
    """Where an ingest keeps the labelled captions of a style."""
    return f"reference_{style.name}"


def about(artifact: str) -> About:
    """What a captioner that was saved in a folder (local or s3://) says of itself."""
    return About.of(storage.read_json(storage.join(artifact, CONFIG)))


def load_captioner(source: str) -> Captioner:
    """The captioner in a folder (local or s3://), or of that name on the Hugging Face hub."""
    captioner = load_tower(source)
    if BASE not in captioner.decoders:
        raise ValueError(f"{source} holds retrieval weights: it can score captions, but speaks none. Give a captioner.")
    return captioner


def load_tower(source: str) -> Captioner:
    """What `load_captioner` loads, or retrieval weights, which have no decoder."""
    if storage.is_local(source) and not storage.exists(source):
        return Captioner.load(source)
    with cache.cached(source) as local:
        return Captioner.load(local)


def _collate(
    rows: Mapping[str, Sequence],
    captions: Mapping[str, tuple[Sequence[str | None], str | Sequence[str]]],
    vocabulary: Vocabulary,
    image_size: tuple[int, int],
    max_length: int,
) -> dict[str, np.ndarray]:
    batch = {"pixels": fit_images(rows["pixels"], image_size)}
    for style, (texts, prompts) in captions.items():
        ids, mask = vocabulary.sequences(texts, prompts, max_length)
        # Nobody should learn to say [UNK]: it stands in the input, but not among the targets.
        batch |= {f"ids_{style}": ids, f"mask_{style}": mask * (ids != vocabulary.unk)}
    return batch


def _partners(
    ids: np.ndarray,
    vocabulary: Vocabulary,
    alternatives: Alternatives | None,
    draw: Draw,
    right: Sequence[Sequence[str]] | None = None,
) -> dict[str, np.ndarray]:
    """What chooses a row's wrong partners, and `ids_altered` (B, L), where texts are altered: padding for a row's none.

    `right` are all texts that are right for a row's picture; none of them is made.
    """
    batch = {name: draw(name) for name in ("draw_text", "draw_image")}
    if alternatives is None:
        return batch
    batch["ids_altered"] = altered = np.full_like(ids, vocabulary.pad)
    for row, (place, word) in enumerate(zip(draw("place"), draw("word"), strict=True)):
        line = ids[row][ids[row] != vocabulary.pad].tolist()
        known = [[vocabulary.bos, *tokens, vocabulary.sep] for tokens in vocabulary.encode(right[row] if right else [])]
        if (other := alternatives.alter(line, place, word, known)) is not None:
            altered[row, : len(other)] = other
    return batch


def _alts(rows: Mapping[str, Sequence], draw: Draw) -> list[str | None]:
    """The alt text of each row; of several, one by a draw of their own, so that rows with one are read as ever."""
    several = rows.get(ALTS_COLUMN) or []
    if not any(texts is not None for texts in several):
        return list(rows[ALT_COLUMN])
    places = pick(several, draw("alt"))
    return [
        first if texts is None else texts[place]
        for first, texts, place in zip(rows[ALT_COLUMN], several, places, strict=True)
    ]


def score_each(
    batch: Mapping[str, Sequence],
    first: Sequence[float | None],
    score: Callable[[list[int], list[str]], Sequence[float | None]],
) -> list[list[float | None] | None]:
    """Scores of all alt texts of each row that has several, None for other rows.

    `first` are those of the first texts; `score` scores one text of each of some rows.
    """
    several: Sequence[Sequence[str] | None] = batch.get(ALTS_COLUMN, [None] * len(first))
    found: list[list[float | None]] = [[known] for known in first]
    for place in range(1, max((len(texts) for texts in several if texts is not None), default=0)):
        texts = {row: texts[place] for row, texts in enumerate(several) if texts is not None and place < len(texts)}
        for row, value in zip(texts, score([*texts], [*texts.values()]), strict=True):
            found[row].append(value)
    return [None if texts is None else each for texts, each in zip(several, found, strict=True)]


def present(captions: np.ndarray) -> np.ndarray:
    """Which rows (booleans) have a caption."""
    return np.array([bool(caption) for caption in captions], dtype=bool)


def _save(module: torch.nn.Module, folder: str) -> None:
    assert isinstance(module, Captioner)
    module.save(folder)
