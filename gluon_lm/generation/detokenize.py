"""From words separated by spaces to readable text.

The rules are this package's own: they undo how WikiText, Penn Treebank and the tokenizer ``words`` split English.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ..data.vocabulary import EOS

_RULES = [
    (re.compile(r" @([-,.])@ "), r"\1"),  # WikiText: 1 @,@ 000, role @-@ playing
    (re.compile(r" n't\b"), "n't"),  # Penn Treebank: do n't
    (re.compile(r" (['’](?:s|t|re|ve|ll|d|m)\b)"), r"\1"),
    (re.compile(r'(^|\s)(["“]) ([^"“”]*?) (["”])'), r"\1\2\3\4"),
    (re.compile(r'((?:(?<![^\s"“(\[])[(\[£€#])|\$) '), r"\1"),  # and US$ 5
    (re.compile(r' ([.,;:!?%)\]]+)(?![^\s"”)\]])'), r"\1"),
]


def detokenize(words: Iterable[str]) -> str:
    """Join words as English is written: ``<eos>`` ends a line, punctuation is attached to its word."""
    lines = " ".join(words).split(EOS)
    return "\n".join(_detokenize_line(line.strip()) for line in lines)


def _detokenize_line(line: str) -> str:
    for pattern, replacement in _RULES:
        line = pattern.sub(replacement, line)
    return line
