"""The mixture of softmaxes as a part of the model: its shape, its first weights and its dropout."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, assert_drops, build_model, int32, relative_error, values_of

from gluon_lm.config import ModelConfig
from gluon_lm.losses import backward_through_head

T, N, E, K = 5, 6, 40, 3


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("last_hidden_size", "width"), [(None, 6), (9, 9)])
def test_the_last_layer_is_as_wide_as_it_is_told_or_as_the_embedding(tied, last_hidden_size, width):
    model = build_model(num_experts=K, tied=tied, last_hidden_size=last_hidden_size)
    shapes = {name: value.shape for name, value in values_of(model).items()}
    assert shapes["encoder.layers.1.h2h_weight"] == (4 * width, width)
    assert shapes["head.prior.weight"] == (K, width) and "head.prior.bias" not in shapes
    assert shapes["head.latent.weight"] == (K * 6, width) and shapes["head.latent.bias"] == (K * 6,)
    assert shapes.get("head.decoder.weight") == (None if tied else (VOCAB_SIZE, 6))


@pytest.mark.parametrize(
    ("init", "bounds"),
    [
        ("uniform", {"prior.weight": 0.2, "latent.weight": 0.2, "latent.bias": 0.2, "decoder.weight": 0.1}),
        ("xavier", {"prior.weight": (6 / 65) ** 0.5, "latent.weight": (6 / 145) ** 0.5, "latent.bias": 0.0}),
    ],
)
def test_first_weights(init, bounds):
    model = build_model(
        embed_size=E, hidden_size=30, last_hidden_size=25, num_experts=K, init=init, vocab_size=500, wide=False
    )
    if init == "xavier":
        bounds = {**bounds, "prior.weight": (6 / (K + 25)) ** 0.5}
    values = values_of(model)
    for name, bound in bounds.items():
        largest = np.abs(values[f"head.{name}"]).max()
        assert 0.9 * bound <= largest <= bound * (1 + 1e-6), name


def test_dropout_of_the_experts_vectors_is_locked_scaled_and_their_own():
    model = build_model(embed_size=E, num_experts=K, dropout_latent=0.4)
    head = model.head
    hidden_TNH = mx.nd.random.uniform(-1, 1, shape=(T, N, E))
    exact_TNF = head.features(hidden_TNH).asnumpy()
    hidden_TNH.attach_grad()
    mx.random.seed(3)
    with mx.autograd.record():
        features_TNF = head.features(hidden_TNH)
    mask_TND = features_TNF.asnumpy()[..., : K * E] / exact_TNF[..., : K * E]
    assert_drops(mask_TND[0], 0.4)
    np.testing.assert_allclose(mask_TND, np.broadcast_to(mask_TND[:1], mask_TND.shape), rtol=1e-5)
    np.testing.assert_array_equal(features_TNF.asnumpy()[..., K * E :], exact_TNF[..., K * E :])

    targets_R = int32(np.random.RandomState(1).randint(0, VOCAB_SIZE, T * N))
    loss, grad_TNF = backward_through_head(head, features_TNF.detach(), targets_R)
    features_TNF.backward(grad_TNF)
    parameters, hidden_RH = values_of(model), hidden_TNH.asnumpy().reshape(-1, E).astype(np.float64)
    mask_RKE = np.where(mask_TND > 0.5, 1 / 0.6, 0).reshape(-1, K, E)
    log_probs_RV = reference.head_log_probs(parameters, hidden_RH, mask_RKE)
    assert loss.asscalar() == pytest.approx(-log_probs_RV[np.arange(T * N), targets_R.asnumpy()].sum(), rel=1e-5)
    gradients, grad_RH = reference.head_gradients(parameters, hidden_RH, targets_R.asnumpy(), mask_RKE)
    assert relative_error(hidden_TNH.grad.asnumpy().reshape(-1, E), grad_RH) < 1e-5
    for name, gradient in gradients.items():
        found = model.named_parameters()[name].grad().asnumpy()
        assert relative_error(found, gradient) < 1e-5, name


@pytest.mark.parametrize(
    ("settings", "rate"),
    [
        ({"dropout": 0.1}, 0.1),
        ({"dropout": 0.1, "dropout_hidden": 0.2}, 0.2),
        ({"dropout_hidden": 0.2, "dropout_latent": 0.3}, 0.3),
        ({"dropout_hidden": 0.2, "dropout_latent": 0.0}, 0.0),
    ],
)
def test_the_rate_of_that_dropout_falls_back_on_that_between_the_layers(settings, rate):
    config = ModelConfig(num_experts=K, **settings)
    assert config.latent_dropout == rate
    assert config.without_dropout().latent_dropout == 0
