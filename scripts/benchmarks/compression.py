"""Gradients in two bits: the codec by itself, and what compression costs a training step on one machine."""

from __future__ import annotations

import argparse
import time

from gluon_lm.config import DeviceConfig

from .harness import SEED, Case, Row, Size, Table, benchmark, chosen, note, run_case, run_rounds
from .ours import train_ours

RANKS = 2  # whose gradients are added up
CALIBRATION_STEPS = 20  # MXNet's compression begins after them (gluon_lm.distributed.compression)


def encode_and_decode(size: Size, warmup: int, steps: int) -> dict[str, float]:
    """Our codec on gradients of the model's shapes: elements a second, and megabytes that a rank sends."""
    from gluon_lm.runtime import prepare_process

    prepare_process()
    import mxnet as mx
    import numpy as np

    from gluon_lm.distributed.codec import TwoBitCodec
    from gluon_lm.models import LanguageModel

    shapes = [p.shape for p in LanguageModel(size.model, size.vocab_size).named_parameters().values()]
    rng = np.random.RandomState(SEED)
    gradients = [mx.nd.array(rng.normal(size=shape).astype(np.float32)) for shape in shapes]
    codec = TwoBitCodec([gradient.size for gradient in gradients], [2.0] * len(gradients), mx.cpu())
    seconds = {"encode": 0.0, "decode": 0.0}
    for i in range(warmup + steps):
        started = time.perf_counter()
        sent_B = codec.encode(gradients)
        sent_B.wait_to_read()
        encoded = time.perf_counter()
        codec.decode(mx.nd.stack(*[sent_B] * RANKS), gradients)
        mx.nd.waitall()
        if i >= warmup:
            seconds["encode"] += encoded - started
            seconds["decode"] += time.perf_counter() - encoded
    millions = steps * sum(gradient.size for gradient in gradients) / 1e6
    speeds = {way: millions / of_way for way, of_way in seconds.items()}
    return {**speeds, "sent_megabytes": sent_B.size / 1e6, "plain_megabytes": millions / steps * 4}


def train_on_two(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return train_ours(size, warmup, steps, DeviceConfig(cpus=RANKS))


def train_on_two_compressed(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return train_ours(size, warmup + CALIBRATION_STEPS, steps, DeviceConfig(cpus=RANKS, gctype="2bit"))


@benchmark("compression", "A")
def run_compression(options: argparse.Namespace) -> list[Table]:
    """The 2-bit codec's speed and size, and training on two CPU contexts with MXNet's compression and without."""
    tables = []
    cases = [Case("plain", train_on_two), Case("2-bit", train_on_two_compressed)]
    for name in options.sizes:
        size, warmup, steps = chosen(options, name)
        found = [
            run_case(Case("codec", encode_and_decode), options, size, warmup, steps) for _ in range(options.rounds)
        ]
        note(f"2-bit codec, {name}: {found[-1]['encode']:,.0f} million elements/s encoded")
        rows = [
            Row("encode one rank", {"elements_per_second": [each["encode"] for each in found]}),
            Row(f"decode {RANKS} ranks", {"elements_per_second": [each["decode"] for each in found]}),
            Row("a rank's gradients in two bits", {"megabytes": [found[0]["sent_megabytes"]]}),
            Row("the same in float32", {"megabytes": [found[0]["plain_megabytes"]]}),
        ]
        tables.append(Table(f"2-bit codec, {name}: {size.description}", rows))
        tables.append(run_rounds(f"Training on {RANKS} CPU contexts", cases, options, name))
    return tables
