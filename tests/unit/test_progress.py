"""Progress: a bar on a terminal, few plain lines elsewhere, nothing for short or nameless work."""

from __future__ import annotations

import io
import logging
import time

import pytest

from gluon_lm.logs import LOGGER
from gluon_lm.progress import PlainProgress, TrainingBar, progress_bar


@pytest.fixture(autouse=True)
def nothing_said_of_messages(monkeypatch):
    """As in a process that ran no command before."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "level", logging.NOTSET)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_short_work_is_silent_without_a_terminal(capsys):
    with progress_bar(total=3, desc="counting", unit="step") as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr() == ("", "")


def test_long_work_leaves_a_plain_line_now_and_then(capsys):
    bar = PlainProgress(total=2000, desc="reading", unit="B", interval_s=0.0)
    bar.update(500)
    PlainProgress(total=None, desc="reading", unit="B", interval_s=0.0).update(1500)
    assert capsys.readouterr() == ("", "reading: 25 % (500 of 2,000 B)\nreading: 1,500 B\n")
    seldom = PlainProgress(total=10, desc="reading", unit="B", interval_s=3600.0)
    for _ in range(10):
        seldom.update()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(total=2, desc="counting", unit="step") as bar:
        time.sleep(0.6)  # what is over sooner is not worth a bar
        bar.update(1)
        bar.refresh()
    assert "counting:  50%" in terminal.getvalue() and "step" in terminal.getvalue()


def test_work_without_a_name_shows_nothing_on_a_terminal_either(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with progress_bar(total=2) as bar:
        bar.update(2)
    assert terminal.getvalue() == ""


def test_the_training_bar_tells_the_mean_and_the_time_that_is_left(monkeypatch):
    """Against a clock of its own: 0.5 s a step, 10 steps an epoch, and 5 s for the evaluation after each."""
    terminal, clock = Terminal(), [100.0]
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    bar = TrainingBar(epochs=4)
    for step in range(1, 16):
        clock[0] += 0.5 + 5 * (step == 11)
        epoch, window = divmod(step - 1, 10)
        bar.show(epoch, window + 1, 10, step, lr=0.25, loss=40 * 3.0, targets=40, norm=1.5, seconds=0.5)
    told = terminal.getvalue()
    bar.close()
    # Of 40 steps 25 are left; the 14 since the first one took 12 s. Five of them end the epoch, half a second each.
    last = [state for state in told.replace("\n", "\r").split("\r") if "/10" in state][-1]
    assert last.startswith("epoch   2/4  50%|") and last.rstrip().endswith("5/10, 0:02 left, 0:21 to the end")
    assert "loss  3.00 | ppl    20.09 | lr 0.25 | norm 1.500 | 80 tokens/s" in told
    assert terminal.getvalue().rstrip(" ").endswith("\r")
