"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import FIXED, FIXED_ON_RESUME, TrainCommand, parse_train, run_command
from .config import show
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
        What is continued or begun with, as `find_run` returns it; None for a run that begins with nothing.

    Raises
    ------
    ConfigError, CheckpointError
        If the folder is not free, has no run to continue, or one that goes on otherwise.
    """
    run, checkpoint = (None, None) if command.base is None else find_run(command.base)
    if run is not None and command.resume is not None:
        return command.over(run.config, FIXED_ON_RESUME), run, checkpoint
    if run is not None:
        command = command.over(run.config, FIXED, is_same_run=False)
    if command.save is not None and not command.print_config:
        path = strip_model_suffix(command.save)
        if command.recipe == "mos":  # the reference puts the time behind the name
            if command.overwrite:
                raise ConfigError("--overwrite: has no effect, recipe mos puts the time behind the name; leave it out")
            RunFolder.stamped(path).check_free(command.overwrite)
            return dataclasses.replace(command, save=None, stem=str(path)), run, checkpoint
        if run is not None and path.resolve() in (run.path.resolve(), *run.path.resolve().parents):
            begun_with = f"--save {show(command.save)} with --init-from {show(command.init_from)}"
            raise ConfigError(f"{begun_with}: a new run cannot take the place of the one it begins with; name another")
        RunFolder(path).check_free(command.overwrite)
        command = dataclasses.replace(command, save=str(path))
    return command, run, checkpoint


def _train(argv: Sequence[str]) -> int:
    command, run, checkpoint = settle(parse_train(argv))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    prepare_training(command.config)
    from .training.checkpoint import best_checkpoint
    from .training.session import resume_run, start_run

    if run is None:
        return start_run(command)
    if command.resume is None:
        return start_run(command, initial=checkpoint or best_checkpoint(run))
    return resume_run(command, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
