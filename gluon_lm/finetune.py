"""``python -m gluon_lm.finetune RUN``: train a finished run further with averaged weights, into RUN/finetune_model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from .cli import CommandParser, as_command
from .config import SECTIONS, Section, Setting, TrainingConfig, option, resolve, switch
from .errors import ConfigError
from .logs import log_to_terminal
from .runtime import prepare_training
from .training.command import FIXED, FIXED_ON_RESUME, TrainCommand
from .training.run_folder import FINETUNED, RunFolder, find_run


@dataclass(frozen=True)
class FinetuneOptions(Section):
    """What `finetune` does with the run."""

    continue_train: bool = option(False, switch(), "continue a finetuning that was stopped")
    overwrite: bool = option(False, switch(), "replace an earlier finetuning of the run")
    print_config: bool = option(False, switch(), "print every value and where it comes from, and stop")
    dry_run: bool = option(False, switch(), "check everything and build the model, but do not train")


_INSTEAD_OF_FINETUNING = {
    **dict.fromkeys(
        ("--ntasgd", "--no-ntasgd", "--asgd", "--no-asgd"), "finetuning averages the weights from its first step on"
    ),
    "--when": "while the weights are averaged the learning rate stays as it is",
    "--resume": "to continue a finetuning, use RUN --continue-train",
    **dict.fromkeys(("--config", "--recipe"), "finetuning begins with the run's own config.yaml"),
}


@dataclass(frozen=True)
class FinetuneCommand:
    """A `finetune` command line.

    Attributes
    ----------
    run : str or None
        The run to finetune, as the user named it.
    is_continued : bool
        Whether to continue a finetuning that was stopped.
    command : TrainCommand
        The flags alone, unchecked; `TrainCommand.over` applies them to the run's configuration.
    """

    run: str | None
    is_continued: bool
    command: TrainCommand


def parse_finetune(argv: Sequence[str] | None = None) -> FinetuneCommand:
    """Read the command line of `finetune`.

    Raises
    ------
    ConfigError
        If it is unclear which run is meant, or what to do with it.
    """
    parser = CommandParser(
        "finetune",
        "Train a finished run further with averaged weights (ASGD), until validation stops improving.",
        "python -m gluon_lm.finetune runs/ptb-awd --lr 25 --dropouth 0.225",
        instead=_INSTEAD_OF_FINETUNING,
    )
    title = "finetuning: the run's values, unless a flag changes them; the architecture stays"
    parser.add_section(FinetuneOptions, title)
    for name, section in SECTIONS.items():
        fields = {f.name for f in dataclasses.fields(section)} - {"ntasgd", "asgd", "when", "max_steps"}
        parser.add_section(section, name, only=sorted(fields), default="the run's")
    parser.add_section(TrainingConfig, "steps", only=["max_steps"])
    parser.add_run("--save", "--checkpoint")
    parsed = parser.parse(argv)
    options = parsed.build(FinetuneOptions)
    if options.continue_train and options.overwrite:
        raise ConfigError(
            "--overwrite with --continue-train: it is either continued or replaced; leave one of them out"
        )
    settings = parsed.of(*SECTIONS.values()) | {"asgd": Setting(True, "finetune"), "when": Setting(None, "finetune")}
    if not options.continue_train:  # the run's own bound is for the run's own steps
        settings.setdefault("max_steps", Setting(None, "finetune"))
    command = TrainCommand(
        **vars(resolve(settings, default_recipe=None)),
        overwrite=options.overwrite,
        print_config=options.print_config,
        dry_run=options.dry_run,
        verbosity=parsed.verbosity,
        settings=settings,
    )
    return FinetuneCommand(parsed.run, options.continue_train, command)


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parsed = parse_finetune(argv)
    command, is_continued = parsed.command, parsed.is_continued
    run, checkpoint = find_run(parsed.run)
    target = RunFolder(run.path / FINETUNED)
    if is_continued:
        if checkpoint is not None:
            raise ConfigError(
                f"{parsed.run} with --continue-train: finetuning goes on from its own newest checkpoint; name the run "
                f"alone, or go on from another by python -m gluon_lm.train --resume {target.path}/checkpoints/step-N"
            )
        target, _ = find_run(target.path)
        command = command.over(target.config, FIXED_ON_RESUME)
    else:
        command = command.over(run.config, FIXED, is_same_run=False)
        if target.path.exists() and not (command.overwrite or command.print_config):
            raise ConfigError(
                f"{target.path}: exists already; continue it with --continue-train, or replace it with --overwrite"
            )
    command = dataclasses.replace(command, save=str(target.path))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    prepare_training(command.config)
    from .training.session import resume_run, start_run

    if is_continued:
        return resume_run(command, target, None)
    return start_run(command, initial=checkpoint or run.path)


if __name__ == "__main__":
    sys.exit(main())
