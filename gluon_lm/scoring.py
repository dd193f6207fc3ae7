"""Log-probabilities of given lines under a model, word by word: for reranking and for finding anomalies.

Shapes: T time, N lines side by side, R = T x N.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mxnet as mx
import numpy as np

from .data.vocabulary import EOS, Vocabulary
from .metrics import finite_or_none, perplexity
from .prediction import Predictor

_LINES_SORTED_TOGETHER = 1024


@dataclass(frozen=True)
class LineScore:
    """Scores of one line.

    Attributes
    ----------
    words : list of str
        The line's words, and ``<eos>``.
    log_probs : ndarray, one for each word
        Log-probability, base e, of each word given those before it, the first given ``<eos>``.
    is_unknown : list of bool
        Whether the vocabulary lacks the word, so that it is scored as ``<unk>``.
    """

    words: list[str]
    log_probs: np.ndarray
    is_unknown: list[bool]

    @classmethod
    def of(cls, line: Sequence[str], log_probs: np.ndarray, vocabulary: Vocabulary) -> LineScore:
        """The scores of a line without its ``<eos>``, from the log-probabilities with it."""
        words = [*line, EOS]
        return cls(words, log_probs, [word not in vocabulary for word in words])

    @property
    def log_prob(self) -> float:
        """Log-probability of the whole line, including its end."""
        return float(self.log_probs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """``exp`` of the negative mean log-probability of a word; infinite where that overflows a float."""
        return perplexity(-self.log_prob / len(self.words))

    def as_json(self) -> dict[str, Any]:
        """Everything as plain JSON values, with None for numbers that are not finite."""
        words = [
            {"word": word, "log_prob": finite_or_none(float(log_prob)), "unknown": unknown}
            for word, log_prob, unknown in zip(self.words, self.log_probs, self.is_unknown)
        ]
        return {
            "log_prob": finite_or_none(self.log_prob),
            "perplexity": finite_or_none(self.perplexity),
            "words": words,
        }


def score_lines(predictor: Predictor, lines: Iterable[Sequence[str]]) -> Iterator[LineScore]:
    """Score lines, each on its own: begun from ``<eos>`` and the zero state, and ended by ``<eos>``.

    Lines of similar length are processed side by side, which changes scores only by rounding.

    Parameters
    ----------
    predictor : Predictor
    lines : iterable of sequence of str
        The words of each line.

    Yields
    ------
    LineScore
        One for each line, in order.
    """
    lines = iter(lines)
    while group := list(itertools.islice(lines, _LINES_SORTED_TOGETHER)):
        scores: dict[int, LineScore] = {}
        order = sorted(range(len(group)), key=lambda i: len(group[i]))
        for batch in _batches(order, group, predictor.rows_at_once):
            scores.update(zip(batch, _score_batch(predictor, [group[i] for i in batch])))
        yield from (scores[i] for i in range(len(group)))


def _batches(order: list[int], lines: list[Sequence[str]], rows_at_once: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * (len(lines[i]) + 1) > rows_at_once:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _score_batch(predictor: Predictor, lines: list[Sequence[str]]) -> Iterator[LineScore]:
    vocabulary, device = predictor.vocabulary, predictor.device
    length = max(map(len, lines)) + 1
    targets_TN = np.full((length, len(lines)), vocabulary.eos_id, dtype=np.int32)
    for n, line in enumerate(lines):
        targets_TN[: len(line), n] = vocabulary.encode(line)
    tokens_TN = np.vstack([np.full((1, len(lines)), vocabulary.eos_id, dtype=np.int32), targets_TN[:-1]])
    losses_R, _ = predictor.target_losses(
        mx.nd.array(tokens_TN, ctx=device, dtype="int32"),
        mx.nd.array(targets_TN.reshape(-1), ctx=device, dtype="int32"),
        predictor.begin_state(len(lines)),
    )
    log_probs_TN = -losses_R.asnumpy().reshape(targets_TN.shape)
    for n, line in enumerate(lines):
        yield LineScore.of(line, log_probs_TN[: len(line) + 1, n], vocabulary)
