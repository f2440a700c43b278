"""The caption of a row is a function of (seed, epoch, sample id), decided when the row is read."""

from collections.abc import Mapping, Sequence

import numpy as np

ALT, ALTS, SHARES = "alt", "captions_alt?", "weights_alt?"  # several alt texts of a row, and the shares of each


def shares(
    captions: Mapping[str, Sequence[str | None]], weights: Mapping[str, float | np.ndarray]
) -> dict[str, np.ndarray]:
    """The probability of each style for each row: `weights` renormalised over the captions that the row has.

    `captions` holds one column a style ("alt", "short", ...), None or blank where a row has none. A weight is a number
    for the whole column or a (B,) array; a style without a weight weighs 0. Returns float64 (B,) columns that sum to 1
    in a row, or to 0 where the row has no caption of positive weight.
    """
    if not captions:
        raise ValueError("There is no caption column to choose from.")
    columns = {
        style: weights.get(style, 0.0) * np.array([bool(text and text.strip()) for text in column], np.float64)
        for style, column in captions.items()
    }
    total = np.sum(list(columns.values()), axis=0)
    return {
        style: np.divide(column, total, out=np.zeros_like(total), where=total > 0) for style, column in columns.items()
    }


def choose(
    captions: Mapping[str, Sequence[str | None]], weights: Mapping[str, float | np.ndarray], uniforms: np.ndarray
) -> list[str]:
    """One caption a row: that of the style that `choose_styles` draws."""
    return [captions[style][row] or "" for row, style in enumerate(choose_styles(captions, weights, uniforms))]


def choose_styles(
    captions: Mapping[str, Sequence[str | None]], weights: Mapping[str, float | np.ndarray], uniforms: np.ndarray
) -> list[str]:
    """One style a row, drawn by its weights (DALL-E 3, Betker et al. 2023, section 2: blended as rows are sampled).

    `uniforms` are (B,) numbers in [0, 1) keyed by (seed, epoch, sample id); nothing else enters, so the blend is the
    same whatever the batch, the order or the number of workers. Raises ValueError for a row that has no caption.
    """
    columns = shares(captions, weights)
    styles = sorted(columns)  # not the order of the caller's columns: that must not change what a row says
    upper = np.cumsum([columns[style] for style in styles], axis=0)
    empty = np.flatnonzero(upper[-1] == 0)
    if len(empty):
        raise ValueError(
            f"Row {empty[0]} of the batch has no caption of positive weight among {', '.join(styles)}. "
            "Train on the rows that `mix` keeps."
        )
    last = len(styles) - 1 - np.argmax(np.stack([columns[style] for style in reversed(styles)]) > 0, axis=0)
    # Rounding may leave the last bound a hair under 1, and no row may fall to a style that it lacks.
    picks = np.minimum((upper <= uniforms).sum(axis=0), last)
    return [styles[pick] for pick in picks.tolist()]


def caption_columns(styles: Sequence[str]) -> tuple[str, ...]:
    """What `heard` and `texts_of` read of rows: captions and shares of all styles, and all alt texts."""
    several = (ALTS, SHARES) if ALT in styles else ()
    return (*several, *(f"{kind}_{style}" for style in styles for kind in ("caption", "weight")))


def heard(
    rows: Mapping[str, Sequence], styles: Sequence[str], uniforms: np.ndarray, places: Sequence[int] | None = None
) -> list[tuple[str, int]]:
    """The style of the caption that each row reads and, of several alt texts, the place of the one.

    `places` (B,) are drawn by `pick` where rows have several, `uniforms` (B,) draw the styles.
    """
    captions: dict[str, Sequence[str | None]] = {style: rows[f"caption_{style}"] for style in styles}
    if places is not None:
        captions[ALT] = texts_of(rows, [(ALT, place) for place in places])
    weights = {style: np.array(rows[f"weight_{style}"], dtype=np.float64) for style in styles}
    chosen = choose_styles(captions, weights, uniforms)
    return [(style, places[row] if places and style == ALT else 0) for row, style in enumerate(chosen)]


def texts_of(rows: Mapping[str, Sequence], heard: Sequence[tuple[str, int]]) -> list[str]:
    """The texts of what rows hear."""
    several = rows.get(ALTS) or [None] * len(heard)
    return [
        texts[place] if style == ALT and texts is not None else rows[f"caption_{style}"][row] or ""
        for row, ((style, place), texts) in enumerate(zip(heard, several, strict=True))
    ]
