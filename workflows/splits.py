"""What is said where no row is left to train on: which splits there are, and how to have one of them trained on."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from infra.data.shards import ShardReader, Where, joined_names, select_rows
from infra.store import Artifact
from workflows.judge import TEST, TRAIN


def demand_rows(images: Artifact, where: Where | None = None, where_reads: Sequence[str] = (), lack: str = "") -> None:
    """ValueError where no accepted row is of the split `train`, or none of those is one of `where`: they `lack`."""

    def wanted(columns: dict[str, np.ndarray]) -> np.ndarray:
        training = columns["split"] == TRAIN
        return training & where(columns) if where else training

    names, reads = joined_names([images.path]), ["split", *where_reads]
    if any(len(select_rows(ShardReader([images.path], name), wanted, reads)) for name in names):
        return
    splits: Counter[str] = Counter()
    for name in names:
        splits.update(map(str, ShardReader([images.path], name).columns(["split"])["split"]))
    if splits[TRAIN]:
        raise ValueError(f"No row of {images.path} is left to train on: its {splits[TRAIN]:,} training rows {lack}.")
    told = " and ".join(f"{split} ({count:,})" for split, count in splits.most_common(5)) or "no row at all"
    other = next((split for split, _ in splits.most_common() if split != TEST), "restval")
    raise ValueError(
        f"No row of {images.path} is left to train on: its splits are {told}. "
        f"Ingest again and say which of them means train, as --corpus.splits {other}=train does."
    )
