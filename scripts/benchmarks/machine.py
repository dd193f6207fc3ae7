"""What a figure depends on beside the code: the machine and the versions."""

from __future__ import annotations

import os
import platform
import time
from importlib import metadata
from typing import Any

from gluon_lm.processors import cpu_model

PACKAGES = ("gluon_lm", "mxnet", "numpy", "gluonnlp", "torch")


def version_of(package: str) -> str | None:
    if package == "gluon_lm":  # the source tree that is measured, installed or not
        from gluon_lm import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    """For a report; plain JSON values."""
    versions = {name: version for name in PACKAGES if (version := version_of(name)) is not None}
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"Python": platform.python_version(), **versions},
        "thread_settings": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
        "load_average": list(os.getloadavg()),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def describe(about: dict[str, Any]) -> str:
    """One line: the processor and the versions."""
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    settings = "".join(f", {name}={value}" for name, value in about["thread_settings"].items())
    return f"{about['cpu']}, {about['cores']} cores{settings} | {versions}"


def load_average() -> str:
    return f"load average {', '.join(f'{value:.2f}' for value in os.getloadavg())}"
