"""The examples of docs/yardsticks.md run as they stand, and the scores that it names are there."""

import pytest

from t2i.evaluate import skills
from tests.docs.pages import ROOT, Page

PAGE = Page(ROOT / "docs" / "yardsticks.md")
EXAMPLES = [block.text for block in PAGE.blocks if block.language == "python"]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number, capsys):
    exec(compile(EXAMPLES[number], str(PAGE), "exec"), {})
    assert capsys.readouterr().out.strip()


def test_every_skill_is_told_of():
    assert {name for name in PAGE.code if name.startswith("skill_")} == {f"skill_{name}" for name in skills.SKILLS}
