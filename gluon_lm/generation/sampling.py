"""The next word, drawn on the device from the model's distribution.

Shapes: N streams, V vocabulary, B blocks of C words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mxnet as mx
import numpy as np
from mxnet import gluon

_BLOCK = 256
_BELOW_ONE = 1 - 2**-22  # the largest uniform number: times a float32 it stays below that


@dataclass(frozen=True)
class Sampling:
    """How the words of one stream are drawn.

    Attributes
    ----------
    temperature : float
        Words are drawn from ``p(word)^(1 / temperature)``, normalised; 0 takes the likeliest.
    top_k : int, optional
        Only from the k likeliest words (Fan et al. 2018, "Hierarchical Neural Story Generation"), equally likely ones
        with them.
    top_p : float, optional
        Only from the fewest likeliest words that together have at least this probability, at this temperature (nucleus
        sampling; Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration").
    suppress_unk : bool
        Never write ``<unk>``.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_unk: bool = False


AS_IS = Sampling()


class Sampler:
    """Draws a word for each of N streams.

    Parameters
    ----------
    sampling : sequence of Sampling
        One for each stream.
    vocab_size, unk_id : int
    device : Context
    """

    def __init__(self, sampling: Sequence[Sampling], vocab_size: int, unk_id: int, device: mx.Context) -> None:
        self._vocab_size, self._unk_id, self._device = vocab_size, unk_id, device
        self._draw = _InverseCumulative(vocab_size, len(sampling), device)
        self._draw.hybridize(static_alloc=True)
        self.set(sampling)

    def set(self, sampling: Sequence[Sampling]) -> None:
        """Draw in other ways from now on, for as many streams as before."""

        def array(values, needed=True):
            return mx.nd.array(np.array(values, dtype=np.float32), ctx=self._device) if needed else None

        every = self._vocab_size
        self._inverse_N1 = array(
            [[1 / (s.temperature or 1)] for s in sampling], any(s.temperature not in (0, 1) for s in sampling)
        )
        is_greedy = [s.temperature == 0 for s in sampling]
        self._is_greedy_N = array(is_greedy, any(is_greedy))
        self._unk_bias_N1 = array(
            [[-np.inf if s.suppress_unk else 0.0] for s in sampling], any(s.suppress_unk for s in sampling)
        )
        largest_k = max(s.top_k or 0 for s in sampling)
        self._num_sorted = every if any(s.top_p is not None for s in sampling) else min(largest_k, every)
        self._last_k_N = array([min(s.top_k or every, every) - 1 for s in sampling])
        self._has_k_N = array([s.top_k is not None for s in sampling])
        # Infinity cuts nothing off, where 1 cuts off what rounding of the sum leaves no room for.
        self._top_p_N1 = array([[np.inf if s.top_p is None else s.top_p] for s in sampling])

    def __call__(self, log_probs_NV: mx.nd.NDArray, uniforms_N: np.ndarray) -> mx.nd.NDArray:
        """Draw the next words.

        Parameters
        ----------
        log_probs_NV : NDArray
            Overwritten.
        uniforms_N : ndarray
            A number in [0, 1) for each stream, which decides its word.

        Returns
        -------
        NDArray of int32, shape (N,)
        """
        if self._unk_bias_N1 is not None:
            log_probs_NV[:, self._unk_id : self._unk_id + 1] += self._unk_bias_N1
        if self._inverse_N1 is not None:
            mx.nd.broadcast_mul(log_probs_NV, self._inverse_N1, out=log_probs_NV)
        probs_NV = mx.nd.softmax(log_probs_NV, axis=-1, out=log_probs_NV)
        likeliest_N = None if self._is_greedy_N is None else probs_NV.argmax(axis=-1)
        if self._num_sorted:
            threshold_N1 = self._thresholds(probs_NV)
            probs_NV = probs_NV * mx.nd.broadcast_greater_equal(probs_NV, threshold_N1)
        uniforms_N1 = mx.nd.array(np.minimum(uniforms_N, _BELOW_ONE).reshape(-1, 1), ctx=self._device)
        words_N = self._draw(probs_NV, uniforms_N1)
        if likeliest_N is not None:
            words_N = mx.nd.where(self._is_greedy_N, likeliest_N.astype("int32"), words_N)
        return words_N

    def _thresholds(self, probs_NV):
        """The smallest probability that each stream may still draw."""
        sorted_NK = mx.nd.topk(probs_NV, k=self._num_sorted, ret_typ="value", axis=-1)
        by_k_N = mx.nd.where(
            self._has_k_N, mx.nd.pick(sorted_NK, self._last_k_N, mode="clip"), mx.nd.zeros_like(self._has_k_N)
        )
        if self._num_sorted < self._vocab_size:
            return by_k_N.expand_dims(1)
        kept_NK = sorted_NK * mx.nd.broadcast_greater_equal(sorted_NK, by_k_N.expand_dims(1))
        total_N1 = kept_NK.sum(axis=-1, keepdims=True)
        before_NK = mx.nd.cumsum(kept_NK, axis=1) - kept_NK
        num_kept_N = mx.nd.broadcast_lesser(before_NK, self._top_p_N1 * total_N1).sum(axis=-1)
        by_p_N = mx.nd.pick(sorted_NK, mx.nd.maximum(num_kept_N - 1, 0), mode="clip")
        return mx.nd.maximum(by_k_N, by_p_N).expand_dims(1)


class _InverseCumulative(gluon.HybridBlock):
    """The word in which the cumulative distribution passes a uniform number: first its block of words, then itself."""

    def __init__(self, vocab_size: int, num_streams: int, device: mx.Context) -> None:
        super().__init__()
        self._num_blocks = vocab_size // _BLOCK + 1
        self._constants = (
            mx.nd.zeros((num_streams, self._num_blocks * _BLOCK - vocab_size), ctx=device),
            mx.nd.arange(num_streams, ctx=device) * self._num_blocks,
            mx.nd.ones((1, _BLOCK), ctx=device),
        )

    def __call__(self, probs_NV, uniforms_N1):
        return super().__call__(probs_NV, uniforms_N1, *self._constants)

    def hybrid_forward(self, F, probs_NV, uniforms_N1, padding_NP, row_starts_N, ones_1C):
        blocks_RC = F.reshape(F.concat(probs_NV, padding_NP, dim=1), shape=(-1, _BLOCK))
        # A matrix product, because MXNet's sums over short rows are slow on CPU.
        sums_R1 = F.FullyConnected(blocks_RC, ones_1C, num_hidden=1, no_bias=True)
        sums_NB = F.reshape(sums_R1, shape=(-1, self._num_blocks))
        block_N, rest_N1 = _first_above(F, sums_NB, uniforms_N1)
        word_N, _ = _first_above(F, F.take(blocks_RC, row_starts_N + block_N), rest_N1)
        return F.cast(block_N * _BLOCK + word_N, dtype="int32")


def _first_above(F, masses_NB, fractions_N1):
    """Where the running sum of masses passes a fraction of their total, and how far into that mass it is (0 to 1)."""
    cumulative_NB = F.cumsum(masses_NB, axis=1)
    target_N1 = F.slice_axis(cumulative_NB, axis=1, begin=-1, end=None) * fractions_N1
    index_N = F.sum(F.broadcast_lesser_equal(cumulative_NB, target_N1), axis=1)
    mass_N1 = F.pick(masses_NB, index_N, axis=1, keepdims=True)
    before_N1 = F.pick(cumulative_NB, index_N, axis=1, keepdims=True) - mass_N1
    return index_N, F.clip((target_N1 - before_N1) / mass_N1, 0.0, _BELOW_ONE)
