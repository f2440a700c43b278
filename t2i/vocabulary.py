"""The words that a prior reads: a byte-pair vocabulary trained on the captions it will be trained on."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

PAD, NULL, UNKNOWN = 0, 1, 2  # padding is never looked at; NULL alone stands for a caption that was dropped
FILE = "vocabulary.json"


class TextVocabulary:
    """Captions to word ids (B, T) int64, padded on the right with 0; lower-cased, at most `length` ids a caption."""

    def __init__(self, tokenizer: Tokenizer, length: int) -> None:
        tokenizer.encode_special_tokens = True  # a caption that says "[PAD]" means the word
        self._tokenizer, self.length = tokenizer, length

    @staticmethod
    def train(captions: Iterable[str], size: int, length: int) -> "TextVocabulary":
        """Byte-pair encoding (arXiv 1508.07909) of whole words, so that no piece spans two."""
        tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Punctuation(), pre_tokenizers.Metaspace(prepend_scheme="always")]
        )
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
        special = ["[PAD]", "[NULL]", "[UNK]"]
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False, min_frequency=2)
        tokenizer.train_from_iterator(captions, trainer)
        return TextVocabulary(tokenizer, length)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(self, captions: Sequence[str]) -> np.ndarray:
        """(B, T) int64, T the longest of these captions; an empty one is NULL."""
        ids = [encoding.ids[: self.length] or [NULL] for encoding in self._tokenizer.encode_batch_fast(list(captions))]
        return pad(ids)

    def unknown(self, captions: Sequence[str]) -> list[str]:
        """Words of which the vocabulary has pieces at most: seen once, never, or too seldom for its size."""
        normal, split = self._tokenizer.normalizer.normalize_str, self._tokenizer.pre_tokenizer.pre_tokenize_str
        words = dict.fromkeys(word for caption in captions for word, _ in split(normal(caption)))
        found = (word.lstrip("\u2581") for word in words if self._tokenizer.token_to_id(word) is None)
        return [word for word in found if any(letter.isalnum() for letter in word)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of word ids, as near as the vocabulary can say it."""
        return self._tokenizer.decode([int(i) for i in ids if i != PAD])

    def save(self, folder: str) -> None:
        """Write the vocabulary into a local folder."""
        self._tokenizer.enable_truncation(self.length)
        self._tokenizer.save(str(Path(folder) / FILE))

    @staticmethod
    def load(folder: str) -> "TextVocabulary":
        """The vocabulary that `save` wrote."""
        tokenizer = Tokenizer.from_file(str(Path(folder) / FILE))
        assert tokenizer.truncation is not None
        return TextVocabulary(tokenizer, tokenizer.truncation["max_length"])


def pad(ids: Sequence[Sequence[int]]) -> np.ndarray:
    """Rows of ids as one (B, T) array."""
    padded = np.full((len(ids), max(map(len, ids))), PAD, dtype=np.int64)
    for row, values in enumerate(ids):
        padded[row, : len(values)] = values
    return padded
