"""The vocabulary: order, limits, files, and words to ids and back."""

from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from gluon_lm.data import Vocabulary
from gluon_lm.errors import DataError

WORDS = st.text(st.characters(exclude_categories=("C", "Z")), min_size=1, max_size=6).filter(
    lambda word: word.split() == [word]
)


def counted(text: str, **limits) -> Vocabulary:
    counts = Counter(text.split())
    return Vocabulary.from_counts(list(counts), list(counts.values()), **limits)


def test_order_is_falling_frequency_then_first_appearance():
    vocabulary = counted("b a c a <eos> c d <eos> <eos> <unk> e")
    assert vocabulary.words == ("<eos>", "a", "c", "b", "d", "<unk>", "e")
    assert (vocabulary.eos_id, vocabulary.unk_id) == (0, 5)


def test_special_words_are_there_without_being_in_the_text():
    assert counted("a b a").words == ("a", "b", "<unk>", "<eos>")


def test_min_freq_leaves_rare_words_out_and_unk_counts_them():
    # Left out: b, d, e, so <unk> stands for three tokens, as many as a, which comes first.
    vocabulary = counted("a a a b c c d e <eos> <eos> <eos> <eos>", min_freq=2)
    assert vocabulary.words == ("<eos>", "a", "<unk>", "c")


def test_special_words_survive_min_freq():
    assert set(counted("a a <eos> <unk>", min_freq=2).words) == {"a", "<eos>", "<unk>"}


def test_max_size_counts_the_special_words_and_prefers_earlier_words():
    assert counted("c b a b <eos>", max_size=4).words == ("b", "c", "<eos>", "<unk>")
    assert counted("c b a b <eos>", max_size=2).words == ("<unk>", "<eos>")
    with pytest.raises(DataError, match=r"vocabulary size 1: must be at least 2.*--max-vocab"):
        counted("a", max_size=1)


@given(st.lists(st.sampled_from("abcdefg"), min_size=1), st.integers(1, 3), st.integers(2, 9))
def test_limits_agree_with_a_naive_count(text, min_freq, max_size):
    vocabulary = counted(" ".join(text), min_freq=min_freq, max_size=max_size)
    by_rank = sorted(set(text), key=lambda word: (-text.count(word), text.index(word)))
    kept = [word for word in by_rank if text.count(word) >= min_freq][: max_size - 2]
    assert [word for word in vocabulary.words if word not in ("<unk>", "<eos>")] == kept
    frequency = Counter(word if word in kept else "<unk>" for word in text)
    ranked = [frequency[word] for word in vocabulary.words]
    assert ranked == sorted(ranked, reverse=True)


@given(st.lists(WORDS, unique=True), st.lists(WORDS))
def test_encode_and_decode(words, others):
    vocabulary = Vocabulary(tuple(dict.fromkeys([*words, "<unk>", "<eos>"])))
    ids = vocabulary.encode(words)
    assert ids.dtype == np.int32
    assert vocabulary.decode(ids) == words
    known = set(vocabulary.words)
    assert vocabulary.decode(vocabulary.encode(others)) == [w if w in known else "<unk>" for w in others]


def test_a_text_in_place_of_words_is_refused():
    with pytest.raises(TypeError, match="'the cat': is a text, not words"):
        Vocabulary(("<unk>", "<eos>", "the", "cat")).encode("the cat")


def test_ids_out_of_range_are_refused():
    vocabulary = Vocabulary(("a", "<unk>", "<eos>"))
    for wrong in (3, -1):
        with pytest.raises(IndexError, match="must be from 0 to 2"):
            vocabulary.decode([0, wrong])


def test_equality_digest_and_immutability():
    one, same = Vocabulary(("a", "<unk>", "<eos>")), Vocabulary(["a", "<unk>", "<eos>"])
    other = Vocabulary(("<unk>", "a", "<eos>"))
    assert one == same and hash(one) == hash(same) and one.digest == same.digest
    assert one != other and one.digest != other.digest
    assert "a" in one and "b" not in one and len(one) == 3
    with pytest.raises(AttributeError):
        one.words = ()
    with pytest.raises(TypeError):
        one.ids["b"] = 3
    assert pickle.loads(pickle.dumps(one)) == one


@settings(max_examples=25, deadline=None)
@given(st.lists(WORDS, unique=True))
def test_save_and_load(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    vocabulary = Vocabulary(tuple(dict.fromkeys([*words, "<unk>", "<eos>"])))
    path.write_text("something older")
    vocabulary.save(path)
    assert Vocabulary.load(path) == vocabulary
    assert path.read_text(encoding="utf-8").split("\n")[:-1] == list(vocabulary.words)
    assert [file.name for file in path.parent.iterdir()] == ["vocab.txt"]


def test_load_accepts_a_file_from_elsewhere(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes(b"\xef\xbb\xbfthe\r\n<unk>\r\n<eos>")
    assert Vocabulary.load(path, "utf-8-sig").words == ("the", "<unk>", "<eos>")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<unk>\n<eos>\na b\n", "line 3: 'a b' is not one word"),
        (b"<unk>\n<eos>\n \nNew York\n", "line 3: ' ' is not one word"),
        (b"<unk>\n\n<eos>\n", "line 2: '' is not one word"),
        ("<unk>\n<eos>\na\u00a0b\n".encode(), "line 3: 'a\\\\xa0b' is not one word"),
        (b"<unk>\na\n<eos>\na\n", "line 4: 'a' occurs a second time, first in line 2"),
        (b"a\n<eos>\n", "line 3: there must be a line <unk>"),
        (b"<unk>\n", "line 2: there must be a line <eos>"),
        (b"", "line 1: there must be a line <unk>"),
        (b"<unk>\n<eos>\ncaf\xe9\n", "line 3: is not UTF-8"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        Vocabulary.load(path)
    assert str(caught.value).startswith(f"{path} line ")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match="missing.txt: cannot be read .No such file"):
        Vocabulary.load(tmp_path / "missing.txt")
    with pytest.raises(DataError, match="cannot be read .Is a directory"):
        Vocabulary.load(tmp_path)


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(OSError):
        Vocabulary(("<unk>", "<eos>")).save(path)
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]
