"""Training in mixed precision, beside float32."""

from __future__ import annotations

import argparse

from .harness import Case, Size, Table, benchmark, note, run_rounds
from .ours import train_ours


def train_in_bfloat16(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return train_ours(size, warmup, steps, amp="bfloat16")


@benchmark("amp", "A", "B", "D")
def run_amp(options: argparse.Namespace) -> list[Table]:
    """Training speed in mixed precision, beside that in float32; where this processor has AVX512-BF16.

    Where it has AMX as well, once more without it.
    """
    from gluon_lm.processors import cpu_flags

    if "avx512_bf16" not in cpu_flags():
        note("amp: this processor lacks AVX512-BF16 (avx512_bf16 in /proc/cpuinfo), so it is left out")
        return []
    cases = [Case("bfloat16", train_in_bfloat16), Case("float32", train_ours)]
    if "amx_bf16" in cpu_flags():
        by_vectors = {"DNNL_MAX_CPU_ISA": "AVX512_CORE_BF16"}
        cases.insert(1, Case("bfloat16 without AMX", train_in_bfloat16, environment=by_vectors))
    return [run_rounds("Mixed precision", cases, options, name) for name in options.sizes]
