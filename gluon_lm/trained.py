"""Trained models, by a user's name for them: for the commands, for export, and for Python programs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mxnet as mx

from .config import Config, read_config
from .data import Vocabulary
from .data.vocabulary import EOS
from .exported import is_exported, load_exported
from .files import in_utf8
from .metrics import finite_or_none, perplexity
from .models import LanguageModel
from .prediction import ModelPredictor, Predictor, describe_model
from .training.checkpoint import UNAVERAGED, load_by_name, read_parameters, training_and_text, verify_checkpoint
from .training.run_folder import CONFIG, VOCABULARY, folder_of


@dataclass(frozen=True)
class TrainedModel:
    """A checkpoint's model, on a device, and what it comes from.

    Attributes
    ----------
    model : LanguageModel
    vocabulary : Vocabulary
    config : Config
        The run's, with its dropout, which the model may lack.
    path : Path
        The checkpoint.
    state : dict
        What `verify_checkpoint` returned.
    """

    model: LanguageModel
    vocabulary: Vocabulary
    config: Config
    path: Path
    state: dict[str, Any]

    @property
    def tokenizer(self) -> str:
        """How text becomes words: a name in `gluon_lm.data.tokenizers.TOKENIZERS`."""
        return self.config.data.tokenizer or "whitespace"

    def describe(self) -> dict[str, dict[str, Any]]:
        """What the model is, what it was trained on, and its result, in the form of `Predictor.describe`.

        Raises
        ------
        CheckpointError
            If `state` is not that of a checkpoint.
        """
        training, text = training_and_text(self.path, self.state)
        loss = training.best_loss if training.best_step == training.step else None
        return {
            **describe_model(self.config.model, len(self.vocabulary)),
            "text": {
                **text,
                "tokenizer": self.tokenizer,
                "begins_with": EOS,
                "eos_id": self.vocabulary.eos_id,
                "unk_id": self.vocabulary.unk_id,
            },
            "training": {
                "checkpoint": in_utf8(self.path.name),
                "epochs": training.epoch,
                "steps": training.step,
                "averaged": UNAVERAGED in self.state["sha256"],
                "validation_loss": loss,
                "validation_perplexity": None if loss is None else finite_or_none(perplexity(loss)),
            },
        }


def load_trained(name: str | Path | None, device: mx.Context, *, to_train: bool = False) -> TrainedModel:
    """A trained model, ready for use.

    Parameters
    ----------
    name : str or Path, optional
        As `gluon_lm.training.run_folder.find_run` takes it. From a run folder, the best checkpoint is loaded, or the
        newest if none was evaluated.
    device : Context
    to_train : bool
        Whether the model has its dropout, and gradients. One without has names that do not depend on what else the
        process has made, as an export needs them.

    Raises
    ------
    CheckpointError
        If there is no such run or checkpoint, or it is damaged.
    """

    def load(path: Path) -> TrainedModel:
        state = verify_checkpoint(path)
        config = read_config(path / CONFIG)
        vocabulary = Vocabulary.load(path / VOCABULARY)
        if to_train:  # perhaps by a trainer that has other models too, whose names must differ
            model = LanguageModel(config.model, len(vocabulary))
        else:
            with mx.name.NameManager():
                model = LanguageModel(config.model.without_dropout(), len(vocabulary), prefix="")
        model.allocate_parameters([device], "add" if to_train else "null")
        read_parameters(model, path)
        model.hybridize_for_use()
        return TrainedModel(model, vocabulary, config, path, state)

    return load_by_name(name, load)


def load_model(name: str | Path | None, device: mx.Context) -> tuple[LanguageModel, Vocabulary, Config, Path]:
    """A trained model, to evaluate or to train on: with its dropout, and with gradients.

    Parameters
    ----------
    name : str or Path, optional
        As in `load_trained`.
    device : Context

    Returns
    -------
    model, vocabulary, config, checkpoint path

    Raises
    ------
    CheckpointError
        If there is no such run or checkpoint, or it is damaged.
    """
    trained = load_trained(name, device, to_train=True)
    return trained.model, trained.vocabulary, trained.config, trained.path


def load_predictor(name: str | Path | None, device: mx.Context | None = None) -> Predictor:
    """A predictor from a run (its best checkpoint), a checkpoint or an exported folder; None: the newest run.

    Parameters
    ----------
    name : str or Path, optional
    device : Context, optional
        Where it computes; the CPU if None.

    Raises
    ------
    CheckpointError
        If there is no such run or folder, or it is damaged.
    """
    device = device or mx.cpu()
    if name is not None and is_exported(Path(name)):
        return load_exported(name, device)
    trained = load_trained(name, device)
    description = trained.describe()
    description["training"]["run"] = in_utf8(folder_of(trained.path.resolve()).name)
    predictor = ModelPredictor(trained.model, trained.vocabulary, trained.tokenizer, device, description)
    predictor.path = trained.path
    return predictor
