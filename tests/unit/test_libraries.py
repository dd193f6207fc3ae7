"""What MXNet's library needs is found before it is loaded: real libraries, compiled here, in an environment made up."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
from machine import compile_driver, make_site, run_python

from gluon_lm.libraries import needed_by, resolve

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")


@pytest.fixture
def site(tmp_path):
    make_site(tmp_path / "site")
    return tmp_path / "site"


@pytest.fixture
def driver(tmp_path):
    return compile_driver(tmp_path / "driver")[0].parent


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


def test_importing_mxnet_after_gluon_lm_finds_the_libraries_of_the_wheels(site, driver):
    done = run_python(site, "-c", "import mxnet", driver=driver)
    assert "libcudnn.so.8: cannot open shared object file" in done.stderr
    done = run_python(site, "-c", "import gluon_lm; import mxnet; print(mxnet.answer)", driver=driver)
    assert (done.stdout, done.stderr) == ("11121\n", "")


def test_without_a_driver_one_line_says_what_is_missing_and_how_to_do_without(site):
    program = "import sys; from gluon_lm.cli import run_command\ndef work(argv):\n    import mxnet\nrun_command(work)"
    done = run_python(site, "-c", program)
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: libcuda.so.1 is missing: mxnet-cu112 ")
    assert "driver" in done.stderr and "pip install 'gluon_lm[cpu]'" in done.stderr


def test_libraries_of_wheels_that_are_missing_are_named_with_what_brings_them(site, driver):
    shutil.rmtree(site / "nvidia" / "cublas")
    done = run_python(site, "-c", "import gluon_lm, mxnet", driver=driver)
    assert "missing for mxnet-cu112: libcublas.so.11; " in done.stderr
    assert "pip install 'gluon_lm[cu112]'" in done.stderr.splitlines()[-1]
