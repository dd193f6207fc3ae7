"""The one process that owns a cluster: it starts all others, watches them, and ends them all when one ends badly.

MXNet's parameter server waits for ever when a worker or a server is gone, and goes on unnoticed after the death of its
scheduler; its workers cannot ask who is dead. So every process here has an owner, the agent of its machine, every agent
is watched by the supervisor and watches it in turn, and workers report their progress. Whatever happens, nothing is
left running, and one line says who and why.
"""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, BinaryIO, cast

from .. import __version__
from ..errors import DistributedError
from ..logs import detach_if_unread, detach_terminal, tolerate_closed_pipes
from .agent import GRACE_S, STOP_SIGNALS, ignore_stop_signals
from .cluster import Host, Process
from .pipes import TICK_S, EventLoop, Sender, read_lines, read_messages, start_thread

_STOPPED = ("T", "t")
_ERROR = "error: "


class _Agent:
    """What the supervisor knows of an agent."""

    def __init__(self, host: Host, process: subprocess.Popen[bytes]) -> None:
        self.host, self.process = host, process
        self.sender = Sender(cast(BinaryIO, process.stdin))
        self.pid: int | None = None
        self.quiet_s = 0.0
        self.last_words = ""
        self.is_gone = False

    def kill(self) -> None:
        """Kill it, and with it what it owns; on another machine, if that can be reached."""
        if not self.host.is_here and self.pid is not None:
            with contextlib.suppress(subprocess.TimeoutExpired, OSError):
                subprocess.run(
                    self.host.command("kill", "-KILL", str(self.pid)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    timeout=GRACE_S,
                    start_new_session=True,
                )
        self.process.kill()


class _Member:
    """What the supervisor knows of a process of the cluster."""

    def __init__(self, process: Process, agent: _Agent) -> None:
        self.process, self.agent = process, agent
        self.pid: int | None = None
        self.state = "?"
        self.stopped_s = 0.0
        self.code: int | None = None
        self.last_words = self.last_complaint = ""  # on either stream, and on standard error
        self.errors: list[str] = []  # printed in the end: one fault may be that of all
        # Of workers only:
        self.step: int | None = None
        self.has_joined = self.is_waiting = self.has_left = False
        self.value: Any = None

    @property
    def full_name(self) -> str:
        host = "" if self.process.host.is_here else f"host {self.process.host.name}, "
        return f"{self.process.name} ({host}pid {self.pid})"

    def situation(self) -> str:
        """What it is doing, as far as is known."""
        at = "" if self.step is None else f" at step {self.step}"
        if self.code is not None:
            return "has ended"
        if self.state in _STOPPED:
            return f"stopped (state {self.state}){at}"
        if self.is_waiting:
            return f"waiting for the others{at}"
        if self.has_left:
            return f"ending (state {self.state})"
        said = f", having said: {self.last_complaint}" if self.last_complaint else ""
        return (f"in state {self.state}{at}" if at else f"not ready yet (state {self.state})") + said


class Supervisor(EventLoop):
    """Runs the processes of a cluster to their end.

    Parameters
    ----------
    processes : sequence of Process
        Workers, in the order of their numbers, and others that serve them. All get a free port of the first one's host
        as ``DMLC_PS_ROOT_PORT``.
    timeout_s : float
        The cluster is ended when for this long no worker has made progress, or nothing has been heard from a host.
    port : int
        That port; 0 for any.
    """

    def __init__(self, processes: Sequence[Process], timeout_s: float = 60.0, port: int = 0) -> None:
        super().__init__()
        self._processes, self._timeout_s, self._port = processes, timeout_s, port
        self._agents: dict[Host, _Agent] = {}
        self._members: dict[str, _Member] = {}
        self._code: int | None = None
        self._error: Exception | None = None
        self._told: set[str] = set()  # errors of processes that it says
        self._stop: int | None = None
        self._was_signalled = self._is_urgent = False
        self._idle_s = 0.0
        self._printer = _Printer(self)

    @property
    def _workers(self) -> list[_Member]:
        return [member for member in self._members.values() if member.process.role == "worker"]

    def run(self) -> int:
        """Start everything, and return when nothing runs any more.

        Returns
        -------
        int
            0 if all workers ended well; 130, 143 or 129 after Ctrl-C, SIGTERM or a closed terminal, which is passed on
            to the workers. Ctrl-C after another signal ends everything at once.

        Raises
        ------
        DistributedError
            Says which process or host ended the cluster, and why.
        """
        with self._listening_to_signals():
            try:
                self._start_agents()
                self.run_until(self._is_decided)
            finally:
                self._end_all()
        if self._error is not None:
            raise self._error
        return cast(int, self._code)

    def _is_decided(self) -> bool:
        return self._code is not None or self._error is not None

    def _finish(self, code: int) -> None:
        if not self._is_decided():
            self._code = code

    def _fail(self, reason: str) -> None:
        if not self._is_decided():
            self._error = DistributedError(reason)

    def _fail_with(self, member: _Member) -> None:
        if not self._is_decided():
            self._told = set(member.errors)
        self._fail(_last_of(member))

    # ------------------------------------------------------------ agents

    def _start_agents(self) -> None:
        for host in dict.fromkeys(process.host for process in self._processes):
            command = host.command(sys.executable, "-m", "gluon_lm.distributed.agent", f"{self._timeout_s:g}")
            try:
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,  # Ctrl-C is for the supervisor to pass on
                    preexec_fn=ignore_stop_signals,  # ssh as long as it runs, the agent while it starts
                )
            except OSError as error:
                self._fail(f"host {host.name}: {command[0]} cannot be started ({error.strerror})")
                return
            agent = self._agents[host] = _Agent(host, process)
            start_thread(self._listen, agent)

    def _listen(self, agent: _Agent) -> None:
        errors = start_thread(self._listen_to_errors, agent)
        for kind, *content in read_messages(cast(BinaryIO, agent.process.stdout)):
            self.post("message", agent, kind, content)
        errors.join(GRACE_S)
        try:
            code = agent.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            code = None
        self.post("lost", agent, code)

    def _listen_to_errors(self, agent: _Agent) -> None:
        for line in read_lines(cast(BinaryIO, agent.process.stderr)):
            agent.last_words = line.strip() or agent.last_words

    def _end_all(self) -> None:
        self._send_all("end", self._is_urgent)
        self.run_until(lambda: not self._agents_left(), 4 * GRACE_S)
        for agent in self._agents_left():
            start_thread(agent.kill)
        self.run_until(lambda: not self._agents_left(), 2 * GRACE_S)
        self._print_errors()
        self._printer.close()

    def _print_errors(self) -> None:
        """Print what processes gave as their errors, each text once, except for what the last line says."""
        names_by_error: dict[str, list[str]] = {}
        for name, member in self._members.items():
            for error in dict.fromkeys(member.errors):
                names_by_error.setdefault(error, []).append(name)
        for error, names in names_by_error.items():
            if error not in self._told and f"{_ERROR}{error}" not in str(self._error or ""):
                self._printer.print("stderr", f"[{', '.join(names)}] {_ERROR}{error}")

    def _agents_left(self) -> list[_Agent]:
        return [agent for agent in self._agents.values() if not agent.is_gone]

    def _send_all(self, *message: Any) -> None:
        for agent in self._agents.values():
            agent.sender.send(*message)

    def on_message(self, agent: _Agent, kind: str, content: list[Any]) -> None:
        """Handle a message of an agent."""
        agent.quiet_s = 0.0
        getattr(self, f"_hear_{kind}")(agent, *content)

    def on_lost(self, agent: _Agent, code: int | None) -> None:
        """Fail, because an agent is gone."""
        agent.is_gone = True
        program = "its agent" if agent.host.is_here else "ssh"
        reason = f": {agent.last_words}" if agent.last_words else ""
        state = "cannot be used" if agent.pid is None else "is lost"
        self._fail(f"host {agent.host.name} {state}: {program} {_how_it_ended(code)}{reason}")

    def _hear_gave_up(self, agent: _Agent, reason: str) -> None:
        self._fail(f"host {agent.host.name}: its agent gave up: {reason}")

    def _hear_hello(self, agent: _Agent, pid: int, version: str) -> None:
        agent.pid = pid
        if version != __version__:
            self._fail(
                f"host {agent.host.name} has gluon_lm {version} and this machine {__version__}; install the same"
            )
        elif all(agent.pid is not None for agent in self._agents.values()):
            first = self._processes[0].host
            self._agents[first].sender.send("port", first.address, self._port)

    def _hear_no_port(self, agent: _Agent, address: str, port: int, why: str) -> None:
        if port:
            self._fail(f"--port {port}: {address} of host {agent.host.name}: {why}; choose another, or leave it out")
        else:
            self._fail(
                f"host {agent.host.name}: nothing can listen at {address} ({why}); name it as the others reach it"
            )

    def _hear_port(self, agent: _Agent, port: int) -> None:
        starts: dict[Host, list[dict[str, Any]]] = {host: [] for host in self._agents}
        for process in self._processes:
            self._members[process.name] = _Member(process, self._agents[process.host])
            starts[process.host].append(
                {
                    "name": process.name,
                    "argv": list(process.argv),
                    "env": {**process.env, "DMLC_PS_ROOT_PORT": str(port)},
                    "is_worker": process.role == "worker",
                }
            )
        for host, start in starts.items():
            self._agents[host].sender.send("start", start)
        self._idle_s = 0.0

    # ------------------------------------------------------------ processes

    def _hear_started(self, agent: _Agent, name: str, pid: int) -> None:
        self._members[name].pid = pid

    def _hear_not_started(self, agent: _Agent, name: str, why: str) -> None:
        self._fail(f"{name} (host {agent.host.name}) cannot be started: {why}")

    def _hear_states(self, agent: _Agent, states: dict[str, str]) -> None:
        for name, state in states.items():
            self._members[name].state = state

    def _hear_output(self, agent: _Agent, name: str, stream: str, line: str) -> None:
        member = self._members[name]
        member.last_words = line.strip() or member.last_words
        if stream == "stderr":
            member.last_complaint = line.strip() or member.last_complaint
        if stream == "stderr" and line.startswith(_ERROR):
            member.errors.append(line[len(_ERROR) :])
        else:
            self._printer.print(stream, f"[{name}] {line}")

    def _hear_exited(self, agent: _Agent, name: str, code: int) -> None:
        member = self._members[name]
        member.code = code
        if member.process.role != "worker":
            if code != 0:
                self._fail_with(member)
            return
        if self._stop is None and member.has_left and code - 128 in STOP_SIGNALS:
            self._stop = code - 128  # somebody asked this worker, and all have stopped with it
        numbers = () if self._stop is None else STOP_SIGNALS  # it may have got a different one
        code_when_stopped = 128 + (self._stop or 0)
        if code and (code - 128 if code > 0 else -code) not in numbers:
            self._fail_with(member)
        elif code < 0:
            self._finish(code_when_stopped)  # it was not ready yet to stop by itself
        elif all(worker.code is not None for worker in self._workers):
            self._finish(code_when_stopped if any(worker.code for worker in self._workers) else 0)
        else:
            self._check_allgather()

    # ------------------------------------------------------------ messages of workers

    def _hear_join(self, agent: _Agent, name: str) -> None:
        self._members[name].has_joined = True
        self._idle_s = 0.0
        self._hear_allgather(agent, name, None, None)

    def _hear_allgather(self, agent: _Agent, name: str, step: int | None, value: Any) -> None:
        member = self._members[name]
        member.is_waiting, member.step, member.value = True, step, value
        self._check_allgather()

    def _hear_alive(self, agent: _Agent, name: str, step: int | None) -> None:
        self._members[name].step = step
        self._idle_s = 0.0

    def _hear_leave(self, agent: _Agent, name: str) -> None:
        self._members[name].has_left = True
        self._idle_s = 0.0

    def _check_allgather(self) -> None:
        """Give all workers the values of all once the last one has arrived; fail if one has ended before that.

        One that has only announced that it leaves may be about to fail, and then says why when it ends.
        """
        if self._is_decided():
            return
        waiting = [worker for worker in self._workers if worker.is_waiting and worker.code is None]
        ended = [worker for worker in self._workers if worker.code is not None]
        if waiting and ended and self._stop is not None:
            self._finish(128 + self._stop)  # one of them was not ready yet to stop with the others
        elif waiting and ended:
            names = ", ".join(worker.full_name for worker in waiting)
            self._fail(f"{ended[0].full_name} has finished, while {names} waited for it")
        elif len(waiting) == len(self._workers):
            values = [worker.value for worker in waiting]
            for agent in self._agents.values():
                names_here = [worker.process.name for worker in waiting if worker.agent is agent]
                if names_here:
                    agent.sender.send("answer", names_here, values)
            for worker in waiting:
                worker.is_waiting, worker.value = False, None
            self._idle_s = 0.0

    # ------------------------------------------------------------ time

    def on_tick(self) -> None:
        self._send_all("ping")
        for agent in self._agents.values():
            agent.quiet_s += TICK_S
            if agent.quiet_s > self._timeout_s:
                self._fail(f"host {agent.host.name} has not been heard from for {self._timeout_s:g} s")
        if not self._members:
            return
        self._idle_s += TICK_S
        for member in self._members.values():
            is_stopped = member.code is None and member.state in _STOPPED
            member.stopped_s = member.stopped_s + TICK_S if is_stopped else 0.0
        stopped = [member for member in self._members.values() if member.stopped_s > self._timeout_s]
        if self._idle_s > self._timeout_s:
            self._fail(self._explain_standstill())
        elif stopped:
            names = ", ".join(member.full_name for member in stopped)
            self._fail(f"{names} has not gone on for {self._timeout_s:g} s: {stopped[0].situation()}")
        is_missed = any(worker.code is not None and not worker.has_left for worker in self._workers)
        if self._stop is not None and is_missed and self._idle_s > GRACE_S:
            self._finish(128 + self._stop)  # it ended before the others noticed, and MXNet may wait for it for ever

    def _explain_standstill(self) -> str:
        silent = [
            agent.host.name for agent in self._agents.values() if agent.quiet_s > min(GRACE_S, self._timeout_s / 2)
        ]
        if silent:
            return f"nothing is heard from host {', '.join(silent)} any more, and no worker makes progress"
        situations: dict[str, list[str]] = {}
        blamed = [
            m for m in self._members.values() if m.process.role == "worker" or m.state in _STOPPED or m.code is not None
        ]
        for member in sorted(blamed, key=lambda m: (m.state not in _STOPPED, m.is_waiting)):
            situations.setdefault(member.situation(), []).append(member.full_name)
        told = "; ".join(f"{', '.join(names)}: {situation}" for situation, names in situations.items())
        return f"no worker has made progress for {self._timeout_s:g} s; {told}"

    # ------------------------------------------------------------ signals

    @contextlib.contextmanager
    def _listening_to_signals(self) -> Iterator[None]:
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # as under nohup
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, self._note_signal)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            detach_terminal(and_pipes=True)
        tolerate_closed_pipes()
        self.post("interrupt", number)

    def on_interrupt(self, number: int) -> None:
        """Ask the workers to stop; on Ctrl-C after another signal, end everything at once."""
        is_second, self._was_signalled = self._was_signalled or self._is_decided(), True
        if not is_second or number != signal.SIGINT:  # others may come twice, from a group's manager and from a shell
            self._ask_to_stop(number)
        else:
            self._is_urgent = True
            self._send_all("end", True)
            self._finish(128 + (self._stop or number))

    def _hear_interrupted(self, agent: _Agent, number: int) -> None:
        self._ask_to_stop(number)

    def _ask_to_stop(self, number: int) -> None:
        if not self._members:
            self._finish(128 + number)
        elif self._stop in (None, signal.SIGINT) and number != self._stop and not self._is_decided():
            # After Ctrl-C the best model is tested, which SIGTERM ends as well.
            self._stop, self._idle_s = number, 0.0
            for worker in self._workers:
                # One that has not joined has nothing to save, and waits where Python hears no Ctrl-C.
                how = _for_workers(number) if worker.has_joined else signal.SIGTERM
                worker.agent.sender.send("signal", [worker.process.name], how)

    def on_unread(self, error: OSError) -> None:
        """Nobody reads the output any more."""
        if not self._is_decided():
            self._error = error


class _Printer:
    """Prints in a thread of its own: a terminal that blocks must not block anything else."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._streams = {"stdout": sys.stdout, "stderr": sys.stderr}
        self._lines: queue.SimpleQueue[tuple[str, str] | None] = queue.SimpleQueue()
        self._thread = start_thread(self._print)

    def print(self, stream: str, line: str) -> None:
        self._lines.put((stream, line))

    def close(self) -> None:
        """Wait until everything is printed."""
        self._lines.put(None)
        self._thread.join()

    def _print(self) -> None:
        for name, line in iter(self._lines.get, None):
            stream = self._streams[name]
            encoding = stream.encoding or "utf-8"
            try:
                print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
            except OSError as error:
                if not detach_if_unread(error, stream):
                    self._supervisor.post("unread", error)
                    return


def _for_workers(number: int) -> int:
    """The signal that workers get when the launcher got this one: the terminal that is gone was not theirs."""
    return signal.SIGTERM if number == signal.SIGHUP else number


def _last_of(member: _Member) -> str:
    """How a process ended, in one line."""
    if member.errors:
        return f"{member.full_name}: {'; '.join(member.errors)}"
    has_given_up = member.code is not None and member.code > 0
    words = (has_given_up and member.last_complaint) or member.last_words
    said = f"its last words: {words}" if words else "it said nothing"
    return f"{member.full_name} {_how_it_ended(member.code)}; {said}"


def _how_it_ended(code: int | None) -> str:
    if code is None:
        return "does not answer"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"was killed by signal {-code}"
