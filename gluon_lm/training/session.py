"""A training run from its command line to its exit code: begun, finetuned or continued."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from pathlib import Path

import mxnet as mx

from .. import __version__
from ..cli import TrainCommand
from ..config import Config, DataConfig, DeviceConfig, device_count
from ..data import Corpus, Vocabulary, load_corpus
from ..distributed import Communicator, create_communicator
from ..errors import DistributedError
from ..generation.generator import generate
from ..logs import LOGGER, RESULT, fall_silent, log_to_file
from ..models import LanguageModel
from ..progress import counted
from ..tracking import require_tensorboard
from .checkpoint import VOCABULARY, load_checkpoint, mend_links, newest_checkpoint, set_aside_after
from .run_folder import RunFolder, point, stamped, strip_model_suffix
from .trainer import Trainer


def start_run(command: TrainCommand, initial: Path | None = None) -> int:
    """Train a new run to its end.

    Parameters
    ----------
    command : TrainCommand
    initial : Path, optional
        Checkpoint of another run whose model, vocabulary and text this one begins with.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    GluonLMError
        Before anything is written where the command, the text or the checkpoint does not fit.
    """
    communicator = _join(command.config)
    checkpoint = None if initial is None else load_checkpoint(initial)
    vocabulary = None if initial is None else Vocabulary.load(initial / VOCABULARY)
    corpus = load_corpus(command.config.data, vocabulary=vocabulary)
    if command.save is None:
        path = stamped(Path("runs") / f"{corpus.name}-{command.config.model.model}")
        run = RunFolder(communicator.broadcast_object(str(path)))
        run.check_free(overwrite=False)
    else:
        run = RunFolder(strip_model_suffix(command.save))
    command = command.with_tokenizer(corpus.tokenizer, corpus.name)
    trainer = _build(command, corpus, communicator, run)
    if checkpoint is not None:
        trainer.start_from(checkpoint)
        LOGGER.info("beginning with %s", initial)
    if command.dry_run:
        LOGGER.log(RESULT, "dry run: everything is in order, and nothing was written")
        return 0
    if not communicator.is_primary:
        return trainer.fit()
    with run.created(command.describe(), corpus.vocabulary, command.overwrite):
        return _fit_and_tell(trainer, run)


def resume_run(command: TrainCommand, run: RunFolder, path: Path | None) -> int:
    """Continue a run from `path`, or from its newest checkpoint; otherwise as `start_run`."""
    communicator = _join(command.config)
    is_writer = communicator.is_primary and not command.dry_run
    with run.held() if is_writer else contextlib.nullcontext():
        path = path or newest_checkpoint(run)
        checkpoint = load_checkpoint(path)
        corpus = load_corpus(command.config.data, vocabulary=Vocabulary.load(path / VOCABULARY))
        trainer = _build(command, corpus, communicator, run)
        trainer.restore(checkpoint)
        if "lr" in command.settings:
            trainer.state.lr = command.config.optim.lr
        LOGGER.info("resuming at step %d, epoch %d", trainer.state.step, trainer.state.epoch + 1)
        if command.dry_run:
            LOGGER.log(RESULT, "dry run: everything is in order, and nothing was written")
            return 0
        communicator.gather_object("checkpoint read")
        if not communicator.is_primary:
            return trainer.fit()
        for abandoned in set_aside_after(run, checkpoint.training):
            LOGGER.info("%s is newer than the checkpoint that was named; it is set aside as %s", *abandoned)
        mend_links(run, checkpoint.training)
        run.update_config(command.describe())
        return _fit_and_tell(trainer, run)


def _join(config: Config) -> Communicator:
    """The devices and the other workers; of several, only the first speaks."""
    communicator = create_communicator(config.devices, every_gpu=device_count(config) is None)
    if not config.training.tf32 and all(device.device_type != "gpu" for device in communicator.devices):
        raise DistributedError(
            f"--no-tf32: only GPUs compute in TF32, and this runs on {communicator.devices[0]}; leave it out, or give "
            "--tf32 where the run's configuration says so"
        )
    if not communicator.is_primary:
        fall_silent()
    elif config.training.tensorboard:
        require_tensorboard()
    return communicator


def _build(command: TrainCommand, corpus: Corpus, communicator: Communicator, run: RunFolder) -> Trainer:
    """The model of a run, and its trainer."""
    config = command.config
    model = LanguageModel(config.model, len(corpus.vocabulary))
    model.initialize_parameters(config.training.seed, communicator.devices)
    model.hybridize_for_use()
    _check_alike(config, corpus, communicator)
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


def _check_alike(config: Config, corpus: Corpus, communicator: Communicator) -> None:
    """Make sure that all workers are about to do the same.

    Raises
    ------
    DistributedError
        Naming what differs, and where.
    """
    shared = dataclasses.replace(config, data=DataConfig(), devices=DeviceConfig())
    configuration = hashlib.sha256(shared.to_yaml().encode()).hexdigest()
    own = {
        "gluon_lm": __version__,
        "mxnet": mx.__version__,
        "configuration": configuration[:12],
        "text and vocabulary": corpus.digest[:12],
        "number of devices": len(communicator.devices),
    }
    facts = communicator.gather_object(own)
    for what, expected in facts[0].items():
        others = {rank: fact[what] for rank, fact in enumerate(facts) if fact[what] != expected}
        if others:
            shown = ", ".join(f"worker {rank} {value}" for rank, value in others.items())
            raise DistributedError(
                f"the workers differ in {what}: worker 0 has {expected}, {shown}; start all with the same version, "
                "flags and text"
            )


def _fit_and_tell(trainer: Trainer, run: RunFolder) -> int:
    """What the first worker does: train, with a log in the folder of the run, and maybe write a text in the end."""
    with log_to_file(run.log):
        if run.path.parent.name == "runs":
            point(run.path.parent / "latest", run.path)
        code = trainer.fit()
        words = trainer.config.training.gen_word_len
        if words and code == 0:
            LOGGER.info("generating...")
            written = generate(trainer.predictor(), words, seed=trainer.config.training.seed)
            text = " ".join(str(word) for (word,) in counted(written, words, "generating", "word"))
            LOGGER.log(RESULT, "%s", text)
        return code
