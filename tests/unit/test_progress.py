"""Progress: a bar on a terminal, few plain lines elsewhere, nothing for short or nameless work."""

from __future__ import annotations

import io
import logging
import time

import numpy as np
import pytest

from gluon_lm import heartbeat
from gluon_lm.files import file_hash, read_arrays, synchronise, write_arrays
from gluon_lm.logs import LOGGER, is_quiet, logging_for_file
from gluon_lm.progress import Place, PlainProgress, TrainingBar, progress_bar
from gluon_lm.training.step import StepResult


@pytest.fixture(autouse=True)
def nothing_said_of_messages(monkeypatch):
    """As in a process that ran no command before."""
    monkeypatch.setattr(LOGGER, "handlers", [])
    monkeypatch.setattr(LOGGER, "level", logging.NOTSET)


@pytest.fixture
def beats(monkeypatch):
    """A list that grows by one with each heartbeat."""
    beats = []
    monkeypatch.setattr(heartbeat, "_listeners", [])
    heartbeat.listen(lambda step: beats.append(len(beats)))
    return beats


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
    PlainProgress(total=40, desc="evaluating", unit="token", interval_s=0.0).update(10)
    assert capsys.readouterr() == ("", "evaluating: 25 % (10 of 40 tokens)\n")
    seldom = PlainProgress(total=10, desc="reading", unit="B", interval_s=3600.0)
    for _ in range(10):
        seldom.update()
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
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
        result = StepResult(loss_sum=40 * 3.0, num_targets=40, grad_norm=1.5, stop_signal=0)
        bar.show(Place(epoch + 1, window + 1, 10), step, 0.25, result, seconds=0.5)
    told = terminal.getvalue()
    bar.close()
    # Of 40 steps 25 are left; the 14 since the first one took 12 s. Five of them end the epoch, half a second each.
    last = [state for state in told.replace("\n", "\r").split("\r") if "/10" in state][-1]
    assert last.startswith("epoch   2/4  50%|") and last.rstrip().endswith("5/10, 0:02 left, 0:21 to the end")
    assert "loss  3.00 | ppl    20.09 | lr 0.25 | norm 1.500 | 80 tokens/s" in told
    assert terminal.getvalue().rstrip(" ").endswith("\r")


@pytest.mark.parametrize("level", [logging.NOTSET, logging.INFO, logging.ERROR])
@pytest.mark.parametrize("handlers", ["package's", "root's", "none"])
def test_a_program_hears_of_a_run_what_it_asked_logging_for(monkeypatch, capfd, level, handlers):
    own = logging.StreamHandler(io.StringIO())
    root = logging.RootLogger(logging.WARNING)
    monkeypatch.setattr(LOGGER, "parent", root)
    if handlers != "none":
        (LOGGER if handlers == "package's" else root).addHandler(own)
    LOGGER.setLevel(level)

    def say():
        LOGGER.debug("debug")
        LOGGER.info("info")
        LOGGER.warning("warning")
        LOGGER.error("error")
        last_resort, heard = capfd.readouterr().err, own.stream.getvalue()
        own.stream.seek(own.stream.truncate(0))
        return heard, last_resort, is_quiet()

    before = say()
    with logging_for_file():
        assert say() == before
    assert say() == before


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
@pytest.mark.parametrize("level", [logging.NOTSET, logging.WARNING])
def test_each_piece_of_long_work_is_a_heartbeat_shown_or_not(monkeypatch, beats, stream, level):
    monkeypatch.setattr("sys.stderr", stream())
    monkeypatch.setattr(LOGGER, "level", level)
    with progress_bar(total=3, desc="counting", unit="step") as bar:
        for done in range(3):
            before = len(beats)
            bar.update()
            assert len(beats) > before, done


def test_a_heartbeat_says_the_step_where_there_is_one(monkeypatch):
    heard = []
    monkeypatch.setattr(heartbeat, "_listeners", [])
    heartbeat.listen(heard.append)
    heartbeat.beat(3)
    heartbeat.beat()
    assert heard == [3, None]


def test_files_are_written_and_read_with_heartbeats(tmp_path, beats):
    path, arrays = tmp_path / "arrays.npz", {str(i): np.zeros(1 << 18) for i in range(3)}
    for work, at_least in (
        (lambda: write_arrays(path, arrays.items()), 3),
        (lambda: synchronise(path), 1),
        (lambda: file_hash(path), 6),
        (lambda: list(read_arrays(path)), 3),
    ):
        before = len(beats)
        work()
        assert len(beats) - before >= at_least
