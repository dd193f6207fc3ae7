"""The lines that a command prints: bare on the terminal, with the time before them in a run's ``log.txt``."""

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
DETAIL = 15  # progress of the work: for logs and pipes, where there is no progress bar
RESULT = 25  # what the command was asked for
NOTICE = 26  # a warning that is the same in all processes of a run, so that only the first one gives it


class Verbosity(enum.Enum):
    """How much a command prints: only results and warnings, the progress of its work, or everything that it does."""

    QUIET = enum.auto()
    NORMAL = enum.auto()
    VERBOSE = enum.auto()


class _Relay(logging.Handler):
    """Passes lines on to a logger as a program has set it up."""

    def __init__(self, logger: logging.Logger) -> None:
        super().__init__(logger.getEffectiveLevel())
        self.logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        self.logger.callHandlers(record)


def _held_lines() -> logging.handlers.MemoryHandler:
    return logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL)


class _Handler(logging.StreamHandler):
    """Raises the error if a line cannot be written; `logging` would show a traceback and go on without the line."""

    def handleError(self, record):
        raise


class _Terminal(_Handler):
    """Standard output, with progress bars out of the way; lines that only --verbose shows go to standard error."""

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
        What is shown here. The log of a run has at least what a pipe gets under `Verbosity.NORMAL`.
    hold : bool
        Also keep the lines for the log file of a run that is created later.
    has_other_output : bool
        Send them to standard error, because standard output is for the command's result.
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
    """A block that holds the lines of a run for its log file; a program's own logging gets the same as without it."""
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
    """Log only warnings from here on: for a process that is not the first of several."""
    LOGGER.setLevel(logging.WARNING)


def tolerate_closed_pipes() -> None:
    """From here on outlive the readers of pipes: in ``train | tee log``, Ctrl-C ends ``tee`` as well."""
    global _tolerates_closed_pipes
    _tolerates_closed_pipes = True  # a single assignment, which a signal cannot interrupt


def detach_if_unread(error: OSError, stream: IO[str]) -> bool:
    """If nobody reads `stream` any more, send it to /dev/null and return True.

    That is the case for a terminal that is gone, and after `tolerate_closed_pipes` for a pipe.
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
    """Write nothing more to a terminal that is gone, nor (`and_pipes`) to pipes whose readers may have gone with it."""
    _send_nowhere(lambda found: stat.S_ISCHR(found.st_mode) or (and_pipes and not stat.S_ISREG(found.st_mode)))


def _send_nowhere(is_meant: Callable[[os.stat_result], bool]) -> None:
    """Send standard output and standard error to /dev/null where `is_meant` says so of their files."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with contextlib.suppress(OSError):  # it was closed from the start
            if is_meant(os.fstat(descriptor)):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def is_quiet() -> bool:
    """Whether a command was told to show no progress, or is not the one of several processes that does."""
    loggers = [LOGGER, *(handler.logger for handler in LOGGER.handlers if isinstance(handler, _Relay))]
    is_silent = any(logger.level >= logging.WARNING for logger in loggers)
    return is_silent or any(isinstance(handler, _Terminal) and handler.level >= RESULT for handler in LOGGER.handlers)


def has_bars() -> bool:
    """Whether lines and progress bars go to one terminal, so that bars can replace lines."""
    return is_terminal(sys.stdout) and is_terminal(sys.stderr)


def is_terminal(stream: object) -> bool:
    """Whether a stream leads to a terminal on which a line can be redrawn."""
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty()) and os.environ.get("TERM") != "dumb"


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log lines to a file, with the time before each, beginning with those that were held.

    So is an error that ends the block, which the command itself prints.
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
        with contextlib.suppress(OSError):  # the error that ended the block is the one to report
            file.handle(LOGGER.makeRecord(LOGGER.name, logging.ERROR, "", 0, "error: %s", (reason(error),), None))
        raise
    finally:
        LOGGER.removeHandler(file)
        text.close()
