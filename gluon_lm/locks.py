"""File locks, for what only one process at a time may do, on one machine or on several that share a file system."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from .logs import LOGGER

_TRIES, _PAUSE = 20, 0.05  # seconds between two tries of a lock
_HAS_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)  # errors of file systems without locks, mainly clusters'


@contextlib.contextmanager
def sole_use(path: Path, refusal: Exception) -> Iterator[None]:
    """Hold the lock file `path`, which is created if need be and stays; raise `refusal` if another process holds it.

    The kernel releases it when its holder dies. A file system without locks gives a warning, and nobody is refused.
    """
    with open(path, "ab") as file:
        for tries_left in reversed(range(_TRIES)):
            try:
                _lock(file.fileno(), is_needed=False)
                break
            except BlockingIOError:
                if not tries_left:
                    raise refusal from None
                time.sleep(_PAUSE)  # `is_in_use` holds it for a moment, too
        yield


def _lock(descriptor: int, is_needed: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if is_needed or error.errno not in _HAS_NO_LOCKS:
            raise
        LOGGER.warning(
            "this file system has no locks (%s), so nothing keeps a second process from writing the same files",
            error.strerror,
        )


def is_in_use(path: Path) -> bool | None:
    """Whether a living process has the `sole_use` of `path`; None if the file system has no locks."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in _HAS_NO_LOCKS:
            raise
        return None
    return False


@contextlib.contextmanager
def exclusive_lock(path: Path, is_needed: bool = True) -> Iterator[None]:
    """Hold the lock file `path`, waiting for whoever holds it. Its folder is created if need be.

    The kernel releases it when its holder dies. The holder removes the file in the end, so one that was opened
    before that is no longer the lock, and is opened again. A file system without locks is an `OSError` if a lock
    `is_needed`; otherwise only a warning.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                _lock(descriptor, is_needed)
            except BlockingIOError:
                LOGGER.info("waiting for another process, which holds %s", path)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                break
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
