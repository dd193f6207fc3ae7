"""Mixed precision by its flag: runs that resume to the bit, float32 wherever a model is used, and who is refused."""

from __future__ import annotations

import re

import mxnet as mx
import numpy as np
import pytest

from gluon_lm.models import LanguageModel, precision
from gluon_lm.training import step as step_module

needs_bfloat16 = pytest.mark.usefixtures("bfloat16")


def stop_and_go_on(project, *flags):
    """A run in one go, and one that stops twice in mid-epoch; their parameters must be the same to the bit."""
    flags = (*flags, "--lr-decay", "none")  # or the evaluation where it stops would lower it
    whole = project.train("whole", *flags)
    project.train("parts", *flags, "--max-steps", 7)
    project.run("train", "--resume", "parts", "--max-steps", 31)
    project.run("train", "--resume", "parts", "--max-steps", 1000)
    assert project.parameters("parts") == project.parameters("whole")
    assert project.events("parts")[-1]["loss"] == project.events("whole")[-1]["loss"]
    return whole


@needs_bfloat16
@pytest.mark.parametrize("flags", [("--cpus", 2), ("--recipe", "lm", "--n-experts", 2)], ids=["devices", "mixture"])
def test_bfloat16_resumes_to_the_bit_and_is_exported_in_float32(project, flags):
    assert "products in bfloat16" in stop_and_go_on(project, "--amp", "bfloat16", *flags)
    project.train("float32", "--lr-decay", "none", *flags)
    assert project.parameters("float32") != project.parameters("whole")
    project.run("export", "whole", "--output", "exported")
    arrays = mx.nd.load(str(project.path / "exported" / "model-0000.params"))
    assert {np.dtype(array.dtype) for array in arrays.values()} == {np.dtype(np.float32)}


@needs_bfloat16
def test_a_run_goes_on_in_another_precision(project):
    project.train("run", "--amp", "bfloat16", "--max-steps", 7)
    assert "products in" not in project.run("train", "--resume", "run", "--amp", "none", "--max-steps", 20)


@pytest.mark.parametrize(
    "flags",
    [("--optimizer", "adam", "--lr", 0.01), ("--asgd", "--lr", 2)],
    ids=["adam", "averaged"],
)
def test_skipped_steps_are_counted_logged_and_resumed(project, monkeypatch, flags):
    """float16's way of training, with products in float32 and gradients that overflow at some steps."""
    monkeypatch.setattr(LanguageModel, "train_in_half_precision", lambda model, kind: None)
    original, original_seed, current = step_module.backward_through_model, step_module.step_seed, [0]

    def step_seed(seed, step, rank=0):
        current[0] = step
        return original_seed(seed, step, rank)

    def overflowing(model, window, states, device, **settings):
        result = original(model, window, states, device, **settings)
        if current[0] in (0, 3, 12, 40):
            model.head.decoder.bias.grad(device)[:] = np.nan
        return result

    monkeypatch.setattr(step_module, "step_seed", step_seed)
    monkeypatch.setattr(step_module, "backward_through_model", overflowing)
    output = stop_and_go_on(project, "--amp", "float16", *flags)
    found = re.findall(r"step (\d+): a gradient overflowed float16, .* scaled by (\d+)", output)
    assert found == [("1", "32768"), ("4", "16384"), ("13", "8192"), ("41", "4096")]
    for run in ("whole", "parts"):
        last = project.events(run, "train")[-1]
        assert (last["skipped_steps"], last["loss_scale"]) == (4, 4096)


def test_who_lacks_it_gets_one_line_and_nothing_is_written(project, monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", frozenset)
    output = project.train("run", "--amp", "bfloat16", code=2)
    assert "--amp bfloat16: this processor lacks AVX512-BF16" in output.splitlines()[-1]
    output = project.train("run", "--amp", "float16", "--cpus", 1, code=2)
    assert "--amp float16: needs a GPU, and this run is on cpu(0)" in output.splitlines()[-1]
    assert not (project.path / "run").exists()
