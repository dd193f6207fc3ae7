"""Dropout whose masks depend on MXNet's seed alone, on every device."""

from __future__ import annotations

from mxnet.gluon import nn


def drop(F, data, rate: float, axes: tuple[int, ...] = ()):
    """Drop elements of an array in training, and scale what is left by 1 / (1 - rate).

    It is MXNet's own operator on GPUs too: cuDNN's draws from a state that is seeded once by C's ``rand`` and that
    `mx.random.seed` does not affect.

    Parameters
    ----------
    F
        `mx.nd` or `mx.sym`.
    data : NDArray or Symbol
    rate : float
        Probability of dropping an element, in [0, 1).
    axes : tuple of int
        Axes along which the mask is shared.
    """
    return F.Dropout(data, p=rate, axes=axes, cudnn_off=True)


class Dropout(nn.Dropout):
    """`nn.Dropout` by way of `drop`."""

    def hybrid_forward(self, F, x):
        return drop(F, x, self._rate, self._axes) if self._rate else F.identity(x)
