"""What the curves of a report are made of: smoothing, scales, ticks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, strategies as st

from gluon_lm.reporting.curves import Curve, Panel, brief, linear_ticks, log_ticks, smoothed, thinned, tick_label

positive = st.floats(1e-6, 1e9)


def test_smoothing_keeps_what_is_smooth_and_takes_noise_away():
    steps = np.arange(400.0)
    decay = np.exp(5 - steps / 100)
    inner = slice(20, -20)
    np.testing.assert_allclose(smoothed(decay)[inner], decay[inner], rtol=1e-12)  # straight, by its logarithm
    np.testing.assert_allclose(smoothed(np.full(7, 3.0)), 3.0)
    noise = np.random.RandomState(1).normal(0, 0.3, 400)
    left = np.log(smoothed(decay * np.exp(noise))) - np.log(decay)
    # The mean over a bell curve of deviation s leaves a share 1 / sqrt(2 sqrt(pi) s) of white noise; s is 4 here.
    assert np.std(left[inner]) == pytest.approx(0.3 / math.sqrt(2 * math.sqrt(math.pi) * 4), rel=0.25)
    assert abs(np.mean(left[inner])) < 0.05  # and shifts nothing
    with_zeros = np.where(steps % 2, 1.0, 0.0)
    assert np.ptp(smoothed(with_zeros)[inner]) < 0.01


@given(st.integers(1, 5000))
def test_thinning_keeps_both_ends_and_the_order(count):
    steps, values = thinned(np.arange(count), np.arange(count) * 2.0)
    assert steps[0] == 0 and steps[-1] == count - 1 and len(steps) <= 800
    assert (np.diff(steps) > 0).all() and (values == 2 * steps).all()


def test_thinning_keeps_every_spike():
    values = np.sin(np.arange(20_000) / 3000)
    values[[1234, 9999]] = 5, -5
    steps, kept = thinned(np.arange(20_000), values)
    assert len(steps) <= 800 and {1234, 9999} <= set(steps) and (kept == values[steps]).all()


@pytest.mark.parametrize("values", [[60.0, math.exp(708.9)], [1e-310, 1.0], [math.exp(708.9)], [1.3e308]])
def test_a_scale_holds_the_largest_and_the_smallest_numbers(values):
    values = np.array(values)
    curve = Curve(0, np.arange(1.0, len(values) + 1), values, values)
    panel = Panel("key", "title", ",.2f", "lowest", [curve], len(values) > 1)
    low, high = panel.range
    assert 0 < low <= values.min() and values.max() <= high < math.inf
    assert (panel.height(values) >= 0).all() and (panel.height(values) <= 1).all()
    assert panel.ticks() and all(len(tick_label(tick)) <= 8 for tick in panel.ticks())
    assert all(len(brief(value, panel.form)) <= 9 for value in values)


@given(positive, positive, st.integers(3, 10))
def test_linear_ticks_are_evenly_apart_and_within(one, other, most):
    low, high = min(one, other), max(one, other)
    if high - low < 1e-6 * high:
        return
    ticks = np.array(linear_ticks(low, high, most))
    assert len(ticks) <= most + 1 and (ticks >= low - 1e-6 * high).all() and (ticks <= high * (1 + 1e-6)).all()
    if len(ticks) > 2:
        np.testing.assert_allclose(np.diff(ticks), ticks[1] - ticks[0], rtol=1e-6)


@given(positive, st.floats(1.2, 1e9))
def test_log_ticks_are_round_and_within(low, ratio):
    ticks = log_ticks(low, low * ratio)
    assert 1 <= len(ticks) <= 8 and ticks == sorted(set(ticks))
    assert all(low * 0.999 <= tick <= low * ratio * 1.001 for tick in ticks)
    assert all(len(f"{tick:.6g}".replace(".", "").strip("0").split("e")[0]) <= 4 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "label"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (150, "150"),
        (1500, "1,500"),
        (20000, "20k"),
        (2.5e6, "2.5M"),
        (1e-05, "1e-05"),
        (2e9, "2e+09"),
    ],
)
def test_labels_of_ticks_are_short(value, label):
    assert tick_label(value) == label
