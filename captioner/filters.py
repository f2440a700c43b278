"""Cheap looks at a row, as stages: they write what they find and their verdict, and drop nothing."""

from dataclasses import dataclass, field

from captioner.hashing import mean_colors, phash

ALT_COLUMN = "caption_alt"
ALTS_COLUMN = "captions_alt?"  # all captions of a row, in shards where some row has several


@dataclass
class Hash:
    """Writes `phash` and `colors`, by which `captioner.duplicates` finds pictures that look alike."""

    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(default=("pixels",), init=False)
    writes: tuple[str, ...] = field(default=("phash", "colors"), init=False)

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """The signatures of pictures of any size."""
        images = batch["pixels"]
        return {"phash": [phash(image) for image in images], "colors": [mean_colors(image) for image in images]}


@dataclass
class Size:
    """Writes `unfit_size`: why the size of an image is unfit, or None.

    It is fit if its shorter side has `min_side` pixels, and its longer is not more than `max_aspect` times as long.
    """

    min_side: int
    max_aspect: float
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(default=("width", "height"), init=False)
    writes: tuple[str, ...] = field(default=("unfit_size",), init=False)
    counted: tuple[str, ...] = field(default=("unfit_size",), init=False)

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Verdicts on widths and heights in pixels, as the index of an ingest has them."""
        return {"unfit_size": [self._judge(*size) for size in zip(batch["width"], batch["height"], strict=True)]}

    def _judge(self, width: int, height: int) -> str | None:
        shorter, longer = sorted((width, height))
        if shorter < self.min_side:
            return f"too small: {width}x{height}"
        if longer > self.max_aspect * shorter:
            return f"too narrow: {width}x{height}"
        return None


@dataclass
class Language:
    """Writes `language_alt`, what the alt text seems to be written in, and `unfit_language`, the verdict on the row.

    The first is an ISO 639 code, or None where there is no text or no letter in it, which is fit. A text is unfit
    (`other language: fr`) if the probability that it is in one of `languages` lies below `min_probability`; with no
    `languages`, all are fit. Between that and certainty lie the many captions of a word or two, which could be in any
    language: they pass. The classifier is naive Bayes over byte n-grams (Lui and Baldwin, langid.py, ACL 2012) as
    retrained by py3langid.

    Of several alt texts `languages_alt` and `unfit_languages` say both of each, and `language_alt` is of the first. The
    row is unfit, as its first text is, where all are.
    """

    languages: tuple[str, ...] = ()
    min_probability: float = 0.002
    cpus: float = 1
    gpus: float = 0
    reads: tuple[str, ...] = field(default=(ALT_COLUMN, ALTS_COLUMN), init=False)
    writes: tuple[str, ...] = field(init=False)
    types: dict[str, str] = field(init=False)
    optional: tuple[str, ...] = field(default=("languages_alt", "unfit_languages"), init=False)
    counted: tuple[str, ...] = field(default=("unfit_language",), init=False)

    def __post_init__(self) -> None:
        self.writes = ("language_alt", "unfit_language", *self.optional)
        self.types = dict.fromkeys(self.optional, "string[]")

    def setup(self) -> None:
        """Load the classifier, which comes with its package; ValueError if it does not know one of the languages."""
        from py3langid.langid import MODEL_FILE, LanguageIdentifier

        self._classifier = LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
        if unknown := sorted(set(self.languages) - set(self._classifier.labels)):
            raise ValueError(f"There is no language {', '.join(unknown)}. Give ISO 639 codes, such as en, de, zh.")

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        """Languages of texts, and the verdicts."""
        pairs = zip(batch[ALT_COLUMN], batch[ALTS_COLUMN], strict=True)
        found = [[self._judge(text) for text in ([first] if texts is None else texts)] for first, texts in pairs]
        every = [None if texts is None else each for each, texts in zip(found, batch[ALTS_COLUMN], strict=True)]
        return {
            "language_alt": [each[0][0] for each in found],
            "unfit_language": [each[0][1] if all(verdict for _, verdict in each) else None for each in found],
            "languages_alt": [each and [code for code, _ in each] for each in every],
            "unfit_languages": [each and [verdict for _, verdict in each] for each in every],
        }

    def _judge(self, text: str | None) -> tuple[str | None, str | None]:
        if not text or not any(letter.isalpha() for letter in text):
            return None, None
        probabilities = dict(self._classifier.rank(text))
        likeliest = next(iter(probabilities))
        wanted = sum(probabilities[code] for code in self.languages)
        unfit = bool(self.languages) and wanted < self.min_probability
        return likeliest, f"other language: {likeliest}" if unfit else None
