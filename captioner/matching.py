"""Does a text speak of an image? BLIP's matching head and contrastive projections (arXiv 2201.12086, section 3.2)."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, pad

from captioner.vocabulary import Vocabulary

if TYPE_CHECKING:
    import transformers

Gather = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""Columns of this worker's rows -> the same of all workers' rows of weight above 0, and where this worker's begin."""

SEEN = "all_"  # a batch whose columns have this prefix brings the rows of the whole global batch with it


@dataclass(frozen=True, kw_only=True)
class MatchingConfig:
    """What is learned beside language modelling, and the weights of its losses; a part of weight 0 is not built."""

    contrastive: float = 0.0  # images and texts that belong together lie close (arXiv 2107.07651, equation 1)
    match: float = 0.0  # right pairs and hard wrong ones are told apart (ibid., equation 4)
    # The share of wrong partners drawn by likeness, all of them in ALBEF and BLIP; the others are drawn evenly. On
    # Shapes, whose batches are small and whose texts are noisy, 0 did better than 1 (docs/results, 2026-11-20 CapFilt).
    hard: float = 1.0
    altered: bool = False  # the right text with one word replaced is a third wrong pair (`captioner.altered`)
    width: int = 256  # of the space in which images and texts are compared
    temperature: float = 0.07  # of their cosines at first; it is learned

    def __post_init__(self) -> None:
        if self.contrastive < 0 or self.match < 0:
            raise ValueError(
                f"The weights of losses must not be negative; found contrastive={self.contrastive}, match={self.match}."
            )
        if not 0 <= self.hard <= 1:
            raise ValueError(f"hard is a share from 0 to 1, but it is {self.hard}.")
        if self.width < 1 or not 0.01 <= self.temperature <= 1:
            raise ValueError(
                f"Give a width of at least 1 and a temperature from 0.01 to 1; found {self.width}, {self.temperature}."
            )

    @property
    def losses(self) -> tuple[str, ...]:
        """What is learned: "contrastive", "match", both or neither."""
        return tuple(name for name in ("contrastive", "match") if getattr(self, name))

    def __bool__(self) -> bool:
        return bool(self.losses)


class Matching(nn.Module):
    """A text encoder that reads a text alone, or beside the vision tower's features, and what judges by it.

    Batch of a training: `ids` (B, L) integers, a first token, a text, [SEP], and padding on the right; `weight` (B,);
    `draw_text` and `draw_image` (B,) uniforms in [0, 1) that choose a row's hard negatives (arXiv 2107.07651, section
    3.3). Negatives come from the whole global batch, which `gather` brings together, or which came with the batch; no
    queue of former ones is kept. Two columns more may come with a batch: `ids_altered` (B, M), a further text that is
    wrong of its row's image, or padding alone where a row has none; and `verdict` (B,), 1 where a row's own text is
    right, -1 where it is wrong, 0 where it is not known: else all are taken to be right. BLIP's encoder shares all
    weights but self-attention with its decoder. This one shares none, as published retrieval weights have it: style
    decoders are tuned while the encoder must stay.
    """

    def __init__(self, config: "transformers.BlipConfig", matching: MatchingConfig, vocabulary: Vocabulary) -> None:
        from transformers import BlipTextModel  # slow to import: `plan` does without

        super().__init__()
        self.config, self.vocabulary = matching, vocabulary
        self.gather: Gather = _alone
        text: Any = copy.deepcopy(config.text_config)
        if vocabulary.tokenizer.token_to_id("[ENC]") is None:
            text.vocab_size = max(text.vocab_size, len(vocabulary) + 1)  # the last is [ENC], which no text spells
        self.text_encoder: Any = BlipTextModel(text, add_pooling_layer=False)
        if matching.contrastive:
            vision: Any = config.vision_config
            self.vision_proj = nn.Linear(vision.hidden_size, matching.width)
            self.text_proj = nn.Linear(text.hidden_size, matching.width)
            self.log_scale = nn.Parameter(torch.full((1,), -math.log(matching.temperature)))
        if matching.match:
            self.itm_head = nn.Linear(text.hidden_size, 2)

    @staticmethod
    def adopt(blip: "transformers.BlipForImageTextRetrieval", vocabulary: Vocabulary) -> "Matching":
        """The parts of published retrieval weights. Their temperature is not published: a training begins a new one."""
        config: Any = blip.config
        width = config.image_text_hidden_size
        matching = Matching(config, MatchingConfig(contrastive=1, match=1, width=width), vocabulary)
        matching.text_encoder, matching.itm_head = blip.text_encoder, blip.itm_head
        matching.vision_proj, matching.text_proj = blip.vision_proj, blip.text_proj
        return matching

    def begin_as(self, decoder: Any) -> None:
        """Let the encoder begin with the weights of a `BlipTextLMHeadModel`, which knows most of what it has to know.

        BLIP shares them throughout, but for self-attention (arXiv 2201.12086, section 3.2).
        """
        weights: dict[str, Tensor] = decoder.bert.state_dict()
        with torch.no_grad():
            for name, tensor in self.text_encoder.state_dict().items():
                tensor[: len(weights[name])] = weights[name]  # the encoder may know one token more
            words = self.text_encoder.get_input_embeddings().weight
            words[self.enc] = words[self.vocabulary.bos]

    @property
    def enc(self) -> int:
        """The token that opens a text read beside an image: [ENC], the last that BLIP's text models know."""
        size, words = self.text_encoder.config.vocab_size, len(self.vocabulary)
        token = self.vocabulary.tokenizer.token_to_id("[ENC]")
        return token if token is not None else size - 1 if size > words else self.vocabulary.cls

    @torch.no_grad()
    def match(self, features: Tensor, texts: Sequence[str | None]) -> list[float | None]:
        """The probability in [0, 1] that each text speaks of the image of its row; None for a row without text.

        `features` (B, N, D) are the vision tower's. Trained on one right pair to two wrong ones, as BLIP's is.
        """
        _demand(self.config.match, "matching head", "match")
        rows, ids = self._ids(texts, features.device)
        if not rows:
            return [None] * len(texts)
        logits = self.itm_head(self._read(ids, self.enc, features[rows])).double()
        return _spread((logits[:, 1] - logits[:, 0]).sigmoid(), rows, len(texts))

    @torch.no_grad()
    def similarity(self, features: Tensor, texts: Sequence[str | None]) -> list[float | None]:
        """The cosine in [-1, 1] of each text and the image of its row, each read alone; None for a row without text."""
        _demand(self.config.contrastive, "contrastive projections", "contrastive")
        rows, ids = self._ids(texts, features.device)
        if not rows:
            return [None] * len(texts)
        return _spread((self._images(features[rows]) * self._texts(ids)).sum(1), rows, len(texts))

    def survey(self, features: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of each row all others need to see: tokens, draws, and unit vectors of image and text (B, width)."""
        ids, longest = batch["ids"], self.text_encoder.config.max_position_embeddings
        shown = {name: batch[name] for name in ("weight", "draw_text", "draw_image")}
        shown["ids"] = pad(ids, (0, longest - ids.shape[1]), value=self.vocabulary.pad)
        if self.config.contrastive:
            shown |= {"image": self._images(features), "text": self._texts(ids)}
        return shown

    def forward(self, features: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The summed losses of the batch's rows; over workers and micro-batches they and their gradients add up."""
        own = self.survey(features, batch)
        seen = {name.removeprefix(SEEN): column for name, column in batch.items() if name.startswith(SEEN)}
        seen = seen or self.gather({name: column.detach() for name, column in own.items()})
        losses = {}
        with torch.autocast(features.device.type, enabled=False):  # a cosine over a small temperature wants all bits
            if self.config.contrastive:
                losses["contrastive"] = self._contrast(own, seen)
            chosen = self._negatives(seen) if self.config.match else None
        if chosen is not None:
            losses["match"] = self._discern(features, own, seen, *chosen, batch)
        return losses

    def _contrast(self, own: dict[str, Tensor], seen: dict[str, Tensor]) -> Tensor:
        """InfoNCE from images to texts and back, over rows that are not of the same text."""
        there = own["weight"] > 0
        first, count = int(seen["first"]), int(there.sum())
        image, text = (
            torch.cat([seen[name][:first], own[name][there], seen[name][first + count :]]) for name in ("image", "text")
        )
        # All who share the batch work out the whole loss; the scale's gradient counts in parts that add up to one.
        scale, share = self._scale(), count / len(image)
        scale = scale.detach() + (scale - scale.detach()) * share
        allowed = _apart(seen) | torch.eye(len(image), dtype=torch.bool, device=image.device)
        logits = (scale * image @ text.T).masked_fill(~allowed, -torch.inf)
        target = torch.arange(len(image), device=image.device)
        rows = (cross_entropy(logits, target, reduction="none") + cross_entropy(logits.T, target, reduction="none")) / 2
        rows = rows * seen["weight"]
        whole = rows.sum()
        # Its value is that of our rows; its gradient is the whole loss's, since all rows' losses depend on our vectors.
        return rows[first : first + count].sum().detach() + (whole - whole.detach())

    @torch.no_grad()
    def _negatives(self, seen: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """For each row of the global batch a wrong text and a wrong image, (N,) each; -1 where there is none.

        The share `hard` is drawn as the contrastive softmax sees them, where one is learned, and the rest evenly: texts
        that fit no image, such as file names, are alike to few, and would hardly ever be seen to be wrong.
        """
        apart = _apart(seen)
        alike = torch.zeros(apart.shape, dtype=torch.float64, device=apart.device)
        if self.config.contrastive:
            alike = (self._scale() * seen["image"] @ seen["text"].T).double()
        return (
            _draw(_odds(alike, apart, self.config.hard), seen["draw_text"]),
            _draw(_odds(alike.T, apart, self.config.hard), seen["draw_image"]),
        )

    def _discern(
        self,
        features: Tensor,
        own: dict[str, Tensor],
        seen: dict[str, Tensor],
        wrong_text: Tensor,
        wrong_image: Tensor,
        batch: Mapping[str, Tensor],
    ) -> Tensor:
        """Cross entropy of right and wrong pairs, an equal part each: the right one, a wrong text, a wrong image.

        With altered texts, of texts that are right, there are four parts. A pair is judged where its image is: tokens
        travel between workers, features and their gradients need not.
        """
        first, there = int(seen["first"]), torch.nonzero(own["weight"] > 0)[:, 0]
        mine = torch.arange(len(features), device=features.device)
        to_ours = torch.nonzero((wrong_image >= first) & (wrong_image < first + len(there)))[:, 0]
        told = torch.nonzero(wrong_text[first : first + len(there)] >= 0)[:, 0]
        images = torch.cat([mine, there[told], there[wrong_image[to_ours] - first]])
        ids = torch.cat([own["ids"], seen["ids"][torch.cat([wrong_text[told + first], to_ours])]])
        verdict = batch.get("verdict", torch.ones_like(own["weight"]))
        weight = torch.cat([own["weight"] * (verdict != 0), seen["weight"][torch.cat([told + first, to_ours])]])
        altered = batch.get("ids_altered")
        if altered is not None:
            foiled = torch.nonzero((altered != self.vocabulary.pad).any(1) & (verdict > 0))[:, 0]
            images, weight = torch.cat([images, foiled]), torch.cat([weight, own["weight"][foiled]])
            wider = pad(altered[foiled], (0, ids.shape[1] - altered.shape[1]), value=self.vocabulary.pad)
            ids = torch.cat([ids, wider])
        right = torch.zeros(len(images), dtype=torch.long, device=features.device)
        right[: len(mine)] = (verdict > 0).long()
        logits = self.itm_head(self._read(ids, self.enc, features[images])).float()
        return (cross_entropy(logits, right, reduction="none") * weight).sum() / (3 if altered is None else 4)

    def _scale(self) -> Tensor:
        return self.log_scale.clamp(max=math.log(100)).exp()  # CLIP's bound (arXiv 2103.00020, section 2.5)

    def _images(self, features: Tensor) -> Tensor:
        return normalize(self.vision_proj(features[:, 0]).float(), dim=-1)

    def _texts(self, ids: Tensor) -> Tensor:
        return normalize(self.text_proj(self._read(ids, self.vocabulary.cls)).float(), dim=-1)

    def _read(self, ids: Tensor, opening: int, features: Tensor | None = None) -> Tensor:
        """The state (B, hidden) of the opening token, after the text and, where given, the image were attended to."""
        mask = ids != self.vocabulary.pad
        length = int(mask.any(0).nonzero().max()) + 1
        ids = torch.cat([torch.full_like(ids[:, :1], opening), ids[:, 1:length]], 1)
        beside = {} if features is None else {"encoder_hidden_states": features}
        return self.text_encoder(ids, attention_mask=mask[:, :length].long(), **beside).last_hidden_state[:, 0]

    def _ids(self, texts: Sequence[str | None], device: torch.device) -> tuple[list[int], Tensor]:
        rows = [row for row, text in enumerate(texts) if text is not None]
        longest = self.text_encoder.config.max_position_embeddings
        ids = self.vocabulary.sequences([texts[row] for row in rows] or [""], "", longest)[0]
        return rows, torch.from_numpy(ids).to(device)


def _apart(seen: dict[str, Tensor]) -> Tensor:
    """(N, N) bool: real rows of different texts; one text under two images makes no wrong pair."""
    kind = torch.unique(seen["ids"], dim=0, return_inverse=True)[1]
    real = seen["weight"] > 0
    return (kind[:, None] != kind[None, :]) & real[:, None] & real[None, :]


def _odds(alike: Tensor, apart: Tensor, hard: float) -> Tensor:
    """(N, N) the probability that a row's wrong partner is this column; a row apart from none has zeros."""
    likely = alike.masked_fill(~apart, -torch.inf).softmax(1).nan_to_num()
    return hard * likely + (1 - hard) * apart / apart.sum(1, keepdim=True).clamp(min=1)


def _draw(odds: Tensor, draws: Tensor) -> Tensor:
    """For each row of `odds` (N, N) the column that `draws` (N,) falls on; -1 where all odds are 0."""
    summed = odds.double().cumsum(1)
    chosen = torch.searchsorted(summed, draws.double()[:, None] * summed[:, -1:], right=True)[:, 0]
    return torch.where(summed[:, -1] > 0, chosen, -1)


def _alone(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    there = columns["weight"] > 0
    return {**{name: column[there] for name, column in columns.items()}, "first": torch.tensor(0)}


def _spread(values: Tensor, rows: Sequence[int], count: int) -> list[float | None]:
    column: list[float | None] = [None] * count
    for row, value in zip(rows, values.tolist(), strict=True):
        column[row] = value
    return column


def _demand(weight: float, part: str, name: str) -> None:
    if not weight:
        raise ValueError(
            f"This captioner has no {part}. Train one with a weight for `{name}`, or give published retrieval weights."
        )
