"""Gradients with two bits per element, and the rounding error carried over to the next step (error feedback).

Seide et al. 2014, "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel Distributed Training of
Speech DNNs"; Strom 2015, "Scalable Distributed DNN Training Using Commodity GPU Cloud Computing".

Shapes: W workers, B bytes of one worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import mxnet as mx
import numpy as np

from ..errors import CheckpointError
from ..optim.norms import square_sums

CODES_PER_BYTE = 4
_NOTHING = 0b01010101  # the byte of four zeros: codes 0, 1 and 2 send -1, 0 and +1
_NOT_FINITE = 0b11111111  # code 3 sends NaN

# Elements that are processed at a time: on a CPU the working set then stays in its cache, which halves the time.
_PIECE = {"cpu": 1 << 17, "gpu": 1 << 24}


class _Piece(NamedTuple):
    """Some elements of one parameter's gradient, and where they are in the residual, padded to whole bytes."""

    parameter: int
    start: int
    stop: int
    offset: int
    padded_stop: int


class TwoBitCodec:
    """Sends +t, 0 or -t for each element of a gradient, t being its parameter's threshold, and keeps the remainder.

    In units of the threshold, and in float32: the gradient is added to the residual v, the code is v rounded towards
    zero and clipped to [-1, 1], and it is subtracted from v. So what was sent and what has not been sent yet always add
    up to the gradients. Thresholds that are powers of two make this exact on every device.

    Parameters
    ----------
    sizes : sequence of int
        Elements of each parameter.
    thresholds : sequence of float
        Of each parameter, in units of its gradient.
    device : Context
    residual : NDArray, optional
        `residual` of the codec that this one continues; zero by default.

    Attributes
    ----------
    residual : NDArray
        What has not been sent yet: float32, in units of the thresholds, one parameter after the other, each padded with
        zeros to a multiple of four.

    Raises
    ------
    CheckpointError
        If the residual is of other parameters.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        thresholds: Sequence[float],
        device: mx.Context,
        residual: mx.nd.NDArray | None = None,
    ) -> None:
        self._thresholds = [float(threshold) for threshold in thresholds]
        self._pieces = list(_cut(sizes, _PIECE.get(device.device_type, _PIECE["gpu"])))
        num_elements = self._pieces[-1].padded_stop
        self._num_bytes = num_elements // CODES_PER_BYTE + 1
        if residual is not None and residual.shape != (num_elements,):
            raise CheckpointError(
                f"the residuals of 2-bit compression have shape {residual.shape} and must have {(num_elements,)}; they "
                "are of another model: use the flags that it was trained with"
            )
        self.residual = mx.nd.zeros((num_elements,), ctx=device) if residual is None else residual.copyto(device)
        places = CODES_PER_BYTE ** np.arange(CODES_PER_BYTE)
        self._weight = mx.nd.array(places.reshape(1, -1), ctx=device, dtype="float32")
        self._bias = mx.nd.array([_NOTHING], ctx=device, dtype="float32")
        codes = np.arange(256).reshape(-1, 1) // places % 4
        self._table = mx.nd.array(np.where(codes == 3, np.nan, codes - 1.0), ctx=device, dtype="float32")
        self._tables = [self._table * threshold for threshold in self._thresholds]

    def encode(self, gradients: Sequence[mx.nd.NDArray]) -> mx.nd.NDArray:
        """Take in one step's gradients.

        Parameters
        ----------
        gradients : sequence of NDArray
            Of each parameter, on the device; they are not changed.

        Returns
        -------
        NDArray
            uint8 of shape (B,): four consecutive elements per byte, the first in its lowest bits, and a last byte that
            says whether all were finite. If not, the residual is not finite either from then on.
        """
        flat = [gradient.reshape((-1,)) for gradient in gradients]
        bytes_B = mx.nd.empty((self._num_bytes,), ctx=self.residual.context, dtype="uint8")
        for parameter, start, stop, offset, padded_stop in self._pieces:
            gradient, residual = flat[parameter][start:stop], self.residual[offset:padded_stop]
            unpadded = self.residual[offset : offset + stop - start]
            # residual + gradient / threshold in one pass, by the operator for a step of gradient descent.
            mx.nd.sgd_update(unpadded, gradient, lr=-1 / self._thresholds[parameter], wd=0, out=unpadded)
            signs = residual >= 1
            signs -= residual <= -1  # clipping and rounding would give the same, but take four times as long
            residual -= signs
            packed = mx.nd.FullyConnected(
                signs.reshape((-1, CODES_PER_BYTE)), self._weight, self._bias, num_hidden=1
            ).reshape((-1,))
            mx.nd.cast(packed, dtype="uint8", out=bytes_B[offset // CODES_PER_BYTE : padded_stop // CODES_PER_BYTE])
        is_finite = square_sums([self.residual]) * 0 == 0
        mark = _NOT_FINITE - (_NOT_FINITE - _NOTHING) * is_finite
        mx.nd.cast(mark, dtype="uint8", out=bytes_B[self._num_bytes - 1 :])
        return bytes_B

    def decode(self, bytes_WB: mx.nd.NDArray, gradients: Sequence[mx.nd.NDArray]) -> None:
        """Set the gradients, in place, to the sum of what all ranks sent; not finite where one of them was not.

        Parameters
        ----------
        bytes_WB : NDArray
            What `encode` returned on each rank, in the same order on all.
        gradients : sequence of NDArray
        """
        flat = [gradient.reshape((-1,)) for gradient in gradients]
        ranks = [bytes_WB[rank] for rank in range(len(bytes_WB))]
        for parameter, start, stop, offset, padded_stop in self._pieces:
            first, last = offset // CODES_PER_BYTE, padded_stop // CODES_PER_BYTE
            sent = [mx.nd.take(self._tables[parameter], rank[first:last]).reshape((-1,)) for rank in ranks]
            mx.nd.add_n(*[array[: stop - start] for array in sent], out=flat[parameter][start:stop])
        some_element = flat[0][:1]
        for rank in ranks:
            some_element += mx.nd.take(self._table, rank[self._num_bytes - 1 :]).sum()


def residual_size(sizes: Sequence[int]) -> int:
    """Elements of the residual of parameters of these sizes."""
    return sum(-(-size // CODES_PER_BYTE) * CODES_PER_BYTE for size in sizes)


def _cut(sizes: Sequence[int], piece_size: int) -> Iterator[_Piece]:
    offset = 0
    for parameter, size in enumerate(sizes):
        for start in range(0, size, piece_size):
            stop = min(start + piece_size, size)
            padded_stop = offset + -(-(stop - start) // CODES_PER_BYTE) * CODES_PER_BYTE
            yield _Piece(parameter, start, stop, offset, padded_stop)
            offset = padded_stop
