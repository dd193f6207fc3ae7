"""Elements and rows of an array, set in place by an internal operator of MXNet."""

from __future__ import annotations

import mxnet as mx


def set_elements(array: mx.nd.NDArray, places: mx.nd.NDArray, values: mx.nd.NDArray) -> None:
    """Set elements, or rows, at `places` (int32): one index each, or a row of indices for each axis."""
    mx.nd._internal._scatter_set_nd(array, values, places, shape=array.shape, out=array)


def set_rows(array: mx.nd.NDArray, rows: mx.nd.NDArray, values: mx.nd.NDArray) -> None:
    """Set rows, all different (int32)."""
    set_elements(array, rows.reshape((1, -1)), values)
