"""Heads and the chunked loss. The conformance tests run for every head of the registry."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import int32, relative_error
from hypothesis import given, strategies as st
from mxnet.gluon import nn

from gluon_lm import losses
from gluon_lm.config import ModelConfig
from gluon_lm.losses import backward_through_head, largest_chunk, row_chunks, target_losses
from gluon_lm.models import HEADS

V, H, T, N = 11, 16, 6, 4
# Configurations by name; each head of the registry must have one.
VARIANTS = {
    "softmax": {},
    "softmax-tied": {"tied": True},
    "mixture": {"num_experts": 3, "embed_size": 4, "last_hidden_size": H},
    "mixture-tied": {"num_experts": 3, "embed_size": 4, "last_hidden_size": H, "tied": True},
    "mixture-of-one": {"num_experts": 1},
    "sampled": {"num_sampled": 4},
    "sampled-tied": {"num_sampled": 4, "tied": True},
    "adaptive": {"cutoffs": (2,)},
    "adaptive-of-two-groups": {"cutoffs": (3, 8)},
}
HEAD = pytest.mark.parametrize("name", sorted(VARIANTS))
HYBRIDIZE = pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])


def config_of(name, **settings):
    return ModelConfig(**{"embed_size": H, "hidden_size": H, "dropout": 0.0, **VARIANTS[name], **settings})


def build_head(name, hybridize=True, **settings):
    config = config_of(name, **settings)
    head = HEADS[config.head](config, V, nn.Embedding(V, config.embed_size) if config.tied else None)
    rng = np.random.RandomState(0)
    for parameter in head.collect_params().values():
        parameter.initialize()
        parameter.set_data(mx.nd.array(rng.uniform(-1, 1, parameter.shape)))
        parameter.grad_req = "add"
    if hybridize:
        head.hybridize(static_alloc=True)
    return head


def values_of(head):
    """Its parameters in float64, as `reference` names them."""
    return {f"head.{name}": p.data().asnumpy().astype(np.float64) for name, p in named_parameters(head).items()}


def named_parameters(head):
    return head._collect_params_with_prefix()


def test_every_head_of_the_registry_is_tested():
    assert {config_of(name).head for name in VARIANTS} == set(HEADS)


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
    hidden.attach_grad()

    def through_log_probs():
        with mx.autograd.record():
            expected = -mx.nd.pick(head(hidden).reshape((-1, V)), targets).sum()
        expected.backward()
        return expected.asscalar(), hidden.grad.asnumpy()

    def through_features():
        with mx.autograd.record():
            features = head.features(hidden)
        loss, grad = backward_through_head(head, features.detach(), targets)
        features.backward(grad)
        return loss.asscalar(), hidden.grad.asnumpy()

    (expected_loss, expected_grad), expected = gradients_after(head, through_log_probs)
    (found_loss, found_grad), found = gradients_after(head, through_features)
    assert found_loss == pytest.approx(expected_loss, rel=1e-5)
    assert relative_error(found_grad, expected_grad) < 1e-5
    for gradient, by_autograd in zip(found, expected):
        is_only_prior = by_autograd.shape == (1, H)  # it is 1, whatever its logit
        assert np.linalg.norm(by_autograd) > 0 or is_only_prior
        assert relative_error(gradient, by_autograd) < 1e-5


@HEAD
def test_chunks_change_nothing(name, monkeypatch):
    head = build_head(name)
    hidden, targets = sample()

    def run():
        loss, grad = backward_through_head(head, head.features(hidden), targets)
        return float(loss.asscalar()), grad.asnumpy(), target_losses(head, hidden, targets).asnumpy()

    whole, expected = gradients_after(head, run)
    for rows_in_chunk in (1, 5, 23, 24):
        monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", rows_in_chunk * head.softmaxes_per_row)
        assert len(row_chunks(T * N, head.softmaxes_per_row)) == -(-T * N // rows_in_chunk)
        chunked, found = gradients_after(head, run)
        assert chunked[0] == pytest.approx(whole[0], rel=1e-6)
        for array, array_of_whole in zip([*chunked[1:], *found], [*whole[1:], *expected]):
            assert relative_error(array, array_of_whole) < 1e-6


@HEAD
@pytest.mark.parametrize("num_targets", [T * N, T * N - 3, 1])
def test_rows_after_the_last_target_count_for_nothing(name, num_targets, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", 5)
    head = build_head(name)
    hidden, targets = sample()

    def run(vectors):
        loss, grad = backward_through_head(head, head.features(vectors), targets[:num_targets])
        return loss.asscalar(), grad.asnumpy().reshape(T * N, -1)

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
    assert target_losses(head, hidden, targets[:num_targets]).shape == (num_targets,)


@HEAD
def test_all_chunks_windows_and_evaluations_share_one_workspace_of_the_foretold_size(name, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", 10)
    head, allocated, empty = build_head(name), [], mx.nd.empty

    def noted(shape, **where):
        allocated.append(np.prod(shape))
        return empty(shape, **where)

    monkeypatch.setattr(mx.nd, "empty", noted)
    hidden, targets = sample()
    of_windows = [head.for_window(np.random.default_rng(seed)) for seed in range(3)]
    for of_window in of_windows:
        backward_through_head(of_window, head.features(hidden), targets)
        target_losses(head, hidden, targets)
    # That of a sample is smaller, and has grown once, for the evaluation.
    assert allocated == sorted({largest_chunk(trained, T * N) for trained in (of_windows[0], head)})


# ---------------------------------------------------------------- against numpy


@HEAD
@HYBRIDIZE
@pytest.mark.parametrize("scale", [0.1, 1.0, 8.0])
def test_log_probs_losses_and_gradients_agree_with_numpy(name, hybridize, scale):
    head = build_head(name, hybridize)
    hidden, targets = sample(scale=scale)
    parameters, rows, ids = values_of(head), np.arange(T * N), targets.asnumpy()
    parameters["encoder.embedding.weight"] = parameters.get("head.decoder.weight")
    hidden_RH = hidden.asnumpy().reshape(-1, H).astype(np.float64)
    log_probs_RV = reference.head_log_probs(parameters, hidden_RH)
    expected_losses = -log_probs_RV[rows, ids]
    expected, expected_grad = reference.head_gradients(parameters, hidden_RH, ids)

    np.testing.assert_allclose(head(hidden).asnumpy().reshape(-1, V), log_probs_RV, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(target_losses(head, hidden, targets).asnumpy(), expected_losses, rtol=1e-5, atol=1e-5)
    hidden.attach_grad()

    def run():
        with mx.autograd.record():
            features = head.features(hidden)
        loss, grad = backward_through_head(head, features.detach(), targets)
        features.backward(grad)
        return loss.asscalar(), hidden.grad.asnumpy().reshape(-1, H)

    (loss, grad), _ = gradients_after(head, run)
    assert loss == pytest.approx(expected_losses.sum(), rel=1e-5)
    assert relative_error(grad, expected_grad) < 1e-5
    for parameter_name, parameter in named_parameters(head).items():
        assert relative_error(parameter.grad().asnumpy(), expected[f"head.{parameter_name}"]) < 1e-5, parameter_name


def test_a_mixture_of_one_is_the_softmax_of_its_only_vector():
    mixture, softmax = build_head("mixture-of-one"), build_head("softmax")
    for name in ("weight", "bias"):
        getattr(softmax.decoder, name).set_data(getattr(mixture.decoder, name).data())
    hidden, targets = sample()
    features_TNF = mixture.features(hidden)
    vectors_TNE = features_TNF[:, :, :H]
    assert np.all(features_TNF[:, :, H:].asnumpy() == 0)  # the logarithm of its prior

    def run(head, features):
        loss, grad = backward_through_head(head, features, targets)
        return loss.asscalar(), grad.asnumpy()[:, :, :H]

    (loss, grad), _ = gradients_after(mixture, lambda: run(mixture, features_TNF))
    (expected_loss, expected_grad), _ = gradients_after(softmax, lambda: run(softmax, vectors_TNE))
    assert loss == expected_loss
    np.testing.assert_array_equal(grad, expected_grad)
    for name in ("weight", "bias"):
        found, expected = (getattr(head.decoder, name).grad().asnumpy() for head in (mixture, softmax))
        np.testing.assert_array_equal(found, expected)
    assert np.all(
        target_losses(mixture, hidden, targets).asnumpy() == target_losses(softmax, vectors_TNE, targets).asnumpy()
    )


# ---------------------------------------------------------------- numbers that are hard to hold


def test_far_apart_logits_give_finite_losses_and_right_gradients():
    head = build_head("softmax")
    logits = np.full(V, -200.0)
    logits[2] = 200.0
    head.decoder.weight.set_data(mx.nd.ones((V, H)))
    head.decoder.bias.set_data(mx.nd.array(logits))
    hidden, targets = mx.nd.zeros((1, 2, H)), int32([2, 3])
    (loss, grad), _ = gradients_after(head, lambda: backward_through_head(head, head.features(hidden), targets))
    assert np.isfinite(loss.asscalar()) and loss.asscalar() > 80
    assert np.all(grad.asnumpy() == 0)  # each row's gradient sums to zero, and so do equal weights times it
    expected = np.zeros(V)
    expected[2], expected[3] = 1, -1
    np.testing.assert_array_equal(head.decoder.bias.grad().asnumpy(), expected)
    np.testing.assert_allclose(target_losses(head, hidden, targets).asnumpy(), [0, 400], atol=1e-5)


@HEAD
def test_features_that_are_not_finite_make_the_loss_so(name):
    head = build_head(name)
    hidden, targets = sample()
    features = head.features(hidden)
    features[0, 0, 0] = np.nan
    loss, _ = backward_through_head(head, features, targets)
    assert not np.isfinite(loss.asscalar())


def test_experts_that_give_a_target_no_chance_are_left_alone_and_the_others_learn():
    head = build_head("mixture", tied=False)
    logits = np.zeros(V)
    logits[2] = 1.0
    head.decoder.weight.set_data(mx.nd.array(np.outer(logits, [400.0, 0, 0, 0])))
    features_RKE = np.zeros((2, 3, 4))
    features_RKE[0, 0, 0] = features_RKE[0, 1, 0] = 1.0  # two experts of three are sure of word 2
    features_RKE[1, :, 0] = 1.0  # all of them are
    log_priors_RK = np.log(np.full((2, 3), 1 / 3))
    features_RF = mx.nd.array(np.concatenate([features_RKE.reshape(2, -1), log_priors_RK], axis=1))
    head.decoder.bias.set_data(mx.nd.zeros(V))
    (losses_R, grad_RF), _ = gradients_after(head, lambda: head.backward(features_RF, int32([5, 5])))
    np.testing.assert_allclose(losses_R.asnumpy()[0], np.log(3 * V), rtol=1e-5)
    np.testing.assert_allclose(grad_RF.asnumpy()[0, -3:], [0, 0, -1], atol=1e-6)
    assert 80 < losses_R.asnumpy()[1] < np.inf and np.isfinite(grad_RF.asnumpy()).all()
    exact_R = head.losses(features_RF, int32([5, 5])).asnumpy()
    np.testing.assert_allclose(exact_R, [np.log(3 * V), 400], rtol=1e-5)


# ---------------------------------------------------------------- chunks


@given(st.integers(1, 3000), st.integers(1, 40), st.integers(1, 1024), st.integers(1, 1 << 28))
def test_row_chunks_cover_the_rows_within_the_bound(num_rows, softmaxes_per_row, bound, width):
    before, losses.CHUNK_SOFTMAXES = losses.CHUNK_SOFTMAXES, bound
    try:
        chunks = row_chunks(num_rows, softmaxes_per_row, width)
    finally:
        losses.CHUNK_SOFTMAXES = before
    bound = min(bound, (512 << 20) // (4 * width))
    assert [r for chunk in chunks for r in range(chunk.start, chunk.stop)] == list(range(num_rows))
    most = max(1, bound // softmaxes_per_row)
    sizes = [chunk.stop - chunk.start for chunk in chunks]
    assert max(sizes) == sizes[0] <= most
    assert len(chunks) <= -(-num_rows // most)
