"""What a user relies on when training: results, resuming, signals, and errors that leave nothing behind."""

from __future__ import annotations

import array
import dataclasses
import fcntl
import gc
import json
import logging
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE

import mxnet as mx
import numpy as np
import pytest
from processes import environment, wait_until

import gluon_lm
from gluon_lm.config import DataConfig, ModelConfig, OptimConfig, TrainingConfig, resolve
from gluon_lm.errors import CheckpointError, ConfigError
from gluon_lm.logs import LOGGER
from gluon_lm.models import LanguageModel
from gluon_lm.tracking import write_status
from gluon_lm.trained import load_model
from gluon_lm.training.checkpoint import Checkpoint, load_parameters
from gluon_lm.training.run_folder import replace_symlink
from gluon_lm.training.trainer import Trainer

pytestmark = pytest.mark.timeout(300)


def test_training_learns_and_the_commands_agree(project):
    output = project.train("run", "--epochs", 8, "--lr", 10)
    valid = [e["loss"] for e in project.events("run", "valid")]
    assert valid[-1] < 1.2  # nats; a uniform guess among the 12 words has 2.5, the grammar itself 0.6
    assert "recipe lm" in output.splitlines()[0]
    (test,) = project.events("run", "test")
    evaluated = project.run("evaluate", "run", "--eval-batch-size", 10)
    assert f"loss {test['loss']:.5f}" in evaluated
    assert f"tokens {test['num_tokens']}" in evaluated
    one_stream = project.run("evaluate", "run").splitlines()[-1]
    assert one_stream == project.run("evaluate", "run/best", "--bptt", 3).splitlines()[-1]
    assert one_stream == project.run("evaluate", "run.pt", "--split", "test").splitlines()[-1]


def test_python_trains_as_the_command_does(project, caplog):
    config = resolve(recipe="lm").config
    parts = {
        "data": DataConfig(data=project.path / "text"),
        "model": ModelConfig(embed_size=8, hidden_size=8),
        "optim": dataclasses.replace(config.optim, lr=1),
        "training": TrainingConfig(batch_size=4, bptt=5, epochs=2, log_interval=10),
    }
    assert gluon_lm.train_run(dataclasses.replace(config, **parts), project.path / "python") == 0
    assert (LOGGER.level, LOGGER.handlers, LOGGER.propagate) == (logging.NOTSET, [], True)
    assert not [record for record in caplog.records if record.levelno < logging.WARNING]  # nobody asked for these
    project.have_trained("run")
    assert project.parameters("python") == project.parameters("run")
    assert project.results("python") == project.results("run")
    logs = [(project.path / run / "log.txt").read_text() for run in ("python", "run")]
    for line in ("recipe ", "lstm 8x8", "memory: about", "ms/batch", "End of training"):
        assert [line in log for log in logs] == [True, True], line
    config = resolve(recipe="awd-small").config
    parts["model"] = dataclasses.replace(config.model, embed_size=8, hidden_size=8, num_layers=1)
    parts["training"] = dataclasses.replace(parts["training"], max_steps=2)
    without_layers_between = dataclasses.replace(
        config, data=parts["data"], model=parts["model"], training=parts["training"]
    )
    assert gluon_lm.train_run(without_layers_between, project.path / "one-layer") == 0
    contradicting = dataclasses.replace(without_layers_between, optim=OptimConfig(ntasgd=True, lr_decay=4))
    with pytest.raises(ConfigError, match="--ntasgd with --lr-decay 4"):
        gluon_lm.train_run(contradicting, project.path / "never")
    with pytest.raises(ConfigError, match="python.*exists"):
        gluon_lm.train_run(without_layers_between, project.path / "python")
    assert not (project.path / "never").exists()


def test_generate_writes_twenty_words_a_line_and_follows_the_seed(project):
    project.have_trained("run")
    project.run("generate", "run", "--words", 50, "--seed", 3, "--outf", "a.txt")
    project.run("generate", "run", "--words", 50, "--seed", 3, "--outf", "b.txt")
    project.run("generate", "run", "--words", 50, "--seed", 4, "--outf", "c.txt")
    lines = (project.path / "a.txt").read_text().splitlines()
    assert [len(line.split()) for line in lines] == [20, 20, 10]
    assert (project.path / "b.txt").read_text() == (project.path / "a.txt").read_text()
    assert (project.path / "c.txt").read_text() != (project.path / "a.txt").read_text()


def test_the_same_seed_gives_the_same_run_and_another_one_another(project):
    for run, seed in (("one", 5), ("two", 5), ("three", 6)):
        project.train(run, "--seed", seed, "--dropout", 0.4)
    assert project.parameters("one") == project.parameters("two")
    assert project.results("one") == project.results("two")
    assert project.parameters("one") != project.parameters("three")


@pytest.mark.parametrize(
    "devices",
    [(), ("--cpus", 2), ("--cpus", 2, "--gctype", "2bit")],
    ids=["one device", "two devices", "two devices, 2-bit"],
)
def test_killed_twice_in_mid_epoch_and_resumed_ends_as_if_never_stopped(project, devices):
    flags = ("--dropout", 0.3, "--checkpoint-every", 7, "--epochs", 4, *devices)
    project.train("whole", *flags)
    process = project.start_training("killed", *flags)
    checkpoints = project.path / "killed" / "checkpoints"
    for steps in (20, 60):
        wait_until(
            lambda steps=steps: any(int(p.name[5:]) >= steps for p in checkpoints.glob("step-*")), process=process
        )
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # and had not ended by then
        process = project.start("train", "--resume", "killed")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "resuming at step" in output
    assert project.parameters("killed") == project.parameters("whole")
    assert project.results("killed") == project.results("whole")
    steps = [e["step"] for e in project.events("killed", "train")]
    assert steps == sorted(set(steps))


def test_a_finished_run_can_be_resumed_for_longer(project):
    project.train("whole", "--epochs", 3, "--dropout", 0.3)
    project.train("grown", "--epochs", 1, "--dropout", 0.3)
    project.run("train", "--resume", "grown", "--epochs", 3)
    assert project.parameters("grown") == project.parameters("whole")
    assert project.results("grown")[-1] == project.results("whole")[-1]


def test_what_comes_too_late_is_said_on_resume(project):
    output = project.train("run", "--epochs", 3, "--lr-decay", "none", "--ntasgd", "--nonmono", 1, "--when", 2)
    assert "not be averaged: training ends after 3 epochs (--epochs), and averaging starts after epoch 3" in output
    output = project.run("train", "--resume", "run", "--epochs", 4)
    assert "not be averaged" not in output
    output = project.run("train", "--resume", "run", "--epochs", 5, "--when", 3, "--nonmono", 2)
    assert "--when 3: has no effect any more, 4 epochs are done" in output
    assert "--nonmono 2: has no effect" not in output  # the weights are not averaged yet


def test_what_averaging_has_made_too_late_is_said_on_resume(project):
    averaged = ("--lr", 40, "--clip", 1, "--lr-decay", "none", "--ntasgd", "--nonmono", 1, "--eval-every", 10)
    assert "averaging the weights from step" in project.train("run", *averaged, "--epochs", 3)
    for epochs, flag, value in ((4, "--nonmono", 2), (7, "--when", 6)):
        output = project.run("train", "--resume", "run", "--epochs", epochs, flag, value)
        assert f"{flag} {value}: has no effect any more, the weights are averaged already" in output
    assert "any more" not in project.run("train", "--resume", "run", "--epochs", 8, "--nonmono", 2)


def test_training_does_not_hold_the_checkpoint_that_it_goes_on_from(project, monkeypatch):
    held = []

    def fit(trainer):
        held.append([kept for kept in gc.get_objects() if isinstance(kept, Checkpoint)])
        return 0

    project.train("run", "--optimizer", "adam", "--lr", 0.01, "--max-steps", 3)
    monkeypatch.setattr(Trainer, "fit", fit)
    project.run("train", "--resume", "run", "--max-steps", 4)
    project.run("train", "--init-from", "run", "--save", "other", "--max-steps", 4)
    assert held == [[], []]


def test_the_newest_run_is_resumed_by_the_link_that_names_it(project):
    project.train("runs/first", "--max-steps", 4)
    run = project.path / "runs/first"
    for max_steps in (6, 8):
        project.run("train", "--resume", "runs/latest", "--max-steps", max_steps)
        assert (project.path / "runs/latest").resolve() == run
        assert os.readlink(run / "latest") == f"checkpoints/step-{max_steps}"


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_that_a_link_names_is_written_where_the_link_led_at_the_start(project, monkeypatch):
    latest, first, second = (Path("runs") / name for name in ("latest", "first", "second"))
    for run in (first, second):
        project.train(run, "--max-steps", 4)
        project.run("finetune", run, "--max-steps", 2)
    untouched, fit = contents(second), Trainer.fit

    def fit_while_another_run_begins(trainer):
        replace_symlink(latest, second)
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", fit_while_another_run_begins)
    replacing = (*project.training_flags, "--save", latest, "--overwrite", "--checkpoint-every", 1)
    for run, max_steps, flags in (
        (first / "finetune_model", 3, ("--resume", latest / "finetune_model")),
        (first, 6, ("--resume", latest)),
        (first, 7, replacing),
    ):
        replace_symlink(latest, first)
        project.run("train", *flags, "--max-steps", max_steps)
        last = project.events(run)[-1]
        assert (last["event"], last["step"]) == ("test", max_steps)
        assert contents(second) == untouched


def test_the_newest_run_is_found_where_the_folder_of_runs_is_a_link(project):
    (project.path / "large-disk").mkdir()
    Path("runs").symlink_to("large-disk")
    for run in ("first", "second"):
        project.train(f"runs/{run}", "--max-steps", 3)
        assert os.readlink("large-disk/latest") == run
    assert project.run("evaluate") == project.run("evaluate", "runs/second")


def write_other_text(project):
    """A text with some words of the project's own, and some that it lacks."""
    (project.path / "other").mkdir()
    for split, num_lines in (("train", 90), ("valid", 15), ("test", 15)):
        lines = [
            f"the {'cat dog fish'.split()[n % 3]} sees a {'river boat'.split()[n % 2]} ." for n in range(num_lines)
        ]
        (project.path / "other" / f"{split}.txt").write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "of",
    [(), ("--recipe", "lm", "--n-experts", 2), ("--cutoffs", 5), ("--asgd",)],
    ids=["softmax", "mixture", "adaptive", "averaged"],
)
def test_a_run_begins_with_the_model_of_another_on_a_text_of_its_own(project, of):
    write_other_text(project)
    project.have_trained("base", *of)
    flags = ("--init-from", "base", "--data", "other", "--save", "run", "--lr", 1e-9, "--epochs", 1)
    output = project.run("train", *flags, "--dropout", 0, "--no-asgd")
    assert "train.txt" not in output and "valid.txt: 13% of the words are not in the vocabulary and read as" in output
    assert "the training text has no <unk>" not in output
    first, *_, last = project.events("run")
    found = project.run("evaluate", "base", "--data", "other", "--split", "valid", "--eval-batch-size", 10)
    expected = float(re.search(r"valid loss ([\d.]+)", found)[1])
    assert (first["event"], first["step"]) == ("valid", 0)
    assert first["loss"] == pytest.approx(expected, abs=1e-3)
    assert last["event"] == "test"
    for name, value in project.parameters("run").items():  # at a learning rate that changes nothing
        np.testing.assert_allclose(
            np.frombuffer(value, "float32"),
            np.frombuffer(project.parameters("base", "best")[name], "float32"),
            atol=1e-6,
        )
    words = [(project.path / run / "vocab.txt").read_text() for run in ("base", "run")]
    assert words[0] == words[1]
    origins = project.run("train", *flags, "--overwrite", "--print-config")
    assert "hidden_size: 8  # run base" in origins and "lr: 1.0e-09  # flag --lr" in origins


def test_a_run_on_another_text_in_the_order_of_the_first_is_finetuned_and_resumed(project):
    write_other_text(project)
    project.train("base", "--cutoffs", 5, "--max-steps", 3)
    project.run("train", "--init-from", "base", "--data", "other", "--save", "run", "--max-steps", 3)
    project.run("train", "--resume", "run", "--max-steps", 5)
    assert "finetune_model" in project.run("finetune", "run", "--max-steps", 3)
    project.train("plain", "--vocab", "base/vocab.txt", "--data", "other", "--max-steps", 3)
    line = project.refused("finetune", "plain", "--num-sampled", 5)
    assert "--num-sampled: needs the vocabulary in order of falling frequency" in line and line.endswith(
        "; leave it out"
    )


def test_the_bound_on_the_steps_of_a_run_is_not_that_of_a_run_that_begins_with_it(project):
    project.train("base", "--max-steps", 3)
    project.run("train", "--init-from", "base", "--save", "run", "--epochs", 1)
    assert project.events("run")[-1]["step"] > 3
    project.run("train", "--init-from", "base", "--save", "short", "--max-steps", 2)
    assert project.events("short")[-1]["step"] == 2


def test_a_run_that_began_with_another_is_resumed_as_if_it_had_never_stopped(project):
    write_other_text(project)
    project.have_trained("base")
    flags = ("--init-from", "base", "--data", "other", "--lr", 0.5, "--dropout", 0.3, "--epochs", 2)
    project.run("train", *flags, "--save", "whole")
    project.run("train", *flags, "--save", "parts", "--max-steps", 7)
    project.run("train", "--resume", "parts", "--max-steps", 10000)
    assert project.parameters("parts") == project.parameters("whole")
    assert project.parameters("parts") != project.parameters("base")


def test_what_does_not_fit_the_run_that_another_begins_with_is_refused(project):
    project.have_trained("base")
    begin = ("--init-from", "base", "--save", "run")
    assert "--nhid 9: base was trained with 8" in project.refused("train", *begin, "--nhid", 9)
    assert "--max-vocab 7: base was trained with none" in project.refused("train", *begin, "--max-vocab", 7)
    assert "--cutoffs 5: base was trained with none" in project.refused("train", *begin, "--cutoffs", 5)
    assert "leave --recipe out" in project.refused("train", *begin, "--recipe", "awd")
    assert "a run begins once" in project.refused("train", "--init-from", "base", "--resume", "base")
    assert "nowhere" in project.refused("train", "--init-from", "nowhere", "--save", "run")
    project.train("base/finetune_model", "--max-steps", 1)
    for run in ("base", "base/best", "base/finetune_model"):
        line = project.refused("train", "--init-from", run, "--save", "base", "--overwrite")
        assert "a new run cannot replace the one that it begins with" in line
    (project.path / "text/train.txt").write_text("another text\n" * 100)
    assert "train --init-from" in project.refused("finetune", "base", "--overwrite")
    assert not (project.path / "run").exists()


def test_a_checkpoint_goes_on_with_other_devices(project):
    project.train("run", "--epochs", 1, "--dropout", 0)
    project.train("whole", "--epochs", 2, "--dropout", 0)
    project.run("train", "--resume", "run", "--cpus", 4, "--epochs", 2)
    for (_, _, mine), (_, _, other) in zip(project.results("run")[-1:], project.results("whole")[-1:]):
        assert mine == pytest.approx(other, rel=1e-5)


def test_ctrl_c_once_saves_tests_and_exits_with_130(project):
    process = project.start_training("run", "--epochs", 100000, "--checkpoint-every", 20)
    latest = project.path / "run" / "latest"
    wait_until(latest.exists, process=process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "test ppl" in output
    assert "--resume run" in output
    stopped_at = int(os.readlink(latest).rpartition("-")[2])
    assert f"stopped at step {stopped_at};" in output


@pytest.mark.parametrize("links", ["followed", "left out"])
def test_a_run_that_was_copied_without_its_links_works(project, links):
    project.train("run", "--epochs", 2)
    project.run("train", "--resume", "run", "--epochs", 3, "--lr", 100)  # the best checkpoint is not the newest
    exact = project.run("evaluate", "run").splitlines()[-1]
    assert exact != project.run("evaluate", "run/latest").splitlines()[-1]
    shutil.copytree("run", "copy")  # `scp -r`, too, puts copies in the place of links
    if links == "left out":
        shutil.rmtree("copy/best")
        shutil.rmtree("copy/latest")
    else:
        assert project.run("evaluate", "copy/best").splitlines()[-1] == exact
    assert project.run("evaluate", "copy").splitlines()[-1] == exact
    for run in ("run", "copy"):
        project.run("train", "--resume", run, "--epochs", 4, "--lr", 1)
        assert os.readlink(f"{run}/latest") == "checkpoints/step-168"
    assert os.readlink("copy/best") == os.readlink("run/best")
    assert project.parameters("copy") == project.parameters("run")


def test_a_run_may_have_the_name_of_the_link_to_the_newest(project):
    project.train("runs/latest")
    output = project.train("runs/other")
    assert "runs/latest is itself a run, so it is not made a link to the newest one" in output
    assert project.run("evaluate") == project.run("evaluate", "runs/latest")


def test_a_program_may_train_in_a_thread(project):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(project.train, "run").result(timeout=120)
    project.train("alone")
    assert project.parameters("run") == project.parameters("alone")


def test_ctrl_c_that_ends_the_reader_of_the_output_too_costs_nothing(project):
    """As in ``train | tee log``: the terminal tells both."""
    flags = (*project.training_flags, "--save", "run", "--epochs", 100000, "--checkpoint-every", 20)
    words = project.command("train", *flags)
    with subprocess.Popen(words, env=environment(), stdout=PIPE, stderr=subprocess.STDOUT) as process:
        try:
            wait_until((project.path / "run/latest").exists, process=process)
            process.send_signal(signal.SIGSTOP)  # so that both come at once
            process.stdout.close()
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGCONT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
    status = json.loads((project.path / "run/status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", None)
    assert project.events("run")[-1]["event"] == "test"
    assert "SIGINT: stopping after this step" in (project.path / "run/log.txt").read_text()


def test_ctrl_c_twice_exits_at_once(project):
    test_text = project.path / "text/test.txt"
    test_text.write_text(test_text.read_text() * 4000)  # so that testing the best model takes long
    process = project.start_training("run", "--epochs", 100000)
    wait_until((project.path / "run/latest").exists, process=process)
    process.send_signal(signal.SIGINT)
    process.wait_for("--resume run")  # stopped and saved; the test comes next
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "test ppl" not in output


def test_sigterm_ends_the_test_of_a_finished_training_which_resuming_does_anew(project):
    test_text = project.path / "text/test.txt"
    test_text.write_text(test_text.read_text() * 16000)  # so that the test takes seconds
    process = project.start_training("run", "--epochs", 1)
    wait_until((project.path / "run/latest").exists, process=process)
    wait_until(lambda: "training ends at step" in (project.path / "run/log.txt").read_text(), process=process)
    time.sleep(0.5)  # and the test has begun
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and "test ppl" not in output, output
    assert "stopped before the end of the test text; continue with --resume run" in output
    assert json.loads((project.path / "run/status.json").read_text())["state"] == "stopped"


def test_a_signal_in_the_midst_of_a_line_that_nobody_reads_is_heeded():
    """Not as other tests, whose Python writes without a buffer that a signal could find locked."""
    script = (
        "import os, threading, time\n"
        "from gluon_lm.logs import LOGGER, Verbosity, log_to_terminal\n"
        "from gluon_lm.training.signals import StopRequest\n"
        "log_to_terminal(Verbosity.NORMAL)\n"
        "with StopRequest() as stop:\n"
        "    while stop.signal is None:\n"
        "        LOGGER.info('x' * 1000)\n"
        "os._exit(stop.exit_code)\n"
    )
    buffered = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    process = subprocess.Popen([sys.executable, "-c", script], env=buffered, stdout=PIPE, stderr=PIPE)
    waiting = array.array("i", [0])

    def is_full() -> bool:
        fcntl.ioctl(process.stdout, termios.FIONREAD, waiting)
        return waiting[0] > 60_000

    try:
        wait_until(is_full, process=process)
        time.sleep(0.2)  # and it is blocked
        process.terminate()
        time.sleep(0.5)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 143 and not errors, errors


def test_sigterm_saves_and_exits_without_testing(project):
    process = project.start_training("run", "--epochs", 100000)
    metrics = project.path / "run/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size, process=process)  # the first step is taken
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert "test ppl" not in output
    assert (project.path / "run" / "latest" / "state.json").is_file()


def test_divergence_stops_before_the_update_and_keeps_the_checkpoint(project):
    output = project.train("run", "--lr", 1e38, "--clip", "none", "--checkpoint-every", 1, code=2)
    error = output.strip().splitlines()[-1]
    assert error.startswith("error: step ") and "finite" in error and "--lr" in error
    before = project.parameters("run")
    project.run("evaluate", "run/latest")
    assert project.parameters("run") == before


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "garbage state"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_offered(project, damage):
    project.train("run", "--checkpoint-every", 5, "--max-steps", 12)
    undamaged = project.parameters("run")
    newest = (project.path / "run" / "latest").resolve()
    target = newest / "parameters.npz"
    content = bytearray(target.read_bytes())
    if damage == "truncate":
        target.write_bytes(content[:-10])
    elif damage == "flip":
        content[-50] ^= 1
        target.write_bytes(content)
    elif damage == "remove":
        target.unlink()
    else:
        (newest / "state.json").write_text("{")
    output = project.run("train", "--resume", "run", code=2)
    assert "damaged" in output and "Traceback" not in output
    offered = output.strip().rpartition("the one before it, ")[2]
    assert (project.path / offered / "state.json").is_file()
    assert "resuming at step" in project.run("train", "--resume", offered)
    assert project.parameters("run") == undamaged
    project.run("train", "--resume", "run", "--max-steps", 13)


def test_another_architecture_is_refused(project):
    project.have_trained("run")
    output = project.run("train", "--resume", "run", "--nhid", 12, "--batch-size", 8, code=2)
    assert "--nhid 12" in output and "--batch-size 8" in output
    config = project.path / "run/config.yaml"
    config.write_text(config.read_text().replace("hidden_size: 8", "hidden_size: 16"))
    assert "hidden_size is 16, and step-84 was trained with 8" in project.refused("train", "--resume", "run")


@pytest.mark.parametrize(
    ("edits", "differing"),
    [
        ({"bptt: 5": "bptt: 3", "seed: 1111": "seed: 7"}, {"bptt": (3, 5), "seed": (7, 1111)}),
        ({"batch_size: 4": "batch_size: 2"}, {"batch_size": (2, 4)}),
        ({"shuffle: false": "shuffle: true"}, {"shuffle": ("true", "false")}),
        ({"max_seq_len_delta: null": "max_seq_len_delta: 2"}, {"max_seq_len_delta": (2, "none")}),
        ({"dropout_hidden: null": "dropout_hidden: 0.1"}, {"locked": ("true", "false")}),
    ],
    ids=str,
)
def test_a_configuration_edited_where_a_run_must_stay_as_it_was_is_refused(project, edits, differing):
    project.train("run", "--max-steps", 10)
    config, untouched = project.path / "run/config.yaml", contents(project.path / "run")
    written = config.read_text()
    for old, new in edits.items():
        assert f"\n{old} " in written
        config.write_text(config.read_text().replace(f"\n{old} ", f"\n{new} "))
    output = project.run("train", "--resume", "run", "--max-steps", 20, code=2)
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert errors == [
        f"error: run/config.yaml: {name} is {now}, and step-10 was trained with {then}; write {name}: {then} there "
        "again, or train a new run"
        for name, (now, then) in differing.items()
    ]
    config.write_text(written)
    assert contents(project.path / "run") == untouched
    project.run("train", "--resume", "run", "--max-steps", 12)


@pytest.mark.parametrize("change", [{"num_layers": 1}, {"num_layers": 3}, {"hidden_size": 9}, {"tied": True}], ids=str)
def test_parameters_of_another_model_are_refused(project, change):
    project.have_trained("run")
    loaded, vocabulary, config, path = load_model(project.path / "run", mx.cpu())
    same, other = (
        LanguageModel(dataclasses.replace(config.model, **changed), len(vocabulary)) for changed in ({}, change)
    )
    for model in (same, other):
        model.initialize_parameters(5, [mx.cpu()])
    load_parameters(same, str(path))
    for name, parameter in same.named_parameters().items():
        expected = loaded.named_parameters()[name].data().asnumpy()
        np.testing.assert_array_equal(parameter.data().asnumpy(), expected)
    with pytest.raises(CheckpointError, match="is of another architecture"):
        load_parameters(other, str(path))


def test_devices_whose_parameters_drift_apart_end_training(project, monkeypatch):
    take_step = Trainer._take_step

    def take_step_and_drift(trainer, stop):
        result = take_step(trainer, stop)
        if trainer.state.step == 5:
            weights = next(iter(trainer.model.named_parameters().values())).data(mx.cpu(1))
            weights += 1e-6
        return result

    monkeypatch.setattr(Trainer, "_take_step", take_step_and_drift)
    monkeypatch.setattr("gluon_lm.training.trainer.CHECK_EVERY", 3)
    line = project.refused("train", *project.training_flags, "--cpus", 2, "--save", "run", "--checkpoint-every", 4)
    assert "step 6: the parameters on cpu(1) are not those on cpu(0); earlier checkpoints are intact" in line
    assert os.readlink("run/latest").endswith("step-4")


def test_a_run_that_has_failed_says_why_though_it_is_told_to_end_meanwhile(project, monkeypatch):
    """As a launcher tells all workers as soon as one of them has ended."""

    def write_when_told_to_end(path, state, reason=None):
        if state == "failed":
            os.kill(os.getpid(), signal.SIGTERM)
        write_status(path, state, reason)

    monkeypatch.setattr("gluon_lm.training.trainer.write_status", write_when_told_to_end)
    would_have_ended = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: would_have_ended.append(number))
    try:
        line = project.refused("train", *project.training_flags, "--optimizer", "adam", "--lr", 1e38, "--save", "run")
    finally:
        signal.signal(signal.SIGTERM, before)
    status = json.loads((project.path / "run/status.json").read_text())
    assert (status["state"], f"error: {status['reason']}", would_have_ended) == ("failed", line, [])
    assert (project.path / "run/log.txt").read_text().endswith(f" {line}\n")


def test_a_trainer_runs_once(project, monkeypatch):
    fit = Trainer.fit

    def fit_twice(trainer):
        code = fit(trainer)
        with pytest.raises(RuntimeError, match="this trainer has run; build another one"):
            fit(trainer)
        return code

    monkeypatch.setattr(Trainer, "fit", fit_twice)
    project.train("run", "--max-steps", 3)
    assert json.loads((project.path / "run/status.json").read_text())["state"] == "finished"
    assert project.events("run")[-1]["event"] == "test"


def test_a_learning_rate_holds_though_the_process_is_killed_before_it_wrote_a_checkpoint(project):
    project.train("run", "--max-steps", 5)
    shutil.copytree("run", "killed", symlinks=True)
    config = project.path / "killed/config.yaml"  # which a resumed run writes at once
    before = config.read_text()
    config.write_text(before.replace("\nlr: ", "\nlr: 0.25  # flag --lr, "))
    assert config.read_text() != before
    project.run("train", "--resume", "killed", "--max-steps", 7)
    project.run("train", "--resume", "run", "--lr", 0.25, "--max-steps", 7)
    assert project.parameters("killed") == project.parameters("run")
    project.run("train", "--resume", "run/checkpoints/step-5", "--max-steps", 6)  # which had another one
    assert "\nlr: 1.0  # checkpoint\n" in (project.path / "run/config.yaml").read_text()
    assert project.events("run", "train")[-1]["lr"] == 1


def test_going_on_from_an_older_checkpoint_sets_the_newer_ones_aside(project):
    flags = ("--dropout", 0.3, "--checkpoint-every", 7, "--keep-checkpoints", 100)
    project.train("run", *flags)
    whole, results = project.parameters("run"), project.results("run")
    output = project.run("train", "--resume", "run/checkpoints/step-7")
    assert "step-14 is newer than the named checkpoint; it is set aside as abandoned-step-14" in output
    assert project.parameters("run") == whole and project.results("run") == results
    assert project.parameters("run", "checkpoints/abandoned-step-14") == project.parameters(
        "run", "checkpoints/step-14"
    )
    output = project.run("train", "--resume", "run/checkpoints/step-7", "--lr", 0.5)
    assert "it is set aside as abandoned-step-14-2" in output
    assert project.parameters("run", "checkpoints/abandoned-step-14") == project.parameters(
        "run", "checkpoints/abandoned-step-14-2"
    )
    (project.path / "run/checkpoints/abandoned-step-14/parameters.npz").unlink()
    error = project.refused("evaluate", "run/checkpoints/abandoned-step-14")
    assert "abandoned-step-14: is damaged" in error and "use the one before it" not in error


def test_going_on_from_before_a_best_checkpoint_that_took_the_place_of_another_finds_a_new_best(project):
    flags = ("--lr", 8, "--clip", 1, "--decay", "none", "--eval-every", 4, "--max-steps", 16)
    project.train("run", *flags)
    losses = [event["loss"] for event in project.events("run", "valid")]
    kept = sorted(path.name for path in (project.path / "run/checkpoints").iterdir())
    assert min(losses) == losses[3] and min(losses[:3]) != losses[2] and kept == ["step-12", "step-16"]
    output = project.run("train", "--resume", "run/checkpoints/step-12", "--lr", 1e-6, "--max-steps", 24)
    assert "is no longer there: the next evaluation counts as the best" in output and "test ppl" in output
    assert project.run("evaluate", "run") == project.run("evaluate", "run/best")


def test_a_learning_rate_that_has_all_but_vanished_ends_nothing(project):
    flags = ("--lr", 1e-25, "--lr-decay", 1e9, "--eval-every", 2)
    output = project.train("run", *flags, "--max-steps", 14)
    assert project.events("run", "valid")[-1]["lr"] < 1e-45
    assert "test ppl" in output
    assert "test ppl" in project.run("train", "--resume", "run", "--max-steps", 20)


def test_values_keep_their_origin_when_a_run_goes_on(project):
    project.train("run", "--max-steps", 5)
    before = (project.path / "run/config.yaml").read_text()
    assert "max_steps: 5  # flag --max-steps" in before and "optimizer: sgd  # recipe lm" in before
    project.run("train", "--resume", "run", "--max-steps", 7)
    assert (project.path / "run/config.yaml").read_text() == before.replace("max_steps: 5", "max_steps: 7")


def test_a_run_that_is_done_says_that_nothing_is_left(project):
    project.train("run", "--max-steps", 10)
    events = project.events("run")
    assert "nothing is left to train at step 10" in project.run("train", "--resume", "run")
    assert project.events("run") == events  # and the test is there once
    assert "nothing is left" not in project.run("train", "--resume", "run", "--max-steps", 12)


def test_every_step_is_in_some_line_of_the_log_also_where_an_interval_is_longer_than_an_epoch(project):
    project.train("run", "--epochs", 2, "--log-interval", 1000)
    logged, evaluated = ([event["step"] for event in project.events("run", kind)] for kind in ("train", "valid"))
    assert logged == evaluated and len(logged) == 2


@pytest.mark.parametrize("suffixes", [".pt", ".params.pt"])
def test_the_suffix_of_a_reference_is_taken_off_once(project, suffixes):
    project.train(f"model{suffixes}", "--max-steps", 2)
    assert (project.path / f"model{suffixes.removesuffix('.pt')}" / "config.yaml").is_file()


def test_what_training_took_is_counted_over_a_stop(project):
    project.train("run", "--max-steps", 30, "--eval-every", 1000, "--checkpoint-every", 20)
    shutil.rmtree(project.path / "run/checkpoints/step-30")
    state = json.loads((project.path / "run/checkpoints/step-20/state.json").read_text())
    project.run("train", "--resume", "run/checkpoints/step-20", "--max-steps", 31)
    (event,) = project.events("run", "valid")
    assert 0 < state["training"]["seconds"] < event["seconds"]


def test_other_text_is_read_with_the_tokenizer_of_the_run(project):
    project.train("run", "--tokenizer", "words")
    (project.path / "other.txt").write_text("the cat sees a tree.\n" * 40)
    output = project.run("evaluate", "run", "--data", "other.txt")
    assert (
        "0 tokens, 0 of them words that the vocabulary lacks" in output and "tokens 280" in output
    )  # 40 lines, all of them
    split_at_blanks = project.run("evaluate", "run", "--data", "other.txt", "--tokenizer", "whitespace")
    assert "40 tokens, 40 of them words that the vocabulary lacks" in split_at_blanks  # "tree." is another word


def test_dry_run_and_print_config_write_nothing(project):
    before = sorted(project.path.iterdir())
    assert "tied" in project.train("run", "--dry-run", "--tied")
    assert "hidden_size: 8  # flag --nhid" in project.train("run", "--print-config")
    assert [p for p in sorted(project.path.iterdir()) if p.name != "cache"] == before


def test_errors_are_one_line_with_exit_code_2_and_leave_nothing(project):
    before = sorted(project.path.iterdir())
    (project.path / "short.txt").write_text("a b\nc d\n" * 12)
    for flags, words in [
        (("--nhidd", 3), ["--nhidd", "--nhid"]),
        (("--batch-size", 3, "--cpus", 2), ["--batch-size 3", "2"]),
        (("--cpus", 1, "--gctype", "2bit"), ["2bit"]),
        (("--gpus", "0"), ["--gpus 0", "no GPU"]),
        (("--cuda",), ["--cuda", "no GPU"]),
        (("--no-tf32",), ["--no-tf32", "only GPUs"]),
        (("--data", "short.txt", "--bptt", 50), ["--bptt 50", "error: short.txt (bytes 0 to "]),
        (("--data", "nowhere"), ["nowhere"]),
        (("--save", "short.txt/run"), ["short.txt"]),
    ]:
        output = project.train("run", *flags, code=2)
        errors = [line for line in output.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "Traceback" not in output, output
        for word in words:
            assert word in errors[0]
        assert not (project.path / "run").exists()
    assert {p.name for p in project.path.iterdir()} - {p.name for p in before} <= {"short.txt", "cache"}


def test_only_a_run_is_replaced_and_not_the_folder_that_one_is_in(project, monkeypatch):
    project.train("runs/first")
    (project.path / "text/config.yaml").write_text("nhid: 8\n")
    for folder, said in (("text", "is not a run of ours"), ("runs", "is not a run of ours")):
        assert said in project.refused("train", *project.training_flags, "--save", folder, "--overwrite")
    assert "exists already, and is not a run" in project.refused("train", *project.training_flags, "--save", "text")
    flags = [str(project.path / "text") if flag == "text" else flag for flag in project.training_flags]
    monkeypatch.chdir("runs/first/checkpoints")
    for folder in ("..", project.path / "runs/first"):
        assert "go to another one first" in project.refused("train", *flags, "--save", folder, "--overwrite")
    monkeypatch.chdir(project.path)
    before = project.parameters("runs/latest")
    project.train("runs/latest", "--overwrite", "--seed", 9)
    assert os.readlink("runs/latest") == "first" and project.parameters("runs/first") != before


def test_an_existing_run_is_kept_unless_it_may_be_replaced(project):
    project.have_trained("run")
    kept = project.parameters("run")
    output = project.train("run", code=2)
    assert "--overwrite" in output and "--resume" in output
    assert "exists already" in project.refused("train", "--data", "nowhere", "--save", "run")
    assert project.parameters("run") == kept
    (project.path / "run").chmod(0o700)
    project.train("run", "--seed", 9, "--overwrite")
    assert project.parameters("run") != kept
    assert stat.S_IMODE((project.path / "run").stat().st_mode) == 0o700
    (project.path / "mine").mkdir()
    (project.path / "mine/letter.txt").write_text("dear")
    assert "not a run" in project.train("mine", "--overwrite", code=2)
    assert (project.path / "mine/letter.txt").read_text() == "dear"


def test_the_default_folder_is_named_and_runs_latest_points_to_it(project):
    flags = ("--data", "text", "--emsize", 8, "--nhid", 8, "--batch-size", 4, "--bptt", 5, "--max-steps", 3)
    project.run("train", *flags)
    latest = (project.path / "runs/latest").resolve()
    assert latest.name.startswith("text-lstm-")
    assert "test loss" in project.run("evaluate")


def test_max_steps_eval_every_patience_and_kept_checkpoints(project):
    project.train("run", "--epochs", 100, "--eval-every", 10, "--patience", 3, "--lr", 1e-30, "--keep-checkpoints", 1)
    valid = project.events("run", "valid")
    assert [e["step"] for e in valid] == list(range(10, 10 * len(valid) + 1, 10))
    assert [e["best"] for e in valid[-4:]] == [True, False, False, False]
    names = {p.name for p in (project.path / "run/checkpoints").iterdir()}
    assert names == {os.path.basename(os.readlink(project.path / "run" / link)) for link in ("best", "latest")}
    project.train("short", "--max-steps", 7)
    assert project.events("short")[-1]["step"] == 7


def test_gen_word_len_writes_words_after_training(project):
    output = project.train("run", "--gen-word-len", 15)
    generated = output.partition("generating...\n")[2].splitlines()[0]
    assert len(generated.split()) == 15


TRAIN_ONE_AFTER_ANOTHER = """
import sys
from gluon_lm.train import main

folder, models, *flags = sys.argv[1:]
sys.exit(any(main([*flags, "--model", model, "--save", f"{folder}/{model}"]) for model in models.split()))
"""


def test_mxnets_own_recurrent_layers_train_as_onednns_do(project):
    models, losses = ("lstm", "gru", "rnn_tanh"), []
    flags = (*project.training_flags, "--dropout", 0, "--max-steps", 30)
    for folder, by_onednn in (("onednn", "1"), ("own", "0")):
        done = subprocess.run(
            [sys.executable, "-c", TRAIN_ONE_AFTER_ANOTHER, folder, " ".join(models), *map(str, flags)],
            env=environment(MXNET_USE_MKLDNN_RNN=by_onednn),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        losses.append([loss for model in models for _, _, loss in project.results(f"{folder}/{model}")])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
