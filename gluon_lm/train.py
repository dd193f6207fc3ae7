"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .cli import parse_train, run_command
from .logs import LOGGER, log_to_terminal
from .runtime import prepare_process
from .training.run_folder import RunFolder, find_run, strip_model_suffix

# What may differ from the run that is continued, besides the devices: how long, how often, and how hard it is
# regularised; not what is trained, nor on what.
_MAY_CHANGE = frozenset(
    {
        "data_dir",
        "dropout",
        "dropout_input",
        "dropout_hidden",
        "dropout_embed",
        "dropout_embed_elements",
        "dropout_inner_input",
        "dropout_last_input",
        "dropout_latent",
        "weight_drop",
        "input_weight_drop",
        "lr",
        "lr_decay",
        "when",
        "clip_norm",
        "weight_decay",
        "alpha",
        "beta",
        "ntasgd",
        "nonmono",
        "epochs",
        "max_steps",
        "log_interval",
        "eval_every",
        "eval_batch_size",
        "patience",
        "checkpoint_every",
        "keep_checkpoints",
        "gen_word_len",
    }
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_train, argv)


def _train(argv: Sequence[str]) -> int:
    command = parse_train(argv)
    if command.resume is not None:
        run, checkpoint = find_run(command.resume)
        command = command.over(run.config, may_change=_MAY_CHANGE)
    elif command.save is not None and not command.print_config:
        RunFolder(strip_model_suffix(command.save)).check_free(command.overwrite)
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal()
    LOGGER.info("recipe %s", command.recipe or "none")
    prepare_process(command.config.devices.cpus or 1)
    from .training.session import resume_run, start_run

    return start_run(command) if command.resume is None else resume_run(command, run, checkpoint)


if __name__ == "__main__":
    sys.exit(main())
