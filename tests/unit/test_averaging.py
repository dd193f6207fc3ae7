"""Averaged weights: the mean in numpy, a swap that undoes itself, and the published rule for when to begin."""

from __future__ import annotations

import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from hypothesis import given, strategies as st
from mxnet import gluon
from reference import published_trigger

from gluon_lm.optim.averaging import WeightAverage, has_stalled

CPU = mx.cpu(0)
SHAPES = {"embedding": (7, 3), "bias": (5,), "scale": (1,)}


def build_parameters(shapes=SHAPES, num_devices=1):
    parameters = {}
    for name, shape in shapes.items():
        parameters[name] = gluon.Parameter(name, shape=shape)
        parameters[name].initialize(mx.init.Zero(), ctx=[mx.cpu(i) for i in range(num_devices)])
    return parameters


def take_step(parameters, rng):
    """Give the parameters other values, the same on all devices; returns them."""
    drawn = {name: rng.standard_normal(p.shape).astype(np.float32) for name, p in parameters.items()}
    for name, parameter in parameters.items():
        parameter.set_data(mx.nd.array(drawn[name]))
    return drawn


def values_on(parameters, device=CPU):
    return {name: parameter.data(device).asnumpy() for name, parameter in parameters.items()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in found.items():
        np.testing.assert_array_equal(value.asnumpy() if isinstance(value, mx.nd.NDArray) else value, expected[name])


def average_of(parameters, num_steps, device=CPU):
    """An average after some steps, and the weights after each of them."""
    rng, average = np.random.default_rng(5), WeightAverage(parameters, device)
    history = []
    for _ in range(num_steps):
        history.append(take_step(parameters, rng))
        average.update()
    return average, history


# ---------------------------------------------------------------- the mean


@pytest.mark.parametrize("num_steps", [1, 2, 10, 1000])
def test_it_is_the_mean_of_the_weights_after_each_step(num_steps):
    parameters = build_parameters()
    average, history = average_of(parameters, num_steps)
    assert average.count == num_steps
    assert_same(values_on(parameters), history[-1])  # which training goes on from
    for name, mean in average.state().items():
        expected = np.mean([weights[name] for weights in history], axis=0, dtype=np.float64)
        # Every update rounds values of about 1 a few times, and later ones shrink the error of the earlier ones.
        np.testing.assert_allclose(mean.asnumpy(), expected, rtol=0, atol=2e-6)


def test_a_constant_weight_is_its_own_mean():
    parameters = build_parameters({"weight": (100,)})
    parameters["weight"].set_data(mx.nd.array(np.geomspace(1e-20, 1e20, 100)))
    average = WeightAverage(parameters, CPU)
    for _ in range(500):
        average.update()
    expected = parameters["weight"].data().asnumpy()
    np.testing.assert_allclose(average.state()["weight"].asnumpy(), expected, rtol=1e-5)


MEASURE = """
import re
from gluon_lm.optim.averaging import WeightAverage
import mxnet as mx
from mxnet import gluon

def mebibytes(name):
    return int(re.search(name + r":\\s*(\\d+)", open("/proc/self/status").read())[1]) / 1024

parameters = {str(i): gluon.Parameter(str(i), shape=(4 << 20,)) for i in range(8)}
for parameter in parameters.values():
    parameter.initialize(mx.init.One(), ctx=[mx.cpu(0), mx.cpu(1)])
mx.nd.waitall()
before = mebibytes("VmRSS")
average = WeightAverage(parameters, mx.cpu(0))
for _ in range(3):
    average.update()
    with average.in_place_of_weights():
        mx.nd.waitall()
average.state()
mx.nd.waitall()
print(mebibytes("VmHWM") - before)
"""


def test_it_never_takes_more_than_one_more_copy_of_the_parameters():
    """Eight of 16 MiB each; a process of its own, for the peak is one of a whole process."""
    output = subprocess.run([sys.executable, "-c", MEASURE], check=True, capture_output=True, text=True, timeout=120)
    # One of them, while two change places, is room to work in.
    assert 8 * 16 <= float(output.stdout) < (8 + 1.5) * 16


# ---------------------------------------------------------------- in place of the weights


def test_the_means_take_the_weights_place_and_both_come_back_to_the_bit():
    parameters = build_parameters()
    average, history = average_of(parameters, 3)
    means = {name: mean.asnumpy() for name, mean in average.state().items()}
    for _ in range(2):
        with average.in_place_of_weights():
            assert_same(values_on(parameters), means)
        assert_same(values_on(parameters), history[-1])
        assert_same(average.state(), means)


def test_they_come_back_when_an_error_passes():
    parameters = build_parameters()
    average, history = average_of(parameters, 3)
    means = {name: mean.asnumpy() for name, mean in average.state().items()}
    with pytest.raises(KeyboardInterrupt), average.in_place_of_weights():
        raise KeyboardInterrupt
    assert_same(values_on(parameters), history[-1])
    assert_same(average.state(), means)


def test_before_the_first_step_it_changes_nothing():
    parameters = build_parameters()
    weights = take_step(parameters, np.random.default_rng(5))
    average = WeightAverage(parameters, mx.cpu(0))
    assert average.count == 0 and average.state() == {}
    with average.in_place_of_weights():
        assert_same(values_on(parameters), weights)
    assert_same(values_on(parameters), weights)


def test_other_devices_keep_their_weights():
    parameters = build_parameters(num_devices=2)
    average, history = average_of(parameters, 3, mx.cpu(1))
    assert {mean.context for mean in average.state().values()} == {mx.cpu(1)}
    with average.in_place_of_weights():
        assert_same(values_on(parameters, mx.cpu(0)), history[-1])
        assert not np.array_equal(values_on(parameters, mx.cpu(1))["embedding"], history[-1]["embedding"])


# ---------------------------------------------------------------- saved and resumed


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_saved_average_goes_on_as_if_never_stopped(num_steps):
    parameters, others = build_parameters(), build_parameters()
    average, _ = average_of(parameters, num_steps)
    saved = {name: mx.nd.array(mean.asnumpy()) for name, mean in average.state().items()}
    resumed = WeightAverage(others, mx.cpu(0))
    resumed.load(saved, average.count)
    assert resumed.count == average.count
    assert_same(resumed.state(), {name: mean.asnumpy() for name, mean in average.state().items()})
    rng = np.random.default_rng(6)
    for _ in range(3):
        for name, value in take_step(parameters, rng).items():
            others[name].set_data(mx.nd.array(value))
        average.update()
        resumed.update()
    assert_same(resumed.state(), {name: mean.asnumpy() for name, mean in average.state().items()})


# ---------------------------------------------------------------- when to begin


@given(st.lists(st.integers(0, 6).map(float), min_size=1, max_size=15), st.integers(1, 6))
def test_averaging_begins_where_the_published_rule_says(losses, n):
    stalled = [t for t in range(len(losses)) if has_stalled(losses[: t + 1], n)]
    assert (stalled[0] if stalled else None) == published_trigger(losses, n)


@pytest.mark.parametrize(
    ("losses", "n", "stalled"),
    [
        ([], 1, False),
        ([5.0], 1, False),
        ([5.0, 6.0], 1, False),  # worse, but the better one is not older than one evaluation
        ([5.0, 6.0, 6.0], 1, True),
        ([5.0, 6.0, 5.0], 1, False),  # as good as it was
        ([5.0, 6.0, 7.0, 8.0, 9.0, 10.0], 5, False),
        ([5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 5.1], 5, True),
        ([5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 4.9], 5, False),
        ([9.0, 8.0, 1.0, 7.0, 6.0], 2, False),  # the low one is too young
        ([9.0, 8.0, 1.0, 7.0, 6.0, 5.0], 2, True),
    ],
)
def test_when_validation_has_stalled(losses, n, stalled):
    assert has_stalled(losses, n) is stalled
