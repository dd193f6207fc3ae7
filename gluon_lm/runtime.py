"""Settings of the process with which MXNet runs well. Commands call this; importing gluon_lm does not."""

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
from .processors import may_multiply_tiles, usable_cores

# Parameter numbers of mallopt(3) in glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -3, -4, -8

_LEAN_ABOVE_BYTES = 192 << 20
_GIVEN_BACK_BYTES = 4 << 20
_LIBRARY_BYTES = 600 << 20  # of address space; with less, MXNet's library crashes while loading


def prepare_training(config: Config) -> None:
    """`prepare_process` for a training run, as suits its size and its precision."""
    tokens = config.training.batch_size * (config.training.bptt + (config.optim.max_seq_len_delta or 0))
    is_large, varies = recurrent_bytes(config, tokens) > _LEAN_ABOVE_BYTES, config.optim.max_seq_len_delta is not None
    num_contexts = (config.devices.cpus or 1) * (processes_here() if config.devices.has_workers else 1)
    if not config.training.tf32:
        os.environ["NVIDIA_TF32_OVERRIDE"] = "0"
    if varies:  # a pool that needs the exact size would keep a block for each length of a window
        os.environ.setdefault("MXNET_GPU_MEM_POOL_TYPE", "Round")
    # Asked in any case: the variable may have come from a process that trained in bfloat16 and started this one.
    if config.training.amp == "bfloat16" and may_multiply_tiles() and "mxnet" not in sys.modules:
        os.environ.setdefault("DNNL_MAX_CPU_ISA", "AVX512_CORE_AMX")  # which oneDNN 2.4 uses only if it is told so
    prepare_process(num_contexts, _GIVEN_BACK_BYTES if is_large or varies else None, own_layers=is_large)


def prepare_process(num_cpu_contexts: int = 1, keep_up_to: int | None = None, own_layers: bool = False) -> None:
    """Set what MXNet and its OpenMP library read when they are loaded; call it before MXNet is imported.

    MXNet uses half of the processors that it counts, assuming two hardware threads per core. So it is given the number
    of cores, divided among the CPU contexts. With a single context, threads spin for about a millisecond when they wait
    for work: a time step of a recurrent layer is too short to wake a sleeping thread for, and spinning longer would
    take the processor from other processes. Operators share one workspace, as large as the largest gradient that they
    add to, rather than four in turn, because a context's operators run one after another. A GPU has one random
    generator rather than four in turn, so that earlier operators do not decide which one draws a mask. Pointwise
    operators are not compiled into one at run time, because the code that the CUDA wheels' compiler writes needs a
    newer driver (520) than they do. Variables that the user has set in the environment are kept.

    Parameters
    ----------
    num_cpu_contexts : int
        CPU contexts that will compute at the same time.
    keep_up_to : int, optional
        Of freed memory, return blocks of this many bytes and more, and keep the rest for the next step; by default all
        is kept. For windows of random length, whose blocks never fit the next window's: memory use then stays as it is
        after the first steps, instead of growing by another third.
    own_layers : bool
        Compute recurrent layers by MXNet's own code instead of oneDNN, which keeps much more. At 3 x 1150 units and
        5,600 tokens per window, both settings together take 1.9 GB instead of 3.4, and cost a tenth of the speed. Word
        by word, as text is generated, it is the faster way. No effect once MXNet is loaded.

    Raises
    ------
    MemoryError
        If the process is not allowed as much memory as MXNet's library takes.
    ConfigError
        For a number of threads in the environment that would crash MXNet.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_AS)
    if allowed != resource.RLIM_INFINITY and allowed < _LIBRARY_BYTES:
        raise MemoryError(f"{allowed >> 20} MB are allowed, but MXNet alone takes {_LIBRARY_BYTES >> 20}")
    threads = os.environ.get("OMP_NUM_THREADS", "").strip()
    if not threads:
        os.environ.pop("OMP_NUM_THREADS", None)
    elif not threads.isdecimal() or int(threads) < 1:
        raise ConfigError(f"OMP_NUM_THREADS={threads}: MXNet needs one whole number, 1 or more; set that, or nothing")
    if own_layers and "mxnet" not in sys.modules:  # read at each operator, and backward must find what forward found
        os.environ.setdefault("MXNET_USE_MKLDNN_RNN", "0")
    os.environ.setdefault("MXNET_CPU_TEMP_COPY", "1")
    os.environ.setdefault("MXNET_GPU_PARALLEL_RAND_COPY", "1")
    os.environ.setdefault("MXNET_USE_FUSION", "0")
    os.environ.setdefault("MXNET_CUDNN_LIB_CHECKING", "0")  # warns of any cuDNN but the one that it was built with
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // num_cpu_contexts)))
    if num_cpu_contexts == 1:
        os.environ.setdefault("OMP_WAIT_POLICY", "active")
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    keeps_memory = keep_freed_memory(keep_up_to)
    told = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MXNET_USE_MKLDNN_RNN", "DNNL_MAX_CPU_ISA")
    settings = {name: os.environ.get(name) for name in told}
    LOGGER.debug(
        "gluon_lm %s, Python %s, %d cores; %s; freed memory is %s",
        __version__,
        platform.python_version(),
        usable_cores(),
        ", ".join(f"{name}={value}" for name, value in settings.items() if value is not None),
        "kept" if keeps_memory else "returned",
    )


def keep_freed_memory(up_to: int | None = None) -> bool:
    """Tell glibc to keep freed tensors for the next step instead of returning them to the kernel.

    Without it about a third of CPU training time goes into page faults, because every tensor above 128 KiB is
    mapped and unmapped each time. Call it before the first tensor is created.

    Parameters
    ----------
    up_to : int, optional
        Only tensors of fewer bytes; by default all.

    Returns
    -------
    bool
        Whether this C library accepted the setting (glibc does; others behave differently).
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
