"""How well do scores tell whether a sentence of NLVR is true of its picture? Nothing is trained on that label.

    RESCRIBE_CORPORA=CORPORA python -m benchmarks.nlvr_match --steps 600 --filter_steps 300

Base and filter learn from the pictures and sentences of `dev` (Suhr et al., ACL 2017), 45 % of which are false, and of
the recipe's labelled rows; the pairs of `test` are scored. Prints one JSON object with the AUC of each score and its
95 % interval: the bootstrap's percentiles over sentences, each drawn with all its pictures, since these are no
independent samples.
"""

import io
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from benchmarks.matching import Config, Rows, auc, learn, scores, sizes
from captioner.images import fit_images
from captioner.matching import MatchingConfig
from workflows.corpora import nlvr

SIZE = (32, 128)  # as the recipe's
RESAMPLES = 1000


def read_corpus(folder: Path) -> tuple[Rows, Rows, np.ndarray, np.ndarray]:
    """Rows of `dev` and of `test`; of the latter, whether each sentence is true, and which sentence it is."""
    splits: dict[str, Rows] = {"train": {}, "test": {}}
    truth, sentences = [], []
    for key, about, text, image in _samples(folder):
        labels = nlvr.label(key, text, about)
        rows = splits[str(labels.pop("split"))]
        for name, value in {**labels, "pixels": fit_images([image], SIZE)[0]}.items():
            rows.setdefault(name, []).append(value)
        if rows is splits["test"]:
            truth.append(about["caption_is_true"])
            sentences.append(int(about["scene"].split("-")[0]))
    return splits["train"], splits["test"], np.array(truth), np.array(sentences)


def _samples(folder: Path) -> Iterator[tuple[str, dict, str, np.ndarray]]:
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            files = {member.name: (tar.extractfile(member) or io.BytesIO()).read() for member in tar}
        for key in sorted({name.split(".")[0] for name in files}):
            image = np.asarray(Image.open(io.BytesIO(files[f"{key}.png"])).convert("RGB"))
            yield key, json.loads(files[f"{key}.json"]), files[f"{key}.txt"].decode(), image


def interval(values: np.ndarray, true: np.ndarray, groups: np.ndarray) -> tuple[float, float]:
    """The 95 % interval of the AUC: percentiles over resamples of whole groups."""
    rng, found = np.random.default_rng(0), []
    members = [np.flatnonzero(groups == group) for group in np.unique(groups)]
    for _ in range(RESAMPLES):
        rows = np.concatenate([members[number] for number in rng.integers(len(members), size=len(members))])
        found.append(ranked(values[rows], true[rows]))
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def ranked(values: np.ndarray, true: np.ndarray) -> float:
    """`auc`, by mean ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    right = int(true.sum())
    return float((ranks[true].sum() - right * (right + 1) / 2) / (right * (len(true) - right)))


def main(config: Config) -> None:
    train, test, true, sentences = read_corpus(Path(os.environ["RESCRIBE_CORPORA"], "nlvr"))
    captioner, took = learn(config, sizes(*SIZE, 112), train)
    found: dict = {"pairs": len(true), "sentences": len(np.unique(sentences)), "true": round(float(true.mean()), 4)}
    for name, values in scores(captioner, test).items():
        low, high = interval(values, true, sentences)
        found[name] = {"auc": round(auc(values, true), 4), "from": round(low, 4), "to": round(high, 4)}
    print(json.dumps(took | found, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Config, default=Config(steps=600, filter_steps=300, matching=MatchingConfig())))
