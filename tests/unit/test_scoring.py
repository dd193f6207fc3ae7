"""Scores of lines and words against the reference."""

from __future__ import annotations

import math

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, values_of

from gluon_lm import scoring
from gluon_lm.data import Vocabulary
from gluon_lm.prediction import ModelPredictor

VOCABULARY = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))


def lines(count, seed=0):
    rng = np.random.RandomState(seed)
    return [[f"w{i}" for i in rng.randint(0, VOCAB_SIZE, rng.randint(0, 12))] for _ in range(count)]


@pytest.mark.parametrize("cell, head", [("lstm", {}), ("rnn_tanh", {}), ("lstm", {"cutoffs": (4,)})])
def test_each_line_is_scored_on_its_own_its_end_included(cell, head, monkeypatch):
    monkeypatch.setattr(scoring, "_LINES_SORTED_TOGETHER", 7)
    monkeypatch.setattr(ModelPredictor, "rows_at_once", 30)
    model = build_model(model=cell, **head)
    predictor = ModelPredictor(model, VOCABULARY, "whitespace", mx.cpu())
    parameters, given = values_of(model), lines(25)
    scores = list(scoring.score_lines(predictor, iter(given)))
    assert [score.words for score in scores] == [[*line, "<eos>"] for line in given]
    for line, score in zip(given, scores):
        targets = [*VOCABULARY.encode(line), VOCABULARY.eos_id]
        tokens_T1 = np.array([VOCABULARY.eos_id, *targets[:-1]])[:, None]
        log_probs, _ = reference.log_probs(cell, parameters, tokens_T1, reference.zero_states(cell, parameters, 1))
        expected = log_probs[np.arange(len(targets)), 0, targets]
        np.testing.assert_allclose(score.log_probs, expected, rtol=1e-5)
        assert score.log_prob == pytest.approx(expected.sum(), rel=1e-5)
        assert score.perplexity == pytest.approx(math.exp(-expected.mean()), rel=1e-5)
        assert score.is_unknown == [word not in VOCABULARY for word in (*line, "<eos>")]


@pytest.mark.parametrize("head", [{}, {"num_experts": 2}])
def test_a_long_line_is_read_in_pieces(head, monkeypatch):
    predictor = ModelPredictor(build_model(**head), VOCABULARY, "whitespace", mx.cpu())
    long_line = [f"w{i % 7}" for i in range(100)]
    (whole,) = scoring.score_lines(predictor, [long_line])
    prompt_TN = VOCABULARY.encode(long_line)[:, None]
    read = predictor.read(prompt_TN, predictor.begin_state(1))
    sizes, encode = [], predictor._model.encoder.forward
    monkeypatch.setattr(ModelPredictor, "rows_at_once", 30)
    monkeypatch.setattr("gluon_lm.prediction._TOKENS_READ_AT_ONCE", 30)
    monkeypatch.setattr(
        predictor._model.encoder, "forward", lambda x, *states: sizes.append(x.shape[0]) or encode(x, *states)
    )
    (in_pieces,) = scoring.score_lines(predictor, [long_line])
    np.testing.assert_allclose(in_pieces.log_probs, whole.log_probs, rtol=1e-5)
    for state, expected in zip(predictor.read(prompt_TN, predictor.begin_state(1)), read):
        np.testing.assert_allclose(state.asnumpy(), expected.asnumpy(), rtol=1e-5)
    assert sizes == [30, 30, 30, 11, 30, 30, 30, 10]


def test_no_lines_have_no_scores():
    predictor = ModelPredictor(build_model(), VOCABULARY, "whitespace", mx.cpu())
    assert list(scoring.score_lines(predictor, [])) == []
