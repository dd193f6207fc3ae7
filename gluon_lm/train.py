"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from .cli import MAY_CHANGE_ON_RESUME, parse_train, run_command
from .logs import LOGGER, log_to_terminal
from .runtime import prepare_training
from .training.run_folder import RunFolder, find_run, stamped, strip_model_suffix


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_train, argv)


def _train(argv: Sequence[str]) -> int:
    command = parse_train(argv)
    if command.resume is not None:
        run, checkpoint = find_run(command.resume)
        command = command.over(run.config, MAY_CHANGE_ON_RESUME)
    elif command.save is not None and not command.print_config:
        path = strip_model_suffix(command.save)
        if command.recipe == "mos":  # the reference puts the time behind the name
            path = stamped(path)
        RunFolder(path).check_free(command.overwrite)
        command = dataclasses.replace(command, save=str(path))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    LOGGER.info("recipe %s", command.recipe or "none")
    prepare_training(command.config)
    from .training.session import resume_run, start_run

    return start_run(command) if command.resume is None else resume_run(command, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
