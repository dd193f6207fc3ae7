"""Scales that make 2-bit gradient compression work at one threshold for all parameters.

MXNet's 2-bit compression sends +threshold, 0 or -threshold for each element and keeps the rest for the next step
(Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Strom 2015). The threshold is one absolute number for all
parameters. Gradients of different parameters differ in size by orders of magnitude, and next to a threshold of 0.5
most are so small that nothing is ever sent. So each parameter's gradient is multiplied by a power of two, exact in
floating point, that brings its root mean square to about 1/4: the default threshold of 0.5 is then twice that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..optim.norms import square_sums

CALIBRATION_STEPS = 20
TARGET_RMS = 0.25


class GradientScales:
    """Per-parameter scales, measured on the first `CALIBRATION_STEPS` uncompressed gradients and then frozen.

    Attributes
    ----------
    factors : list of float or None
        A power of two for each parameter; None until calibrated.
    """

    def __init__(self) -> None:
        self.factors: list[float] | None = None
        self._steps = 0
        self._square_sums: np.ndarray | float = 0.0

    def observe(
        self,
        gradients_DP: Sequence[Sequence[mx.nd.NDArray]],
        allgather: Callable[[Sequence[float]], np.ndarray],
    ) -> None:
        """Take in one step's gradients as they would be compressed.

        Parameters
        ----------
        gradients_DP : sequence of sequences of NDArray
            The P parameters' gradients on each of D devices, or of each other unit that compresses separately.
        allgather : callable
            `Communicator.allgather`: the scales must be the same on all workers.
        """
        sums = [square_sums(gradients) for gradients in gradients_DP]
        sums_WP = allgather(sum(s.asnumpy().astype(np.float64) for s in sums).tolist())
        self._square_sums = self._square_sums + sums_WP.sum(axis=0)
        self._steps += 1
        if self._steps == CALIBRATION_STEPS:
            count = len(sums) * len(sums_WP) * self._steps
            sizes = np.array([gradient.size * count for gradient in gradients_DP[0]], dtype=np.float64)
            self.factors = [
                power_of_two_near(TARGET_RMS / rms) if rms > 0 else 1.0 for rms in np.sqrt(self._square_sums / sizes)
            ]

    def state_dict(self) -> dict:
        """Plain JSON values; exact, because Python writes every digit of a float."""
        return {
            "factors": self.factors,
            "steps": self._steps,
            "square_sums": np.asarray(self._square_sums).tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Restore what `state_dict` returned."""
        self.factors, self._steps = state["factors"], state["steps"]
        self._square_sums = np.asarray(state["square_sums"], dtype=np.float64)


def power_of_two_near(value: float) -> float:
    """The power of two nearest to a positive number on a logarithmic scale."""
    return float(2.0 ** np.round(np.log2(value)))


def add_up_at_scale(
    parameters: Sequence[gluon.Parameter],
    factors: Sequence[float] | None,
    add_up: Callable[[int, list[mx.nd.NDArray]], None],
) -> None:
    """Have the gradients of each parameter summed, in place.

    Parameters
    ----------
    parameters : sequence of Parameter
    factors : sequence of float, optional
        Each parameter's scale, if they are compressed. Non-finite elements then make a gradient NaN.
    add_up : callable
        Takes the index of a parameter, and its gradient on each device.
    """
    if factors is None:
        for place, parameter in enumerate(parameters):
            add_up(place, parameter.list_grad())
        return
    non_finite = _nan_unless_finite(parameters)
    for place, (parameter, factor) in enumerate(zip(parameters, factors)):
        grads = parameter.list_grad()
        _multiply(grads, factor)
        add_up(place, grads)
        _multiply(grads, 1 / factor)
    for grad in parameters[-1].list_grad():
        grad += non_finite.as_in_context(grad.context)


def _multiply(arrays: Sequence[mx.nd.NDArray], factor: float) -> None:
    for array in arrays:
        array *= factor


def _nan_unless_finite(parameters: Sequence[gluon.Parameter]) -> mx.nd.NDArray:
    """Zero, or NaN where a gradient on any device is not finite: two bits have no code for it, and send 0 instead."""
    sums = [square_sums(grads).sum() * 0 for grads in zip(*(parameter.list_grad() for parameter in parameters))]
    return mx.nd.add_n(*[total.as_in_context(sums[0].context) for total in sums])
