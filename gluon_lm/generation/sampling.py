"""The next word, drawn on the device from the model's distribution, in one graph with the model.

Shapes: N streams, V vocabulary, B blocks of C words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import mxnet as mx
import numpy as np
from mxnet import gluon

from . import LOWEST_TEMPERATURE

_BLOCK = 256
_GRAPHS = 6  # kept for reuse; each holds memory for all streams
_SORTED = 128  # words that are sorted unless a stream needs more
_NO_CHANCE = -1e30  # added to a word's score, it makes the probability 0
_BELOW_ONE = 1 - 2**-22  # the largest uniform number: its product with a float32 is below that


@dataclass(frozen=True)
class Sampling:
    """How the words of one stream are drawn.

    Attributes
    ----------
    temperature : float
        0 or more. Words are drawn from ``p(word)^(1 / temperature)``, normalised; below `LOWEST_TEMPERATURE` the
        likeliest is taken.
    top_k : int, optional
        Draw only from the k likeliest words, 1 or more (Fan et al. 2018, "Hierarchical Neural Story Generation"), and
        from those equally likely as the last of them.
    top_p : float, optional
        Draw only from the fewest likeliest words that together have at least this probability, at this temperature, and
        from those equally likely as the last of them; above 0, and 1 leaves out none (nucleus sampling; Holtzman et al.
        2020, "The Curious Case of Neural Text Degeneration").
    suppress_unk : bool
        Never write ``<unk>``.

    Raises
    ------
    ValueError
        For a value that is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    suppress_unk: bool = False

    def __post_init__(self) -> None:
        for name, value, is_right, rule in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, self.top_p is None or self.top_p > 0, "above 0"),
        ):
            if not is_right:
                raise ValueError(f"{name} {value}: must be {rule}")
        if self.temperature < LOWEST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)
        if self.top_p is not None and self.top_p >= 1:
            object.__setattr__(self, "top_p", None)


AS_IS = Sampling()


@dataclass(frozen=True)
class _Ways:
    """What the streams need of a graph, so that it computes nothing that none of them asks for.

    Attributes
    ----------
    tempered, greedy, without_unk : bool
        Whether some stream has a temperature other than 1, temperature 0, or no ``<unk>``.
    num_sorted : int
        How many of the likeliest words must be sorted.
    """

    tempered: bool = False
    greedy: bool = False
    without_unk: bool = False
    num_sorted: int = 0


class Sampler:
    """Generates word by word in N streams: the network and the draw from its distribution are one graph.

    Parameters
    ----------
    network : HybridBlock
        Maps ``tokens_1N, *states`` to ``scores_1NV, *new_states``: log-probabilities of the next word, up to a constant
        for each stream.
    sampling : sequence of Sampling
        One for each stream.
    vocab_size, unk_id : int
    device : Context
    """

    def __init__(
        self,
        network: gluon.HybridBlock,
        sampling: Sequence[Sampling],
        vocab_size: int,
        unk_id: int,
        device: mx.Context,
    ) -> None:
        self._network, self._vocab_size, self._device = network, vocab_size, device
        num_streams, num_blocks = len(sampling), vocab_size // _BLOCK + 1
        unk_1V = np.zeros((1, vocab_size))
        unk_1V[0, unk_id] = _NO_CHANCE
        self._constants = [
            self._array(np.zeros((num_streams, num_blocks * _BLOCK - vocab_size))),
            self._array(np.arange(num_streams) * num_blocks),
            self._array(np.ones((1, _BLOCK))),
        ]
        self._unk_1V = self._array(unk_1V)
        self._steps: dict[_Ways, _Step] = {}
        self.set(sampling)

    def set(self, sampling: Sequence[Sampling]) -> None:
        """Change how each stream draws from now on; the number of streams stays."""
        every = self._vocab_size
        largest_k = max(s.top_k or 0 for s in sampling)
        num_sorted = min(every, _SORTED) if largest_k else 0
        if any(s.top_p is not None for s in sampling) or largest_k > num_sorted:
            num_sorted = every
        ways = _Ways(
            tempered=any(s.temperature not in (0, 1) for s in sampling),
            greedy=any(s.temperature == 0 for s in sampling),
            without_unk=any(s.suppress_unk for s in sampling),
            num_sorted=num_sorted,
        )

        def needed(condition: bool, values: list) -> mx.nd.NDArray | None:
            return self._array(values) if condition else None  # MXNet warns of inputs that a graph does not use

        self._controls = [
            needed(ways.tempered, [[1 / (s.temperature or 1)] for s in sampling]),
            needed(ways.greedy, [s.temperature == 0 for s in sampling]),
            needed(ways.without_unk, [[s.suppress_unk] for s in sampling]),
            self._unk_1V if ways.without_unk else None,
            needed(num_sorted > 0, [min(s.top_k or every, every) - 1 for s in sampling]),
            needed(num_sorted > 0, [s.top_k is not None for s in sampling]),
            # Infinity cuts nothing off; 1 could cut off the last words, because the running sum is rounded.
            needed(num_sorted == every, [[np.inf if s.top_p is None else s.top_p] for s in sampling]),
        ]
        self._step = self._steps.pop(ways) if ways in self._steps else self._make_step(ways)
        self._steps[ways] = self._step
        if len(self._steps) > _GRAPHS:
            del self._steps[next(iter(self._steps))]

    def _make_step(self, ways: _Ways) -> _Step:
        step = _Step(self._network, ways, self._vocab_size)
        step.hybridize(static_alloc=True, static_shape=True)
        return step

    def __call__(
        self, tokens_1N: mx.nd.NDArray, states: list[mx.nd.NDArray], uniforms_N: np.ndarray
    ) -> tuple[mx.nd.NDArray, list[mx.nd.NDArray]]:
        """Write the next word of each stream.

        Parameters
        ----------
        tokens_1N : NDArray
            The last words.
        states : list of NDArray
            The network's, before these words.
        uniforms_N : ndarray
            A number in [0, 1) for each stream, which determines its word.

        Returns
        -------
        tokens_1N : NDArray of int32
        states : list of NDArray
        """
        uniforms_N1 = self._array(np.minimum(uniforms_N, _BELOW_ONE).reshape(-1, 1))
        tokens_1N, *states = self._step(tokens_1N, uniforms_N1, self._constants, self._controls, states)
        return tokens_1N, states

    def _array(self, values):
        return mx.nd.array(np.asarray(values, dtype=np.float32), ctx=self._device)


class _Step(gluon.HybridBlock):
    def __init__(self, network: gluon.HybridBlock, ways: _Ways, vocab_size: int) -> None:
        super().__init__()
        self._ways, self._vocab_size, self._num_blocks = ways, vocab_size, vocab_size // _BLOCK + 1
        self.network = network

    def hybrid_forward(self, F, tokens_1N, uniforms_N1, constants, controls, states):
        scores_1NV, *states = self.network(tokens_1N, *states)
        scores_NV = F.reshape(scores_1NV, shape=(-1, self._vocab_size))
        padding_NP, row_starts_N, ones_1C = constants
        inverse_N1, is_greedy_N, has_no_unk_N1, unk_1V, last_k_N, has_k_N, top_p_N1 = controls
        if self._ways.tempered:
            scores_NV = F.broadcast_mul(scores_NV, inverse_N1)
        if self._ways.without_unk:
            scores_NV = F.broadcast_add(scores_NV, F.broadcast_mul(has_no_unk_N1, unk_1V))
        probs_NV = F.softmax(scores_NV, axis=-1)
        if self._ways.num_sorted:
            threshold_N1 = self._thresholds(F, probs_NV, last_k_N, has_k_N, top_p_N1, padding_NP)
            kept_NV = F.broadcast_mul(probs_NV, F.broadcast_greater_equal(probs_NV, threshold_N1))
        else:
            kept_NV = probs_NV
        words_N = self._draw(F, kept_NV, uniforms_N1, padding_NP, row_starts_N, ones_1C)
        if self._ways.greedy:
            words_N = F.where(is_greedy_N, F.argmax(probs_NV, axis=-1), words_N)
        return (F.reshape(F.cast(words_N, dtype="int32"), shape=(1, -1)), *states)

    def _thresholds(self, F, probs_NV, last_k_N, has_k_N, top_p_N1, padding_NP):
        """The smallest probability of a word that each stream may draw."""
        sorted_NK = F.topk(probs_NV, k=self._ways.num_sorted, ret_typ="value", axis=-1)
        by_k_N = F.where(has_k_N, F.pick(sorted_NK, last_k_N, mode="clip"), F.zeros_like(has_k_N))
        by_k_N1 = F.expand_dims(by_k_N, axis=1)
        if self._ways.num_sorted < self._vocab_size:
            return by_k_N1
        kept_NK = sorted_NK * F.broadcast_greater_equal(sorted_NK, by_k_N1)
        running_NK = self._running_sum(F, kept_NK, padding_NP)
        total_N1 = F.slice_axis(running_NK, axis=1, begin=-1, end=None)  # not the sum, which is rounded differently
        before_NK = running_NK - kept_NK
        num_kept_N = F.sum(F.broadcast_lesser(before_NK, top_p_N1 * total_N1), axis=-1)
        by_p_N1 = F.pick(sorted_NK, F.maximum(num_kept_N - 1, 0), mode="clip", keepdims=True)
        return F.maximum(by_k_N1, by_p_N1)

    def _running_sum(self, F, masses_NV, padding_NP):
        """Along a row: first within blocks of words, because one thread of a GPU sums a whole row."""
        blocks_RC = F.reshape(F.concat(masses_NV, padding_NP, dim=1), shape=(-1, _BLOCK))
        within_RC = F.cumsum(blocks_RC, axis=1)
        totals_NB = F.reshape(F.slice_axis(within_RC, axis=1, begin=-1, end=None), shape=(-1, self._num_blocks))
        through_NB = F.cumsum(totals_NB, axis=1)
        none_N1 = F.zeros_like(F.slice_axis(through_NB, axis=1, begin=0, end=1))
        before_NB = F.slice_axis(F.concat(none_N1, through_NB, dim=1), axis=1, begin=0, end=-1)
        running_RC = F.broadcast_add(within_RC, F.reshape(before_NB, shape=(-1, 1)))
        padded_NP = F.reshape(running_RC, shape=(-1, self._num_blocks * _BLOCK))
        return F.slice_axis(padded_NP, axis=1, begin=0, end=self._vocab_size)

    def _draw(self, F, probs_NV, uniforms_N1, padding_NP, row_starts_N, ones_1C):
        """The word at which the running sum passes a share of the total: first its block of words, then the word."""
        blocks_RC = F.reshape(F.concat(probs_NV, padding_NP, dim=1), shape=(-1, _BLOCK))
        # A matrix product, because MXNet's sums over short rows are slow on CPU.
        sums_R1 = F.FullyConnected(blocks_RC, ones_1C, num_hidden=1, no_bias=True)
        sums_NB = F.reshape(sums_R1, shape=(-1, self._num_blocks))
        block_N, rest_N1 = _first_above(F, sums_NB, uniforms_N1)
        word_N, _ = _first_above(F, F.take(blocks_RC, row_starts_N + block_N), rest_N1)
        return block_N * _BLOCK + word_N


def _first_above(F, masses_NB, fractions_N1):
    """Where the running sum of masses passes a fraction of their total, and how far into that mass it is (0 to 1)."""
    cumulative_NB = F.cumsum(masses_NB, axis=1)
    target_N1 = F.slice_axis(cumulative_NB, axis=1, begin=-1, end=None) * fractions_N1
    index_N = F.sum(F.broadcast_lesser_equal(cumulative_NB, target_N1), axis=1)
    mass_N1 = F.pick(masses_NB, index_N, axis=1, keepdims=True)
    before_N1 = F.pick(cumulative_NB, index_N, axis=1, keepdims=True) - mass_N1
    return index_N, F.clip((target_N1 - before_N1) / mass_N1, 0.0, _BELOW_ONE)
