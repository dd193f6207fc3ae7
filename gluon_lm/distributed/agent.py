"""``python -m gluon_lm.distributed.agent TIMEOUT``: owns the processes of a cluster that run on one machine.

The supervisor starts one agent on each machine, as a child process or over ssh, and both speak JSON lines over the
agent's standard input and output. The agent starts what it is told to, and forwards what its processes print and the
messages of its workers. Its processes never outlive it: it ends them all when its input closes or when no ping has
come for TIMEOUT seconds, and the kernel kills them should it be killed itself.

A signal may reach all processes of a cluster at once, from Slurm, systemd or a machine that is shut down. The workers
then still need the others to write a last checkpoint. So the scheduler and the servers ignore it, and an agent leaves
it to the supervisor.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from .. import __version__
from .control import CONTROL_VARIABLE, LOCAL_WORKER_VARIABLE, LOCAL_WORKERS_VARIABLE
from .pipes import TICK_S, EventLoop, Sender, read_lines, read_messages, start_thread

GRACE_S = 3.0
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_FLUSH_S = 2.0
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


class _Child:
    """A process that the agent started and, for a worker, the sender to its channel."""

    def __init__(self, process: subprocess.Popen[bytes], to_worker: Sender | None) -> None:
        self.process, self.to_worker = process, to_worker
        self.has_ended = False

    def signal(self, number: int) -> None:
        """Send a signal to the process and to those that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Agent(EventLoop):
    """The agent. Its supervisor's messages are its events; `supervisor.Supervisor` is the other end.

    Parameters
    ----------
    supervisor : Sender
    timeout_s : float
        After this long without a ping the supervisor counts as gone.
    """

    def __init__(self, supervisor: Sender, timeout_s: float) -> None:
        super().__init__()
        self._supervisor, self._timeout_s = supervisor, timeout_s
        self._children: dict[str, _Child] = {}
        self._reserved: socket.socket | None = None
        self._quiet_s = 0.0
        self._is_ending = self._is_urgent = False

    def run(self) -> None:
        """Serve until the supervisor ends it or is gone; by then everything that was started has ended."""
        self._supervisor.send("hello", os.getpid(), __version__)
        self.run_until(lambda: self._is_ending)
        # The workers first: to write a checkpoint they need the servers.
        self._signal(self._running_workers(), signal.SIGTERM)
        self.run_until(lambda: not self._running_workers() or self._is_urgent, GRACE_S)
        self._signal(self._running(), signal.SIGKILL)
        self.run_until(lambda: not self._running(), GRACE_S)
        self._supervisor.close(_FLUSH_S)

    # ------------------------------------------------------------ messages of the supervisor

    def on_ping(self) -> None:
        """Note that the supervisor is alive."""
        self._quiet_s = 0.0

    def on_port(self, address: str, port: int) -> None:
        """Reserve a port for a process that is to listen on it at an address of this machine; 0: any."""
        self._reserved = socket.socket()
        # So that the process, which sets it too, can listen there, and no other one is given the port meanwhile.
        self._reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            self._reserved.bind((address, port))
        except OSError as error:
            self._supervisor.send("no_port", address, port, error.strerror)
        else:
            self._supervisor.send("port", self._reserved.getsockname()[1])

    def on_start(self, processes: list[dict[str, Any]]) -> None:
        """Start processes; each has a name, argv and env, and is a worker or not."""
        num_workers = sum(process["is_worker"] for process in processes)
        local_numbers = itertools.count()
        for process in processes:
            name, environment = process["name"], {**os.environ, **process["env"]}
            if process["is_worker"]:  # which share the machine's cores and GPUs
                environment[LOCAL_WORKERS_VARIABLE] = str(num_workers)
                environment[LOCAL_WORKER_VARIABLE] = str(next(local_numbers))
            try:
                child = self._start(name, process["argv"], environment, process["is_worker"])
            except OSError as error:
                self._supervisor.send("not_started", name, f"{error.filename or process['argv'][0]}: {error.strerror}")
                return
            self._children[name] = child
            self._supervisor.send("started", name, child.process.pid)

    def on_answer(self, names: list[str], value: Any) -> None:
        """Give the workers what they wait for."""
        for child in map(self._children.get, names):
            if child is not None and child.to_worker is not None:
                child.to_worker.send("answer", value)

    def on_signal(self, names: list[str], number: int) -> None:
        """Send a signal to processes."""
        for child in map(self._children.get, names):
            if child is not None and not child.has_ended:
                child.signal(number)

    def on_end(self, is_urgent: bool) -> None:
        """End everything; without a grace period if it is urgent."""
        self._is_ending = True
        self._is_urgent |= is_urgent

    # ------------------------------------------------------------ other events

    def on_interrupted(self, number: int) -> None:
        """Tell the supervisor of a signal to this process: it stops the workers on all machines together."""
        self._supervisor.send("interrupted", number)

    def on_exited(self, name: str, code: int) -> None:
        """Tell the supervisor that a process has ended."""
        self._children[name].has_ended = True
        self._supervisor.send("exited", name, code)

    def on_tick(self) -> None:
        states = {
            name: process_state(child.process.pid) for name, child in self._children.items() if not child.has_ended
        }
        self._supervisor.send("states", states)
        self._quiet_s += TICK_S
        if self._quiet_s > self._timeout_s and not self._is_ending:
            reason = f"nothing was heard from the launcher for {self._timeout_s:g} s"
            self._supervisor.send("gave_up", reason)
            with contextlib.suppress(OSError):
                # In case the pipe is full; in one piece, or else other output could come between.
                print(f"{reason}\n", end="", file=sys.stderr, flush=True)
            self._is_ending = True

    # ------------------------------------------------------------ processes

    def _running(self) -> list[_Child]:
        return [child for child in self._children.values() if not child.has_ended]

    def _running_workers(self) -> list[_Child]:
        return [child for child in self._running() if child.to_worker is not None]

    def _signal(self, children: Sequence[_Child], number: int) -> None:
        for child in children:
            child.signal(number)

    def _start(self, name: str, argv: list[str], environment: dict[str, str], is_worker: bool) -> _Child:
        theirs: list[int] = []
        from_worker, to_worker = None, None
        if is_worker:
            reading, answering = os.pipe()
            saying, writing = os.pipe()
            theirs = [reading, writing]
            from_worker, to_worker = os.fdopen(saying, "rb"), Sender(os.fdopen(answering, "wb"))
            environment[CONTROL_VARIABLE] = f"{reading},{writing}"
        try:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                pass_fds=theirs,
                start_new_session=True,
                preexec_fn=_die_with_parent if is_worker else _serve_until_killed,
            )
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        child = _Child(process, to_worker)
        readers = [
            start_thread(self._hand_on_output, name, stream, cast(BinaryIO, file))
            for stream, file in (("stdout", process.stdout), ("stderr", process.stderr))
        ]
        if from_worker is not None:
            readers.append(start_thread(self._hand_on_messages, name, from_worker))
        start_thread(self._wait_for, name, child, readers)
        return child

    def _hand_on_output(self, name: str, stream: str, file: BinaryIO) -> None:
        for line in read_lines(file):
            self._supervisor.wait_for_room()
            self._supervisor.send("output", name, stream, line)

    def _hand_on_messages(self, name: str, file: BinaryIO) -> None:
        for kind, *content in read_messages(file):
            self._supervisor.send(kind, name, *content)

    def _wait_for(self, name: str, child: _Child, readers: Sequence[threading.Thread]) -> None:
        os.waitid(os.P_PID, child.process.pid, os.WEXITED | os.WNOWAIT)
        child.signal(signal.SIGKILL)  # what it left behind, while its number cannot be another process's
        code = child.process.wait()
        for reader in readers:
            reader.join(_FLUSH_S)
        self.post("exited", name, code)


def process_state(pid: int) -> str:
    """The kernel's letter for the state of a process (R runs, S and D wait, T is stopped); ? if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "?"


def _die_with_parent() -> None:
    """In a process that is about to become another program: have the kernel kill it when the agent dies."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def ignore_stop_signals() -> None:
    """In a process that is about to become another program: ignore the signals that ask it to stop."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _serve_until_killed() -> None:
    _die_with_parent()
    ignore_stop_signals()


def main(argv: Sequence[str]) -> None:
    """Run as the agent of this machine; `argv` holds the time-out in seconds."""
    supervisor = Sender(os.fdopen(os.dup(sys.stdout.fileno()), "wb"))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever else is printed is not a message
    agent = Agent(supervisor, float(argv[0]))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, _: agent.post("interrupted", number))
    start_thread(_listen, agent, os.fdopen(os.dup(sys.stdin.fileno()), "rb"))
    agent.run()


def _listen(agent: Agent, file: BinaryIO) -> None:
    for kind, *content in read_messages(file):
        agent.post(kind, *content)
    agent.post("end", False)


if __name__ == "__main__":
    main(sys.argv[1:])
