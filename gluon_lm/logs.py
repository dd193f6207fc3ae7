"""The lines that a command says: bare on the terminal, with the time before them in a run's ``log.txt``."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Iterator
from pathlib import Path

LOGGER = logging.getLogger("gluon_lm")


def log_to_terminal(level: int = logging.INFO, hold: bool = False) -> None:
    """Send the package's log lines to standard output, bare. For commands; a library user configures logging.

    Parameters
    ----------
    hold : bool
        Keep them as well, for the file of a run that is made later.
    """
    terminal = logging.StreamHandler(sys.stdout)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    LOGGER.handlers[:] = [terminal]
    if hold:
        LOGGER.addHandler(logging.handlers.MemoryHandler(capacity=1000, flushLevel=logging.CRITICAL))
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
