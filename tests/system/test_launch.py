"""Whatever happens to a cluster, nothing is left running, and one line says who and why.

The workers are small programs that only use their channel to the launcher; one test runs MXNet's parameter server.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import yaml
from processes import Process, environment, running, wait_until

TIMEOUT_S = 6

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes through /proc"),
]

# Runs the processes that its argument lists.
SUPERVISOR = """
import json, sys
from gluon_lm.cli import run_command
from gluon_lm.distributed.cluster import Host, Process
from gluon_lm.distributed.supervisor import Supervisor

def run(argv):
    processes = [
        Process(role, index, command, Host(address, address), {"GLUON_LM_WORKER": str(index)})
        for role, index, command, address in json.loads(argv[0])
    ]
    return Supervisor(processes, float(argv[1])).run()

sys.exit(run_command(run))
"""

# A worker that takes steps with the others until one of them is asked to stop; some do something else at step 3.
WORKER = """
import contextlib, os, signal, sys, time
from gluon_lm.distributed.control import Control
from gluon_lm.heartbeat import listen
from gluon_lm.progress import progress_bar

what, asked = sys.argv[1], []

def refuse(number, _):
    with contextlib.suppress(OSError):
        os.write(1, b"will not stop\\n")

for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, refuse if what == "deaf" else lambda number, _: asked.append(number))
control = Control.from_environment()
if what in ("connects", "late"):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
if what in ("connects", "waits"):
    print("waits for the others", flush=True)
if what == "connects":
    time.sleep(600)  # as within MXNet, until the others connect, too
if what == "late":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("reads the text", flush=True)
    time.sleep(600)
control.join()
listen(control.alive)
print("joined", flush=True)
if what == "number":
    print("number", os.environ["GLUON_LM_LOCAL_WORKER"])
    sys.exit()
for step in range(1, 1_000_000):
    control.alive(step)
    requests = sum(control.allgather(asked), [])
    if requests:
        print("stopped by itself", flush=True)
        control.leave()
        sys.exit(128 + requests[0])
    if step == 3:
        print("third step", flush=True)
        if what == "finish":
            control.leave()
            sys.exit(0)
        if what in ("write", "leave and fail"):
            control.leave()
            with progress_bar() as bar:
                for _ in range(80):
                    time.sleep(0.1)
                    bar.update()
            sys.exit("error: no space left" if what == "leave and fail" else 0)
        if what == "evaluate":
            while True:
                control.alive(step)
                time.sleep(0.1)
        if what == "complain":
            print("error: the disk is slow", file=sys.stderr, flush=True)
        if what == "complain in part":
            print("error: must be smaller", file=sys.stderr, flush=True)
        if what == "error":
            time.sleep(1)  # the others complain meanwhile
            print("error: lr: must be smaller", file=sys.stderr)
            sys.exit(2)
        if what == "crash":
            raise ValueError("such bad luck")
        if what == "endless loop":
            print("that is odd", file=sys.stderr, flush=True)
            while True:
                pass
    time.sleep(0.01)
"""

# Stands for ssh: a process of its own that passes on what goes to and fro between it and a local shell.
SSH = """#!%s
import os, subprocess, sys, threading
*options, host, command = sys.argv[1:]
if host == "127.0.0.9":
    sys.exit("ssh: connect to host 127.0.0.9 port 22: Connection refused")
shell = subprocess.Popen(["sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
def forward():
    for line in sys.stdin.buffer:
        shell.stdin.write(line)
        shell.stdin.flush()
    shell.stdin.close()
threading.Thread(target=forward, daemon=True).start()
for line in shell.stdout:
    os.write(1, line)
os._exit(shell.wait())
"""


class Cluster:
    """A cluster in processes of its own, all of which run in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.pids = partial(running, folder)
        (folder / "worker.py").write_text(WORKER)
        (folder / "ssh").write_text(SSH % sys.executable)
        (folder / "ssh").chmod(0o755)

    def launch(self, *words: object, **settings) -> None:
        """Start Python in a process, with these settings of `Process`."""
        path = f"{self._folder}:{os.environ['PATH']}"
        self.process = Process(sys.executable, *words, cwd=self._folder, env=environment(PATH=path), **settings)
        self.lines = self.process.lines

    def supervise(
        self, *workers: str, hosts: tuple[str, ...] = ("127.0.0.1",), timeout_s: float = 60, **settings
    ) -> None:
        """Start workers of these kinds and a server, dealt out to the hosts in turn, the server to the last one."""
        sleep = [sys.executable, "-c", "import time; time.sleep(100_000)"]
        worker = [sys.executable, "worker.py"]
        processes = [("worker", i, [*worker, kind], hosts[i % len(hosts)]) for i, kind in enumerate(workers)]
        processes.append(("server", 0, sleep, hosts[-1]))
        self.launch("-c", SUPERVISOR, json.dumps(processes), timeout_s, **settings)

    def worker(self, index: int) -> int:
        (pid,) = self.pids("worker.py", f"GLUON_LM_WORKER={index}")
        return pid

    def server(self) -> int:
        (pid,) = self.pids("100_000)\0")
        return pid

    def agents(self) -> list[int]:
        return self.pids("-m\0gluon_lm.distributed.agent\0")

    def end(self, code: int) -> list[str]:
        """Wait for the end, expect an exit code and nothing left; returns all lines of output."""
        self.process.communicate(timeout=130)
        assert self.process.returncode == code, self.lines
        wait_until(lambda: not self.pids())
        return self.lines


@pytest.fixture
def cluster(tmp_path):
    cluster = Cluster(tmp_path)
    yield cluster
    for pid in cluster.pids():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_output_has_names_and_all_ends_when_the_workers_have_finished(cluster):
    cluster.supervise("finish", "finish", "finish")
    lines = cluster.end(code=0)
    expected = [f"[worker {i}] {said}" for i in range(3) for said in ("joined", "third step")]
    assert sorted(lines) == sorted(expected)


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_a_killed_process_ends_all_others(cluster, victim):
    cluster.supervise("train", "train", "train")
    cluster.process.wait_for("third step", times=3)
    pid = cluster.worker(2) if victim == "worker" else cluster.server()
    os.kill(pid, signal.SIGKILL)
    last_line = cluster.end(code=2)[-1]
    name, words = ("worker 2", "its last words: third step") if victim == "worker" else ("server 0", "it said nothing")
    assert last_line == f"error: {name} (pid {pid}) was killed by SIGKILL; {words}"


def test_a_killed_agent_takes_its_processes_with_it(cluster):
    cluster.supervise("train", "train")
    cluster.process.wait_for("third step", times=2)
    (agent,) = cluster.agents()
    os.kill(agent, signal.SIGKILL)
    assert cluster.end(code=2)[-1] == "error: host 127.0.0.1 is lost: its agent was killed by SIGKILL"


@pytest.mark.parametrize("hosts", [("127.0.0.1",), ("127.0.0.2", "127.0.0.3")], ids=["here", "over ssh"])
def test_nothing_outlives_a_killed_launcher(cluster, hosts):
    cluster.supervise("train", "deaf", hosts=hosts)
    cluster.process.wait_for("third step", times=2)
    assert len(cluster.pids()) > 4
    cluster.process.kill()
    wait_until(lambda: not cluster.pids())


def test_a_stopped_worker_is_named_with_its_step_after_the_timeout(cluster):
    cluster.supervise("train", "train", "train", timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=3)
    stopped, *others = (cluster.worker(i) for i in (1, 0, 2))
    os.kill(stopped, signal.SIGSTOP)
    last_line = cluster.end(code=2)[-1]
    standstill = f"error: no worker has made progress for {TIMEOUT_S} s"
    assert last_line.startswith(f"{standstill}; worker 1 (pid {stopped}): stopped (state T) at step ")
    for worker in (f"worker 0 (pid {others[0]})", f"worker 2 (pid {others[1]})"):
        assert worker in last_line.partition("; worker 1")[2]
    assert "waiting for the others at step" in last_line


def test_a_stopped_worker_is_named_however_long_another_one_evaluates_and_one_that_waits_is_let_wait(cluster):
    cluster.supervise("evaluate", "train", timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=2)
    time.sleep(1.5 * TIMEOUT_S)
    assert cluster.process.poll() is None, cluster.lines
    stopped = cluster.worker(1)
    os.kill(stopped, signal.SIGSTOP)
    last_line = cluster.end(code=2)[-1]
    assert last_line == (
        f"error: worker 1 (pid {stopped}) has not gone on for {TIMEOUT_S} s: stopped (state T) at step 4"
    )


def test_a_worker_that_still_writes_when_the_others_have_ended_is_let_write(cluster):
    cluster.supervise("write", "finish", timeout_s=TIMEOUT_S)
    cluster.end(code=0)


def test_a_worker_that_computes_for_ever_counts_as_hanging(cluster):
    cluster.supervise("train", "endless loop", timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=2)
    pids = [cluster.worker(i) for i in range(2)]
    assert cluster.end(code=2)[-1] == "; ".join(
        [
            f"error: no worker has made progress for {TIMEOUT_S} s",
            f"worker 1 (pid {pids[1]}): in state R at step 3, having said: that is odd",
            f"worker 0 (pid {pids[0]}): waiting for the others at step 4",
        ]
    )


@pytest.mark.parametrize(
    "kind, reason",
    [
        ("error", ": lr: must be smaller"),
        ("crash", " ended with exit code 1; its last words: ValueError: such bad luck"),
        ("leave and fail", ": no space left"),
        ("finish", " has finished, while worker 0"),
    ],
)
def test_the_last_line_says_how_a_worker_failed(cluster, kind, reason):
    cluster.supervise("train", kind)
    cluster.process.wait_for("third step", times=2)
    last_line = cluster.end(code=2)[-1]
    assert last_line.startswith("error: worker 1 (pid ") and reason in last_line


def test_a_fault_of_all_workers_is_one_line_and_that_of_another_is_not_lost(cluster):
    cluster.supervise("error", "error", "error", timeout_s=TIMEOUT_S)
    said = [line for line in cluster.end(code=2) if "must be smaller" in line]
    assert len(said) == 1 and re.match(r"error: worker \d \(pid \d+\): lr: must be smaller$", said[0])


def test_errors_that_the_last_line_does_not_say_are_printed_with_the_names_of_who_said_them(cluster):
    cluster.supervise("complain", "complain", "complain in part", "error")
    *lines, last_line = cluster.end(code=2)
    assert "[worker 0, worker 1] error: the disk is slow" in lines
    assert "[worker 2] error: must be smaller" in lines  # although these words are in the last line
    assert last_line.startswith("error: worker 3 (pid ") and last_line.endswith("): lr: must be smaller")


@pytest.mark.parametrize(
    "whom, number, code",
    [
        ("launcher", signal.SIGINT, 130),
        ("launcher", signal.SIGTERM, 143),
        ("all", signal.SIGINT, 130),
        ("all", signal.SIGTERM, 143),
        ("worker", signal.SIGTERM, 143),
    ],
)
def test_workers_stop_by_themselves_whoever_is_asked_to(cluster, whom, number, code):
    cluster.supervise("train", "train", hosts=("127.0.0.2", "127.0.0.3") if whom == "all" else ("127.0.0.1",))
    cluster.process.wait_for("third step", times=2)
    asked = {"launcher": lambda: [cluster.process.pid], "all": cluster.pids, "worker": lambda: [cluster.worker(1)]}
    for pid in asked[whom]():
        with contextlib.suppress(ProcessLookupError):  # it has ended by the signal to another one
            os.kill(pid, number)
    lines = cluster.end(code)
    assert sorted(lines[-2:]) == ["[worker 0] stopped by itself", "[worker 1] stopped by itself"]


def test_what_workers_say_at_their_end_is_in_the_log_of_a_launcher_whose_terminal_is_closed(cluster, tmp_path):
    path = tmp_path / "log"
    with open(path, "w") as log:
        cluster.supervise("train", "train", stdout=log)
    wait_until(lambda: path.read_text().count("third step") == 2, process=cluster.process)
    cluster.process.send_signal(signal.SIGHUP)
    cluster.end(code=129)
    assert path.read_text().count("stopped by itself") == 2


def test_workers_that_were_asked_to_stop_and_hang_have_failed(cluster):
    cluster.supervise("train", "endless loop", timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=2)
    cluster.process.send_signal(signal.SIGTERM)
    last_line = cluster.end(code=2)[-1]
    assert last_line.startswith(f"error: no worker has made progress for {TIMEOUT_S} s; worker 1 ")


@pytest.mark.parametrize("other", ["waits", "connects"])
def test_ctrl_c_while_one_is_not_ready_and_another_waits_for_it_is_no_error(cluster, other):
    cluster.supervise(other, "late", timeout_s=10_000)
    cluster.process.wait_for("reads the text")
    cluster.process.wait_for("waits for the others")
    time.sleep(1)  # it does by now; a signal before that would only prove less
    cluster.process.send_signal(signal.SIGINT)
    assert not [line for line in cluster.end(code=130) if line.startswith("error: ")]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_after_another_signal_waits_for_nobody_and_sigterm_is_patient(cluster, first):
    cluster.supervise("deaf", "deaf", timeout_s=10_000)
    cluster.process.wait_for("third step", times=2)
    cluster.process.send_signal(first)
    cluster.process.wait_for("will not stop", times=2)
    cluster.process.send_signal(signal.SIGTERM)
    time.sleep(1)
    assert cluster.process.poll() is None
    cluster.process.send_signal(signal.SIGINT)
    assert cluster.end(code=143)[-1].endswith("] will not stop")


def test_workers_on_other_machines_run_over_ssh(cluster):
    cluster.supervise("finish", "finish", "finish", "finish", hosts=("127.0.0.2", "127.0.0.3"))
    assert sum(line.endswith("third step") for line in cluster.end(code=0)) == 4


def test_workers_know_their_numbers_on_their_machine(cluster):
    cluster.supervise(*["number"] * 5, hosts=("127.0.0.2", "127.0.0.3"))
    numbers = [line for line in cluster.end(code=0) if "number" in line]
    assert sorted(numbers) == [f"[worker {i}] number {i // 2}" for i in range(5)]


def test_a_machine_that_is_cut_off_ends_its_own_and_is_named(cluster):
    cluster.supervise("train", "train", hosts=("127.0.0.2", "127.0.0.3"), timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=2)
    (connection,) = cluster.pids("127.0.0.3\0cd ")
    os.kill(connection, signal.SIGSTOP)
    last_line = cluster.end(code=2)[-1]
    assert "host 127.0.0.3" in last_line and "heard from" in last_line


def test_an_agent_that_hears_nothing_ends_its_processes(cluster):
    cluster.launch("-m", "gluon_lm.distributed.agent", TIMEOUT_S, stdin=subprocess.PIPE)
    sleep = {"name": "server 0", "argv": ["sleep", "100000"], "env": {}, "is_worker": False}
    print(json.dumps(["start", [sleep]]), file=cluster.process.stdin, flush=True)
    cluster.process.wait_for('["started","server 0"')
    assert cluster.pids("sleep\0")
    lines = cluster.end(code=0)  # with its input still open
    assert f"nothing was heard from the launcher for {TIMEOUT_S} s" in lines


def test_a_launcher_that_was_stopped_for_too_long_says_that_it_was_not_heard_from(cluster):
    cluster.supervise("train", "train", timeout_s=TIMEOUT_S)
    cluster.process.wait_for("third step", times=2)
    cluster.process.send_signal(signal.SIGSTOP)
    wait_until(lambda: not cluster.agents(), process=cluster.process)
    cluster.process.send_signal(signal.SIGCONT)
    gave_up = f"error: host 127.0.0.1: its agent gave up: nothing was heard from the launcher for {TIMEOUT_S} s"
    assert cluster.end(code=2)[-1] == gave_up


def test_a_machine_that_refuses_is_named_with_the_words_of_ssh(cluster):
    cluster.supervise("train", "train", hosts=("127.0.0.2", "127.0.0.9"))
    assert cluster.end(code=2) == [
        "error: host 127.0.0.9 cannot be used: ssh ended with exit code 1: "
        "ssh: connect to host 127.0.0.9 port 22: Connection refused"
    ]


@pytest.mark.parametrize(
    "words, said",
    [
        ((), "no flags for train"),
        (("--",), "no flags for train"),
        (("--workers", 0, "--", "--tied"), "--workers 0: must be a whole number, 1 or more"),
        (("--servers", 0, "--", "--tied"), "--servers 0: must be a whole number, 1 or more"),
        (("--", "--kvstore", "dist_async"), "stale parameters"),
        (("--", "--kvstore=device", "--cpus", 2), "--kvstore device: must be dist_sync or dist_device_sync"),
        (("--", "--kvstore", "device"), "--kvstore device: must be dist_sync or dist_device_sync"),
        (("--", "--kvstore", "none"), "--kvstore none: must be dist_sync or dist_device_sync here, or left out"),
        (("--", "--kvstore", "local", "--gctype", "2bit"), "--kvstore local: must be dist_sync or dist_device_sync"),
        (("--", "--horovod"), "--horovod: is for processes that horovodrun starts; leave it out"),
        (("--", "--gctype", "fp16"), "only Horovod sends half precision; use --gctype none"),
        (("--", "--droput", 0.5), "--droput: unknown flag"),
        (
            ("--data", "text", "--workers", 2, "--", "--tied"),
            "--data: unknown flag; it is a flag of train: write it after",
        ),
        (("--", "--data", "text", "--save", "run"), "--save run: exists already"),
        (("--", "--data", "text", "--batch-size", 5), "--batch-size 5: must be a multiple of the number of devices, 2"),
        (("--", "--resume", "nowhere"), "nowhere: there is no such run"),
        (("--", "--data", "nothere"), "--data nothere: must be a corpus"),
        (("--hostfile", "nowhere.txt", "--", "--tied"), "nowhere.txt: cannot be read (No such file or directory)"),
        (("--hostfile", "hosts.txt", "--", "--tied"), "host nowhere.invalid: has no address"),
    ],
)
def test_what_cannot_be_started_is_one_line(project, words, said):
    (project.path / "hosts.txt").write_text("nowhere.invalid slots=2\n")
    (project.path / "run").mkdir()
    (line,) = project.run("launch", *words, code=2).splitlines()
    assert line.startswith("error: ") and said in line


def test_a_run_that_is_seen_from_here_goes_on_elsewhere_as_it_was(project):
    (project.path / "hosts.txt").write_text("nowhere.invalid slots=2\n")
    project.have_trained("run")
    config = project.path / "run/config.yaml"
    config.write_text(re.sub("kvstore: .*", "kvstore: dist_device_sync", config.read_text()))
    printed = project.run("launch", "--hostfile", "hosts.txt", "--", "--resume", "run", "--print-config")
    assert yaml.safe_load(printed)["kvstore"] == "dist_device_sync" and "hidden_size: 200" not in printed


def test_a_run_that_is_not_seen_from_here_goes_on_with_a_parameter_server_that_is_named(cluster, tmp_path):
    (tmp_path / "hosts.txt").write_text("127.0.0.2\n127.0.0.3\n")
    cluster.launch("-m", "gluon_lm.launch", "--hostfile", "hosts.txt", "--", "--resume", "elsewhere")
    first_line, last_line = cluster.end(code=2)
    assert first_line == "elsewhere is not seen from here, so whatever it has, --kvstore dist_sync is used"
    assert re.match(r"error: worker \d \(host 127.0.0.\d, pid \d+\): elsewhere: there is no such run", last_line)


def test_the_configuration_is_printed_once_and_nothing_started(project):
    flags = ("--data", "text", "--tied", "--hybridize")
    warning, printed = project.run("launch", "--workers", 3, "--", *flags, "--print-config").split("\n", 1)
    assert warning == "warning: --hybridize: is always on here; leave it out" and warning not in printed
    assert yaml.safe_load(printed)["kvstore"] == "dist_sync" and printed.count("recipe:") == 1


def test_a_port_that_is_taken_is_named(cluster, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("some words of a line\n" * 100)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster.launch("-m", "gluon_lm.launch", "--port", port, "--", "--data", text, "--tied")
        (line,) = cluster.end(code=2)
    assert line.startswith(f"error: --port {port}: ") and "Address already in use" in line


PARAMETER_SERVER = """
import sys
from gluon_lm.distributed.cluster import Host, parameter_server
from gluon_lm.distributed.supervisor import Supervisor

sys.exit(Supervisor(parameter_server([Host()], 3, 2, [sys.executable, "adding.py"])).run())
"""

ADDING_WORKER = """
import pickle
from gluon_lm.distributed.control import Control
import mxnet as mx

class Program:
    def __reduce__(self):
        return open, ("ran by a server", "w")

control = Control.from_environment()
store = mx.kv.create("dist_sync")
mx.base.check_call(mx.base._LIB.MXKVStoreSetBarrierBeforeExit(store.handle, 0))  # none waits for one that failed
control.join()
store._send_command_to_servers(0, pickle.dumps(Program(), 0).decode())  # as it sends an optimiser
store.init(0, mx.nd.zeros((3, 4)))
total = mx.nd.zeros((3, 4))
for step in range(3):
    store.push(0, mx.nd.full((3, 4), 10 ** store.rank))
    store.pull(0, out=total)
    assert total.asnumpy().min() == total.asnumpy().max() == 111
    assert control.allgather(control.index) == [0, 1, 2]
print("added up by", store.num_workers)
control.leave()
"""


def test_mxnets_parameter_servers_start_add_up_and_end_and_run_no_program_that_they_are_sent(cluster, tmp_path):
    (tmp_path / "adding.py").write_text(ADDING_WORKER)
    cluster.launch("-c", PARAMETER_SERVER)
    lines = cluster.end(code=0)
    assert sorted(line for line in lines if "added" in line) == [f"[worker {rank}] added up by 3" for rank in range(3)]
    assert not (tmp_path / "ran by a server").exists()
