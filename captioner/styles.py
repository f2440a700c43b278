"""A style of caption is data: its prompt, its length, its decoding; a recipe adds a third by naming it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Style:
    """How captions of one kind are asked for; `caption_<name>` is the column that they go to."""

    name: str
    prompt: str = ""  # words put before the caption, in training and in decoding alike; not a part of the caption
    decoder: str = ""  # which of the captioner's decoders speaks; its own, or the base's where it has none
    min_tokens: int = 1
    max_tokens: int = 60
    beams: int = 1  # 1 is greedy

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(
                f"A style's name becomes a column's name, so it must be a plain word; found '{self.name}'."
            )
        if not 0 <= self.min_tokens <= self.max_tokens or self.max_tokens < 1:
            raise ValueError(
                f"Style '{self.name}' asks for {self.min_tokens} to {self.max_tokens} tokens; "
                "the bounds must be ordered and the upper one at least 1."
            )
        if self.beams < 1:
            raise ValueError(f"Style '{self.name}' asks for {self.beams} beams; 1 is greedy decoding.")


SHORT = Style(name="short", max_tokens=30)
DESCRIPTIVE = Style(name="descriptive", max_tokens=60)
