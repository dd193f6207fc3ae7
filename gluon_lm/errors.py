"""The errors that a user can cause, which a command reports in one line, with exit code 2.

A message names the value, the rule that it breaks, and what to do instead.
"""

from __future__ import annotations

from collections.abc import Sequence


class GluonLMError(Exception):
    """Base of every error that gluon_lm raises for something outside its own code."""


class ConfigError(GluonLMError):
    """Flags or a YAML file ask for something that is not possible.

    Parameters
    ----------
    problems : str or sequence of str
        Every problem found, so that all can be fixed at once.
    """

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("; ".join(self.problems))


class DataError(GluonLMError):
    """A corpus cannot be found, fetched, read or used."""


class CheckpointError(GluonLMError):
    """A run folder or a checkpoint is missing, damaged, or belongs to another model."""


class DistributedError(GluonLMError):
    """Devices or workers cannot do what was asked of them."""


class TrainingDiverged(GluonLMError):
    """A loss or a gradient stopped being finite."""


class OutOfMemory(GluonLMError):
    """There is less memory than the work takes."""


class MissingDependency(GluonLMError):
    """An optional package is needed and not installed."""


def reason(error: BaseException) -> str:
    """The message of an error, on one line; its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # MXNet's messages begin with the place in its library that they come from.
    line = lines[-1] if lines[0].startswith("Traceback ") else lines[0]
    return " ".join(line.removeprefix("MXNetError: ").split())
