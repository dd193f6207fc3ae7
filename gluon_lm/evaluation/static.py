"""Perplexity of a fixed model on a text, exact over every token.

Shapes: T time, N streams, H hidden width, R targets of a window.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import mxnet as mx
import numpy as np

from ..data.windows import Streams
from ..errors import DataError
from ..inputs import copy_inputs
from ..losses import target_losses
from ..metrics import perplexity
from ..models import LanguageModel
from ..models.heads import Head
from ..progress import progress_bar

ROWS_PER_WINDOW = 512  # tokens processed at once; the result does not depend on it

WindowLosses = Callable[[Head, mx.nd.NDArray, mx.nd.NDArray], mx.nd.NDArray]


@dataclass(frozen=True)
class Evaluation:
    """Sums over a text.

    Attributes
    ----------
    loss_sum : float
        Negative log-likelihood of all tokens, in nats.
    num_tokens : int
    """

    loss_sum: float
    num_tokens: int

    @property
    def loss(self) -> float:
        """Mean negative log-likelihood per token, in nats."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """``exp(loss)``; infinite where that is beyond a float."""
        return perplexity(self.loss)

    @property
    def bits_per_word(self) -> float:
        """``loss / ln 2``."""
        return self.loss / math.log(2)

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.5f} | perplexity {self.perplexity:.3f} | bits per word {self.bits_per_word:.4f} | "
            f"tokens {self.num_tokens}"
        )


def evaluate(
    model: LanguageModel,
    ids: np.ndarray,
    eos: int,
    device: mx.Context,
    num_streams: int = 1,
    bptt: int | None = None,
    progress: str | None = None,
    before_window: Callable[[], None] = lambda: None,
    window_losses: WindowLosses = target_losses,
) -> Evaluation:
    """Evaluate a model on a text, with the state carried from window to window.

    Every token of `ids` counts once, including the first: it is predicted from ``<eos>`` and the zero state, like the
    first word of a line. With more than one stream the text is cut into that many contiguous pieces, each begun in
    the same way, so that their first words lack their true context.

    Parameters
    ----------
    model : LanguageModel
        Evaluated as it is, without dropout.
    ids : ndarray of int32, shape (num_tokens,)
        The text.
    eos : int
        The id of ``<eos>``.
    device : Context
        Where the model's parameters are.
    num_streams : int
        N, 1 or more; at most one per token is used.
    bptt : int, optional
        Window length; by default as many rows as make about 500 tokens. The result is the same.
    progress : str, optional
        What to call the work in a progress bar.
    before_window : callable, optional
        Called before each window; what it raises ends the evaluation.
    window_losses : callable, optional
        Takes the head, the hidden vectors (T, N, H) of each window in turn and its targets (R,), and returns their
        losses (R,), in nats; by default those of the model alone.

    Raises
    ------
    DataError
        If there are no ids, or some outside the model's vocabulary.
    ValueError
        If `num_streams` is below 1.
    """
    check_ids(model, ids)
    if num_streams < 1:
        raise ValueError(f"num_streams {num_streams}: must be 1 or more")
    num_streams = min(num_streams, len(ids))
    streams = Streams(ids, num_streams, eos)
    bptt = bptt or max(1, ROWS_PER_WINDOW // num_streams)
    states = model.begin_state(num_streams, device)
    total = 0.0
    pending: mx.nd.NDArray | None = None
    with progress_bar(total=len(ids), desc=progress, unit="token") as bar:
        for window in streams.windows(bptt):
            before_window()
            tokens_TN, targets_R = copy_inputs(window, device)
            hidden_TNH, *states = model.encoder(tokens_TN, *states)
            losses_R = window_losses(model.head, hidden_TNH, targets_R)
            # Read the previous window's losses while the device works on this one.
            total += _sum(pending)
            pending = losses_R
            bar.update(window.num_targets)
    return Evaluation(total + _sum(pending), len(ids))


def check_ids(model: LanguageModel, ids: np.ndarray) -> None:
    """Make sure that `ids` are words of the model; MXNet does not, and clips them to the valid range.

    Raises
    ------
    DataError
        If there are none, or some outside the model's vocabulary.
    """
    if not len(ids):
        raise DataError("there are no words to read; give a text that has some")
    lowest, highest = np.min(ids), np.max(ids)
    if not 0 <= lowest <= highest < model.vocab_size:
        raise DataError(
            f"word ids from {lowest} to {highest}: must be from 0 to {model.vocab_size - 1}, as the model knows "
            f"{model.vocab_size} words; encode the text with its vocabulary"
        )


def _sum(losses_R: mx.nd.NDArray | None) -> float:
    return 0.0 if losses_R is None else float(losses_R.asnumpy().sum(dtype=np.float64))
