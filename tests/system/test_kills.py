"""SIGKILL at random moments: whatever is begun again ends as if nothing had happened, and nothing half-made is found.

A moment is either a call that changes a file, by its number, or a share of the time that the whole work takes.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from loopback import Server
from processes import Process

from gluon_lm.exported import load_exported
from gluon_lm.training.checkpoint import verify_checkpoint
from gluon_lm.training.run_folder import RunFolder

pytestmark = pytest.mark.timeout(900)

# Does some work, counts the calls that change files on the way, and kills itself at one of them.
KILLED = """
import os, signal, sys

prepare, work, moment, *words = sys.argv[1:]
exec(prepare)
changes = {"write", "writelines", "fsync", "rename", "replace", "renameat2", "mkdir", "unlink", "rmdir", "symlink",
           "open", "truncate", "flock", "close", "save", "tofile"}
calls = 0

def count(frame, event, function):
    global calls
    if event == "c_call" and function.__name__ in changes:
        calls += 1
        if calls == int(moment):
            os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(count)
code = eval(work)
sys.setprofile(None)
print("calls", calls)
sys.exit(code)
"""


class Work:
    """Something that a process does and that is killed.

    Parameters
    ----------
    folder : Path
        Where the process runs.
    prepare : str
        What it imports first, so that no moment is lost on that.
    work : str
        An expression of `words`, the rest of its command line; its value is the exit code.
    """

    def __init__(self, folder: Path, prepare: str, work: str) -> None:
        self._command = [sys.executable, "-c", KILLED, prepare, work]
        self._folder = folder

    def start(self, moment: int, *words: object) -> Process:
        return Process(*self._command, moment, *words, cwd=self._folder)

    def measure(self, *words: object) -> tuple[int, float]:
        """Do all of it; the number of its calls, and how long the process lived."""
        started = time.monotonic()
        process = self.start(0, *words)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        return int(output.rpartition("calls ")[2]), time.monotonic() - started

    def is_killed(self, moment: int | float, *words: object) -> bool:
        """Kill it at a call (an int) or after some seconds (a float); False where it was done before that."""
        process = self.start(moment if isinstance(moment, int) else 0, *words)
        try:
            output, _ = process.communicate(timeout=300 if isinstance(moment, int) else moment)
        except subprocess.TimeoutExpired:
            assert isinstance(moment, float), "it hangs"
            process.kill()
            output, _ = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), output
        return process.returncode != 0


def moments(seed: int, number: int, calls: int, seconds: float) -> list[int | float]:
    """Three of four at a call, the others at a time."""
    rng = random.Random(seed)
    return [rng.uniform(0, seconds) if i % 4 == 3 else rng.randint(1, calls) for i in range(number)]


def few_and_many(few: int, many: int):
    """A test with a few kills, and the same with many of them among the slow ones."""
    return pytest.mark.parametrize("num_kills", [few, pytest.param(many, marks=pytest.mark.slow)])


def check_checkpoints(path: Path) -> None:
    """Every checkpoint of a run, and what its links name, is whole."""
    run = RunFolder(path)
    links = [link.resolve() for link in (run.best, run.latest) if link.is_symlink()]
    for checkpoint in [*run.saved_checkpoints(), *links]:
        verify_checkpoint(checkpoint)


@few_and_many(2, 26)
def test_training_goes_on_to_the_same_numbers(project, num_kills):
    flags = (*project.training_flags, "--dropout", 0.3, "--checkpoint-every", 7, "--eval-every", 14, "--max-steps", 40)
    work = Work(project.path, "import gluon_lm.training.session; from gluon_lm.train import main", "main(words)")
    calls, seconds = work.measure(*flags, "--save", "whole")
    run = project.path / "run"
    again: tuple[object, ...] = (*flags, "--save", "run")
    for moment in moments(1, num_kills, calls, seconds):
        was_killed = work.is_killed(moment, *again)
        check_checkpoints(run)
        if not was_killed:
            check_like_the_whole(project)
            shutil.rmtree(run)
        if RunFolder(run).saved_checkpoints():
            again = ("--resume", "run")
        else:
            again = (*flags, "--save", "run", *(["--overwrite"] if run.exists() else []))
    project.run("train", *again)
    check_like_the_whole(project)


def check_like_the_whole(project) -> None:
    for link in ("best", "latest"):
        assert project.parameters("run", link) == project.parameters("whole", link)
    assert list(dict.fromkeys(project.results("run"))) == project.results("whole")
    steps = [e["step"] for e in project.events("run", "train")]
    assert steps == sorted(set(steps))


def test_links_that_a_kill_left_behind_are_mended(project):
    """Between the moment when a checkpoint has its name and those when ``best`` and ``latest`` name it."""
    project.train("run", "--eval-every", 14, "--max-steps", 42, "--keep-checkpoints", 100)
    run = RunFolder(project.path / "run")
    named = {link: os.readlink(link) for link in (run.best, run.latest)}
    tested = project.results("run")[-1]
    assert "checkpoints/step-14" not in named.values()
    for link in named:
        link.unlink()
        link.symlink_to("checkpoints/step-14")
    project.run("train", "--resume", "run")
    assert {link: os.readlink(link) for link in named} == named
    assert project.results("run")[-1] == tested


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@few_and_many(1, 8)
def test_encoding_begins_again_and_comes_to_the_same_ids(project, num_kills):
    text = project.path / "text/train.txt"
    text.write_text(text.read_text() * 200)
    work = Work(
        project.path,
        "import os; from gluon_lm.config import DataConfig; from gluon_lm.data import load_corpus",
        "os.environ.update(GLUON_LM_CACHE=words[0]) or load_corpus(DataConfig(data=('text',))) and 0",
    )
    calls, seconds = work.measure("whole")
    expected = contents(project.path / "whole")
    for moment in moments(2, num_kills, calls, seconds):
        if not work.is_killed(moment, "cache"):
            shutil.rmtree(project.path / "cache")
    assert not work.is_killed(0, "cache")
    found = contents(project.path / "cache")
    assert {name: found[name] for name in found if not name.endswith(".lock")} == expected


@few_and_many(1, 8)
@pytest.mark.parametrize("kind", ["symbol", "onnx"])
def test_an_export_is_the_old_one_or_the_new_one(project, kind, num_kills):
    project.train("old", "--seed", 1)
    project.train("new", "--seed", 2)
    for run in ("old", "new"):
        project.run("export", run, "--format", kind, "--output", f"exported-{run}")
    expected = [contents(project.path / f"exported-{run}") for run in ("old", "new")]
    output = project.path / "out" / "exported"
    imports = "import gluon_lm.exporting, gluon_lm.exporting_onnx, onnx; from gluon_lm.export import main"
    work = Work(project.path, imports, "main(words)")
    flags = ("--format", kind, "--output")
    calls, seconds = work.measure("new", *flags, "exported-again")
    for moment in moments(3, num_kills, calls, seconds):
        project.run("export", "old", *flags, output)
        work.is_killed(moment, "new", *flags, output)
        assert contents(output) in expected
        if kind == "symbol":
            load_exported(output)
    project.run("export", "new", *flags, output)
    assert contents(output) == expected[1]


FETCH = """
from pathlib import Path
from gluon_lm.data.download import PlainMirror, PublishedFile, download_files

def fetch(url, folder, *files):
    published = [PublishedFile(*file.split("=")) for file in files]
    download_files("tiny", published, [PlainMirror(url)], Path(folder))
    return 0
"""


@few_and_many(1, 8)
def test_a_download_is_absent_or_whole(project, num_kills, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    rng = random.Random(4)
    published = {f"{name}.txt": rng.randbytes(300_000) for name in ("train", "valid", "test")}
    files = [f"{name}=sha256:{hashlib.sha256(content).hexdigest()}" for name, content in published.items()]
    server = Server()
    try:
        server.pages = {f"/{name}": content for name, content in published.items()}
        work = Work(project.path, FETCH, "fetch(*words)")
        calls, seconds = work.measure(server.url + "/", "whole", *files)
        folder = project.path / "fetched"
        for moment in moments(4, num_kills, calls, seconds):
            work.is_killed(moment, server.url + "/", folder, *files)
            there = {path.name: path for path in folder.glob("*.txt")}
            assert all(path.read_bytes() == published[name] for name, path in there.items())
            for remains in folder.glob(".download.new-*"):
                os.utime(remains, (0, 0))  # too old to be those of a process that still works
            if len(there) == len(published):
                shutil.rmtree(folder)
        assert not work.is_killed(0, server.url + "/", folder, *files)
        assert contents(folder) == published
    finally:
        server.close()
