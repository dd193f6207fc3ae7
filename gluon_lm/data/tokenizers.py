"""How text becomes words.

A tokenizer takes text and returns its words in order. No word spans white space, and the special words
``<unk>`` and ``<eos>`` standing alone stay whole. A new one is one function and one line in `TOKENIZERS`; it
must not look across white space, because text is passed to it in pieces that were cut there.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Callable
from functools import cache

from .vocabulary import EOS

Tokenizer = Callable[[str], list[str]]

_JOINERS = "\u00ad\u200c\u200d"  # the soft hyphen, and what Persian and Indic scripts have within words


@cache
def _word_pattern() -> re.Pattern[str]:
    r"""Matches one word of raw text. ``\w`` matches letters and digits, but not their combining marks.

    In order: special words; initials (U.S.); numbers with separators (1,234.56); words, also with inner hyphens; what
    follows an apostrophe ('s, 't); runs of dashes and of dots; any other sign by itself. The rules are this package's
    own: they split off 's and 't as WikiText's text does, but keep hyphens and the separators of numbers.
    """
    marks = _JOINERS + "".join(c for c in map(chr, range(sys.maxunicode + 1)) if unicodedata.category(c)[0] == "M")
    word = rf"\w+(?:(?![\x00-\xac])[{marks}]+\w*)*"  # most text has no marks: the look-ahead finds that out fast
    return re.compile(
        r"(?i:<unk>|<eos>)"
        r"|(?:[^\W\d_]\.){2,}"
        r"|\d+(?:[.,]\d+)+"
        rf"|{word}(?:-{word})*"
        rf"|(?<=[\w{marks}])['’](?i:s|t|re|ve|ll|d|m)\b"
        r"|--+|\.\.+"
        r"|[^\w\s]"
    )


def _split_words(text: str) -> list[str]:
    return _word_pattern().findall(text)


TOKENIZERS: dict[str, Tokenizer] = {
    # Text whose words are already separated by white space, as in the published corpora.
    "whitespace": str.split,
    # Raw English: punctuation is split from words, case is kept, nothing is dropped but white space.
    "words": _split_words,
}


def words_of(text: str, tokenizer: str) -> list[str]:
    """The words of a text, ``<eos>`` for each line feed."""
    return TOKENIZERS[tokenizer](text.replace("\n", f" {EOS} "))
