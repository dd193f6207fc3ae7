"""Gradients summed over processes by Horovod (Sergeev and Del Balso 2018, arXiv:1802.05799).

Shapes: W workers, P parameters, B bytes of one worker's codes.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..errors import DistributedError
from ..gpus import identity
from ..heartbeat import listen
from ..memory import is_allocation_failure
from .codec import TwoBitCodec, residual_size
from .communicator import Communicator
from .compression import Compression

# One of these holds the process's number, depending on what started it: horovodrun, Open MPI, MPICH or Slurm.
_RANK_VARIABLES = ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK")
GROUP_ELEMENTS = 1 << 20  # of compressed gradients sent together: fewer are not worth a round of messages
TIMEOUT_VARIABLE = "GLUON_LM_TIMEOUT"
_TIMEOUT_S = 60.0
_ROUND_S = 1.0  # between two heartbeats
_BUSY_SHARE = 0.5  # of a core's time, at least, for a process that computes; Horovod alone takes a tenth or two
_START = "start several together, as in horovodrun -np 2 python -m gluon_lm.train --horovod --data ptb"


class HorovodCommunicator(Communicator):
    """Processes of one device each, on one machine or several, started by ``horovodrun``.

    Parameters
    ----------
    devices : list of Context
        One.
    compression : str
        ``none``; ``fp16``, sent in half precision; ``2bit``, `gluon_lm.distributed.codec.TwoBitCodec`. The first
        `gluon_lm.distributed.compression.CALIBRATION_STEPS` steps of the last are not compressed and set each
        parameter's threshold.
    threshold : float
        Of 2-bit compression, where the root mean square of a gradient is about 1/4.

    Raises
    ------
    DistributedError
        For several devices; if Horovod is missing or has not started this process; for compression in one process.

    Notes
    -----
    A process that is stopped, or a lost network, ends all: with gloo by its own time-out; with MPI, which has none,
    after ``GLUON_LM_TIMEOUT`` seconds (environment; 60). All end, too, when none of them makes progress for that long:
    they wait for each other, or for one that does nothing. A process that could not exchange data with the others has
    the exit code 2, whatever it does with the `DistributedError`.
    """

    def __init__(self, devices: list[mx.Context], compression: str = "none", threshold: float = 0.5) -> None:
        super().__init__(devices)
        if len(devices) != 1:
            raise DistributedError(
                f"--horovod: each process has one device, not {len(devices)} ({devices[0]} to {devices[-1]}); name one "
                f"and {_START}"
            )
        timeout_s = _timeout()
        self._hvd = _start()
        self.rank, self.size = self._hvd.rank(), self._hvd.size()
        if devices[0].device_type == "gpu" and not self._hvd.cuda_built():
            raise DistributedError(
                f"--horovod: this Horovod was built without CUDA and cannot read {devices[0]}; build it again with "
                "bash scripts/install_horovod.sh"
            )
        self._watch = _Watch(self._hvd, timeout_s)
        listen(lambda step: self._watch.beat())
        if self.size == 1 and compression != "none":
            raise DistributedError(
                f"--gctype {compression}: there is one process, so no gradients are exchanged and there is nothing to "
                f"compress; {_START}"
            )
        self.sends_float16 = compression == "fp16"
        self._compression = Compression(self.num_devices, threshold) if compression == "2bit" else None
        self._codecs: list[tuple[slice, TwoBitCodec]] = []  # of consecutive parameters each
        self._restored_residual: mx.nd.NDArray | None = None
        if self._hvd.nccl_built():  # the same everywhere: what follows is a collective call
            self._refuse_shared_gpus()

    def _refuse_shared_gpus(self) -> None:
        """NCCL does not support two processes on one GPU, and does not say so."""
        device = self.devices[0]
        uuid = identity(device.device_id) if device.device_type == "gpu" else None
        # Under Slurm and Kubernetes each process sees its own GPU as the first, and containers have their own names.
        place = [socket.gethostname(), os.environ.get("CUDA_VISIBLE_DEVICES"), str(device)]
        gpus = self.allgather_object(place if uuid is None else [uuid])
        shared = [rank for rank, gpu in enumerate(gpus) if gpu == gpus[self.rank]]
        if len(shared) > 1 and device.device_type == "gpu":
            raise DistributedError(
                f"--horovod: workers {', '.join(map(str, shared))} share {device} of {place[0]}, "
                "which NCCL cannot; start as many processes there as it has GPUs"
            )

    @property
    def description(self) -> str:
        sent = ", gradients in half precision" if self.sends_float16 else ""
        if self._compression is not None:
            sent = f", 2-bit gradients with threshold {self._compression.threshold:g}"
        return f"{self.size} processes, one device each ({self.devices[0]} here), Horovod{sent}"

    def broadcast_parameters(self, parameters):
        with self._together():
            for i, parameter in enumerate(parameters):
                self._hvd.broadcast_(parameter.data(self.devices[0]), 0, name=f"parameter.{i}", priority=-i)
            for parameter in parameters:
                parameter.data(self.devices[0]).wait_to_read()
                self._watch.beat()

    # ---------------------------------------------------------------- gradients

    def reduce_gradients(self, parameters: Sequence[gluon.Parameter]) -> None:
        gradients = [parameter.grad(self.devices[0]) for parameter in parameters]
        compression = self._compression
        factors = compression.next_factors(lambda: [gradients], self.allgather) if compression else None
        if compression and factors:
            self._add_up_codes(gradients, [compression.threshold / factor for factor in factors])
        else:
            self._add_up(gradients)

    def _add_up(self, gradients: list[mx.nd.NDArray]) -> None:
        """Horovod sends each gradient as soon as it is computed, and small ones together."""
        with self._together():
            sent = [g.astype("float16") for g in gradients] if self.sends_float16 else gradients
            for i, array in enumerate(sent):
                self._hvd.allreduce_(array, op=self._hvd.Sum, name=f"gradient.{i}", priority=-i)
            for gradient, array in zip(gradients, sent):
                if array is not gradient:
                    mx.nd.cast(array, dtype=gradient.dtype, out=gradient)
                gradient.wait_to_read()
                self._watch.beat()

    def _add_up_codes(self, gradients: list[mx.nd.NDArray], thresholds: list[float]) -> None:
        """The gradients of the last layers come first, so they are sent first; meanwhile the next ones are encoded."""
        if not self._codecs:
            self._make_codecs([gradient.size for gradient in gradients], thresholds)
        parts = [(codec, gradients[which]) for which, codec in reversed(self._codecs)]
        for number, bytes_B in enumerate([codec.encode(part) for codec, part in parts]):
            bytes_WB = self._allgather_array(f"codes.{number}", bytes_B).reshape((self.size, -1))
            codec, part = parts[number]
            codec.decode(bytes_WB, part)

    def _make_codecs(self, sizes: list[int], thresholds: list[float]) -> None:
        groups = list(_groups(sizes))
        residuals: list[mx.nd.NDArray | None] = [None] * len(groups)
        if self._restored_residual is not None:
            ends = np.cumsum([residual_size(sizes[which]) for which in groups[:-1]]).tolist()
            residuals = [self._restored_residual[start:end] for start, end in zip([0, *ends], [*ends, None])]
            self._restored_residual = None
        for which, residual in zip(groups, residuals):
            self._codecs.append((which, TwoBitCodec(sizes[which], thresholds[which], self.devices[0], residual)))

    # ---------------------------------------------------------------- objects

    def allgather_object(self, value):
        line = json.dumps(value).encode("ascii") + b"\n"
        gathered = self._allgather_array("object", mx.nd.array(np.frombuffer(line, np.uint8), dtype="uint8"))
        return [json.loads(part) for part in gathered.asnumpy().tobytes().splitlines()]

    def allgather(self, numbers):
        own = np.array(numbers, dtype=np.float64)
        # As bytes: MXNet's conversions would go through float32.
        gathered = self._allgather_array(f"numbers.{own.size}", mx.nd.array(own.view(np.uint8), dtype="uint8"))
        return gathered.asnumpy().view(np.float64).reshape(self.size, own.size)

    def gather_arrays(self, arrays):
        shapes = self.allgather_object([[array.dtype.str, array.shape] for array in arrays])
        workers = [list(arrays)] if self.is_primary else []
        # One worker after the other, so that no process holds the arrays of several workers that it does not need.
        for rank in range(1, self.size):
            received = []
            for i, (dtype, shape) in enumerate(shapes[rank]):
                with self._together():
                    if rank == self.rank:
                        raw = mx.nd.array(np.ascontiguousarray(arrays[i]).reshape(-1).view(np.uint8), dtype="uint8")
                    else:
                        raw = mx.nd.empty((math.prod(shape) * np.dtype(dtype).itemsize,), dtype="uint8")
                    self._hvd.broadcast_(raw, rank, name=f"array.{rank}.{i}")
                    raw.wait_to_read()
                if self.is_primary:
                    received.append(raw.asnumpy().view(dtype).reshape(shape))
            if self.is_primary:
                workers.append(received)
        return workers

    def _allgather_array(self, name: str, array: mx.nd.NDArray) -> mx.nd.NDArray:
        with self._together():
            return self._hvd.allgather(array, name=name)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        self._watch.is_waiting = True
        try:
            yield
            self._watch.is_waiting = False
            self._watch.beat()
        except mx.MXNetError as error:
            if is_allocation_failure(error):  # of a gradient that was still being computed
                self._watch.stop()
                raise
            # Many threads of MXNet and Horovod have failed at once, and MXNet keeps their errors in a list that it does
            # not lock: waitall may crash, and so may MXNet itself when the process ends.
            self._watch.stop()
            atexit.register(_end_at_once)
            reason = str(error).strip().splitlines()[-1].removeprefix("MXNetError: ").split(". ")[0]
            raise DistributedError(
                f"worker {self.rank} of {self.size}: could not exchange data with the others ({reason}); see what they "
                "said last, fix that, and continue with --resume"
            ) from error

    # ---------------------------------------------------------------- residuals

    def _residuals(self):
        """By rank, as `gluon_lm.distributed.codec.TwoBitCodec` keeps them."""
        if self._codecs:
            own = np.concatenate([codec.residual.asnumpy() for _, codec in self._codecs])
        elif self._restored_residual is not None:
            own = self._restored_residual.asnumpy()
        else:
            return {}
        workers = self.gather_arrays([own])
        return {str(rank): mx.nd.array(residual) for rank, (residual,) in enumerate(workers)}

    def _take_residuals(self, residuals, factor):
        own = residuals.get(str(self.rank))
        if own is None:
            return False
        self._restored_residual, self._codecs = own * factor, []
        return True

    def close(self):
        self._watch.stop()
        self._hvd.shutdown()
        self._watch.join()


def _end_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


class _Watch:
    """Ends this process when no heartbeats of all processes have come for too long, or when none makes progress.

    Heartbeats are exchanged by threads of their own. One says how much progress its process has made, and whether it
    waits for the others. Each `beat` counts as progress, and so does each second in which the process computes: a step
    may take long, and MXNet computes it in threads that report nothing.

    Attributes
    ----------
    is_waiting : bool
        Whether the thread that trains is exchanging something with the other processes.
    """

    _numbers = itertools.count()

    def __init__(self, hvd: Any, timeout_s: float) -> None:
        self._hvd, self._timeout_s = hvd, timeout_s
        self._name = f"alive.{next(self._numbers)}"
        self._closed = threading.Event()
        self._beats = 0
        self.is_waiting = False
        self._signs_W2 = np.zeros((hvd.size(), 2), np.int32)  # the newest of each: beats, and whether it waits
        self._unheard_s = self._idle_s = 0.0
        self._signals = threading.Thread(target=self._signal, daemon=True)
        self._signals.start()
        threading.Thread(target=self._check, daemon=True).start()

    def beat(self) -> None:
        """Note that this process makes progress."""
        self._beats += 1

    def stop(self) -> None:
        """Send no further heartbeat. The pending one is still waited for, no longer than any other."""
        self._closed.set()

    def join(self) -> None:
        """Wait until no heartbeat is pending."""
        self._signals.join()

    def _signal(self) -> None:
        wall_s, busy_s = time.monotonic(), time.process_time()
        while not self._closed.wait(_ROUND_S):
            wall_before_s, wall_s = wall_s, time.monotonic()
            busy_before_s, busy_s = busy_s, time.process_time()
            if busy_s - busy_before_s > _BUSY_SHARE * (wall_s - wall_before_s):
                self.beat()
            sign_12 = mx.nd.array([[self._beats, self.is_waiting]], dtype="int32")
            try:
                signs_W2 = self._hvd.allgather(sign_12, name=self._name).asnumpy()
            except (mx.MXNetError, ValueError):
                self._closed.set()  # Horovod has shut down, which the training thread finds out by itself
                return
            gets_on = (signs_W2[:, 0] != self._signs_W2[:, 0]).any()
            self._idle_s = 0.0 if gets_on else self._idle_s + _ROUND_S
            self._signs_W2, self._unheard_s = signs_W2, 0.0

    def _check(self) -> None:
        # Both times are counted, not read from a clock: processes that were all stopped for a while go on together.
        tick_s = min(_ROUND_S, self._timeout_s / 4)
        while True:
            self._signals.join(tick_s)
            if not self._signals.is_alive():
                return
            self._unheard_s += tick_s
            if self._unheard_s > self._timeout_s:
                self._end("one of the others has not been heard from", "it hangs, or its network is cut")
            elif self._idle_s > self._timeout_s:
                absent = [str(rank) for rank, (_, is_waiting) in enumerate(self._signs_W2) if not is_waiting]
                hanging = f"worker {', '.join(absent)} does nothing, and the others wait for it"
                self._end("no process has made progress", hanging if absent else "each waits for the others, in vain")

    def _end(self, what: str, why: str) -> None:
        print(
            f"error: worker {self._hvd.rank()} of {self._hvd.size()}: {what} for {self._timeout_s:g} s "
            f"({TIMEOUT_VARIABLE}): {why}; fix that, and continue with --resume",
            file=sys.stderr,
            flush=True,
        )
        os._exit(2)  # the training thread waits inside Horovod, where nothing reaches it


def _groups(sizes: Sequence[int]) -> Iterator[slice]:
    """Cut parameters into groups of neighbours with at least `GROUP_ELEMENTS` elements, except for the last."""
    start = elements = 0
    for stop, size in enumerate(sizes, 1):
        elements += size
        if elements >= GROUP_ELEMENTS or stop == len(sizes):
            yield slice(start, stop)
            start, elements = stop, 0


def _timeout() -> float:
    value = os.environ.get(TIMEOUT_VARIABLE, str(_TIMEOUT_S))
    with contextlib.suppress(ValueError):
        if 0 < float(value) < math.inf:
            return float(value)
    raise DistributedError(f"{TIMEOUT_VARIABLE}={value}: must be a number of seconds above 0, or not set")


def local_rank() -> int:
    """Number of this process among those on the same machine, which decides which of its GPUs to use."""
    return _start().local_rank()


def _start() -> Any:
    """Horovod for MXNet, connected to the other processes."""
    try:
        import horovod.mxnet as hvd
    except (ImportError, OSError) as error:
        raise DistributedError(
            f"--horovod: Horovod cannot be imported ({str(error).splitlines()[0]}); bash scripts/install_horovod.sh "
            f"builds it for the MXNet that is installed. Then {_START}, or go on without: --no-horovod"
        ) from error
    if not any(variable in os.environ for variable in _RANK_VARIABLES):
        raise DistributedError(
            f"--horovod: this process was not started as one of several; {_START}, or go on without: --no-horovod "
            "--gctype none"
        )
    try:
        hvd.init()
    except ValueError as error:
        raise DistributedError(
            "--horovod: this process could not reach the others, see above; check that all hosts reach each other, and "
            f"{_START}"
        ) from error
    return hvd
