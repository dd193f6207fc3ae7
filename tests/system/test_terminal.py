"""What a user sees of a command while it works: on a pseudo-terminal, in a pipe, and under --quiet."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib
import io
import os
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

from loopback import Server

from gluon_lm import progress
from gluon_lm.data import CORPORA
from gluon_lm.data.corpora import PublishedCorpus
from gluon_lm.data.download import PlainMirror, PublishedFile
from gluon_lm.generate import main

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--data", "text", "--emsize", 8, "--nhid", 8, "--batch-size", 4, "--bptt", 5, "--lr", 1, "--log-interval", 10)
TRAINING = (*SMALL, "--epochs", 6, "--eval-batch-size", 2, "--seed", 1)
ESCAPES = re.compile(r"\x1b\[(\d*)([A-Za-z])")
FIGURES = re.compile(r"loss +[\d.]+ \| ppl +[\d.]+ \| lr [\d.]+ \| norm [\d.]+ \| \d+ tokens/s")


def run_on_terminal(project, columns, command, *flags):
    """All that a command writes to a terminal of so many columns."""
    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-m", f"gluon_lm.{command}", *map(str, flags)],
        cwd=project.path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"},
        stdin=its,
        stdout=its,
        stderr=its,
    )
    os.close(its)
    written = b""
    try:
        while block := os.read(ours, 1 << 16):
            written += block
    except OSError:  # the last process that had the terminal open is gone
        pass
    finally:
        os.close(ours)
    assert process.wait(timeout=60) == 0, written.decode()
    return written.decode()


def run_in_pipe(project, command, *flags):
    done = subprocess.run(
        [sys.executable, "-m", f"gluon_lm.{command}", *map(str, flags)],
        cwd=project.path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def shown(written):
    """The lines that a terminal shows in the end, and every state of a line on the way there."""
    lines, states, row, column, position = [""], [], 0, 0, 0
    while position < len(written):
        escape = ESCAPES.match(written, position)
        if escape:
            count, kind = int(escape.group(1) or 1), escape.group(2)
            assert kind in "AK", escape.group(0)
            if kind == "A":
                row = max(0, row - count)
            else:
                lines[row] = lines[row][:column]
            position = escape.end()
            continue
        character = written[position]
        if character in "\r\n":
            states.append(lines[row].rstrip())
        if character == "\r":
            column = 0
        elif character == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            lines[row] = lines[row].ljust(column)[:column] + character + lines[row][column + 1 :]
            column += 1
        position += 1
    while lines and not lines[-1].strip():
        lines.pop()
    return [line.rstrip() for line in lines], states


def without_figures(lines):
    """Lines less what differs between two runs of the same: durations and speeds."""
    return [re.sub(r"time: +[\d.]+s|ms/batch +[\d.]+|\d+ tokens/s", "", line) for line in lines]


def test_training_on_a_terminal_has_a_bar_and_leaves_the_lines_of_a_pipe_less_the_bars(project):
    written = run_on_terminal(project, 200, "train", *TRAINING, "--save", "seen")
    lines, states = shown(written)
    piped, complaints = run_in_pipe(project, "train", *TRAINING, "--save", "piped")
    assert complaints == ""
    is_interval = re.compile(r"\| epoch +\d+ \| +\d+/ +\d+ batches \|")
    expected = [line.replace("piped", "seen") for line in piped.splitlines()]
    assert any(is_interval.match(line) for line in expected)
    assert without_figures(lines) == without_figures(line for line in expected if not is_interval.match(line))
    bars = [state for state in states if re.match(r"epoch +\d/6 +\d+%\|", state)]
    assert any(re.search(r"\| \d+/\d+, \d+:\d\d left, \d+:\d\d to the end$", bar) for bar in bars)
    assert any(FIGURES.fullmatch(state) for state in states)
    # The log of a run has every line, wherever the command was started.
    logs = [(project.path / run / "log.txt").read_text().splitlines() for run in ("seen", "piped")]
    timeless = [without_figures(re.sub(r"^[\d-]{10} [\d:]{8} ", "", line) for line in log) for log in logs]
    assert timeless[0] == [line.replace("piped", "seen") for line in timeless[1]]
    assert without_figures(expected) == timeless[0]


def test_a_narrow_terminal_has_all_figures(project):
    _, states = shown(run_on_terminal(project, 80, "train", *TRAINING, "--save", "run"))
    figures = [state for state in states if "tokens/s" in state]
    assert figures and all(FIGURES.fullmatch(state) for state in figures)
    bars = [state for state in states if state.startswith("epoch ") and "left" in state]
    assert bars and max(map(len, bars)) <= 80 and any(bar.endswith("to the end") for bar in bars)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run_as_on_terminal(project, command, *flags):
    """The same in this process, which is quicker: what is written to streams that say that they are a terminal."""
    terminal = Terminal()
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        code = importlib.import_module(f"gluon_lm.{command}").main([*map(str, flags)])
    assert code == 0, terminal.getvalue()
    return terminal.getvalue()


def test_quiet_says_the_result_alone_and_verbose_says_more(project):
    normal = project.run("train", *TRAINING, "--save", "normal")
    quiet = project.run("train", *TRAINING, "--save", "quiet", "--quiet")
    assert quiet.splitlines() == normal.splitlines()[-3:] and "| End of training |" in quiet
    assert run_as_on_terminal(project, "train", *TRAINING, "--save", "hushed", "--quiet") == quiet
    assert len((project.path / "quiet/log.txt").read_text().splitlines()) == len(normal.splitlines())
    (result,) = project.run("evaluate", "normal", "--quiet").splitlines()
    spoken = project.run("evaluate", "normal", "--verbose").splitlines()
    assert result.startswith("test loss ") and result in spoken and len(spoken) > 4
    assert any(line.startswith("gluon_lm ") and "OMP_NUM_THREADS=1" in line for line in spoken)
    lines, states = shown(run_as_on_terminal(project, "train", *TRAINING, "--save", "told", "--verbose"))
    assert any(re.match(r"\| epoch +1 \| +10/", line) for line in lines)
    assert any(re.search(r"checkpoints/step-\d+ written in [\d.]+ s", line) for line in lines)
    assert any(FIGURES.fullmatch(state) for state in states)


def test_what_verbose_says_is_no_part_of_the_output(project, capsys):
    project.train("run", "--epochs", 1)
    assert main(["run", "--words", "30"]) == 0
    text = capsys.readouterr().out
    assert main(["run", "--words", "30", "--verbose"]) == 0
    said = capsys.readouterr()
    assert said.out == text and len(text.split()) == 30 and "OMP_NUM_THREADS" in said.err and "done in" in said.err


def test_quiet_with_verbose_is_refused(project):
    refused = project.run("evaluate", "run", "--quiet", "--verbose", code=2)
    assert refused == "error: --quiet with --verbose: one contradicts the other; leave one of them out\n"


def test_all_other_long_work_shows_a_bar_that_goes_away(project, monkeypatch):
    """Here in this process, on a text that is short: the bars do not wait."""
    monkeypatch.setattr(progress, "_BAR_DELAY_S", 0)
    (project.path / "lines.txt").write_text("a cat sees the tree .\n" * 9)
    commands = [
        (["train", *TRAINING, "--save", "run", "--gen-word-len", 9], ["encoding text/train.txt", "validation", "test"]),
        (["evaluate", "run"], ["test"]),
        (["evaluate", "run", "--cache", "--split", "valid"], ["valid"]),
        (["dynamiceval", "run"], ["squared gradients", "test"]),
        (["generate", "run", "--words", 9, "--outf", "out.txt"], ["generating"]),
        (["generate", "run", "--words", 9, "--samples", 2], ["generating"]),
        (["score", "run", "lines.txt", "--outf", "scores.tsv"], ["scoring"]),
        (["export", "run", "--output", "exported"], ["exporting exported"]),
        (["report", "run"], ["writing texts", "plotting"]),
    ]
    for (command, *flags), works in commands:
        lines, states = shown(run_as_on_terminal(project, command, *flags))
        for work in works:
            assert any(re.match(rf"{re.escape(work)}: +\d+%\|", state) for state in states), (command, work, states)
        assert not any("%|" in line for line in lines), (command, lines)


def test_a_download_shows_a_bar_that_goes_away(project, monkeypatch):
    monkeypatch.setattr(progress, "_BAR_DELAY_S", 0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    contents = {split: f"{split} text\n".encode() * 50_000 for split in ("train", "valid", "test")}
    files = {
        split: PublishedFile(f"{split}.txt", f"sha256:{hashlib.sha256(content).hexdigest()}")
        for split, content in contents.items()
    }
    server = Server()
    try:
        server.pages = {f"/{split}.txt": content for split, content in contents.items()}
        mirror = PlainMirror(server.url + "/")
        monkeypatch.setitem(CORPORA, "tiny", PublishedCorpus("tiny", "none", files=files, mirrors=(mirror,)))
        lines, states = shown(run_as_on_terminal(project, "download", "tiny"))
    finally:
        server.close()
    for split in contents:
        assert any(re.match(rf"{split}\.txt: +\d+%\|", state) for state in states), states
    assert not any("%|" in line for line in lines), lines
    assert (project.path / "data" / "tiny" / "test.txt").read_bytes() == contents["test"]
