"""A training run from its command line to its exit code: new, finetuned or continued."""

from __future__ import annotations

import contextlib
import math
import os
from pathlib import Path

import numpy as np

from ..config import (
    Config,
    OptimConfig,
    device_count,
    get,
    read_config,
    show,
    validate,
    vocabulary_problems,
)
from ..config.sections import fields_by_name
from ..data import Corpus, Vocabulary
from ..data.encoding import first_rise
from ..distributed.communicator import Communicator
from ..distributed.devices import create_communicator, free_memory, workers_sharing_memory
from ..errors import ConfigError, DataError, DistributedError
from ..evaluation.static import ROWS_PER_WINDOW
from ..files import file_hash
from ..generation.generator import generate
from ..logs import LOGGER, NOTICE, RESULT, log_to_file, log_warnings_only, logging_for_file
from ..losses import largest_chunk
from ..memory import Need, check_need, explaining_memory_errors, training_need
from ..models import LanguageModel
from ..progress import counted
from ..tracking import require_tensorboard
from .agreement import check_alike, worker_facts
from .checkpoint import (
    Checkpoint,
    TrainingState,
    load_by_name,
    load_checkpoint,
    newest_checkpoint,
    repair_links,
    set_aside_after,
)
from .command import FIXED_ON_RESUME, TrainCommand
from .run_folder import CONFIG, FINETUNED, LATEST, STATE, VOCABULARY, RunFolder, replace_symlink, where_it_leads
from .trainer import Trainer


def train_run(config: Config, save: str | Path, overwrite: bool = False) -> int:
    """Train a new run to its end from Python, as ``python -m gluon_lm.train`` does.

    What the command prints goes to the run's ``log.txt``, and to the handlers of `logging` that the program has set up.

    Parameters
    ----------
    config : Config
    save : str or Path
        The run folder to write.
    overwrite : bool
        Replace the run folder if it exists.

    Returns
    -------
    int
        The exit code of the command: 0 when the run ended by its own rules, 128 + N when signal N stopped it.

    Raises
    ------
    GluonLMError
        Before anything is written, if the configuration, the text, the devices or the folder do not fit; later as in
        `Trainer.fit`.
    OSError
        If a disk is full, or something on it may not be read or written.
    MemoryError
        If there is too little memory to read the text.
    """
    problems = validate(config, dict.fromkeys(fields_by_name(), "default"))  # a program sets all values, as a run does
    if problems:
        raise ConfigError(problems)
    with logging_for_file():
        return start_run(TrainCommand(config, save=str(save), overwrite=overwrite))


def start_run(command: TrainCommand, initial: Path | None = None) -> int:
    """Train a new run to its end.

    Parameters
    ----------
    command : TrainCommand
    initial : Path, optional
        Another run, or a checkpoint of one, whose model and vocabulary this one begins with; also whose text, unless
        the command names the run by ``--init-from``.

    Returns
    -------
    int
        The exit code.

    Raises
    ------
    GluonLMError
        Before anything is written, if the command, the text or the checkpoint does not fit.
    """
    communicator = _join(command)
    if communicator.is_primary:  # on other machines another run may have that place
        command.check_place()
    checkpoint, vocabulary = None, None
    if initial is not None:
        initial, checkpoint, vocabulary = load_by_name(initial, _load_to_begin_with)
    corpus = command.load_corpus(vocabulary)
    if command.save is None:
        run = RunFolder.stamped(command.stem or Path("runs") / f"{corpus.name}-{command.config.model.model}")
    else:
        run = RunFolder(where_it_leads(command.save))
    _check_vocabulary(command, corpus, initial)
    for doubt in corpus.doubts(made_vocabulary=initial is None and command.config.data.vocab is None):
        LOGGER.log(NOTICE, "%s", doubt)
    command = command.with_tokenizer(corpus.tokenizer, corpus.name)
    if initial is not None and checkpoint is not None and command.init_from is None:
        fix = "name the place of that text with --data, or train on this one with train --init-from"
        _check_text(checkpoint, initial, corpus, fix)
    trainer = _build(command, corpus, communicator, run)
    _say_whether_averaging_starts(trainer)
    if initial is not None and checkpoint is not None:
        trainer.start_from(checkpoint, initial)
        checkpoint = None  # or training would hold its arrays beside the model's
        LOGGER.info("beginning with %s", initial)
    if command.dry_run:
        LOGGER.log(RESULT, "dry run: everything is in order, and no run was written")
        return 0
    if not communicator.is_primary:
        return trainer.fit()
    with run.created(command.describe(), corpus.vocabulary, command.overwrite):
        return _fit_and_tell(trainer, run)


def resume_run(command: TrainCommand, run: RunFolder, path: Path | None) -> int:
    """Continue a run from `path`, or from its newest checkpoint; otherwise as `start_run`."""
    communicator = _join(command)
    is_writer = communicator.is_primary and not command.dry_run
    with run.held() if is_writer else contextlib.nullcontext():
        is_named = path is not None
        path = path or newest_checkpoint(run)
        checkpoint = load_checkpoint(path)
        before = read_config(path / CONFIG)
        _check_fixed(command, before, run, path)
        corpus = command.load_corpus(Vocabulary.load(path / VOCABULARY))
        check_alike({"checkpoint": f"{path.name} ({file_hash(path / STATE)[:12]})"}, communicator)
        fix = "restore the text or name its place with --data"
        if run.path.name != FINETUNED:  # which the text of the run that it began with has to fit, too
            fix += f", or {run.train_anew}"
        _check_text(checkpoint, run.path, corpus, fix)
        if is_named and "lr" not in command.settings:
            command = command.with_lr(before.optim.lr)
        trainer = _build(command, corpus, communicator, run)
        trainer.restore(checkpoint)
        restored = checkpoint.training
        del checkpoint  # or training would hold its arrays beside the model's
        _say_whether_averaging_starts(trainer)
        # Given now, or at an earlier start that ended before it wrote a checkpoint.
        if "lr" in command.settings or before.optim.lr != command.config.optim.lr:
            trainer.state.lr = command.config.optim.lr
        if trainer.end is not None:
            LOGGER.log(NOTICE, "nothing is left to train at step %d: %s", trainer.state.step, trainer.end)
        else:
            LOGGER.info("resuming at step %d, epoch %d", trainer.state.step, trainer.state.epoch + 1)
        for idle in _too_late(command, before.optim, trainer.state):
            LOGGER.log(NOTICE, "%s", idle)
        if command.dry_run:
            LOGGER.log(RESULT, "dry run: everything is in order, and no run was written")
            return 0
        if not communicator.is_primary:
            return trainer.fit()
        for abandoned in set_aside_after(run, restored):
            LOGGER.info("%s is newer than the named checkpoint; it is set aside as %s", *abandoned)
        repair_links(run, restored)
        run.update_config(command.describe())
        return _fit_and_tell(trainer, run)


def _join(command: TrainCommand) -> Communicator:
    """The devices and the other workers; of several, only the first logs more than warnings."""
    config = command.config
    shared = math.gcd(config.training.batch_size, config.optim.small_batch_size or 0)
    communicator = create_communicator(config.devices, streams=None if device_count(config) else shared)
    if not config.training.tf32 and all(device.device_type != "gpu" for device in communicator.devices):
        raise DistributedError(
            f"--no-tf32: only GPUs compute in TF32, and this runs on {communicator.devices[0]}; leave it out, or give "
            "--tf32 where the run's configuration says so"
        )
    if not config.training.tf32 and os.environ.get("NVIDIA_TF32_OVERRIDE") != "0":
        raise DistributedError(
            "tf32=False: NVIDIA's libraries read NVIDIA_TF32_OVERRIDE=0 when they are loaded, and it is not set; call "
            "gluon_lm.runtime.prepare_training(config) before MXNet is imported"
        )
    if not communicator.is_primary:
        log_warnings_only()
    elif config.training.tensorboard:
        require_tensorboard()
    LOGGER.info("recipe %s", command.recipe or "none")
    return communicator


def _say_whether_averaging_starts(trainer: Trainer) -> None:
    optim, training = trainer.config.optim, trainer.config.training
    has_started = trainer.state.averaging_since is not None
    may_stall = optim.nonmono + 2  # the first evaluation that has an older one to be compared with
    if optim.ntasgd and not has_started and training.eval_every is None and training.epochs <= may_stall:
        LOGGER.log(
            NOTICE,
            "--ntasgd: the weights will not be averaged: training ends after %d epochs (--epochs), and averaging "
            "starts after epoch %d at the earliest (--nonmono %d)",
            training.epochs,
            may_stall,
            optim.nonmono,
        )


def _build(command: TrainCommand, corpus: Corpus, communicator: Communicator, run: RunFolder) -> Trainer:
    """The model of a run, and its trainer."""
    config = command.config
    model = LanguageModel(config.model, len(corpus.vocabulary))
    need = _need(config, model, communicator)
    warning = check_need(need, free_memory(communicator), workers_sharing_memory(communicator))
    if warning:
        LOGGER.warning("%s", warning)
    # Before any of them allocates memory, because all on one machine look at what is free.
    check_alike(worker_facts(config, corpus.digest, communicator), communicator)
    with explaining_memory_errors(need):
        model.initialize_parameters(config.training.seed, communicator.devices)
        model.hybridize_for_use(by_layer=communicator.size > 1)
        if config.training.amp != "none":
            model.train_in_half_precision(config.training.amp)
        trainer = Trainer(config, corpus, model, communicator, run, command.describe(), need)
    num_parameters = sum(math.prod(parameter.shape) for parameter in model.named_parameters().values())
    LOGGER.info("%s", corpus.describe())
    LOGGER.info(
        "%s, %.2f million parameters | %s%s",
        config.model.summary,
        num_parameters / 1e6,
        communicator.description,
        "" if config.training.amp == "none" else f" | products in {config.training.amp}",
    )
    if config.model.num_sampled:
        LOGGER.info(
            "the training loss is a sampled softmax over %s words a window and is not comparable with validation, "
            "which is over all %s",
            f"{config.model.num_sampled + 1:,}",
            f"{len(corpus.vocabulary):,}",
        )
    LOGGER.info("memory: %s", need)
    return trainer


def _load_to_begin_with(path: Path) -> tuple[Path, Checkpoint, Vocabulary]:
    return path, load_checkpoint(path), Vocabulary.load(path / VOCABULARY)


def _check_text(checkpoint: Checkpoint, path: Path, corpus: Corpus, fix: str) -> None:
    """Make sure that a checkpoint is of this text; `DataError` otherwise."""
    if checkpoint.corpus != corpus.digest:
        raise DataError(f"{path}: was trained on another text or vocabulary than {corpus.name} now gives; {fix}")


def _check_vocabulary(command: TrainCommand, corpus: Corpus, initial: Path | None) -> None:
    """Make sure that the output layer fits the vocabulary of a new run, which may begin with another's checkpoint.

    Raises
    ------
    ConfigError
        With everything that does not fit.
    """
    vocabulary, model = corpus.vocabulary, command.config.model
    problems = vocabulary_problems(command.config, len(vocabulary), command.sources)
    # The order is that of the text from which the vocabulary was made, which may be another run's.
    is_new = initial is None or (command.init_from is None and "num_sampled" in command.settings and model.num_sampled)
    if model.needs_frequency_order and is_new:
        rise = first_rise(corpus.train, vocabulary)
        if rise is not None:
            fix = "leave --vocab out, or sort the lines of its file in that order"
            problems.append(
                f"{'--num-sampled' if model.num_sampled else '--cutoffs'}: needs the vocabulary in order of falling "
                f"frequency in the training text, and {rise}; " + (fix if initial is None else "leave it out")
            )
    if problems:
        raise ConfigError(problems)


def _check_fixed(command: TrainCommand, before: Config, run: RunFolder, path: Path) -> None:
    """Make sure that a run's ``config.yaml`` was not edited where it must stay what its checkpoint was trained with.

    Raises
    ------
    ConfigError
        With every value that differs.
    """

    def fixed(config: Config) -> dict[str, object]:
        values = {name: get(config, name) for name in sorted(FIXED_ON_RESUME)}
        return {**values, "locked": config.model.has_locked_dropout}  # not set, it follows from rates, which may change

    now = fixed(command.config)
    problems = [
        f"{run.config}: {name} is {show(now[name])}, and {path.name} was trained with {show(value)}; "
        f"write {name}: {show(value)} there again, or train a new run"
        for name, value in fixed(before).items()
        if value != now[name]
    ]
    if problems:
        raise ConfigError(problems)


def _too_late(command: TrainCommand, before: OptimConfig, state: TrainingState) -> list[str]:
    """Flags given to a resumed run that are new to it but come too late to have an effect, a line each."""
    settings, optim, lines = command.settings, command.config.optim, []
    is_new = optim.when is not None and optim.when != before.when
    is_averaging = optim.ntasgd and state.averaging_since is not None
    is_past = max(optim.when or (0,)) <= state.epoch
    if "when" in settings and is_new and (is_past or is_averaging):
        flag = f"{settings['when'].flag} {show(optim.when)}"
        reason = f"{state.epoch} epochs are done" if is_past else "the weights are averaged already"
        lines.append(f"{flag}: has no effect any more, {reason}; --lr sets the learning rate")
    is_new = optim.nonmono != before.nonmono
    if "nonmono" in settings and is_new and is_averaging:
        flag = f"{settings['nonmono'].flag} {optim.nonmono}"
        lines.append(f"{flag}: has no effect any more, the weights are averaged already")
    return lines


def _need(config: Config, model: LanguageModel, communicator: Communicator) -> Need:
    """The memory that a run will take."""
    head, training, devices = model.head, config.training, communicator.devices
    streams = (config.optim.small_batch_size or training.batch_size) // communicator.num_devices
    tokens = max(1, streams) * (training.bptt + (config.optim.max_seq_len_delta or 0))
    sizes = {name: math.prod(parameter.shape) for name, parameter in model.named_parameters().items()}
    on_cpu = devices[0].device_type == "cpu"
    keeps_copy = not config.model.num_sampled and (on_cpu or training.amp != "none")
    largest = max(math.prod(parameter.shape) for parameter in head.collect_params().values())
    return training_need(
        config,
        num_parameters=sum(sizes.values()),
        largest=largest if keeps_copy else 0,
        logits=max(
            largest_chunk(head.for_window(np.random.default_rng()), tokens),
            largest_chunk(head, max(ROWS_PER_WINDOW, training.eval_batch_size)),
        ),
        tokens=tokens,
        num_sharing=len(devices) if on_cpu else 1,
        merged=communicator.merged_elements(list(sizes.values())),
    )


def _fit_and_tell(trainer: Trainer, run: RunFolder) -> int:
    """The part of the first worker: train, with a log in the folder of the run, and maybe write a text in the end."""
    with log_to_file(run.log):
        LOGGER.info("run folder %s", run.path)
        runs = run.path.parent
        if runs.name == "runs" or runs == where_it_leads("runs"):
            newest = runs / LATEST
            if newest.is_dir() and not newest.is_symlink():
                LOGGER.info("%s is itself a run, so it is not made a link to the newest one", newest)
            else:
                try:
                    replace_symlink(newest, run.path)
                except PermissionError as error:
                    LOGGER.info("%s does not name this run (%s)", newest, error.strerror)
        code = trainer.fit()
        words = trainer.config.training.gen_word_len
        if words and code == 0:
            LOGGER.info("generating...")
            written = generate(trainer.predictor(), words, seed=trainer.config.training.seed)
            text = " ".join(str(word) for (word,) in counted(written, words, "generating", "word"))
            LOGGER.log(RESULT, "%s", text)
        return code
