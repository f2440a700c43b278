"""Captions from features: greedy or beam search, and the probability of a given caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captioner.model import BASE, About, Captioner
from captioner.slots import greedy
from captioner.styles import Search, Style, fill
from captioner.vision import portion


@dataclass(frozen=True)
class Captions:
    """One caption a row, and the mean log-probability (<= 0) of its tokens, [SEP] included.

    `ended` is whether a caption came to its [SEP], and not merely to the bound on its tokens.
    """

    texts: list[str]
    logp: list[float]
    ended: list[bool]


@torch.no_grad()
def caption(
    captioner: Captioner,
    features: Tensor,
    style: Style,
    prompts: Sequence[str] | None = None,
    search: Search | None = None,
) -> Captions:
    """Captions in one style for `features` (B, N, D) of `Captioner.encode`.

    `prompts` are a row's own, or the style's; `search` is by the style's beams where it is not given.

    Captions do not depend on what else is in the batch: greedy decoding takes rows whose prompts differ in length
    together (`captioner/slots.py`), a search by beams only rows whose prompts are equally long, since BLIP as
    transformers has it cannot leave padding out of a prefix, and captions wrongly where it is there.
    """
    vocabulary, search = captioner.vocabulary, search or Search(beams=style.beams)
    encoded = vocabulary.encode(prompts if prompts is not None else [fill(style.prompt, None)] * len(features))
    starts = [[vocabulary.bos, *prompt] for prompt in encoded]
    rooms = [_room(captioner, len(start), style) for start in starts]
    if search == Search():
        decoder = captioner.decoders[decoder_of(captioner, style)]
        tokens, logp = greedy(decoder, features, starts, sep=vocabulary.sep, fewest=style.min_tokens, most=rooms)
    else:
        tokens, logp = _beam(captioner, features, starts, style, search)
    ended = [len(said) < room for said, room in zip(tokens, rooms, strict=True)]
    return Captions(vocabulary.decode(tokens), logp, ended)


@torch.no_grad()
def score(captioner: Captioner, features: Tensor, texts: Sequence[str | None], style: Style) -> list[float | None]:
    """The mean log-probability a token, [SEP] included, of given captions in a style; None for a row without text."""
    ids, mask = (
        torch.from_numpy(array).to(features.device)
        for array in captioner.vocabulary.sequences(texts, fill(style.prompt, None), captioner.max_length)
    )
    decoder, size = decoder_of(captioner, style), portion(features)
    losses = torch.cat(
        [
            captioner.negative_log_likelihood(decoder, *part)
            for part in zip(features.split(size), ids.split(size), mask.split(size), strict=True)
        ]
    )
    counts = mask[:, 1:].sum(1)
    return [-float(loss) / float(count) if count else None for loss, count in zip(losses, counts, strict=True)]


def decoder_of(captioner: Captioner | About, style: Style) -> str:
    """The name of the decoder that speaks in a style; ValueError where the style names one that is not there."""
    if style.decoder and style.decoder not in captioner.decoders:
        raise ValueError(
            f"Style '{style.name}' asks for the decoder '{style.decoder}', but this captioner has: "
            f"{', '.join(captioner.decoders)}."
        )
    return style.decoder or (style.name if style.name in captioner.decoders else BASE)


def _beam(
    captioner: Captioner, features: Tensor, starts: list[list[int]], style: Style, search: Search
) -> tuple[list[list[int]], list[float]]:
    tokens, logp = [[0]] * len(starts), [0.0] * len(starts)
    for length in sorted({len(start) for start in starts}):
        rows = [row for row, start in enumerate(starts) if len(start) == length]
        ids = torch.tensor([starts[row] for row in rows], device=features.device)
        found = _beam_alike(captioner, features[rows], ids, style, search)
        for row, said, mean in zip(rows, *found, strict=True):
            tokens[row], logp[row] = said, mean
    return tokens, logp


def _beam_alike(
    captioner: Captioner, features: Tensor, ids: Tensor, style: Style, search: Search
) -> tuple[list[list[int]], list[float]]:
    name, vocabulary = decoder_of(captioner, style), captioner.vocabulary
    decoder: Any = captioner.decoders[name]
    output = decoder.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        encoder_hidden_states=features,
        encoder_attention_mask=torch.ones(features.shape[:2], dtype=torch.long, device=features.device),
        num_beams=search.beams,
        no_repeat_ngram_size=search.no_repeat_ngram,
        repetition_penalty=search.repetition_penalty,
        do_sample=False,
        max_new_tokens=_room(captioner, ids.shape[1], style),
        min_new_tokens=style.min_tokens,
        eos_token_id=vocabulary.sep,
        pad_token_id=vocabulary.pad,
    )
    ends = (output[:, ids.shape[1] :] == vocabulary.sep).long()
    mask = torch.cat([torch.zeros_like(ids), (ends.cumsum(1) - ends == 0).long()], 1).float()
    losses = captioner.negative_log_likelihood(name, features, output, mask)
    return [_until(row, vocabulary.sep) for row in output[:, ids.shape[1] :].tolist()], (-losses / mask.sum(1)).tolist()


def _room(captioner: Captioner, prompt: int, style: Style) -> int:
    """How many tokens there may be after a prompt of so many, [DEC] among them."""
    room = captioner.max_length - prompt
    if room < 1:
        raise ValueError(
            f"The prompt of style '{style.name}' has {prompt} tokens and leaves no room for a caption: "
            f"this captioner's sequences end at {captioner.max_length}."
        )
    return min(style.max_tokens, room)


def _until(row: list[int], token: int) -> list[int]:
    return row[: row.index(token)] if token in row else row
