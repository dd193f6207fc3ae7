"""Progress: a bar on a terminal, few plain lines elsewhere, nothing for short or nameless work."""

from __future__ import annotations

import io
import time

from gluon_lm.progress import PlainProgress, progress_bar


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
