"""The lines that a command says: bare on the terminal, with the time before them in a run's ``log.txt``."""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import logging.handlers
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from .errors import reason
from .files import AppendedText

LOGGER = logging.getLogger("gluon_lm")
_tolerates_closed_pipes = False

# Between logging's own levels of 10, 20 and 30.
DETAIL = 15  # how far the work is: for logs and pipes, where there is no progress bar to show it
RESULT = 25  # what the command was asked for
NOTICE = 26  # a warning that all processes of a run would give alike, so that the first one gives it


class Verbosity(enum.Enum):
    """How much a command says: results and warnings alone, the course of its work, or all that it does."""

    QUIET = enum.auto()
    NORMAL = enum.auto()
    VERBOSE = enum.auto()


class _Relay(logging.Handler):
    """Hands lines on to a logger as a program has set it up."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self.logger.callHandlers(record)


def _held_lines() -> logging.handlers.MemoryHandler:
    return logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL)


class _Handler(logging.StreamHandler):
    """Raises what keeps a line from being written, where `logging` shows a traceback and goes on without the line."""

    def handleError(self, record):
        raise


class _Terminal(_Handler):
    """Standard output, with progress bars out of the way of each line; what only --verbose says is no output."""

    def __init__(self, has_other_output: bool) -> None:
        super().__init__(sys.stdout)
        self._output, self._asides = sys.stderr if has_other_output else sys.stdout, sys.stderr

    def handleError(self, record):
        error = sys.exc_info()[1]
        if not (isinstance(error, OSError) and detach_if_unread(error, self.stream)):
            raise

    def emit(self, record: logging.LogRecord) -> None:
        self.setStream(self._output if record.levelno >= DETAIL else self._asides)
        with _above_bars():
            super().emit(record)


def _above_bars() -> contextlib.AbstractContextManager[None]:
    tqdm = sys.modules.get("tqdm")  # not loaded: no bar is open
    return contextlib.nullcontext() if tqdm is None else tqdm.tqdm.external_write_mode(file=sys.stdout)


def log_to_terminal(
    verbosity: Verbosity = Verbosity.NORMAL, hold: bool = False, has_other_output: bool = False
) -> None:
    """Send the package's log lines to standard output, bare. For commands; a library user configures logging.

    Parameters
    ----------
    verbosity : Verbosity
        What is said here. The log of a run has at least what a pipe gets under `Verbosity.NORMAL`.
    hold : bool
        Keep the lines as well, for the file of a run that is made later.
    has_other_output : bool
        Send them to standard error, because what the command was asked for goes to standard output.
    """
    global _tolerates_closed_pipes
    _tolerates_closed_pipes = False
    terminal = _Terminal(has_other_output)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    course = logging.INFO if has_bars() else DETAIL
    terminal.setLevel({Verbosity.QUIET: RESULT, Verbosity.NORMAL: course, Verbosity.VERBOSE: logging.DEBUG}[verbosity])
    LOGGER.handlers[:] = [terminal]
    if hold:
        LOGGER.addHandler(_held_lines())
    LOGGER.setLevel(logging.DEBUG if verbosity is Verbosity.VERBOSE else DETAIL)
    LOGGER.propagate = False


@contextlib.contextmanager
def logging_for_file() -> Iterator[None]:
    """Within it the lines of a run are made and held for its file; a program hears what it would hear without that."""
    before = logging.Logger(LOGGER.name, LOGGER.level)
    before.parent, before.propagate, before.handlers = LOGGER.parent, LOGGER.propagate, LOGGER.handlers
    LOGGER.handlers, LOGGER.propagate = [_held_lines(), _Relay(before)], False
    LOGGER.setLevel(min(before.getEffectiveLevel(), DETAIL))
    try:
        yield
    finally:
        LOGGER.handlers, LOGGER.propagate = before.handlers, before.propagate
        LOGGER.setLevel(before.level)


def log_warnings_only() -> None:
    """Say warnings alone from here on: for a process that is not the first of several."""
    LOGGER.setLevel(logging.WARNING)


def tolerate_closed_pipes() -> None:
    """From here on a pipe that nobody reads any more ends nothing: Ctrl-C ends ``tee``, too, in ``train | tee log``."""
    global _tolerates_closed_pipes
    _tolerates_closed_pipes = True  # one assignment, which a signal cannot find half done


def detach_if_unread(error: OSError, stream: IO[str]) -> bool:
    """Whether a stream could not be written to because nobody is left to read it, and goes without it from here on.

    So it is with a terminal that is gone, and after `tolerate_closed_pipes` with a pipe.
    """
    dead = os.fstat(stream.fileno())
    if error.errno == errno.EIO and stat.S_ISCHR(dead.st_mode):
        detach_terminal()
        return True
    if isinstance(error, BrokenPipeError) and _tolerates_closed_pipes:
        _send_nowhere(lambda found: os.path.samestat(found, dead))
        return True
    return False


def print_to_stderr(line: str) -> None:
    """Write a line to standard error."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError as error:
        if not detach_if_unread(error, sys.stderr):
            raise


def detach_terminal(and_pipes: bool = False) -> None:
    """Write nothing more to a terminal that is gone, nor to pipes, if their readers may have gone with it."""
    _send_nowhere(lambda found: stat.S_ISCHR(found.st_mode) or (and_pipes and not stat.S_ISREG(found.st_mode)))


def _send_nowhere(is_meant: Callable[[os.stat_result], bool]) -> None:
    """Of standard output and standard error, let those lead nowhere that are meant."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it was closed all along
            if is_meant(os.fstat(descriptor)):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def is_quiet() -> bool:
    """Whether a command was told to show no progress, or is not the one of several processes that speaks."""
    loggers = [LOGGER, *(handler.logger for handler in LOGGER.handlers if isinstance(handler, _Relay))]
    is_silent = any(logger.level >= logging.WARNING for logger in loggers)
    return is_silent or any(isinstance(handler, _Terminal) and handler.level >= RESULT for handler in LOGGER.handlers)


def has_bars() -> bool:
    """Whether lines and progress bars go to one terminal, so that bars can take the place of lines."""
    return is_terminal(sys.stdout) and is_terminal(sys.stderr)


def is_terminal(stream: object) -> bool:
    """Whether a stream leads to a terminal on which a line can be drawn anew."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty()) and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log lines to a file, with the time before each, beginning with those that were held.

    So is an error that ends the block, which the command says by itself.
    """
    text = AppendedText(path)
    file = _Handler(text)
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    try:
        for held in [h for h in LOGGER.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
            LOGGER.removeHandler(held)
            held.setTarget(file)
            held.close()
        LOGGER.addHandler(file)
        yield
    except Exception as error:
        with contextlib.suppress(OSError):  # what ended the block is the error to tell
            file.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, "error: %s", (reason(error),), None))
        raise
    finally:
        LOGGER.removeHandler(file)
        text.close()
