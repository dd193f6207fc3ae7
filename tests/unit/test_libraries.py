"""What MXNet's library needs is found before it is loaded: real libraries, compiled here, in an environment made up."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from gluon_lm.libraries import needed_by, resolve

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")

ROOT = Path(__file__).resolve().parents[2]


def compile_library(path, function, value, *needs):
    """A library whose function gives the value plus those of the libraries that it needs: ``(path, function)``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    declarations = "".join(f"int {name}(void);" for _, name in needs)
    total = " + ".join([str(value), *(f"{name}()" for _, name in needs)])
    source = path.parent / "source.c"
    source.write_text(f"{declarations} int {function}(void) {{ return {total}; }}")
    libraries = [str(library) for library, _ in needs]
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-Wl,--allow-shlib-undefined", "-o", str(path)]
    subprocess.run([*command, str(source), *libraries, "-Wl,-rpath,$ORIGIN"], check=True, timeout=60)
    source.unlink()
    return path, function


@pytest.fixture
def site(tmp_path):
    """A CUDA build of MXNet as its wheels leave it: its own library, one beside it, two wheels, and no driver."""
    site, nvidia = tmp_path / "site", tmp_path / "site" / "nvidia"
    driver = compile_library(tmp_path / "driver" / "libcuda.so.1", "cuda", 1)
    blas = compile_library(nvidia / "cublas" / "lib" / "libcublas.so.11", "cublas", 10)
    dnn = compile_library(nvidia / "cudnn" / "lib" / "libcudnn.so.8", "cudnn", 100, blas)
    beside = compile_library(site / "mxnet" / "libopenblas.so.0", "openblas", 1000)
    compile_library(site / "mxnet" / "libmxnet.so", "mxnet", 10000, dnn, driver, blas, beside)
    (site / "mxnet" / "__init__.py").write_text(
        "import ctypes, os\nanswer = ctypes.CDLL(os.path.join(os.path.dirname(__file__), 'libmxnet.so')).mxnet()\n"
    )
    (site / "mxnet_cu112-1.9.1.dist-info").mkdir()
    (site / "mxnet_cu112-1.9.1.dist-info" / "METADATA").write_text("Name: mxnet-cu112\nVersion: 1.9.1\n")
    installed = Path(numpy.__file__).parents[1]
    for package in ("numpy", "numpy.libs", "yaml", "_yaml", "setuptools", "_distutils_hack"):
        if (installed / package).is_dir():
            (site / package).symlink_to(installed / package)
    return site


def run_python(site, program, driver=None):
    """In an environment that has what lies in `site`, this package, and nothing else."""
    return subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={"PYTHONPATH": f"{site}:{ROOT}", "LD_LIBRARY_PATH": str(driver or "")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_header_tells_what_a_library_asks_for(site):
    assert [name for name in needed_by(site / "mxnet" / "libmxnet.so") if "libc." not in name] == [
        "libcudnn.so.8",
        "libcuda.so.1",
        "libcublas.so.11",
        "libopenblas.so.0",
    ]
    assert needed_by(Path(__file__)) == []


def test_libraries_are_loaded_after_those_that_they_need(site):
    folders = sorted((site / "nvidia").glob("*/lib"), reverse=True)
    resolved = resolve(site / "mxnet" / "libmxnet.so", folders)
    assert [path.name for path in resolved.to_preload] == ["libcublas.so.11", "libcudnn.so.8"]
    assert resolved.missing == ["libcuda.so.1"]
    with pytest.raises(OSError, match="libcublas.so.11"):
        ctypes.CDLL(str(resolved.to_preload[1]))


def test_importing_mxnet_after_gluon_lm_finds_the_libraries_of_the_wheels(site, tmp_path):
    done = run_python(site, "import mxnet", tmp_path / "driver")
    assert "libcudnn.so.8: cannot open shared object file" in done.stderr
    done = run_python(site, "import gluon_lm; import mxnet; print(mxnet.answer)", tmp_path / "driver")
    assert (done.stdout, done.stderr) == ("11121\n", "")


def test_without_a_driver_one_line_says_what_is_missing_and_how_to_do_without(site):
    command = "import sys; from gluon_lm.cli import run_command\ndef work(argv):\n    import mxnet\nrun_command(work)"
    done = run_python(site, command)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: libcuda.so.1 is missing: mxnet-cu112 ")
    assert "driver" in done.stderr and "pip install 'gluon_lm[cpu]'" in done.stderr


def test_libraries_of_wheels_that_are_missing_are_named_with_what_brings_them(site, tmp_path):
    shutil.rmtree(site / "nvidia" / "cublas")
    done = run_python(site, "import gluon_lm, mxnet", tmp_path / "driver")
    assert "missing for mxnet-cu112: libcublas.so.11; " in done.stderr
    assert "pip install 'gluon_lm[cu112]'" in done.stderr.splitlines()[-1]
