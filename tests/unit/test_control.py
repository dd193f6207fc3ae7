"""A worker's channel to the launcher, the lines that processes print, and which machine gets which process."""

from __future__ import annotations

import json
import os
import threading
from collections import Counter

import pytest

from gluon_lm.distributed import control as control_module
from gluon_lm.distributed.cluster import Host, parameter_server, read_hosts
from gluon_lm.distributed.control import Control
from gluon_lm.distributed.pipes import read_lines
from gluon_lm.errors import ConfigError, DistributedError


class Launcher:
    """The other end of a worker's channel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        worker_reads, answers = os.pipe()
        says, worker_writes = os.pipe()
        self.answers, self.says = os.fdopen(answers, "wb", buffering=0), os.fdopen(says, "rb")
        self.descriptors = (worker_reads, worker_writes)
        monkeypatch.setenv("GLUON_LM_CONTROL", f"{worker_reads},{worker_writes}")
        monkeypatch.setenv("GLUON_LM_WORKER", "3")

    def answer(self, value: object) -> None:
        self.answers.write(json.dumps(["answer", value]).encode() + b"\n")

    def hear(self) -> list:
        return json.loads(self.says.readline())


@pytest.fixture
def launcher(monkeypatch):
    launcher = Launcher(monkeypatch)
    yield launcher
    launcher.answers.close()
    launcher.says.close()


def test_a_worker_joins_and_gathers(launcher):
    control = Control.from_environment()
    assert control.index == 3
    launcher.answer([{}, {}])
    control.join()
    assert launcher.hear() == ["join"]
    values = [{"digits": 0.1 + 0.2, "name": "naïve\n"}, [None, True, -(2**60)]]
    launcher.answer(values)
    assert control.allgather(values[1]) == values
    assert launcher.hear() == ["allgather", None, values[1]]
    control.leave()
    assert launcher.hear() == ["leave"]
    control.alive()  # it writes a text, it may be
    assert launcher.hear() == ["alive", None]


def test_values_larger_than_a_pipe_go_through(launcher):
    control = Control.from_environment()
    value = "x" * 3_000_000
    heard = []
    reader = threading.Thread(target=lambda: heard.append(launcher.hear()))
    reader.start()
    writer = threading.Thread(target=launcher.answer, args=([value, value],))
    writer.start()
    assert control.allgather(value) == [value, value]
    reader.join()
    writer.join()
    assert heard == [["allgather", None, value]]


def test_alive_says_the_newest_step_a_few_times_a_second(launcher, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(control_module.time, "monotonic", lambda: clock[0])
    control = Control.from_environment()
    for step in range(1, 101):  # 100 steps in a second
        control.alive(step)
        clock[0] += 0.01
    control.alive()  # evaluation takes no steps
    control.leave()
    del control  # which closes the channel
    *said, leave = map(json.loads, launcher.says)
    assert 3 <= len(said) <= 6 and leave == ["leave"]
    assert said[0] == ["alive", 1] and said[-1] == ["alive", 100]


@pytest.mark.parametrize("act", [lambda c: c.allgather(1), lambda c: c.join(), lambda c: c.alive()])
def test_a_launcher_that_is_gone_is_an_error_and_leaving_is_none(launcher, act):
    control = Control.from_environment()
    launcher.says.close()
    with pytest.raises(DistributedError, match="worker 3: the launcher's agent .* is gone"):
        act(control)
    control.leave()


def test_a_launcher_that_goes_while_a_worker_waits_is_an_error(launcher):
    control = Control.from_environment()
    launcher.answers.write(b'["answer", [1')
    launcher.answers.close()
    with pytest.raises(DistributedError, match="is gone"):
        control.allgather(1)


def test_the_channel_belongs_to_one_process(launcher):
    control, another = Control.from_environment(), Control.from_environment()
    assert control is not None and another is None
    assert not any(os.get_inheritable(descriptor) for descriptor in launcher.descriptors)


@pytest.mark.parametrize("numbers", ["", "5", "a,b", "98765,98766"])
def test_a_channel_that_is_not_there_is_one_line(monkeypatch, numbers):
    monkeypatch.setenv("GLUON_LM_CONTROL", numbers)
    with pytest.raises(DistributedError, match="leave both to python -m gluon_lm.launch"):
        Control.from_environment()


@pytest.mark.parametrize(
    "blocks, lines",
    [
        ([b"one\ntwo\n"], ["one", "two"]),
        ([b"o", b"ne\nt", b"wo"], ["one", "two"]),
        ([b"na\xc3", b"\xafve\n"], ["naïve"]),
        ([b"\xff\n"], ["\ufffd"]),
        ([b"windows\r", b"\nline\r\n"], ["windows", "line"]),
        ([b"\r 10%", b"\r 20%", b"\r     \r", b"done\n"], ["done"]),  # a progress bar that clears itself
        ([b"\r 10%\r", b" 20%\r"], []),
        ([b"10%\r100%\nnext\n"], ["100%", "next"]),
        ([b"\n", b"\n"], ["", ""]),
    ],
)
def test_lines_are_what_a_terminal_shows(blocks, lines):
    assert list(printed(blocks)) == lines


def test_no_line_however_long_is_kept_for_ever():
    lines = list(printed([b"x" * 1000] * 200))
    assert "".join(lines) == "x" * 200_000
    assert len(lines) > 1


def printed(blocks):
    """The lines of a program that prints these blocks one after the other."""
    reading, writing = os.pipe()

    def write():
        for block in blocks:
            os.write(writing, block)
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    yield from read_lines(os.fdopen(reading, "rb"))
    writer.join()


def test_a_host_file_names_machines_and_slots(tmp_path):
    path = tmp_path / "hosts"
    path.write_text(
        "# machines\n127.0.0.2 slots=2  # the big one\n\nsomeone@127.0.0.3:4\n 127.0.0.4\n127.0.0.5 slots = 3\n"
    )
    assert read_hosts(path) == [
        Host("127.0.0.2", "127.0.0.2", 2),
        Host("someone@127.0.0.3", "127.0.0.3", 4),
        Host("127.0.0.4", "127.0.0.4", 1),
        Host("127.0.0.5", "127.0.0.5", 3),
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("# none\n\n", "names no host; write one per line, or leave it out"),
        ("127.0.0.2\n127.0.0.3 slots=0\n", r"line 2: '?127.0.0.3 slots=0'?: must be host, host slots=N or host:N"),
        ("127.0.0.2 slots=\n", "line 1"),
        ("127.0.0.2 4\n", "line 1"),
        ("-oProxyCommand=sh\n", "line 1"),
        ("a;b\n", "line 1"),
        ("127.0.0.2\n127.0.0.2:3\n", "line 2: 127.0.0.2 is listed already"),
    ],
)
def test_a_wrong_host_file_is_one_line(tmp_path, text, said):
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as raised:
        read_hosts(path)
    assert len(raised.value.problems) == 1


def test_this_machine_among_others_needs_a_name_that_they_know(tmp_path):
    path = tmp_path / "hosts"
    path.write_text("127.0.0.1\n192.0.2.7\n")
    with pytest.raises(DistributedError, match="on the other machines, 127.0.0.1 means those themselves"):
        read_hosts(path)


def test_workers_fill_the_slots_in_turn_and_servers_spread(monkeypatch):
    monkeypatch.setenv("MXNET_KVSTORE_BIGARRAY_BOUND", "1000")
    a, b = Host("a", "192.0.2.1", 2), Host("b", "192.0.2.2", 1)
    processes = parameter_server([a, b], 5, 3, ["train"])
    places = [(process.name, process.host.name) for process in processes]
    assert places == [
        ("scheduler", "a"),
        *[("server 0", "a"), ("server 1", "b"), ("server 2", "a")],
        *[("worker 0", "a"), ("worker 1", "a"), ("worker 2", "b"), ("worker 3", "a"), ("worker 4", "a")],
    ]
    assert Counter(process.env["DMLC_ROLE"] for process in processes) == {"scheduler": 1, "server": 3, "worker": 5}
    for process in processes:
        assert process.env["DMLC_PS_ROOT_URI"] == "192.0.2.1"
        assert process.env["DMLC_NODE_HOST"] == process.host.address
        assert (process.env["DMLC_NUM_WORKER"], process.env["DMLC_NUM_SERVER"]) == ("5", "3")
        assert process.env["MXNET_KVSTORE_BIGARRAY_BOUND"] == "1000"  # what the user set, on every machine
