"""Words on their way to the devices.

Shapes: T time, N batch, R the rows of a window that have targets.
"""

from __future__ import annotations

import mxnet as mx
import numpy as np

from .data.windows import Window

Inputs = tuple[mx.nd.NDArray, mx.nd.NDArray]
Place = tuple[int, int, mx.Context]  # columns and a device


class InputCopies:
    """Tokens and targets of windows, on the devices that compute with them.

    `begin` sends those of the next window ahead, while the devices are busy with this one.
    """

    def __init__(self) -> None:
        self._places: set[Place] = set()
        self._window: Window | None = None
        self._begun: dict[Place, Inputs] = {}
        self._pinned: dict[tuple[Place, tuple[int, ...]], mx.nd.NDArray] = {}

    def take(self, window: Window, start: int, stop: int, device: mx.Context) -> Inputs:
        """``(tokens_TN, targets_R)`` of columns ``start`` to ``stop``, int32, on the device.

        There has to be a target in these columns.
        """
        place = (start, stop, device)
        self._places.add(place)
        begun = self._begun.pop(place, None) if window is self._window else None
        return begun or self._copy(window.columns(start, stop), place)

    def begin(self, window: Window) -> None:
        """Send ahead what `take` will be asked for, which is taken to be the columns that it was asked for before."""
        columns = {place: window.columns(*place[:2]) for place in self._places}
        self._window = window
        self._begun = {place: self._copy(part, place) for place, part in columns.items() if part.num_targets}

    def _copy(self, window: Window, place: Place) -> Inputs:
        device = place[2]
        if device.device_type != "gpu":
            return copy_inputs(window, device)
        tokens_TN, targets_R = (self._pin(ids, place).as_in_context(device) for ids in _ids(window))
        return tokens_TN, targets_R

    def _pin(self, ids: np.ndarray, place: Place) -> mx.nd.NDArray:
        """The ids in memory that a GPU reads by itself; from any other it would hold up this thread until it has read.

        The memory is kept, for MXNet asks the driver anew for each piece of it.
        """
        key = (place, ids.shape)
        if key not in self._pinned:
            self._pinned[key] = mx.nd.empty(ids.shape, ctx=mx.cpu_pinned(place[2].device_id), dtype="int32")
        self._pinned[key][:] = ids  # once the copy of what was in it before is done
        return self._pinned[key]


def copy_inputs(window: Window, device: mx.Context) -> Inputs:
    """``(tokens_TN, targets_R)`` of a window with a target at least, int32, on the device."""
    tokens_TN, targets_R = (mx.nd.array(ids, ctx=device, dtype="int32") for ids in _ids(window))
    return tokens_TN, targets_R


def _ids(window: Window) -> tuple[np.ndarray, np.ndarray]:
    return window.tokens_TN, window.targets_TN.reshape(-1)[: window.num_targets]
