"""CapFilt's filter: what tells right texts from wrong ones learns from texts of which nobody said which is which.

A base that was trained to speak can doubt a single word. Where a picture makes a word much less likely than the words
before it do, the word is wrong; where no word gains by the picture, the text does not speak of it. So the decoder sorts
the alt texts on which the matching head (arXiv 2201.12086, section 3.3) is tuned: bootstrapping, with the captioner in
the place of people.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from captioner.matching import Matching
from captioner.model import BASE, Captioner

# In nats: a text is taken to be right where its worst token and all of them together gain so much by the picture, and
# wrong where either gains less than this; else it is not learned from. Chosen on Shapes (docs/results, 2026-11-21).
RIGHT = {"worst": -1.0, "total": 1.0}
WRONG = {"worst": -2.0, "total": 0.5}
_NOUGHT = 2.0  # what a text has to gain in all before its worst word is what it is weighed by


@torch.no_grad()
def gains(captioner: Captioner, features: Tensor, ids: Tensor) -> Tensor:
    """log p(token | picture, tokens before) - log p(token | tokens before), (B, L - 1) fp32; 0 at padding.

    `ids` (B, L) open with [DEC]. Both are the base's decoder's, the second with its cross-attention left out.
    """
    decoder, text = captioner.decoders[BASE], ids[:, :-1]
    seeing = captioner.logits(BASE, features, text).log_softmax(-1)
    blind = decoder(text, use_cache=False).logits.float().log_softmax(-1)
    gained = (seeing - blind).gather(2, ids[:, 1:, None])[..., 0]
    return gained * (ids[:, 1:] != captioner.vocabulary.pad)


@torch.no_grad()
def weigh(captioner: Captioner, features: Tensor, texts: Sequence[str | None]) -> list[float | None]:
    """How well the base's decoder finds each text borne out by its picture, in nats: the higher, the righter.

    It is what the worst token gains by the picture, at most 0, or all tokens less 2, whichever is less; None for a row
    without text. It is the decoder's word, not the match score.
    """
    ids = torch.from_numpy(captioner.vocabulary.sequences(texts, "", captioner.max_length)[0]).to(features.device)
    found = _summed(gains(captioner, features, ids))
    weights = torch.minimum(found["worst"], found["total"] - _NOUGHT).tolist()
    return [weight if text is not None else None for weight, text in zip(weights, texts, strict=True)]


def verdicts(gained: Tensor) -> Tensor:
    """(B,) fp32 of `gains` (B, L): 1 for a text that is right, -1 for one that is wrong, 0 where one cannot say."""
    found = _summed(gained)
    right = torch.stack([found[name] >= least for name, least in RIGHT.items()]).all(0)
    wrong = torch.stack([found[name] < least for name, least in WRONG.items()]).any(0)
    return right.float() - wrong.float()


def _summed(gained: Tensor) -> dict[str, Tensor]:
    worst = gained.min(1).values.clamp(max=0)  # as if all were padded: a text's weight must not depend on its batch
    return {"worst": worst, "total": gained.sum(1)}


class Filter(nn.Module):
    """A captioner of which the matching part alone is trained, on texts of any wording.

    Batch: `pixels` (B, H, W, 3) uint8, what `Matching` reads, and `known` (B,): 1 where a person said that a text is
    right, 0 where the base's decoder is asked.
    """

    def __init__(self, captioner: Captioner) -> None:
        super().__init__()
        self.captioner = captioner

    @property
    def _matching(self) -> Matching:
        assert self.captioner.matching is not None
        return self.captioner.matching

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The summed losses of matching, or what its rows show to others where the batch is a "survey"."""
        features = self.captioner.encode(batch["pixels"])
        if "survey" in batch:
            return self._matching.survey(features, batch)
        found = verdicts(gains(self.captioner, features, batch["ids"]))
        verdict = torch.where(batch["known"] > 0, torch.ones_like(found), found)
        return self._matching(features, {**batch, "verdict": verdict})

    def targets(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """How many rows each sum runs over."""
        return {name: batch["weight"].sum() for name in self._matching.config.losses}
