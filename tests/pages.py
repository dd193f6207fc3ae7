"""The documentation as tests read it: pages, their fenced blocks, and what is named in between."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from processes import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("**/*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

_FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_COMMENTED = re.compile(r"^# (?P<body>python -m (?:.*\\\n#)*.*\n)", re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|source)[^>]*\b(?:src|srcset)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page and line where it begins, its language, what it holds."""

    page: Path
    line: int
    language: str
    body: str

    def at(self, line: int = 0) -> str:
        """Where a line of it stands; the first is 1."""
        return f"{self.page.relative_to(ROOT)}:{self.line + line}"


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, or the commands in the comments of a recipe."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".yaml":
        found = [(match, "bash", match["body"].replace("\n#", "\n")) for match in _COMMENTED.finditer(text)]
    else:
        found = [(match, match["language"], match["body"]) for match in _FENCE.finditer(text)]
    return [Block(page, text.count("\n", 0, match.start("body")), *rest) for match, *rest in found]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def spans(page: Path) -> list[str]:
    """What stands between backticks in the text of a page."""
    return _SPAN.findall(prose(page))


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead."""
    return [one or other for one, other in _LINK.findall(prose(page))]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
