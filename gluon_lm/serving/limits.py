"""The limits of a server."""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Section, integer, option, real


@dataclass(frozen=True)
class Limits(Section):
    """Bounds on one request, and on all of them together."""

    slots: int = option(32, integer(1, 4096), "texts generated at once (the batch of each step)")
    max_waiting: int = option(256, integer(0, 65536), "texts that may wait for a slot; more are refused (429)")
    max_words: int = option(2000, integer(), "longest text")
    max_texts: int = option(8, integer(1, 4096), "most texts of one request")
    max_prompt: int = option(10_000, integer(), "longest prompt, and longest text to score, in characters")
    timeout: float = option(60.0, real(0, above=True), "seconds for a request, and for what runs at shutdown")

    @property
    def capacity(self) -> int:
        """Texts that are accepted at the same time."""
        return self.slots + self.max_waiting

    @property
    def max_body(self) -> int:
        """Bytes of a request: 12 per character, which JSON may write as two escapes, and room for the rest."""
        return 12 * self.max_prompt + 8192
