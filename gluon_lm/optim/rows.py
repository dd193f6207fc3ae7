"""Gradients of which a step fills only few rows: the other rows, all zero, are not cleared, read or applied.

A matrix of 267,735 words and 400 units takes 428 MB. Clearing its gradient, computing its norm and updating it read and
write 2.5 GB, which takes longer than all products of a sampled softmax; 14,000 rows of it take 22 MB. In an untied
embedding, whatever the head, only the rows of the window's words are filled.

This is exact for stochastic gradient descent without weight decay. Weight decay, Adam's moments and an average change
every row at every step, whether it was filled or not, and a reduction over devices sums whole arrays; with any of
these, the cost remains that of whole matrices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..indexing import set_rows

_WORTH_IT = 4  # a matrix must have this many times the filled rows: otherwise gathering them saves nothing


class FilledRows:
    """A model's gradients, and which rows of them are filled.

    Parameters
    ----------
    parameters : mapping of str to gluon.Parameter

    Attributes
    ----------
    by_index : dict of int to NDArray of int32
        By parameter number: the rows, ascending, outside of which its gradient is zero. A parameter that is missing may
        have gradients everywhere.
    """

    def __init__(self, parameters: Mapping[str, gluon.Parameter]) -> None:
        self._parameters = list(parameters.values())
        self._numbers = {name: i for i, name in enumerate(parameters)}
        self.by_index: dict[int, mx.nd.NDArray] = {}

    def note(self, rows: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Record, by parameter, the rows that were filled since the gradients were cleared, in any order."""
        self.by_index = {}
        for name, parts in rows.items():
            number, filled = self._numbers[name], np.unique(np.concatenate(parts))
            parameter = self._parameters[number]
            if len(filled) * _WORTH_IT <= parameter.shape[0]:
                device = parameter.list_ctx()[0]
                self.by_index[number] = mx.nd.array(filled, ctx=device, dtype="int32")

    def clear(self) -> None:
        """Make every gradient zero, on every device."""
        whole = []
        for number, parameter in enumerate(self._parameters):
            rows = self.by_index.get(number)
            if rows is None:
                whole.append(parameter.list_grad())
            else:
                (grad,) = parameter.list_grad()
                set_rows(grad, rows, mx.nd.zeros((len(rows), *grad.shape[1:]), ctx=grad.context))
        for grads in zip(*whole):
            mx.nd.reset_arrays(*grads, num_arrays=len(grads))

    def gradients(self) -> list[mx.nd.NDArray]:
        """The first device's gradients; of those with few filled rows, only these rows."""
        grads = [parameter.list_grad()[0] for parameter in self._parameters]
        return [mx.nd.take(grad, self.by_index[i]) if i in self.by_index else grad for i, grad in enumerate(grads)]
