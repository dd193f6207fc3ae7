"""What the process needs so that MXNet runs well in it. Commands call this; importing gluon_lm does not."""

from __future__ import annotations

import ctypes
import sys

# Parameter numbers of mallopt(3) in glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed tensors for the next step instead of handing them back to the kernel.

    Without it about a third of CPU training time goes into page faults, because every tensor above 128 KiB is
    mapped and unmapped anew. Call it before the first tensor is made.

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
    settings = ((_M_ARENA_MAX, 1), (_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
