"""Checkpoints: one directory each, complete or absent, with all that a resumed run needs to go on as if never stopped.

- ``parameters.npz``: the model, by parameter name; once weights are averaged, their averages
- ``unaveraged.npz``: then also the weights from which training goes on
- ``optimizer.npz``: optimiser state, by parameter name
- ``residuals.npz``: what 2-bit compression has not sent yet, where it can be kept
- ``carried.npz``: recurrent state between two windows, all streams side by side
- ``state.json``: counters, decisions, the state of 2-bit compression, how many parameters there are, the sha256 of
  every other file, a digest of itself
- ``config.yaml``, ``vocab.txt``
"""

from __future__ import annotations

import dataclasses
import errno
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import mxnet as mx
import numpy as np

from .. import __version__
from ..config import show
from ..data import Vocabulary
from ..errors import CheckpointError, GluonLMError, reason
from ..files import (
    in_utf8,
    read_arrays,
    read_seal,
    replaced_folder,
    synchronise,
    temporary_sibling,
    verify_files,
    write_arrays,
    write_seal,
)
from ..logs import LOGGER
from ..memory import is_allocation_failure
from ..models import LanguageModel
from .run_folder import (
    CHECKPOINT_PREFIX,
    CONFIG,
    PARAMETERS,
    STATE,
    VOCABULARY,
    RunFolder,
    checkpoint_step,
    find_run,
    free_name,
    replace_symlink,
)

UNAVERAGED, RESIDUALS, OPTIMIZER, CARRIED = "unaveraged.npz", "residuals.npz", "optimizer.npz", "carried.npz"
TRAINING_TEXT = "training_text"  # in `Checkpoint.text`
_ALWAYS = {PARAMETERS, OPTIMIZER, CARRIED, CONFIG, VOCABULARY}
_SOMETIMES = {UNAVERAGED, RESIDUALS}
_FORMAT = 3
_TRIES = 5  # to read the best checkpoint of a run that replaces it meanwhile
_UNREADABLE = (ValueError, TypeError, KeyError, mx.MXNetError)  # the last three for types that MXNet does not have

_Loaded = TypeVar("_Loaded")


@dataclass
class TrainingState:
    """Where a run is, and what it has decided.

    Attributes
    ----------
    step, epoch, window : int
        Steps taken; epoch (from 0) of the next window, and its number in that.
    skipped : int
        Steps among them that did not change the parameters.
    lr : float
    evaluated_step : int
        Step of the last evaluation on the validation text.
    best_loss, best_step : float and int, or None
        Lowest validation loss so far, in nats per token, and the step of its checkpoint.
    evaluations_since_best : int
    valid_losses : list of float
        Of all evaluations so far, except for one before the first step.
    averaging_since : int or None
        Updates of the parameters after which averaging started.
    seconds : float
        Time that training has taken since the last evaluation.
    """

    step: int = 0
    epoch: int = 0
    window: int = 0
    skipped: int = 0
    lr: float = 0.0
    evaluated_step: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    valid_losses: list[float] = field(default_factory=list)
    averaging_since: int | None = None
    seconds: float = 0.0

    @property
    def num_updates(self) -> int:
        """Steps that changed the parameters."""
        return self.step - self.skipped


@dataclass
class Checkpoint:
    """The contents of one checkpoint, on the host.

    Attributes
    ----------
    parameters, optimizer : dict of str to NDArray
    unaveraged : dict of str to NDArray
        The weights, if `parameters` are their averages; otherwise empty.
    carried : list of NDArray
        Recurrent state of all streams, (1, N, H) each; empty at the start of an epoch.
    training : TrainingState
    compression, residuals : dict
        `Communicator.compression_state`; empty where gradients are not compressed.
    corpus : str
        Digest of the corpus that it was trained on.
    text : dict of str to str
        The corpus's name and licence, and the hash of its training text.
    loss_scale : dict
        `LossScale.state_dict`; empty if the loss was not scaled.
    """

    parameters: Mapping[str, mx.nd.NDArray]
    optimizer: Mapping[str, mx.nd.NDArray]
    carried: list[mx.nd.NDArray]
    training: TrainingState
    compression: dict[str, Any] = field(default_factory=dict)
    residuals: Mapping[str, mx.nd.NDArray] = field(default_factory=dict)
    corpus: str = ""
    text: Mapping[str, str] = field(default_factory=dict)
    unaveraged: Mapping[str, mx.nd.NDArray] = field(default_factory=dict)
    loss_scale: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: RunFolder,
    checkpoint: Checkpoint,
    config_yaml: str,
    vocabulary: Vocabulary,
    *,
    keep: int,
    is_best: bool,
) -> Path:
    """Write a checkpoint next to the others, then point ``latest`` (and ``best``) to it, then remove the oldest.

    Every step is one rename on a synchronised file system, so a process killed at any moment leaves complete
    checkpoints and links to complete checkpoints.

    Parameters
    ----------
    keep : int
        Newest checkpoints to keep; the best one is kept in addition.

    Raises
    ------
    CheckpointError
        If it cannot be written; those before it are unchanged.
    """
    started = time.perf_counter()
    final = run.checkpoint(checkpoint.training.step)  # which exists already if it was saved before it was evaluated
    try:
        _check_space(run.checkpoints, checkpoint)
        with replaced_folder(final) as fresh:
            _save_arrays(fresh / PARAMETERS, checkpoint.parameters)
            if checkpoint.unaveraged:
                _save_arrays(fresh / UNAVERAGED, checkpoint.unaveraged)
            if checkpoint.residuals:
                _save_arrays(fresh / RESIDUALS, checkpoint.residuals)
            _save_arrays(fresh / OPTIMIZER, checkpoint.optimizer)
            _save_arrays(fresh / CARRIED, {str(i): array for i, array in enumerate(checkpoint.carried)})
            (fresh / CONFIG).write_text(config_yaml, encoding="utf-8")
            vocabulary.save(fresh / VOCABULARY)
            content = {
                "format": _FORMAT,
                "gluon_lm": __version__,
                "training": dataclasses.asdict(checkpoint.training),
                "compression": checkpoint.compression,
                "loss_scale": checkpoint.loss_scale,
                "corpus": checkpoint.corpus,
                "text": dict(checkpoint.text),
                "num_parameters": sum(array.size for array in checkpoint.parameters.values()),
            }
            write_seal(fresh, STATE, content)
        if is_best:
            _link(run.best, final)
        _link(run.latest, final)
        synchronise(run.path)
        _remove_old(run, keep, run.checkpoint(checkpoint.training.best_step))
    except OSError as error:
        raise CheckpointError(
            f"{final}: cannot be written ({error.strerror or error}); fix that, and continue from the newest "
            f"checkpoint with --resume {run.path}"
        ) from error
    LOGGER.debug("%s written in %.2f s", final, time.perf_counter() - started)
    return final


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint after verifying the hash of every file.

    Raises
    ------
    CheckpointError
        If a file is missing, unreadable or changed.
    """
    path = Path(path)
    state = verify_checkpoint(path)
    try:
        carried = _load_arrays(path / CARRIED)
        return Checkpoint(
            parameters=_load_arrays(path / PARAMETERS),
            optimizer=_load_arrays(path / OPTIMIZER),
            carried=[carried[str(i)] for i in range(len(carried))],
            training=_read_training(state["training"]),
            compression=dict(state["compression"]),
            corpus=str(state["corpus"]),
            text=dict(state["text"]),
            loss_scale=dict(state["loss_scale"]),
            unaveraged=_load_some_arrays(path / UNAVERAGED) if UNAVERAGED in state["sha256"] else {},
            residuals=_load_some_arrays(path / RESIDUALS) if RESIDUALS in state["sha256"] else {},
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise _damaged(path, error) from error


def _load_some_arrays(path: Path) -> dict[str, mx.nd.NDArray]:
    arrays = _load_arrays(path)
    if not arrays:
        raise ValueError(f"{path.name} has no arrays")
    return arrays


def _read_training(values: Mapping[str, Any]) -> TrainingState:
    """From JSON; `TypeError` if a value does not have its field's type, `KeyError` if it is missing."""
    nothing = type(None)
    types: dict[str, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "int | None": (int, nothing),
        "float | None": (int, float, nothing),
        "list[float]": (list,),
    }
    for declared in dataclasses.fields(TrainingState):
        value = values[declared.name]
        if not isinstance(value, types[str(declared.type)]):
            raise TypeError(f"{declared.name} is {show(value)}")
    return TrainingState(**values)


def verify_checkpoint(path: Path) -> dict[str, Any]:
    """The contents of ``state.json``, after verifying the hash of every file.

    Raises
    ------
    CheckpointError
        If a file is missing or changed, or the checkpoint has another format.
    """
    try:
        state = read_seal(path, STATE)
        if state["format"] != _FORMAT:
            raise CheckpointError(
                f"{path}: has checkpoint format {state['format']}, this gluon_lm {__version__} reads "
                f"{_FORMAT}; use the version that wrote it, {state['gluon_lm']}"
            )
        if not _ALWAYS <= state["sha256"].keys() <= _ALWAYS | _SOMETIMES:
            raise ValueError(f"{STATE} names other files than a checkpoint has")
        verify_files(path, state)
        return state
    except (OSError, ValueError, KeyError) as error:
        raise _damaged(path, error) from error


def training_and_text(path: Path, state: Mapping[str, Any]) -> tuple[TrainingState, dict[str, str]]:
    """Where a run was, and its text, as in `Checkpoint`, from what `verify_checkpoint` returned.

    Raises
    ------
    CheckpointError
        If that is not the state of a checkpoint.
    """
    try:
        text = {name: in_utf8(value) for name, value in state["text"].items()}
        return _read_training(state["training"]), text
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from error


def newest_checkpoint(run: RunFolder) -> Path:
    """The newest checkpoint, damaged or not; `CheckpointError` if there is none."""
    checkpoints = run.saved_checkpoints()
    if not checkpoints:
        raise CheckpointError(f"{run.path}: has no checkpoint yet; {run.train_anew}")
    return checkpoints[-1]


def best_checkpoint(run: RunFolder) -> Path:
    """The checkpoint with the lowest validation loss, or the newest if none was evaluated; errors as above."""
    if run.best.exists():
        return run.best.resolve()
    newest = newest_checkpoint(run)
    training = verify_checkpoint(newest)["training"]
    best = run.checkpoint(training["best_step"])  # the run was copied without its links, or cannot have them
    return best if best.is_dir() else newest


def set_aside_after(run: RunFolder, training: TrainingState) -> list[tuple[str, str]]:
    """Rename the checkpoints of steps that a run, continuing from an older one, is about to take again.

    Returns
    -------
    list of (str, str)
        Old and new name of each.
    """
    newer = [path for path in run.saved_checkpoints() if checkpoint_step(path) > training.step]
    aside = [free_name(path.with_name(f"abandoned-{path.name}")) for path in newer]
    for path, new in zip(newer, aside):
        path.rename(new)
    return [(path.name, new.name) for path, new in zip(newer, aside)]


def repair_links(run: RunFolder, training: TrainingState) -> None:
    """Point ``best`` and ``latest`` to what a run continues with: it may have been killed before they were set."""
    for link, step in ((run.best, training.best_step), (run.latest, training.step)):
        checkpoint = run.checkpoint(step)
        if checkpoint.is_dir():
            _link(link, checkpoint)
        elif not link.exists():
            link.unlink(missing_ok=True)


def _link(link: Path, checkpoint: Path) -> None:
    if link.is_dir() and not link.is_symlink():
        shutil.rmtree(link)  # a copy of a checkpoint, which `scp -r` makes of a link
    replace_symlink(link, checkpoint)


def load_by_name(name: str | Path | None, load: Callable[[Path], _Loaded]) -> _Loaded:
    """What `load` returns for the checkpoint that a user names, as in `gluon_lm.trained.load_trained`.

    A run in training may find a new best checkpoint, and remove the old one, while that is read; then the new one is
    read.
    """
    run, path = find_run(name)
    if path is not None:
        return load(path)
    tries = 0
    while True:
        path = best_checkpoint(run)
        tries += 1
        try:
            return load(path)
        except GluonLMError:
            if path.is_dir() or tries == _TRIES:
                raise


def load_parameters(model: LanguageModel, path: str | Path) -> None:
    """Read a checkpoint's parameters into its own model, on all devices, one array after the other.

    Raises
    ------
    CheckpointError
        If it is damaged, or of another model; some parameters may have been read by then.
    """
    path = Path(path)
    verify_checkpoint(path)
    read_parameters(model, path)


def read_parameters(model: LanguageModel, path: Path) -> None:
    """As `load_parameters`, from a checkpoint that has been verified."""
    parameters = model.named_parameters()
    missing = dict.fromkeys(parameters)
    try:
        for name, array in read_arrays(path / PARAMETERS):
            if name not in missing or parameters[name].shape != array.shape:
                raise _of_another_model(path, [name])
            parameters[name].set_data(mx.nd.from_numpy(array))
            del missing[name]
    except _UNREADABLE as error:
        if is_allocation_failure(error):
            raise
        raise _damaged(path, error) from error
    if missing:
        raise _of_another_model(path, list(missing))


def set_parameters(model: LanguageModel, arrays: Mapping[str, mx.nd.NDArray], origin: Path) -> None:
    """Copy arrays into a model, on all its devices.

    Raises
    ------
    CheckpointError
        If a name or a shape differs from the model's.
    """
    parameters = model.named_parameters()
    differing = sorted(parameters.keys() ^ arrays.keys()) or [
        name for name, parameter in parameters.items() if parameter.shape != arrays[name].shape
    ]
    if differing:
        raise _of_another_model(origin, differing)
    for name, parameter in parameters.items():
        parameter.set_data(arrays[name])


def _of_another_model(origin: Path, differing: Sequence[str]) -> CheckpointError:
    more = f" and {len(differing) - 1} more parameters differ" if len(differing) > 1 else " differs"
    return CheckpointError(
        f"{origin}: is of another architecture ({differing[0]}{more}); use the flags that it was trained with"
    )


def _remove_old(run: RunFolder, keep: int, best: Path) -> None:
    for path in run.saved_checkpoints()[:-keep]:
        if path != best:
            path.rename(temporary_sibling(path))  # so that a kill leaves no part of it under its name
    for leftover in run.checkpoints.glob(f".{CHECKPOINT_PREFIX}*"):
        # NFS refuses it while another process has a file open; the next checkpoint tries again.
        shutil.rmtree(leftover, ignore_errors=True)


def _damaged(path: Path, error: Exception) -> CheckpointError:
    """What is raised if reading the checkpoint at `path` ends with another error."""
    return CheckpointError(f"{path}: is damaged ({reason(error)}){_others(path)}")


def _others(path: Path) -> str:
    """A hint, for messages, on the checkpoint to use instead of the one at `path`."""
    run = RunFolder(path.resolve().parent.parent)
    saved, own = run.saved_checkpoints(), run.checkpoints / path.resolve().name
    if own not in saved:  # set aside, or a copy of the user's
        return ""
    older = saved[: saved.index(own)]
    return f"; use the one before it, {run.checkpoints / older[-1].name}" if older else "; no older one is kept"


def _check_space(folder: Path, checkpoint: Checkpoint) -> None:
    named = (checkpoint.parameters, checkpoint.unaveraged, checkpoint.optimizer, checkpoint.residuals)
    arrays = [*(array for arrays in named for array in arrays.values()), *checkpoint.carried]
    needed = sum(array.size * np.dtype(array.dtype).itemsize for array in arrays) + (1 << 20)
    if shutil.disk_usage(folder).free < needed:
        raise OSError(errno.ENOSPC, f"it needs {needed / 1e6:.0f} MB, more than the disk has left")


def _save_arrays(path: Path, arrays: Mapping[str, mx.nd.NDArray]) -> None:
    # Not MXNet's own format: it records the device, which may not exist when it is read, and its writer does not notice
    # that the disk is full at the last block of a file.
    write_arrays(path, ((name, array.asnumpy()) for name, array in arrays.items()))


def _load_arrays(path: Path) -> dict[str, mx.nd.NDArray]:
    """The arrays of a checkpoint's file on the host; `CheckpointError` if it cannot be read."""
    try:
        return {name: mx.nd.array(array, ctx=mx.cpu(), dtype=array.dtype) for name, array in read_arrays(path)}
    except _UNREADABLE as error:
        if is_allocation_failure(error):
            raise
        raise CheckpointError(f"{path}: cannot be read ({reason(error)}){_others(path.parent)}") from error
