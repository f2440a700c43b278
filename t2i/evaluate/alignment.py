"""How well pictures and texts go together, by the embeddings of a model such as CLIP."""

from collections.abc import Hashable, Sequence

import numpy as np

from t2i.evaluate import intervals
from t2i.evaluate.intervals import Estimate

BLOCK = 1024  # rows whose similarities are held at a time


def clip_score(images: np.ndarray, texts: np.ndarray) -> Estimate:
    """Mean of 100 max(cos, 0) over pairs, picture i with text i, embeddings (N, D) (arXiv 2104.08718, weight 100)."""
    return intervals.mean(clip_rows(images, texts))


def clip_rows(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """(N,) float64: 100 max(cos, 0) of each pair, of which `clip_score` is the mean."""
    images, texts = _unit(images), _unit(texts)
    if images.shape != texts.shape:
        raise ValueError(f"Each picture has its text, but embeddings are {images.shape} and {texts.shape}.")
    return 100 * np.maximum((images * texts).sum(1), 0)


def retrieval(
    images: np.ndarray,
    texts: np.ndarray,
    image_keys: Sequence[Hashable] | None = None,
    text_keys: Sequence[Hashable] | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Estimate]:
    """`text_r@k`: share of pictures that find a text of theirs among the k nearest; `image_r@k`: of texts, a picture.

    Embeddings (N, D) and (T, D) are compared by cosine. A picture and a text belong together where their keys are
    equal: the text itself where captions repeat, the picture's number where it has several texts; without keys, row i
    with row i. Of equally near ones those that do not belong come first: what tells nothing apart finds nothing.
    """
    rank = {
        "text": ranks(images, texts, image_keys, text_keys),
        "image": ranks(texts, images, text_keys, image_keys),
    }
    return {f"{found}_r@{k}": intervals.share(each < k) for found, each in rank.items() for k in ks}


def ranks(
    queries: np.ndarray,
    others: np.ndarray,
    query_keys: Sequence[Hashable] | None = None,
    other_keys: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """(N,) how many strangers are as near to a row as the nearest of `others` that belongs to it; all where none does.

    Embeddings (N, D), (T, D) and keys as of `retrieval`: a row is found among the k nearest where its rank is below k.
    """
    queries, others = _unit(queries), _unit(others)
    mine = list(range(len(queries)) if query_keys is None else query_keys)
    theirs = list(range(len(others)) if other_keys is None else other_keys)
    if len(mine) != len(queries) or len(theirs) != len(others) or not set(mine) & set(theirs):
        raise ValueError(
            f"Found {len(queries)} rows with {len(mine)} keys and {len(others)} others with {len(theirs)}, "
            f"{len(set(mine) & set(theirs))} keys in common."
        )
    numbers = {key: number for number, key in enumerate(dict.fromkeys([*mine, *theirs]))}
    owners, other_owners = (np.array([numbers[key] for key in keys]) for keys in (mine, theirs))
    found = []
    for start in range(0, len(queries), BLOCK):
        near = queries[start : start + BLOCK] @ others.T
        own = owners[start : start + BLOCK, None] == other_owners
        best = np.where(own, near, -np.inf).max(1, keepdims=True)
        # Sums of one row may come out a little different beside other rows: what is as near up to 1e-9 is as near.
        found.append((~own & (near >= best - 1e-9)).sum(1))
    return np.concatenate(found)


def _unit(embeddings: np.ndarray) -> np.ndarray:
    """(N, D) float64 of length 1; ValueError for none, and for what has no direction."""
    rows = np.asarray(embeddings, np.float64)
    lengths = np.linalg.norm(rows, axis=-1, keepdims=True)
    if rows.ndim != 2 or not len(rows) or not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError(f"Embeddings are (N, D), finite and not 0, at least one; found an array {rows.shape}.")
    return rows / lengths
