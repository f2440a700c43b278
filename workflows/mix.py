"""Decide which captions a text-to-image model learns from: thresholds and shares, never a model."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from captioner.detect import FAULTS
from infra.cluster import Cluster, connect
from infra.data.ledger import counting, recorded
from infra.data.run import run_shards
from infra.data.shards import OPTIONAL, ShardReader, joined_names
from infra.metrics import Report
from infra.store import Artifact, by_shard, step
from t2i.captions import shares

TOO_SHORT, TOO_LONG, UNLIKELY, UNMATCHED, MISSING = "too short", "too long", "unlikely", "unmatched", "missing"
ALT, ALTS = "alt", "captions_alt?"
SCORES = {"logp": "logps_alt?", "match": "matches_alt?"}  # of all alt texts of a row that has several
DUPLICATE, DUPLICATE_KIND, UNFIT = "duplicate_of", "duplicate_kind", "unfit_"  # columns of `deduplicate` and `examine`
READ = {ALT: 0.05, "short": 0.15, "descriptive": 0.8}  # of captions that a recipe has no shares for; of alt, DALL-E 3's
UNTOLD = ("no caption", "empty caption")  # what `ingest` says of rows without a text
JUDGED = ("keep", "keep_reason")  # counted in a shard's record; the weights are summed there
LANGUAGES = "unfit_languages?"  # by `examine`, of all alt texts of a row that has several


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How often each style is read (`weights`, by style, summing to 1), and which captions are fit to be read at all.

    A row keeps a caption of `min_words` to `max_words` words whose mean log-probability a token is not below
    `min_logp` of its style, nor its match below `min_match`, and whose flag is not one of `drop`; a row that is left
    without a caption is not kept. The default share of 10 % alt texts lies where Recap-DataComp-1B (arXiv 2406.08478,
    table 6) found text-to-image models best.

    Of several alt texts of a row each is judged by its own scores and its own language, and each that is fit has an
    even part of the share of `alt`.

    What is a duplicate, too small or of another language is decided where it is looked at: rows that `deduplicate` and
    `examine` mark are not kept if their artifacts are given, whatever the captions; a row of several alt texts is
    marked for its language where all of them are.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"alt": 0.1, "short": 0.2, "descriptive": 0.7})
    min_logp: dict[str, float] = field(default_factory=dict)  # by style; a style that is not named has no bound
    min_match: dict[str, float] = field(default_factory=dict)  # likewise: the probability that it speaks of the image
    min_words: int = 1
    max_words: int = 200
    drop: tuple[str, ...] = ("empty", "repetition", "prompt leak", "refusal")  # flags of captions that are not read

    def __post_init__(self) -> None:
        if unknown := [flag for flag in self.drop if flag not in FAULTS]:
            raise ValueError(f"There is no fault '{unknown[0]}'; there are {', '.join(FAULTS)}.")
        if any(weight < 0 for weight in self.weights.values()) or abs(sum(self.weights.values()) - 1) > 1e-6:
            raise ValueError(f"The weights of the styles must not be negative and must sum to 1; found {self.weights}.")
        for name in ("min_logp", "min_match"):
            if unknown := sorted(set(getattr(self, name)) - set(self.weights)):
                raise ValueError(
                    f"{name} names {', '.join(unknown)}, but the weights are of {', '.join(self.weights)}."
                )
        if not 1 <= self.min_words <= self.max_words:
            raise ValueError(
                f"Captions of {self.min_words} to {self.max_words} words cannot be; give 1 or more, in order."
            )


def weights_of(styles: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    """How often captions of these styles are read: `weights`, if they read some of them and nothing else but alt texts.

    Otherwise the styles have the shares that `weights` or else READ give them, one that neither names as much as all
    others, and the alt texts a little.
    """
    read = {style for style, weight in weights.items() if weight > 0} - {ALT}
    if not styles or (read and read <= {*styles}):
        return dict(weights)
    shares = {style: weights.get(style) or READ.get(style) or 1.0 for style in styles}
    scale = (1 - READ[ALT]) / sum(shares.values())
    return {ALT: READ[ALT]} | {style: round(share * scale, 9) for style, share in shares.items()}


def without_texts(config: MixConfig, captions: Artifact) -> str:
    """What is wrong where only the corpus's own texts are read, and no row has one, a sentence; "" if it is not so."""
    rows = captions.summary.get("accepted", 0)
    untold = sum(captions.summary.get("alt_faults", {}).get(fault, 0) for fault in UNTOLD)
    if captions.step != "ingest" or _styles(config) != [ALT] or not rows or untold < rows:
        return ""
    return (
        f"None of the {rows:,} pictures has a text to learn from. Have them captioned: --captioner WHO, a model's name "
        "or a server, or --captions FOLDER, captions that are there."
    )


def told(config: MixConfig, inputs: Sequence[Artifact], made: Artifact | None) -> list[str]:
    """For a plan: that there is nothing to be read, as far as that is known yet."""
    return [said] if (said := without_texts(config, inputs[1])) else []


@step(version=2, shards=by_shard, told=told)
def mix(
    config: MixConfig,
    images: Artifact,
    captions: Artifact,
    *verdicts: Artifact,
    out: str,
    cluster: Cluster,
    report: Report,
) -> dict[str, Any]:
    """Write `keep`, `keep_reason` and `weight_<style>`, how often each of its captions is to be read, for every row.

    In shards where a row has several alt texts `weights_alt` says so of each of them.

    `verdicts` are any of `deduplicate` and `examine`, in any number and order: the rows that they mark are not kept. Of
    several copies the first in the corpus may stay, and none does where its own captions are unfit.
    """
    if said := without_texts(config, captions):
        raise ValueError(said)
    inputs = (images.path, captions.path, *(artifact.path for artifact in verdicts))
    names = joined_names(inputs)
    for artifact in verdicts if names else ():
        found = ShardReader([artifact.path], names[0]).names
        if not _verdict_columns(found):
            raise ValueError(
                f"{artifact.path} was made by {artifact.step} and marks no rows; give what deduplicate or examine made."
            )
    if names:
        ShardReader(inputs, names[0]).columns(_columns(config))  # a style without captions is said before work starts
    connect(cluster)
    counts = run_shards(MixWork(config, inputs), names, out, actors=cluster.actors, report=report)
    summary = _summary(config, out)
    if not summary["kept"]:
        why = ", ".join(f"{reason} ({count})" for reason, count in summary["dropped_by_reason"].items())
        raise ValueError(f"No row keeps a caption to be read: {why or 'none was accepted'}. Change weights or bounds.")
    return counts | summary


@dataclass(frozen=True)
class MixWork:
    """Judges the captions of one shard."""

    config: MixConfig
    inputs: tuple[str, ...]

    def setup(self) -> None:
        """Nothing is loaded."""

    def __call__(self, name: str) -> pa.Table:
        """The verdict on each row; None in a row that was rejected or failed before."""
        reader = ShardReader(self.inputs, name)
        columns = reader.columns(_columns(self.config))
        fit: dict[str, list[str | None]] = {}
        verdicts: dict[str, list[str | None]] = {}
        for style in _styles(self.config):
            verdicts[style] = self._verdicts(reader, columns, style)
            texts = columns[f"caption_{style}"]
            fit[style] = [None if verdict else text for text, verdict in zip(texts, verdicts[style], strict=True)]
        several = self._several(columns, verdicts, fit) if "captions_alt" in reader.names else None
        marks = _marks(reader)
        unmarked = np.array([not mark for mark in marks], dtype=bool)
        weights = {style: column * unmarked for style, column in shares(fit, self.config.weights).items()}
        keep = np.sum(list(weights.values()), axis=0) > 0
        reasons = [
            None if kept else marks[row] or ", ".join(f"{style} {verdicts[style][row]}" for style in verdicts)
            for row, kept in enumerate(keep)
        ]
        table = {
            "keep": _spread(reader, keep.tolist(), pa.bool_()),
            "keep_reason": _spread(reader, reasons, pa.string()),
        } | {f"weight_{style}": _spread(reader, column.tolist(), pa.float32()) for style, column in weights.items()}
        states = {"state": pa.array(reader.states, pa.string()), "reason": pa.array(reader.reasons, pa.string())}
        made = pa.table({"sample_id": pa.array(reader.sample_ids, pa.string()), **states, **table})
        made = counting(made, JUDGED, _weights(self.config))
        if several is None:
            return made
        pairs = zip(several, weights[ALT].tolist(), strict=True)
        parts = [[share * fits / max(sum(each), 1) for fits in each] for each, share in pairs]
        field = pa.field("weights_alt", pa.list_(pa.float32()), metadata=OPTIONAL)
        return made.append_column(field, _spread(reader, parts, field.type))

    def _several(
        self, columns: dict[str, np.ndarray], verdicts: dict[str, list[str | None]], fit: dict[str, list[str | None]]
    ) -> list[list[bool]] | None:
        """Which alt texts of each row are fit; where the first is not, the first that is fit speaks for the row."""
        if ALT not in fit:
            return None
        scored = [(columns[SCORES[kind]], by[ALT], word) for kind, by, word in _bounds(self.config) if ALT in by]
        several = []
        for row, (texts, marks) in enumerate(zip(columns[ALTS], columns[LANGUAGES], strict=True)):
            several.append([verdicts[ALT][row] is None])
            for place, text in enumerate([] if texts is None else texts[1:], start=1):
                own = ((None if each[row] is None else each[row][place], bound, word) for each, bound, word in scored)
                low = next((word for value, bound, word in own if _below(value, bound)), None)
                mark = None if marks is None else marks[place]
                several[-1].append((judge(text, None, self.config) or low or mark) is None)
            if (good := next((n for n, each in enumerate(several[-1]) if each), 0)) and texts is not None:
                verdicts[ALT][row], fit[ALT][row] = None, texts[good]
        return several

    def _verdicts(self, reader: ShardReader, columns: dict[str, np.ndarray], style: str) -> list[str | None]:
        """Why each caption of a style is unfit; None for those that are fit."""
        texts, flag = columns[f"caption_{style}"], f"flag_{style}"
        # Alt texts and the captions of some models come without flags.
        flags = reader.columns([flag])[flag] if flag in reader.names else [None] * len(texts)
        scored = [
            (columns[f"{kind}_{style}"], by[style], word) for kind, by, word in _bounds(self.config) if style in by
        ]
        several = columns[LANGUAGES] if style == ALT else [None] * len(texts)
        verdicts = []
        for row, (text, marks) in enumerate(zip(texts, several, strict=True)):
            low = (word for scores, bound, word in scored if _below(scores[row], bound))
            mark = None if marks is None else marks[0]
            verdicts.append(judge(text, flags[row], self.config) or next(low, None) or (mark and mark.split(":")[0]))
        return verdicts


def _marks(reader: ShardReader) -> list[str]:
    """Why a row is unfit, whatever is said of it: `near duplicate: <sample id>`, `too small: 9x9`; "" if it is fit."""
    unfit = _verdict_columns(reader.names) - {DUPLICATE}
    columns = [reader.columns([name])[name].tolist() for name in sorted(unfit)]
    if DUPLICATE in reader.names:
        found = reader.columns([DUPLICATE, DUPLICATE_KIND])
        pairs = zip(found[DUPLICATE], found[DUPLICATE_KIND], strict=True)
        columns.insert(0, [f"{kind} duplicate: {original}" if original else None for original, kind in pairs])
    return [", ".join(filter(None, found)) for found in zip(*columns, strict=True)] if columns else [""] * len(reader)


def _verdict_columns(names: set[str]) -> set[str]:
    """The columns that say of whole rows what is wrong with them."""
    return {name for name in names if name == DUPLICATE or name.startswith(UNFIT)} - {LANGUAGES.removesuffix("?")}


def judge(text: str | None, flag: str | None, config: MixConfig) -> str | None:
    """Why a caption is unfit, whatever its scores; None if it is fit."""
    words = len(text.split()) if text else 0
    if not words:
        return MISSING
    if flag in config.drop:
        return flag
    if words < config.min_words:
        return TOO_SHORT
    if words > config.max_words:
        return TOO_LONG
    return None


def _below(score: float | None, bound: float) -> bool:
    """A caption without a score is below any bound."""
    return score is None or not score >= bound


def _bounds(config: MixConfig) -> tuple[tuple[str, dict[str, float], str], ...]:
    """The kinds of scores, their bounds by style, and the verdict on what is below."""
    return ("logp", config.min_logp, UNLIKELY), ("match", config.min_match, UNMATCHED)


def _styles(config: MixConfig) -> list[str]:
    return [style for style, weight in config.weights.items() if weight > 0]


def _columns(config: MixConfig) -> list[str]:
    scored = [f"{kind}_{style}" for kind, bounds, _ in _bounds(config) for style in _styles(config) if style in bounds]
    several = [ALTS, LANGUAGES, *(SCORES[kind] for kind, by, _ in _bounds(config) if ALT in by)]
    return [f"caption_{style}" for style in _styles(config)] + several * (ALT in _styles(config)) + scored


def _spread(reader: ShardReader, values: list[Any], kind: pa.DataType) -> pa.Array:
    """Values of the accepted rows in a column of all rows."""
    column: list[Any] = [None] * len(reader.sample_ids)
    for row, value in zip(reader.accepted, values, strict=True):
        column[row] = value
    return pa.array(column, kind)


def _summary(config: MixConfig, out: str) -> dict[str, Any]:
    kept, reasons, shared = 0, Counter[str](), dict.fromkeys(_styles(config), 0.0)
    for record in recorded(out, JUDGED, _weights(config)):
        kept += record["counts"]["keep"].get("True", 0)
        reasons.update(record["counts"]["keep_reason"])
        for style in shared:
            shared[style] += record["sums"][f"weight_{style}"]
    read = {style: round(total / max(kept, 1), 4) for style, total in shared.items()}
    return {"kept": kept, "dropped": reasons.total(), "dropped_by_reason": dict(reasons.most_common(20)), "read": read}


def _weights(config: MixConfig) -> list[str]:
    return [f"weight_{style}" for style in _styles(config)]
