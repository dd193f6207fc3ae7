"""What training needs of the devices and workers that share it."""

from __future__ import annotations

import base64
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..errors import DistributedError
from ..logs import LOGGER, NOTICE
from .compression import Compression


class Communicator(ABC):
    """The devices of this process, and the other processes that train with it.

    Attributes
    ----------
    devices : list of Context
        Devices of this process. The global batch is split over workers first, then over these.
    rank, size : int
        This process among the workers.
    sends_float16 : bool
        Whether gradients are sent in float16, so that those beyond its range overflow.
    """

    rank: int = 0
    size: int = 1
    sends_float16: bool = False
    _compression: Compression | None = None

    def __init__(self, devices: list[mx.Context]) -> None:
        self.devices = devices

    @property
    def is_primary(self) -> bool:
        """Whether this process decides, logs and writes for all."""
        return self.rank == 0

    @property
    def num_devices(self) -> int:
        """Devices of all workers together."""
        return self.size * len(self.devices)

    def shares(self, batch_size: int) -> list[slice]:
        """The columns of a batch that each device of this process takes.

        Raises
        ------
        DistributedError
            If the batch cannot be shared out evenly.
        """
        if batch_size % self.num_devices:
            raise DistributedError(
                f"a batch of {batch_size} streams on {self.num_devices} devices: must be a multiple of their number"
            )
        width = batch_size // self.num_devices
        first = self.rank * len(self.devices)
        return [slice(i * width, (i + 1) * width) for i in range(first, first + len(self.devices))]

    @property
    @abstractmethod
    def description(self) -> str:
        """How gradients are exchanged, in a few words for the log."""

    @abstractmethod
    def broadcast_parameters(self, parameters: Sequence[gluon.Parameter]) -> None:
        """Set every copy of every parameter to that of rank 0's first device."""

    @abstractmethod
    def reduce_gradients(self, parameters: Sequence[gluon.Parameter]) -> None:
        """Replace every gradient on every device, in place, by its sum over all devices of all workers.

        Always called with the same parameters in the same order.
        """

    def merged_elements(self, sizes: Sequence[int]) -> int:
        """Elements that a GPU holds to sum gradients, besides its own, for parameters of these sizes.

        Of several GPUs it is the one with the most; without GPUs it is 0.
        """
        return 0

    def allgather_object(self, value: Any) -> list[Any]:
        """Every worker's value (plain JSON values), by rank, on every worker; all wait until all are here."""
        if self.size > 1:
            raise NotImplementedError
        return [value]

    def allgather(self, numbers: Sequence[float]) -> np.ndarray:
        """Every worker's numbers, as many from each, on every worker: float64 of shape (size, len(numbers))."""
        return np.array(self.allgather_object(list(numbers)), dtype=np.float64)

    def gather_arrays(self, arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Every worker's arrays, by rank, on rank 0; on the others they may be missing."""
        if self.size == 1:
            return [list(arrays)]
        packed = [(a.dtype.str, a.shape, base64.b64encode(a.tobytes()).decode("ascii")) for a in arrays]
        return [
            [np.frombuffer(base64.b64decode(data), dtype).reshape(shape) for dtype, shape, data in worker]
            for worker in self.allgather_object(packed)
        ]

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's value, on every worker; all wait until all are here."""
        return self.allgather_object(value)[0]

    def compression_state(self) -> tuple[dict[str, Any], dict[str, mx.nd.NDArray]]:
        """What a checkpoint holds of 2-bit compression. All workers call it together, once for each checkpoint.

        What a checkpoint should hold and cannot is forgotten here where that is possible, so that the run that goes on
        equals one that is resumed.

        Returns
        -------
        state : dict
            `Compression.state_dict`; empty if gradients are not compressed.
        residuals : dict of str to NDArray
            What has not been sent yet, by name; empty where it cannot be read, and on all ranks but the first.
        """
        return ({}, {}) if self._compression is None else (self._compression.state_dict(), self._residuals())

    def restore_compression(self, state: Mapping[str, Any], residuals: Mapping[str, mx.nd.NDArray]) -> None:
        """Continue with what `compression_state` returned in another run, and say so where something is lost.

        With another number of devices the scales are measured anew.

        Raises
        ------
        CheckpointError
            If `state` is no such state.
        """
        if not state:
            return
        before, now = Compression.from_state_dict(state), self._compression
        if now is None:
            cause = "the gradients are no longer compressed"
        elif before.num_devices != self.num_devices:
            cause = (
                f"the gradients of {before.num_devices} devices were compressed, and there are {self.num_devices} now"
            )
        else:
            cause = "the residuals of 2-bit compression could not be kept"
            unsent = before.unsent and self._take_residuals(residuals, before.threshold / now.threshold)
            self._compression = dataclasses.replace(before, threshold=now.threshold, unsent=unsent)
        if before.unsent and not (self._compression and self._compression.unsent):
            LOGGER.log(NOTICE, "%s: what had not been sent is lost", cause)

    def _residuals(self) -> dict[str, mx.nd.NDArray]:
        """Those of all workers, by name, on rank 0."""
        return {}

    def _take_residuals(self, residuals: Mapping[str, mx.nd.NDArray], factor: float) -> bool:
        """Continue with those of another run, if possible, in units of a threshold that was `factor` times this one."""
        return False

    def close(self) -> None:
        """Close connections and release processes."""


class SingleDevice(Communicator):
    """One device, one process: nothing to communicate."""

    def __init__(self, devices: list[mx.Context]) -> None:
        if len(devices) != 1:
            raise DistributedError(f"{len(devices)} devices: must be one; for several there is KVStoreCommunicator")
        super().__init__(devices)

    @property
    def description(self) -> str:
        return str(self.devices[0])

    def broadcast_parameters(self, parameters):
        pass

    def reduce_gradients(self, parameters):
        pass
