"""`scripts/gpu_check.py`: what it does without a GPU, and its code on two CPU contexts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import gpu_check
import pytest
from processes import ROOT


def run_check(folder, *flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), *map(str, flags)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )


def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    import mxnet as mx

    if mx.context.num_gpus():
        pytest.skip("this machine has a GPU")
    done = run_check(tmp_path)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("error: there is no GPU here") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("cpu", "absent", "why"),
    [
        (2, (), "there is no GPU"),
        (0, ("hypothesis",), "there is no hypothesis; pip install 'gluon_lm[test]' has it"),
        (0, ("pytest", "hypothesis"), "there is no pytest, hypothesis; pip install 'gluon_lm[test]' has it"),
    ],
)
def test_tests_that_cannot_run_are_left_out(cpu, absent, why, monkeypatch, tmp_path):
    find_spec = gpu_check.importlib.util.find_spec
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: name not in absent and find_spec(name))
    check = gpu_check.Check(SimpleNamespace(cpu=cpu, minutes=1), ["gpu0"], tmp_path)
    gpu_check.run_gpu_tests(check)
    assert check.left_out == [f"the tests marked gpu ({why})"]
    assert check.failed == check.correctness == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_its_code_runs_on_cpu_contexts(tmp_path):
    flags = ["--recipes", "lm", "--steps", 10, "--vocabulary", 60, "--minutes", 18, "--output", tmp_path / "report"]
    done = run_check(tmp_path, "--cpu", 2, *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["devices"] == ["cpu0", "cpu1"] and not report["on_gpu"] and report["failed"] == []
    assert {row["model"] for row in report["correctness"]} == set(gpu_check.MODELS)
    assert all(row["passed"] and row["update_error"] < 1e-5 for row in report["correctness"])
    assert [(row["recipe"], row["precision"]) for row in report["speed"]] == [("lm", "float32")]
    assert report["speed"][0]["share_of_peak"] > 0
    stores = [(row["devices"], row["kvstore"]) for row in report["scaling"]]
    assert stores == [(1, "none"), (2, "device"), (2, "device, 2-bit"), (2, "local")]
    assert all(row["tokens_per_second"] > 0 for row in report["speed"] + report["scaling"])
    text = (tmp_path / "report" / "report.md").read_text()
    assert "nothing here ran on a GPU" in text.splitlines()[0] and "| lm | float32 |" in text
