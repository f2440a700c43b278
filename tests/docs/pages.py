"""What a page holds: blocks, the lines of commands among them, messages, links, and the names of files and options."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENDS = re.compile(r'\s+# ends with 1: "(.+)"$')


@dataclass(frozen=True)
class Command:
    """A line as it stands, without its comment; `says`: it ends with 1, and this is in what it says."""

    page: "Page"
    line: str
    says: str = ""


@dataclass(frozen=True)
class Block:
    """A fenced block: `language` as it is written, empty for commands."""

    language: str
    text: str


@dataclass(frozen=True)
class Page:
    """One file of Markdown."""

    path: Path

    def __str__(self) -> str:
        return str(self.path.relative_to(ROOT))

    @property
    def blocks(self) -> list[Block]:
        found = re.findall(r"^```(\w*)\n(.*?)^```$", self.path.read_text(), re.DOTALL | re.MULTILINE)
        return [Block(*each) for each in found]

    @property
    def prose(self) -> str:
        """What stands outside of blocks."""
        return re.sub(r"^```.*?^```$", "", self.path.read_text(), flags=re.DOTALL | re.MULTILINE)

    @property
    def messages(self) -> list[str]:
        """Quoted lines."""
        return re.findall(r"^> (.+)$", self.prose, re.MULTILINE)

    @property
    def code(self) -> list[str]:
        """What stands between backticks."""
        return re.findall(r"`([^`\n]+)`", self.prose)

    @property
    def links(self) -> list[str]:
        return re.findall(r"\]\(([^)\s]+)\)", self.prose)

    @property
    def anchors(self) -> set[str]:
        """Of its headings, as GitHub makes them."""
        headings = re.findall(r"^#+ (.+)$", self.prose, re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}

    def commands(self, block: Block) -> list[Command]:
        """Of a block of commands, a line each."""
        found = []
        for line in filter(str.strip, block.text.splitlines()):
            says = match[1] if (match := ENDS.search(line)) else ""
            found.append(Command(self, re.sub(r"\s+#\s.*$", "", line), says))
        return found


PAGES = [Page(path) for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))]
COMMANDS = [
    command for page in PAGES for block in page.blocks if not block.language for command in page.commands(block)
]
