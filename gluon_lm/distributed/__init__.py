"""Everything that knows about more than one device or worker.

The public names load what they need when they are first used: the launcher and its agents need no MXNet.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "COMMUNICATORS": "devices",
    "Communicator": "communicator",
    "KVStoreCommunicator": "kvstore",
    "SingleDevice": "communicator",
    "create_communicator": "devices",
    "free_memory": "devices",
    "memory_in_use": "devices",
    "merged_elements": "devices",
    "resolve_devices": "devices",
    "resolve_single_device": "devices",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
