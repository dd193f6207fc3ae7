"""The lines that a command says: bare on the terminal, with the time before them in a run's ``log.txt``."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from pathlib import Path

LOGGER = logging.getLogger("gluon_lm")


def log_to_terminal(level: int = logging.INFO) -> None:
    """Send the package's log lines to standard output, bare, and hold them for the file of a run that is made later.

    For commands; a library user configures logging.
    """
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [
        terminal,
        logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL),
    ]
    LOGGER.setLevel(level)
    LOGGER.propagate = False


@contextlib.contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append the package's log lines to a file, with the time before each, beginning with those that were held."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%Y-%m-%d %H:%M:%S"))
    for held in [h for h in LOGGER.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
        held.setTarget(file)
        held.close()
        LOGGER.removeHandler(held)
    LOGGER.addHandler(file)
    try:
        yield
    finally:
        LOGGER.removeHandler(file)
        file.close()
