"""Text that a model writes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 1e-3, 1e3  # below the lowest, the likeliest word is taken
WORDS_PER_LINE = 20


def lines_of(words: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes as words, each line as soon as it is full."""
    words = iter(words)
    while line := list(itertools.islice(words, WORDS_PER_LINE)):
        yield " ".join(line)
