"""Everything that knows about more than one device or worker."""

from .communicator import Communicator, SingleDevice
from .devices import COMMUNICATORS, create_communicator, resolve_devices, resolve_single_device
from .kvstore import KVStoreCommunicator

__all__ = [
    "COMMUNICATORS",
    "Communicator",
    "KVStoreCommunicator",
    "SingleDevice",
    "create_communicator",
    "resolve_devices",
    "resolve_single_device",
]
