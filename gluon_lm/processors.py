"""The processors of this machine: how many cores this process may use, and what they can do."""

from __future__ import annotations

import ctypes
import os
import platform
from pathlib import Path

from .control_groups import processor_share

# Numbers of Linux on x86-64: arch_prctl(2), its request for a feature whose registers are large, and the tiles' data.
_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA = 158, 0x1023, 18


def usable_cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once.

    More threads than a container's share of processor time would use it up at the beginning of each period, and then
    be throttled until its end.
    """
    share = processor_share()
    return _cores() if share is None else max(1, min(_cores(), int(share)))


def _cores() -> int:
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    cores = set()
    for cpu in os.sched_getaffinity(0):
        topology = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology")
        try:
            cores.add((topology / "thread_siblings_list").read_text())
        except OSError:
            cores.add(str(cpu))
    return len(cores)


def cpu_model() -> str:
    """The processor's name, as the system reports it."""
    return _cpu_info("model name") or platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """The processor's features as Linux names them, such as ``avx512_bf16``; empty on other systems."""
    return frozenset(_cpu_info("flags").split())


def may_multiply_tiles() -> bool:
    """Whether the processor multiplies tiles of bfloat16 (Intel AMX), and the kernel allows it to this process.

    The kernel is asked for it, once for all threads: it ends a process that just uses the tiles. Linux before 5.16,
    and a machine that hides this part of its processor, do not allow it.
    """
    if "amx_bf16" not in cpu_flags():
        return False
    return ctypes.CDLL(None).syscall(_SYS_ARCH_PRCTL, _ARCH_REQ_XCOMP_PERM, _TILE_DATA) == 0


def _cpu_info(field: str) -> str:
    """What /proc/cpuinfo says of the first processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    values = (line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == field)
    return next(values, "")
