"""``python -m gluon_lm.finetune RUN``: train a finished run further with averaged weights, into RUN/finetune_model."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from .cli import MAY_CHANGE_ON_RESUME, parse_finetune, run_command
from .config import DataConfig, ModelConfig, OptimConfig, TrainingConfig
from .errors import ConfigError
from .logs import log_to_terminal
from .runtime import prepare_training
from .training.run_folder import FINETUNED, RunFolder, find_run

# What may differ from the run: all but the architecture, and how the text is read (it may lie elsewhere now).
_ARCHITECTURE = frozenset(
    {
        "model",
        "embed_size",
        "hidden_size",
        "num_layers",
        "tied",
        "num_experts",
        "last_hidden_size",
        "layer_norm",
        "init",
    }
)
_TEXT = frozenset(field.name for field in dataclasses.fields(DataConfig)) - {"data", "data_dir"}
_MAY_CHANGE = (
    frozenset(
        field.name
        for section in (DataConfig, ModelConfig, OptimConfig, TrainingConfig)
        for field in dataclasses.fields(section)
    )
    - _ARCHITECTURE
    - _TEXT
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_finetune, argv)


def _finetune(argv: Sequence[str]) -> int:
    parsed = parse_finetune(argv)
    command, is_continued = parsed.command, parsed.is_continued
    run, checkpoint = find_run(parsed.run)
    target = RunFolder(run.path / FINETUNED)
    if is_continued:
        target, _ = find_run(target.path)
        command = command.over(target.config, MAY_CHANGE_ON_RESUME)
    else:
        command = command.over(run.config, _MAY_CHANGE, is_same_run=False)
        if not command.print_config:
            if target.path.exists() and not command.overwrite:
                raise ConfigError(
                    f"{target.path}: exists already; continue it with --continue-train, or replace it with --overwrite"
                )
            target.check_free(command.overwrite)
    command = dataclasses.replace(command, save=str(target.path))
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal(command.verbosity, hold=True)
    prepare_training(command.config)
    from .training.checkpoint import best_checkpoint
    from .training.session import resume_run, start_run

    if is_continued:
        return resume_run(command, target, None)
    return start_run(command, initial=checkpoint or best_checkpoint(run))


if __name__ == "__main__":
    sys.exit(main())
