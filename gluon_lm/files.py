"""Files that other processes may use at the same time, and that a killed process must not leave half-written."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import glob
import hashlib
import io
import json
import math
import os
import re
import secrets
import shutil
import stat
import sys
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

from .errors import ConfigError, reason
from .heartbeat import beat

if TYPE_CHECKING:
    import numpy as np

BLOCK_BYTES = 1 << 20
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
# Errors of file systems, mainly those of clusters, that cannot synchronise a folder.
_CANNOT = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_LONG_AGO_S = 24 * 3600  # longer than it takes to write anything


def file_hash(path: Path, algorithm: str = "sha256") -> str:
    """Hexadecimal hash of a file's content; `OSError` where it cannot be read."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            beat()
    return digest.hexdigest()


def in_utf8(path: str | Path) -> str:
    """A path as text for which there is UTF-8: bytes that are none, which a name on Linux may have, are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode("utf-8")


def temporary_sibling(path: Path) -> Path:
    """A hidden name in the same folder for what will replace `path`; no other process gets the same.

    Process ids would not do: they repeat on several machines, and in containers. What killed processes left under such
    names long ago is removed.
    """
    for remains in path.parent.glob(f".{glob.escape(path.name)}.new-*"):
        with contextlib.suppress(OSError):
            if time.time() - remains.lstat().st_mtime > _LONG_AGO_S:
                shutil.rmtree(remains) if remains.is_dir() and not remains.is_symlink() else remains.unlink()
    return path.with_name(f".{path.name}.new-{secrets.token_hex(4)}")


def synchronise(path: Path) -> None:
    """Have a file, or a folder if its file system supports that, written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
    beat()


def _descriptor(path: Path) -> int | None:
    """The number of the open file descriptor that a path names, if it does."""
    name = {"/dev/stdout": "/dev/fd/1", "/dev/stderr": "/dev/fd/2"}.get(str(path), str(path))
    found = re.fullmatch("(?:/dev|/proc/self)/fd/([0-9]+)", name)
    return int(found[1]) if found else None


def _is_device_or_pipe(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _copy_permissions(old: Path, fresh: Path) -> None:
    mode = stat.S_IMODE(old.stat().st_mode)
    if fresh.is_dir():
        mode |= stat.S_IRWXU  # or else whoever made it could neither fill nor remove it
    if stat.S_IMODE(fresh.stat().st_mode) != mode:  # where all files have the same, they cannot be changed
        fresh.chmod(mode)


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that replaces `path` if the block ends without an error, and otherwise leaves no trace.

    A file's permissions stay. A link stays, and its target is replaced; a device or a pipe is written to, and so is an
    open file descriptor (``/dev/stdout``, ``/dev/fd/3``).
    """
    descriptor = _descriptor(path)
    if descriptor is not None or _is_device_or_pipe(path):
        # A file that is open already would, if opened again, be written from another position on.
        with open(path, "wb") if descriptor is None else os.fdopen(os.dup(descriptor), "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    fresh = temporary_sibling(target)
    try:
        with open(fresh, "wb") as file:
            if target.exists():
                _copy_permissions(target, fresh)
            yield file
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(target)
    except BaseException as error:
        fresh.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(fresh)):  # a full disk names no file
            error.filename = str(path)
        raise
    synchronise(target.parent)


class AppendedText:
    """A UTF-8 text file that grows by whole pieces: one that does not fit on the disk leaves nothing behind.

    Parameters
    ----------
    path : Path
        Created if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = open(path, "ab", buffering=0)

    def write(self, text: str) -> None:
        """Append `text`; if that fails, `OSError` names the file."""
        rest = text.encode("utf-8", "backslashreplace")  # a file's name need not be UTF-8
        end = self._file.seek(0, os.SEEK_END)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # `error` matters more
                self._file.truncate(end)
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def flush(self) -> None:
        """Does nothing, as nothing is buffered; `logging` expects it of a stream."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def write_arrays(path: Path | BinaryIO, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write named arrays as an ``.npz`` file, uncompressed, each as soon as it arrives.

    `numpy.savez` needs all at once, takes none named ``file``, and on a full disk leaves a writer that fails a second
    time.
    """
    import numpy as np

    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays:
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(array), allow_pickle=False)
            beat()


def read_arrays(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and arrays of an ``.npz`` file, one after the other; nothing in it is unpickled.

    Raises
    ------
    ValueError
        With the reason, on one line, where the file is not one or cannot be read.
    """
    import numpy as np

    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                array = arrays[name]
                if not isinstance(array, np.ndarray):
                    raise ValueError(f"{name} is not an array")
                beat()
                yield name, array
    except Exception as error:  # the errors of zipfile, zlib, tokenize and ast for a damaged file have no common base
        if isinstance(error, MemoryError) and _is_credible(error, path):
            raise
        raise ValueError(reason(error)) from error


def _is_credible(error: MemoryError, path: Path) -> bool:
    """Whether a file can hold an array for which memory was lacking: a damaged header may name any size."""
    wanted = math.prod(getattr(error, "shape", ())) * getattr(getattr(error, "dtype", None), "itemsize", 1)
    return wanted <= path.stat().st_size


def swap_folders(one: Path, other: Path) -> None:
    """Swap the names of two folders, atomically if the system can; `one` gets the permissions of `other`, too."""
    _copy_permissions(other, one)
    try:
        rename = ctypes.CDLL(None).renameat2
        if rename(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
            return
    except (AttributeError, OSError):
        pass  # an older C library; some network file systems refuse the call
    aside = other.with_name(f"{one.name}-aside")
    other.rename(aside)
    os.utime(aside)  # so that it is not taken for remains of long ago
    try:
        one.rename(other)
    except OSError:
        aside.rename(other)
        raise
    aside.rename(one)


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that replaces `target`, complete and synchronised, if the block ends without an error.

    It does so atomically if the system can. After an error, `target` is unchanged, and nothing is left of the new one.
    """
    fresh = temporary_sibling(target)
    try:
        fresh.mkdir()
        yield fresh
        for path in [*fresh.iterdir(), fresh]:
            synchronise(path)
        if target.exists():
            swap_folders(fresh, target)
        else:
            fresh.rename(target)
        synchronise(target.parent)
    finally:
        with contextlib.suppress(OSError):
            fresh.chmod(stat.S_IRWXU)  # by now the old one, maybe, which may have been write-protected
        shutil.rmtree(fresh, ignore_errors=True)


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 of `content` as JSON without its own ``digest``; reveals edits by hand."""
    rest = {name: value for name, value in content.items() if name != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_seal(folder: Path, name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Write the last file of a folder: `content`, the SHA-256 of each of the other files, and a digest of all that.

    Parameters
    ----------
    folder : Path
        With all other files in it.
    name : str
        Of the file to write, which is JSON.
    content : mapping
        JSON values.

    Returns
    -------
    dict
        What `read_seal` will return.
    """
    hashes = {path.name: file_hash(path) for path in sorted(folder.iterdir())}
    seal = json.loads(json.dumps({**content, "sha256": hashes}))  # keys come back as strings, which the digest sorts
    seal["digest"] = digest_of(seal)
    written = json.dumps(seal, indent=1, ensure_ascii=False)
    (folder / name).write_text(f"{written}\n", encoding="utf-8", errors="backslashreplace")
    return seal


def read_seal(folder: Path, name: str) -> dict[str, Any]:
    """What `write_seal` wrote; whether the files are those that it names, `verify_files` finds out.

    Raises
    ------
    OSError
        If it cannot be read.
    ValueError
        If it is not as it was written.
    """
    try:
        seal = json.loads((folder / name).read_text(encoding="utf-8"))
        is_whole = seal["digest"] == digest_of(seal) and isinstance(seal["sha256"], dict)
    except (ValueError, KeyError, TypeError, RecursionError):
        is_whole = False
    if not is_whole:
        raise ValueError(f"{name} is not as it was written")
    return seal


def verify_files(folder: Path, seal: Mapping[str, Any]) -> None:
    """Make sure that every file that a seal names is as it was when it was sealed.

    Raises
    ------
    OSError
        If one cannot be read.
    ValueError
        If one is missing or was changed; the message begins with its name.
    """
    for name, sha256 in seal["sha256"].items():
        if not (folder / name).is_file() or file_hash(folder / name) != sha256:
            raise ValueError(f"{name} is not as it was written")


def output_file(flag: str, name: str) -> Path:
    """The file that a flag names, checked before the long work whose result it will hold.

    Raises
    ------
    ConfigError
        If it cannot be written.
    """
    path = Path(name)
    folder = Path(os.path.realpath(path)).parent
    descriptor = _descriptor(path)
    if descriptor is not None:
        try:
            os.fstat(descriptor)
        except OSError as error:
            raise ConfigError(f"{flag} {path}: cannot be written to ({error.strerror}); name another") from error
        return path
    is_replaced = not _is_device_or_pipe(path)
    if is_replaced and (path.is_dir() or not folder.is_dir()):
        raise ConfigError(f"{flag} {path}: must be a file in a folder that exists; name another")
    if not os.access(folder if is_replaced else path, os.W_OK):
        raise ConfigError(f"{flag} {path}: no permission to write there; name another")
    return path


def check_folder(flag: str, path: Path) -> None:
    """Make sure that a folder can be created where a flag says, or replace the one that is there.

    Raises
    ------
    ConfigError
        If it cannot.
    """
    if path.exists() and Path.cwd().is_relative_to(os.path.realpath(path)):
        raise ConfigError(
            f"{flag} {path}: this command runs in the folder that would be replaced; go to another one first"
        )
    parent = next(p for p in path.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ConfigError(f"{flag} {path}: {parent} is not a directory; name another folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: no permission to write in {parent}; name another folder")


@contextlib.contextmanager
def open_output(path: Path | None) -> Iterator[IO[str]]:
    """Standard output, or a UTF-8 file that replaces `path` if the block ends without an error."""
    if path is None:
        yield sys.stdout
    else:
        with atomic_write(path) as file:
            text = io.TextIOWrapper(file, encoding="utf-8", errors="backslashreplace", newline="\n")
            yield text
            text.detach()
