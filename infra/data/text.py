"""Bytes to text, whatever wrote them: a byte-order mark, UTF-16 by its zero bytes, UTF-8, or what the user names."""

import codecs
import unicodedata

_MARKS = (  # the longer ones first: UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def decode_text(data: bytes | str, encoding: str = "") -> str:
    """The text of some bytes; `encoding` is tried where they are not UTF-8. ValueError with a short reason."""
    if isinstance(data, str):  # it may hold lone surrogates, which no file can
        data = data.encode("utf-8", "surrogatepass")
    guess = guess_encoding(data)
    for name in dict.fromkeys([guess, encoding or guess]):
        try:
            return data.decode(name)
        except UnicodeError:
            continue
    tried = f", nor {encoding}" if encoding else ""
    raise ValueError(f"not {guess.removesuffix('-sig').upper()}{tried}")


def guess_encoding(data: bytes) -> str:
    """What the first bytes say: by a byte-order mark, or by zero bytes, which no UTF-8 text has."""
    for mark, name in _MARKS:
        if data.startswith(mark):
            return name
    head = data[:4096]
    even, odd = head[::2].count(0), head[1::2].count(0)
    # A letter of most alphabets has its zero byte, or its block's number, always on one side.
    if max(even, odd) > len(head) // 8 and min(even, odd) <= max(even, odd) // 8:
        return "utf-16-be" if even > odd else "utf-16-le"
    return "utf-8"


def is_blank(text: str) -> bool:
    """Whether nothing of a text is to be seen: blanks, and marks such as U+200B that have no width."""
    return all(letter.isspace() or unicodedata.category(letter) in ("Cc", "Cf", "Zs", "Zl", "Zp") for letter in text)


def check_encoding(name: str) -> None:
    """ValueError where Python knows no such encoding of texts."""
    try:
        known = not name or codecs.lookup(name)._is_text_encoding
    except LookupError:
        known = False
    if not known:
        raise ValueError(f"There is no encoding '{name}'. Give a name such as cp1252, latin-1, gb18030 or shift_jis.")
