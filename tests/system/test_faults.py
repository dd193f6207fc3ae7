"""What goes wrong around a command: full disks, read-only ones, short memory, another process, bad files.

Each is answered with one line and exit code 2, and costs nothing that was there before.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import stat
import subprocess
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from loopback import Server
from processes import environment

from gluon_lm import exported, tracking
from gluon_lm.data import Vocabulary
from gluon_lm.data.download import PlainMirror, PublishedFile, download_files
from gluon_lm.errors import DataError
from gluon_lm.files import digest_of
from gluon_lm.locks import is_in_use, sole_use
from gluon_lm.trained import load_predictor
from gluon_lm.training import checkpoint, run_folder
from gluon_lm.training.run_folder import RunFolder

pytestmark = pytest.mark.timeout(300)
PAGE = 4096  # what a tmpfs gives out at a time


class Disk:
    """A small file system, in memory, that can be filled up."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={num_bytes}", "none", str(path)]
        if subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("no file system can be mounted here, which takes root")
        self._ballast = path / "ballast"

    def leave(self, num_bytes: int) -> None:
        """Fill it up but for so many bytes."""
        self.free()
        space = os.statvfs(self.path)
        with open(self._ballast, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, space.f_bavail * space.f_frsize - num_bytes)

    def free(self) -> None:
        self._ballast.unlink(missing_ok=True)

    def forbid_writing(self) -> None:
        subprocess.run(["mount", "-o", "remount,ro", str(self.path)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


@pytest.fixture
def disk(tmp_path):
    mounted = Disk(tmp_path / "disk", 8 << 20)
    yield mounted
    mounted.close()


def without_ballast(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"ballast"}


# ---------------------------------------------------------------- full disks


def test_training_on_a_full_disk_says_so_and_goes_on_when_there_is_room(project, disk, monkeypatch):
    # Space is checked before a checkpoint is written; without that check each of its files finds the disk full in turn.
    monkeypatch.setattr(checkpoint, "_check_space", lambda *arguments: None)
    project.train("whole")
    run = Path("disk/run")
    outcomes = set()
    for pages in (0, 1, 2, 3, 4, 6, 9, 14):
        disk.leave(pages * PAGE)
        error = project.refused("train", *project.training_flags, "--save", run)
        assert "No space left on device" in error and "disk" in error
        outcomes.add(error.partition(": cannot")[0])
        if pages <= 1:  # not even the configuration and the vocabulary find room
            assert without_ballast(disk.path) == set()
        if pages > 8:
            disk.free()
            begun = (run / "checkpoints/step-42").exists()
            again = ("--resume", run) if begun else (*project.training_flags, "--save", run, "--overwrite")
            project.run("train", *again)
            assert project.parameters(run) == project.parameters("whole")
            assert project.results(run) == project.results("whole")
        shutil.rmtree(run, ignore_errors=True)
    assert len(outcomes) >= 5  # the folder, log, status, metrics, a checkpoint or the one after


def test_a_checkpoint_that_would_not_fit_is_not_begun(project, disk):
    disk.leave(1 << 20)
    error = project.refused("train", *project.training_flags, "--save", "disk/run")
    assert "step-42: cannot be written (it needs 1 MB, more than the disk has left)" in error
    disk.free()
    project.run("train", *project.training_flags, "--save", "disk/run", "--overwrite")


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_training(project):
    project.train("run", "--max-steps", 2, "--checkpoint-every", 2, "--eval-every", 4, "--keep-checkpoints", 1)
    checkpoints = project.path / "run/checkpoints"
    busy = Disk(checkpoints / "step-2/busy", 1 << 20)  # as a file is on NFS while another process has it open
    try:
        project.run("train", "--resume", "run", "--max-steps", 8)
        assert {path.name for path in checkpoints.glob("step-*")} == {
            os.path.basename(os.readlink(f"run/{link}")) for link in ("best", "latest")
        }
        assert len(list(checkpoints.glob(".*"))) == 1
    finally:
        for mounted in checkpoints.glob(f"*/{busy.path.name}"):
            subprocess.run(["umount", "--lazy", str(mounted)], check=True)
    project.run("train", "--resume", "run", "--max-steps", 10)
    assert not list(checkpoints.glob(".*"))


def test_a_download_to_a_full_disk_leaves_nothing(project, disk, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    content = bytes(200_000)
    files = [PublishedFile("train.txt", "sha256:" + hashlib.sha256(content).hexdigest())]
    disk.leave(8 * PAGE)
    with contextlib.closing(Server()) as server:
        server.pages["/train.txt"] = content
        with pytest.raises(DataError, match="disk/tiny: .*No space left on device"):
            download_files("tiny", files, [PlainMirror(server.url + "/")], Path("disk/tiny"))
        assert without_ballast(disk.path) == set()
        disk.free()
        download_files("tiny", files, [PlainMirror(server.url + "/")], Path("disk/tiny"))
    assert Path("disk/tiny/train.txt").read_bytes() == content


def test_a_configuration_that_cannot_be_replaced_stays(project, disk):
    project.run("train", *project.training_flags, "--save", "disk/run", "--max-steps", 5)
    before = Path("disk/run/config.yaml").read_text()
    disk.leave(0)
    assert "config.yaml: cannot be written (No space" in project.refused("train", "--resume", "disk/run", "--epochs", 3)
    assert Path("disk/run/config.yaml").read_text() == before
    disk.free()
    project.run("train", "--resume", "disk/run")


def test_a_full_cache_is_done_without_and_said(project, disk, monkeypatch):
    monkeypatch.setenv("GLUON_LM_CACHE", str(disk.path / "cache"))
    disk.leave(PAGE)
    output = project.train("run")
    assert "the cache" in output and "No space left on device" in output and "test ppl" in output
    (project.path / "no").write_text("")
    monkeypatch.setattr("tempfile.tempdir", str(project.path / "no"))
    assert "set GLUON_LM_CACHE" in project.refused("train", *project.training_flags, "--save", "another")


@pytest.mark.parametrize("kind", ["symbol", "onnx"])
def test_an_export_on_a_full_disk_leaves_the_old_one(project, disk, kind):
    project.have_trained("run")
    flags = ("run", "--format", kind, "--output", "disk/exported")
    project.run("export", *flags)
    old = {path.name: path.read_bytes() for path in (disk.path / "exported").iterdir()}
    for pages in (0, 1, 2):
        disk.leave(pages * PAGE)
        assert "disk/exported: cannot be written (" in project.refused("export", *flags)
        assert without_ballast(disk.path) == {"exported"}
        assert {path.name: path.read_bytes() for path in (disk.path / "exported").iterdir()} == old


def test_an_output_file_on_a_full_disk_keeps_its_old_content(project, disk):
    project.have_trained("run")
    (disk.path / "out.txt").write_text("old")
    for command in (("generate", "run", "--words", 2000), ("score", "run", "text/train.txt")):
        disk.leave(PAGE)
        error = project.refused(*command, "--outf", "disk/out.txt")
        assert "disk/out.txt: cannot be written (No space left on device)" in error
        assert (disk.path / "out.txt").read_text() == "old" and without_ballast(disk.path) == {"out.txt"}


def test_tensorboards_files_on_a_full_disk_end_the_run_in_one_line(project, disk, monkeypatch):
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    monkeypatch.setattr(tracking.AppendedText, "write", lambda file, text: None)  # or else the log is the first
    flags = (*project.training_flags, "--max-steps", 400, "--epochs", 99, "--log-interval", 1, "--tensorboard")
    disk.leave(4 * PAGE)
    assert "run/tensorboard: cannot be written (No space" in project.refused("train", *flags, "--save", "disk/run")


def test_what_is_made_of_a_run_on_a_full_disk_leaves_nothing_behind(project, disk):
    project.have_trained("run")
    disk.leave(PAGE)
    assert "disk/page.html: cannot be written (" in project.refused("report", "run", "--output", "disk/page.html")
    assert without_ballast(disk.path) == set()
    disk.leave(40 * PAGE)  # enough for the page, and not for its plots
    assert ".png: cannot be written (" in project.refused("report", "run", "--words", 0, "--output", "disk/page.html")
    assert not [name for name in without_ballast(disk.path) if name.startswith(".")]
    disk.free()
    shutil.copytree("run", "disk/run", symlinks=True)
    before = {path.name for path in Path("disk/run").iterdir()}
    disk.leave(PAGE)
    output = project.run("dynamiceval", "disk/run", "--bptt", 5, "--batch-size", 4)
    assert "cannot be written (No space left on device)" in output
    assert not list(Path("disk/run").glob("dynamiceval/*")) and {p.name for p in Path("disk/run").iterdir()} >= before


def test_an_output_that_is_a_device_a_pipe_or_a_link_stays_one(project):
    project.have_trained("run")
    os.mkfifo("pipe")
    Path("target.txt").write_text("old")
    Path("link").symlink_to("target.txt")
    words = project.run("generate", "run", "--words", 30, "--quiet")
    with subprocess.Popen(["cat", "pipe"], stdout=subprocess.PIPE, text=True) as reader:
        project.run("generate", "run", "--words", 30, "--outf", "pipe")
        assert reader.communicate(timeout=60)[0] == words
    project.run("generate", "run", "--words", 30, "--outf", "link")
    assert Path("pipe").is_fifo() and Path("link").is_symlink() and Path("target.txt").read_text() == words
    try:
        os.mknod("null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("no device can be made here, which takes root")
    project.run("generate", "run", "--words", 30, "--outf", "null")
    assert Path("null").is_char_device()


# ---------------------------------------------------------------- names that cannot be


def test_names_that_no_file_can_have_are_said_in_one_line(project):
    project.have_trained("run")
    Path("loop").symlink_to("loop")
    for name in ("x" * 300, "loop/x", "text/train.txt/x"):
        for command in (
            ("train", *project.training_flags, "--save", name),
            ("train", "--resume", name),
            ("evaluate", name),
            ("generate", "run", "--words", 2, "--outf", name),
            ("export", "run", "--output", name),
            ("report", "run", "--output", f"{name}.html"),
            ("runs", name),
        ):
            assert name in project.refused(*command)


# ---------------------------------------------------------------- no writing at all


def test_a_run_that_may_not_be_written_is_read_and_not_trained(project, disk):
    project.run("train", *project.training_flags, "--save", "disk/run")
    disk.forbid_writing()
    for flags in (("--resume", "disk/run", "--epochs", 3), (*project.training_flags, "--save", "disk/another")):
        error = project.refused("train", *flags)
        assert "disk" in error and ("Read-only file system" in error or "no permission" in error)
    assert "test loss" in project.run("evaluate", "disk/run")
    assert "cannot be written" in project.run("dynamiceval", "disk/run", "--bptt", 5, "--batch-size", 4)
    project.run("generate", "disk/run", "--words", 3)
    project.run("export", "disk/run", "--output", "exported")
    assert "disk/run" in project.refused("finetune", "disk/run")
    assert "disk/run/report.html: " in project.refused("report", "disk/run")
    assert "finished" in project.run("runs", "disk")


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("megabytes", "size", "said"),
    [(300, 8, "out of memory .*ulimit -v"), (900, 3000, "training takes about .* are free; lower .*--nhid")],
    ids=["too little for MXNet", "too little for the model"],
)
def test_short_memory_is_said_in_one_line(project, megabytes, size, said):
    limit = megabytes << 20
    process = subprocess.Popen(
        project.command("train", *project.training_flags, "--nhid", size, "--emsize", size, "--save", "run"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2, errors
    (line,) = errors.splitlines()
    assert re.match(f"error: {said}", line)


# ---------------------------------------------------------------- two processes, one folder


def test_a_run_in_which_a_finetuning_goes_on_is_not_replaced(project):
    project.have_trained("run")
    with RunFolder(Path("run/finetune_model")).created("", Vocabulary(("<unk>", "<eos>"))):
        assert "run/finetune_model: another process" in project.refused(
            "train", *project.training_flags, "--save", "run", "--overwrite"
        )
        assert (project.path / "run/finetune_model/vocab.txt").exists()


def test_a_run_that_is_only_looked_at_can_be_trained(tmp_path):
    lock = tmp_path / ".lock"
    with open(lock, "ab") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)  # as `is_in_use` does for a moment
        threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with sole_use(lock, RuntimeError("refused")):
            assert is_in_use(lock)


def test_names_that_are_no_utf8_are_written_as_they_can_be(project):
    shutil.copy(project.path / "text" / "train.txt", project.path / "caf\udce9.txt")
    project.train("run\udce9", "--data", "caf\udce9.txt", "--max-steps", 2)
    project.run("train", "--resume", "run\udce9", "--max-steps", 4)
    project.run("report", "run\udce9", "--words", 0)
    assert "caf\\udce9" in (project.path / "run\udce9" / "log.txt").read_text()
    assert "caf\\udce9" in (project.path / "run\udce9" / "report.html").read_text()
    description = load_predictor("run\udce9").describe()
    assert (description["text"]["name"], description["training"]["run"]) == ("caf\\udce9", "run\\udce9")
    project.run("export", "run\udce9", "--output", "exported")
    assert load_predictor("exported").describe()["text"]["name"] == "caf\\udce9"


@pytest.mark.parametrize("kind", ["symbol", "onnx"])
def test_an_export_in_a_folder_whose_name_is_no_utf8_is_refused(project, kind):
    project.have_trained("run")
    for output in ("exported\udce9", "folder\udce9/exported"):
        line = project.refused("export", "run", "--format", kind, "--output", output)
        assert "takes only paths that are UTF-8" in line
    assert not list(project.path.glob("*\udce9"))
    project.run("export", "run", "--format", kind, "--output", "exported")
    shutil.move("exported", "exported\udce9")
    assert "takes only paths that are UTF-8" in project.refused("generate", "exported\udce9", "--words", 3)


def test_of_two_runs_begun_at_once_in_one_folder_one_is_refused(project):
    processes = [project.start_training("run", "--seed", seed) for seed in (1, 2)]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert sorted(codes) == [0, 2], outputs
    refused = outputs[codes.index(2)]
    assert "exists already" in refused or "another process is training this run" in refused
    project.train("alone", "--seed", codes.index(0) + 1)
    assert project.parameters("run") == project.parameters("alone")
    assert {path.name for path in project.path.iterdir()} == {"text", "cache", "run", "alone"}


def test_runs_begun_at_once_without_a_name_get_one_each(project, monkeypatch):
    monkeypatch.setattr(run_folder.time, "strftime", lambda format: "20200101-000000")
    vocabulary = Vocabulary(["<unk>", "<eos>"])
    first, second, third = (RunFolder.stamped(project.path / "runs/lstm") for _ in range(3))
    assert first.path == second.path == third.path

    class Meanwhile(Vocabulary):
        def save(self, path):
            super().save(path)
            others.enter_context(second.created("", vocabulary))  # after the first has found its name to be free

    with contextlib.ExitStack() as others:
        with first.created("", Meanwhile(["<unk>", "<eos>"])):
            assert first.path.name == "lstm-20200101-000000-2" and first.is_held
        with third.created("", vocabulary):
            assert third.path.name == "lstm-20200101-000000-3" and third.is_held
        assert second.path.name == "lstm-20200101-000000" and second.is_held
    assert {path.name for path in (project.path / "runs").iterdir()} == {
        run.path.name for run in (first, second, third)
    }
    assert all(run.vocabulary.exists() for run in (first, second, third))


# ---------------------------------------------------------------- file systems of clusters

# Stands for a file system with neither locks nor links, that exchanges no names and synchronises no folder.
POOR_FILE_SYSTEM = """
#include <errno.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
static int refuse(int number) { errno = number; return -1; }
int flock(int descriptor, int operation) { return refuse(NO_LOCKS); }
int symlink(const char *target, const char *link) { return refuse(NO_LINKS); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return refuse(EINVAL); }
int fsync(int descriptor) {
    struct stat found;
    if (fstat(descriptor, &found) == 0 && S_ISDIR(found.st_mode)) return refuse(EINVAL);
    return syscall(SYS_fsync, descriptor);
}
"""


def on_poor_file_system(project, locks, links):
    """What runs a command where asking for a lock or a link has such an answer, and returns what it printed."""
    (project.path / "poor.c").write_text(POOR_FILE_SYSTEM)
    answers = [f"-DNO_LOCKS={locks}", f"-DNO_LINKS={links}"]
    command = ["gcc", "-shared", "-fPIC", *answers, "-o", "poor.so", "poor.c"]
    subprocess.run(command, cwd=project.path, check=True, timeout=60)
    poor = environment(LD_PRELOAD="./poor.so", GLUON_LM_CACHE="poor")

    def run(command, *flags):
        words = project.command(command, *flags)
        done = subprocess.run(words, cwd=project.path, env=poor, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize(("locks", "links"), [("ENOSYS", "ENOSYS"), ("ENOLCK", "EPERM"), ("EOPNOTSUPP", "EOPNOTSUPP")])
def test_without_locks_and_links_it_is_said(project, locks, links):
    run = on_poor_file_system(project, locks, links)
    output = run("train", *project.training_flags, "--save", "run", "--max-steps", 2)
    (line,) = [line for line in output.splitlines() if line.startswith("this file system has no locks (")]
    assert line.endswith("), so nothing keeps a second process from writing the same files")
    # Processes that encode the same text would be in each other's way, so each does it for itself.
    assert "the cache poor cannot be written (" in output
    (line,) = [line for line in output.splitlines() if line.startswith("this file system has no links (")]
    assert line.endswith("), so best and latest are not made; name runs and checkpoints in full")


def test_without_locks_and_links_all_works(project):
    run = on_poor_file_system(project, "ENOLCK", "EPERM")
    worse = ("--epochs", 3, "--lr", 100)  # so that the newest checkpoint, which alone is kept, is not the best
    project.train("whole", "--keep-checkpoints", 1)
    project.run("train", "--resume", "whole", *worse)
    run("train", *project.training_flags, "--save", "run", "--keep-checkpoints", 1)
    run("train", "--resume", "run", *worse)
    assert project.results("run") == project.results("whole")
    assert sorted(path.name for path in (project.path / "run/checkpoints").iterdir()) == ["step-126", "step-84"]
    assert not (project.path / "run/best").exists()
    assert run("evaluate", "run").splitlines()[-1] == project.run("evaluate", "whole").splitlines()[-1]
    run("train", *project.training_flags, "--save", "run", "--overwrite", "--epochs", 1)
    assert "finished" in run("runs", ".")


# ---------------------------------------------------------------- another text


def append(path: Path) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write("the cat sees a river .\n")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda text: append(text / "train.txt"), "another text"),
        (lambda text: append(text / "valid.txt"), "another text"),
        (lambda text: append(text / "test.txt"), "another text"),
        (lambda text: (text / "train.txt").write_text("the cat sees a river .\n"), "another text"),
        (lambda text: (text / "valid.txt").unlink(), "has no valid text"),
        (lambda text: (text / "test.txt").write_bytes(b"caf\xe9\n"), "is not UTF-8"),
        (shutil.rmtree, "must be a corpus"),
    ],
    ids=["train", "valid", "test", "shorter than a window", "missing", "binary", "gone"],
)
def test_a_text_that_changes_between_stop_and_resume_is_refused(project, change, said):
    project.have_trained("run")
    shutil.copytree("text", "kept")
    change(project.path / "text")
    two_steps_more = ("train", "--resume", "run", "--epochs", 3, "--max-steps", 86)
    assert said in project.refused(*two_steps_more)
    shutil.rmtree("text", ignore_errors=True)
    shutil.move("kept", "text")
    project.run(*two_steps_more)


def test_a_text_that_was_moved_is_named_anew(project):
    project.train("whole")
    project.train("run", "--epochs", 1)
    shutil.move("text", "moved")
    for command in (("evaluate", "run"), ("train", "--resume", "run"), ("finetune", "run")):
        line = project.refused(*command)
        assert "--data text: must be a corpus" in line
        assert line.endswith("; if the text of the run is elsewhere now, name its place with --data")
    assert "tokens 140" in project.run("evaluate", "run", "--data", "moved")
    project.run("train", "--resume", "run", "--epochs", 2, "--data", "moved")
    assert project.parameters("run") == project.parameters("whole")
    project.run("evaluate", "run")  # the run remembers it
    append(project.path / "moved/train.txt")
    line = project.refused("train", "--resume", "run", "--epochs", 3, "--data", "moved")
    assert "another text" in line and line.endswith("train anew: --save run --overwrite without --resume")


def test_a_run_without_a_checkpoint_is_trained_again(project):
    project.have_trained("run")
    shutil.rmtree("run/checkpoints")
    (project.path / "run/checkpoints").mkdir()
    line = project.refused("train", "--resume", "run")
    assert line.endswith("no checkpoint yet; train anew: --save run --overwrite without --resume")
    project.train("run", "--overwrite", "--max-steps", 1)


def without_rights_of_root():
    """What a command begins with that is to be refused what others are refused."""
    if os.geteuid() != 0:
        return []
    words = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"]
    if shutil.which("setpriv") is None or subprocess.run([*words, "true"]).returncode != 0:
        pytest.skip("root cannot give up its rights to files here")
    return words


def test_a_run_that_is_write_protected_is_not_replaced(project):
    project.have_trained("run")
    before = project.parameters("run")
    (project.path / "run").chmod(0o555)
    command = project.command("train", *project.training_flags, "--save", "run", "--overwrite")
    process = project.start_process(*without_rights_of_root(), *command)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and "--save run: is write-protected, so it is not replaced" in output
    assert project.parameters("run") == before and not list(project.path.glob(".run*"))


def test_nothing_is_left_of_a_write_protected_export_that_is_replaced(project):
    project.have_trained("run")
    project.run("export", "run", "--output", "exported")
    (project.path / "exported").chmod(0o555)
    process = project.start_process(
        *without_rights_of_root(), *project.command("export", "run", "--output", "exported")
    )
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert sorted(path.name for path in project.path.glob("*export*")) == ["exported"], output


def test_a_finetuning_without_a_checkpoint_is_begun_anew(project):
    project.train("run", "--model", "awd-lstm")
    project.run("finetune", "run", "--epochs", 1)
    shutil.rmtree("run/finetune_model/checkpoints")
    (project.path / "run/finetune_model/checkpoints").mkdir()
    for line in (
        project.refused("finetune", "run", "--continue-train"),
        project.refused("train", "--resume", "run/finetune_model"),
    ):
        assert line.endswith("no checkpoint yet; finetune anew: python -m gluon_lm.finetune run --overwrite")
    project.run("finetune", "run", "--overwrite", "--epochs", 1)
    append(project.path / "text/train.txt")
    assert "finetune anew" not in project.refused("finetune", "run", "--continue-train")  # it has the same text


def test_a_text_that_was_moved_is_the_one_that_a_checkpoint_from_before_is_evaluated_on(project):
    project.train("run", "--epochs", 1)
    adapting = ("dynamiceval", "run", "--max-batches", 3)
    expected = [project.run(*command).splitlines()[-1] for command in (("evaluate", "run"), adapting)]
    shutil.move("text", "moved")
    project.run("train", "--resume", "run", "--data", "moved", "--epochs", 2, "--lr", 1e-30)
    assert os.readlink("run/best") == "checkpoints/step-42" and os.readlink("run/latest") == "checkpoints/step-84"
    shutil.copytree("moved", "text")
    for split in ("train", "test"):
        append(project.path / f"text/{split}.txt")
    for command, line in zip((("evaluate", "run"), adapting), expected):
        assert project.run(*command).splitlines()[-1] == line
    assert project.run("evaluate", "run/checkpoints/step-42").splitlines()[-1] == expected[0]


# ---------------------------------------------------------------- bad files


class Marks:
    """Unpickling it makes the file ``unpickled``."""

    def __reduce__(self):
        return (open, ("unpickled", "w"))


def npz(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/").replace("UP", ".."), content)
    return buffer.getvalue()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_header(text: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


BAD_ARRAYS = {
    "empty": b"",
    "text": b"no archive at all",
    "pickle": pickle.dumps(Marks()),
    "pickled array": npy(np.array([Marks()], dtype=object)),
    "pickled member": npz(**{"encoder.embedding.weight.npy": npy(np.array([Marks()], dtype=object))}),
    "bare array": npy(np.zeros(3, np.float32)),
    "no arrays": npz(),
    "no array": npz(**{"encoder.embedding.weight": b"words"}),
    "climbs out": npz(**{"UP__UP__evil.npy": npy(np.zeros(3, np.float32))}),
    "endless": npz(**{"a.npy": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,)}")}),
    "negative": npz(**{"a.npy": npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-3,)}")}),
    "no header": npz(**{"a.npy": npy_header("{'descr': __import__('os').system('touch unpickled')}")}),
    "unfinished header": npz(**{"a.npy": npy_header("{'descr': '''")}),
    "deep header": npz(**{"a.npy": npy_header("(" * 5000)}),
    "complex": npz(**{"a.npy": npy(np.zeros(3, np.complex64))}),
    "words": npz(**{"a.npy": npy(np.array(["a", "b"]))}),
}  # fmt: skip


def forge(run: Path, name: str, content: bytes) -> None:
    """Put other content in a checkpoint, as one would who knows how it is checked."""
    folder = run / "latest"
    (folder / name).write_bytes(content)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"][name] = hashlib.sha256(content).hexdigest()
    state["digest"] = digest_of(state)
    (folder / "state.json").write_text(json.dumps(state))


def each_forged(project, name: str, contents: dict):
    """Forge a file of the newest checkpoint in each way in turn; yields how. Nothing may be unpickled on the way."""
    shutil.copytree("run", "whole", symlinks=True)
    for how, content in contents.items():
        forge(project.path / "run", name, content)
        yield how
        assert not (project.path / "unpickled").exists(), how
        assert not list(project.path.parent.rglob("evil*")), how
        shutil.rmtree("run")
        shutil.copytree("whole", "run", symlinks=True)


def test_parameters_that_are_none_are_refused(project):
    project.have_trained("run")
    for how in each_forged(project, "parameters.npz", BAD_ARRAYS):
        for flags in (("evaluate", "run"), ("train", "--resume", "run"), ("export", "run", "--output", "exported")):
            assert "run" in project.refused(*flags), how
        project.run("report", "run", "--words", 0)  # which only counts the numbers
    assert not (project.path / "exported").exists()


def test_averages_and_residuals_that_are_none_are_refused(project):
    project.train("run", "--asgd")
    for how in each_forged(project, "unaveraged.npz", BAD_ARRAYS):
        assert "run" in project.refused("train", "--resume", "run", "--epochs", 3), how
    shutil.rmtree("whole")
    unread = ("bare array", "climbs out", "complex", "words")  # arrays, of which one process has no use
    cases = {how: content for how, content in BAD_ARRAYS.items() if how not in unread}
    for how in each_forged(project, "residuals.npz", cases):
        assert "run" in project.refused("train", "--resume", "run", "--epochs", 3), how


def test_a_state_of_the_optimiser_that_is_none_is_refused_and_never_unpickled(project):
    project.train("run", "--optimizer", "adam", "--lr", 0.01)
    for name in ("optimizer.npz", "carried.npz"):
        of_another_model = {"another": npz(**{f"{n}.npy": npy(np.zeros((1, 4, 3), np.float32)) for n in "0123"})}
        empty = {"no arrays": None} if name == "carried.npz" else {}  # a run between two epochs carries nothing
        cases = {how: content for how, content in (BAD_ARRAYS | of_another_model).items() if how not in empty}
        for how in each_forged(project, name, cases):
            error = project.refused("train", "--resume", "run", "--epochs", 3)
            assert "run" in error or "optimizer state" in error, how
        shutil.rmtree("whole")


BAD_STATES = {
    "empty": b"",
    "no object": b"[]",
    "number": b"7",
    "deep": b"[" * 200_000,
    "binary": bytes(range(256)),
    "pickle": pickle.dumps(Marks()),
    "another format": b'{"format": 99, "gluon_lm": "9.0"}',
    "nothing in it": b"{}",
    "no hashes": b'{"format": 3, "sha256": {}}',
    "hashes of what is elsewhere": b'{"format": 3, "sha256": {"../../config.yaml": "", "/dev/zero": ""}}',
}


def test_a_state_that_is_none_is_refused(project):
    project.have_trained("run")
    state = project.path / "run/latest/state.json"
    whole = json.loads(state.read_text())
    wrong = {
        name: {**whole, "training": {**whole["training"], name: value}}
        for name, value in {"step": "7", "lr": None, "epoch": [1], "valid_losses": 3, "nothing": 1}.items()
    } | {"text": {**whole, "text": 3}, "compression": {**whole, "compression": 3}}
    forged = {how: {**content, "digest": digest_of(content)} for how, content in wrong.items()}
    cases = BAD_STATES | {how: json.dumps(content).encode() for how, content in forged.items()}
    for how, content in cases.items():
        state.write_bytes(content)
        assert "step-" in project.refused("train", "--resume", "run", "--epochs", 3), how
    assert not (project.path / "unpickled").exists()
    for text, said in (({"name": "5"}, "is not the one that run was trained on"), ([], "step-")):
        content = {**whole, "text": text}
        state.write_text(json.dumps({**content, "digest": digest_of(content)}))
        assert said in project.refused("dynamiceval", "run"), text


ALIASES = "\n".join(["gpus: &a0 [0]", *(f"x{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))])
BAD_YAML = {
    "object": b"data: !!python/object/apply:os.system ['touch unpickled']",
    "module": b"!!python/module:os ''",
    "aliases": ALIASES.encode(),
    "deep": b"data: " + b"[" * 5000,
    "binary": bytes(range(256)),
    "no mapping": b"- 1\n- 2",
    "tag": b"lr: !!timestamp [1]",
    "nothing like it": b"{unknown: 1}",
}


def test_a_configuration_that_is_none_is_refused(project):
    project.have_trained("run")
    for how in each_forged(project, "config.yaml", BAD_YAML):
        assert "config.yaml" in project.refused("evaluate", "run"), how
    for how, content in BAD_YAML.items():
        Path("bad.yaml").write_bytes(content)
        assert "bad.yaml" in project.refused("train", *project.training_flags, "--config", "bad.yaml"), how
    assert not (project.path / "unpickled").exists()


BAD_VOCABULARIES = {
    "empty": b"",
    "binary": bytes(range(256)),
    "pickle": pickle.dumps(Marks()),
    "twice": b"<unk>\n<eos>\na\na\n",
    "white space": b"<unk>\n<eos>\na b\n",
    "not special": b"a\nb\n",
    "of another model": b"<unk>\n<eos>\na\n",
}


def test_a_vocabulary_that_is_none_is_refused(project):
    project.have_trained("run")
    for how in each_forged(project, "vocab.txt", BAD_VOCABULARIES):
        assert "run" in project.refused("evaluate", "run"), how
    for how, content in BAD_VOCABULARIES.items():
        if how != "of another model":
            Path("bad.txt").write_bytes(content)
            assert "bad.txt" in project.refused("train", *project.training_flags, "--vocab", "bad.txt"), how


def test_an_export_with_forged_files_is_refused(project):
    project.have_trained("run")
    project.run("export", "run", "--output", "exported")
    manifest = json.loads(Path("exported/manifest.json").read_text())
    symbol, parameters = (Path("exported", name).read_bytes() for name in (exported.SYMBOL, exported.PARAMETERS))
    cases = [
        *((exported.PARAMETERS, content) for content in BAD_ARRAYS.values()),
        *((exported.SYMBOL, content) for content in BAD_STATES.values()),
        *((exported.VOCABULARY, content) for content in BAD_VOCABULARIES.values()),
        (exported.PARAMETERS, parameters[: len(parameters) // 2]),
        (exported.PARAMETERS, parameters.replace(b"recurrent", b"recurrend")),
        (exported.SYMBOL, symbol.replace(b'"RNN"', b'"Custom"')),
        (exported.SYMBOL, symbol.replace(b'"op": "log_softmax"', b'"op": "no_such_op"')),
    ]
    for name, content in cases:
        kept = Path("exported", name).read_bytes()
        Path("exported", name).write_bytes(content)
        write_manifest(manifest, {"sha256": {**manifest["sha256"], name: hashlib.sha256(content).hexdigest()}})
        assert "exported" in project.refused("generate", "exported", "--words", 3), (name, content[:60])
        Path("exported", name).write_bytes(kept)
    text, inputs = manifest["text"], manifest["inputs"]
    for changes in (
        {"text": {**text, "tokenizer": "pickle"}},
        {"text": None},
        {"inputs": inputs[:2]},
        {"inputs": [inputs[0], {"name": "state_0", "shape": []}]},
        {"inputs": [inputs[0], *({**entry, "shape": [1, "N", 10**12]} for entry in inputs[1:])]},
    ):
        write_manifest(manifest, changes)
        assert "exported" in project.refused("generate", "exported", "--words", 3), changes
    for content in BAD_STATES.values():
        Path("exported/manifest.json").write_bytes(content)
        assert "exported" in project.refused("generate", "exported", "--words", 3), content[:60]
    assert not (project.path / "unpickled").exists()


def write_manifest(manifest: dict, changes: dict) -> None:
    """A manifest that says something else and fits itself."""
    changed = {**manifest, **changes}
    Path("exported/manifest.json").write_text(json.dumps({**changed, "digest": digest_of(changed)}))


def test_a_bad_line_among_the_metrics_is_named(project):
    project.train("run", "--epochs", 1)
    metrics = project.path / "run/metrics.jsonl"
    whole = metrics.read_text()
    for line in ("no json", "[]", "{}", '{"step": null}', "\0\0\0", "[" * 100_000):
        metrics.write_text(whole + line + "\n")
        number = whole.count("\n") + 1
        assert f"metrics.jsonl line {number}: is not an event" in project.refused("train", "--resume", "run")
    metrics.write_text(whole + '{"event": "tra')  # as a killed process leaves it
    project.run("train", "--resume", "run", "--epochs", 2)
    assert [e["step"] for e in project.events("run", "valid")] == [42, 84]


def test_bad_statistics_of_dynamic_evaluation_are_made_anew_and_not_unpickled(project):
    project.have_trained("run")
    flags = ("dynamiceval", "run", "--bptt", 5, "--batch-size", 4)
    expected = project.run(*flags).splitlines()[-1]
    (path,) = (project.path / "run").glob("*/gradients-*.npz")
    for how in ("text", "pickled array", "pickled member", "no arrays"):
        path.write_bytes(BAD_ARRAYS[how])
        output = project.run(*flags)
        assert "is damaged" in output and output.splitlines()[-1] == expected, how
    assert not (project.path / "unpickled").exists()
