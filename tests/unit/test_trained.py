"""A trained model that is loaded: to train on, with its dropout and gradients, or for use, with neither."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from builders import VOCABULARY, build_model, forward_backward, int32, save_run, values_of

import gluon_lm
from gluon_lm.config import read_config
from gluon_lm.models import LanguageModel
from gluon_lm.trained import load_trained

ARCHITECTURE = {"embed_size": 4, "hidden_size": 5, "num_layers": 3}
TOKENS_TN = np.random.RandomState(1).randint(0, len(VOCABULARY), (6, 2))


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run", dropout=0.2)


def in_training(model, seed):
    """Log-probabilities with the dropout of training, if there is any."""
    mx.random.seed(seed)
    with mx.autograd.record():
        return model(int32(TOKENS_TN), *model.begin_state(2, mx.cpu()))[0].asnumpy()


def test_a_model_is_loaded_as_it_was_saved(run):
    model, vocabulary, config, path = gluon_lm.load_model(run, mx.cpu())
    assert (vocabulary, config, path) == (VOCABULARY, read_config(run / "config.yaml"), run / "checkpoints/step-70")
    assert (model.config, model.vocab_size) == (config.model, len(VOCABULARY))
    for loaded in (model, load_trained(run, mx.cpu()).model):
        found, expected = values_of(loaded), values_of(build_model(**ARCHITECTURE))
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name])


def test_a_loaded_model_trains_on_alone_and_beside_another(run):
    model, other = (gluon_lm.load_model(run, mx.cpu())[0] for _ in range(2))
    assert not np.array_equal(in_training(model, 1), in_training(model, 2))
    trainer = mx.gluon.Trainer({**model.collect_params(), **other.collect_params()}, "adam", {"learning_rate": 0.05})
    targets_TN, losses = np.roll(TOKENS_TN, -1, axis=0), {model: [], other: []}
    for _ in range(60):
        for each, found in losses.items():
            loss, _ = forward_backward(each, TOKENS_TN, targets_TN, each.begin_state(2, mx.cpu()))
            found.append(loss)
        trainer.step(TOKENS_TN.size)
    for found in losses.values():
        assert sum(found[-10:]) < 0.8 * sum(found[:10])


def test_a_model_for_use_has_no_dropout_and_no_gradients(run):
    model = load_trained(run, mx.cpu()).model
    np.testing.assert_array_equal(in_training(model, 1), in_training(model, 2))
    for parameter in model.collect_params().values():
        with pytest.raises(RuntimeError):
            parameter.grad()


def test_the_names_of_a_model_for_use_depend_on_the_run_alone(run):
    before = list(load_trained(run, mx.cpu()).model.collect_params())
    build_model(model="gru")
    assert list(load_trained(run, mx.cpu()).model.collect_params()) == before


@pytest.mark.parametrize("grad_req", ["add", "null"])
def test_parameters_that_are_only_allocated_are_zero_on_every_device(run, grad_req):
    devices = [mx.cpu(0), mx.cpu(1)]
    model = LanguageModel(read_config(run / "config.yaml").model, len(VOCABULARY))
    model.allocate_parameters(devices, grad_req)
    for device in devices:
        assert not any(value.any() for value in values_of(model, device).values())
    assert {parameter.grad_req for parameter in model.collect_params().values()} == {grad_req}
