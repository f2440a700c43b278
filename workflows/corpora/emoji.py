"""Labels for Noto Emoji: a picture and its English Unicode name.

Noto Emoji by Google (Apache-2.0 and OFL); names from the Unicode CLDR. More than half of the pictures repeat another in
a different skin tone or gender, so the split is drawn on the *base* emoji: its variants all train, or are all held out.
"""

from infra.config import fingerprint

TEST_SHARE = 0.1

SKIN_TONES = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}
SIGNS = {"2640", "2642", "27a1", "fe0f"}  # female, male, facing right, "draw in colour"
PEOPLE = {"1f9d1", "1f468", "1f469", "1f9d2", "1f466", "1f467", "1f9d3", "1f474", "1f475"}  # a person by age and gender
PERSON = "1f9d1"

# Emoji that are variants of another although their code points do not say so. Left: code points; right: the base.
ALIASES = {
    "1f46b": f"{PERSON} 1f91d {PERSON}",  # woman and man holding hands
    "1f46c": f"{PERSON} 1f91d {PERSON}",  # men holding hands
    "1f46d": f"{PERSON} 1f91d {PERSON}",  # women holding hands
    "1f491": f"{PERSON} 2764 {PERSON}",  # couple with heart
    "1f48f": f"{PERSON} 2764 1f48b {PERSON}",  # kiss
    "1faf1 1faf2": "1f91d",  # handshake, of two hands that may differ in tone
    "1f385": f"{PERSON} 1f384",  # Santa Claus
    "1f936": f"{PERSON} 1f384",  # Mrs. Claus
    "1f934": "1fac5",  # prince, a person with crown
    "1f478": "1fac5",  # princess
    "1f930": "1fac4",  # pregnant woman, a pregnant person
    "1fac3": "1fac4",  # pregnant man
    "1f57a": "1f483",  # man dancing, woman dancing
    "1f931": f"{PERSON} 1f37c",  # breast-feeding, a person feeding a baby
}


def label(key: str, caption: str | None, meta: dict | None) -> dict[str, str | None]:
    """The columns that an emoji's metadata gives a row: its name is the alt text and the short reference alike.

    There is no descriptive reference and no scene. Raises ValueError for a row that is not Noto Emoji's.
    """
    if not isinstance(meta, dict) or not isinstance(meta.get("codepoints"), str):
        raise ValueError(f"{key!r} is not a Noto Emoji row: its json needs `codepoints`, such as '1f468_200d_1f3eb'.")
    share = int(fingerprint(["emoji", base(meta["codepoints"])])[:8], 16) / 16**8
    return {
        "split": "test" if share < TEST_SHARE else "train",
        "caption_alt": caption,
        "reference_short": caption,
        "reference_descriptive": None,
        "scene": None,
    }


def base(codepoints: str) -> str:
    """What an emoji shares with its skin-tone, gender, age and direction variants.

    The man teacher of medium skin tone, '1f468_1f3fd_200d_1f3eb', becomes the teacher '1f9d1 1f3eb'. A sign that
    stands alone (the female sign, a skin-tone swatch) is its own base, and families are one.
    """
    points = codepoints.lower().split("_")
    kept = [point for point in points if point not in SKIN_TONES | SIGNS | {"200d"}] or points
    kept = [PERSON if point in PEOPLE else point for point in kept]
    if (len(kept) > 1 and set(kept) == {PERSON}) or kept == ["1f46a"]:
        return "family"
    name = " ".join(kept)
    return ALIASES.get(name, name)
