"""The neural cache, held to loops over every word in numpy and float64."""

from __future__ import annotations

import math

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, random_ids, values_of

from gluon_lm.evaluation import neural_cache as cache_module
from gluon_lm.evaluation.neural_cache import NeuralCache
from gluon_lm.evaluation.static import evaluate

EOS = 3
NUM_TOKENS = 57
TEXT = random_ids(NUM_TOKENS)
MODELS = {
    "lstm-tied": {"tied": True},
    "gru-untied": {"model": "gru"},
    "mixture": {"num_experts": 3},
    "adaptive": {"cutoffs": (4,)},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(cache_module, "_ROWS_PER_BLOCK", 8)


def run(model, cache, ids=None, bptt=None):
    return evaluate(model, TEXT if ids is None else ids, EOS, mx.cpu(0), bptt=bptt, window_losses=cache.losses)


def naive_loss(cell, parameters, ids, window, theta, weight):
    """The definition, one word after another."""
    inputs_T1 = np.concatenate([[EOS], ids[:-1]])[:, None]
    hidden_T1H, _, _ = reference.encode(cell, parameters, inputs_T1, reference.zero_states(cell, parameters, 1))
    hidden_TH = hidden_T1H[:, 0]
    log_probs_TV = reference.head_log_probs(parameters, hidden_TH)
    total = 0.0
    for t, word in enumerate(ids):
        before = range(max(0, t - window), t)
        probability = math.exp(log_probs_TV[t, word])
        if before:
            scores = [theta * sum(a * b for a, b in zip(hidden_TH[t], hidden_TH[i])) for i in before]
            terms = [math.exp(score - max(scores)) for score in scores]
            in_cache = sum(term for i, term in zip(before, terms) if ids[i] == word) / sum(terms)
            probability = (1 - weight) * probability + weight * in_cache
        total -= math.log(probability)
    return total


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("window", [1, 5, 8, 20, NUM_TOKENS - 1, 1000])
def test_equals_the_definition(kind, window):
    model = build_model(**MODELS[kind])
    expected = naive_loss(MODELS[kind].get("model", "lstm"), values_of(model), TEXT, window, 1.5, 0.3)
    result = run(model, NeuralCache(window, 1.5, 0.3))
    assert result.num_tokens == NUM_TOKENS
    assert result.loss_sum == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bptt", [1, 2, 7, 8, 9, 56, 57, 500])
def test_the_window_of_the_model_changes_nothing(bptt):
    model = build_model(model="gru")
    expected = naive_loss("gru", values_of(model), TEXT, 11, 1.5, 0.3)
    assert run(model, NeuralCache(11, 1.5, 0.3), bptt=bptt).loss_sum == pytest.approx(expected, rel=1e-5)


def test_no_more_is_computed_at_once_than_is_allowed(monkeypatch):
    model = build_model()
    expected = naive_loss("lstm", values_of(model), TEXT, 1000, 1.5, 0.3)
    monkeypatch.setattr(cache_module, "_BLOCK_ELEMENTS", 200)
    sizes = []
    softmax = mx.nd.softmax
    monkeypatch.setattr(mx.nd, "softmax", lambda x, **how: sizes.append(x.size) or softmax(x, **how))
    assert run(model, NeuralCache(1000, 1.5, 0.3)).loss_sum == pytest.approx(expected, rel=1e-5)
    assert 100 < max(sizes) <= 200


@pytest.mark.parametrize("kind", MODELS)
def test_without_a_share_of_the_cache_the_model_is_left_as_it_is(kind):
    model = build_model(**MODELS[kind])
    expected = evaluate(model, TEXT, EOS, mx.cpu(0), bptt=10)
    assert run(model, NeuralCache(5, 1.5, 0.0), bptt=10) == expected


def test_a_flat_cache_is_the_frequency_of_words():
    """A model with all parameters zero is uniform, so that the perplexity is known in closed form."""
    model = build_model()
    for parameter in model.named_parameters().values():
        parameter.set_data(mx.nd.zeros(parameter.shape))
    ids, window, weight = TEXT, 10, 0.4
    expected = math.log(VOCAB_SIZE)
    for t in range(1, NUM_TOKENS):
        before = ids[max(0, t - window) : t]
        expected -= math.log((1 - weight) / VOCAB_SIZE + weight * np.mean(before == ids[t]))
    for theta in (0.0, 2.0):
        assert run(model, NeuralCache(window, theta, weight)).loss_sum == pytest.approx(expected, rel=1e-6)


def test_words_that_are_not_in_the_cache_keep_their_share_of_the_model(recwarn):
    model, ids, weight = build_model(), np.arange(VOCAB_SIZE, dtype=np.int32), 0.25
    alone = reference.text_loss("lstm", values_of(model), ids, EOS)
    found = run(model, NeuralCache(100, 2.0, weight), ids)
    assert found.loss_sum == pytest.approx(alone - (VOCAB_SIZE - 1) * math.log(1 - weight), rel=1e-5)
    assert not recwarn.list


@pytest.mark.parametrize("theta", [500.0, 9.9e5])
@pytest.mark.parametrize("cell", ["lstm", "rnn_relu"])
def test_scores_that_are_far_apart(cell, theta):
    model = build_model(model=cell)
    expected = naive_loss(cell, values_of(model), TEXT, 20, theta, 0.3)
    assert run(model, NeuralCache(20, theta, 0.3)).loss_sum == pytest.approx(expected, rel=1e-5)


def test_a_word_that_the_model_has_all_but_ruled_out():
    """Its probability is too small for a float32; from its second time on the cache has it."""
    model = build_model(tied=True)
    bias = np.zeros(VOCAB_SIZE)
    bias[TEXT[20]] = -200
    model.head.decoder.bias.set_data(mx.nd.array(bias))
    expected = naive_loss("lstm", values_of(model), TEXT, 1000, 1.5, 0.3)
    assert run(model, NeuralCache(1000, 1.5, 0.3)).loss_sum == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_word_has_no_cache():
    model, ids = build_model(), TEXT[:1]
    alone = reference.text_loss("lstm", values_of(model), ids, EOS)
    assert run(model, NeuralCache(5, 1.0, 0.9), ids).loss_sum == pytest.approx(alone, rel=1e-5)


def test_several_streams_and_parameters_out_of_bounds_are_refused():
    with pytest.raises(ValueError, match="2 streams: the cache reads one"):
        evaluate(build_model(), TEXT, EOS, mx.cpu(0), num_streams=2, window_losses=NeuralCache(5, 1, 0.1).losses)
    for window, theta, weight in ((0, 1, 0.1), (5, -1, 0.1), (5, math.nan, 0.1), (5, 1, 1.0), (5, 1, -0.1)):
        with pytest.raises(ValueError, match="must be 1 or more, 0 or more, and in"):
            NeuralCache(window, theta, weight)
