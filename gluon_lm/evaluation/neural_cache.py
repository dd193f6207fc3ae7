"""Neural cache: words that came shortly before, in contexts like the current one, become more probable.

Grave et al. 2016, "Improving Neural Language Models with a Continuous Cache", equations 2, 3 and 5.

Shapes: T time, N streams (1), H hidden width, R rows of a window, B rows of a block, M positions in memory, K positions
to which a block attends.
"""

from __future__ import annotations

import math

import mxnet as mx
import numpy as np

from ..losses import target_losses
from ..models.heads import Head

_ROWS_PER_BLOCK = 512  # rows that attend to the cache together; with 64 it takes 1.6 times as long, with 256 as long
_BLOCK_ELEMENTS = 1 << 24  # scores in a block, 64 MiB of float32: fewer rows where the window is above 30,000


class NeuralCache:
    """A distribution of the next word from a text's last positions, mixed with that of the model.

    With the hidden vectors ``h_i`` that the head is given, and the word ``x_(i+1)`` that follows each,
    ``p_cache(w) = sum of softmax_i(theta h_t . h_i) over the i with x_(i+1) = w``, i being the last `window` positions
    before t or as many as there are, and ``p(w) = (1 - weight) p_model(w) + weight p_cache(w)``. The first word of the
    text, before which there is nothing, is left to the model. One object serves one text, read as one stream.

    On the model's device it keeps the hidden vectors of the last `window` positions and of the model's window, and
    uses a few arrays of at most 512 x (window + 511) numbers, or of 64 MiB if that is less.

    Parameters
    ----------
    window : int
        Positions to look back at, 1 or more.
    theta : float
        How strongly positions like the current one are preferred, 0 or more. With 0 the cache is the words'
        frequencies in the window.
    weight : float
        Lambda, in [0, 1): the cache's share of the probability.

    Raises
    ------
    ValueError
        For a parameter that is out of range.
    """

    def __init__(self, window: int, theta: float, weight: float) -> None:
        if window < 1 or not 0 <= theta < math.inf or not 0 <= weight < 1:
            raise ValueError(
                f"window {window}, theta {theta:g}, weight {weight:g}: must be 1 or more, 0 or more, and in [0, 1)"
            )
        self._window, self._theta, self._weight = window, theta, weight
        self._hidden_MH: mx.nd.NDArray | None = None
        self._next_words_M: mx.nd.NDArray | None = None
        self._band_BK: mx.nd.NDArray | None = None

    def losses(self, head: Head, hidden_TNH: mx.nd.NDArray, targets_R: mx.nd.NDArray) -> mx.nd.NDArray:
        """Negative log-likelihood, in nats, of the targets of the next window of the one stream: shape (R,).

        They are stored with their hidden vectors, so each window must be passed once, and in order. `ValueError` for
        more than one stream.
        """
        if hidden_TNH.shape[1] != 1:
            raise ValueError(f"{hidden_TNH.shape[1]} streams: the cache reads one; evaluate with num_streams=1")
        losses_R = target_losses(head, hidden_TNH, targets_R)
        hidden_MH, next_words_M = hidden_TNH.reshape((-1, hidden_TNH.shape[-1])), targets_R
        if self._hidden_MH is not None:
            hidden_MH = mx.nd.concat(self._hidden_MH, hidden_MH, dim=0)
            next_words_M = mx.nd.concat(self._next_words_M, next_words_M, dim=0)
        num_positions = hidden_MH.shape[0]
        window_start = num_positions - targets_R.shape[0]
        rows = max(1, min(_ROWS_PER_BLOCK, _BLOCK_ELEMENTS // num_positions))
        for start in range(max(window_start, 1), num_positions, rows):  # there is nothing before position 0
            stop = min(start + rows, num_positions)
            block = slice(start - window_start, stop - window_start)
            shares_B = self._shares(hidden_MH, next_words_M, start, stop)
            losses_R[block] = self._mixed(losses_R[block], shares_B)
        self._hidden_MH, self._next_words_M = hidden_MH[-self._window :], next_words_M[-self._window :]
        return losses_R

    def _shares(self, hidden_MH, next_words_M, start, stop):
        """Probability that the cache gives to the word after each of the positions from `start` to `stop`."""
        num_before = min(start, self._window)
        seen = slice(start - num_before, stop - 1)
        num_seen = seen.stop - seen.start
        scores_BK = mx.nd.FullyConnected(
            self._theta * hidden_MH[start:stop], hidden_MH[seen], no_bias=True, num_hidden=num_seen
        )
        scores_BK += self._band(num_before, stop - start, hidden_MH.context)
        weights_BK = mx.nd.softmax(scores_BK, axis=-1)
        targets_B1, next_words_1K = next_words_M[start:stop].reshape((-1, 1)), next_words_M[seen].reshape((1, -1))
        weights_BK *= mx.nd.broadcast_equal(targets_B1, next_words_1K).astype("float32")
        ones_1K = mx.nd.ones((1, num_seen), ctx=hidden_MH.context)  # many times faster than `sum`
        return mx.nd.FullyConnected(weights_BK, ones_1K, no_bias=True, num_hidden=1).reshape((-1,))

    def _band(self, num_before, num_rows, device):
        """A mask that leaves each row of a block the `window` positions before it: 0 for these and -inf elsewhere."""
        num_seen = num_before + num_rows - 1
        if self._band_BK is None or self._band_BK.shape != (num_rows, num_seen):
            distances_BK = num_before + np.arange(num_rows)[:, None] - np.arange(num_seen)
            is_seen_BK = (distances_BK >= 1) & (distances_BK <= self._window)
            self._band_BK = mx.nd.array(np.where(is_seen_BK, 0, -np.inf), ctx=device, dtype="float32")
        return self._band_BK

    def _mixed(self, losses_B, shares_B):
        by_model_B = math.log1p(-self._weight) - losses_B
        by_cache_B = mx.nd.log(self._weight * shares_B)  # -inf for a word that is not in the cache
        # The logarithm of the sum of the two probabilities, each of which may underflow float32.
        larger_B = mx.nd.maximum(by_model_B, by_cache_B)
        return -(larger_B + mx.nd.log1p(mx.nd.exp(-mx.nd.abs(by_model_B - by_cache_B))))
