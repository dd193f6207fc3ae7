"""The folder of a run: where things are in it, how it is created, and how a user's name for it is resolved."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import glob
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from ..config import DataConfig, read_config
from ..data import Vocabulary
from ..errors import CheckpointError, ConfigError
from ..files import atomic_write, check_folder, swap_folders, temporary_sibling
from ..locks import is_in_use, sole_use
from ..logs import LOGGER

# In a run; the first two are also in each of its checkpoints.
CONFIG, VOCABULARY = "config.yaml", "vocab.txt"
METRICS, CHECKPOINTS, BEST, LATEST = "metrics.jsonl", "checkpoints", "best", "latest"
STATE, PARAMETERS = "state.json", "parameters.npz"  # in a checkpoint
CHECKPOINT_PREFIX = "step-"
FINETUNED = "finetune_model"  # a run in a run
_SUFFIXES = (".pt", ".params")  # the references name a file where we name a folder
_HAS_NO_LINKS = (errno.EPERM, errno.ENOSYS, errno.ENOTSUP)  # errors of Windows shares, memory cards and USB sticks


class RunFolder:
    """Paths inside one run.

    Attributes
    ----------
    path : Path
        Without links, as `where_it_leads` returns it, if the run is written. It has ``config.yaml``, ``vocab.txt``,
        ``log.txt``, ``metrics.jsonl``, ``status.json``, ``checkpoints/step-N/``, the links ``best`` and ``latest`` to
        two of these, and ``tensorboard/`` if it was asked for.
    """

    def __init__(self, path: str | Path) -> None:
        self._set_path(Path(path))
        self._stem: Path | None = None

    def _set_path(self, path: Path) -> None:
        self.path = path
        self.config = path / CONFIG
        self.vocabulary = path / VOCABULARY
        self.log = path / "log.txt"
        self.metrics = path / METRICS
        self.status = path / "status.json"
        self.tensorboard = path / "tensorboard"
        self.checkpoints = path / CHECKPOINTS
        self.best = path / BEST
        self.latest = path / LATEST
        self._lock = path / ".lock"

    @classmethod
    def stamped(cls, stem: str | Path) -> RunFolder:
        """A new run ``<stem>-<time>``, which gets another name if that one is taken before it is `created`."""
        stem = where_it_leads(Path(stem).parent) / Path(stem).name
        run = cls(_stamped(stem))
        run._stem = stem
        return run

    def check_free(self, overwrite: bool) -> None:
        """Refuse a folder that cannot be created, before anything is computed.

        Raises
        ------
        ConfigError
            If it exists and must not be replaced, or nothing can be written there.
        """
        if self.path.exists() or self.path.is_symlink():
            if not overwrite and not self.is_there:
                raise ConfigError(f"--save {self.path}: exists already, and is not a run; name another folder")
            if not overwrite:
                raise ConfigError(
                    f"--save {self.path}: exists already; name another folder, continue it with "
                    f"--resume {self.path}, or replace it with --overwrite"
                )
            if not self.path.is_dir() or (any(self.path.iterdir()) and not self.is_there):
                raise ConfigError(
                    f"--overwrite --save {self.path}: is not a run of ours (config.yaml and checkpoints/), "
                    "so it is not replaced; name another folder"
                )
            if not os.access(self.path, os.W_OK | os.X_OK):  # its files could not be removed
                raise ConfigError(
                    f"--overwrite --save {self.path}: is write-protected, so it is not replaced; make it writable, or "
                    "name another folder"
                )
        check_folder("--save", self.path)

    @contextlib.contextmanager
    def created(self, config_yaml: str, vocabulary: Vocabulary, overwrite: bool = False) -> Iterator[None]:
        """Create the folder with configuration and vocabulary in one rename, and hold it as `held` does.

        Raises
        ------
        ConfigError
            If it exists by now, is held by another process, or cannot be created; then nothing is left of it.
        """
        if self._stem is not None and self.path.exists():
            self._set_path(_stamped(self._stem))
        self.check_free(overwrite)
        fresh = RunFolder(temporary_sibling(self.path))
        with contextlib.ExitStack() as stack:
            try:
                fresh.checkpoints.mkdir(parents=True)
                stack.enter_context(fresh.held())  # before others can find it
                fresh.update_config(config_yaml)
                vocabulary.save(fresh.vocabulary)
                self._move_in(fresh.path, overwrite)
            except OSError as error:
                raise ConfigError(
                    f"--save {self.path}: cannot be made ({error.strerror}); fix that, or name another folder"
                ) from error
            finally:
                shutil.rmtree(fresh.path, ignore_errors=True)
            yield

    @property
    def train_anew(self) -> str:
        """How to have it trained from its beginning, in words."""
        if self.path.name == FINETUNED:
            return f"finetune anew: python -m gluon_lm.finetune {self.path.parent} --overwrite"
        return f"train anew: --save {self.path} --overwrite without --resume"

    @property
    def is_there(self) -> bool:
        """Whether the folder is a run."""
        return self.config.is_file() and self.checkpoints.is_dir()

    def _move_in(self, fresh: Path, overwrite: bool) -> None:
        """Move the folder `fresh` to where this run is or will be."""
        if overwrite and self.path.exists():
            with contextlib.ExitStack() as stack:
                for run in [self, *map(RunFolder, finetunings(self.path))]:
                    stack.enter_context(run.held())
                swap_folders(fresh, self.path)
            return
        try:
            fresh.rename(self.path)
        except OSError:
            if not self.path.exists():
                raise
            if self._stem is None:
                self.check_free(overwrite=False)  # another process has made it in the meantime
                raise
            self._set_path(_stamped(self._stem))
            self._move_in(fresh, overwrite)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the only process that writes the run.

        Raises
        ------
        ConfigError
            If another process does.
        """
        refusal = ConfigError(
            f"{self.path}: another process is training this run; wait until that has ended, or name another folder"
        )
        with sole_use(self._lock, refusal):
            yield

    @property
    def is_held(self) -> bool | None:
        """Whether a process is writing the run; None if that is unknown."""
        return is_in_use(self._lock)

    def update_config(self, config_yaml: str) -> None:
        """Replace ``config.yaml``, when a run continues with other flags."""
        with atomic_write(self.config) as file:
            file.write(config_yaml.encode("utf-8"))

    def with_text_of(self, data: DataConfig) -> DataConfig:
        """The configuration of a checkpoint's text with the place where the run has it, which may be a newer one."""
        now = read_config(self.config).data
        return dataclasses.replace(data, data=now.data, data_dir=now.data_dir)

    def checkpoint(self, step: int | None) -> Path:
        """The path of a step's checkpoint, which may not exist."""
        return self.checkpoints / f"{CHECKPOINT_PREFIX}{step}"

    def saved_checkpoints(self) -> list[Path]:
        """The checkpoints, oldest first."""
        folders = [
            p for p in self.checkpoints.glob(f"{CHECKPOINT_PREFIX}*") if p.name[len(CHECKPOINT_PREFIX) :].isdigit()
        ]
        return sorted(folders, key=checkpoint_step)


def finetunings(run: Path) -> Iterator[Path]:
    """The finetuned run in the folder of a run, the one in that, and so on."""
    while os.access(run, os.X_OK) and (run := run / FINETUNED).is_dir():
        yield run


def where_it_leads(path: str | Path) -> Path:
    """A path without links: the same one if there is none in it.

    What is read or written for long is named so, because a link such as ``runs/latest`` may by then lead elsewhere.
    """
    real = os.path.realpath(path)
    return Path(os.path.normpath(path) if os.path.abspath(path) == real else real)


def strip_model_suffix(path: str | Path) -> Path:
    """``model.pt`` and ``model.params`` are the run folder ``model``."""
    path = Path(path)
    return path.with_suffix("") if path.suffix in _SUFFIXES else path


def checkpoint_step(checkpoint: Path) -> int:
    """The step at which a checkpoint was written, by its name."""
    return int(checkpoint.name[len(CHECKPOINT_PREFIX) :])


def folder_of(checkpoint: Path) -> Path:
    """The run to which a checkpoint belongs, which may not exist; its path must not be a link."""
    is_copy = checkpoint.name in (BEST, LATEST)  # of a run that was copied without its links
    return checkpoint.parent if is_copy else checkpoint.parent.parent


def _stamped(stem: Path) -> Path:
    """``<stem>-<time>``, a name that is still free."""
    return free_name(stem.with_name(f"{stem.name}-{time.strftime('%Y%m%d-%H%M%S')}"))


def free_name(path: Path) -> Path:
    """The path itself, or the first of ``path-2``, ``path-3``... that is still free."""
    free, n = path, 1
    while free.exists():
        n += 1
        free = path.with_name(f"{path.name}-{n}")
    return free


def replace_symlink(link: Path, target: Path) -> None:
    """Point `link` to `target`, which is next to or below it, in one rename, if the file system has links."""
    fresh = temporary_sibling(link)
    try:
        fresh.symlink_to(os.path.relpath(target, link.parent))
    except OSError as error:
        if error.errno not in _HAS_NO_LINKS:
            raise
        _say_that_links_are_missing(str(error.strerror))
    else:
        try:
            fresh.replace(link)
        finally:
            fresh.unlink(missing_ok=True)


@functools.cache  # once is enough
def _say_that_links_are_missing(why: str) -> None:
    LOGGER.warning(
        "this file system has no links (%s), so best and latest are not made; name runs and checkpoints in full", why
    )


def find_run(name: str | Path | None) -> tuple[RunFolder, Path | None]:
    """Find a run by a user's name for it.

    Parameters
    ----------
    name : str or Path, optional
        The run folder, a checkpoint inside it, or a reference's file name (``model.pt``); None is the newest run.

    Returns
    -------
    RunFolder
    Path or None
        The checkpoint, if the name was one.

    Raises
    ------
    CheckpointError
        If there is no such run.
    """
    if name is None:
        name = Path("runs") / LATEST
        if not name.exists():
            raise CheckpointError(
                "no run is named and runs/latest does not exist; name a run folder, or train one with "
                "python -m gluon_lm.train"
            )
    path = Path(name) if Path(name).is_dir() else strip_model_suffix(name)
    if not path.is_dir() and path != Path(name) and path.name == "model" and RunFolder(path.parent).is_there:
        path = path.parent  # the mixture's authors write FOLDER/model.pt
    if not path.is_dir():
        stamped = sorted(path.parent.glob(f"{glob.escape(path.name)}-[0-9]*/{CONFIG}"))  # as recipe mos names runs
        hint = f"; did you mean {stamped[-1].parent}?" if stamped else ""
        raise CheckpointError(
            f"{name}: there is no such run; name a run folder (it has config.yaml and checkpoints/){hint}"
        )
    if RunFolder(path).is_there:
        return RunFolder(where_it_leads(path)), None
    checkpoint = path.resolve()
    folder = folder_of(checkpoint)
    if checkpoint.parent in (folder, folder / CHECKPOINTS) and (folder / CONFIG).is_file():
        return RunFolder(folder), checkpoint
    raise CheckpointError(f"{name}: is neither a run folder (config.yaml and checkpoints/) nor a checkpoint in one")
