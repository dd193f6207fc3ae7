"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandParser, as_command, normalise_argv
from .config import INSTEAD_OF_TRAINING, SECTIONS, RunOptions, Setting, resolve, show, validate
from .errors import ConfigError
from .logs import log_to_terminal
from .runtime import prepare_training
from .training.command import FIXED, FIXED_ON_RESUME, TrainCommand
from .training.run_folder import RunFolder, find_run, strip_model_suffix

# Flags of gluonnlp for what is always done here.
_ALWAYS_SO = ("--hybridize", "--static-alloc", "--static-shape")


def train_parser() -> CommandParser:
    """The parser of `python -m gluon_lm.train`."""
    parser = CommandParser(
        "train",
        "Train a word-level language model, keep its best checkpoint, and evaluate it on the test text.",
        "python -m gluon_lm.train --data wikitext-2 --tied --nhid 200 --emsize 200 --epochs 20 --dropout 0.2",
        instead=INSTEAD_OF_TRAINING,
    )
    parser.add_section(RunOptions, "run")
    for name, section in SECTIONS.items():
        parser.add_section(section, name)
    return parser


def without_superfluous(argv: Sequence[str]) -> list[str]:
    """The flags, normalised, without those for what is always done here, which a warning names."""
    words = normalise_argv(argv)
    superfluous = [word for word in words if word in _ALWAYS_SO]
    if superfluous:
        print(f"warning: {' '.join(superfluous)}: is always on here; leave it out", file=sys.stderr)
    return [word for word in words if word not in _ALWAYS_SO]


def parse_train(argv: Sequence[str] | None = None) -> TrainCommand:
    """Read the command line of `train`: flags over ``--config`` over the recipe over the defaults.

    Raises
    ------
    ConfigError
        With every problem found.
    """
    parsed = train_parser().parse(without_superfluous(sys.argv[1:] if argv is None else argv))
    problems: list[str] = []
    run = parsed.build(RunOptions)
    settings = parsed.of(*SECTIONS.values())

    resume = run.resume
    if run.continue_train:
        if run.save is None:
            problems.append("--continue-train: needs the run to continue; add --save RUN, or use --resume RUN")
        elif resume is not None:
            problems.append("--continue-train with --resume: both name the run to continue; leave one of them out")
        resume = run.save
    elif resume is not None and run.save not in (None, resume):
        both = f"--save {show(run.save)} with --resume {show(resume)}"
        problems.append(f"{both}: a run continues in its own folder; leave --save out")
    continued = "--continue-train" if run.continue_train else "--resume"
    if resume is not None and run.overwrite:
        problems.append(f"--overwrite with {continued}: a run is either continued or replaced; leave one of them out")
    if run.overwrite and run.save is None and resume is None:
        problems.append(
            "--overwrite: has no effect without --save RUN, for a run gets a new name; add it, or leave it out"
        )
    if resume is not None and run.init_from is not None:
        problems.append(f"--init-from with {continued}: a run begins once; leave one of them out")
    if run.init_from is not None:  # the other run's bound is for its own steps
        settings.setdefault("max_steps", Setting(None, "flag --init-from"))
    is_based = resume is not None or run.init_from is not None
    base = continued if resume is not None else "--init-from"
    for flag, named in (("--config", run.config), ("--recipe", run.recipe)):
        if is_based and named is not None:
            problems.append(f"{flag} with {base}: the configuration is that run's config.yaml; leave {flag} out")

    config_file = None if run.config is None or is_based else Path(run.config)
    try:
        resolved = resolve(settings, config_file, None if is_based else run.recipe)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if not is_based:
        problems += validate(resolved.config, resolved.sources)
    if problems:
        raise ConfigError(problems)
    return TrainCommand(
        **vars(resolved),
        save=run.save,
        resume=resume,
        init_from=run.init_from,
        overwrite=run.overwrite,
        print_config=run.print_config,
        dry_run=run.dry_run,
        verbosity=parsed.verbosity,
        settings=settings,
    )


def resolve_run(command: TrainCommand) -> tuple[TrainCommand, RunFolder | None, Path | None]:
    """Complete a command with what the run folder that it names contains.

    Returns
    -------
    command : TrainCommand
        With the whole configuration, and the place of a new run.
    run, checkpoint : RunFolder, Path or None
        What is continued or begun with, as `find_run` returns it; None for a run that begins from scratch.

    Raises
    ------
    ConfigError, CheckpointError
        If the folder has no run to continue, or one that the flags contradict.
    """
    run, checkpoint = (None, None) if command.base is None else find_run(command.base)
    if run is not None and command.resume is not None:
        return command.over(run.config, FIXED_ON_RESUME), run, checkpoint
    if run is not None:
        command = command.over(run.config, FIXED, is_same_run=False)
    if command.save is not None and not command.print_config:
        path = strip_model_suffix(command.save)
        if command.recipe == "mos":  # the reference appends the time to the name
            if command.overwrite:
                raise ConfigError("--overwrite: has no effect, recipe mos appends the time to the name; leave it out")
            return dataclasses.replace(command, save=None, stem=str(path)), run, checkpoint
        if run is not None and path.resolve() in (run.path.resolve(), *run.path.resolve().parents):
            begun_with = f"--save {show(command.save)} with --init-from {show(command.init_from)}"
            raise ConfigError(f"{begun_with}: a new run cannot replace the one that it begins with; name another")
        command = dataclasses.replace(command, save=str(path))
    return command, run, checkpoint


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    command, run, checkpoint = resolve_run(parse_train(argv))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    prepare_training(command.config)
    from .training.session import resume_run, start_run

    if run is None:
        return start_run(command)
    if command.resume is None:
        return start_run(command, initial=checkpoint or run.path)
    return resume_run(command, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
