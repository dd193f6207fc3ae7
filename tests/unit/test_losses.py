"""Heads and the chunked loss. The conformance tests run for every head of the registry."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import int32, relative_error
from hypothesis import given
from hypothesis import strategies as st
from mxnet.gluon import nn

from gluon_lm import losses
from gluon_lm.losses import backward_through_head, row_chunks, target_losses
from gluon_lm.models import HEADS

V, H, T, N = 11, 5, 6, 4
HEAD = pytest.mark.parametrize("name", sorted(HEADS))
HYBRIDIZE = pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])


def build_head(name, hybridize=True):
    embedding = nn.Embedding(V, H)
    head = HEADS[name](V, H, embedding)
    rng = np.random.RandomState(0)
    for parameter in head.collect_params().values():
        parameter.initialize()
        parameter.set_data(mx.nd.array(rng.uniform(-1, 1, parameter.shape)))
        parameter.grad_req = "add"
    if hybridize:
        head.hybridize(static_alloc=True)
    return head


def parameters_of(head):
    return list(head.collect_params().values())


def sample(seed=0, scale=1.0):
    rng = np.random.RandomState(seed)
    return mx.nd.array(scale * rng.randn(T, N, H)), int32(rng.randint(0, V, T * N))


def gradients_after(head, function):
    """What `function` returns, and the gradients that it adds to the head's parameters."""
    for parameter in parameters_of(head):
        parameter.zero_grad()
    result = function()
    return result, [parameter.grad().asnumpy() for parameter in parameters_of(head)]


# ---------------------------------------------------------------- every head


@HEAD
@HYBRIDIZE
def test_log_probs_are_a_distribution(name, hybridize):
    hidden, _ = sample()
    log_probs = build_head(name, hybridize)(hidden).asnumpy()
    assert log_probs.shape == (T, N, V)
    np.testing.assert_allclose(np.exp(log_probs.astype(np.float64)).sum(-1), 1, rtol=1e-5)


@HEAD
@HYBRIDIZE
def test_backward_agrees_with_autograd_through_the_log_probs(name, hybridize):
    head = build_head(name, hybridize)
    hidden, targets = sample()
    hidden = hidden.reshape((-1, H))

    hidden.attach_grad()

    def through_log_probs():
        with mx.autograd.record():
            expected = -mx.nd.pick(head(hidden), targets)
        expected.backward()
        return expected.asnumpy(), hidden.grad.asnumpy()

    (expected_losses, expected_grad), expected = gradients_after(head, through_log_probs)
    found_losses, found = gradients_after(head, lambda: head.backward(hidden, targets).asnumpy())
    np.testing.assert_allclose(found_losses, expected_losses, rtol=1e-5)
    assert relative_error(hidden.grad.asnumpy(), expected_grad) < 1e-5
    for gradient, by_autograd in zip(found, expected):
        assert np.linalg.norm(by_autograd) > 0
        assert relative_error(gradient, by_autograd) < 1e-5


@HEAD
def test_chunks_change_nothing(name, monkeypatch):
    head = build_head(name)
    hidden, targets = sample()

    def run():
        loss, grad = backward_through_head(head, V, hidden, targets)
        return float(loss.asscalar()), grad.asnumpy(), target_losses(head, V, hidden, targets).asnumpy()

    whole, expected = gradients_after(head, run)
    for rows_in_chunk in (1, 5, 23, 24):
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", rows_in_chunk * V)
        assert len(list(row_chunks(T * N, V))) == -(-T * N // rows_in_chunk)
        chunked, found = gradients_after(head, run)
        assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
        for array, array_of_whole in zip([*chunked[1:], *found], [*whole[1:], *expected]):
            assert relative_error(array, array_of_whole) < 1e-6


@HEAD
@pytest.mark.parametrize("num_targets", [T * N, T * N - 3, 1])
def test_rows_after_the_last_target_count_for_nothing(name, num_targets, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * V)
    head = build_head(name)
    hidden, targets = sample()

    def run(vectors):
        loss, grad = backward_through_head(head, V, vectors, targets[:num_targets])
        return loss.asscalar(), grad.asnumpy().reshape(-1, H)

    (loss, grad), gradients = gradients_after(head, lambda: run(hidden))
    assert np.all(grad[num_targets:] == 0)
    assert np.all(np.abs(grad[:num_targets]).sum(1) > 0)
    elsewhere = hidden.copy().reshape((-1, H))
    if num_targets < T * N:
        elsewhere[num_targets:] = 9.0
    (other_loss, other_grad), other_gradients = gradients_after(head, lambda: run(elsewhere.reshape((T, N, H))))
    assert loss == other_loss
    for array, other in zip([grad, *gradients], [other_grad, *other_gradients]):
        np.testing.assert_array_equal(array, other)
    assert target_losses(head, V, hidden, targets[:num_targets]).shape == (num_targets,)


# ---------------------------------------------------------------- softmax


@HEAD
@HYBRIDIZE
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_softmax_loss_and_gradients_agree_with_numpy(name, hybridize, scale):
    head = build_head(name, hybridize)
    hidden, targets = sample(scale=scale)
    weight, bias = (p.data().asnumpy().astype(np.float64) for p in (head.decoder.weight, head.decoder.bias))
    hidden_RH, rows = hidden.asnumpy().reshape(-1, H).astype(np.float64), np.arange(T * N)
    log_probs = reference.log_softmax(hidden_RH @ weight.T + bias)
    expected_losses = -log_probs[rows, targets.asnumpy()]
    logits_grad = np.exp(log_probs)
    logits_grad[rows, targets.asnumpy()] -= 1

    (loss, grad), _ = gradients_after(head, lambda: backward_through_head(head, V, hidden, targets))
    assert loss.asscalar() == pytest.approx(expected_losses.sum(), rel=1e-5)
    assert relative_error(grad.asnumpy().reshape(-1, H), logits_grad @ weight) < 1e-5
    assert relative_error(head.decoder.weight.grad().asnumpy(), logits_grad.T @ hidden_RH) < 1e-5
    assert relative_error(head.decoder.bias.grad().asnumpy(), logits_grad.sum(0)) < 1e-5
    np.testing.assert_allclose(target_losses(head, V, hidden, targets).asnumpy(), expected_losses, rtol=1e-5, atol=1e-5)


def test_far_apart_logits_give_finite_losses_and_right_gradients():
    head = build_head("softmax")
    logits = np.full(V, -200.0)
    logits[2] = 200.0
    head.decoder.weight.set_data(mx.nd.ones((V, H)))
    head.decoder.bias.set_data(mx.nd.array(logits))
    hidden, targets = mx.nd.zeros((1, 2, H)), int32([2, 3])
    (loss, grad), _ = gradients_after(head, lambda: backward_through_head(head, V, hidden, targets))
    assert np.isfinite(loss.asscalar()) and loss.asscalar() > 80
    assert np.all(grad.asnumpy() == 0)  # each row's gradient sums to zero, and so do equal weights times it
    expected = np.zeros(V)
    expected[2], expected[3] = 1, -1
    np.testing.assert_array_equal(head.decoder.bias.grad().asnumpy(), expected)
    np.testing.assert_allclose(target_losses(head, V, hidden, targets).asnumpy(), [0, 400], atol=1e-5)


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_a_hidden_vector_that_is_not_finite_makes_the_loss_so(what):
    hidden, targets = sample()
    hidden[0, 0, 0] = what
    loss, _ = backward_through_head(build_head("softmax"), V, hidden, targets)
    assert not np.isfinite(loss.asscalar())


# ---------------------------------------------------------------- chunks


@given(st.integers(1, 3000), st.integers(1, 300_000), st.integers(1, 1 << 23))
def test_row_chunks_cover_the_rows_within_the_bound(num_rows, vocab_size, elements):
    before, losses.CHUNK_ELEMENTS = losses.CHUNK_ELEMENTS, elements
    try:
        chunks = list(row_chunks(num_rows, vocab_size))
    finally:
        losses.CHUNK_ELEMENTS = before
    assert [r for chunk in chunks for r in range(chunk.start, chunk.stop)] == list(range(num_rows))
    most = max(1, elements // vocab_size)
    assert max(chunk.stop - chunk.start for chunk in chunks) <= most
    assert len(chunks) <= -(-num_rows // most)
