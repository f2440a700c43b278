"""Prompts for models that follow instructions, with a place for the text that came with the picture."""

from collections.abc import Sequence

from captioner.styles import Style, fill

MAX_ALT = 1000  # characters; some alt texts are whole pages


def prompt_of(style: Style, alt: str | None) -> str:
    """The prompt of a style for one row, as `fill` fills it, with its alt text cut to `MAX_ALT` characters."""
    return fill(style.prompt, (alt or "").strip()[:MAX_ALT])


def check_styles(styles: Sequence[Style], who: str, *, cannot: Sequence[str] = (), needs_prompt: bool = False) -> None:
    """ValueError if there is no style, or one sets a field that `who` knows nothing of, or lacks a needed prompt."""
    if not styles:
        raise ValueError(f"{who} was tuned for no style of its own; give `styles`, each with a prompt.")
    for style in styles:
        plain = Style(name=style.name)
        for field in ("decoder", *cannot):
            if (found := getattr(style, field)) != getattr(plain, field):
                raise ValueError(
                    f"Style '{style.name}' sets {field} to {found!r}, which {who} cannot do; leave it out."
                )
        if needs_prompt and not style.prompt.strip():
            raise ValueError(
                f"Style '{style.name}' has no prompt, and {who} only speaks when asked; "
                "give one such as 'Describe this picture in one sentence.'."
            )
