"""Training over parameter servers, started by the launcher: real processes on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest
import yaml
from processes import ROOT, running, wait_until

import gluon_lm
from gluon_lm.distributed.compression import CALIBRATION_STEPS

pytestmark = pytest.mark.timeout(300)

TRAIN = (sys.executable, "-m", "gluon_lm.train")
FLAGS = (
    *("--data", "text", "--emsize", 8, "--nhid", 8, "--batch-size", 4, "--bptt", 5, "--lr", 2, "--cpus", 1),
    *("--dropout", 0, "--log-interval", 5),
)
MODELS = {
    "plain": ("--recipe", "lm", "--tied"),
    "weight-dropped": (
        "--model",
        "awd-lstm",
        "--dropouti",
        0,
        "--dropouth",
        0,
        "--dropoute",
        0,
        "--wdrop",
        0,
        "--asgd",
    ),
    "mixture": ("--n_experts", 2, "--recipe", "lm", "--alpha", 1, "--beta", 1),
}


def launch(project, *flags, workers=2, servers=1, code=0):
    """Run a cluster to its end; all that it printed."""
    process = project.start("launch", "--workers", workers, "--servers", servers, "--timeout", 200, "--", *flags)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == code, output
    return output


@pytest.mark.parametrize(
    ("workers", "servers", "cpus", "model"),
    [
        (4, 2, 1, "plain"),
        (2, 1, 2, "mixture"),
        (2, 1, 1, "weight-dropped"),
    ],
)
def test_workers_at_the_same_global_batch_give_the_parameters_of_one_process(project, workers, servers, cpus, model):
    flags = (*FLAGS, *MODELS[model], "--clip", 0.1, "--max-steps", 10, "--eval-every", 4)
    project.run("train", *flags, "--save", "alone")
    output = launch(project, *flags, "--cpus", cpus, "--save", "together", workers=workers, servers=servers)
    project.assert_agree("together", "alone")
    carried = [project.arrays(f"{run}/latest", "carried.npz") for run in ("together", "alone")]
    for i, state in carried[1].items():
        np.testing.assert_allclose(carried[0][i], state, atol=1e-5)
    losses = [[event["loss"] for event in project.events(run)] for run in ("together", "alone")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[1]) >= 5
    assert f"{workers} workers" in output and "End of training" in output
    assert not [line for line in output.splitlines() if re.match(r"\[worker [1-9]", line)]


def test_learning_rate_cuts_averaging_and_an_early_end_agree(project):
    flags = (*FLAGS, *MODELS["plain"], "--eval-every", 4, "--lr", 30, "--clip", 1, "--max-steps", 36)
    for name, schedule in (("cuts", ("--patience", 3)), ("averaged", ("--ntasgd", "--nonmono", 1))):
        project.run("train", *flags, *schedule, "--save", name)
        launch(project, *flags, *schedule, "--save", f"{name}-together")
        found, expected = project.events(f"{name}-together"), project.events(name)
        assert [event["step"] for event in found] == [event["step"] for event in expected]
        assert [event.get("lr") for event in found] == [event.get("lr") for event in expected]
        assert any(event.get("lr", 30) < 30 for event in expected) == (name == "cuts")
        is_averaged = [(project.path / run / "latest/unaveraged.npz").exists() for run in (name, f"{name}-together")]
        assert is_averaged == [name == "averaged"] * 2


def test_a_cluster_is_resumed_by_another_number_of_workers(project):
    flags = (*FLAGS, *MODELS["plain"])
    project.run("train", *flags, "--max-steps", 14, "--save", "alone")
    launch(project, *flags, "--max-steps", 6, "--save", "part")
    shutil.copytree(project.path / "part", project.path / "other", symlinks=True)
    launch(project, "--resume", "part", "--cpus", 1, "--max-steps", 14, workers=4)
    project.run("train", "--resume", "other", "--kvstore", "none", "--cpus", 2, "--max-steps", 14)
    for run in ("part", "other"):
        project.assert_agree(run, "alone")
    refused = launch(project, "--resume", "part", "--cpus", 1, "--max-steps", 16, workers=3, code=2)
    assert "--batch-size 4 (run part): must be a multiple of the number of devices, 3; make that 2 or 4" in refused
    (project.path / "text").rename(project.path / "elsewhere")
    (line,) = launch(project, "--resume", "part", "--cpus", 1, "--max-steps", 16, code=2).splitlines()
    assert line.startswith("error: --data text") and "must be a corpus" in line


def scales_of(project):
    return json.loads((project.path / "run/latest/state.json").read_text())["compression"]


def test_two_bits_through_the_servers_train(project):
    flags = (*FLAGS, *MODELS["plain"], "--gctype", "2bit", "--max-steps", 60, "--eval-every", 30)
    output = launch(project, *flags, "--save", "run")
    losses = [event["loss"] for event in project.events("run", "valid")]
    assert losses[1] < losses[0] and "2-bit pushes with threshold 0.5" in output
    scales = scales_of(project)
    resumed = launch(project, "--resume", "run", "--max-steps", 61)
    assert "the residuals of 2-bit compression could not be kept: what had not been sent is lost" in resumed
    assert scales_of(project) == scales and scales["steps"] == CALIBRATION_STEPS
    shutil.copytree(project.path / "run", project.path / "plain", symlinks=True)
    resumed = project.run("train", "--resume", "run", "--kvstore", "device", "--cpus", 4, "--max-steps", 62)
    assert "the gradients of 2 devices were compressed, and there are 4 now: what had not been sent is lost" in resumed
    resumed = project.run("train", "--resume", "run", "--gctype", "none", "--max-steps", 63)
    assert "what had not been sent" not in resumed  # the four devices still measured their gradients
    plain = project.run("train", "--resume", "plain", "--kvstore", "none", "--gctype", "none", "--max-steps", 62)
    assert "the gradients are no longer compressed: what had not been sent is lost" in plain


def test_before_gradients_are_compressed_nothing_is_said_to_be_lost(project):
    flags = (*FLAGS, *MODELS["plain"], "--gctype", "2bit", "--save", "run")
    launch(project, *flags, "--max-steps", 6)
    for run in ("plain", "more"):
        shutil.copytree(project.path / "run", project.path / run, symlinks=True)
    outputs = [
        launch(project, "--resume", "run", "--max-steps", 8),
        project.run("train", "--resume", "plain", "--kvstore", "none", "--gctype", "none", "--max-steps", 8),
        project.run("train", "--resume", "more", "--kvstore", "device", "--cpus", 4, "--max-steps", 8),
    ]
    assert not [output for output in outputs if "what had not been sent" in output]
    assert scales_of(project)["steps"] == 8


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--kvstore", "dist_sync"), "--kvstore dist_sync: needs a scheduler, servers and other workers"),
        (("--kvstore", "dist_sync", "--gctype", "2bit"), "or go on without: --kvstore none --gctype none"),
        (("--kvstore", "dist_async"), "--kvstore dist_async: workers would train on stale parameters"),
        (("--gctype", "fp16", "--cpus", 2), "--gctype fp16: only Horovod sends half precision"),
        (("--horovod", "--cpus", 2), "--horovod: each process has one device, not 2"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(project, flags, reason):
    assert reason in project.refused("train", *project.training_flags, "--save", "run", *flags)


# ---------------------------------------------------------------- when things break


@pytest.mark.parametrize(
    ("role", "number", "said"),
    [
        ("worker", signal.SIGKILL, r"worker \d \(pid \d+\) was killed by SIGKILL"),
        ("server", signal.SIGKILL, r"server 0 \(pid \d+\) was killed by SIGKILL"),
        ("scheduler", signal.SIGKILL, r"scheduler \(pid \d+\) was killed by SIGKILL"),
        pytest.param(
            "worker",
            signal.SIGSTOP,
            r"no worker has made progress for 30 s; worker \d \(pid \d+\): stopped \(state T\)",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_process_that_is_lost_ends_all_and_the_run_goes_on_to_the_same_numbers(project, role, number, said):
    flags = (*FLAGS, *MODELS["plain"], "--checkpoint-every", 4, "--eval-every", 1000, "--epochs", 1000)
    cluster = project.start("launch", "--workers", 2, "--timeout", 30, "--", *flags, "--save", "run")
    wait_until((project.path / "run/latest").exists, 120, cluster)
    os.kill(running(project.path, setting=f"DMLC_ROLE={role}")[-1], number)
    output, _ = cluster.communicate(timeout=100)
    assert cluster.returncode == 2, output
    assert re.search(said, output.splitlines()[-1]), output
    wait_until(lambda: not running(project.path), 20)
    reached = int(os.readlink(project.path / "run/latest").rpartition("-")[2])
    goal = ("--max-steps", reached + 3)
    project.run("train", "--resume", "run", "--kvstore", "none", "--cpus", 2, *goal)
    project.run("train", *flags, *goal, "--save", "alone")
    project.assert_agree("run", "alone")


def test_a_first_worker_that_cannot_write_its_checkpoint_says_so_in_the_last_line(project):
    """The others wait for it by then, and it is done with them before it ends."""
    flags = (*FLAGS, *MODELS["plain"], "--checkpoint-every", 4, "--eval-every", 1000, "--epochs", 1000)
    cluster = project.start("launch", "--workers", 2, "--", *flags, "--save", "run")
    wait_until((project.path / "run/latest").exists, 120, cluster)
    (project.path / "run/checkpoints").rename(project.path / "elsewhere")
    output, _ = cluster.communicate(timeout=100)
    assert cluster.returncode == 2, output
    assert re.match(
        r"error: worker 0 \(pid \d+\): run/checkpoints/step-\d+: cannot be written", output.splitlines()[-1]
    )


# Encodes a text slowly: half a second for eight bytes.
SLOW_TRAINING = """
import sys, time
from gluon_lm.data import encoding, tokenizers
from gluon_lm.train import main

def tokenize(piece):
    time.sleep(0.5)
    return piece.split()

encoding.BLOCK_BYTES, tokenizers.TOKENIZERS["whitespace"] = 8, tokenize
sys.exit(main())
"""


@pytest.mark.slow
def test_a_text_that_takes_longer_than_the_timeout_is_encoded(project):
    for split, num_lines in (("train", 24), ("valid", 2), ("test", 2)):
        (project.path / "text" / f"{split}.txt").write_text("the walrus sees a tree .\n" * num_lines)
    train = (sys.executable, "-c", SLOW_TRAINING, *FLAGS, *MODELS["plain"], "--kvstore", "dist_sync", "--quiet")
    started = time.monotonic()
    last_line = launch_two(project, train, train, timeout_s=30, code=0)
    assert time.monotonic() - started > 30 and last_line == "[worker 0] " + "=" * 89


# Starts two workers, the second with a command line and settings of its own.
TWO_THAT_DIFFER = """
import dataclasses, json, sys
from gluon_lm.cli import run_command
from gluon_lm.distributed.cluster import Host, parameter_server
from gluon_lm.distributed.supervisor import Supervisor

timeout, *commands = sys.argv[1:]
first, second, settings = map(json.loads, commands)
*processes, last = parameter_server([Host()], 2, 1, first)
processes.append(dataclasses.replace(last, argv=second, env={**last.env, **settings}))
sys.exit(run_command(lambda _: Supervisor(processes, float(timeout)).run(), []))
"""


def launch_two(project, first, second, settings=None, timeout_s=60, code=2):
    """Run a cluster of two commands to its end; its last line."""
    commands = [list(map(str, command)) for command in (first, second)]
    words = (sys.executable, "-c", TWO_THAT_DIFFER, timeout_s, *map(json.dumps, (*commands, settings or {})))
    cluster = project.start_process(*words)
    output, _ = cluster.communicate(timeout=240)
    assert cluster.returncode == code, output
    wait_until(lambda: not running(project.path), 20)
    return output.splitlines()[-1]


def test_workers_of_different_versions_end_before_the_first_step(project):
    command = (*TRAIN, *FLAGS, *MODELS["plain"], "--kvstore", "dist_sync", "--save", "run")
    for folder in ("gluon_lm", "configs"):
        shutil.copytree(ROOT / folder, project.path / "later" / folder)
    home = project.path / "later/gluon_lm/__init__.py"
    home.write_text(home.read_text().replace(f'"{gluon_lm.__version__}"', '"99.0"'))
    line = launch_two(project, command, command, {"PYTHONPATH": str(project.path / "later")})
    assert re.match(
        r"error: worker \d \(pid \d+\): the workers differ in gluon_lm: worker 0 has .+, worker 1 99\.0;", line
    )
    assert not (project.path / "run").exists()


# Trains, comparing parameters after every so many steps; in the second worker, some change by themselves at the fifth.
DRIFTING_TRAINING = """
import sys
from gluon_lm.train import main
from gluon_lm.training import trainer

trainer.CHECK_EVERY = int(sys.argv.pop(1))
take_step = trainer.Trainer._take_step

def take_step_and_drift(self, stop):
    result = take_step(self, stop)
    if (self._communicator.rank, self.state.step) == (1, 5):
        weights = next(iter(self.model.named_parameters().values())).data()
        weights += 1e-6
    return result

trainer.Trainer._take_step = take_step_and_drift
sys.exit(main())
"""


@pytest.mark.parametrize(("compared_every", "checkpoint_every", "found_at"), [(3, 4, 6), (1000, 4, 8)])
def test_workers_whose_parameters_drift_apart_end(project, compared_every, checkpoint_every, found_at):
    flags = (*FLAGS, *MODELS["plain"], "--kvstore", "dist_sync", "--checkpoint-every", checkpoint_every)
    train = (sys.executable, "-c", DRIFTING_TRAINING, compared_every, *flags, "--save", "run")
    line = launch_two(project, train, train)
    said = f"step {found_at}: the parameters of worker 1 are not those of worker 0; earlier checkpoints are intact"
    assert re.match(rf"error: worker \d \(pid \d+\): {said}", line)
    assert os.readlink(project.path / "run/latest").endswith("step-4")


def test_a_worker_on_whose_machine_there_is_another_run_of_that_name_trains_with_the_others(project):
    (project.path / "elsewhere/run").mkdir(parents=True)
    shutil.copytree(project.path / "text", project.path / "elsewhere/text")
    flags = (*FLAGS, *MODELS["plain"], "--max-steps", 3, "--save", "run")
    command = (*TRAIN, *flags, "--kvstore", "dist_sync")
    launch_two(project, command, ("sh", "-c", 'cd elsewhere && exec "$@"', "sh", *command), code=0)
    assert os.readlink(project.path / "run/latest").endswith("step-3")
    assert list((project.path / "elsewhere/run").iterdir()) == []
    (line,) = launch(project, *flags, code=2).splitlines()
    assert line.startswith("error: --save run: exists already")


def test_workers_that_would_go_on_from_different_checkpoints_end(project):
    flags = (*FLAGS, *MODELS["plain"], "--checkpoint-every", 3)
    project.run("train", *flags, "--save", "run", "--max-steps", 3)
    (project.path / "elsewhere").mkdir()
    for name in ("text", "run"):
        shutil.copytree(project.path / name, project.path / "elsewhere" / name, symlinks=True)
    project.run("train", "--resume", "run", "--max-steps", 6)
    command = (*TRAIN, "--resume", "run", "--kvstore", "dist_sync", "--max-steps", 9)
    line = launch_two(project, command, ("sh", "-c", 'cd elsewhere && exec "$@"', "sh", *command))
    assert re.search(r"differ in checkpoint: worker 0 has step-6 \(\w+\), worker 1 step-3 \(\w+\);", line)
    assert os.readlink(project.path / "run/latest").endswith("step-6")


def test_the_kind_of_server_is_that_of_the_configuration_and_of_the_run(project):
    (project.path / "mine.yaml").write_text("kvstore: dist_device_sync\n")
    flags = (*FLAGS, *MODELS["plain"], "--max-steps", 3)
    output = launch(project, *flags, "--config", "mine.yaml", "--save", "run", "--hybridize")
    assert "KVStore dist_device_sync" in output and output.count("is always on here") == 1
    resumed = ("launch", "--workers", 2, "--", "--resume", "run", "--print-config")
    for flags, kind in (((), "dist_device_sync"), (("--kvstore", "dist_sync"), "dist_sync")):
        assert yaml.safe_load(project.run(*resumed, *flags))["kvstore"] == kind


def test_a_worker_that_cannot_read_the_checkpoint_ends_all(project):
    flags = (*FLAGS, *MODELS["plain"], "--save", "run", "--checkpoint-every", 3)
    project.run("train", *flags, "--max-steps", 6)
    (project.path / "elsewhere").mkdir()
    for name in ("text", "run"):
        shutil.copytree(project.path / name, project.path / "elsewhere" / name, symlinks=True)
    (project.path / "elsewhere/run/latest").resolve().joinpath("parameters.npz").unlink()
    before = project.parameters("run")
    command = (*TRAIN, "--resume", "run", "--kvstore", "dist_sync", "--max-steps", 9)
    line = launch_two(project, command, ("sh", "-c", 'cd elsewhere && exec "$@"', "sh", *command))
    assert line.startswith("error: worker 1 (pid ") and "parameters.npz" in line
    assert project.parameters("run") == before
