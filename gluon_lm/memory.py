"""How much memory training takes, known before it starts, and what to say if there is less.

Linux overcommits: an allocation succeeds, and the OOM killer later ends the process without a message. So what
certainly does not fit is refused beforehand. What fails all the same is explained with the same figures.
"""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from . import control_groups
from .config import OPTIMIZER_STATES, Config
from .errors import OutOfMemory

_STATUS = Path("/proc/self/status")
_FLOAT = 4
_MIXED = 8  # a logit in float32 and in half precision, and what oneDNN keeps of products: precision.FORWARD_ROWS
_PROGRAM = 250 << 20  # Python, MXNet's libraries, the vocabulary
_RECURRENT_FLOATS = 20  # for each unit and token; oneDNN's LSTM takes twice as many
_FAILURE = re.compile(
    "failed to allocate|out of memory|alloc_failed|cudaErrorMemoryAllocation|bad_alloc|"
    "could not create a (primitive|memory object)|resource temporarily unavailable",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Need:
    """Bytes that training takes on one device; on the CPU all devices share one memory, and this is their total.

    Attributes
    ----------
    parameters : int
        Parameters, gradients, and what the optimiser and the average keep; on the CPU a second copy of the largest
        gradient, because MXNet computes what it adds to it elsewhere; in mixed precision, on GPUs too, a cast of the
        output layer's largest parameter and its gradient, which take as much.
    logits : int
        A chunk's logits, for which training and evaluation share one workspace.
    window : int
        The activations of a window that are kept for the backward pass; an estimate.
    """

    parameters: int
    logits: int
    window: int

    @property
    def certain(self) -> int:
        """Those that are certainly needed."""
        return self.parameters + self.logits

    @property
    def total(self) -> int:
        """All of them, and the program itself."""
        return self.certain + self.window + _PROGRAM

    def __str__(self) -> str:
        parts = {"parameters and gradients": self.parameters, "logits": self.logits, "activations": self.window}
        return f"about {_gb(self.total)} ({', '.join(f'{name} {_gb(size)}' for name, size in parts.items())})"


def recurrent_bytes(config: Config, tokens: int) -> int:
    """Estimate of what the recurrent layers keep of a window of `tokens` tokens for the backward pass."""
    return _FLOAT * _RECURRENT_FLOATS * tokens * sum(config.model.layer_sizes)


def training_need(
    config: Config, num_parameters: int, largest: int, logits: int, tokens: int, num_sharing: int, merged: int = 0
) -> Need:
    """What a run takes.

    Parameters
    ----------
    config : Config
    num_parameters, largest : int
        Elements of all parameters, and of the output layer's largest one, if a second gradient of it, or a cast with
        its gradient, is kept; otherwise 0.
    logits : int
        Elements of a device's workspace for logits.
    tokens : int
        Tokens of a window that a device processes at once.
    num_sharing : int
        Devices that share one memory: CPU contexts; for GPUs 1.
    merged : int
        Elements that are held by the GPU that sums the largest parameter's gradients.
    """
    copies = 2 + OPTIMIZER_STATES[config.optim.optimizer]
    if num_sharing > 1:
        copies += 1  # where gradients are added up
    average = int(config.optim.ntasgd or config.optim.asgd)  # the first device's
    bytes_a_logit = _FLOAT if config.training.amp == "none" else _MIXED
    return Need(
        _FLOAT * (num_parameters * (copies * num_sharing + average) + largest * num_sharing + merged),
        bytes_a_logit * logits * num_sharing,
        recurrent_bytes(config, tokens) * num_sharing,
    )


def check_need(need: Need, available: int | None, num_sharing: int = 1) -> str | None:
    """Refuse what certainly does not fit. `available` is the share of one of `num_sharing` workers on this machine.

    Returns
    -------
    str or None
        A warning if it may be too much.

    Raises
    ------
    OutOfMemory
        If what is certainly needed is more than there is.
    """
    if available is None or need.total <= available:
        return None
    line = f"training takes {need} of memory, and {_gb(available)} are free"
    advice = _advice(need)
    if num_sharing > 1:
        line += f" for each of the {num_sharing} workers on this machine"
        advice += "; or train with fewer of them here"
    if need.certain > available:
        raise OutOfMemory(f"{line}; {advice}")
    return f"{line}: that may not be enough; if it ends without a message, {advice}"


@contextlib.contextmanager
def explaining_memory_errors(need: Need) -> Iterator[None]:
    """A block in which a failed allocation becomes an `OutOfMemory` that says what training takes."""
    try:
        yield
    except Exception as error:
        if not is_allocation_failure(error):
            raise
        raise OutOfMemory(f"out of memory: training takes {need}; {_advice(need)}") from error


def is_allocation_failure(error: BaseException) -> bool:
    """Whether Python, MXNet or CUDA failed to allocate memory. Does not import MXNet."""
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and bool(_FAILURE.search(str(error))))


def _advice(need: Need) -> str:
    advice = [
        "lower --max-vocab, --emsize or --nhid, share the matrix with --tied, or use --cutoffs, all in a new run",
        "use --small-batch-size, or lower --batch-size or --bptt in a new run",
    ]
    return "; or ".join(advice if need.certain > need.window else reversed(advice))


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


# ---------------------------------------------------------------- what there is


def free_host_memory(num_sharing: int = 1) -> int | None:
    """Bytes that this process can still take; None if that is not known.

    They are its share, as one of `num_sharing` processes, of what is free on the machine and in its control groups, and
    no more than its own limit leaves.
    """
    shared = (bound for bound in (_free_on_machine(), control_groups.free_memory()) if bound is not None)
    bounds = [*(bound // num_sharing for bound in shared), _free_below_limit()]
    return min((bound for bound in bounds if bound is not None), default=None)


def peak_memory() -> int | None:
    """The most bytes of the machine's memory that this process has held; None if the system cannot tell."""
    return _kilobytes(_STATUS, "VmHWM")


def _free_on_machine() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable")


def _free_below_limit() -> int | None:
    """Below ``ulimit -v``."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    used = _kilobytes(_STATUS, "VmSize")
    return None if limit == resource.RLIM_INFINITY or used is None else max(0, limit - used)


def _kilobytes(path: Path, name: str) -> int | None:
    """The value of one of the kernel's lines, ``Name: 123 kB``, in bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(encoding="ascii"), re.MULTILINE)
    except (OSError, ValueError):
        return None
    return int(found[1]) * 1024 if found else None
