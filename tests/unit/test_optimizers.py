"""Optimisers against numpy, and their state taken out and put back."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import relative_error
from mxnet import gluon

from gluon_lm.config import OptimConfig
from gluon_lm.errors import CheckpointError
from gluon_lm.optim.optimizers import OPTIMIZERS, create_optimizer, load_optimizer_state, optimizer_state

SHAPES = {"matrix": (4, 3), "bias": (5,)}
NAMES = list(SHAPES)


def build(devices, optimizer="adam", lr=0.1, weight_decay=0.0):
    """A trainer as the training step has it, and its parameters."""
    rng = np.random.RandomState(0)
    parameters = []
    for name, shape in SHAPES.items():
        parameter = gluon.Parameter(name, shape=shape)
        parameter.initialize(mx.init.Zero(), ctx=devices)
        parameter.set_data(mx.nd.array(rng.randn(*shape)))
        parameters.append(parameter)
    config = OptimConfig(optimizer=optimizer, lr=lr, weight_decay=weight_decay)
    return gluon.Trainer(parameters, create_optimizer(config), kvstore=None), parameters


def gradients(step):
    rng = np.random.RandomState(100 + step)
    return {name: rng.randn(*shape).astype(np.float32) for name, shape in SHAPES.items()}


def take_step(trainer, parameters, step):
    for parameter, value in zip(parameters, gradients(step).values()):
        with mx.autograd.record():
            losses = [(data * mx.nd.array(value, ctx=data.context)).sum() for data in parameter.list_data()]
        mx.autograd.backward(losses)
    trainer.update(2)


def values(parameters, device=0):
    return [parameter.list_data()[device].asnumpy() for parameter in parameters]


@pytest.mark.parametrize(
    "optimizer",
    [
        ("sgd", reference.SGD(0.1)),
        ("sgd", reference.SGD(0.1, weight_decay=0.3)),
        ("adam", reference.Adam(0.1)),
    ],
    ids=["sgd", "sgd-weight-decay", "adam"],
)
def test_updates_agree_with_numpy(optimizer):
    name, expected = optimizer
    trainer, parameters = build([mx.cpu(0)], name, expected.lr, getattr(expected, "weight_decay", 0.0))
    arrays = dict(zip(NAMES, (value.astype(np.float64) for value in values(parameters))))
    for step in range(5):
        take_step(trainer, parameters, step)
        expected.update(arrays, {key: value / 2.0 for key, value in gradients(step).items()})
        for value, array in zip(values(parameters), arrays.values()):
            assert relative_error(value, array) < 1e-5


def test_adam_has_two_arrays_for_each_parameter_and_sgd_none():
    for name, count in (("sgd", 0), ("adam", 2)):
        trainer, parameters = build([mx.cpu(0)], name)
        take_step(trainer, parameters, 0)
        state = optimizer_state(trainer, NAMES)
        assert sorted(state) == sorted(f"{key}/{k}" for key in NAMES for k in range(count))
        assert all(array.shape == SHAPES[key.split("/")[0]] for key, array in state.items())


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_restored_optimizer_goes_on_as_if_never_stopped(optimizer, num_devices):
    trainer, parameters = build([mx.cpu(0)], optimizer)
    for step in range(3):
        take_step(trainer, parameters, step)
    saved = {key: mx.nd.array(array.asnumpy()) for key, array in optimizer_state(trainer, NAMES).items()}

    devices = [mx.cpu(i) for i in range(num_devices)]
    resumed_trainer, resumed = build(devices, optimizer)
    for parameter, value in zip(resumed, values(parameters)):
        parameter.set_data(mx.nd.array(value))
    load_optimizer_state(resumed_trainer, NAMES, saved, num_updates=3)
    for step in range(3, 6):
        take_step(trainer, parameters, step)
        take_step(resumed_trainer, resumed, step)
        for device in range(num_devices):
            for value, expected in zip(values(resumed, device), values(parameters)):
                np.testing.assert_array_equal(value, expected)


def test_saved_arrays_are_not_changed_by_later_steps():
    trainer, parameters = build([mx.cpu(0)])
    take_step(trainer, parameters, 0)
    saved = {key: mx.nd.array(array.asnumpy()) for key, array in optimizer_state(trainer, NAMES).items()}
    copies = {key: array.asnumpy() for key, array in saved.items()}
    resumed_trainer, resumed = build([mx.cpu(0)])
    load_optimizer_state(resumed_trainer, NAMES, saved, num_updates=1)
    take_step(resumed_trainer, resumed, 1)
    for key, array in saved.items():
        np.testing.assert_array_equal(array.asnumpy(), copies[key])


def test_before_the_first_update_there_is_nothing_to_restore():
    trainer, parameters = build([mx.cpu(0)])
    load_optimizer_state(trainer, NAMES, {}, num_updates=0)
    fresh_trainer, fresh = build([mx.cpu(0)])
    take_step(trainer, parameters, 0)
    take_step(fresh_trainer, fresh, 0)
    for value, expected in zip(values(parameters), values(fresh)):
        np.testing.assert_array_equal(value, expected)


@pytest.mark.parametrize(("saved_by", "read_by"), [("sgd", "adam"), ("adam", "sgd")])
def test_the_state_of_another_optimizer_is_refused(saved_by, read_by):
    trainer, parameters = build([mx.cpu(0)], saved_by)
    take_step(trainer, parameters, 0)
    other, _ = build([mx.cpu(0)], read_by)
    with pytest.raises(CheckpointError, match="another optimiser"):
        load_optimizer_state(other, NAMES, optimizer_state(trainer, NAMES), num_updates=1)


def test_learning_rate_can_change():
    trainer, parameters = build([mx.cpu(0)], "sgd", lr=1.0)
    before = values(parameters)
    trainer.set_learning_rate(0.25)
    take_step(trainer, parameters, 0)
    for old, new, gradient in zip(before, values(parameters), gradients(0).values()):
        np.testing.assert_allclose(new, old - 0.25 * gradient / 2, rtol=1e-5, atol=1e-6)


def test_elements_of_the_gradient_are_clipped_where_sgd_is_told_so():
    weight, gradient = mx.nd.array([1, 2, 3]), mx.nd.array([5, -5, 0.25])
    sgd = OPTIMIZERS["sgd"](learning_rate=2, clip_gradient=0.5)
    sgd.update(0, weight, gradient, sgd.create_state(0, weight))
    np.testing.assert_allclose(weight.asnumpy(), [1 - 1, 2 + 1, 3 - 0.5], rtol=1e-6)
