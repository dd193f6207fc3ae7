"""``python -m gluon_lm.train``: train a language model, or continue a run."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .cli import TrainCommand, parse_train, run_command
from .config import Config, flag_of, show
from .errors import ConfigError
from .logs import LOGGER, log_to_file, log_to_terminal
from .runtime import prepare_process
from .training.run_folder import RunFolder, default_run_path, find_run, point, strip_model_suffix

if TYPE_CHECKING:
    from .data import Corpus
    from .distributed import Communicator
    from .training.trainer import Trainer


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_train, argv)


def _train(argv: Sequence[str]) -> int:
    command = parse_train(argv)
    if command.resume is not None:
        run, checkpoint = find_run(command.resume)
        before = Config.from_yaml(run.config)
        command = command.over(run.config)
        _check_unchanged(before, command.config, run.path)
    elif command.save is not None and not command.print_config:
        RunFolder(strip_model_suffix(command.save)).check_free(command.overwrite)
    if command.print_config:
        print(command.describe(), end="")
        return 0
    log_to_terminal()
    LOGGER.info("recipe %s", command.recipe or "none")
    prepare_process(command.config.devices.cpus or 1)
    return _start(command) if command.resume is None else _resume(command, run, checkpoint)


def _start(command: TrainCommand) -> int:
    from .data import load_corpus
    from .distributed import create_communicator

    communicator = create_communicator(command.config.devices)
    corpus = load_corpus(command.config.data)
    if command.save is None:
        run = RunFolder(default_run_path(corpus.name, command.config.model.model))
        run.check_free(overwrite=False)
    else:
        run = RunFolder(strip_model_suffix(command.save))
    command = command.with_tokenizer(corpus.tokenizer, corpus.name)
    trainer = _build(command, corpus, communicator, run)
    if command.dry_run:
        LOGGER.info("dry run: everything is in order, and nothing was written")
        return 0
    run.create(command.describe(), corpus.vocabulary, command.overwrite)
    return _fit(trainer, run)


def _resume(command: TrainCommand, run: RunFolder, path: Path | None) -> int:
    from .data import Vocabulary, load_corpus
    from .distributed import create_communicator
    from .training.checkpoint import VOCABULARY, load_checkpoint, newest_checkpoint, set_aside_after

    communicator = create_communicator(command.config.devices)
    path = path or newest_checkpoint(run)
    checkpoint = load_checkpoint(path)
    corpus = load_corpus(command.config.data, vocabulary=Vocabulary.load(path / VOCABULARY))
    trainer = _build(command, corpus, communicator, run)
    trainer.restore(checkpoint)
    if "lr" in command.settings:
        trainer.state.lr = command.config.optim.lr
    LOGGER.info("resuming at step %d, epoch %d", trainer.state.step, trainer.state.epoch + 1)
    if command.dry_run:
        LOGGER.info("dry run: everything is in order, and nothing was written")
        return 0
    for abandoned in set_aside_after(run, checkpoint.training):
        LOGGER.info("%s is newer than the checkpoint that was named; it is set aside as %s", *abandoned)
    run.update_config(command.describe())
    return _fit(trainer, run)


# What may differ from the run that is continued, besides the devices: how long, how often, and how hard it is
# regularised; not what is trained, nor on what.
_FREE_TRAINING = (
    "epochs",
    "max_steps",
    "log_interval",
    "eval_every",
    "eval_batch_size",
    "patience",
    "checkpoint_every",
    "keep_checkpoints",
    "gen_word_len",
)
_FREE_OPTIM = ("lr", "lr_decay", "clip_norm", "weight_decay")
_FREE = {"training": _FREE_TRAINING, "optim": _FREE_OPTIM, "data": ("data_dir",), "model": ("dropout",)}


def _check_unchanged(before: Config, now: Config, run_path: Path) -> None:
    """Refuse to continue a run as something else."""
    problems = []
    for section, names in _FREE.items():
        old, new = getattr(before, section), getattr(now, section)
        for declared in dataclasses.fields(old):
            was, wanted = getattr(old, declared.name), getattr(new, declared.name)
            if declared.name not in names and was != wanted:
                problems.append(
                    f"{flag_of(declared.name)} {show(wanted)}: {run_path} was trained with {show(was)}; leave the flag "
                    "out, or train anew"
                )
    if problems:
        raise ConfigError(problems)


def _build(command: TrainCommand, corpus: Corpus, communicator: Communicator, run: RunFolder) -> Trainer:
    """The model of a run, and its trainer."""
    from .models import LanguageModel
    from .training.trainer import Trainer

    config = command.config
    model = LanguageModel(config.model, len(corpus.vocabulary))
    model.initialize_parameters(config.training.seed, communicator.devices)
    model.hybridize_for_use()
    trainer = Trainer(config, corpus, model, communicator, run, command.describe())
    num_parameters = sum(math.prod(parameter.shape) for parameter in model.named_parameters().values())
    LOGGER.info("%s", corpus.describe())
    LOGGER.info(
        "%s %s%s, %.2f million parameters | %s",
        config.model.model,
        "x".join(map(str, model.encoder.layer_sizes)),
        ", tied" if config.model.tied else "",
        num_parameters / 1e6,
        communicator.description,
    )
    LOGGER.info("run folder %s", run.path)
    return trainer


def _fit(trainer: Trainer, run: RunFolder) -> int:
    with log_to_file(run.log):
        if run.path.parent.name == "runs":
            point(run.path.parent / "latest", run.path)
        code = trainer.fit()
        words = trainer.config.training.gen_word_len
        if words and code == 0:
            from .generation.generator import generate

            LOGGER.info("generating...")
            LOGGER.info(
                "%s",
                " ".join(generate(trainer.model, trainer.corpus.vocabulary, words, seed=trainer.config.training.seed)),
            )
        return code


if __name__ == "__main__":
    sys.exit(main())
