"""The documentation as tests read it: pages, fenced blocks, the commands in these, and what is named in between."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("**/*.md")])
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))

_FENCE = re.compile(r"^ *```(?P<language>\w*)\n(?P<body>.*?)^ *```$", re.MULTILINE | re.DOTALL)
_COMMENTED = re.compile(r"^# (python -m .*(?:\\\n#.*)*)", re.MULTILINE)
_SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
_LINK = re.compile(r"\]\(([^)\s]+)\)|<(?:img|source)[^>]*\b(?:src|srcset)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Command:
    """A command of a `bash` block.

    Attributes
    ----------
    where : str
        Page and line.
    text : str
        As it stands there, its continued lines joined.
    words : list of str
        Its words, without a comment, the settings of variables before it, and a ``> file`` behind it; none where a
        variable is set for the commands after it.
    environment : dict of str to str
    output : str or None
        The file that its output goes to.
    """

    where: str
    text: str
    words: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    output: str | None = None


@dataclass(frozen=True)
class Block:
    """A fenced block: where it stands, its language, what it holds."""

    where: str
    language: str
    body: str

    def commands(self) -> Iterator[Command]:
        """The commands of a `bash` block, in order."""
        page, _, first = self.where.rpartition(":")
        for number, line in _joined_lines(self.body):
            where = f"{page}:{int(first) + number}"
            if assignment := re.fullmatch(r"([A-Z_]+)=(\$\(.*\))", line):
                yield Command(where, line, [], {assignment[1]: assignment[2]})
                continue
            lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words: list[str] = []
            for word in [*lexer, "&&"]:
                if word in ("&&", ";"):
                    if words:
                        yield _command(where, line, words)
                    words = []
                else:
                    words.append(word)


def _joined_lines(body: str) -> Iterator[tuple[int, str]]:
    first, line = 1, ""
    for number, part in enumerate(body.splitlines(), 1):
        line += part.strip()
        if line.endswith("\\"):
            line = line[:-1]
            continue
        yield first, line
        first, line = number + 1, ""


def _command(where: str, text: str, words: list[str]) -> Command:
    environment: dict[str, str] = {}
    while words and re.match(r"[A-Z_]+=", words[0]):
        name, _, environment[name] = words.pop(0).partition("=")
    output = None
    if len(words) > 2 and words[-2] == ">":
        *words, _, output = words
    return Command(where, text, words, environment, output)


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page, or the commands in the comments of a recipe."""
    text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT)
    if page.suffix == ".yaml":
        found = [(match, "bash", match[1].replace("\n#", "\n") + "\n") for match in _COMMENTED.finditer(text)]
    else:
        found = [(match, match["language"], match["body"]) for match in _FENCE.finditer(text)]
    return [Block(f"{name}:{text.count(chr(10), 0, match.start()) + 1}", *rest) for match, *rest in found]


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
