"""2-bit gradient compression, with scales that make it work at one threshold for all parameters.

MXNet's 2-bit compression sends +threshold, 0 or -threshold for each element and keeps the rest for the next step
(Seide et al. 2014, "1-Bit Stochastic Gradient Descent"; Strom 2015). The threshold is one absolute number for all
parameters. Gradients of different parameters differ in size by orders of magnitude, and next to a threshold of 0.5
most are so small that nothing is ever sent. So each parameter's gradient is multiplied by a power of two, exact in
floating point, that brings its root mean square to about 1/4: the default threshold of 0.5 is then twice that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..errors import CheckpointError, reason
from ..optim.norms import square_sums

CALIBRATION_STEPS = 20
TARGET_RMS = 0.25


@dataclass
class Compression:
    """Gradients sent in two bits: each parameter's scale, and whether residuals wait to be sent.

    The scales are measured on the first `CALIBRATION_STEPS` gradients, which are not compressed, and then frozen.

    Attributes
    ----------
    num_devices : int
        Devices of all workers, which share a batch: the scales are those of their gradients.
    threshold : float
        Of a gradient whose root mean square is about 1/4.
    unsent : bool
        Whether residuals, what has not been sent yet, may wait.
    factors : list of float or None
        A power of two for each parameter; None until they are measured.
    steps : int
    square_sums : list of float
        What has been measured: steps, and each parameter's sum of squares over their gradients.
    """

    num_devices: int
    threshold: float
    unsent: bool = False
    factors: list[float] | None = None
    steps: int = 0
    square_sums: list[float] = field(default_factory=list)

    def next_factors(
        self,
        read_gradients_DP: Callable[[], Sequence[Sequence[mx.nd.NDArray]]],
        allgather: Callable[[Sequence[float]], np.ndarray],
    ) -> list[float] | None:
        """The scales at which a step's gradients are compressed; None while these are measured and none is compressed.

        Parameters
        ----------
        read_gradients_DP : callable
            Returns the P parameters' gradients on each of D devices, or of each other unit that compresses separately.
        allgather : callable
            `Communicator.allgather`: the scales must be the same on all workers.
        """
        if self.factors is None:
            self._measure(read_gradients_DP(), allgather)
            return None
        self.unsent = True
        return self.factors

    def _measure(self, gradients_DP, allgather) -> None:
        sums = [square_sums(gradients) for gradients in gradients_DP]
        sums_WP = allgather(sum(s.asnumpy().astype(np.float64) for s in sums).tolist())
        self.square_sums = np.add(self.square_sums or 0.0, sums_WP.sum(axis=0)).tolist()
        self.steps += 1
        if self.steps == CALIBRATION_STEPS:
            count = len(sums) * len(sums_WP) * self.steps
            sizes = np.array([gradient.size * count for gradient in gradients_DP[0]], dtype=np.float64)
            self.factors = [
                power_of_two_near(TARGET_RMS / rms) if rms > 0 else 1.0 for rms in np.sqrt(self.square_sums / sizes)
            ]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON values; exact, because Python writes every digit of a float."""
        return dataclasses.asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Compression:
        """What `state_dict` was called on; `CheckpointError` if it is not from there."""
        try:
            return cls(**state)
        except TypeError as error:
            raise CheckpointError(
                f"the checkpoint's state of 2-bit compression is damaged ({reason(error)}); use another checkpoint"
            ) from error


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
