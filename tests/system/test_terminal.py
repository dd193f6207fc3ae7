"""Commands on a terminal of their own that is closed, as when a connection breaks off."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import termios
import threading

import pytest
from processes import environment, wait_until

TRAIN = ("train",)
LAUNCH = ("launch", "--workers", 2, "--", "--kvstore", "dist_sync")


class Terminal:
    """A process that has a terminal to itself, and what it wrote there."""

    def __init__(self, project, words, at_hang_up):
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))

        def begin():
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, at_hang_up)

        self.process = subprocess.Popen(
            project.command(*words),
            cwd=project.path,
            env=environment(TERM="xterm"),
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=begin,
        )
        os.close(theirs)
        self.written = b""
        self._closing = threading.Event()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        os.set_blocking(self._ours, False)
        while not self._closing.wait(0.01):
            try:
                self.written += os.read(self._ours, 1 << 16)
            except BlockingIOError:
                continue
            except OSError:  # nobody writes there any more
                return

    def close(self):
        """Hang up."""
        self._closing.set()
        self._reader.join(timeout=10)
        os.close(self._ours)


@pytest.fixture
def start(project):
    terminals = []

    def begin(*words, at_hang_up=signal.SIG_DFL):
        terminals.append(Terminal(project, words, at_hang_up))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.process.terminate()  # a launcher then ends all that it has started
        try:
            terminal.process.wait(timeout=60)
        finally:
            terminal.process.kill()


@pytest.mark.parametrize("command", [TRAIN, LAUNCH], ids=["train", "launch"])
def test_a_closed_terminal_stops_training_with_a_checkpoint(project, start, command):
    flags = [*project.training_flags, "--epochs", 100_000, "--eval-every", 1_000_000, "--save", "run"]
    terminal = start(*command, *flags)
    metrics = project.path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process=terminal.process)  # a first step is taken
    wait_until(lambda: b"tokens (train / valid / test)" in terminal.written, process=terminal.process)
    if command is TRAIN:  # a launcher's workers write to pipes
        wait_until(lambda: b"epoch   1/100000 " in terminal.written, process=terminal.process)
        wait_until(lambda: b" left" in terminal.written, process=terminal.process)
    terminal.close()
    terminal.process.send_signal(signal.SIGHUP)  # a shell tells its jobs once more
    assert terminal.process.wait(timeout=60) == 128 + signal.SIGHUP
    status = json.loads((project.path / "run/status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", None)
    assert (project.path / "run/latest/state.json").exists()
    log = (project.path / "run/log.txt").read_text()
    name = "SIGHUP" if command is TRAIN else "SIGTERM"  # what a launcher sends, whose workers' pipes lead to it
    assert f"{name}: stopping after this step; the run can go on from there" in log
    assert "stopped at step" in log and "test ppl" not in log


@pytest.mark.parametrize("command", [TRAIN, LAUNCH], ids=["train", "launch"])
def test_under_nohup_training_goes_on(project, start, command):
    flags = [*project.training_flags, "--epochs", 100_000, "--save", "run"]
    terminal = start(*command, *flags, at_hang_up=signal.SIG_IGN)
    metrics = project.path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process=terminal.process)
    terminal.close()
    terminal.process.send_signal(signal.SIGHUP)
    size = metrics.stat().st_size
    wait_until(lambda: metrics.stat().st_size > size + 2000, process=terminal.process)
