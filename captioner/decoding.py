"""Captions from features: greedy or beam search, and the probability of a given caption."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captioner.model import BASE, Captioner
from captioner.styles import Search, Style

_DROP_SHARE = 0.25  # finished rows are dropped from the cache in portions: each drop copies what stays


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

    Rows are decoded together only where their prompts have the same number of tokens: BLIP has no way to leave padding
    out of a prefix, and captions wrongly where it is there.
    """
    encoded = captioner.vocabulary.encode(prompts if prompts is not None else [style.prompt] * len(features))
    groups: dict[int, list[int]] = {}
    for row, prompt in enumerate(encoded):
        groups.setdefault(len(prompt), []).append(row)
    search = search or Search(beams=style.beams)
    decode = _greedy if search == Search() else _beam
    texts, logp, ended = [""] * len(features), [0.0] * len(features), [False] * len(features)
    for rows in groups.values():
        starts = torch.tensor([[captioner.vocabulary.bos, *encoded[row]] for row in rows], device=features.device)
        chosen = features if len(rows) == len(features) else features[rows]
        tokens, means = decode(captioner, chosen, starts, style, search)
        room = _room(captioner, starts, style)
        for row, text, mean, said in zip(rows, captioner.vocabulary.decode(tokens), means, tokens, strict=True):
            texts[row], logp[row], ended[row] = text, mean, len(said) < room
    return Captions(texts, logp, ended)


@torch.no_grad()
def score(captioner: Captioner, features: Tensor, texts: Sequence[str | None], style: Style) -> list[float | None]:
    """The mean log-probability a token, [SEP] included, of given captions in a style; None for a row without text."""
    vocabulary = captioner.vocabulary
    ids, mask = (
        torch.from_numpy(array).to(features.device)
        for array in vocabulary.sequences(texts, style.prompt, captioner.max_length)
    )
    losses = captioner.negative_log_likelihood(decoder_of(captioner, style), features, ids, mask)
    counts = mask[:, 1:].sum(1)
    return [-float(loss) / float(count) if count else None for loss, count in zip(losses, counts, strict=True)]


def decoder_of(captioner: Captioner, style: Style) -> str:
    """The name of the decoder that speaks in a style; ValueError where the style names one that is not there."""
    if style.decoder and style.decoder not in captioner.decoders:
        raise ValueError(
            f"Style '{style.name}' asks for the decoder '{style.decoder}', but this captioner has: "
            f"{', '.join(captioner.decoders)}."
        )
    return style.decoder or (style.name if style.name in captioner.decoders else BASE)


def _greedy(
    captioner: Captioner, features: Tensor, ids: Tensor, style: Style, search: Search
) -> tuple[list[list[int]], list[float]]:
    decoder: Any = captioner.decoders[decoder_of(captioner, style)]
    sep = captioner.vocabulary.sep
    limit = _room(captioner, ids, style)
    tokens = torch.full((len(ids), limit), sep, device=ids.device)
    sums, counts = torch.zeros(len(ids), device=ids.device), torch.zeros(len(ids), device=ids.device)
    rows, running, cache = torch.arange(len(ids), device=ids.device), torch.ones_like(ids[:, 0], dtype=torch.bool), None
    for step in range(limit):
        output = decoder(ids, encoder_hidden_states=features, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        logp = output.logits[:, -1].float().log_softmax(-1)
        allowed = (
            logp.index_fill(1, torch.tensor([sep], device=ids.device), -torch.inf) if step < style.min_tokens else logp
        )
        best = allowed.argmax(-1)
        tokens[rows, step] = torch.where(running, best, sep)
        sums[rows] += torch.where(running, logp.gather(1, best[:, None])[:, 0], 0.0)
        counts[rows] += running
        running = running & (best != sep)
        left = int(running.sum())
        if left == 0:
            break
        ids = best[:, None]
        if len(running) - left >= _DROP_SHARE * len(running):
            stay = running.nonzero()[:, 0]
            cache.batch_select_indices(stay)
            rows, running, ids, features = rows[stay], running[stay], ids[stay], features[stay]
    return [_until(row, sep) for row in tokens.tolist()], (sums / counts).tolist()


def _beam(
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
        max_new_tokens=_room(captioner, ids, style),
        min_new_tokens=style.min_tokens,
        eos_token_id=vocabulary.sep,
        pad_token_id=vocabulary.pad,
    )
    ends = (output[:, ids.shape[1] :] == vocabulary.sep).long()
    mask = torch.cat([torch.zeros_like(ids), (ends.cumsum(1) - ends == 0).long()], 1).float()
    losses = captioner.negative_log_likelihood(name, features, output, mask)
    return [_until(row, vocabulary.sep) for row in output[:, ids.shape[1] :].tolist()], (-losses / mask.sum(1)).tolist()


def _room(captioner: Captioner, ids: Tensor, style: Style) -> int:
    room = captioner.max_length - ids.shape[1]
    if room < 1:
        raise ValueError(
            f"The prompt of style '{style.name}' has {ids.shape[1]} tokens and leaves no room for a caption: "
            f"this captioner's sequences end at {captioner.max_length}."
        )
    return min(style.max_tokens, room)


def _until(row: list[int], token: int) -> list[int]:
    return row[: row.index(token)] if token in row else row
