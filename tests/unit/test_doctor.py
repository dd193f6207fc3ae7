"""What is said of a machine: GPUs of a driver that is compiled here, and MXNet whole, damaged and missing."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from machine import compile_driver, make_site, run_python
from processes import environment

from gluon_lm.gpus import has_machine_code

HOPPER, TURING = ("NVIDIA H200", 9, 0), ("Tesla T4", 7, 5)
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")


@pytest.mark.parametrize("build", ["mxnet-cu112", "mxnet-cu117"])
def test_the_published_builds_run_on_5_0_to_8_9(build):
    capabilities = [(3, 7), (5, 0), (5, 2), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0)]
    runs = [capability for capability in capabilities if has_machine_code(capability, [build])]
    assert runs == capabilities[1:9]
    assert has_machine_code((9, 0), ["mxnet"]) is None  # compiled by somebody, who alone knows


@pytest.fixture
def site(tmp_path):
    make_site(tmp_path / "site")
    return tmp_path / "site"


def examine(site, driver=None, code=0):
    done = run_python(site, "-m", "gluon_lm.doctor", "--json", driver=driver)
    assert (done.returncode, done.stderr) == (code, "")
    return json.loads(done.stdout)


def advice(facts):
    """Without what there is to say of a Horovod that is installed here, which is for another MXNet than the stub."""
    return [line for line in facts["advice"] if "Horovod" not in line]


@needs_gcc
def test_gpus_are_described_with_whether_this_build_runs_on_them(site, tmp_path):
    driver = compile_driver(tmp_path / "driver", [HOPPER, TURING])[0].parent
    facts = examine(site, driver)
    assert facts["mxnet"]["version"] == "1.9.1" and facts["mxnet"]["features"] == ["CUDA", "NCCL"]
    assert facts["mxnet"]["packages"] == {"mxnet-cu112": "1.9.1"} and facts["errors"] == []
    assert facts["mxnet"]["from_wheels"] == ["libcublas.so.11", "libcudnn.so.8"]
    assert facts["gpus"]["driver"] == "12.4"
    hopper, turing = facts["gpus"]["devices"]
    assert (hopper["name"], hopper["compute_capability"], hopper["machine_code"]) == ("NVIDIA H200", [9, 0], False)
    assert (turing["name"], turing["compute_capability"], turing["machine_code"]) == ("Tesla T4", [7, 5], True)
    assert (hopper["memory_bytes"], turing["memory_bytes"]) == (1 << 34, 2 << 34)
    assert advice(facts) == [hopper["advice"]] and "MXNET_CUDA_ARCH=9.0" in hopper["advice"]
    text = run_python(site, "-m", "gluon_lm.doctor", driver=driver).stdout
    assert "NVIDIA H200, 9.0, 17.2 GB: no machine code" in text and "MXNet works here." in text


@needs_gcc
def test_a_driver_that_does_not_work_is_told_from_none(site, tmp_path):
    driver = compile_driver(tmp_path / "driver", init_error=999)[0].parent
    facts = examine(site, driver)
    assert facts["gpus"] == {"driver": "12.4", "devices": [], "problem": "cuInit returns error 999"}
    assert len(advice(facts)) == 1 and "nvidia-smi" in advice(facts)[0]
    driver = compile_driver(tmp_path / "driver", init_error=100)[0].parent  # as where CUDA_VISIBLE_DEVICES is empty
    assert examine(site, driver)["gpus"] == {"driver": "12.4", "devices": [], "problem": ""}
    facts = examine(site, code=2)
    assert facts["gpus"]["driver"] is None and facts["mxnet"]["missing_libraries"] == ["libcuda.so.1"]
    assert len(facts["errors"]) == 1 and "gluon_lm[cpu]" in facts["errors"][0]


@needs_gcc
def test_an_mxnet_that_kills_its_process_and_one_that_is_not_there_are_said(site, tmp_path):
    driver = compile_driver(tmp_path / "driver")[0].parent
    (site / "mxnet" / "__init__.py").write_text("import os; os.abort()")
    assert examine(site, driver, code=2)["errors"] == ["MXNet: importing it kills the process (signal 6)"]
    shutil.rmtree(site / "mxnet")
    shutil.rmtree(site / "mxnet_cu112-1.9.1.dist-info")
    (error,) = examine(site, driver, code=2)["errors"]
    assert error.startswith("MXNet is not installed: pip install 'gluon_lm[cpu]'")


@needs_gcc
def test_training_says_of_a_gpu_without_machine_code_what_the_doctor_says(tmp_path):
    driver = compile_driver(tmp_path / "driver", [HOPPER])[0].parent
    program = (
        "import sys, gluon_lm.gpus\n"
        "gluon_lm.gpus.mxnet_distributions = lambda: {'mxnet-cu112': '1.9.1'}\n"
        "import mxnet as mx\n"
        "mx.context.num_gpus = lambda: 1\n"
        "from gluon_lm.train import main\n"
        "print(main(['--data', 'nothing', '--gpus', '0']), main(['--data', 'nothing']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=environment(LD_LIBRARY_PATH=str(driver)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = "GPU 0 (NVIDIA H200, compute capability 9.0): mxnet-cu112 has machine code for compute capability 5.0 to 8.9"
    refusal, no_such_corpus = done.stderr.splitlines()
    assert refusal.startswith(f"error: --gpus 0: {said}") and "nothing" in no_such_corpus
    warnings = [line for line in done.stdout.splitlines() if line.startswith(said)]
    assert len(warnings) == 1 and warnings[0].endswith("Going on with cpu(0)")
    assert done.stdout.endswith("2 2\n")
