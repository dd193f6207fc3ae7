"""What the workers of a run must have in common: before the first step, and, their parameters, after any."""

from __future__ import annotations

import dataclasses
import hashlib
import zlib
from collections.abc import Collection

import mxnet as mx
from mxnet import gluon

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


def check_parameters(parameters: Collection[gluon.Parameter], communicator: Communicator, step: int) -> None:
    """Make sure that all devices of all workers have the same parameters after a step.

    Raises
    ------
    DistributedError
        Naming the workers or devices that differ from the first.
    """
    if communicator.num_devices == 1:
        return
    first, *more = communicator.devices
    apart = [str(device) for device in more if _differ(parameters, first, device)]
    checksum = 0
    if communicator.size > 1:
        for parameter in parameters:
            checksum = zlib.crc32(parameter.data(first).asnumpy(), checksum)
    found = communicator.allgather_object([checksum, apart])
    others = [rank for rank, (of_worker, _) in enumerate(found) if of_worker != found[0][0]]
    if others:
        raise DistributedError(
            f"step {step}: the parameters of worker {', '.join(map(str, others))} are not those of worker 0; earlier "
            "checkpoints are intact. A faulty machine or another build of MXNet is likely"
        )
    for rank, (_, apart) in enumerate(found):
        if apart:
            on = ", ".join(apart) + (f" of worker {rank}" if communicator.size > 1 else "")
            way_round = "; set MXNET_ENABLE_GPU_P2P=0, or use --kvstore local" if first.device_type == "gpu" else ""
            raise DistributedError(
                f"step {step}: the parameters on {on} are not those on {first}; earlier checkpoints are intact. Copies "
                f"between these devices are likely corrupted{way_round}"
            )


def _differ(parameters: Collection[gluon.Parameter], first: mx.Context, other: mx.Context) -> bool:
    """Whether the copies on two devices differ; compared on the first one, with a single read-back."""
    unlike = [(p.data(first) != p.data(other).as_in_context(first)).sum() for p in parameters]
    return bool(mx.nd.add_n(*unlike).asscalar())
