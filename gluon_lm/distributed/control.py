"""The channel between a worker of a cluster and the launcher that owns it.

What MXNet's parameter server cannot do goes over it: a worker says that it is alive and how far it has come, and the
workers exchange small values. It is a pair of pipes that carry JSON lines; at the other end is the launcher's agent on
the worker's machine, which forwards them. This module needs no MXNet.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from typing import Any, BinaryIO

from ..errors import DistributedError

CONTROL_VARIABLE = "GLUON_LM_CONTROL"  # the numbers of two inherited file descriptors: "read,write"
WORKER_VARIABLE = "GLUON_LM_WORKER"  # the worker's number in the launcher's order
LOCAL_WORKER_VARIABLE = "GLUON_LM_LOCAL_WORKER"  # its number among the workers on its machine
LOCAL_WORKERS_VARIABLE = "GLUON_LM_LOCAL_WORKERS"  # how many these are
_ALIVE_INTERVAL_S = 0.25


def processes_here() -> int:
    """How many processes our launcher, horovodrun, Open MPI, MPICH or Slurm started on this machine."""
    for name in (
        LOCAL_WORKERS_VARIABLE,
        "HOROVOD_LOCAL_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "MPI_LOCALNRANKS",
        "SLURM_STEP_TASKS_PER_NODE",
        "SLURM_NTASKS_PER_NODE",
    ):
        numbers: list[int] = []
        for number, machines in re.findall(r"([1-9][0-9]*)(?:\(x([0-9]+)\))?", os.environ.get(name, "")):
            numbers += [int(number)] * min(int(machines or 1), 1 << 16)  # Slurm writes 4(x2),1 for 4, 4 and 1
        if numbers:
            machine = os.environ.get("SLURM_NODEID", "")
            return numbers[int(machine)] if machine.isdecimal() and int(machine) < len(numbers) else numbers[0]
    return 1


def encode(*message: Any) -> bytes:
    """A message as one line: its kind, then its contents (plain JSON values)."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


class Control:
    """A worker's side of the channel.

    Parameters
    ----------
    incoming, outgoing : binary file
        Messages from and to the launcher; the latter unbuffered.
    index : int
        This worker's number in the launcher's order: worker 0 is on the first host, whichever process arrives first.
    """

    def __init__(self, incoming: BinaryIO, outgoing: BinaryIO, index: int = 0) -> None:
        self.index = index
        self._incoming, self._outgoing = incoming, outgoing
        self._next_alive = 0.0
        self._step: int | None = None

    @classmethod
    def from_environment(cls) -> Control | None:
        """The channel that `gluon_lm.launch` gave this process; None where another program started it.

        It can be had only once: the variables are removed from the environment, so that processes which this one starts
        do not take the channel for theirs.

        Raises
        ------
        DistributedError
            Where the variables name no open channel.
        """
        numbers = os.environ.pop(CONTROL_VARIABLE, None)
        index = os.environ.pop(WORKER_VARIABLE, "0")
        if numbers is None:
            return None
        try:
            reading, writing = map(int, numbers.split(","))
            for descriptor in (reading, writing):
                os.set_inheritable(descriptor, False)
            return cls(os.fdopen(reading, "rb"), os.fdopen(writing, "wb", buffering=0), int(index))
        except (ValueError, OSError):
            raise DistributedError(
                f"{CONTROL_VARIABLE}={numbers}: must name two open pipes, and {WORKER_VARIABLE}={index} a worker; "
                "leave both to python -m gluon_lm.launch"
            ) from None

    def join(self) -> None:
        """Say that this worker is ready to train with the others, and wait until all are.

        Raises
        ------
        DistributedError
            Where the launcher is gone.
        """
        self._say("join")
        self._hear()

    def allgather(self, value: Any) -> list[Any]:
        """Every worker's value (plain JSON values, up to some megabytes), by index; waits until all are here.

        Raises
        ------
        DistributedError
            Where the launcher is gone.
        """
        self._say("allgather", self._step, value)
        return self._hear()

    def alive(self, step: int | None = None) -> None:
        """Say that this worker makes progress, and at which step it is; None: as before. Cheap enough for every step.

        Raises
        ------
        DistributedError
            Where the launcher is gone.
        """
        self._step = self._step if step is None else step
        now = time.monotonic()
        if now >= self._next_alive:
            self._next_alive = now + _ALIVE_INTERVAL_S
            self._say("alive", self._step)

    def leave(self) -> None:
        """Say that this worker no longer needs the others: they and the servers may end. Heartbeats may follow."""
        with contextlib.suppress(DistributedError):  # nobody is left to hear it
            self._say("leave")

    def _say(self, *message: Any) -> None:
        line = memoryview(encode(*message))
        try:
            while line:
                line = line[self._outgoing.write(line) :]
        except BrokenPipeError:
            raise self._launcher_is_gone() from None

    def _hear(self) -> Any:
        line = self._incoming.readline()
        if not line.endswith(b"\n"):
            raise self._launcher_is_gone()
        return json.loads(line)[1]

    def _launcher_is_gone(self) -> DistributedError:
        return DistributedError(
            f"worker {self.index}: the launcher's agent on this machine is gone, and with it the other workers; "
            "start the cluster again with --resume"
        )
