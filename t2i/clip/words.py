"""CLIP's words: bytes that are paired (arXiv 1508.07909), learned from captions, kept as transformers keeps them."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models, trainers
from tokenizers.pre_tokenizers import ByteLevel

FILE = "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"  # the last two tokens
ENDS_WORD = "</w>"


def train_words(captions: Iterable[str], size: int, length: int, folder: str) -> None:
    """Learn at most `size` tokens into a local folder, where `AutoTokenizer` and `CLIPWords` find them.

    All bytes are among them, so that no text has an unknown one. A text is cut after `length` tokens.
    """
    import transformers

    kind: Any = transformers.CLIPTokenizer
    splits = kind().backend_tokenizer  # without words: only how texts are made lower-case, and split
    learned = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=ENDS_WORD))
    learned.normalizer, learned.pre_tokenizer = splits.normalizer, splits.pre_tokenizer
    letters = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=letters,
        end_of_word_suffix=ENDS_WORD,
        show_progress=False,
    )
    learned.train_from_iterator(captions, trainer)
    pieces = [*letters, *(letter + ENDS_WORD for letter in letters)]
    merges = [tuple(pair) for pair in json.loads(learned.to_str())["model"]["merges"]]
    merges = merges[: size - len(pieces) - 2]
    tokens = dict.fromkeys([*pieces, *map("".join, merges), START, END])
    known = {token: number for number, token in enumerate(tokens)}
    kind(vocab=known, merges=merges, model_max_length=length).save_pretrained(folder)


class CLIPWords:
    """Captions to token ids, without transformers: a feed's processes need none of it."""

    def __init__(self, folder: str, length: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(folder) / FILE))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)
        self.end = self._tokenizer.token_to_id(END)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, captions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (B, T) int64, padded with what closes a text, and (B,) int64, equal where all ids of two texts are."""
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(captions))]
        padded = np.full((len(ids), max(map(len, ids))), self.end, np.int64)
        for row, values in enumerate(ids):
            padded[row, : len(values)] = values
        digests = [hashlib.blake2b(np.array(each, np.int64).tobytes(), digest_size=8).digest() for each in ids]
        return padded, np.array([int.from_bytes(each, "little", signed=True) for each in digests], np.int64)
