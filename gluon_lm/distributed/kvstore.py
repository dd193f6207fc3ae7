"""Gradients summed over the devices of this process by MXNet's KVStore."""

from __future__ import annotations

from collections.abc import Sequence

import mxnet as mx
from mxnet import gluon

from ..logs import LOGGER
from .communicator import Communicator
from .compression import GradientScales, add_up_at_scale


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
        self._kind, self._threshold = kvstore, threshold
        self._scales = None if threshold is None else GradientScales()
        self._store: mx.kvstore.KVStoreBase | None = None

    @property
    def description(self) -> str:
        compression = "" if self._threshold is None else f", 2-bit gradients with threshold {self._threshold:g}"
        return (
            f"{len(self.devices)} devices ({self.devices[0]} to {self.devices[-1]}), KVStore {self._kind}{compression}"
        )

    def merged_elements(self, sizes):
        return merged_on_gpu(self._kind, self.devices, sizes, compresses=self._scales is not None)

    def broadcast_parameters(self, parameters):
        for parameter in parameters:
            parameter.set_data(parameter.data(self.devices[0]))

    def reduce_gradients(self, parameters: Sequence[gluon.Parameter]) -> None:
        factors = self._scales.factors if self._scales else None
        if self._scales and factors is None:
            self._scales.observe(list(zip(*(parameter.list_grad() for parameter in parameters))), self.allgather)
        store = self._open_store(parameters, compress=factors is not None)
        add_up_at_scale(parameters, factors, lambda key, grads: store.pushpull(key, grads, out=grads, priority=-key))
        if self._scales and factors is None and self._scales.factors:
            self._store = None  # calibrated: the next step opens a store that compresses

    def _open_store(self, parameters, compress: bool):
        if self._store is None:
            self._store = mx.kv.create(self._kind)
            if compress:
                self._store.set_gradient_compression({"type": "2bit", "threshold": self._threshold})
            for key, parameter in enumerate(parameters):
                self._store.init(key, parameter.data(self.devices[0]))
        return self._store

    def state_dict(self):
        return {"kvstore": self._kind, **self._scales.state_dict()} if self._scales else {}

    def load_state_dict(self, state):
        if self._scales and state:
            self._scales.load_state_dict(state)
            if state.get("kvstore") == self._kind:
                LOGGER.info("2-bit compression: residuals start at zero, as they do after every checkpoint")
            elif self._scales.factors is not None and state.get("has_sent", True):
                LOGGER.warning("2-bit compression: what had not been sent yet when the run stopped is lost")
        self._store = None

    def checkpointed(self):
        """The store's residuals cannot be read, so a checkpoint cannot hold them; a new store has none."""
        if self._scales:
            self._store = None


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
