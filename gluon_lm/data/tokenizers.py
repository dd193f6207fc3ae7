"""How text becomes words.

A tokenizer takes text and returns its words in order. No word spans white space, and the special words
``<unk>`` and ``<eos>`` standing alone stay whole. A new one is one function and one line in `TOKENIZERS`; it
must not look across white space, because text is handed to it in pieces that were cut there.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .vocabulary import EOS

Tokenizer = Callable[[str], list[str]]

# In order: special words; initials (U.S.); numbers with separators (1,234.56); words, also with
# inner hyphens; what follows an apostrophe ('s, 't); runs of dashes and of dots; any other sign by itself.
_WORDS = re.compile(
    r"<unk>|<eos>"
    r"|(?:[^\W\d_]\.){2,}"
    r"|\d+(?:[.,]\d+)+"
    r"|\w+(?:-\w+)*"
    r"|(?<=\w)['’](?:s|t|re|ve|ll|d|m)\b"
    r"|--+|\.\.+"
    r"|[^\w\s]",
    re.IGNORECASE,
)

TOKENIZERS: dict[str, Tokenizer] = {
    # Text whose words are set apart by white space already, as in the published corpora.
    "whitespace": str.split,
    # Raw English: punctuation is split from words, case is kept, nothing is dropped but white space.
    "words": _WORDS.findall,
}


def words_of(text: str, tokenizer: str) -> list[str]:
    """The words of a text, ``<eos>`` for each line feed."""
    return TOKENIZERS[tokenizer](text.replace("\n", f" {EOS} "))
