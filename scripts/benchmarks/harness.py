"""What the benchmarks share: sizes of models, measurements in processes of their own, rounds of them, and tables.

A *measurement* is a function ``(size, warmup, steps) -> {metric: value}`` at the top level of a module; what it imports
beyond the standard library it imports inside, once the process is prepared. A *case* is a measurement with a label and
an environment. A *benchmark* measures cases in turns and gives tables.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gluon_lm.config import ModelConfig, OptimConfig, resolve

SCRIPTS = Path(__file__).resolve().parents[1]
ROOT = SCRIPTS.parent
VOCAB_SIZE = 33_278  # of WikiText-2
SEED = 1111
PROCESS_TIMEOUT_S = 1800
STEP_TIMEOUT_S = 300  # for each step of a measurement, start-up included


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Size:
    """A model, how it is trained, and how many steps before and while the clock runs give a steady figure."""

    model: ModelConfig
    optim: OptimConfig
    batch_size: int
    bptt: int
    warmup: int = 8
    steps: int = 40
    vocab_size: int = VOCAB_SIZE

    @property
    def description(self) -> str:
        model = self.model
        tied = " tied" if model.tied else ""
        experts = f", {model.num_experts} experts" if model.num_experts else ""
        vocabulary = "" if self.vocab_size == VOCAB_SIZE else f", vocabulary {self.vocab_size:,}"
        return (
            f"{model.model.upper()} {model.num_layers}x{model.hidden_size}{tied}{experts}, "
            f"batch {self.batch_size}, bptt {self.bptt}{vocabulary}"
        )

    def tiny(self) -> Size:
        """The same in kind, and so small that a step takes milliseconds."""
        model = replace(self.model, embed_size=16, hidden_size=16)
        if model.num_experts:
            model = replace(model, num_experts=2, last_hidden_size=6)
        return replace(self, model=model, batch_size=10, bptt=4, warmup=1, steps=2, vocab_size=50)

    def to_json(self) -> str:
        """For `from_json`, in another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Size:
        values = json.loads(text)
        return cls(**{**values, "model": ModelConfig(**values["model"]), "optim": OptimConfig(**values["optim"])})


def lstm(hidden_size: int, dropout: float) -> ModelConfig:
    return ModelConfig(embed_size=hidden_size, hidden_size=hidden_size, tied=True, dropout=dropout)


def of_recipe(name: str, warmup: int, steps: int) -> Size:
    """A recipe's model, with the whole batch at once, in windows of one length."""
    config = resolve(recipe=name).config
    optim = replace(config.optim, max_seq_len_delta=None, small_batch_size=None)
    return Size(config.model, optim, config.training.batch_size, config.training.bptt, warmup, steps)


SIZES = {
    "A": Size(lstm(200, dropout=0.2), OptimConfig(lr=1.0), batch_size=32, bptt=35),
    "A70": Size(lstm(200, dropout=0.2), OptimConfig(lr=1.0), batch_size=20, bptt=70),
    "B": Size(lstm(650, dropout=0.5), OptimConfig(lr=1.0), batch_size=32, bptt=35),
    "C": of_recipe("awd-wikitext-2", warmup=1, steps=3),
    "D": of_recipe("mos-wikitext-2", warmup=1, steps=4),
    "demo": of_recipe("demo", warmup=4, steps=16),
    "openseq2seq": of_recipe("openseq2seq-wikitext-2", warmup=1, steps=4),
}


def zipf_ids(count: int, vocab_size: int = VOCAB_SIZE):
    """`count` word ids, the one of rank r drawn with a probability proportional to 1 / r: an int32 array."""
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, vocab_size + 1))
    draws = np.random.RandomState(SEED).random_sample(count) * cumulative[-1]
    return np.searchsorted(cumulative, draws).clip(max=vocab_size - 1).astype(np.int32)


# ---------------------------------------------------------------- the registry

Benchmark = Callable[[argparse.Namespace], "list[Table]"]


class Registered(NamedTuple):
    """A benchmark, and the sizes that it measures unless others are asked for."""

    run: Benchmark
    sizes: tuple[str, ...]


BENCHMARKS: dict[str, Registered] = {}


def benchmark(name: str, *sizes: str) -> Callable[[Benchmark], Benchmark]:
    """Make a function a benchmark: ``options.sizes`` are the sizes that it is to measure, by default `sizes`."""

    def register(function: Benchmark) -> Benchmark:
        BENCHMARKS[name] = Registered(function, sizes)
        return function

    return register


# ---------------------------------------------------------------- tables


class Metric(NamedTuple):
    """How a measured quantity is shown, and which way is better."""

    heading: str
    digits: int
    more_is_better: bool


METRICS = {
    "tokens_per_second": Metric("tokens/s", 0, True),
    "elements_per_second": Metric("million elements/s", 1, True),
    "seconds": Metric("seconds", 2, False),
    "milliseconds": Metric("ms a step", 1, False),
    "perplexity": Metric("perplexity", 2, False),
    "megabytes": Metric("MB", 1, False),
    "memory_mb": Metric("resident, MB", 1, False),
    "peak_memory_mb": Metric("peak memory, MB", 0, False),
}


@dataclass
class Row:
    """What was measured of one thing: for each metric a value from every round."""

    label: str
    values: dict[str, list[float]]

    def median(self, metric: str) -> float:
        return statistics.median(self.values[metric])


@dataclass
class Table:
    """Rows that are read together.

    Attributes
    ----------
    title : str
    rows : list of Row
    ratio : str
        Heading of a last column, the first row's median of the first metric over the row's; none where it is empty.
    note : str
        A line below the table.
    """

    title: str
    rows: list[Row]
    ratio: str = ""
    note: str = ""

    def markdown(self) -> str:
        metrics = list(dict.fromkeys(metric for row in self.rows for metric in row.values))
        header = ["", *(METRICS[metric].heading for metric in metrics)]
        lines = [[row.label, *(self._shown(row, metric) for metric in metrics)] for row in self.rows]
        if self.ratio:
            header.append(self.ratio)
            for row, line in zip(self.rows, lines):
                line.append(f"{self.rows[0].median(metrics[0]) / row.median(metrics[0]):.2f}")
        divider = ["---", *["---:"] * (len(header) - 1)]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (header, divider, *lines))
        return f"**{self.title}**\n\n{table}\n" + (f"\n{self.note}\n" if self.note else "")

    @staticmethod
    def _shown(row: Row, metric: str) -> str:
        values, digits = row.values.get(metric), METRICS[metric].digits
        if not values:
            return ""
        median = f"{statistics.median(values):,.{digits}f}"
        return median if len(values) == 1 else f"{median} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def note(line: str) -> None:
    """A line for who waits, on standard error."""
    print(line, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- measurements

Measurement = Callable[[Size, int, int], "dict[str, float]"]


@dataclass(frozen=True)
class Case:
    """A measurement under a label.

    Attributes
    ----------
    label : str
    measurement : callable
    environment : dict
        Variables that its process has beside ours.
    model : dict
        Changes to the size's model.
    package : str
        The peer that it measures, which must be installed; empty for our own.
    """

    label: str
    measurement: Measurement
    environment: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    package: str = ""


def python_of(package: str, options: argparse.Namespace) -> str | None:
    """The Python that has a peer: PyTorch's may be one of its own."""
    if package == "torch" and options.torch is not None:
        return options.torch
    return sys.executable if not package or find_spec(package) is not None else None


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with our source tree first, and no allocator setting but `extra`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **extra}


def run_case(case: Case, options: argparse.Namespace, size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Measure a case once, in a process of its own, so that its memory and allocator setting are clean.

    Where it is only to be seen whether all works, in this process.
    """
    size = replace(size, model=replace(size.model, **case.model))
    python = python_of(case.package, options)
    if python is None:
        raise SystemExit(f"{case.label}: {case.package} is not installed here")
    if options.check and python == sys.executable:
        return measure(case.measurement, size, warmup, steps)
    measured = f"{case.measurement.__module__}:{case.measurement.__name__}"
    timeout_s = STEP_TIMEOUT_S * (warmup + steps)
    arguments = (measured, size.to_json(), warmup, steps)
    return in_own_process(measure_named, *arguments, environment=case.environment, python=python, timeout_s=timeout_s)


def in_own_process(
    function: Callable[..., dict[str, Any]],
    *arguments: Any,
    environment: dict[str, str] | None = None,
    python: str = sys.executable,
    timeout_s: float = PROCESS_TIMEOUT_S,
) -> dict[str, Any]:
    """Call a module's function with plain JSON values in a new process; gives the JSON values that it returns."""
    name = f"{function.__module__}:{function.__name__}"
    try:
        done = subprocess.run(
            [python, str(SCRIPTS / "benchmark.py"), "call", name, json.dumps(arguments)],
            env=child_environment(environment or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{name}{arguments}: not done after {timeout_s:g} s") from None
    if done.returncode != 0:
        raise SystemExit(f"{name}{arguments}: ended with {done.returncode}, see above")
    return json.loads(done.stdout.splitlines()[-1])


def answer_call(name: str, arguments: str) -> None:
    """The other side of `in_own_process`: what the function returns is the last line that is printed."""
    print(json.dumps(_named(name)(*json.loads(arguments))))


def _named(name: str) -> Callable[..., dict[str, Any]]:
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def measure_named(measured: str, size: str, warmup: int, steps: int) -> dict[str, Any]:
    return measure(_named(measured), Size.from_json(size), warmup, steps)


def measure(measurement: Measurement, size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Run one measurement in this process; with it, the peak of the process's resident memory."""
    return {**measurement(size, warmup, steps), "peak_memory_mb": peak_memory_mb()}


def run_rounds(
    kind: str,
    cases: list[Case],
    options: argparse.Namespace,
    name: str,
    windows_a_step: int = 1,
    ratio: str | None = None,
) -> Table:
    """Measure cases of one size in turns, `options.rounds` times, so that a change of the machine's speed meets all.

    Each gives ``tokens_per_second``. The table's `ratio` is headed by the first case's label unless given.
    """
    size, warmup, steps = chosen(options, name)
    steps *= windows_a_step
    present = [case for case in cases if (options.peers or not case.package) and python_of(case.package, options)]
    title = f"{kind}, {name}: {size.description}"
    results: list[list[dict[str, Any]]] = [[] for _ in present]
    for n in range(options.rounds):
        for case, of_case in zip(present, results):
            of_case.append(run_case(case, options, size, warmup, steps))
            note(f"{title} {n + 1}/{options.rounds}  {case.label}: {of_case[-1]['tokens_per_second']:,.0f} tokens/s")
    rows = [
        Row(case.label, {metric: [result[metric] for result in of_case] for metric in of_case[0]})
        for case, of_case in zip(present, results)
    ]
    return Table(title, rows, ratio=f"{present[0].label} is faster by" if ratio is None else ratio)


def chosen(options: argparse.Namespace, name: str) -> tuple[Size, int, int]:
    """A size as the options want it, steps before the clock runs, and steps while it does."""
    size = SIZES[name].tiny() if options.check else SIZES[name]
    return size, options.warmup or size.warmup, options.steps or size.steps


def timed_steps(size: Size, warmup: int, steps: int, take: Callable[[int, int], None]) -> dict[str, float]:
    """Take steps 0 to `warmup`, then `steps` more with the clock running; MXNet's work must be done at the end."""
    import mxnet as mx

    take(0, warmup)
    mx.nd.waitall()
    started = time.perf_counter()
    take(warmup, warmup + steps)
    mx.nd.waitall()
    return {"tokens_per_second": steps * size.batch_size * size.bptt / (time.perf_counter() - started)}


def peak_memory_mb() -> float:
    return _status_mb("VmHWM")


def memory_mb() -> float:
    """Resident memory of this process now."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))
