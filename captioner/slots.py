"""Greedy captions in slots: a row that ends makes room for the next, and each row stands at its own place."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from captioner.vision import portion

# Numbers that are kept of the pictures under way, on a CPU and on a GPU: of BLIP-base's, 32 and 512 pictures.
_KEPT = {"cpu": 2**25 * 10, "cuda": 2**29 * 10}
_TURN = 0.25  # share of the slots that are free before rows move: each move costs a pass, or a copy of what stays


@torch.no_grad()
def greedy(
    decoder: Any,
    features: Tensor,
    prompts: Sequence[Sequence[int]],
    *,
    sep: int,
    fewest: int,
    most: Sequence[int],
    slots: int | None = None,
) -> tuple[list[list[int]], list[float]]:
    """The likeliest tokens one after another, up to `sep`, and the mean log-probability of them and of `sep`, a row.

    `decoder` is a BlipTextLMHeadModel, `features` (B, N, D) are of `Captioner.encode`, `prompts` of any lengths open
    with [DEC], `fewest` tokens are said before a `sep`, and `most[row]` at the utmost.

    As many rows are under way at a time as `slots`, or as memory is set aside for. No row sees another, nor padding:
    prompts are padded on the right, where causal attention does not reach, and the keys of the padding are written over
    before the row comes to where they stand.
    """
    room = max(len(prompt) + bound for prompt, bound in zip(prompts, most, strict=True))
    if slots is None:
        kept = 2 * decoder.config.num_hidden_layers * features.shape[1] * decoder.config.hidden_size
        slots = max(1, _KEPT["cuda" if features.is_cuda else "cpu"] // kept)
    table = _Slots(decoder, features, min(slots, len(prompts)), room)
    said = _Said(features.device, sep, fewest, most, len(table))
    waiting = deque(sorted(range(len(prompts)), key=lambda row: len(prompts[row])))  # like lengths are read together
    while True:
        free = said.free()
        if waiting and len(free) >= _TURN * len(table):
            rows = [waiting.popleft() for _ in range(min(len(free), len(waiting)))]
            seats = free[: len(rows)]
            said.seat(rows, seats)
            said.note(seats, table.admit(seats, features[rows], [prompts[row] for row in rows]))
            continue
        if len(free) == len(table):
            return said.result()
        if not waiting and len(free) >= _TURN * len(table):
            stay = said.running.nonzero()[:, 0]
            table.keep(stay)
            said.keep(stay)
        said.note(slice(None), table.step(said.last))


class _Said:
    """What the rows have said so far, and which row sits in which slot."""

    def __init__(self, device: torch.device, sep: int, fewest: int, most: Sequence[int], slots: int) -> None:
        rows = len(most)
        self._sep, self._fewest = sep, fewest
        self._most = torch.tensor([*most, 0], device=device)  # one row more, for slots in which nobody sits
        self._tokens = torch.full((rows + 1, max(most) + 1), sep, device=device)
        self._sums = torch.zeros(rows + 1, device=device)
        self._counts = torch.zeros(rows + 1, dtype=torch.long, device=device)
        self._owner = torch.full((slots,), rows, device=device)
        self.running = torch.zeros(slots, dtype=torch.bool, device=device)
        self.last = torch.full((slots,), sep, device=device)

    def free(self) -> list[int]:
        return (~self.running).nonzero()[:, 0].tolist()

    def seat(self, rows: list[int], seats: list[int]) -> None:
        self._owner[seats] = torch.tensor(rows, device=self._owner.device)
        self.running[seats] = True

    def keep(self, slots: Tensor) -> None:
        self._owner, self.running, self.last = self._owner[slots], self.running[slots], self.last[slots]

    def note(self, slots: list[int] | slice, logits: Tensor) -> None:
        """Take the likeliest next token of each of the slots."""
        owner, running = self._owner[slots], self.running[slots]
        counts = self._counts[owner]
        total = logits.logsumexp(-1)
        logits[:, self._sep].masked_fill_(counts < self._fewest, -torch.inf)
        best, token = logits.max(-1)
        token = torch.where(running, token, self._sep)
        self._tokens[owner, counts] = token
        self._sums[owner] += torch.where(running, best - total, 0.0)
        self._counts[owner] += running.long()
        self.last[slots] = token
        self.running[slots] = running & (token != self._sep) & (counts + 1 < self._most[owner])

    def result(self) -> tuple[list[list[int]], list[float]]:
        means = (self._sums / self._counts)[:-1].tolist()
        rows = self._tokens[:-1].tolist()
        return [row[: row.index(self._sep)] for row in rows], means


class _Slots:
    """Keys and values of the rows under way, of their tokens and of their pictures; each row at its own place.

    Weights are those of the decoder's own modules; only attention is worked out here, as transformers' BLIP keeps one
    place for a whole batch.
    """

    def __init__(self, decoder: Any, features: Tensor, slots: int, room: int) -> None:
        config, count = decoder.config, features.shape[1]
        heads = config.num_attention_heads
        size = config.hidden_size // heads
        self._decoder, self._layers, self._heads = decoder, decoder.bert.encoder.layer, heads
        texts, pictures = (slots, heads, room, size), (slots, heads, count, size)
        self._texts = [(features.new_zeros(texts), features.new_zeros(texts)) for _ in self._layers]
        self._pictures = [(features.new_empty(pictures), features.new_empty(pictures)) for _ in self._layers]
        self._places = torch.zeros(slots, dtype=torch.long, device=features.device)  # of each row's next token
        self._reach = 0  # no row has come to this place yet

    def __len__(self) -> int:
        return len(self._places)

    def keep(self, slots: Tensor) -> None:
        """Only these slots stay."""
        self._texts = [(keys[slots], values[slots]) for keys, values in self._texts]
        self._pictures = [(keys[slots], values[slots]) for keys, values in self._pictures]
        self._places = self._places[slots]

    def admit(self, seats: list[int], features: Tensor, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Seat rows with their pictures and read their prompts; next-token logits (rows, vocabulary) in fp32."""
        self._show(seats, features)
        device, where = features.device, _places(seats)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        length = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[*prompt, *[0] * (length - len(prompt))] for prompt in prompts], device=device)
        causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        hidden = self._embed(ids, torch.arange(length, device=device)[None])
        for layer, texts, pictures in zip(self._layers, self._texts, self._pictures, strict=True):
            own = layer.attention.self
            keys, values = self._split(own.key(hidden)), self._split(own.value(hidden))
            texts[0][where, :, :length], texts[1][where, :, :length] = keys, values
            hidden = self._layer(layer, hidden, (keys, values), (pictures[0][where], pictures[1][where]), causal)
        self._places[where] = lengths
        self._reach = max(self._reach, length)
        return self._logits(hidden[torch.arange(len(prompts), device=device), lengths - 1])

    def _show(self, seats: list[int], features: Tensor) -> None:
        """Work out what each layer attends to of the pictures, a few at a time: they then stay in a CPU's cache."""
        size = portion(features)
        for start in range(0, len(seats), size):
            where, seen = _places(seats[start : start + size]), features[start : start + size]
            for layer, (keys, values) in zip(self._layers, self._pictures, strict=True):
                cross = layer.crossattention.self
                keys[where], values[where] = self._split(cross.key(seen)), self._split(cross.value(seen))

    def step(self, tokens: Tensor) -> Tensor:
        """Read one token (slots,) more in every slot; next-token logits (slots, vocabulary) in fp32."""
        places, everyone = self._places, torch.arange(len(self), device=tokens.device)
        self._reach = min(self._reach + 1, self._texts[0][0].shape[2])
        # A slot in which nobody runs goes nowhere: what it reads is written over or thrown away.
        places = places.clamp_max(self._reach - 1)
        before = (torch.arange(self._reach, device=tokens.device) <= places[:, None])[:, None, None]
        hidden = self._embed(tokens[:, None], places[:, None])
        for layer, texts, pictures in zip(self._layers, self._texts, self._pictures, strict=True):
            own = layer.attention.self
            texts[0][everyone, :, places] = self._split(own.key(hidden))[:, :, 0]
            texts[1][everyone, :, places] = self._split(own.value(hidden))[:, :, 0]
            seen = (texts[0][:, :, : self._reach], texts[1][:, :, : self._reach])
            hidden = self._layer(layer, hidden, seen, pictures, before)
        self._places = places + 1
        return self._logits(hidden[:, 0])

    def _embed(self, ids: Tensor, places: Tensor) -> Tensor:
        return self._decoder.bert.embeddings(input_ids=ids, position_ids=places)

    def _layer(self, layer: Any, hidden: Tensor, texts: Any, pictures: Any, mask: Tensor) -> Tensor:
        said = self._attend(self._split(layer.attention.self.query(hidden)), texts, mask)
        hidden = layer.attention.output(said, hidden)
        shown = self._attend(self._split(layer.crossattention.self.query(hidden)), pictures)
        return layer.feed_forward_chunk(layer.crossattention.output(shown, hidden))

    def _attend(self, queries: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        """(rows, tokens, hidden). Worked out by hand: torch's fused attention takes four times as long in bf16 on a
        CPU where a row has a single query.
        """
        keys, values = seen
        scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1).to(values.dtype) @ values).transpose(1, 2).flatten(2)

    def _split(self, tensor: Tensor) -> Tensor:
        """(rows, tokens, hidden) to (rows, heads, tokens, hidden / heads)."""
        return tensor.unflatten(-1, (self._heads, -1)).transpose(1, 2)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self._decoder.cls(hidden).float()


def _places(seats: list[int]) -> list[int] | slice:
    """A slice where the seats lie side by side, which is read and written without a copy."""
    first, last = seats[0], seats[-1]
    return slice(first, last + 1) if last - first == len(seats) - 1 else seats
