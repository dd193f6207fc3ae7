"""Gradients summed over workers by MXNet's parameter servers (ps-lite).

Li et al. 2014, "Scaling Distributed Machine Learning with the Parameter Server".
"""

from __future__ import annotations

from collections.abc import Sequence

import mxnet as mx
from mxnet import gluon
from mxnet.base import _LIB, check_call

from ..errors import DistributedError
from ..heartbeat import listen
from .communicator import Communicator
from .compression import Compression, add_up_at_scale
from .control import Control
from .kvstore import merged_on_gpu


class ParameterServer(Communicator):
    """KVStore ``dist_sync`` (sums a worker's devices on the CPU) or ``dist_device_sync`` (on the devices).

    Objects go over the channel to the launcher, `gluon_lm.distributed.control`, gradients through the servers.
    With compression the workers push two bits for each element; what they pull is the full float32 sum.

    Parameters
    ----------
    devices : list of Context
    kvstore : str
    threshold : float, optional
        Compress what is pushed to two bits with this threshold. The first
        `gluon_lm.distributed.compression.CALIBRATION_STEPS` steps are not compressed and set each parameter's scale.

    Raises
    ------
    DistributedError
        Outside a cluster that `gluon_lm.launch` started.
    """

    def __init__(self, devices: list[mx.Context], kvstore: str = "dist_sync", threshold: float | None = None) -> None:
        super().__init__(devices)
        control = Control.from_environment()
        if control is None:
            raise DistributedError(
                f"--kvstore {kvstore}: needs a scheduler, servers and other workers, which python -m gluon_lm.launch "
                "starts, as in python -m gluon_lm.launch --workers 2 -- --data ptb, or go on without: --kvstore none "
                "--gctype none"
            )
        self._control, self._kind = control, kvstore
        self._store = mx.kv.create(kvstore)
        # A worker that fails must not wait for the others at exit; the launcher ends the servers.
        check_call(_LIB.MXKVStoreSetBarrierBeforeExit(self._store.handle, 0))
        # ps-lite numbers the workers by their ports, differently in each run.
        self.rank, self.size = control.index, self._store.num_workers
        self._compression = None if threshold is None else Compression(self.num_devices, threshold)
        self._is_compressing = False
        self._first_key = 0
        control.join()
        listen(control.alive)

    @property
    def description(self) -> str:
        compression = self._compression
        bits = "" if compression is None else f", 2-bit pushes with threshold {compression.threshold:g}"
        first, last = self.devices[0], self.devices[-1]
        devices = f"{len(self.devices)} devices each ({first} to {last})" if last != first else f"one each ({first})"
        return f"{self.size} workers, {devices}, KVStore {self._kind}{bits}"

    def merged_elements(self, sizes):
        return merged_on_gpu(self._kind, self.devices, sizes)  # what is pushed is compressed in the host's memory

    def allgather_object(self, value):
        return self._control.allgather(value)

    def broadcast_parameters(self, parameters):
        self._make_keys(parameters)
        for key, parameter in enumerate(parameters):
            own = parameter.data(self.devices[0])
            self._store.push(key, own if self.rank == 0 else mx.nd.zeros_like(own), priority=-key)
            self._store.pull(key, out=parameter.list_data(), priority=-key)
        for parameter in parameters:
            for array in parameter.list_data():
                array.wait_to_read()
            self._control.alive()

    def _make_keys(self, parameters: Sequence[gluon.Parameter]) -> None:
        for key, parameter in enumerate(parameters, self._first_key):
            self._store.init(key, mx.nd.zeros_like(parameter.data(self.devices[0])))

    def reduce_gradients(self, parameters: Sequence[gluon.Parameter]) -> None:
        def gradients_DP():
            return [list(map(_sum_of_devices, parameters))]

        compression = self._compression
        factors = compression.next_factors(gradients_DP, self.allgather) if compression else None
        if compression and factors and not self._is_compressing:
            self._store.set_gradient_compression({"type": "2bit", "threshold": compression.threshold})
            self._is_compressing = True
            self.allgather_object("compressing")  # rank 0 has told the servers before anyone pushes
            # Once a large array is compressed, MXNet splits it among the servers at different places.
            self._first_key = len(parameters)
            self._make_keys(parameters)
        add_up_at_scale(parameters, factors, self._push_and_pull)

    def _push_and_pull(self, place: int, grads: list[mx.nd.NDArray]) -> None:
        key = self._first_key + place
        self._store.push(key, grads, priority=-key)
        self._store.pull(key, out=grads, priority=-key)

    def close(self):
        self._control.leave()


def _sum_of_devices(parameter: gluon.Parameter) -> mx.nd.NDArray:
    """What a worker pushes, and what is compressed."""
    first, *others = parameter.list_grad()
    return mx.nd.add_n(first, *(grad.as_in_context(first.context) for grad in others)) if others else first
