"""What README and docs say exists: links, files, names, options, messages; and no command is in no list."""

import ast
import dataclasses
import re
import shlex
import subprocess
import types
import typing
from functools import cache

import pytest
import yaml

from infra.cluster import Cluster
from tests.commands import check_command
from tests.docs.lists import ELSEWHERE, INSTEAD, NOT_RUN, PROGRAMS
from tests.docs.pages import COMMANDS, PAGES, ROOT, Page
from tests.docs.shell import without_settings
from workflows import compared, converted, look, options, prompted, rated, submit
from workflows.cascade import cascade
from workflows.clip import clip
from workflows.options import WORK, further_inputs
from workflows.recipes import debug
from workflows.yardstick import yardstick

CODE = [path for package in ("infra", "captioner", "t2i", "workflows") for path in (ROOT / package).rglob("*.py")]
SUFFIXES = ("py", "md", "yaml", "toml", "lock", "jinja")
OF_OTHERS = {"--help", "--help-all", "--version", "--dry-run", "--build-arg"}  # of Docker, and of the command itself
LANGUAGES = {"", "python", "diff", "yaml", "text"}


@cache
def told() -> list[str]:
    """Every string of the code, with a mark where values are put in."""
    strings = []
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [each.value if isinstance(each, ast.Constant) else "\0" for each in node.values]
                strings.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                strings.append(node.value)
    return strings


def says(message: str) -> bool:
    """Whether some string of the code has the fixed parts of a message, in their order."""
    pattern = re.compile(".*".join(re.escape(part) for part in message.split("…")), re.DOTALL)
    return any(pattern.search(string) for string in told())


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_messages_are_those_of_the_code(page):
    for message in page.messages:
        assert max(map(len, message.split("…"))) >= 10, f"{message!r} says nothing fixed"
        assert says(message), f"{page} quotes {message!r}, which the code does not say"


def test_a_message_that_has_changed_is_noticed():
    assert says("There is no room left for …. Free some space, then give the same command again.")
    assert not says("There is no room left for …. Free some room, then give the same command again.")
    assert not says("Free some space, … There is no room left for")
    assert len(Page(ROOT / "docs" / "operating.md").messages) > 40


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_somewhere(page):
    for link in page.links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.path.parent / path).resolve() if path else page.path
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in Page(target).anchors, f"{page}: {link}"


def test_the_index_has_every_page():
    there = {str(page.path.name) for page in PAGES if page.path.parent.name == "docs"} - {"README.md"}
    assert there <= set(Page(ROOT / "docs" / "README.md").links)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_and_names_exist(page):
    for text in page.code:
        if (
            re.fullmatch(rf"(?:[\w.-]+/)+[\w.-]+\.(?:{'|'.join(SUFFIXES)})", text)
            and text.split("/")[0] in NAMES_AT_ROOT
        ):
            assert (ROOT / text).exists(), f"{page}: {text}"
        elif re.fullmatch(r"(infra|captioner|t2i|workflows)(\.\w+)+", text):
            named = f"--{text.replace('_', '-')}" in known_options()  # a field of the recipe, or a name of Python's
            assert named or is_defined(text), f"{page}: {text}"


NAMES_AT_ROOT = {path.name for path in ROOT.iterdir()}


def is_defined(name: str) -> bool:
    """Whether a dotted name is a module, or a word of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ROOT.joinpath(*parts[:length]).with_suffix(".py")
        if module.exists():
            return all(re.search(rf"\b{part}\b", module.read_text()) for part in parts[length:])
    return ROOT.joinpath(*parts).is_dir()


def fields(kind: type, prefix: str = "") -> typing.Iterator[str]:
    """The options that a config makes, as tyro spells them."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + field.name.replace("_", "-")
        yield name
        hint = hints[field.name]
        several = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for each in several:
            if isinstance(each, type) and dataclasses.is_dataclass(each):
                yield from fields(each, name + ".")


@cache
def known_options() -> frozenset[str]:
    found = {"corpus", "seed", "store", "cluster", *fields(Cluster, "cluster.")}
    holders = [
        each
        for module in (look, options, submit, compared, rated, prompted, converted)
        for each in vars(module).values()
        if isinstance(each, type)
    ]
    for kind in holders:
        if dataclasses.is_dataclass(kind):
            found |= set(fields(kind))
    for work in WORK.values():
        hints = typing.get_type_hints(work.work)
        found |= {*fields(next(iter(hints.values()))), *work.input_names, *further_inputs(work)}
    found |= {option for recipe in (debug(), cascade(), clip(), yardstick()) for option in fields(type(recipe))}
    from ray.scripts.scripts import start

    rays = {name.removeprefix("--") for parameter in start.params for name in parameter.opts}
    return frozenset(f"--{name}" for name in found | rays) | OF_OTHERS


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_options_that_are_spoken_of_exist(page):
    for text in page.code:
        for option in re.findall(r"(?<!\S)(--[a-z][\w.-]*)", text):
            assert option in known_options() or re.sub(r"(--|\.)no-", r"\1", option) in known_options(), (
                f"{page}: {option}"
            )


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_blocks_are_of_a_known_kind(page):
    for block in page.blocks:
        assert block.language in LANGUAGES, f"{page}: a block of {block.language}, which no test looks at"
        if block.language == "yaml":
            assert yaml.safe_load(block.text)
        if "store.step(" in block.text:  # the story, told where it stands
            code = (ROOT / "workflows" / "text_to_image.py").read_text()
            assert all(line in code for line in block.text.strip().splitlines())


def is_known(line: str) -> bool:
    """Whether a line without settings is one that is run, or stands in a list."""
    return line.startswith((*NOT_RUN, *ELSEWHERE)) or line.split()[0] in ("rescribe", *PROGRAMS)


def test_every_command_is_run_or_in_a_list():
    assert len(COMMANDS) > 80
    for command in COMMANDS:
        line = without_settings(command.line)
        assert is_known(line), f"{command.page} has a command that no test runs: {line}. See tests/docs/lists.py."


def test_a_new_program_is_noticed():
    assert is_known("kubectl apply -k overlay")
    assert not is_known("curl http://localhost:8265")
    assert without_settings("A=1 B='2' rescribe list") == "rescribe list"
    assert without_settings("export A=1") == "export A=1"


def test_the_lists_hold_nothing_that_no_page_has():
    lines = [without_settings(command.line) for command in COMMANDS]
    for beginning in (*NOT_RUN, *ELSEWHERE, *PROGRAMS):
        assert any(line.startswith(beginning) for line in lines), beginning
    whole = "".join(page.path.read_text() for page in PAGES)
    assert all(word in whole for word in INSTEAD)
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_what_is_not_run_could_be():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for command in COMMANDS:
        line = without_settings(command.line)
        if not line.startswith((*NOT_RUN, *ELSEWHERE)):
            continue
        words = shlex.split(line)
        for word in words:
            assert not word.startswith("infra/deploy/") or (ROOT / word).exists(), line
        if words[0] == "make":
            assert words[1] in targets, line
        if words[0] in ("ray", "rescribe") and words[-1] != "...":
            check_command(words)


def test_the_changes_of_a_page_fit_the_code():
    """The test that runs them takes a minute, and is a long one."""
    page = Page(ROOT / "docs" / "adding-a-model.md")
    (change,) = [block.text for block in page.blocks if block.language == "diff"]
    line = ["git", "apply", "--check", "-"]
    done = subprocess.run(line, input=change, text=True, cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
