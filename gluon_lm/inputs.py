"""Copies of words to the devices.

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

    `begin` sends those of the next window in advance, while the devices are busy with this one.
    """

    def __init__(self) -> None:
        self._places: set[Place] = set()
        self._window: Window | None = None
        self._begun: dict[Place, Inputs] = {}
        self._pinned: dict[tuple[Place, tuple[int, ...]], mx.nd.NDArray] = {}

    def take(self, window: Window, start: int, stop: int, device: mx.Context) -> Inputs:
        """``(tokens_TN, targets_R)`` of columns ``start`` to ``stop``, int32, on the device.

        These columns must have at least one target.
        """
        place = (start, stop, device)
        self._places.add(place)
        begun = self._begun.pop(place, None) if window is self._window else None
        return begun or self._copy(window.columns(start, stop), place)

    def begin(self, window: Window) -> None:
        """Send in advance what `take` will be asked for: presumably the same columns as before."""
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
        """The ids in pinned memory, which a GPU reads by itself; a copy from other memory would block this thread.

        The memory is kept, because MXNet asks the driver for each piece of it again.
        """
        key = (place, ids.shape)
        if key not in self._pinned:
            self._pinned[key] = mx.nd.empty(ids.shape, ctx=mx.cpu_pinned(place[2].device_id), dtype="int32")
        self._pinned[key][:] = ids  # once the copy of its previous content is done
        return self._pinned[key]


def copy_inputs(window: Window, device: mx.Context) -> Inputs:
    """``(tokens_TN, targets_R)`` of a window with at least one target, int32, on the device."""
    tokens_TN, targets_R = (mx.nd.array(ids, ctx=device, dtype="int32") for ids in _ids(window))
    return tokens_TN, targets_R


def _ids(window: Window) -> tuple[np.ndarray, np.ndarray]:
    return window.tokens_TN, window.targets_TN.reshape(-1)[: window.num_targets]
