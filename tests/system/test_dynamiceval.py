"""``python -m gluon_lm.dynamiceval`` on a small run."""

from __future__ import annotations

import hashlib
import shutil

import pytest
from processes import figures

RULE = ("--lamb", 0.075, "--epsilon", 0.002, "--lr", 0.002, "--bptt", 5)


@pytest.fixture
def run(project):
    project.have_trained("run", "--epochs", 3, "--lr", 5, "--dropout", 0.4)
    return project


def hashes(folder):
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name != "dynamiceval"]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_both_spellings_on_both_texts_leave_the_run_as_it_was(run):
    before = hashes(run.path)
    output = run.run("dynamiceval", "run", *RULE, "--batch_size", 20)
    assert "squared gradients of the training text (windows: 9) kept in run/dynamiceval/" in output
    as_the_reference = run.run(
        "dynamiceval", "--model", "run.pt", *RULE, "--batch-size", 20, "--max_batches", -1, "--gpu", -1
    )
    assert "squared gradients of the training text (windows: 9) from run/dynamiceval/" in as_the_reference
    static, num_tokens = figures(run.run("evaluate", "run"), "test")
    assert figures(as_the_reference, "test") == figures(output, "test")
    assert figures(output, "test")[1] == num_tokens == 140
    assert figures(output, "test")[0] != static

    tuned = run.run("dynamiceval", "run", *RULE, "--batch_size", 20, "--val", "--ms")
    assert "(windows: 9) from run/dynamiceval/" in tuned
    assert figures(tuned, "valid")[1] == 140
    assert hashes(run.path) == before


def test_a_finetuned_run_by_the_name_that_the_reference_gives_it(run):
    run.run("finetune", "run", "--epochs", 1)
    output = run.run("dynamiceval", "--model", "run/finetune_model.pt", "--max_batches", 1)
    assert "squared gradients of the training text (windows: 1) kept in run/finetune_model/dynamiceval/" in output
    figures(output, "test")


def test_a_learning_rate_too_high_says_so(run):
    output = run.run("dynamiceval", "run", "--lr", 1e38, code=2)
    assert "not finite" in output and "lower --lr (now 1e+38)" in output


def test_a_run_whose_training_text_is_gone_needs_another_place_for_it(run):
    shutil.move(run.path / "text", run.path / "moved")
    refused = run.run("dynamiceval", "run", code=2)
    assert refused.startswith("error: --data text: ") and len(refused.splitlines()) == 1
    assert "needs the training text of the run" in refused and "--data" in refused
    figures(run.run("dynamiceval", "run", "--data", "moved"), "test")

    (run.path / "moved" / "train.txt").write_text("the zebra sees a cat .\n" * 120)
    refused = run.run("dynamiceval", "run", "--data", "moved", code=2)
    assert refused.startswith("error: --data moved: its training text is not the one that run was trained on")
    (run.path / "text").mkdir()
    for path in (run.path / "moved").iterdir():
        shutil.copy(path, run.path / "text")
    assert "its training text is not the one" in run.run("dynamiceval", "run", code=2)
    (run.path / "moved" / "train.txt").unlink()
    refused = run.run("dynamiceval", "run", "--data", "moved", code=2)
    assert refused.startswith("error: moved: has no train text") and len(refused.splitlines()) == 1


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("run", "--lamb", -0.1), "--lamb -0.1: must be a number, 0 or more"),
        (("run", "--epsilon", 0), "--epsilon 0: must be a number above 0"),
        (("run", "--lr", "nan"), "--lr nan: must be a number above 0"),
        (("run", "--bptt", 0), "--bptt 0: must be a whole number, 1 or more"),
        (("run", "--max_batches", 0), "--max-batches 0: must be a whole number, 1 or more, or none"),
        (("run", "--model", "other.pt"), "run with --model other.pt: both name the run; leave one of them out"),
        (("--model", "nothing.pt"), "nothing.pt: there is no such run"),
    ],
)
def test_bad_input_is_refused(project, flags, complaint):
    output = project.run("dynamiceval", *flags, code=2)
    assert output.startswith(f"error: {complaint}") and len(output.splitlines()) == 1


def test_a_training_text_shorter_than_its_streams_is_refused(run):
    output = run.run("dynamiceval", "run", "--batch-size", 400, code=2)
    assert "840 training tokens are less than one window for each stream, --batch-size 400 x --bptt 5" in output
