"""A machine made up for tests: a CUDA build of MXNet with its libraries, and NVIDIA's driver, compiled by gcc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
from processes import ROOT

_DRIVER = """
#include <stdio.h>
#include <stddef.h>
#include <string.h>
static const struct { const char *name; int major, minor; } gpus[] = { %s };
int cuda(void) { return 1; }
int cuDriverGetVersion(int *version) { *version = 12040; return 0; }
int cuInit(unsigned flags) { return %d; }
int cuDeviceGetCount(int *count) { *count = sizeof gpus / sizeof gpus[0]; return 0; }
int cuDeviceGet(int *device, int index) { *device = 70 + index; return 0; }
int cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "%%s", gpus[device - 70].name); return 0; }
int cuDeviceGetUuid(char *uuid, int device) { strncpy(uuid, gpus[device - 70].name, 16); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t) (device - 69) << 34; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? gpus[device - 70].major : gpus[device - 70].minor;
    return 0;
}
"""
_MXNET = """
import ctypes, os
__version__ = "1.9.1"
answer = ctypes.CDLL(os.path.join(os.path.dirname(__file__), "libmxnet.so")).mxnet()
class Feature:
    enabled = True
class runtime:
    Features = staticmethod(lambda: {"CUDA": Feature, "NCCL": Feature})
"""


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


def compile_driver(folder, gpus=(), init_error=0, soname="libcuda.so.1"):
    """NVIDIA's driver in a folder, with GPUs as ``(name, major, minor)``; its address as `compile_library` gives it.

    A test that loads it in its own process gives it another `soname`, so that nothing later finds a driver there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    table = ", ".join(f'{{"{name}", {major}, {minor}}}' for name, major, minor in gpus)
    source, library = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(_DRIVER % (table, init_error))
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", str(library), str(source)]
    subprocess.run(command, check=True, timeout=60)
    return library, "cuda"


def make_site(site):
    """What pip leaves of a CUDA build of MXNet: its library, one beside it, two wheels with others, and no driver.

    ``mxnet.answer`` is 11121 where all of them are found.
    """
    driver = compile_driver(site / "linked")
    blas = compile_library(site / "nvidia" / "cublas" / "lib" / "libcublas.so.11", "cublas", 10)
    dnn = compile_library(site / "nvidia" / "cudnn" / "lib" / "libcudnn.so.8", "cudnn", 100, blas)
    beside = compile_library(site / "mxnet" / "libopenblas.so.0", "openblas", 1000)
    compile_library(site / "mxnet" / "libmxnet.so", "mxnet", 10000, dnn, driver, blas, beside)
    (site / "mxnet" / "__init__.py").write_text(_MXNET)
    (site / "mxnet_cu112-1.9.1.dist-info").mkdir()
    (site / "mxnet_cu112-1.9.1.dist-info" / "METADATA").write_text("Name: mxnet-cu112\nVersion: 1.9.1\n")
    installed = Path(numpy.__file__).parents[1]
    for package in ("numpy", "numpy.libs", "yaml", "_yaml", "setuptools", "_distutils_hack"):
        if (installed / package).is_dir():
            (site / package).symlink_to(installed / package)


def run_python(site, *arguments, driver=None):
    """Run Python in an environment that has what lies in `site`, this package, and nothing else."""
    return subprocess.run(
        [sys.executable, "-S", *map(str, arguments)],
        cwd=site,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{site}:{ROOT}", "LD_LIBRARY_PATH": str(driver or "")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
