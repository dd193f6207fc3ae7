"""Gradients summed over the devices of this process by MXNet's KVStore."""

from __future__ import annotations

from collections.abc import Sequence

import mxnet as mx
from mxnet import gluon

from .communicator import Communicator
from .compression import Compression, add_up_at_scale


class KVStoreCommunicator(Communicator):
    """KVStore ``local`` (sums on the CPU), ``device`` (on the devices) or ``nccl`` (GPUs, by NCCL's ring).

    ``device`` can compress to two bits.

    Parameters
    ----------
    devices : list of Context
        At least two.
    kvstore : str
        ``local``, ``device`` or ``nccl``.
    threshold : float, optional
        Compress gradients to two bits with this threshold (``device`` only). The first
        `gluon_lm.distributed.compression.CALIBRATION_STEPS` steps are not compressed and set each parameter's scale.
    """

    def __init__(self, devices: list[mx.Context], kvstore: str = "device", threshold: float | None = None) -> None:
        super().__init__(devices)
        self._kind = kvstore
        self._compression = None if threshold is None else Compression(self.num_devices, threshold)
        self._store: mx.kvstore.KVStoreBase | None = None
        self._is_compressing = False  # the store

    @property
    def description(self) -> str:
        compression = self._compression
        bits = "" if compression is None else f", 2-bit gradients with threshold {compression.threshold:g}"
        return f"{len(self.devices)} devices ({self.devices[0]} to {self.devices[-1]}), KVStore {self._kind}{bits}"

    def merged_elements(self, sizes):
        return merged_on_gpu(self._kind, self.devices, sizes, compresses=self._compression is not None)

    def broadcast_parameters(self, parameters):
        for parameter in parameters:
            parameter.set_data(parameter.data(self.devices[0]))

    def reduce_gradients(self, parameters: Sequence[gluon.Parameter]) -> None:
        def gradients_DP():
            return list(zip(*(parameter.list_grad() for parameter in parameters)))

        factors = self._compression.next_factors(gradients_DP, self.allgather) if self._compression else None
        store = self._open_store(parameters, self._compression if factors else None)
        add_up_at_scale(parameters, factors, lambda key, grads: store.pushpull(key, grads, out=grads, priority=-key))

    def _open_store(self, parameters: Sequence[gluon.Parameter], compression: Compression | None):
        """The store, or a new one if it should compress and does not, or the reverse."""
        if self._store is None or self._is_compressing != (compression is not None):
            self._store = mx.kv.create(self._kind)
            self._is_compressing = compression is not None
            if compression is not None:
                self._store.set_gradient_compression({"type": "2bit", "threshold": compression.threshold})
            for key, parameter in enumerate(parameters):
                self._store.init(key, parameter.data(self.devices[0]))
        return self._store

    def compression_state(self):
        if self._compression and self._compression.unsent:
            self._store, self._compression.unsent = None, False  # its residuals cannot be read; a new store has none
        return super().compression_state()


def merged_on_gpu(kind: str, devices: Sequence[mx.Context], sizes: Sequence[int], compresses: bool = False) -> int:
    """Elements that a store holds on one of the GPUs whose gradients it sums, for parameters of these sizes.

    These are a parameter's gradients of all GPUs and their sum; with NCCL the sum alone. The store distributes the
    parameters over the GPUs, and the largest one dominates. If it compresses what the GPUs send, there is one more copy
    of it, and the residuals of all parameters.
    """
    if devices[0].device_type == "cpu" or len(devices) == 1 or kind in ("local", "dist_sync"):
        return 0
    if kind == "nccl":
        return max(sizes)
    return (len(devices) + 1) * max(sizes) + sum(sizes) if compresses else len(devices) * max(sizes)
