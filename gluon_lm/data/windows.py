"""Truncated back-propagation through time: a token stream, cut into columns and then into windows.

Shapes: T time (rows of a window), N columns (streams read side by side).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """Inputs and targets of one step.

    Attributes
    ----------
    tokens_TN, targets_TN : ndarray of int32
        ``targets_TN[t, n]`` is the word after ``tokens_TN[t, n]``.
    num_targets : int
        Number of targets. Only the last row of the streams can be incomplete: its columns from
        ``num_targets - (T - 1) * N`` on are padding.
    """

    tokens_TN: np.ndarray
    targets_TN: np.ndarray
    num_targets: int

    def columns(self, start: int, stop: int) -> Window:
        """The part of the window that one device takes."""
        rows, width = self.targets_TN.shape
        in_last_row = self.num_targets - (rows - 1) * width
        num_targets = (rows - 1) * (stop - start) + min(max(in_last_row - start, 0), stop - start)
        return Window(self.tokens_TN[:, start:stop], self.targets_TN[:, start:stop], num_targets)


class Streams:
    """A text as `num_streams` contiguous columns of equal length, give or take one token; nothing is dropped.

    Every token is the target of exactly one position. The first token is predicted from `eos`, as a text
    starts as if a line had just ended, and so is that of every other column, which is cut off from its true context.

    Parameters
    ----------
    ids : ndarray of int32, shape (num_tokens,)
    num_streams : int
        N, at least 1 and at most num_tokens.
    eos : int
        The id of ``<eos>``.
    """

    def __init__(self, ids: np.ndarray, num_streams: int, eos: int) -> None:
        self.num_tokens, self.num_streams = len(ids), num_streams
        self.num_rows = -(-len(ids) // num_streams)
        self._ids, self._eos = ids, eos
        full_rows, self._in_last_row = divmod(len(ids), num_streams)
        self._starts_N = np.arange(num_streams) * full_rows + np.minimum(np.arange(num_streams), self._in_last_row)

    def window(self, start: int, length: int) -> Window:
        """The window of rows ``start`` to ``start + length``, cut at the end of the streams."""
        stop = min(start + length, self.num_rows)
        positions_TN = self._starts_N + np.arange(start, stop)[:, None]
        num_targets = positions_TN.size
        if stop == self.num_rows and self._in_last_row:
            num_targets -= self.num_streams - self._in_last_row
        targets_TN = self._ids[np.minimum(positions_TN, self.num_tokens - 1)]
        tokens_TN = self._ids[np.maximum(positions_TN - 1, 0)]
        if start == 0:
            tokens_TN[0] = self._eos
        return Window(tokens_TN, targets_TN, num_targets)

    def windows(self, length: int) -> Iterator[Window]:
        """All windows of `length` rows in order; the last one may be shorter."""
        return (self.window(start, length) for start in range(0, self.num_rows, length))


# ---------------------------------------------------------------- epochs


class Epoch(ABC):
    """The windows of one pass over the training text.

    Attributes
    ----------
    carries_state : bool
        Whether each window continues from the recurrent state in which the one before it ended.
    """

    carries_state: bool

    @abstractmethod
    def __len__(self) -> int:
        """Number of windows, at least 1."""

    @abstractmethod
    def window(self, index: int) -> Window:
        """One window; the first is 0."""


class ContiguousEpoch(Epoch):
    """The rows of the streams in order, cut into windows of given lengths.

    Parameters
    ----------
    streams : Streams
    lengths : ndarray of int
        Lengths of the windows; the last one reaches the end of the streams, or beyond it.
    """

    carries_state = True

    def __init__(self, streams: Streams, lengths: np.ndarray) -> None:
        self._streams, self._lengths = streams, lengths
        self._starts = np.cumsum(lengths) - lengths

    def __len__(self) -> int:
        return len(self._lengths)

    def window(self, index: int) -> Window:
        return self._streams.window(int(self._starts[index]), int(self._lengths[index]))


class ShuffledEpoch(Epoch):
    """Independent windows in random order.

    The text from `offset` on is cut into pieces of `length` tokens, and each window has `num_streams` of them side by
    side. Pieces that do not fill a last window, and a rest at the end that is shorter than a piece, are left out of
    this epoch.

    Parameters
    ----------
    ids : ndarray of int32, shape (num_tokens,)
        The training text.
    num_streams : int
        N, pieces in a window.
    length : int
        T, tokens in a piece.
    eos : int
        The id of ``<eos>``, from which the text's first token is predicted.
    offset : int
        Tokens to skip at the beginning of the text.
    rng : numpy.random.Generator
        Draws the order of the pieces.
    """

    carries_state = False

    def __init__(
        self, ids: np.ndarray, num_streams: int, length: int, eos: int, offset: int, rng: np.random.Generator
    ) -> None:
        self._ids, self._length, self._eos = ids, length, eos
        starts = offset + length * rng.permutation((len(ids) - offset) // length)
        self._starts_WN = starts[: len(starts) // num_streams * num_streams].reshape(-1, num_streams)

    def __len__(self) -> int:
        return len(self._starts_WN)

    def window(self, index: int) -> Window:
        positions_TN = self._starts_WN[index] + np.arange(self._length)[:, None]
        tokens_TN = np.where(positions_TN == 0, self._eos, self._ids[np.maximum(positions_TN - 1, 0)])
        return Window(tokens_TN, self._ids[positions_TN], positions_TN.size)


class TrainingWindows:
    """The windows of every epoch, a function of the seed and the epoch alone, so that all workers agree on them.

    Parameters
    ----------
    ids : ndarray of int32, shape (num_tokens,)
        The training text: at least `bptt` tokens for each stream, and `bptt` more with both `shuffle` and
        `random_start`.
    num_streams : int
        N, of all devices together.
    bptt : int
        Usual length of a window.
    eos : int
        The id of ``<eos>``.
    seed : int
    max_seq_len_delta : int, optional
        When given, lengths are random (Merity et al. 2017, section 4.1): normally distributed with standard deviation
        5 around `bptt`, with probability 0.05 around half of it, at least 5, but never more than this much above
        `bptt`.
    random_start : bool
        Cut the text at a different place in each epoch: the first window has a random length below `bptt`, or, when
        shuffled, that much text is skipped.
    shuffle : bool
        Independent windows in random order, in place of consecutive windows.
    """

    def __init__(
        self,
        ids: np.ndarray,
        num_streams: int,
        bptt: int,
        eos: int,
        seed: int = 0,
        *,
        max_seq_len_delta: int | None = None,
        random_start: bool = False,
        shuffle: bool = False,
    ) -> None:
        self._ids, self._bptt, self._eos, self._seed = ids, bptt, eos, seed
        self._max_seq_len_delta, self._random_start, self._shuffle = max_seq_len_delta, random_start, shuffle
        self._streams = Streams(ids, num_streams, eos)

    def epoch(self, number: int) -> Epoch:
        """The windows of an epoch; the first is 0."""
        rng = np.random.default_rng([self._seed, number])
        offset = int(rng.integers(self._bptt)) if self._random_start else 0
        if self._shuffle:
            return ShuffledEpoch(self._ids, self._streams.num_streams, self._bptt, self._eos, offset, rng)
        lengths = self._lengths(rng)
        if offset:
            lengths = np.concatenate([[offset], lengths])
        lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), self._streams.num_rows)) + 1]
        return ContiguousEpoch(self._streams, lengths)

    def _lengths(self, rng: np.random.Generator) -> np.ndarray:
        """Lengths of windows, more than enough of them."""
        num_rows = self._streams.num_rows
        if self._max_seq_len_delta is None:
            return np.full(-(-num_rows // self._bptt), self._bptt)
        lengths: list[np.ndarray] = []
        while sum(map(np.sum, lengths)) < num_rows:
            base = np.where(rng.random(1024) < 0.95, self._bptt, self._bptt / 2)
            drawn = np.maximum(5, rng.normal(base, 5).astype(int))
            lengths.append(np.minimum(drawn, self._bptt + self._max_seq_len_delta))
        return np.concatenate(lengths)

    def relative_size(self, window: Window) -> float:
        """The number of a window's targets, divided by that of one with `bptt` whole rows.

        The learning rate is scaled by it (Merity et al. 2017, section 4.1), so that every target counts alike: in
        windows of random length, in what is left for the last window of an epoch, and in a first one that is cut short.
        """
        return window.num_targets / (self._bptt * self._streams.num_streams)

    def longest(self) -> Window | None:
        """A window of the maximum length; None where all have the same length."""
        if self._max_seq_len_delta is None:
            return None
        return self._streams.window(0, self._bptt + self._max_seq_len_delta)
