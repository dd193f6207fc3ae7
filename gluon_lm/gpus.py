"""The GPUs of this machine, as NVIDIA's driver knows them, and whether MXNet can compute on them.

The driver is asked through ctypes, so this works without MXNet, and without CUDA.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection
from dataclasses import dataclass
from typing import NamedTuple

from .libraries import DRIVER, mxnet_distributions

# The CUDA wheels of MXNet have machine code for these; they have no PTX that a driver could translate. Code for
# X.Y runs on every X.Z with Z >= Y (CUDA C++ Programming Guide, "Binary Compatibility").
PUBLISHED_BUILDS = ("mxnet-cu112", "mxnet-cu117")
MACHINE_CODE = ((5, 0), (6, 0), (7, 0), (8, 0), (8, 6))

# Numbers of CUdevice_attribute in cuda.h.
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class Gpu:
    """One GPU; `index` is that of ``mx.gpu``, and respects ``CUDA_VISIBLE_DEVICES``."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int

    def __str__(self) -> str:
        return f"GPU {self.index} ({self.name}, compute capability {_dotted(self.capability)})"


class Driver(NamedTuple):
    """NVIDIA's driver.

    Attributes
    ----------
    cuda : str
        The newest CUDA that it supports, such as ``12.4``; empty if it does not say.
    gpus : list of Gpu
    problem : str
        Its error if it could not list its GPUs, otherwise empty.
    """

    cuda: str
    gpus: list[Gpu]
    problem: str = ""


def query_driver() -> Driver | None:
    """Ask the driver; None where there is none."""
    try:
        library = ctypes.CDLL(DRIVER)
    except OSError:
        return None
    cuda = ""
    try:
        number = _number(library, "cuDriverGetVersion")
        cuda = f"{number // 1000}.{number % 1000 // 10}"
        if library.cuInit(0) == _NO_DEVICE:  # or CUDA_VISIBLE_DEVICES hides all
            return Driver(cuda, [])
        _call(library, "cuInit", 0)
        return Driver(cuda, [_describe(library, i) for i in range(_number(library, "cuDeviceGetCount"))])
    except OSError as error:
        return Driver(cuda, [], str(error))


def identity(index: int) -> str | None:
    """The UUID of ``mx.gpu(index)``, which does not depend on how a process numbers GPUs; None if unknown."""
    uuid = (ctypes.c_ubyte * 16)()
    try:
        library = ctypes.CDLL(DRIVER)
        _call(library, "cuInit", 0)
        _call(library, "cuDeviceGetUuid", uuid, _number(library, "cuDeviceGet", index))
    except OSError:
        return None
    return bytes(uuid).hex()


def _describe(library: ctypes.CDLL, index: int) -> Gpu:
    device = _number(library, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    _call(library, "cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t()
    _call(library, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    major = _number(library, "cuDeviceGetAttribute", _CAPABILITY_MAJOR, device)
    minor = _number(library, "cuDeviceGetAttribute", _CAPABILITY_MINOR, device)
    return Gpu(index, name.value.decode(errors="replace"), (major, minor), memory.value)


def _number(library: ctypes.CDLL, function: str, *arguments: int) -> int:
    number = ctypes.c_int()
    _call(library, function, ctypes.byref(number), *arguments)
    return number.value


def _call(library: ctypes.CDLL, function: str, *arguments: object) -> None:
    try:
        code = getattr(library, function)(*arguments)
    except AttributeError:
        raise OSError(f"{DRIVER} has no {function}") from None
    if code:
        raise OSError(f"{function} returns error {code}")


def has_machine_code(capability: tuple[int, int], builds: Collection[str]) -> bool | None:
    """Whether MXNet can run on a GPU of this compute capability.

    Parameters
    ----------
    capability : tuple of int
    builds : collection of str
        The packages that MXNet came in, as `gluon_lm.libraries.mxnet_distributions` returns them.

    Returns
    -------
    bool or None
        None if MXNet is not one of the published CUDA builds, because only its builder can know.
    """
    if len(builds) != 1 or not set(builds) <= set(PUBLISHED_BUILDS):
        return None
    return any(major == capability[0] and minor <= capability[1] for major, minor in MACHINE_CODE)


def lacks_machine_code(gpu: Gpu, builds: Collection[str]) -> str | None:
    """A line for a GPU that the installed MXNet has no machine code for, and what to do; None where it may have."""
    if has_machine_code(gpu.capability, builds) is not False:
        return None
    return (
        f"{gpu}: {' '.join(builds)} has machine code for compute capability 5.0 to 8.9 only, and no published build of "
        "MXNet has more. Use another GPU (--gpus N) or the CPU (--cpus N), or compile MXNet from its source with "
        f"MXNET_CUDA_ARCH={_dotted(gpu.capability)}"
    )


def too_old_for_mxnet(driver: Driver) -> str | None:
    """A line for a driver that names GPUs where MXNet, built for CUDA, sees none: it is older than its CUDA."""
    if not driver.gpus:
        return None
    return (
        f"NVIDIA's driver runs CUDA {driver.cuda or '?'}, older than the CUDA that this MXNet is built for, so MXNet "
        f"sees none of its {len(driver.gpus)} GPUs; update the driver (CUDA 11.0 or later)"
    )


def reasons_against_gpus() -> dict[int, str]:
    """The line of `lacks_machine_code` for each GPU here that cannot be used, by its number."""
    driver = query_driver()
    if driver is None or not driver.gpus:
        return {}
    builds = mxnet_distributions()
    reasons = {gpu.index: lacks_machine_code(gpu, builds) for gpu in driver.gpus}
    return {index: reason for index, reason in reasons.items() if reason is not None}


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"
