"""The shared libraries that MXNet's own library needs, and where they are.

The CUDA wheels of MXNet do not bundle CUDA, cuDNN and NCCL. Other wheels do, in folders that the dynamic loader does
not search; but where a library of the right name is loaded already, it uses that.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import struct
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, NamedTuple

from .errors import MissingDependency

DRIVER = "libcuda.so.1"
FOR_GPUS = "pip uninstall -y mxnet && pip install 'gluon_lm[cu112]'"  # of the CPU build: both are one module
_BUILD = re.compile(r"mxnet(-cu\d+(mkl)?|-mkl|-native)?")  # packages that hold the module mxnet
# Prefixes of the names of the libraries in NVIDIA's wheels.
_FROM_WHEELS = ("libcu", "libnccl.", "libnvrtc", "libnvToolsExt.")
_PT_LOAD, _PT_DYNAMIC = 1, 2
_DT_NULL, _DT_NEEDED, _DT_STRTAB, _DT_STRSZ = 0, 1, 5, 10


class Resolved(NamedTuple):
    """Where the libraries are that a library needs.

    Attributes
    ----------
    to_preload : list of Path
        Libraries that the loader would not find, each after those that it needs itself.
    missing : list of str
        Names of those that were not found.
    """

    to_preload: list[Path]
    missing: list[str]


def needed_by(library: Path) -> list[str]:
    """The names of the libraries that one needs; none for a file that is not a complete 64-bit ELF library."""
    try:
        return _needed_by(library)
    except (ValueError, KeyError, StopIteration, struct.error):  # the loader's message is better
        return []


def _needed_by(library: Path) -> list[str]:
    """As its dynamic section lists them (System V Application Binary Interface, chapter 5)."""
    with library.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:6] != b"\x7fELF\x02\x01":
            return []
        start, size, count = struct.unpack_from("<32xQ14xHH", header)
        segments = [struct.unpack("<I4xQQ8xQ16x", _read(file, start + i * size, 56)) for i in range(count)]
        dynamic = next(((offset, size) for kind, offset, _, size in segments if kind == _PT_DYNAMIC), None)
        if dynamic is None:
            return []
        entries = list(struct.iter_unpack("<qQ", _read(file, *dynamic)))
        tags = [tag for tag, _ in entries]
        entries = entries[: tags.index(_DT_NULL)]
        values = dict(entries)
        address = values[_DT_STRTAB]
        strings = next(
            _read(file, offset + address - base, values[_DT_STRSZ])
            for kind, offset, base, size in segments
            if kind == _PT_LOAD and base <= address < base + size
        )
        return [strings[value : strings.index(b"\0", value)].decode() for tag, value in entries if tag == _DT_NEEDED]


def _read(file: BinaryIO, offset: int, size: int) -> bytes:
    file.seek(offset)
    return file.read(size)


def resolve(library: Path, folders: Sequence[Path]) -> Resolved:
    """Find what a library needs, and what that needs in turn.

    Parameters
    ----------
    library : Path
        Libraries in its own folder need no help.
    folders : sequence of Path
        Where to look before the loader does.
    """
    resolved = Resolved([], [])
    seen: set[str] = set()

    def visit(names: Iterable[str], beside: Path) -> None:
        for name in names:
            if name in seen:
                continue
            seen.add(name)
            path = next((folder / name for folder in folders if (folder / name).is_file()), None)
            if path is not None:
                visit(needed_by(path), path.parent)
                resolved.to_preload.append(path)
            elif not (beside / name).is_file() and not _is_loadable(name):
                resolved.missing.append(name)

    visit(needed_by(library), library.parent)
    return resolved


def _is_loadable(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


def wheel_folders() -> list[Path]:
    """The folders of libraries from NVIDIA's wheels in this environment."""
    spec = importlib.util.find_spec("nvidia")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    return [folder for place in places for folder in sorted(Path(place).glob("*/lib"))]


def mxnet_library(package: Path) -> Path | None:
    """The library that the package ``mxnet`` in this folder will load, if it is where its wheels put it."""
    library = Path(os.environ.get("MXNET_LIBRARY_PATH") or package / "libmxnet.so")
    return library if library.is_file() else None


def preload(package: Path) -> None:
    """Load what MXNet needs and the loader would not find, so that importing MXNet finds it.

    Parameters
    ----------
    package : Path
        Folder of the package ``mxnet``.

    Raises
    ------
    MissingDependency
        Naming every library that is missing, and what to install.
    """
    library = mxnet_library(package)
    if library is None:
        return
    resolved = resolve(library, wheel_folders())
    if resolved.missing:
        raise MissingDependency("; ".join(how_to_bring(resolved.missing)))
    for path in resolved.to_preload:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def mxnet_distributions() -> dict[str, str]:
    """The installed packages that contain MXNet, with their versions; several of them overwrite each other."""
    found = {str(dist.metadata["Name"]).lower().replace("_", "-"): dist.version for dist in metadata.distributions()}
    return {name: version for name, version in sorted(found.items()) if _BUILD.fullmatch(name)}


def how_to_bring(missing: Sequence[str]) -> list[str]:
    """A line for each kind of library that is missing: what it is, and what to do."""
    builds = list(mxnet_distributions()) or ["mxnet"]
    build = " and ".join(builds)
    extra = "cu117" if "mxnet-cu117" in builds else "cu112"
    from_wheels = [name for name in missing if name != DRIVER and name.startswith(_FROM_WHEELS)]
    others = [name for name in missing if name != DRIVER and name not in from_wheels]
    lines = []
    if DRIVER in missing:
        lines.append(
            f"{DRIVER} is missing: {build} needs NVIDIA's driver, which no wheel contains; install the driver, or "
            f"the CPU build with: pip uninstall -y {' '.join(builds)} && pip install 'gluon_lm[cpu]'"
        )
    if from_wheels:
        lines.append(f"missing for {build}: {', '.join(from_wheels)}; install with: pip install 'gluon_lm[{extra}]'")
    if others:
        lines.append(
            f"missing for {build}: {', '.join(others)}; install them with the system's packages (apt-get install "
            "libgomp1 for libgomp.so.1)"
        )
    return lines
