"""What the process needs so that MXNet runs well in it. Commands call this; importing gluon_lm does not."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import sys

from . import __version__
from .config import Config
from .distributed.control import processes_here
from .errors import ConfigError
from .logs import LOGGER
from .memory import recurrent_bytes
from .processors import usable_cores

# Parameter numbers of mallopt(3) in glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8

_LEAN_ABOVE_BYTES = 192 << 20
_GIVEN_BACK_BYTES = 4 << 20
_LIBRARY_BYTES = 600 << 20  # of address space; with less MXNet's library crashes while it is loaded


def prepare_training(config: Config) -> None:
    """`prepare_process` for a training run, in the way that suits its size."""
    tokens = config.training.batch_size * (config.training.bptt + (config.optim.max_seq_len_delta or 0))
    is_large, varies = recurrent_bytes(config, tokens) > _LEAN_ABOVE_BYTES, config.optim.max_seq_len_delta is not None
    num_contexts = (config.devices.cpus or 1) * (processes_here() if config.devices.has_workers else 1)
    if not config.training.tf32:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    if varies:  # a pool that looks for the very size would keep a block for each length of a window
        os.environ.setdefault("MXNET_GPU_MEM_POOL_TYPE", "Round")
    prepare_process(num_contexts, _GIVEN_BACK_BYTES if is_large or varies else None, own_layers=is_large)


def prepare_process(num_cpu_contexts: int = 1, keep_up_to: int | None = None, own_layers: bool = False) -> None:
    """Set what MXNet and its OpenMP library read when they are loaded; call it before MXNet is imported.

    MXNet takes half of the processors it counts, as if each core showed two. So it is told the number of cores,
    shared out over the CPU contexts. A lone context's threads wait for work actively, for about a millisecond: a time
    step of a recurrent layer is too short to wake a sleeping thread for, and a processor held for longer would be
    missed by other processes. Operators get room to work in, as much as a gradient that is added up takes, once and not
    four times in turn, for a context's operators run one after another. A GPU has one random generator and not four in
    turn, of which the operators before would decide which one draws a mask. What the user has set in the environment
    stays.

    Parameters
    ----------
    num_cpu_contexts : int
        CPU contexts that will compute at the same time.
    keep_up_to : int, optional
        Of the memory that is freed, give blocks of this many bytes and more back, and keep the rest for the next step;
        by default all is kept. For windows of random length, whose blocks never fit the next window's: memory then
        stays as it is after the first steps, and does not grow by another third.
    own_layers : bool
        Compute recurrent layers by MXNet's own code and not by oneDNN, which keeps much more. At 3 x 1150 units and
        5,600 tokens a window, both settings together take 1.9 GB in place of 3.4, and a tenth of the speed. Word by
        word, as text is generated, it is the faster way. Without effect once MXNet is loaded.

    Raises
    ------
    MemoryError
        If the process may not have as much memory as MXNet's library takes.
    ConfigError
        For a number of threads in the environment that would end MXNet.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < _LIBRARY_BYTES:
        raise MemoryError(f"{allowed >> 20} MB are allowed, and MXNet alone takes {_LIBRARY_BYTES >> 20}")
    threads = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not threads:
        os.environ.pop("OMP_NUM_THREADS", None)
    elif not threads.isdecimal() or int(threads) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={threads}: MXNet needs one whole number, 1 or more; set that, or nothing")
    if own_layers and "mxnet" not in sys.modules:  # read at each operator, whose backward must find what forward found
        os.environ.setdefault("MXNET_USE_MKLDNN_RNN", "0")
    os.environ.setdefault("MXNET_CPU_TEMP_COPY", "1")
    os.environ.setdefault("MXNET_GPU_PARALLEL_RAND_COPY", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_cpu_contexts)))
    if num_cpu_contexts == 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keeps_memory = keep_freed_memory(keep_up_to)
    settings = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MXNET_USE_MKLDNN_RNN")}
    LOGGER.debug(
        "gluon_lm %s, Python %s, %d cores; %s; freed memory is %s",
        __version__,
        platform.python_version(),
        usable_cores(),
        ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None),
        "kept" if keeps_memory else "given back",
    )


def keep_freed_memory(up_to: int | None = None) -> bool:
    """Tell glibc to keep freed tensors for the next step instead of handing them back to the kernel.

    Without it about a third of CPU training time goes into page faults, because every tensor above 128 KiB is
    mapped and unmapped anew. Call it before the first tensor is made.

    Parameters
    ----------
    up_to : int, optional
        Only for tensors of fewer bytes; by default for all.

    Returns
    -------
    bool
        Whether this C library took the setting (glibc does; others keep their own ways).
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    mapped = (_M_MMAP_MAX, 0) if up_to is None else (_M_MMAP_THRESHOLD, up_to)
    settings = ((_M_ARENA_MAX, 1), mapped, (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
