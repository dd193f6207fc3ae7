"""From device flags to MXNet contexts and the communicator that joins them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence

import mxnet as mx

from ..config import DeviceConfig
from ..errors import DistributedError
from ..gpus import query_driver, reasons_against_gpus, too_old_for_mxnet
from ..libraries import FOR_GPUS
from ..logs import LOGGER
from ..memory import free_host_memory
from .communicator import Communicator, SingleDevice
from .control import LOCAL_WORKER_VARIABLE, processes_here
from .kvstore import KVStoreCommunicator


def resolve_devices(config: DeviceConfig, streams: int | None = None, number: int = 0) -> list[mx.Context]:
    """The contexts that the flags ask for; with none given, the first usable GPU, or else one CPU context.

    With `streams`, it is not only the first usable GPU, but all of them, or as many as divide that number of streams,
    unless `single_gpu` is set. `single_gpu` and `cuda=True` never mean the CPU.

    Processes on one machine divide its GPUs among themselves: where no flag names one, a process begins with the GPU
    of its `number`, modulo the number of GPUs.

    Raises
    ------
    DistributedError
        For a GPU that does not exist, or that this build of MXNet cannot use, and a driver that does not work.
    """
    if config.cpus is not None:
        return [mx.cpu(i) for i in range(config.cpus)]
    if config.gpus is None and config.cuda is False:
        return [mx.cpu(0)]
    num_gpus = _count_visible_gpus()
    reasons = reasons_against_gpus() if num_gpus else {}
    if config.gpus is not None:
        wanted = list(config.gpus)
        flag = "--gpus " + ",".join(map(str, wanted))
    else:
        found = _find_gpus(num_gpus, reasons, None if config.single_gpu else streams, number)
        if found or not (config.cuda or config.single_gpu):
            found = found or [mx.cpu(0)]
            for reason in [*reasons.values(), *_reasons_against_driver(num_gpus)]:
                LOGGER.warning("%s. Going on with %s", reason, found[0])
            return found
        wanted = [0]
        flag = "--cuda" if config.cuda else "--single-gpu"
    missing = [i for i in wanted if i >= num_gpus]
    if missing:
        raise DistributedError(
            f"{flag}: MXNet sees {_count_gpus(num_gpus)} here; "
            + (f"use GPUs 0 to {num_gpus - 1}" if num_gpus else _how_to_go_without_gpu(_reasons_against_driver(0)))
        )
    devices = [mx.gpu(i) for i in wanted]
    for device in devices:
        if not _is_usable(device, reasons):
            raise DistributedError(f"{flag}: {reasons.get(device.device_id) or _cannot_compute(device)}")
    return devices


def _find_gpus(num_gpus: int, reasons: dict[int, str], streams: int | None, number: int) -> list[mx.Context]:
    """The usable GPUs that `resolve_devices` takes where none is named; none if there is none.

    What is found against a GPU is added to `reasons`.
    """
    # The driver tells all processes of a machine the same GPUs that are good, so each gets a different one of them.
    good = [i for i in range(num_gpus) if i not in reasons]
    in_turn = (mx.gpu(good[(number + i) % len(good)]) for i in range(len(good)))
    found: list[mx.Context] = []
    for gpu in in_turn:
        if not _is_usable(gpu, reasons):
            reasons[gpu.device_id] = _cannot_compute(gpu)
            continue
        found.append(gpu)
        if not streams:
            break
    if found and streams and streams % len(found):
        most = max(count for count in range(1, len(found)) if streams % count == 0)
        LOGGER.warning(
            "%d of %d GPUs are used, the most that share %d streams evenly (--batch-size, --small-batch-size); "
            "--gpus names others",
            most,
            len(found),
            streams,
        )
        del found[most:]
    return found


def memory_in_use(devices: Sequence[mx.Context]) -> int | None:
    """Bytes in use, by any process, on the fullest of the GPUs among `devices`; None where there is none."""
    memories = [mx.context.gpu_memory_info(device.device_id) for device in devices if device.device_type == "gpu"]
    return max((total - free for free, total in memories), default=None)


def free_memory(communicator: Communicator) -> int | None:
    """Bytes that are free on the device with the least; of the host's memory, a worker's share. None: not known."""
    devices = communicator.devices
    if devices[0].device_type == "cpu":
        return free_host_memory(workers_sharing_memory(communicator))
    return int(min(mx.context.gpu_memory_info(device.device_id)[0] for device in devices))


def workers_sharing_memory(communicator: Communicator) -> int:
    """How many workers of the run share the memory that `free_memory` looks at."""
    return processes_here() if communicator.size > 1 and communicator.devices[0].device_type == "cpu" else 1


def _number_on_machine(config: DeviceConfig) -> int:
    """Number of this process among those of the run on the same machine; arbitrary if the flags name the devices."""
    if config.horovod and config.cpus is None and config.gpus is None:
        from .horovod import local_rank

        return local_rank()
    return int(os.environ.get(LOCAL_WORKER_VARIABLE, 0))


def resolve_single_device(config: DeviceConfig) -> mx.Context:
    """The one context that a command which does not train runs on.

    Raises
    ------
    DistributedError
        For several devices, or a GPU that does not exist.
    """
    devices = resolve_devices(config)
    if len(devices) > 1:
        raise DistributedError(
            f"{len(devices)} devices are named ({devices[0]} to {devices[-1]}), but this command runs on "
            "one; name one with --gpus N, or leave the flag out"
        )
    return devices[0]


def _is_usable(gpu: mx.Context, reasons: Mapping[int, str]) -> bool:
    if gpu.device_id in reasons:
        return False
    try:
        return float(mx.nd.ones((2,), ctx=gpu).sum().asscalar()) == 2
    except mx.MXNetError:
        return False


def _cannot_compute(gpu: mx.Context) -> str:
    return (
        f"MXNet {mx.__version__} sees {gpu} but cannot compute on it; python -m gluon_lm.doctor says more. Use another "
        "GPU, or --cpus N"
    )


def _count_visible_gpus() -> int:
    try:
        return mx.context.num_gpus()
    except mx.MXNetError as error:
        what = next(iter(re.findall("cudaGetDeviceCount.*|CUDA: .*", str(error))), str(error).strip().splitlines()[-1])
        raise DistributedError(
            f"NVIDIA's driver does not work ({what.strip()}): see what nvidia-smi says, or go on with --cpus N"
        ) from error


def _reasons_against_driver(num_gpus: int) -> list[str]:
    """What keeps an MXNet that is built for CUDA from seeing the GPUs that the driver names."""
    if num_gpus or not mx.runtime.Features().is_enabled("CUDA"):
        return []
    driver = query_driver()
    reason = None if driver is None else too_old_for_mxnet(driver)
    return [] if reason is None else [reason]


def _count_gpus(num_gpus: int) -> str:
    return {0: "no GPU", 1: "one GPU"}.get(num_gpus, f"{num_gpus} GPUs")


def _how_to_go_without_gpu(reasons: Sequence[str]) -> str:
    on_cpu = "use the CPU instead, with --cpus N"
    if reasons:
        return f"{reasons[0]}, or {on_cpu}"
    if not mx.runtime.Features().is_enabled("CUDA"):
        return f"this MXNet is built for the CPU: {FOR_GPUS}, or {on_cpu}"
    return f"check the driver with nvidia-smi, or {on_cpu}"


def _local_kvstore(kind: str) -> Callable[[list[mx.Context], DeviceConfig], Communicator]:
    def create(devices, config):
        return KVStoreCommunicator(devices, kind, config.gcthreshold if config.gctype == "2bit" else None)

    return create


def _nccl(devices: list[mx.Context], config: DeviceConfig) -> Communicator:
    not_gpus = [device for device in devices if device.device_type != "gpu"]
    if not_gpus:
        raise DistributedError(f"--kvstore nccl: joins GPUs only, and there is {not_gpus[0]}; use --kvstore device")
    if not mx.runtime.Features().is_enabled("NCCL"):
        raise DistributedError("--kvstore nccl: this MXNet is built without NCCL; use --kvstore device")
    return KVStoreCommunicator(devices, "nccl")


def _parameter_server(kind: str) -> Callable[[list[mx.Context], DeviceConfig], Communicator]:
    def create(devices, config):
        from .parameter_server import ParameterServer

        return ParameterServer(devices, kind, config.gcthreshold if config.gctype == "2bit" else None)

    return create


def _horovod(devices: list[mx.Context], config: DeviceConfig) -> Communicator:
    from .horovod import HorovodCommunicator

    return HorovodCommunicator(devices, config.gctype, config.gcthreshold)


COMMUNICATORS: dict[str, Callable[[list[mx.Context], DeviceConfig], Communicator]] = {
    "device": _local_kvstore("device"),
    "local": _local_kvstore("local"),
    "nccl": _nccl,
    "dist_sync": _parameter_server("dist_sync"),
    "dist_device_sync": _parameter_server("dist_device_sync"),
    "horovod": _horovod,
}


def create_communicator(config: DeviceConfig, streams: int | None = None) -> Communicator:
    """The devices of this process, and the other workers, joined as the flags say (KVStore ``device`` for several).

    `streams` is that of `resolve_devices`; it is ignored where there are other workers.

    Raises
    ------
    DistributedError
        For a GPU or workers that do not exist, or compression of the gradients of a single device.
    """
    devices = resolve_devices(config, None if config.has_workers else streams, _number_on_machine(config))
    if config.horovod:
        return COMMUNICATORS["horovod"](devices, config)
    if len(devices) > 1 or config.has_workers:
        return COMMUNICATORS[config.kvstore or "device"](devices, config)
    if config.gctype != "none":
        raise DistributedError(
            f"--gctype {config.gctype}: there is one device ({devices[0]}), so no gradients are exchanged "
            "and there is nothing to compress; name several with --gpus 0,1 or --cpus 2"
        )
    if config.kvstore is not None:
        raise DistributedError(
            f"--kvstore {config.kvstore}: there is one device ({devices[0]}), and nothing to sum; name several with "
            "--gpus 0,1 or --cpus 2"
        )
    return SingleDevice(devices)
