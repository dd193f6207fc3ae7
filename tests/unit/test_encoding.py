"""From text to ids: against a naive encoder, and a cache that survives damage, races and kills."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from processes import environment

from gluon_lm.data import Vocabulary, encoding
from gluon_lm.data.encoding import (
    Cache,
    Counts,
    Span,
    Text,
    build_vocabulary,
    default_cache_dir,
    encode_text,
    first_rise,
)
from gluon_lm.data.tokenizers import TOKENIZERS
from gluon_lm.errors import DataError


def naive_tokens(text: str) -> list[str]:
    """Words of every line and ``<eos>``, the way a few lines of Python do it."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [token for line in lines for token in [*line.split(), "<eos>"]]


def naive_vocabulary(tokens: list[str]) -> list[str]:
    """By falling frequency, then by first appearance; special words that do not occur come last."""
    counts = Counter(tokens)
    order = list(dict.fromkeys([*tokens, "<unk>", "<eos>"]))
    return sorted(order, key=lambda word: (-counts[word], order.index(word)))


def naive_ids(tokens: list[str], words: list[str]) -> list[int]:
    return [words.index(token) if token in words else words.index("<unk>") for token in tokens]


def write(folder: Path, content: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def encode_file(path: Path, cache_dir: Path, **limits) -> tuple[Vocabulary, np.ndarray, Counts]:
    """A file with the vocabulary of its own."""
    with Cache(cache_dir) as cache:
        vocabulary = build_vocabulary(cache, Text.of(path), "whitespace", **limits)
        return (vocabulary, *encode_text(cache, Text.of(path), "whitespace", vocabulary))


@pytest.fixture
def log_messages():
    """What the package logs."""
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("gluon_lm")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


# ---------------------------------------------------------------- against the naive encoder


PIECES = ["a", "b", "Ü", "丿", " ", "\n", "\n", "\r\n", "\t", "\u00a0", " <unk> "]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=40).map("".join)


@settings(max_examples=40, deadline=None)
@given(TEXTS, TEXTS, st.integers(1, 9))
def test_streaming_equals_naive(text, other, block_bytes):
    text, other = text + " x", other + " y\n"
    words = naive_vocabulary(naive_tokens(text))
    whole = encoding.BLOCK_BYTES
    folder = Path(tempfile.mkdtemp())
    try:
        encoding.BLOCK_BYTES = block_bytes  # so that words and characters straddle blocks
        cache_dir = folder / "cache"
        vocabulary, ids, counts = encode_file(write(folder, text), cache_dir)
        assert list(vocabulary.words) == words
        assert ids.tolist() == naive_ids(naive_tokens(text), words)
        assert counts.num_lines == naive_tokens(text).count("<eos>")
        assert counts.num_tokens == len(ids)
        assert counts.num_unk == naive_tokens(text).count("<unk>")
        assert counts.num_replaced == 0

        with Cache(cache_dir) as cache:
            ids, counts = encode_text(cache, Text.of(write(folder, other)), "whitespace", vocabulary)
        expected = naive_ids(naive_tokens(other), words)
        assert ids.tolist() == expected
        replaced = sum(token not in words for token in naive_tokens(other))
        assert (counts.num_unk, counts.num_replaced) == (expected.count(words.index("<unk>")), replaced)
    finally:
        encoding.BLOCK_BYTES = whole
        shutil.rmtree(folder)


def test_ids_are_a_read_only_int32_map(tmp_path):
    _, ids, _ = encode_file(write(tmp_path, "a b\n"), tmp_path / "cache")
    assert isinstance(ids, np.memmap) and ids.dtype == np.int32 and ids.ndim == 1
    with pytest.raises(ValueError):
        ids[0] = 1


def test_ids_made_with_the_vocabulary_equal_those_made_from_it(tmp_path):
    # The first pass remaps provisional ids; with the vocabulary given, words are looked up instead.
    path = write(tmp_path, "a b a <unk> c\n\nd a b\n" * 5)
    vocabulary, ids, counts = encode_file(path, tmp_path / "one", max_size=4)
    with Cache(tmp_path / "two") as cache:
        ids_again, counts_again = encode_text(cache, Text.of(path), "whitespace", vocabulary)
    assert ids_again.tolist() == ids.tolist()
    assert counts_again == counts == Counts(num_lines=15, num_tokens=55, num_unk=15, num_replaced=10)


def test_a_text_of_several_files_ends_each_with_a_line(tmp_path):
    paths = (
        write(tmp_path, "a b", "1.txt"),
        write(tmp_path, "c\n", "2.txt"),
        write(tmp_path, b"\xef\xbb\xbfd", "3.txt"),
    )
    with Cache(tmp_path / "cache") as cache:
        vocabulary = build_vocabulary(cache, Text.of(*paths), "whitespace")
        ids, _ = encode_text(cache, Text.of(*paths), "whitespace", vocabulary)
    assert vocabulary.decode(ids) == ["a", "b", "<eos>", "c", "<eos>", "d", "<eos>"]


def test_a_span_is_a_part_of_a_file(tmp_path):
    path = write(tmp_path, "a b\nc d\ne\n")
    assert "".join(Text((Span(path, 4, 8),)).pieces()) == "c d\n"
    assert Text((Span(path, 4, 8),)).digest == Text.of(write(tmp_path, "c d\n", "part.txt")).digest


def test_progress_is_written_off_in_bytes(tmp_path):
    text = Text.of(write(tmp_path, "Ü b\r\n"), write(tmp_path, "c", "2.txt"))
    assert text.num_bytes == 7
    assert Text((Span(text.spans[0].path, 1, 3),)).num_bytes == 2
    read: list[int] = []
    assert list(text.pieces(read.append)) and sum(read) == text.num_bytes


def test_a_reader_of_the_progress_that_is_gone_is_no_fault_of_the_disk(tmp_path):
    def build(folder: Path) -> dict[str, int]:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        Cache(tmp_path / "cache").entry(["key"], build)


def test_where_the_frequency_first_rises_is_found_whatever_the_size_of_a_block(monkeypatch):
    vocabulary = Vocabulary(("the", "<eos>", "<unk>", "cat", "dog"))
    for size in (1, 4, 100):
        monkeypatch.setattr(encoding, "_BLOCK_TOKENS", size)
        assert first_rise(np.array([0, 1, 0, 3, 2, 1, 0], np.int32), vocabulary) is None
        assert first_rise(np.array([4, 0, 3, 4, 3, 2, 1, 4], np.int32), vocabulary) == (
            "line 3 has '<unk>' (1 times) before 'cat' (2 times)"
        )


# ---------------------------------------------------------------- tokenizers


def test_words_splits_raw_english():
    raw = "The nation's U.S. debt -- $1,234.56 (don't)... 'Self-made' 20th, John’s “end”.\u00a0<unk> <eos>"
    assert (
        TOKENIZERS["words"](raw)
        == (
            "The nation 's U.S. debt -- $ 1,234.56 ( don 't ) ... ' Self-made ' 20th , John ’s “ end ” . <unk> <eos>"
        ).split()
    )


@pytest.mark.parametrize(
    "word", ["cafe\u0301", "हिन्दी", "مُحَمَّد", "สวัสดี", "co\u00adoperate", "می\u200cخواهم", "nai\u0308ve-cafe\u0301"]
)
def test_marks_upon_letters_are_part_of_their_word(word):
    assert TOKENIZERS["words"](f"({word}'s {word}.)") == ["(", word, "'s", word, ".", ")"]


@given(st.text(st.sampled_from(list("aB1é\u0301\u00ad_.,-'’$<>()\t\n ")), max_size=40))
def test_words_loses_nothing_but_white_space_and_does_not_look_across_it(text):
    tokens = TOKENIZERS["words"](text)
    assert "".join(tokens) == "".join(text.split())
    assert tokens == [token for word in text.split() for token in TOKENIZERS["words"](word)]


# ---------------------------------------------------------------- bad text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\t\n\n", "has no words"),
        (b"one\ntwo caf\xe9 au lait\n", r"line 2: byte 0xe9 \(byte 11 of the file\) is not UTF-8"),
        (gzip.compress(b"some words", mtime=0), "is compressed, not text; unpack it"),
        (b"\xef\xbb\xbfone\n\xff", r"line 2: byte 0xff \(byte 7 of the file\) is not UTF-8"),
        ("naïve\n".encode("utf-16"), "line 1: byte 0xff"),
    ],
)
def test_bad_text_is_refused_with_file_and_line(tmp_path, content, message):
    path = write(tmp_path, content)
    with pytest.raises(DataError, match=message) as caught:
        encode_file(path, tmp_path / "cache")
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    assert left == []


def test_bad_bytes_far_into_a_file(tmp_path):
    lines = 3 * encoding.BLOCK_BYTES // 8
    path = write(tmp_path, b"a b c d\n" * lines + b"\xc3(\n")
    with pytest.raises(DataError, match=rf"line {lines + 1}: byte 0xc3 \(byte {8 * lines} of the file\)"):
        encode_file(path, tmp_path / "cache")


def test_files_that_cannot_be_read(tmp_path):
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path, "is a directory where a text file is wanted"),
        (tmp_path / "missing.txt", "does not exist"),
        (loop, "cannot be read .Too many levels"),
        (fifo, "is not a regular file"),
    ):
        with pytest.raises(DataError, match=message) as caught:
            encode_file(path, tmp_path / "cache")
        assert str(caught.value).startswith(str(path))


def test_text_that_changes_while_it_is_read(tmp_path):
    path = write(tmp_path, "a b\n")
    text = Text.of(path)
    assert text.digest
    write(tmp_path, "a c\n")
    with Cache(tmp_path / "cache") as cache, pytest.raises(DataError, match="changed while it was read"):
        build_vocabulary(cache, text, "whitespace")
    assert list((tmp_path / "cache").iterdir()) == []


# ---------------------------------------------------------------- the cache


def entries(cache_dir: Path) -> dict[str, int]:
    """Every file in a cache, with the number of its inode, which tells whether it was written again."""
    return {str(path.relative_to(cache_dir)): path.stat().st_ino for path in cache_dir.rglob("*") if path.is_file()}


def test_a_warm_cache_is_not_written(tmp_path):
    path = write(tmp_path, "a b a\n")
    first = encode_file(path, tmp_path / "cache")
    before = entries(tmp_path / "cache")
    second = encode_file(path, tmp_path / "cache")
    assert entries(tmp_path / "cache") == before
    assert second[0] == first[0] and second[1].tolist() == first[1].tolist() and second[2] == first[2]
    assert all(not name.startswith(".") for name in before)


def test_the_key_is_content_and_options(tmp_path):
    path = write(tmp_path, "a b a\n")
    assert encode_file(path, tmp_path / "cache")[1].tolist() == [0, 1, 0, 2]
    stat = path.stat()
    write(tmp_path, "b b a\n")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    vocabulary, ids, _ = encode_file(path, tmp_path / "cache")
    assert vocabulary.decode(ids) == ["b", "b", "a", "<eos>"]
    vocabulary, ids, _ = encode_file(path, tmp_path / "cache", min_freq=2)
    assert vocabulary.decode(ids) == ["b", "b", "<unk>", "<eos>"]
    elsewhere = write(tmp_path, "b b a\n", "copy.txt")
    before = entries(tmp_path / "cache")
    encode_file(elsewhere, tmp_path / "cache")
    assert entries(tmp_path / "cache") == before


def damage_first_byte(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])


@pytest.mark.parametrize(
    "damage",
    [
        damage_first_byte,
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"{}"),
        lambda path: path.write_bytes(b"[]"),
        lambda path: path.write_text(path.read_text().replace("num_", "sum_").replace("a", "b")),
        lambda path: path.write_text("[" * 200_000),
        lambda path: path.unlink(),
    ],
    ids=["flipped", "cut", "emptied", "object", "list", "reworded", "deep", "removed"],
)
@pytest.mark.parametrize("name", ["ids.i32", "vocab.txt", "entry.json"])
def test_a_damaged_entry_is_made_anew(tmp_path, name, damage):
    path = write(tmp_path, "a b a c\n\n" * 20)
    vocabulary, ids, counts = encode_file(path, tmp_path / "cache")
    ids = ids.tolist()
    victims = [file for file in (tmp_path / "cache").rglob(name)]
    assert victims
    for victim in victims:
        damage(victim)
    again = encode_file(path, tmp_path / "cache")
    assert (again[0], again[1].tolist(), again[2]) == (vocabulary, ids, counts)
    before = entries(tmp_path / "cache")
    encode_file(path, tmp_path / "cache")
    assert entries(tmp_path / "cache") == before


def test_a_cache_that_cannot_be_written_is_replaced_for_the_while_and_said_out_loud(
    tmp_path, log_messages, monkeypatch
):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    blocked = write(tmp_path, "not a folder", "file") / "cache"
    vocabulary, ids, _ = encode_file(write(tmp_path, "a b\n"), blocked)
    assert vocabulary.decode(ids) == ["a", "b", "<eos>"]  # the map outlives the temporary folder
    assert len(log_messages) == 1 and f"the cache {blocked} cannot be written" in log_messages[0]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_where_nothing_can_be_written_there_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    blocked = write(tmp_path, "not a folder", "file") / "cache"
    with pytest.raises(DataError, match="cannot be written .*set GLUON_LM_CACHE"):
        encode_file(write(tmp_path, "a b\n"), blocked)


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("GLUON_LM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache_dir() == Path("/home/someone/.cache/gluon_lm")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # a user whom the system does not know
    assert default_cache_dir().is_relative_to(tempfile.gettempdir())
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert default_cache_dir() == Path("/xdg/gluon_lm")
    monkeypatch.setenv("GLUON_LM_CACHE", "/named")
    assert default_cache_dir() == Path("/named")


# ---------------------------------------------------------------- other processes

# A process that encodes a file, and that kills itself at the n-th call of a function on the way.
ENCODER = """
import os, signal, sys
from pathlib import Path
from gluon_lm.data import encoding
from gluon_lm.data.encoding import Cache, Text, build_vocabulary, encode_text

path, cache_dir, module, name, count = sys.argv[1:]
encoding.BLOCK_BYTES = 4096

def kill_at(owner, name, count):
    original, calls = getattr(owner, name), [0]
    def counting(*arguments, **keywords):
        calls[0] += 1
        if calls[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments, **keywords)
    setattr(owner, name, counting)

if module:
    kill_at({"os": os, "numpy": encoding.np, "Path": Path}[module], name, int(count))
with Cache(Path(cache_dir)) as cache:
    text = Text.of(Path(path))
    vocabulary = build_vocabulary(cache, text, "whitespace")
    ids, counts = encode_text(cache, text, "whitespace", vocabulary)
print(vocabulary.digest, len(ids), int(ids.sum(dtype="int64")))
"""


def start_encoder(path: Path, cache_dir: Path, *kill: object) -> subprocess.Popen:
    arguments = [str(path), str(cache_dir), *map(str, kill or ("", "", 0))]
    return subprocess.Popen(
        [sys.executable, "-c", ENCODER, *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
    )


def finish(process: subprocess.Popen) -> tuple[int, str]:
    try:
        output, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, output


@pytest.fixture(scope="module")
def long_text(tmp_path_factory):
    """300 kB of words drawn from 5,000, written with numpy alone, and what encoding it should give."""
    words = np.random.RandomState(1).zipf(1.3, 60000) % 5000
    text = "\n".join(" ".join(f"w{word}" for word in line) for line in words.reshape(-1, 20)) + "\n"
    tokens = naive_tokens(text)
    counts = Counter(tokens)
    order = {word: place for place, word in enumerate(dict.fromkeys([*tokens, "<unk>"]))}
    ids = {word: i for i, word in enumerate(sorted(order, key=lambda word: (-counts[word], order[word])))}
    return write(tmp_path_factory.mktemp("long"), text), Vocabulary(tuple(ids)), [ids[token] for token in tokens]


def test_two_processes_at_once_make_the_same_and_leave_nothing_behind(tmp_path, long_text):
    path, vocabulary, ids = long_text
    processes = [start_encoder(path, tmp_path / "cache") for _ in range(2)]
    for process in processes:
        assert finish(process) == (0, f"{vocabulary.digest} {len(ids)} {sum(ids)}\n")
    assert sorted(Path(name).name for name in entries(tmp_path / "cache")) == [
        "entry.json",
        "entry.json",
        "ids.i32",
        "vocab.txt",
    ]


@pytest.mark.parametrize(
    "kill",
    [
        ("numpy", "fromiter", 20),
        ("numpy", "bincount", 1),
        ("os", "fsync", 1),
        ("os", "fsync", 3),
        ("os", "fsync", 6),
        ("Path", "rename", 1),
        ("Path", "rename", 2),
        ("Path", "unlink", 1),
    ],
    ids=lambda kill: "-".join(map(str, kill)),
)
def test_a_process_that_is_killed_leaves_a_cache_that_works(tmp_path, long_text, kill):
    path, vocabulary, ids = long_text
    code, _ = finish(start_encoder(path, tmp_path / "cache", *kill))
    assert code == -signal.SIGKILL
    finish(start_encoder(path, tmp_path / "cache", *kill))  # perhaps once more, further on
    made, encoded, counts = encode_file(path, tmp_path / "cache")
    assert made == vocabulary and encoded.tolist() == ids and counts.num_tokens == len(ids)
    left = [name for name in entries(tmp_path / "cache") if name.startswith(".")]
    assert all(name.endswith(".lock") for name in left)  # empty, and free since its holder died
