import pytest
from hypothesis import given
from hypothesis import strategies as st

from captioner.backends.prompts import MAX_ALT, check_styles, prompt_of
from captioner.styles import DESCRIPTIVE, SHORT, Style


def said(prompt, alt):
    return prompt_of(Style(name="a", prompt=prompt), alt)


@pytest.mark.parametrize(
    ("prompt", "alt", "expected"),
    [
        ("Describe.", "x", "Describe."),
        ("Rewrite: {alt}", "a cat", "Rewrite: a cat"),
        ("Rewrite: {alt}", None, "Rewrite: "),
        ("Describe.[ It says: {alt}.]", "a cat", "Describe. It says: a cat."),
        ("Describe.[ It says: {alt}.]", None, "Describe."),
        ("Describe.[ It says: {alt}.]", " \n", "Describe."),
        ("[{alt} and {alt}]", "b", "b and b"),
        ("[INST] [{alt} ]what? [/INST]", "b", "[INST] b what? [/INST]"),
        ("[INST] [{alt} ]what? [/INST]", None, "[INST] what? [/INST]"),
        ("[a [{alt}] b]", "x", "[a x b]"),
        ("[{alt}][{alt}]", "{alt}", "{alt}{alt}"),
        ("{0} {name} {{alt}} %s \\1", "[x] \\2", "{0} {name} {[x] \\2} %s \\1"),
        ("", "x", ""),
    ],
)
def test_where_the_alt_text_goes(prompt, alt, expected):
    assert said(prompt, alt) == expected


@given(st.text(), st.text())
def test_alt_texts_are_never_read_as_prompts(before, alt):
    if "{alt}" not in before:
        assert said(before, alt) == before
        text = alt.strip()[:MAX_ALT]
        whole = before.replace("[", "(").replace("]", ")")
        assert said(whole + "{alt}", alt) == whole + text
        assert said(f"{whole}[ so: {{alt}}]", alt) == (f"{whole} so: {text}" if text else whole)


def test_a_page_of_alt_text_is_cut():
    assert said("{alt}", "x" * 10**6) == "x" * MAX_ALT


def test_checks_name_the_style_and_the_field():
    check_styles((SHORT, DESCRIPTIVE), "it")
    with pytest.raises(ValueError, match=r"'short' has no prompt, and it only speaks when asked"):
        check_styles((SHORT,), "it", needs_prompt=True)
    with pytest.raises(ValueError, match=r"'b' sets beams to 3, which it cannot do"):
        check_styles((SHORT, Style(name="b", beams=3)), "it", cannot=("beams",))
    check_styles((Style(name="b", beams=3),), "it")
    with pytest.raises(ValueError, match="give `styles`"):
        check_styles((), "it")
