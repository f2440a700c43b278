"""The words that a captioner knows: a lower-cased WordPiece vocabulary in BERT's layout."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]")


class Vocabulary:
    """Text to token ids and back. A caption's sequence is `[DEC] prompt caption [SEP]`, as BLIP's decoder reads it.

    `bos` is the id of [DEC] where the tokenizer has none, as in published BLIP checkpoints.
    """

    def __init__(self, tokenizer: Tokenizer, bos: int | None = None) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.tokenizer = tokenizer
        self.pad, self.unk, self.cls, self.sep = (
            self._special(token) for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        )
        self.bos = self._special("[DEC]") if bos is None else bos

    def __len__(self) -> int:
        return self.tokenizer.get_vocab_size()

    def __reduce__(self) -> tuple:
        return Vocabulary.from_json, (self.to_json(), self.bos)

    def _special(self, token: str) -> int:
        index = self.tokenizer.token_to_id(token)
        if index is None:
            raise ValueError(f"A captioner's vocabulary has BERT's special tokens, but this one lacks {token}.")
        return index

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text, without special tokens."""
        return [line.ids for line in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def cut(self, text: str, most: int) -> str:
        """The beginning of a text that has at most `most` tokens: all of it, or up to the first token too many."""
        places = self.tokenizer.encode(text, add_special_tokens=False).offsets
        return text if len(places) <= most else text[: places[most][0]].rstrip()

    def decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        """The text of each row of ids; special tokens are left out."""
        return self.tokenizer.decode_batch([list(row) for row in rows], skip_special_tokens=True)

    def sequences(
        self, texts: Sequence[str | None], prompt: str | Sequence[str], max_length: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """`ids` (B, L) int64 and `mask` (B, L) float32, 1 at the tokens of the caption and its [SEP].

        `prompt` is of all rows, or one for each. A caption too long for `max_length` tokens is cut and has no [SEP];
        None is a caption without tokens.
        """
        prompts = self.encode([prompt] if isinstance(prompt, str) else prompt)
        starts = [[self.bos, *tokens] for tokens in (prompts * len(texts) if isinstance(prompt, str) else prompts)]
        captions = [[*tokens, self.sep] for tokens in self.encode([text or "" for text in texts])]
        rows = [(start + tokens)[:max_length] for start, tokens in zip(starts, captions, strict=True)]
        length = max(len(row) for row in rows)
        ids = np.full((len(rows), length), self.pad, np.int64)
        mask = np.zeros((len(rows), length), np.float32)
        for index, (row, start, text) in enumerate(zip(rows, starts, texts, strict=True)):
            ids[index, : len(row)] = row
            mask[index, len(start) : len(row)] = text is not None
        return ids, mask

    def to_json(self) -> str:
        """The whole tokenizer as the text of `tokenizer.json`."""
        return self.tokenizer.to_str()

    @staticmethod
    def from_json(text: str, bos: int | None = None) -> "Vocabulary":
        """The vocabulary that `to_json` wrote."""
        return Vocabulary(Tokenizer.from_str(text), bos)

    def save(self, folder: str) -> None:
        """Write `tokenizer.json` and `vocab.txt`, which transformers' BERT tokenizers load."""
        words = sorted(self.tokenizer.get_vocab().items(), key=lambda entry: entry[1])
        Path(folder, "tokenizer.json").write_text(self.to_json(), encoding="utf-8")
        Path(folder, "vocab.txt").write_text("".join(f"{word}\n" for word, _ in words), encoding="utf-8")

    @staticmethod
    def load(folder: str, bos: int | None = None) -> "Vocabulary":
        """The vocabulary in a folder that `save` wrote."""
        path = Path(folder, "tokenizer.json")
        if not path.is_file():
            raise FileNotFoundError(f"There is no vocabulary in {folder}: it has no tokenizer.json.")
        return Vocabulary.from_json(path.read_text(encoding="utf-8"), bos)


def train_vocabulary(captions: Iterable[str], size: int = 8000) -> Vocabulary:
    """A vocabulary of at most `size` entries: whole words where they are frequent, pieces for the rest (WordPiece).

    A function of the captions alone. Raises ValueError where there is no caption to learn from.
    """
    learner = _bert_tokenizer(models.WordPiece(unk_token="[UNK]"))
    texts = [learner.normalizer.normalize_str(caption) for caption in captions]
    counts = Counter(character for text in texts for character in text if not character.isspace())
    if not counts:
        raise ValueError("No captions were found to learn a vocabulary from.")
    letters = sorted(counts, key=lambda letter: (-counts[letter], letter))
    kept, rare = letters[: size // 4], str.maketrans(dict.fromkeys(letters[size // 4 :], " "))
    # The trainer numbers pieces ("##a") in the order of a hash table, anew each time, and breaks ties by number. Named
    # beforehand they keep their numbers; but the tokenizer that it leaves takes them for special, so another is made.
    pieces = [*kept, *(f"##{letter}" for letter in kept)]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=[*SPECIAL, *pieces], show_progress=False)
    learner.train_from_iterator((text.translate(rare) for text in texts), trainer)
    tokenizer = _bert_tokenizer(models.WordPiece(learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.add_special_tokens(list(SPECIAL))
    return Vocabulary(tokenizer)


def blank(size: int) -> Vocabulary:
    """A vocabulary of so many words that spell nothing, for where its size alone is wanted."""
    words = [*SPECIAL, *(f"[{number}]" for number in range(len(SPECIAL), size))]
    return Vocabulary(Tokenizer(models.WordPiece(dict(zip(words, range(size), strict=True)), unk_token="[UNK]")))


def _bert_tokenizer(model: models.WordPiece) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return tokenizer
