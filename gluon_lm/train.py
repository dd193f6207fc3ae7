"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import MAY_CHANGE_ON_RESUME, TrainCommand, parse_train, run_command
from .errors import ConfigError
from .logs import log_to_terminal
from .runtime import prepare_training
from .training.run_folder import RunFolder, find_run, strip_model_suffix


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_train, argv)


def settle(command: TrainCommand) -> tuple[TrainCommand, RunFolder | None, Path | None]:
    """A command, once the run folder that it names has been looked at.

    Returns
    -------
    command : TrainCommand
        With the whole configuration, and the place of a new run.
    run, checkpoint : RunFolder, Path or None
        What is continued, as `find_run` returns it; None for a new run.

    Raises
    ------
    ConfigError, CheckpointError
        If the folder is not free, has no run to continue, or one that goes on otherwise.
    """
    if command.resume is not None:
        run, checkpoint = find_run(command.resume)
        return command.over(run.config, MAY_CHANGE_ON_RESUME), run, checkpoint
    if command.save is not None and not command.print_config:
        path = strip_model_suffix(command.save)
        if command.recipe == "mos":  # the reference puts the time behind the name
            if command.overwrite:
                raise ConfigError("--overwrite: has no effect, recipe mos puts the time behind the name; leave it out")
            RunFolder.stamped(path).check_free(command.overwrite)
            return dataclasses.replace(command, save=None, stem=str(path)), None, None
        RunFolder(path).check_free(command.overwrite)
        command = dataclasses.replace(command, save=str(path))
    return command, None, None


def _train(argv: Sequence[str]) -> int:
    command, run, checkpoint = settle(parse_train(argv))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    prepare_training(command.config)
    from .training.session import resume_run, start_run

    return start_run(command) if run is None else resume_run(command, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
