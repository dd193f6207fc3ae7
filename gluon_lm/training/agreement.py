"""What the workers of a run must have in common before the first step."""

from __future__ import annotations

import dataclasses
import hashlib

import mxnet as mx

from .. import __version__
from ..config import Config, DataConfig, DeviceConfig
from ..distributed.communicator import Communicator
from ..errors import DistributedError


def worker_facts(config: Config, corpus_digest: str, communicator: Communicator) -> dict[str, object]:
    """What determines the result of a worker's steps, by name."""
    devices = config.devices
    shared = dataclasses.replace(config, data=DataConfig(), devices=DeviceConfig())
    configuration = hashlib.sha256(shared.to_yaml().encode()).hexdigest()
    return {
        "gluon_lm": __version__,
        "mxnet": mx.__version__,
        "configuration": configuration[:12],
        "text and vocabulary": corpus_digest[:12],
        "number of devices": len(communicator.devices),
        "kind of device": communicator.devices[0].device_type,
        "how gradients travel": f"--kvstore {devices.kvstore} --gctype {devices.gctype} --gcthreshold "
        f"{devices.gcthreshold:g}",
    }


def check_alike(own: dict[str, object], communicator: Communicator) -> None:
    """Make sure that all workers are set up to do the same.

    Raises
    ------
    DistributedError
        Naming what differs, and where.
    """
    facts = communicator.allgather_object(own)
    for what in dict.fromkeys(name for fact in facts for name in fact):  # one may resume where another begins
        expected, *_ = values = [fact.get(what, "none") for fact in facts]
        others = {rank: value for rank, value in enumerate(values) if value != expected}
        if others:
            shown = ", ".join(f"worker {rank} {value}" for rank, value in others.items())
            raise DistributedError(
                f"the workers differ in {what}: worker 0 has {expected}, {shown}; start all with the same version, "
                "flags, text and checkpoint"
            )
