"""Small models and what tests do with them."""

from __future__ import annotations

import mxnet as mx
import numpy as np

from gluon_lm.config import ModelConfig
from gluon_lm.losses import backward_through_head
from gluon_lm.models import LanguageModel

VOCAB_SIZE = 13


def build_model(devices=None, vocab_size=VOCAB_SIZE, seed=1, hybridize=True, wide=True, **config) -> LanguageModel:
    """An initialised model without dropout; `wide` draws large parameters, so that no unit is near linear."""
    settings = {"model": "lstm", "embed_size": 6, "hidden_size": 5, "num_layers": 2, "dropout": 0.0, **config}
    devices = devices or [mx.cpu(0)]
    model = LanguageModel(ModelConfig(**settings), vocab_size)
    model.initialize_parameters(seed, devices)
    if wide:
        rng = np.random.RandomState(seed)
        for parameter in model.named_parameters().values():
            parameter.set_data(mx.nd.array(rng.uniform(-0.7, 0.7, parameter.shape)))
    if hybridize:
        model.hybridize_for_use()
    return model


def values_of(model, device=None) -> dict[str, np.ndarray]:
    """Parameters by name, in float64."""
    return {
        name: p.data(device or p.list_ctx()[0]).asnumpy().astype(np.float64)
        for name, p in model.named_parameters().items()
    }


def gradients_of(model) -> dict[str, np.ndarray]:
    return {name: p.list_grad()[0].asnumpy() for name, p in model.named_parameters().items()}


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference, size = np.linalg.norm(np.asarray(actual) - expected), np.linalg.norm(expected)
    return difference / size if size else difference


def int32(array, device=None):
    return mx.nd.array(array, dtype="int32", ctx=device or mx.cpu(0))


def forward_backward(model, tokens_TN, targets_TN, states):
    """Summed loss and new states; the parameters' gradients are those of this window alone."""
    for parameter in model.named_parameters().values():
        parameter.zero_grad()
    with mx.autograd.record():
        hidden_TNH, *new_states = model.encoder(int32(tokens_TN), *states)
    loss, grad_TNH = backward_through_head(
        model.head, model.vocab_size, hidden_TNH.detach(), int32(targets_TN.reshape(-1))
    )
    hidden_TNH.backward(grad_TNH)
    return float(loss.asscalar()), [state.detach() for state in new_states]
