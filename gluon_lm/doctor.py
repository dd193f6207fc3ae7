"""``python -m gluon_lm.doctor [RUN]``: what MXNet finds on this machine, and how to fix what is wrong.

It also works if MXNet is missing or cannot be loaded, for that is when it is needed: MXNet is imported in a process of
its own, and however that ends becomes a line of the report.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from . import __version__
from .cli import CommandParser, as_command
from .config import Section, option, switch
from .control_groups import processor_share
from .gpus import has_machine_code, lacks_machine_code, query_driver
from .libraries import FOR_GPUS, how_to_bring, mxnet_distributions, mxnet_library, resolve, wheel_folders
from .logs import LOGGER, log_to_terminal
from .processors import cpu_flags, cpu_model, usable_cores
from .runtime import keep_freed_memory

_IMPORT_SECONDS = 120
_SAMPLE_BYTES = 64 << 20
_ALLOCATOR_VARIABLES = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


@dataclass(frozen=True)
class DoctorOptions(Section):
    """What `doctor` prints."""

    json: bool = option(False, switch(), "print one JSON object")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 2 where MXNet cannot be used."""
    parser = CommandParser(
        "doctor",
        "Say what MXNet finds on this machine: versions, GPUs, libraries, cores, settings, and what is wrong.",
        "python -m gluon_lm.doctor --json",
    )
    parser.add_argument(
        "run", nargs="?", metavar="RUN", default="runs", help="folder that runs are written to (default: runs)"
    )
    parser.add_section(DoctorOptions, "report")
    parsed = parser.parse(argv)
    log_to_terminal(parsed.verbosity)
    LOGGER.debug("importing MXNet in a process of its own, for at most %d s", _IMPORT_SECONDS)
    facts = examine(Path(parsed.arguments.run))
    print(json.dumps(facts, indent=2) if parsed.build(DoctorOptions).json else describe(facts))
    return 2 if facts["errors"] else 0


def examine(run_folder: Path) -> dict[str, Any]:
    """The contents of the report, as plain JSON values.

    Returns
    -------
    dict
        ``errors`` are lines on what keeps MXNet from working, ``advice`` on what could be improved.
    """
    facts: dict[str, Any] = {
        "gluon_lm": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "numpy": _version_of("numpy"),
        "mxnet": _examine_mxnet(),
        "gpus": {},
        "horovod": None,
        "cpu": {
            "model": cpu_model(),
            "cores": usable_cores(),
            "share": processor_share(),
            "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "bfloat16": sorted(cpu_flags() & {"avx512_bf16", "amx_bf16"}),
        },
        "allocator": {
            "keeps_freed_memory": keep_freed_memory(),
            "environment": {name: value for name, value in os.environ.items() if name.startswith(_ALLOCATOR_VARIABLES)},
        },
        "openmp": {
            "threads": os.environ.get("OMP_NUM_THREADS", str(usable_cores())),
            "from_environment": "OMP_NUM_THREADS" in os.environ,
            "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        },
        "run_folder": _examine_folder(run_folder),
    }
    facts["horovod"] = facts["mxnet"].pop("horovod")
    facts["gpus"] = _examine_gpus(list(facts["mxnet"]["packages"]))
    facts["errors"], facts["advice"] = _errors(facts), _advice(facts)
    return facts


def _version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---------------------------------------------------------------- MXNet


def _examine_mxnet() -> dict[str, Any]:
    spec = importlib.util.find_spec("mxnet")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    library = None if folder is None else mxnet_library(folder)
    resolved = None if library is None else resolve(library, wheel_folders())
    facts = {
        "packages": mxnet_distributions(),
        "library": None if library is None else str(library),
        "from_wheels": [] if resolved is None else [path.name for path in resolved.to_preload],
        "missing_libraries": [] if resolved is None else resolved.missing,
        "version": None,
        "features": [],
        "horovod": _version_of("horovod") and {"version": _version_of("horovod"), "mxnet": False},
        "problem": "",
    }
    if folder is None:
        return {**facts, "problem": "it is not installed"}
    if facts["missing_libraries"]:
        return {**facts, "problem": "it cannot be loaded, see below"}
    return {**facts, **_import_mxnet()}


def _import_mxnet() -> dict[str, Any]:
    """The report of a process that imports MXNet, and Horovod if it is installed."""
    program = "from gluon_lm.doctor import _report_from_within; _report_from_within()"
    # That process must find this package where this one did.
    path = os.pathsep.join([str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=_IMPORT_SECONDS, env=environment
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"importing it takes more than {_IMPORT_SECONDS} s"}
    if done.returncode < 0:
        said = [line.partition("what():")[2].strip() for line in done.stderr.splitlines() if "what():" in line]
        return {"problem": ": ".join([f"importing it kills the process (signal {-done.returncode})", *said[-1:]])}
    if done.returncode > 0:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"problem": f"it cannot be imported: {said[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _report_from_within() -> None:
    """Import MXNet, and print its version and features as one line of JSON."""
    import mxnet as mx

    facts: dict[str, Any] = {
        "version": mx.__version__,
        "features": sorted(name for name, feature in mx.runtime.Features().items() if feature.enabled),
    }
    version = _version_of("horovod")
    if version is not None:
        facts["horovod"] = {"version": version, "mxnet": False}
        try:
            import horovod.mxnet as hvd
        except (ImportError, OSError) as error:
            facts["horovod"]["problem"] = " ".join(str(error).split())
        else:
            built = {name: bool(getattr(hvd, f"{name}_built")()) for name in ("gloo", "mpi", "nccl")}
            facts["horovod"].update(mxnet=True, **built)
    print(json.dumps(facts))


# ---------------------------------------------------------------- the machine


def _examine_gpus(builds: list[str]) -> dict[str, Any]:
    driver = query_driver()
    if driver is None:
        return {"driver": None, "devices": [], "problem": ""}
    devices = [
        {
            "index": gpu.index,
            "name": gpu.name,
            "compute_capability": list(gpu.capability),
            "memory_bytes": gpu.memory_bytes,
            "machine_code": has_machine_code(gpu.capability, builds),
            "advice": lacks_machine_code(gpu, builds),
        }
        for gpu in driver.gpus
    ]
    return {"driver": driver.cuda, "devices": devices, "problem": driver.problem}


def _examine_folder(folder: Path) -> dict[str, Any]:
    """How fast files are written where runs will be: `_SAMPLE_BYTES`, until they are on the disk."""
    existing = Path(os.path.realpath(folder))
    while not existing.is_dir():
        existing = existing.parent
    facts: dict[str, Any] = {"path": str(folder), "bytes_per_second": None, "problem": ""}
    if folder.exists() and not folder.is_dir():
        facts["problem"] = "is not a folder"
    facts["free_bytes"] = shutil.disk_usage(existing).free
    block = os.urandom(1 << 20)
    try:
        with tempfile.TemporaryFile(dir=existing, prefix=".gluon_lm-doctor-") as file:
            started = time.perf_counter()
            for _ in range(_SAMPLE_BYTES // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            facts["bytes_per_second"] = round(_SAMPLE_BYTES / (time.perf_counter() - started))
    except OSError as error:
        facts["problem"] = error.strerror or str(error)
    return facts


# ---------------------------------------------------------------- conclusions


def _errors(facts: dict[str, Any]) -> list[str]:
    mxnet, lines = facts["mxnet"], []
    if mxnet["library"] is None and mxnet["problem"]:
        pinned = " ".join(f"{name}=={version}" for name, version in mxnet["packages"].items())
        lines.append(
            f"MXNet: {mxnet['problem']}, and its library is not where its package puts it: pip install "
            f"--force-reinstall --no-deps {pinned}"
            if pinned
            else "MXNet is not installed: pip install 'gluon_lm[cpu]', or 'gluon_lm[cu112]' for NVIDIA GPUs"
        )
    elif mxnet["missing_libraries"]:
        lines += how_to_bring(mxnet["missing_libraries"])
    elif mxnet["problem"]:
        lines.append(f"MXNet: {mxnet['problem']}")
    return lines


def _advice(facts: dict[str, Any]) -> list[str]:
    mxnet, gpus, lines = facts["mxnet"], facts["gpus"], []
    if not (3, 9) <= sys.version_info[:2] <= (3, 12):
        lines.append(f"this package is tested on Python 3.9 to 3.12, not on {facts['python']['version']}")
    packages = list(mxnet["packages"])
    if len(packages) > 1:
        lines.append(
            f"{' and '.join(packages)} are all installed and overwrite each other: pip uninstall -y "
            f"{' '.join(packages)}, then install the one that is wanted, as in pip install 'gluon_lm[cpu]'"
        )
    if gpus["problem"]:
        lines.append(f"NVIDIA's driver is installed but does not work ({gpus['problem']}): see what nvidia-smi says")
    lines += [device["advice"] for device in gpus["devices"] if device["advice"]]
    if gpus["devices"] and packages == ["mxnet"] and mxnet["features"] and "CUDA" not in mxnet["features"]:
        lines.append(f"this MXNet is built for the CPU and uses no GPU; for one: {FOR_GPUS}")
    if facts["horovod"] and not facts["horovod"]["mxnet"] and mxnet["version"]:
        lines.append("Horovod was built without MXNet, or for another version: bash scripts/install_horovod.sh")
    if not facts["allocator"]["keeps_freed_memory"]:
        lines.append("this C library returns freed memory at once; on CPU, training is slower than with glibc")
    if facts["run_folder"]["problem"]:
        lines.append(f"{facts['run_folder']['path']}: cannot be written ({facts['run_folder']['problem']})")
    return lines


def describe(facts: dict[str, Any]) -> str:
    """The report as text."""
    mxnet, cpu, folder = facts["mxnet"], facts["cpu"], facts["run_folder"]
    packages = ", ".join(f"{name} {version}" for name, version in mxnet["packages"].items())
    speed = folder["bytes_per_second"]
    share = "" if cpu["share"] is None else f", limited to {cpu['share']:g} cores' time by a control group"
    rows = [
        ("gluon_lm", facts["gluon_lm"]),
        ("Python", f"{facts['python']['version']}, {facts['python']['executable']}"),
        ("numpy", facts["numpy"] or "not installed"),
        ("MXNet", mxnet["version"] or mxnet["problem"]),
        ("  packages", packages or "none"),
        ("  library", mxnet["library"] or "none"),
        ("  features", ", ".join(mxnet["features"]) or "unknown"),
        ("  loaded first", ", ".join(mxnet["from_wheels"]) or "nothing needs it"),
        ("  missing", ", ".join(mxnet["missing_libraries"]) or "nothing"),
        *_gpu_rows(facts["gpus"]),
        ("Horovod", _horovod_text(facts["horovod"])),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores ({cpu['threads']} threads{share})"),
        ("  bfloat16", ", ".join(cpu["bfloat16"]) or "not in hardware"),
        ("allocator", "keeps freed memory" if facts["allocator"]["keeps_freed_memory"] else "gives memory back"),
        *(("  variable", f"{name}={value}") for name, value in facts["allocator"]["environment"].items()),
        (
            "OpenMP",
            f"{facts['openmp']['threads']} threads, "
            + ("as the environment says" if facts["openmp"]["from_environment"] else "one per core"),
        ),
        (
            "run folder",
            f"{folder['path']}: "
            + (f"{speed / 1e6:.0f} MB/s written, " if speed else "cannot be written, ")
            + f"{folder['free_bytes'] / 1e9:.0f} GB free",
        ),
    ]
    lines = [f"{name:<15}{value}" for name, value in rows]
    lines += ["", *(f"error: {line}" for line in facts["errors"]), *(f"advice: {line}" for line in facts["advice"])]
    return "\n".join(lines + ["" if facts["errors"] else "MXNet works here."]).rstrip()


def _gpu_rows(gpus: dict[str, Any]) -> list[tuple[str, str]]:
    if gpus["driver"] is None:
        return [("GPUs", "no NVIDIA driver")]
    said = {True: "has machine code", False: "no machine code", None: "machine code unknown"}
    driver = f"driver for CUDA {gpus['driver'] or '?'}"
    rows = [("GPUs", f"{len(gpus['devices'])}, {driver}")]
    for device in gpus["devices"]:
        capability = ".".join(map(str, device["compute_capability"]))
        memory = f"{device['memory_bytes'] / 1e9:.1f} GB"
        rows.append(
            (f"  {device['index']}", f"{device['name']}, {capability}, {memory}: {said[device['machine_code']]}")
        )
    return rows


def _horovod_text(horovod: dict[str, Any] | None) -> str:
    if horovod is None:
        return "not installed"
    if not horovod["mxnet"]:
        return f"{horovod['version']}, not for this MXNet"
    built = [name for name in ("gloo", "mpi", "nccl") if horovod[name]]
    return f"{horovod['version']} for MXNet, with {', '.join(built)}"


if __name__ == "__main__":
    sys.exit(main())
