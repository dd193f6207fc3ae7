"""Sampled and adaptive softmax by their flags, and what happens where memory does not do."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import sys

import mxnet as mx
import pytest
from control_groups import memory_group
from processes import figures

from gluon_lm.errors import OutOfMemory
from gluon_lm.memory import Need, check_need, explaining_memory_errors

HEADS = {"sampled": ("--num-sampled", 5), "sampled-tied": ("--num-sampled", 5, "--tied"), "adaptive": ("--cutoffs", 6)}


@pytest.mark.parametrize("name", HEADS)
def test_a_resumed_run_ends_as_one_that_never_stopped_and_every_command_takes_it(project, name):
    flags = (*HEADS[name], "--cpus", 2, "--lr", 5)
    project.train("whole", *flags, "--checkpoint-every", 33, "--keep-checkpoints", 9)
    shutil.copytree(project.path / "whole", project.path / "again", symlinks=True)
    project.run("train", "--resume", "again/checkpoints/step-33")
    assert project.parameters("again") == project.parameters("whole")
    # The whole vocabulary, however it was trained: what training says is what the commands say.
    exact, _ = figures(project.run("evaluate", "whole", "--eval-batch-size", 10), "test")
    assert exact == pytest.approx(project.events("whole")[-1]["perplexity"], rel=1e-3)
    assert exact < 0.7 * 17
    assert len(project.run("generate", "whole", "--words", 30).split()) >= 30
    project.run("score", "whole", "text/test.txt", "--outf", "scores.tsv")
    assert figures(project.run("dynamiceval", "whole"), "test")[0] != exact
    project.run("finetune", "whole", "--max-steps", 5)


def test_what_does_not_fit_the_vocabulary_is_refused_at_once(project):
    words = "the a cat dog bird sees hears tree house river . <eos> <unk>".split()
    (project.path / "words.txt").write_text("\n".join(words) + "\n")
    output = project.train("run", "--vocab", "words.txt", "--num-sampled", 13, code=2)
    too_many, order = [line for line in output.splitlines() if line.startswith("error:")]
    assert "--num-sampled 13: must be below the number of words in the vocabulary, 13" in too_many
    assert "--num-sampled: needs the vocabulary in order of falling frequency" in order
    assert re.search(r"line \d+ has '[^ ]+' \(\d+ times\) before '[^ ]+' \(\d+ times\)", order)
    output = project.train("run", "--cutoffs", 5, 13, "--nhid", 16, code=2)
    assert "--cutoffs 5,13: must be below the number of words in the vocabulary, 13" in output
    assert not (project.path / "run").exists()


# ---------------------------------------------------------------- memory


def three_gigabytes():
    resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30))


def limited(command, project, preexec_fn=three_gigabytes):
    """Run Python in a process that is limited first, by default to three gigabytes of address space."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=project.path,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=preexec_fn,
    )


def test_training_that_cannot_fit_is_refused_before_it_starts(project):
    done = limited(["-m", "gluon_lm.train", "--data", "text", "--nhid", "20000", "--save", "run"], project)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    # Two layers of 4 x 20,000 x (200 or 20,000 + 20,000) weights and their gradients.
    assert "parameters and gradients 38." in line and "are free; lower --max-vocab, --emsize or --nhid" in line
    assert "Traceback" not in done.stderr and not (project.path / "run").exists()


def test_a_control_group_bounds_what_training_may_take(project):
    flags = ["--data", "text", "--nhid", "3000", "--save", "run"]
    with memory_group(512 << 20) as group:
        done = limited(["-m", "gluon_lm.train", *flags], project, preexec_fn=group)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    (free,) = re.findall(r"of memory, and ([\d.]+) GB are free; lower", line)
    assert 0.2 < float(free) <= 0.5
    assert not (project.path / "run").exists()


def test_memory_that_is_not_to_be_had_is_one_line(project):
    code = (
        "import sys\n"
        "import gluon_lm, mxnet as mx\n"
        "from gluon_lm.cli import run_command\n"
        "sys.exit(run_command(lambda words: mx.nd.ones((1 << 30,)).wait_to_read(), []))\n"
    )
    done = limited(["-c", code], project)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "memory" in line and "unless a run continues, --batch-size" in line


def test_what_fails_in_training_says_what_training_takes():
    need = Need(parameters=3 * 10**9, logits=10**9, window=2 * 10**9)
    for failure in (MemoryError("x"), mx.MXNetError("cudaMalloc retry failed: out of memory")):
        with pytest.raises(OutOfMemory, match=r"out of memory: training takes about 6\.3 GB .*--batch-size"):
            with explaining_memory_errors(need):
                raise failure
    with pytest.raises(mx.MXNetError, match="other"), explaining_memory_errors(need):
        raise mx.MXNetError("other")


def test_what_may_not_do_is_said_and_what_will_not_is_refused():
    need = Need(parameters=3 * 10**9, logits=10**9, window=2 * 10**9)
    assert check_need(need, None) is None and check_need(need, 10**10) is None
    assert "5.0 GB are free: that may not be enough" in check_need(need, 5 * 10**9)
    with pytest.raises(OutOfMemory, match="3.9 GB are free; lower --max-vocab"):
        check_need(need, 39 * 10**8)
    share = r"3.9 GB are free for each of the 4 workers on this machine; lower .*; or train with fewer of them here$"
    with pytest.raises(OutOfMemory, match=share):
        check_need(need, 39 * 10**8, num_sharing=4)
