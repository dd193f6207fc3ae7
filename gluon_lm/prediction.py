"""A trained model in use: words in, log-probabilities out.

Shapes: T time, N streams, V vocabulary, R rows = the first targets of T x N, in time-major order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from .config import ModelConfig
from .data import Vocabulary
from .files import in_utf8
from .losses import target_losses
from .models import LanguageModel, State

_TOKENS_READ_AT_ONCE = 4096


class Predictor(ABC):
    """A language model that is ready for use on one device: a run of ours, or an exported folder.

    One thread uses it at a time; `gluon_lm.serving.engine.Engine` serves many.

    Attributes
    ----------
    vocabulary : Vocabulary
    tokenizer : str
        How text becomes words: a name in `gluon_lm.data.tokenizers.TOKENIZERS`.
    device : Context
    network : HybridBlock
        ``tokens_TN, *states -> scores_TNV, *new_states``: log-probabilities of the word after each token, up to a
        constant for each token. For use as part of a larger graph.
    path : Path or None
        The checkpoint, or the exported folder, that it was loaded from.
    rows_at_once : int
        How many tokens, T x N, are processed at once; callers of `target_losses` should not batch more than that.
    """

    network: gluon.HybridBlock
    path: Path | None = None
    rows_at_once = 4096

    def __init__(self, vocabulary: Vocabulary, tokenizer: str, device: mx.Context) -> None:
        self.vocabulary, self.tokenizer, self.device = vocabulary, tokenizer, device

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the model is, where it comes from, and what it was trained on, as plain JSON values."""

    @abstractmethod
    def begin_state(self, num_streams: int) -> State:
        """The zero state: arrays of shape (1, N, H), layer by layer."""

    @abstractmethod
    def log_probs(self, tokens_TN: mx.nd.NDArray, states: State) -> tuple[mx.nd.NDArray, State]:
        """Log-probability, base e, of each word after each token, ``log_probs_TNV``, and the state after the last."""

    def read(self, tokens_TN: np.ndarray, states: State) -> State:
        """The state after the last of some tokens (int32, any number of them)."""
        words_at_once = max(1, _TOKENS_READ_AT_ONCE // states[0].shape[1])
        for start in range(0, len(tokens_TN), words_at_once):
            piece_TN = mx.nd.array(tokens_TN[start : start + words_at_once], ctx=self.device, dtype="int32")
            states = self._read(piece_TN, states)
        return states

    @abstractmethod
    def _read(self, tokens_TN: mx.nd.NDArray, states: State) -> State:
        """`read` of few enough tokens to process at once."""

    def target_losses(
        self, tokens_TN: mx.nd.NDArray, targets_R: mx.nd.NDArray, states: State
    ) -> tuple[mx.nd.NDArray, State]:
        """Negative log-likelihood, in nats, of the targets of the first R rows, shape (R,), and the state."""
        num_words, num_streams = tokens_TN.shape
        words_at_once, losses = max(1, self.rows_at_once // num_streams), []
        for start in range(0, num_words, words_at_once):
            rows = slice(start * num_streams, min((start + words_at_once) * num_streams, targets_R.shape[0]))
            piece_TN = tokens_TN[start : start + words_at_once]
            if rows.start < rows.stop:
                piece_losses_R, states = self._losses(piece_TN, targets_R[rows], states)
                losses.append(piece_losses_R)
            else:
                states = self.read(piece_TN.asnumpy(), states)
        return mx.nd.concat(*losses, dim=0), states

    def _losses(self, tokens_TN: mx.nd.NDArray, targets_R: mx.nd.NDArray, states: State) -> tuple[mx.nd.NDArray, State]:
        """`target_losses` of few enough tokens to process at once."""
        log_probs_TNV, states = self.log_probs(tokens_TN, states)
        log_probs_RV = log_probs_TNV.reshape((-1, log_probs_TNV.shape[-1]))[: targets_R.shape[0]]
        return -mx.nd.pick(log_probs_RV, targets_R), states


class ModelPredictor(Predictor):
    """A `LanguageModel` whose parameters are on `device`; `origin` describes where they come from."""

    def __init__(
        self,
        model: LanguageModel,
        vocabulary: Vocabulary,
        tokenizer: str,
        device: mx.Context,
        origin: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(vocabulary, tokenizer, device)
        self._model, self._origin = model, origin or {}
        self.network = _Scores(model)

    def describe(self) -> dict[str, Any]:
        return {**describe_model(self._model.config, len(self.vocabulary)), **self._origin}

    def begin_state(self, num_streams):
        return self._model.begin_state(num_streams, self.device)

    def log_probs(self, tokens_TN, states):
        hidden_TNH, *states = self._model.encoder(tokens_TN, *states)
        return self._model.head(hidden_TNH), states

    def _read(self, tokens_TN, states):
        _, *states = self._model.encoder(tokens_TN, *states)
        return states

    def _losses(self, tokens_TN, targets_R, states):
        hidden_TNH, *states = self._model.encoder(tokens_TN, *states)
        return target_losses(self._model.head, hidden_TNH, targets_R), states


class _Scores(gluon.HybridBlock):
    """A language model without the last step from scores to log-probabilities."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head

    def hybrid_forward(self, F, tokens_TN, *states):
        hidden_TNH, *new_states = self.encoder(tokens_TN, *states)
        return (self.head.scores(F, hidden_TNH), *new_states)


def describe_model(config: ModelConfig, vocab_size: int) -> dict[str, Any]:
    """An architecture in the form of `Predictor.describe`."""
    return {
        "model": {
            "cell": config.cell,
            "embed_size": config.embed_size,
            "layer_sizes": config.layer_sizes,
            "tied": config.tied,
            "num_experts": config.num_experts or 1,
            "vocab_size": vocab_size,
        }
    }


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
    from .exporting import is_exported, load_exported
    from .training.checkpoint import describe_checkpoint, load_model_and_state
    from .training.run_folder import folder_of

    device = device or mx.cpu()
    if name is not None and is_exported(Path(name)):
        return load_exported(name, device)
    model, vocabulary, config, path, state = load_model_and_state(name, device)
    for parameter in model.named_parameters().values():
        parameter.grad_req = "null"  # which frees the gradients
    origin = describe_checkpoint(path, state, config, vocabulary)
    origin["training"]["run"] = in_utf8(folder_of(path.resolve()).name)
    predictor = ModelPredictor(model, vocabulary, config.data.tokenizer or "whitespace", device, origin)
    predictor.path = path
    return predictor
