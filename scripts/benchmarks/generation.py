"""Words a second of text that is written."""

from __future__ import annotations

import argparse
import time

from .harness import Case, Size, Table, benchmark, run_rounds
from .ours import ours_model

GENERATED_TEXTS = 64


def generate_ours(size: Size, warmup: int, steps: int, num_samples: int = GENERATED_TEXTS) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process(own_layers=True)
    model, communicator = ours_model(size)
    from gluon_lm.data import Vocabulary
    from gluon_lm.generation.generator import generate
    from gluon_lm.prediction import ModelPredictor

    vocabulary = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(size.vocab_size - 2))))
    predictor = ModelPredictor(model, vocabulary, "whitespace", communicator.devices[0])
    words = generate(predictor, warmup + steps, num_samples=num_samples)
    for _ in range(warmup):
        next(words)
    started = time.perf_counter()
    for _ in words:
        pass
    return {"tokens_per_second": steps * num_samples / (time.perf_counter() - started)}


def generate_one_text(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return generate_ours(size, warmup, steps, num_samples=1)


@benchmark("generation", "A")
def run_generation(options: argparse.Namespace) -> list[Table]:
    """Words a second of text that is written."""
    cases = [Case(f"{GENERATED_TEXTS} texts side by side", generate_ours), Case("one text", generate_one_text)]
    return [run_rounds("Generation", cases, options, name, windows_a_step=4) for name in options.sizes]
