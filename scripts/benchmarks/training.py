"""Training and evaluation speed beside the peers, what an unrolled layer costs, and memory over time."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from .harness import (
    SEED,
    Case,
    Row,
    Size,
    Table,
    benchmark,
    chosen,
    memory_mb,
    note,
    peak_memory_mb,
    run_case,
    run_rounds,
    zipf_ids,
)
from .ours import EVALUATION_STREAMS, evaluate_ours, evaluate_ours_exactly, ours_step, train_ours
from .peers import (
    evaluate_gluonnlp,
    evaluate_gluonnlp_set_alike,
    evaluate_torch,
    gluonnlp_cases,
    torch_cases,
    train_gluonnlp,
    train_gluonnlp_set_alike,
    train_torch,
)

MAX_SEQ_LEN_DELTA = 20  # of the windows of random length, as in the recipe awd
NOTED = 10  # looks at the memory in the course of training


@benchmark("training", "A", "B")
def run_training(options: argparse.Namespace) -> list[Table]:
    """Training speed and peak memory."""
    tables = []
    for name in options.sizes:
        cases = [Case("gluon_lm", train_ours), *gluonnlp_cases(train_gluonnlp, train_gluonnlp_set_alike)]
        if not chosen(options, name)[0].model.weight_drop:  # PyTorch has no layer with it
            cases += torch_cases(train_torch)
        tables.append(run_rounds("Training", cases, options, name))
    return tables


@benchmark("evaluation", "A", "B")
def run_evaluation(options: argparse.Namespace) -> list[Table]:
    """Evaluation speed: in pieces side by side as the peers do it, and exact."""
    cases = [
        Case(f"gluon_lm, {EVALUATION_STREAMS} streams", evaluate_ours),
        Case("gluon_lm, one stream (exact)", evaluate_ours_exactly),
        *gluonnlp_cases(evaluate_gluonnlp, evaluate_gluonnlp_set_alike),
        *torch_cases(evaluate_torch),
    ]
    return [run_rounds("Evaluation", cases, options, name, windows_a_step=3) for name in options.sizes]


@benchmark("unrolled", "A")
def run_unrolled(options: argparse.Namespace) -> list[Table]:
    """Training speed of an LSTM that is computed step by step, beside the fused operator's."""
    cases = [
        Case("fused", train_ours),
        Case("unrolled, dropout_candidate 0.3", train_ours, model={"dropout_candidate": 0.3}),
        Case("unrolled, layer_norm", train_ours, model={"layer_norm": True}),
    ]
    return [run_rounds("Training, fused and unrolled", cases, options, name) for name in options.sizes]


def memory_of_ours(size: Size, warmup: int, steps: int, amp: str | None = None) -> dict[str, Any]:
    """Resident memory over steps on windows of random length, noted now and then; the longest is rehearsed first."""
    step = ours_step(size, MAX_SEQ_LEN_DELTA, amp=amp)
    from gluon_lm.data.windows import TrainingWindows

    ids = zipf_ids(100 * size.batch_size * size.bptt, size.vocab_size)
    windows = TrainingWindows(ids, size.batch_size, size.bptt, 0, SEED, max_seq_len_delta=MAX_SEQ_LEN_DELTA)
    trace: list[dict[str, float]] = []

    def look(done: int) -> None:
        trace.append({"steps": done, "memory_mb": memory_mb(), "peak_memory_mb": peak_memory_mb()})
        note(f"{done} steps: {trace[-1]['memory_mb']:,.1f} MB, peak {trace[-1]['peak_memory_mb']:,.1f} MB")

    step.rehearse(windows.longest())
    look(0)
    epochs = (windows.epoch(number) for number in itertools.count())
    text = (epoch.window(i) for epoch in epochs for i in range(len(epoch)))
    for done, window in enumerate(itertools.islice(text, steps), 1):
        step(window, SEED, done)
        if done % max(1, steps // NOTED) == 0:
            look(done)
    return {"trace": trace}


def memory_in_bfloat16(size: Size, warmup: int, steps: int) -> dict[str, Any]:
    return memory_of_ours(size, warmup, steps, amp="bfloat16")


@benchmark("memory", "A70")
def run_memory(options: argparse.Namespace) -> list[Table]:
    """Resident memory in the course of training on windows of random length; in bfloat16 too, where it can be."""
    from gluon_lm.processors import cpu_flags

    cases = [Case("float32", memory_of_ours)]
    if "avx512_bf16" in cpu_flags():
        cases.append(Case("bfloat16", memory_in_bfloat16))
    tables = []
    for name, case in itertools.product(options.sizes, cases):
        size, _, steps = chosen(options, name)
        steps = options.steps or (steps if options.check else 1000)
        trace = run_case(case, options, size, 0, steps)["trace"]
        rows = [
            Row(
                f"{now['steps']} steps" if now["steps"] else "the longest window, rehearsed",
                {metric: [now[metric]] for metric in ("memory_mb", "peak_memory_mb")},
            )
            for now in trace
        ]
        what = f"{size.description}, up to {MAX_SEQ_LEN_DELTA} longer, {case.label}"
        tables.append(Table(f"Memory, {name}: {what}", rows))
    return tables
