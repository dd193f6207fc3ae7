"""Words drawn from a distribution: frequencies, cut-offs, streams of their own."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, strategies as st

from gluon_lm.generation.sampling import Sampler, Sampling

UNK = 0


class Given(mx.gluon.HybridBlock):
    """A network whose scores are what it is given."""

    def hybrid_forward(self, F, scores_NV):
        return (scores_NV,)


def draw(logits_NV, sampling, uniforms_N=None, seed=0):
    """Words for each row of logits, each with its own way of drawing."""
    count, vocab_size = logits_NV.shape
    log_probs_NV = mx.nd.log_softmax(mx.nd.array(logits_NV), axis=-1)
    uniforms_N = np.random.RandomState(seed).random_sample(count) if uniforms_N is None else uniforms_N
    words_1N, _ = Sampler(Given(), sampling, vocab_size, UNK, mx.cpu())(log_probs_NV, [], uniforms_N)
    return words_1N.asnumpy()[0]


def probabilities(logits_V, sampling):
    """The distribution that is meant, in float64."""
    logits_V = logits_V.astype(np.float64).copy()
    if sampling.suppress_unk:
        logits_V[UNK] = -np.inf
    scaled_V = logits_V / sampling.temperature
    probs_V = np.exp(scaled_V - scaled_V.max())
    probs_V /= probs_V.sum()
    order = np.argsort(-probs_V, kind="stable")
    kept = np.ones(len(probs_V), bool)
    if sampling.top_k is not None:
        kept[order[sampling.top_k :]] = False
    probs_V = np.where(kept, probs_V, 0) / probs_V[kept].sum()
    if sampling.top_p is not None:
        before = np.cumsum(probs_V[order]) - probs_V[order]
        probs_V[order[before >= sampling.top_p]] = 0
        probs_V /= probs_V.sum()
    return probs_V


WAYS = [
    Sampling(),
    Sampling(temperature=0.5),
    Sampling(temperature=2.0),
    Sampling(suppress_unk=True),
    Sampling(top_k=5),
    Sampling(top_p=0.7),
    Sampling(temperature=1.5, top_k=7, top_p=0.8, suppress_unk=True),
]


@pytest.mark.parametrize("vocab_size", [11, 256, 700])
@pytest.mark.parametrize("sampling", WAYS, ids=str)
def test_frequencies_fit_the_distribution(sampling, vocab_size):
    logits_V = np.random.RandomState(vocab_size).normal(0, 2, vocab_size)
    rows, times, rng = 2000, 50, np.random.RandomState(3)
    sampler = Sampler(Given(), [sampling] * rows, vocab_size, UNK, mx.cpu())
    log_probs_NV = mx.nd.log_softmax(mx.nd.array(np.tile(logits_V, (rows, 1))), axis=-1)
    counts_V = np.zeros(vocab_size)
    for _ in range(times):
        words_1N, _ = sampler(log_probs_NV, [], rng.random_sample(rows))
        counts_V += np.bincount(words_1N.asnumpy()[0], minlength=vocab_size)
    expected_V = probabilities(logits_V, sampling) * rows * times
    assert (counts_V[expected_V == 0] == 0).all()
    common = expected_V >= 5
    observed = np.append(counts_V[common], counts_V[~common].sum())
    expected = np.append(expected_V[common], expected_V[~common].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < freedom + 6 * np.sqrt(2 * freedom) + 12  # one in a million


@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 255, 256, 257, 600]))
def test_no_word_without_probability_is_ever_drawn(seed, vocab_size):
    rng = np.random.RandomState(seed)
    possible = rng.random_sample(vocab_size) < 0.05
    possible[rng.randint(vocab_size)] = True
    logits_V = np.where(possible, rng.normal(0, 3, vocab_size), -np.inf)
    edges = [0.0, 1.0, np.nextafter(1, 0), 1e-30, *rng.random_sample(12)]
    words = draw(np.tile(logits_V, (16, 1)), [Sampling()] * 16, np.array(edges))
    assert possible[words].all()


def test_the_uniform_number_decides_the_word_by_the_cumulative_distribution():
    logits_V = np.random.RandomState(1).normal(0, 1, 900)
    uniforms = np.linspace(0.001, 0.999, 500)
    words = draw(np.tile(logits_V, (500, 1)), [Sampling()] * 500, uniforms)
    cumulative = np.cumsum(probabilities(logits_V, Sampling()))
    assert (cumulative[words] > uniforms - 1e-5).all()
    assert (np.concatenate([[0], cumulative])[words] < uniforms + 1e-5).all()


def test_a_word_without_any_chance_has_none_at_the_highest_temperature():
    ways = [Sampling(temperature=1e30, suppress_unk=True)] * 400
    assert UNK not in draw(np.zeros((400, 5)), ways)


def test_each_stream_draws_in_its_own_way():
    rng = np.random.RandomState(5)
    logits_NV, uniforms_N = rng.normal(0, 2, (len(WAYS), 300)), rng.random_sample(len(WAYS))
    together = draw(logits_NV, WAYS, uniforms_N)
    alone = [draw(logits_NV[n : n + 1], [way], uniforms_N[n : n + 1])[0] for n, way in enumerate(WAYS)]
    assert together.tolist() == alone
    greedy = draw(logits_NV, [Sampling(temperature=0), *WAYS[1:]], uniforms_N)
    assert greedy[0] == logits_NV[0].argmax()
    assert greedy[1:].tolist() == alone[1:]


def test_a_cut_near_one_leaves_out_the_tail_of_a_large_vocabulary():
    """Whose running sum in float32 ends below the sum, so that a share of the latter would be reached by no word."""
    probs_V = np.arange(1, 260_001.0) ** -1.5
    probs_V /= probs_V.sum()
    num_kept = np.searchsorted(np.cumsum(probs_V), 0.999) + 1  # about a third
    uniforms_N = np.full(1, 1 - 2**-22)
    (word,) = draw(np.log(probs_V)[None], [Sampling(top_p=0.999)], uniforms_N)
    assert word < 1.3 * num_kept


def test_equally_likely_words_at_the_edge_are_all_kept():
    logits_V = np.array([0.0, 1.0, 1.0, 1.0, 0.0])
    words = draw(np.tile(logits_V, (400, 1)), [Sampling(top_k=2)] * 400)
    assert set(words) == {1, 2, 3}


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": np.nan},
        {"temperature": np.inf},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": -1},
    ],
    ids=str,
)
def test_impossible_values_are_refused(values):
    with pytest.raises(ValueError, match=f"{next(iter(values))} .*: must be "):
        Sampling(**values)
