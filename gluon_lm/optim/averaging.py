"""Averaged SGD: the mean of the weights after each step (Polyak & Juditsky 1992), from when it pays off.

Merity et al. 2017, "Regularizing and Optimizing LSTM Language Models", section 3 and algorithm 1 (NT-ASGD).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import mxnet as mx
from mxnet import gluon


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the last of `losses` is above the lowest of those more than `patience` evaluations before.

    The non-monotonic criterion: a single bad evaluation does not meet it, as ``losses[t] < min(losses[:t])`` would.
    """
    older = losses[: -1 - patience]
    return len(older) > 0 and losses[-1] > min(older)


class WeightAverage:
    """Running mean of a model's weights, kept once, on the device that evaluates.

    Parameters
    ----------
    parameters : mapping of str to gluon.Parameter
    device : Context
        One of the parameters' devices.

    Attributes
    ----------
    count : int
        Steps that the mean is over.
    """

    def __init__(self, parameters: Mapping[str, gluon.Parameter], device: mx.Context) -> None:
        self.count = 0
        self._weights = {name: parameter.data(device) for name, parameter in parameters.items()}
        self._means = {name: mx.nd.zeros_like(weight) for name, weight in self._weights.items()}

    def update(self) -> None:
        """Add the weights as they are after a step."""
        self.count += 1
        share = 1 / self.count
        for name, mean in self._means.items():
            # mean <- (1 - share) * mean + share * weight, in one pass: weight decay of 1, and a gradient of -weight.
            mx.nd.sgd_update(mean, self._weights[name], out=mean, lr=share, wd=1.0, rescale_grad=-1.0)

    @contextlib.contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """A block in which the device's weights are the means; before any step, they do not change."""
        if self.count:
            self._swap()
        try:
            yield
        finally:
            if self.count:
                self._swap()

    def _swap(self) -> None:
        for name, mean in self._means.items():
            weight = self._weights[name]
            held = weight.copy()
            mean.copyto(weight)
            held.copyto(mean)
            del held
            mx.nd.waitall()  # otherwise every copy is made before the first is freed

    def state(self) -> dict[str, mx.nd.NDArray]:
        """The means by parameter name; empty before the first step."""
        return dict(self._means) if self.count else {}

    def load(self, means: Mapping[str, mx.nd.NDArray], count: int) -> None:
        """Restore what `state` returned after `count` steps."""
        self.count = count
        if count:
            for name, mean in self._means.items():
                means[name].copyto(mean)
