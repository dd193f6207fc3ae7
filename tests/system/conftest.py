"""Real commands, in processes of their own where a signal or a kill needs one, on a small text that the tests make."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import EXECUTABLE, open_browser
from processes import Process, environment, events

# A very small model on the corpus.
SMALL = (
    *("--data", "text", "--model", "lstm", "--emsize", 8, "--nhid", 8, "--batch-size", 4, "--bptt", 5),
    *("--epochs", 2, "--lr", 1, "--log-interval", 10),
)
# The words that may follow each other in a line of the corpus.
GRAMMAR = (("the", "a"), ("cat", "dog", "bird"), ("sees", "hears"), ("the", "a"), ("tree", "house", "river"))


class Project:
    """A folder with a corpus in it, and ways to run commands there."""

    training_flags = SMALL

    def __init__(self, path: Path, kept_runs: Path) -> None:
        self.path = path
        self._kept_runs = kept_runs
        self._started: list[Process] = []

    def command(self, command: str, *flags: object) -> list[str]:
        return [sys.executable, "-m", f"gluon_lm.{command}", *map(str, flags)]

    def start(self, command: str, *flags: object) -> Process:
        """Start ``python -m gluon_lm.<command>`` in a process of its own."""
        return self.start_process(*self.command(command, *flags))

    def start_process(self, *words: object, **variables: str) -> Process:
        """Start a process in the project's folder, with these variables in its environment."""
        process = Process(*words, cwd=self.path, env=environment(**variables))
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill what was started and is running still, as it is where a test failed meanwhile."""
        for process in self._started:
            process.kill()
            process.wait()

    def run(self, command: str, *flags: object, code: int = 0) -> str:
        """Run a command to its end in this process, expect an exit code, return all that it printed."""
        main = importlib.import_module(f"gluon_lm.{command}").main
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            returned = main([*map(str, flags)])
        assert returned == code, printed.getvalue()
        return printed.getvalue()

    def refused(self, command: str, *flags: object) -> str:
        """Run a command that must end with exit code 2 and one line, and return the line."""
        output = self.run(command, *flags, code=2)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in output and "Exception ignored" not in output, output
        return errors[0]

    def train(self, run: str, *flags: object, code: int = 0) -> str:
        """Train a very small model on the corpus."""
        return self.run("train", *SMALL, "--save", run, *flags, code=code)

    def have_trained(self, run: str, *flags: object) -> None:
        """Have what `train` makes; the first test that wants these flags trains, and the others have a copy."""
        kept = self._kept_runs / hashlib.sha256(repr(flags).encode()).hexdigest()
        if kept.exists():
            shutil.copytree(kept, self.path / run, symlinks=True)
        else:
            self.train(run, *flags)
            shutil.copytree(self.path / run, kept, symlinks=True)

    def start_training(self, run: str, *flags: object) -> Process:
        return self.start("train", *SMALL, "--save", run, *flags)

    def events(self, run: str, kind: str | None = None) -> list[dict]:
        return events(self.path / run, kind)

    def results(self, run: str) -> list[tuple]:
        """What a run found out: every validation and test result."""
        return [(e["event"], e["step"], e["loss"]) for e in self.events(run) if e["event"] in ("valid", "test")]

    def arrays(self, checkpoint: str, file: str = "parameters.npz") -> dict[str, np.ndarray]:
        with np.load(self.path / checkpoint / file) as saved:
            return dict(saved)

    def parameters(self, run: str, link: str = "latest") -> dict[str, bytes]:
        """Those of a checkpoint of a run, to be compared to the bit."""
        return {name: array.tobytes() for name, array in self.arrays(f"{run}/{link}").items()}

    def assert_agree(self, run: str, other: str) -> None:
        """The newest parameters of two runs are the same but for rounding."""
        found, expected = self.arrays(f"{run}/latest"), self.arrays(f"{other}/latest")
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert np.linalg.norm(found[name] - value) <= 1e-5 * np.linalg.norm(value), name


def write_corpus(folder: Path, num_lines: int = 120) -> None:
    """Lines of a little grammar, so that a model has something to learn."""
    rng = random.Random(7)
    folder.mkdir()
    for split, lines in (("train", num_lines), ("valid", num_lines // 6), ("test", num_lines // 6)):
        text = "".join(" ".join([*map(rng.choice, GRAMMAR), "."]) + "\n" for _ in range(lines))
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    """A Chromium, for tests of pages."""
    if EXECUTABLE is None:
        pytest.skip("there is no Chromium here")
    with open_browser() as browser:
        yield browser


@pytest.fixture(scope="session")
def kept_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def project(tmp_path: Path, kept_runs: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    write_corpus(tmp_path / "text")
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(tmp_path)
    made = Project(tmp_path, kept_runs)
    yield made
    made.end()
