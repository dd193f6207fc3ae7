"""The words that a model knows, and their ids."""

from __future__ import annotations

import hashlib
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

import numpy as np

from ..errors import DataError
from ..files import atomic_write

UNK = "<unk>"
EOS = "<eos>"
SPECIAL_WORDS = (UNK, EOS)


@dataclass(frozen=True)
class Vocabulary:
    """An immutable list of distinct words, including ``<unk>`` and ``<eos>``. A word's id is its index.

    Parameters
    ----------
    words : tuple of str
        None of them has white space in it.

    Raises
    ------
    DataError
        If a word occurs twice, is empty or has white space, or if a special word is missing.
    """

    words: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "words", tuple(self.words))
        _check(self.words)

    @classmethod
    def from_counts(
        cls, words: Sequence[str], counts: Sequence[int], *, min_freq: int = 1, max_size: int | None = None
    ) -> Vocabulary:
        """The vocabulary of a text: by falling frequency, words of equal frequency in the order given.

        ``<unk>`` and ``<eos>`` always belong to it and stand where their frequency puts them; that of
        ``<unk>`` includes all the words that are left out.

        Parameters
        ----------
        words : sequence of str
            The distinct words of the text, by first appearance.
        counts : sequence of int
            How often each occurs.
        min_freq : int
            Rarer words are left out.
        max_size : int, optional
            Largest size, the two special words included; rarer and later words are left out.
        """
        if max_size is not None and max_size < len(SPECIAL_WORDS):
            raise DataError(
                f"vocabulary size {max_size}: must be at least {len(SPECIAL_WORDS)}, for "
                f"{' and '.join(SPECIAL_WORDS)}; raise --max-vocab"
            )
        frequency = dict(zip(words, map(int, counts)))
        special = {word: frequency.pop(word, 0) for word in SPECIAL_WORDS}
        position = {word: place for place, word in reversed(list(enumerate([*words, *SPECIAL_WORDS])))}
        ordered = sorted(frequency, key=frequency.__getitem__, reverse=True)
        room = len(ordered) if max_size is None else max_size - len(SPECIAL_WORDS)
        kept = [word for word in ordered[:room] if frequency[word] >= min_freq]
        special[UNK] += sum(frequency.values()) - sum(frequency[word] for word in kept)
        frequency.update(special)
        return cls(tuple(sorted([*kept, *SPECIAL_WORDS], key=lambda word: (-frequency[word], position[word]))))

    @classmethod
    def load(cls, path: str | Path, encoding: str = "utf-8") -> Vocabulary:
        """Read a file with one word a line.

        Parameters
        ----------
        path : str or Path
        encoding : str
            ``utf-8-sig`` for a file that other programs may have begun with a byte order mark.

        Raises
        ------
        DataError
            If it cannot be read, or is not a vocabulary; names the line where possible.
        """
        path = Path(path)
        try:
            text = path.read_bytes().decode(encoding)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); name a file with one word a line") from error
        except UnicodeDecodeError as error:
            line = error.object.count(b"\n", 0, error.start) + 1
            raise DataError(f"{path} line {line}: is not UTF-8 text; save it as UTF-8") from error
        words = text.replace("\r\n", "\n").split("\n")
        if words[-1] == "":
            words.pop()
        try:
            return cls(tuple(words))
        except DataError as error:
            raise DataError(f"{path} {error}; a vocabulary has one word a line") from None

    def save(self, path: str | Path) -> None:
        """Write a file with one word a line, atomically."""
        with atomic_write(Path(path)) as file:
            file.write(self._as_bytes())

    def encode(self, words: Iterable[str]) -> np.ndarray:
        """Ids of words, int32; that of ``<unk>`` for unknown words. `TypeError` for a single string."""
        if isinstance(words, str):
            raise TypeError(f"{words[:40]!r}: is a text, not words; split it, for example with text.split()")
        find, unk = self.ids.get, self.unk_id
        return np.array([find(word, unk) for word in words], dtype=np.int32)

    def unknown(self, words: Iterable[str]) -> list[str]:
        """Those of `words` that would be replaced by ``<unk>``, each once."""
        return list(dict.fromkeys(word for word in words if word not in self.ids))

    def decode(self, ids: Iterable[int]) -> list[str]:
        """Words of ids; `IndexError` for an id out of range."""
        words = self.words
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < len(words):
            raise IndexError(f"ids from {min(ids)} to {max(ids)}: must be from 0 to {len(words) - 1}")
        return [words[i] for i in ids]

    @cached_property
    def ids(self) -> Mapping[str, int]:
        """The id of each word."""
        return MappingProxyType({word: i for i, word in enumerate(self.words)})

    @cached_property
    def unk_id(self) -> int:
        """The id of ``<unk>``, which stands for every word that is not known."""
        return self.words.index(UNK)

    @cached_property
    def eos_id(self) -> int:
        """The id of ``<eos>``, which ends every line."""
        return self.words.index(EOS)

    @cached_property
    def digest(self) -> str:
        """A hash of the words and their order, equal on every machine."""
        return hashlib.sha256(self._as_bytes()).hexdigest()

    def _as_bytes(self) -> bytes:
        return "".join(f"{word}\n" for word in self.words).encode("utf-8")

    def __reduce__(self) -> tuple[type[Vocabulary], tuple[tuple[str, ...]]]:
        return type(self), (self.words,)

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self.ids

    def __repr__(self) -> str:
        return f"Vocabulary({len(self)} words, {self.digest[:8]})"


def _check(words: Sequence[str]) -> None:
    """Raise `DataError` unless `words` make a vocabulary; a word's line is its place in the file."""
    for line, word in enumerate(words, 1):
        if word.split() != [word]:
            raise DataError(f"line {line}: {reprlib.repr(word)} is not one word without white space")
    if len(set(words)) != len(words):
        first: dict[str, int] = {}
        for line, word in enumerate(words, 1):
            if first.setdefault(word, line) != line:
                raise DataError(f"line {line}: {reprlib.repr(word)} occurs a second time, first in line {first[word]}")
    for special in SPECIAL_WORDS:
        if special not in words:
            raise DataError(f"line {len(words) + 1}: there must be a line {special}; add it")
