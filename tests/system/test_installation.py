"""The package as pip installs it into a clean environment, for every Python that it is said to work on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

VERSIONS = ("3.9", "3.10", "3.11", "3.12")


def find_python(version):
    """A Python of that version on PATH, or among those of pyenv; None where there is none that runs."""
    named = shutil.which(f"python{version}")
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [*([named] if named else []), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in candidates:
        asked = [candidate, "-c", "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        if done.returncode == 0 and done.stdout.strip() == version:
            return candidate
    return None


class Environment:
    """A virtual environment in a folder, and commands in it that know nothing of this checkout."""

    def __init__(self, python, folder):
        self.bin, self.folder = folder / "env" / "bin", folder
        subprocess.run([python, "-m", "venv", folder / "env"], check=True, timeout=300)

    def run(self, program, *arguments, code=0, **variables):
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.bin / program, *map(str, arguments)],
            cwd=self.folder,
            env={**kept, "GLUON_LM_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1", **variables},
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout if code == 0 else done.stderr

    def install(self, extra):
        """The package out of a copy of its source, in which pip may leave what it builds."""
        source = self.folder / "source"
        shutil.copytree(ROOT / "gluon_lm", source / "gluon_lm", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(ROOT / "configs", source / "configs")
        for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "CHANGELOG.md"):
            shutil.copy(ROOT / name, source)
        self.run("pip", "install", "--quiet", f"{source}[{extra}]")
        self.run("pip", "check")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_clean_environment_trains_evaluates_writes_and_exports(version, tmp_path):
    python = find_python(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here that can make environments")
    environment = Environment(python, tmp_path)
    environment.install("cpu")
    (tmp_path / "text").mkdir()
    for split, lines in (("train", 200), ("valid", 20), ("test", 20)):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sees the dog .\na bird hears the river .\n" * lines)
    facts = json.loads(environment.run("gluon-lm", "doctor", "--json"))
    assert facts["python"]["version"].startswith(f"{version}.") and facts["errors"] == []
    assert facts["mxnet"]["version"] == "1.9.1" and "MKLDNN" in facts["mxnet"]["features"]
    flags = ["--emsize", 16, "--nhid", 16, "--batch-size", 4, "--bptt", 5, "--epochs", 3, "--lr", 5]
    environment.run("gluon-lm", "train", "--data", "text", "--save", "run", *flags)
    assert "perplexity" in environment.run("gluon-lm", "evaluate", "run")
    (tested,) = events(tmp_path / "run", "test")
    assert 1 < tested["perplexity"] < 3  # of eleven words, in two sentences
    assert len(environment.run("gluon-lm", "generate", "run", "--words", 20).split()) >= 20
    environment.run("gluon-lm", "export", "run", "--output", "exported")
    scored = environment.run("gluon-lm", "score", "exported", "text/test.txt")
    assert len(scored.splitlines()) >= 40


def test_every_numpy_that_is_promised_trains_the_same(tmp_path):
    """The last of each minor version within the bounds, and numpy 2, which MXNet's wheels refuse."""
    environment = Environment(sys.executable, tmp_path)
    environment.install("cpu")
    (tmp_path / "text").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "text" / f"{split}.txt").write_text("the cat sees the dog .\na bird hears the river .\n" * 20)
    flags = ["--emsize", 16, "--nhid", 16, "--batch-size", 4, "--bptt", 5, "--epochs", 1]
    losses = {}
    for version in ("1.23.5", "1.24.4", "1.25.2", "1.26.4", "2.1.3"):
        folder = tmp_path / f"numpy-{version}"
        environment.run("pip", "install", "--quiet", "--no-deps", "--target", folder, f"numpy=={version}")
        found = environment.run("python", "-c", "import numpy; print(numpy.__version__)", PYTHONPATH=str(folder))
        assert found.strip() == version
        for i, head in enumerate(
            ([], ["--n-experts", 2, "--recipe", "lm"], ["--num-sampled", 5], ["--cutoffs", "4,8"])
        ):
            run = f"run-{version}-{i}"
            command = ["train", "--data", "text", "--save", run, *flags, *head]
            environment.run("gluon-lm", *command, PYTHONPATH=str(folder))
            losses.setdefault(i, []).append([e["loss"] for e in events(tmp_path / run) if e["event"] != "train"])
    for found in losses.values():
        assert len(found) == 5 and all(loss == pytest.approx(found[0], rel=1e-6) for loss in found)


def test_the_extra_for_tensorboard_has_its_command_and_goes_with_the_others(tmp_path):
    environment = Environment(sys.executable, tmp_path)
    environment.install("tensorboard,onnx,serve,plot")
    assert environment.run("tensorboard", "--version_tb").strip().startswith("2.")


@pytest.mark.parametrize("extra", ["cu112", "cu117"])
def test_cuda_comes_with_pip_and_lacks_only_the_driver(extra, tmp_path):
    """All libraries are found without an environment variable; the driver is a stand-in without a GPU."""
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            pytest.skip(f"there is no {tool} here")
    if Path("/proc/driver/nvidia/version").exists():
        pytest.skip("this machine has NVIDIA's driver")
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("the wheels and their installation take 12 GB")
    environment = Environment(sys.executable, tmp_path)
    environment.install(extra)
    facts = json.loads(environment.run("python", "-c", DOCTOR_WHATEVER_IT_SAYS))
    assert facts["mxnet"]["missing_libraries"] == ["libcuda.so.1"]
    assert {"libcudnn.so.8", "libnccl.so.2", "libcublas.so.11"} <= set(facts["mxnet"]["from_wheels"])
    refused = environment.run("gluon-lm", "train", "--data", "nothing", code=2)
    assert refused.count("\n") == 1 and "libcuda.so.1 is missing" in refused and "gluon_lm[cpu]" in refused

    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", facts["mxnet"]["library"]], capture_output=True, text=True, check=True
    ).stdout
    functions = {line.split()[-1] for line in listed.splitlines() if line.split()[-1].startswith("cu")}
    from_driver = sorted(name for name in functions if name[2].isupper())
    (tmp_path / "driver.c").write_text("".join(f"int {name}(void) {{ return 100; }}\n" for name in from_driver))
    command = ["gcc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run([*command, tmp_path / "driver.c"], check=True, timeout=60)
    program = "import gluon_lm, mxnet; print(sorted(n for n, f in mxnet.runtime.Features().items() if f.enabled))"
    features = environment.run("python", "-c", program, LD_LIBRARY_PATH=str(tmp_path))
    assert all(f"'{feature}'" in features for feature in ("CUDA", "CUDNN", "NCCL", "DIST_KVSTORE"))


DOCTOR_WHATEVER_IT_SAYS = "from gluon_lm.doctor import main; raise SystemExit(main(['--json']) and 0)"
