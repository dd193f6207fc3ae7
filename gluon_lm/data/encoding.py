"""From text to token ids in a memory map, made once for each content and cached.

Every line ends with ``<eos>``, blank lines included, and so does a last line without a line break. Only a line
feed ends a line; other white space separates words.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import DataError
from ..files import BLOCK_BYTES, read_seal, replaced_folder, verify_files, write_seal
from ..heartbeat import beat
from ..locks import exclusive_lock
from ..logs import LOGGER
from ..progress import progress_bar
from .tokenizers import words_of
from .vocabulary import UNK, Vocabulary

# Part of every cache key: raise it when the same text and options give different ids, or different files.
_FORMAT = 2
_BLOCK_TOKENS = 1 << 22
_DTYPE = np.dtype("<i4")
EMPTY = "{}: is empty; put text into it, or name another file"
_BOM = b"\xef\xbb\xbf"
_ARCHIVES = (b"\x1f\x8b", b"PK\x03\x04", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"PAR1")  # gzip, zip, ..., Parquet

# ---------------------------------------------------------------- text


@dataclass(frozen=True)
class Span:
    """The bytes of a file from `start` to `stop`, or to its end."""

    path: Path
    start: int = 0
    stop: int | None = None

    def blocks(self) -> Iterator[bytes]:
        """The content, in blocks of bounded size; `DataError` where it cannot be read."""
        with open_text(self.path) as file:
            file.seek(self.start)
            left = self.stop - self.start if self.stop is not None else None
            while block := file.read(BLOCK_BYTES if left is None else min(BLOCK_BYTES, left)):
                left = None if left is None else left - len(block)
                beat()
                yield block


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[BinaryIO]:
    """A text file opened in binary mode, for a block in which errors of the file become a `DataError`."""
    try:
        if path.exists() and not path.is_file():
            what = "is a directory" if path.is_dir() else "is not a regular file"
            raise DataError(f"{path}: {what} where a text file is wanted; name a file")
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist; name a text file that does") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); fix that, or name another text file") from error


@dataclass(frozen=True)
class Text:
    """One part of a corpus: spans of files that are read one after the other."""

    spans: tuple[Span, ...]

    @classmethod
    def of(cls, *paths: Path) -> Text:
        """The text of whole files."""
        return cls(tuple(Span(path) for path in paths))

    @property
    def name(self) -> str:
        """For messages: the file, with the bytes if it is a part of one, or the first and how many more."""
        span, more = self.spans[0], len(self.spans) - 1
        part = f" (bytes {span.start:,} to {span.stop:,})" if span.stop is not None else ""
        return f"{span.path}{part}" + (f" and {more} more files" if more else "")

    @property
    def num_bytes(self) -> int:
        """Size of the text; missing files count as empty."""
        sizes = ((span, span.path.stat().st_size) for span in self.spans if span.path.is_file())
        return sum((size if span.stop is None else span.stop) - span.start for span, size in sizes)

    @cached_property
    def digest(self) -> str:
        """Hash of the content; for one whole file its SHA-256."""
        return _joined([_hash_blocks(span) for span in self.spans])

    def pieces(self, progress: Callable[[int], object] = lambda num_bytes: None) -> Iterator[str]:
        """The text in pieces that are cut at white space, every span ended by a line break.

        Parameters
        ----------
        progress : callable
            Called with the number of bytes read since the call before.

        Raises
        ------
        DataError
            If it is not UTF-8, cannot be read, or is no longer the text whose `digest` was asked for.
        """
        hashes = []
        for span in self.spans:
            sha256 = hashlib.sha256()
            position, rest = span.start, [b""]  # what white space has not ended yet
            for block in span.blocks():
                sha256.update(block)
                progress(len(block))
                cut = max(block.rfind(b"\n"), block.rfind(b" ")) + 1
                if cut:
                    piece = b"".join([*rest, block[:cut]])
                    yield _decode(span.path, position, piece)
                    position, rest = position + len(piece), []
                rest.append(block[cut:])
                last = block[-1:]
            piece = b"".join(rest)
            if position == span.start and not piece:
                raise DataError(EMPTY.format(span.path))
            if last != b"\n":
                yield _decode(span.path, position, piece) + "\n"
            hashes.append(sha256.hexdigest())
        if _joined(hashes) != self.digest:
            raise DataError(f"{self.name}: changed while it was read; start again when it is complete")


def _hash_blocks(span: Span) -> str:
    sha256 = hashlib.sha256()
    for block in span.blocks():
        sha256.update(block)
    return sha256.hexdigest()


def _joined(hashes: list[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def _decode(path: Path, position: int, block: bytes) -> str:
    """Decode the bytes that begin at `position` of a file."""
    if position == 0 and block.startswith(_BOM):
        position, block = len(_BOM), block[len(_BOM) :]
    try:
        return block.decode("utf-8")
    except UnicodeDecodeError as error:
        if position == 0 and block.startswith(_ARCHIVES):
            raise DataError(f"{path}: is compressed, not text; unpack it, and name what was in it") from error
        wrong = position + error.start
        line = sum(before.count(b"\n") for before in Span(path, 0, wrong).blocks()) + 1
        raise DataError(
            f"{path} line {line}: byte 0x{block[error.start]:02x} (byte {wrong} of the file) is not UTF-8; "
            "convert the file to UTF-8"
        ) from error


# ---------------------------------------------------------------- cache


def default_cache_dir() -> Path:
    """``$GLUON_LM_CACHE``, else ``gluon_lm`` in ``$XDG_CACHE_HOME``, in ``~/.cache`` or in a temporary folder."""
    named = os.environ.get("GLUON_LM_CACHE")
    if named:
        return Path(os.path.expanduser(named))
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder.startswith("~"):  # a user without a home folder, as in containers
        folder = os.path.join(tempfile.gettempdir(), f"cache-{os.getuid()}")
    return Path(folder) / "gluon_lm"


class Cache:
    """Folders of files made from text, under a key that says what they were made from.

    An entry is written next to its final place and renamed, under a lock, so that a process that is killed leaves
    no incomplete entry, and two that start at once do the work once. A damaged entry is made again. If the
    folder cannot be written, a temporary one is used until `close`, with a warning.

    Parameters
    ----------
    folder : Path, optional
        `default_cache_dir` if None.
    """

    _INDEX = "entry.json"

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or default_cache_dir()
        self._temporary: Path | None = None

    def entry(self, key: list[Any], build: Callable[[Path], Mapping[str, Any]]) -> tuple[Path, dict[str, Any]]:
        """The folder of an entry and the values that were returned when it was built.

        Parameters
        ----------
        key : list
            Everything that determines the entry's content, as JSON values.
        build : callable
            Writes the files of a new entry into the folder that it is given, and returns values for JSON.
        """
        name = hashlib.sha256(json.dumps([_FORMAT, *key]).encode()).hexdigest()[:32]
        while True:
            place = self._folder / name
            found = self._read(place)
            LOGGER.debug("%s: %s", place, "to be made" if found is None else "encoded already")
            try:
                return place, found if found is not None else self._build(place, build)
            except BrokenPipeError:
                raise  # the reader of the progress is gone
            except OSError as error:
                if self._temporary is not None:
                    raise DataError(
                        f"{self._folder}: cannot be written ({error.strerror}); free space, or set "
                        "GLUON_LM_CACHE to a writable folder"
                    ) from error
                self._use_temporary(error)

    def _use_temporary(self, error: OSError) -> None:
        blocked = self._folder
        try:
            self._folder = self._temporary = Path(tempfile.mkdtemp(prefix="gluon_lm-"))
        except OSError:
            raise DataError(
                f"{blocked}: cannot be written ({error.strerror}), nor can {tempfile.gettempdir()}; set "
                "GLUON_LM_CACHE to a writable folder"
            ) from error
        LOGGER.warning(
            "the cache %s cannot be written (%s): the text is encoded again at each start; set GLUON_LM_CACHE "
            "to a writable folder",
            blocked,
            error.strerror,
        )

    def _read(self, place: Path) -> dict[str, Any] | None:
        """The values of a complete entry; None for one that is missing or damaged."""
        try:
            index = read_seal(place, self._INDEX)
            verify_files(place, index)
            return dict(index["values"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _build(self, place: Path, build: Callable[[Path], Mapping[str, Any]]) -> dict[str, Any]:
        is_shared = self._temporary is None
        with exclusive_lock(place.with_name(f".{place.name}.lock")) if is_shared else contextlib.nullcontext():
            found = self._read(place)
            if found is not None:
                return found
            # A damaged entry, and what processes left that were killed: nobody else builds it now.
            for remains in (place, *self._folder.glob(f".{place.name}.new-*")):
                if remains.exists():
                    shutil.rmtree(remains)
            with replaced_folder(place) as fresh:
                index = write_seal(fresh, self._INDEX, {"values": dict(build(fresh))})
            return index["values"]

    def close(self) -> None:
        """Remove the temporary folder, if there is one; open memory maps stay valid."""
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def __enter__(self) -> Cache:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


# ---------------------------------------------------------------- encoding


@dataclass(frozen=True)
class Counts:
    """How a text was counted.

    Attributes
    ----------
    num_lines, num_tokens : int
        Lines, blank ones included; words and one ``<eos>`` for each line.
    num_unk : int
        Tokens that are ``<unk>``.
    num_replaced : int
        Those of them that stand for words that the vocabulary lacks.
    """

    num_lines: int
    num_tokens: int
    num_unk: int
    num_replaced: int


_IDS = "ids.i32"
_VOCABULARY = "vocab.txt"


def build_vocabulary(
    cache: Cache,
    text: Text,
    tokenizer: str,
    min_freq: int = 1,
    max_size: int | None = None,
) -> Vocabulary:
    """The vocabulary of a text, as `Vocabulary.from_counts` makes it. The text's ids are cached too.

    The text is read once: words get provisional ids by first appearance, and final ones when all are counted.
    """

    def build(folder: Path) -> dict[str, Any]:
        provisional = folder / "provisional.i32"
        word_ids = _GrowingIds()
        num_lines = _write_ids(text, tokenizer, word_ids, provisional)
        counts_V = _count(_mapped(provisional), len(word_ids))
        vocabulary = Vocabulary.from_counts(list(word_ids), counts_V.tolist(), min_freq=min_freq, max_size=max_size)
        vocabulary.save(folder / _VOCABULARY)

        final_V = vocabulary.encode(word_ids)
        is_unk_V = final_V == vocabulary.unk_id
        num_unk = int(counts_V[is_unk_V].sum())
        written_unk = int(counts_V[word_ids[UNK]]) if UNK in word_ids else 0

        def remap(into: Path) -> dict[str, Any]:
            with open(into / _IDS, "wb") as file:
                for ids in _blocks(_mapped(provisional)):
                    file.write(final_V[ids].astype(_DTYPE, copy=False).data)
            return asdict(Counts(num_lines, int(counts_V.sum()), num_unk, num_unk - written_unk))

        cache.entry(_ids_key(text, tokenizer, vocabulary), remap)
        provisional.unlink()
        return {}

    folder, _ = cache.entry(["vocabulary", text.digest, tokenizer, min_freq, max_size], build)
    return Vocabulary.load(folder / _VOCABULARY)


def encode_text(cache: Cache, text: Text, tokenizer: str, vocabulary: Vocabulary) -> tuple[np.ndarray, Counts]:
    """Token ids of a text.

    Returns
    -------
    ids : ndarray of int32, shape (num_tokens,)
        A read-only memory map.
    counts : Counts

    Raises
    ------
    DataError
        If the text has no words, is not UTF-8 or cannot be read.
    """

    def build(folder: Path) -> dict[str, Any]:
        word_ids = _KnownIds(vocabulary)
        num_lines = _write_ids(text, tokenizer, word_ids, folder / _IDS)
        num_tokens = num_unk = 0
        for ids in _blocks(_mapped(folder / _IDS)):
            num_tokens += len(ids)
            num_unk += int(np.count_nonzero(ids == vocabulary.unk_id))
        return asdict(Counts(num_lines, num_tokens, num_unk, word_ids.num_replaced))

    folder, counts = cache.entry(_ids_key(text, tokenizer, vocabulary), build)
    return _mapped(folder / _IDS), Counts(**counts)


def first_rise(ids: np.ndarray, vocabulary: Vocabulary) -> str | None:
    """Where a vocabulary first leaves the order of falling frequency in a text, in words; None where it keeps it."""
    counts_V = _count(ids, len(vocabulary))
    rises = np.flatnonzero(np.diff(counts_V) > 0)
    if not len(rises):
        return None
    first = int(rises[0])
    words = vocabulary.decode([first, first + 1])
    shown = [f"{reprlib.repr(word)} ({count} times)" for word, count in zip(words, counts_V[first:])]
    return f"line {first + 1} has {' before '.join(shown)}"


def _ids_key(text: Text, tokenizer: str, vocabulary: Vocabulary) -> list[Any]:
    return ["ids", text.digest, tokenizer, vocabulary.digest]


class _GrowingIds(dict[str, int]):
    """Gives a new word the next id."""

    def __missing__(self, word: str) -> int:
        self[word] = new = len(self)
        return new


class _KnownIds(dict[str, int]):
    """Gives a word that the vocabulary lacks the id of ``<unk>``, and counts it."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        super().__init__(vocabulary.ids)
        self._unk_id = vocabulary.unk_id
        self.num_replaced = 0

    def __missing__(self, word: str) -> int:
        self.num_replaced += 1
        return self._unk_id


def _write_ids(text: Text, tokenizer: str, word_ids: Mapping[str, int], path: Path) -> int:
    """Write the id of every token of `text`; returns the number of lines."""
    num_lines = num_tokens = 0
    with (
        open(path, "wb") as file,
        progress_bar(total=text.num_bytes, desc=f"encoding {text.name}", unit="B") as bar,
    ):
        for piece in text.pieces(bar.update):
            words = words_of(piece, tokenizer)
            file.write(np.fromiter(map(word_ids.__getitem__, words), dtype=_DTYPE, count=len(words)).data)
            num_lines += piece.count("\n")
            num_tokens += len(words)
    if num_tokens <= num_lines:
        raise DataError(f"{text.name}: has no words, only white space; put text into it, or name another file")
    return num_lines


def _mapped(path: Path) -> np.ndarray:
    return np.memmap(path, dtype=_DTYPE, mode="r")


def _count(ids: np.ndarray, num_words: int) -> np.ndarray:
    """How often each word occurs."""
    counts_V = np.zeros(num_words, np.int64)
    for block in _blocks(ids):  # numpy converts to int64: the whole would take twice the text
        counts_V += np.bincount(block, minlength=num_words)
    return counts_V


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    """Ids in blocks of bounded size."""
    for start in range(0, len(ids), _BLOCK_TOKENS):
        beat()
        yield ids[start : start + _BLOCK_TOKENS]
