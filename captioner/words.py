"""The words of a caption in any script, as detectors and statistics compare them."""

import unicodedata

_CHARACTERS = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "KATAKANA")  # written without spaces: each is a word


def words(text: str) -> list[str]:
    """Lower-cased runs of letters, marks and digits; of what is written without spaces, each character by itself.

    Apostrophes and hyphens divide: "it's" and the "it ' s" of a tokenizer are the same two words.
    """
    return unicodedata.normalize("NFKC", text).lower().translate(_SPACED).split()


class _Spaced(dict):
    """Maps a code point to itself, or to a space where it belongs to no word; filled as characters are met."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        if unicodedata.category(character)[0] not in "LMN":
            self[code] = " "
        elif unicodedata.name(character, "").startswith(_CHARACTERS):
            self[code] = f" {character} "
        else:
            self[code] = character
        return self[code]


_SPACED = _Spaced()
