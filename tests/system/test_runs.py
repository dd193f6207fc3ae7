"""What the folder of a run knows: how it ended, for the list of runs, and its numbers, for TensorBoard."""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time

import pytest
from processes import wait_until


def listed(project, *flags):
    answer = json.loads(project.run("runs", "all", "--json", *flags))
    return {run["name"]: run for run in answer["runs"]}, {run["name"]: run["problem"] for run in answer["broken"]}


def test_the_state_of_every_run_is_what_happened_to_it(project, monkeypatch):
    (project.path / "all").mkdir()
    project.train("all/done")
    diverged = project.train("all/diverged", "--optimizer", "adam", "--lr", 1e38, code=2)
    assert "must be finite" in diverged
    assert (project.path / "all/diverged/log.txt").read_text().splitlines()[-1].endswith(diverged.splitlines()[-1])
    process = project.start_training("all/open", "--epochs", 100000, "--checkpoint-every", 20)
    try:
        wait_until((project.path / "all/open/latest").exists, process=process)
        assert listed(project)[0]["open"]["state"] == "running"
        for flags in (("--resume", "all/open"), (*project.training_flags, "--save", "all/open", "--overwrite")):
            assert "all/open: another process is training this run" in project.refused("train", *flags)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        stopped = listed(project)[0]["open"]
        process = project.start("train", "--resume", "all/open")
        status = project.path / "all/open/status.json"
        wait_until(lambda: json.loads(status.read_text())["state"] == "running", process=process)
        assert listed(project)[0]["open"]["state"] == "running"
    finally:
        process.kill()
        process.communicate(timeout=60)
    runs, broken = listed(project)
    killed = runs["open"]
    assert (stopped["state"], stopped["reason"], stopped["test_perplexity"]) == ("stopped", None, None)
    assert (killed["state"], killed["reason"]) == ("stopped", "killed")
    with monkeypatch.context() as patch:
        patch.setattr("gluon_lm.training.run_folder.is_in_use", lambda path: None)  # as without locks
        untold = listed(project)[0]["open"]
    assert (untold["state"], untold["reason"]) == ("running", "or killed: no locks to tell by")
    assert (runs["diverged"]["state"], broken) == ("failed", {})
    assert "must be finite" in runs["diverged"]["reason"]

    done, events = runs["done"], project.events("all/done")
    assert (done["state"], done["reason"], done["model"], done["corpus"]) == ("finished", None, "lstm 8x8", "text")
    best = min(project.events("all/done", "valid"), key=lambda event: event["loss"])
    assert (done["best_step"], done["best_perplexity"]) == (best["step"], pytest.approx(math.exp(best["loss"])))
    assert done["test_perplexity"] == pytest.approx(math.exp(events[-1]["loss"]))
    assert (done["steps"], done["epoch"], done["epochs"]) == (events[-1]["step"], 2, 2)
    assert abs(time.time() - done["updated"]) < 600

    header, *rows, failure = project.run("runs", "all").splitlines()
    assert failure.startswith("diverged: failed (step ") and "must be finite" in failure
    assert header.split() == "run state model corpus steps epoch valid ppl test ppl written".split()
    assert [row.split()[:2] for row in sorted(rows)] == [
        ["diverged", "failed"],
        ["done", "finished"],
        ["open", "stopped"],
    ]
    assert any(f"{done['best_perplexity']:.2f}  " in row and "(killed)" not in row for row in rows)


def test_a_pass_over_the_text_counts_when_it_is_done(project):
    (project.path / "all").mkdir()
    project.train("all/half", "--max-steps", 50, "--log-interval", 1)  # of 42 in an epoch
    assert listed(project)[0]["half"]["epoch"] == 1


def test_broken_folders_are_named_and_finetuned_runs_listed(project):
    (project.path / "all").mkdir()
    project.have_trained("all/good")
    project.run("finetune", "all/good", "--max-steps", 2)
    project.run("finetune", "all/good/finetune_model", "--max-steps", 1)
    shutil.copytree("all/good/finetune_model/finetune_model", "elsewhere", symlinks=True)
    (project.path / "all/far").symlink_to(project.path / "elsewhere")
    for name, file, content in [
        ("cut", "metrics.jsonl", '{"event": "train", "st\n'),
        ("listy", "metrics.jsonl", "[1]\n"),
        ("wordy", "metrics.jsonl", '{"event": "valid", "step": 3, "loss": "low"}\n'),
        ("lossless", "metrics.jsonl", '{"event": "test", "step": 3}\n'),
        ("huge", "metrics.jsonl", f'{{"event": "train", "step": 3, "tokens_per_second": 1{"0" * 400}}}\n'),
        ("endless", "metrics.jsonl", '{"event": "valid", "step": 3, "loss": 1.5, "peak_memory": 1e999}\n'),
        ("unknown", "config.yaml", "nhidden: 5\n"),
        ("odd", "status.json", '{"state": "flying", "reason": null}\n'),
        ("strange", "status.json", '{"state": "failed", "reason": 5}\n'),
        ("deep", "status.json", "[" * 200_000),
        ("bottomless", "latest/state.json", "[" * 200_000),
        ("mute", "latest/state.json", '{"training": {"epoch": 1}, "text": "abc"}'),
        ("late", "latest/state.json", '{"training": {"epoch": "x"}, "text": {}}'),
    ]:
        shutil.copytree("all/good", f"all/{name}", symlinks=True, ignore=shutil.ignore_patterns("finetune_model"))
        (project.path / "all" / name / file).write_text(content)
    (project.path / "all/bare/checkpoints").mkdir(parents=True)
    (project.path / "all/notes").mkdir()
    (project.path / "all/latest").symlink_to("good")
    runs, broken = listed(project)
    chain = {"good", "good/finetune_model", "good/finetune_model/finetune_model"}
    assert runs.keys() == chain | {"far"}
    mistaken = {"cut", "listy", "wordy", "lossless", "huge", "endless", "unknown", "odd", "bare"}
    assert broken.keys() == mistaken | {"strange", "deep", "bottomless", "mute", "late"}
    for name in broken:
        assert f"all/{name}" in project.refused("report", f"all/{name}", "--words", 0)
    assert "nhidden" in broken["unknown"] and "no config.yaml" in broken["bare"]
    printed = project.run("runs", "all").splitlines()
    assert len(printed) == 1 + 4 + 14 and any(line.startswith("cut: broken (") for line in printed)
    (row,) = [line for line in project.run("runs", "all/good").splitlines() if line.startswith("good ")]
    assert "finished" in row
    assert project.run("runs", "all/notes") == "no runs in all/notes\n"
    assert project.run("runs", "nowhere", code=2).startswith("error: nowhere: is not a folder")


def test_the_last_line_of_a_running_run_may_be_half_written(project):
    (project.path / "all").mkdir()
    project.have_trained("all/run")
    before = listed(project)[0]["run"]
    with open("all/run/metrics.jsonl", "a") as file:
        file.write('{"event": "train", "step": 9999')
    assert listed(project)[0]["run"]["steps"] == before["steps"]


def test_tensorboard_has_the_numbers_of_the_log_once_each(project):
    """Read back by TensorBoard's own reader, after a stop and a continuation."""
    pytest.importorskip("tensorboardX", reason="tensorboardX is not installed")
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    project.train("run", "--tensorboard", "--epochs", 1)
    project.run("train", "--resume", "run", "--epochs", 2)
    reader = accumulator.EventAccumulator(str(project.path / "run/tensorboard"), {accumulator.SCALARS: 0})
    reader.Reload()
    found = {tag: [(one.step, one.value) for one in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    for tag in (
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "train/tokens_per_second",
        "valid/perplexity",
        "test/loss",
    ):
        kind, _, name = tag.partition("/")
        expected = [(event["step"], event[name]) for event in project.events("run", kind)]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    (text, *_) = reader.Tensors("configuration/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "    hidden_size: 8" in shown and "    tensorboard: true" in shown


def test_tensorboard_without_its_package_is_refused_before_anything_is_done(project, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    refused = project.train("run", "--tensorboard", code=2)
    expected = "needs the package tensorboardX; pip install 'gluon_lm[tensorboard]', or go on without: --no-tensorboard"
    assert refused.splitlines()[-1] == f"error: --tensorboard: {expected}"
    assert not (project.path / "run").exists()
