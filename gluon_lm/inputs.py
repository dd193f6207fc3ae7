"""Words on their way to the devices.

Shapes: T time, N batch, R the rows of a window that have targets.
"""

from __future__ import annotations

import mxnet as mx
import numpy as np

from .data.windows import Window

Inputs = tuple[mx.nd.NDArray, mx.nd.NDArray]


class InputCopies:
    """Tokens and targets of windows, on the devices that compute with them.

    `begin` sends those of the next window ahead, while the devices are busy with this one.
    """

    def __init__(self) -> None:
        self._places: set[tuple[int, int, mx.Context]] = set()
        self._window: Window | None = None
        self._begun: dict[tuple[int, int, mx.Context], Inputs] = {}

    def take(self, window: Window, start: int, stop: int, device: mx.Context) -> Inputs:
        """``(tokens_TN, targets_R)`` of columns ``start`` to ``stop``, int32, on the device.

        There has to be a target in these columns.
        """
        place = (start, stop, device)
        self._places.add(place)
        begun = self._begun.pop(place, None) if window is self._window else None
        return begun or copy_inputs(window.columns(start, stop), device)

    def begin(self, window: Window) -> None:
        """Send ahead what `take` will be asked for, which is taken to be the columns that it was asked for before."""
        columns = {place: window.columns(*place[:2]) for place in self._places}
        self._window = window
        self._begun = {place: copy_inputs(part, place[2]) for place, part in columns.items() if part.num_targets}


def copy_inputs(window: Window, device: mx.Context) -> Inputs:
    """``(tokens_TN, targets_R)`` of a window with a target at least, int32, on the device or on their way to it."""
    return (
        _to_device(window.tokens_TN, device),
        _to_device(window.targets_TN.reshape(-1)[: window.num_targets], device),
    )


def _to_device(ids: np.ndarray, device: mx.Context) -> mx.nd.NDArray:
    if device.device_type != "gpu":
        return mx.nd.array(ids, ctx=device, dtype="int32")
    # A GPU reads pinned memory by itself; from any other it would hold up this thread until it has read.
    return mx.nd.array(ids, ctx=mx.cpu_pinned(device.device_id), dtype="int32").as_in_context(device)
