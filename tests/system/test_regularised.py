"""Training with every regulariser, averaging, random windows and finetuning: exact, also when resumed."""

from __future__ import annotations

import json
import re
import shutil
import signal

import numpy as np
import pytest
from processes import figures, wait_until
from reference import published_trigger

pytestmark = pytest.mark.timeout(300)

ARCHITECTURE = ("--model", "awd-lstm", "--emsize", 8, "--nhid", 8, "--nlayers", 2)
DROPOUTS = ("--dropouti", 0.2, "--dropouth", 0.2, "--dropoute", 0.1, "--dropout", 0.2, "--wdrop", 0.3)
PENALTIES = ("--alpha", 1, "--beta", 1, "--wdecay", 1e-5)
# A learning rate that soon leaves the loss going up and down, so that averaging begins.
NTASGD = ("--lr", 40, "--clip", 1, "--ntasgd", "--nonmono", 1, "--eval-every", 10)
EVERYTHING = (*ARCHITECTURE, *DROPOUTS, *PENALTIES, *NTASGD, "--max_seq_len_delta", 3, "--random-start")


def results(project, run):
    """Every validation result of a run and its last test result, which each stop gives another of."""
    found = [*project.events(run, "valid"), project.events(run, "test")[-1]]
    return [(event["step"], event["loss"]) for event in found]


def evaluated_loss(project, name, split="valid"):
    """What `evaluate` prints, on the streams on which training evaluates."""
    output = project.run("evaluate", name, "--split", split, "--eval-batch-size", 10)
    return re.search(rf"{split} loss (\d+\.\d{{5}}) ", output)[1]


def assert_means(project, run, since, steps):
    """The checkpoints of `steps` hold the means, in float64, of the weights after each step since `since`."""
    for step in steps:
        found = project.arrays(f"{run}/checkpoints/step-{step}")
        history = [project.arrays(f"{run}/checkpoints/step-{k}", "unaveraged.npz") for k in range(since + 1, step + 1)]
        for name, mean in found.items():
            expected = np.mean([weights[name] for weights in history], axis=0, dtype=np.float64)
            np.testing.assert_allclose(mean, expected, rtol=1e-5, atol=1e-6, err_msg=f"{name} at step {step}")


def assert_same_ending(project, one, other):
    for file in ("parameters.npz", "unaveraged.npz"):
        expected, found = project.arrays(f"{other}/latest", file), project.arrays(f"{one}/latest", file)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            np.testing.assert_array_equal(value, expected[name], err_msg=f"{file} {name}")
    assert results(project, one) == results(project, other)


# ---------------------------------------------------------------- NT-ASGD


def test_averaging_begins_by_the_rule_and_the_averages_are_what_is_saved_and_evaluated(project):
    output = project.train("run", *EVERYTHING, "--max-steps", 70, "--checkpoint-every", 1, "--keep-checkpoints", 100)
    losses = [event["loss"] for event in project.events("run", "valid")]
    trigger = published_trigger(losses, n=1)
    assert trigger is not None
    since = project.events("run", "valid")[trigger]["step"]
    assert re.findall(r"averaging the weights from step (\d+) on", output) == [str(since)]
    checkpoints = project.path / "run/checkpoints"
    assert not (checkpoints / f"step-{since}/unaveraged.npz").exists()
    assert_means(project, "run", since, steps=(since + 1, since + 2, 70))
    assert evaluated_loss(project, "run/latest") == f"{losses[-1]:.5f}"
    assert evaluated_loss(project, "run", "test") == f"{project.events('run')[-1]['loss']:.5f}"
    assert losses[-1] < min(losses[: trigger + 1])  # which is what averaging is for


def test_the_learning_rate_stays_as_it_is_once_the_weights_are_averaged(project):
    project.train("run", *ARCHITECTURE, *NTASGD, "--log-interval", 1, "--epochs", 4, "--when", 2, 3)
    since = json.loads((project.path / "run/latest/state.json").read_text())["training"]["averaging_since"]
    steps = [event for event in project.events("run") if event["event"] == "train"]
    assert since < min(event["step"] for event in steps if event["epoch"] == 3)  # before the first fall
    assert max(event["epoch"] for event in steps) == 4 and {event["lr"] for event in steps} == {40}


@pytest.mark.parametrize("devices", [(), ("--cpus", 2)], ids=["one device", "two devices"])
def test_killed_and_resumed_ends_as_if_never_stopped(project, devices):
    flags = (*EVERYTHING, *devices, "--epochs", 4, "--checkpoint-every", 7)
    project.train("whole", *flags)
    process = project.start_training("killed", *flags)
    checkpoints = project.path / "killed/checkpoints"
    wait_until(lambda: any(checkpoints.glob("step-*/unaveraged.npz")), process=process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(project.events("killed", "valid")) < len(project.events("whole", "valid"))
    project.run("train", "--resume", "killed")
    assert_same_ending(project, "killed", "whole")


def test_stopped_by_max_steps_before_and_after_averaging_begins(project):
    flags = (*EVERYTHING, "--epochs", 2)
    project.train("whole", *flags)
    project.train("parts", *flags, "--max-steps", 10)
    assert not (project.path / "parts/latest/unaveraged.npz").exists()
    project.run("train", "--resume", "parts", "--max-steps", 70)
    assert (project.path / "parts/latest/unaveraged.npz").exists()
    project.run("train", "--resume", "parts", "--max-steps", "none")
    assert_same_ending(project, "parts", "whole")


def test_the_averages_are_what_is_tested_where_none_was_evaluated(project):
    flags = ("--asgd", "--lr", 5, "--epochs", 100000, "--eval-every", 100000, "--checkpoint-every", 20)
    process = project.start_training("run", *flags)
    wait_until((project.path / "run/latest").exists, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    tested = float(re.search(r"test ppl +([\d.]+)", output)[1])
    evaluated, _ = figures(project.run("evaluate", "run", "--eval-batch-size", 10), "test")
    assert evaluated == pytest.approx(tested, abs=0.01)


def test_averaging_that_is_switched_off_on_resume_goes_on_with_the_weights_themselves(project):
    project.train("run", *EVERYTHING, "--max-steps", 70)
    weights = project.arrays("run/latest", "unaveraged.npz")
    project.run("train", "--resume", "run", "--no-ntasgd", "--max-steps", 71, "--lr", 1e-30, "--wdecay", 0)
    assert not (project.path / "run/latest/unaveraged.npz").exists()
    for name, value in project.arrays("run/latest").items():
        np.testing.assert_array_equal(value, weights[name])


# ---------------------------------------------------------------- schedule and windows


def test_when_divides_the_learning_rate_by_ten_after_those_epochs(project):
    flags = ("--dropout", 0.2, "--decay", "none")
    project.train("run", *flags, "--epochs", 3, "--when", 1, 2)
    lr = {event["epoch"]: event["lr"] for event in project.events("run", "train")}
    assert lr == pytest.approx({1: 1, 2: 0.1, 3: 0.01})
    project.train("by-hand", *flags, "--epochs", 1)
    for epochs, by_hand in ((2, 0.1), (3, 0.01)):
        project.run("train", "--resume", "by-hand", "--epochs", epochs, "--lr", by_hand)
    assert project.parameters("run") == project.parameters("by-hand")


def test_shuffled_windows_from_a_random_start_resume_in_mid_epoch(project):
    flags = ("--shuffle", "--random-start", "--dropout", 0.2, "--decay", "none", "--eval-every", 10, "--epochs", 2)
    project.train("whole", *flags)
    project.train("parts", *flags, "--max-steps", 50)
    project.run("train", "--resume", "parts", "--max-steps", "none")
    assert project.parameters("parts") == project.parameters("whole")
    assert results(project, "parts") == results(project, "whole")
    losses = [event["loss"] for event in project.events("whole", "valid")]
    assert losses[-1] < losses[0]
    project.train("in-order", *flags[2:])
    assert project.parameters("in-order") != project.parameters("whole")


# ---------------------------------------------------------------- finetuning

FINETUNE = ("--lr", 2, "--eval-every", 10, "--epochs", 1)


@pytest.fixture
def finetuning(project):
    """A project with a run to finetune."""
    project.have_trained("run", *EVERYTHING, "--epochs", 2)
    return project


def best_loss(project, run):
    return min(event["loss"] for event in project.events(run, "valid"))


def test_finetuning_averages_from_its_first_step(finetuning):
    finetuning.run("finetune", "run", *FINETUNE, "--max-steps", 15, "--checkpoint-every", 1, "--keep-checkpoints", 100)
    events = finetuning.events("run/finetune_model", "valid")
    assert [event["step"] for event in events] == [0, 10, 15]
    assert events[0]["loss"] == best_loss(finetuning, "run")
    assert_means(finetuning, "run/finetune_model", since=0, steps=(1, 2, 15))


def test_finetuning_gives_a_run_of_its_own_with_what_the_line_said(finetuning):
    before = finetuning.parameters("run")
    flags = ("--dropouth", 0.05, "--dropouti", 0.1, "--dropoute", 0, "--dropout", 0.15, "--wdrop", 0.25, *FINETUNE)
    output = finetuning.run("finetune", "run", *flags)
    config = (finetuning.path / "run/finetune_model/config.yaml").read_text()
    for line in (
        "lr: 2.0  # flag --lr",
        "dropout_hidden: 0.05  # flag --dropouth",
        "dropout_input: 0.1  # flag --dropouti",
        "dropout_embed: 0.0  # flag --dropoute",
        "dropout: 0.15  # flag --dropout",
        "weight_drop: 0.25  # flag --wdrop",
        "hidden_size: 8  # run run",
        "alpha: 1.0  # run run",
        "ntasgd: false  # run run",
        "asgd: true  # finetune",
    ):
        assert line in config.splitlines()
    assert best_loss(finetuning, "run/finetune_model") < best_loss(finetuning, "run"), output
    best = f"{best_loss(finetuning, 'run/finetune_model'):.5f}"
    for name in ("run/finetune_model", "run/finetune_model.pt", "run/finetune_model/best"):
        assert evaluated_loss(finetuning, name) == best
    assert evaluated_loss(finetuning, "run") == f"{best_loss(finetuning, 'run'):.5f}"
    assert finetuning.parameters("run") == before


def test_finetuning_ends_by_the_rule_and_never_worse_than_the_run(finetuning):
    finetuning.run("finetune", "run", "--lr", 1000, "--clip", "none", "--eval-every", 2, "--nonmono", 3)
    losses = [event["loss"] for event in finetuning.events("run/finetune_model", "valid")]
    assert min(losses[1:]) > losses[0]
    # As in its authors' code, what it begins with decides what is best, and not when it ends.
    assert published_trigger(losses[1:], n=3) == len(losses) - 2 == 4
    assert finetuning.parameters("run/finetune_model", "best") == finetuning.parameters("run", "best")
    assert evaluated_loss(finetuning, "run/finetune_model", "test") == evaluated_loss(finetuning, "run", "test")


@pytest.mark.parametrize("flags, steps", [((), 42), (("--max-steps", 4), 4)])
def test_the_runs_bound_on_steps_is_not_that_of_its_finetuning(project, flags, steps):
    project.train("run", "--max-steps", 3)
    project.run("finetune", "run", "--epochs", 1, *flags)
    assert project.events("run/finetune_model")[-1]["step"] == steps


@pytest.mark.parametrize(
    ("devices", "go_on"),
    [
        ((), ("finetune", "run", "--continue-train")),
        (("--cpus", 2), ("train", "--resume", "run/finetune_model")),
    ],
    ids=["one device, finetune", "two devices, train"],
)
def test_a_stopped_finetuning_is_continued(finetuning, devices, go_on):
    flags = ("--save", "run", *FINETUNE, *devices)
    finetuning.run("finetune", *flags)
    shutil.move(finetuning.path / "run/finetune_model", finetuning.path / "whole")
    finetuning.run("finetune", *flags, "--max-steps", 10)
    finetuning.run(*go_on, "--max-steps", "none")
    assert_same_ending(finetuning, "run/finetune_model", "whole")


def test_what_decides_the_windows_may_not_change_when_a_finetuning_is_continued(finetuning):
    finetuning.run("finetune", "run", *FINETUNE, "--max-steps", 10)
    config = (finetuning.path / "run/finetune_model/config.yaml").read_text()
    for flag, value in {"--bptt": 50, "--seed": 2, "--max-seq-len-delta": 9}.items():
        refused = finetuning.refused("finetune", "run", "--continue-train", flag, value)
        assert f"{flag} {value}: run/finetune_model was trained with" in refused
    assert (finetuning.path / "run/finetune_model/config.yaml").read_text() == config


def test_the_architecture_may_be_repeated_and_not_changed(finetuning):
    flags = ("--data", "text", "--save", "run", "--max-steps", 2)
    changes = {"--hidden-size": 12, "--model": "awd-gru", "--num-layers": 3, "--min-freq": 2, "--init": "xavier"}
    for flag, value in changes.items():
        refused = finetuning.refused("finetune", *flags, *ARCHITECTURE, flag, value)
        assert f"{flag} {value}: run was trained with" in refused
        assert not (finetuning.path / "run/finetune_model").exists()
    finetuning.run("finetune", *flags, *ARCHITECTURE, "--tied")
    assert finetuning.events("run/finetune_model", "valid")[-1]["step"] == 2


def test_a_second_finetuning_needs_overwrite(finetuning):
    finetuning.run("finetune", "run", "--max-steps", 2)
    before = finetuning.parameters("run/finetune_model")
    refused = finetuning.refused("finetune", "run", "--max-steps", 3)
    assert "--overwrite" in refused and "--continue-train" in refused
    assert finetuning.parameters("run/finetune_model") == before
    finetuning.run("finetune", "run", "--max-steps", 3, "--overwrite")
    assert finetuning.parameters("run/finetune_model") != before


def test_what_cannot_be_finetuned_is_refused_in_one_line(finetuning):
    text = (finetuning.path / "text/train.txt").read_text()
    cases = {
        "another vocabulary": (text.replace("river", "stream"), ("run",), "text"),
        "another text": (text + "the cat sees a river .\n", ("run",), "text"),
        "no such run": (text, ("nowhere",), "nowhere"),
        "no such run, named otherwise": (text, ("--save", "nowhere"), "nowhere"),
        "nothing to continue": (text, ("run", "--continue-train"), "finetune_model"),
        "a checkpoint that is not the one": (text, ("run/best", "--continue-train"), "run/best with --continue-train"),
        "a folder that is no run": (text, ("text",), "text"),
    }
    for what, (content, words, named) in cases.items():
        (finetuning.path / "text/train.txt").write_text(content)
        refused = finetuning.refused("finetune", *words, "--max-steps", 2)
        assert named in refused, what
        assert not what.startswith("another") or re.match(
            "error: .*run/checkpoints/step-[0-9]+: was trained", refused
        ), refused
        assert not (finetuning.path / "run/finetune_model").exists()
    assert not (finetuning.path / "nowhere").exists()
