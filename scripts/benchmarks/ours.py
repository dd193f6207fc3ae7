"""Our model and training step, made as the commands make them, for every benchmark that measures them."""

from __future__ import annotations

import time
from dataclasses import replace

from gluon_lm.config import Config, DeviceConfig, TrainingConfig

from .harness import SEED, Size, timed_steps, zipf_ids

EVALUATION_STREAMS = 10  # the batch size that the examples evaluate with


def prepare_as_training(
    size: Size, devices: DeviceConfig, max_seq_len_delta: int | None = None, amp: str | None = None
) -> None:
    """What `gluon_lm.train` sets before MXNet is imported."""
    from gluon_lm.runtime import prepare_training

    training = TrainingConfig(batch_size=size.batch_size, bptt=size.bptt, amp=amp or "none")
    optim = replace(size.optim, max_seq_len_delta=max_seq_len_delta)
    prepare_training(Config(model=size.model, optim=optim, training=training, devices=devices))


def ours_model(size: Size, devices: DeviceConfig | None = None):
    """Our model and its communicator, made as `gluon_lm.train` makes them once the process is prepared."""
    from gluon_lm.distributed.devices import create_communicator
    from gluon_lm.models import LanguageModel

    communicator = create_communicator(devices or DeviceConfig(cuda=False))
    model = LanguageModel(size.model, size.vocab_size)
    model.initialize_parameters(SEED, communicator.devices)
    model.hybridize_for_use()
    return model, communicator


def ours_step(
    size: Size, max_seq_len_delta: int | None = None, devices: DeviceConfig | None = None, amp: str | None = None
):
    """Our training step, made as `gluon_lm.train` makes it."""
    devices = devices or DeviceConfig(cuda=False)
    prepare_as_training(size, devices, max_seq_len_delta, amp)
    model, communicator = ours_model(size, devices)
    if amp is not None:
        model.train_in_half_precision(amp)
    from gluon_lm.training.step import TrainingStep

    communicator.broadcast_parameters(list(model.named_parameters().values()))
    return TrainingStep(model, communicator, size.optim)


def train_ours(
    size: Size, warmup: int, steps: int, devices: DeviceConfig | None = None, amp: str | None = None
) -> dict[str, float]:
    step = ours_step(size, devices=devices, amp=amp)
    from gluon_lm.data.windows import Streams

    streams = Streams(zipf_ids((warmup + steps) * size.batch_size * size.bptt, size.vocab_size), size.batch_size, eos=0)

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)

    return timed_steps(size, warmup, steps, take)


def evaluate_ours(size: Size, warmup: int, steps: int, num_streams: int = EVALUATION_STREAMS) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    model, communicator = ours_model(size)
    from gluon_lm.evaluation.static import evaluate

    ids = zipf_ids((warmup + steps) * EVALUATION_STREAMS * size.bptt, size.vocab_size)
    split = warmup * EVALUATION_STREAMS * size.bptt
    device = communicator.devices[0]
    evaluate(model, ids[:split], 0, device, num_streams)
    started = time.perf_counter()
    evaluate(model, ids[split:], 0, device, num_streams)
    return {"tokens_per_second": (len(ids) - split) / (time.perf_counter() - started)}


def evaluate_ours_exactly(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return evaluate_ours(size, warmup, steps, num_streams=1)
