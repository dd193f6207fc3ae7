"""Speed, memory and start-up of gluon_lm, beside a peer on the same machine in the same run.

    python scripts/benchmark.py training                      # every size, with start-up
    python scripts/benchmark.py training --sizes A --rounds 5 --json result.json
    python scripts/benchmark.py startup --corpus wikitext-2   # the corpus's files must be in --data-dir

Each measurement is a process of its own, so that memory and allocator settings are clean. The cases take
turns, round after round, so that a change of the machine's speed meets all of them; the tables give medians
and ranges over the rounds.

The peer is gluonnlp's StandardRNN in the training loop of its tutorial (`bash scripts/environment.sh peers`
installs it). The text is random, Zipf-distributed words of a WikiText-2-sized vocabulary.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 33_278
SEED = 1111
PROCESS_TIMEOUT_S = 1800

# The allocator part of `gluon_lm.runtime.prepare_process`, in the form that any program on glibc takes.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True)
class Size:
    """A model and how it is trained."""

    hidden_size: int
    dropout: float
    num_layers: int = 2
    batch_size: int = 32
    bptt: int = 35
    lr: float = 1.0
    clip_norm: float = 0.25

    @property
    def description(self) -> str:
        return f"LSTM {self.num_layers}x{self.hidden_size} tied, batch {self.batch_size}, bptt {self.bptt}"


SIZES = {"A": Size(hidden_size=200, dropout=0.2), "B": Size(hidden_size=650, dropout=0.5)}
EVALUATION_STREAMS = 10  # the batch size that the peer evaluates with


# ---------------------------------------------------------------- measurements, each in a process of its own


def zipf_ids(count: int):
    """`count` word ids, the one of rank r drawn with a probability proportional to 1 / r: an int32 array."""
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, VOCAB_SIZE + 1))
    draws = np.random.RandomState(SEED).random_sample(count) * cumulative[-1]
    return np.searchsorted(cumulative, draws).clip(max=VOCAB_SIZE - 1).astype(np.int32)


def ours_model(size: Size):
    """Our model and its communicator, made as `gluon_lm.train` makes them."""
    from gluon_lm.runtime import prepare_process

    prepare_process()
    from gluon_lm.config import DeviceConfig, ModelConfig
    from gluon_lm.distributed import create_communicator
    from gluon_lm.models import LanguageModel

    communicator = create_communicator(DeviceConfig(cuda=False))
    model = LanguageModel(
        ModelConfig(
            model="lstm",
            embed_size=size.hidden_size,
            hidden_size=size.hidden_size,
            num_layers=size.num_layers,
            tied=True,
            dropout=size.dropout,
        ),
        VOCAB_SIZE,
    )
    model.initialize_parameters(SEED, communicator.devices)
    model.hybridize_for_use()
    return model, communicator


def train_ours(size: Size, warmup: int, steps: int) -> dict[str, float]:
    model, communicator = ours_model(size)
    from gluon_lm.config import OptimConfig
    from gluon_lm.data.windows import Streams
    from gluon_lm.optim.optimizers import create_optimizer
    from gluon_lm.training.step import TrainingStep

    streams = Streams(zipf_ids((warmup + steps) * size.batch_size * size.bptt), size.batch_size, eos=0)
    optimizer = create_optimizer(OptimConfig(lr=size.lr, clip_norm=size.clip_norm))
    step = TrainingStep(model, optimizer, communicator, size.clip_norm)
    communicator.broadcast_parameters(list(model.named_parameters().values()))

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)

    return timed_steps(size, warmup, steps, take)


def evaluate_ours(size: Size, warmup: int, steps: int, num_streams: int = EVALUATION_STREAMS) -> dict[str, float]:
    model, communicator = ours_model(size)
    from gluon_lm.evaluation.static import evaluate

    ids = zipf_ids((warmup + steps) * EVALUATION_STREAMS * size.bptt)
    split = warmup * EVALUATION_STREAMS * size.bptt
    device = communicator.devices[0]
    evaluate(model, ids[:split], 0, device, num_streams)
    started = time.perf_counter()
    evaluate(model, ids[split:], 0, device, num_streams)
    return {"tokens_per_second": (len(ids) - split) / (time.perf_counter() - started)}


def evaluate_ours_exactly(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return evaluate_ours(size, warmup, steps, num_streams=1)


def peer_model(size: Size, train: bool):
    """The peer's model, initialised and compiled as its word_language_model.py does it."""
    import gluonnlp as nlp
    import mxnet as mx

    mx.random.seed(SEED)
    models = nlp.model.train if train else nlp.model
    model = models.StandardRNN(
        "lstm", VOCAB_SIZE, size.hidden_size, size.hidden_size, size.num_layers, size.dropout, True
    )
    model.initialize(mx.init.Xavier(), ctx=mx.cpu())
    if train:
        model.hybridize(static_alloc=True)
    return model


def peer_batches(size: Size, batch_size: int, windows: int):
    """Word ids as the peer's batchify gives them: an NDArray of shape (rows, batch_size)."""
    import mxnet as mx

    rows = windows * size.bptt + 1
    return mx.nd.array(zipf_ids(rows * batch_size).reshape(batch_size, rows).T)


def train_peer(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import mxnet as mx
    from mxnet import autograd, gluon

    model = peer_model(size, train=True)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    trainer = gluon.Trainer(model.collect_params(), "sgd", {"learning_rate": size.lr, "momentum": 0, "wd": 0})
    parameters = model.collect_params().values()
    ids = peer_batches(size, size.batch_size, warmup + steps)
    hidden = model.begin_state(batch_size=size.batch_size, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            tokens, targets = ids[i : i + size.bptt], ids[i + 1 : i + 1 + size.bptt]
            hidden = [state.detach() for state in hidden]
            with autograd.record():
                output, hidden, *_ = model(tokens, hidden)
                mean_loss = loss(output.reshape(-3, -1), targets.reshape(-1)) / tokens.size
            mean_loss.backward()
            gluon.utils.clip_global_norm([parameter.grad(mx.cpu()) for parameter in parameters], size.clip_norm)
            trainer.step(1)
            mx.nd.sum(mean_loss).asscalar()

    return timed_steps(size, warmup, steps, take)


def evaluate_peer(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import mxnet as mx
    from mxnet import gluon

    model = peer_model(size, train=False)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    ids = peer_batches(size, EVALUATION_STREAMS, warmup + steps)
    hidden = model.begin_state(batch_size=EVALUATION_STREAMS, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            output, hidden = model(ids[i : i + size.bptt], hidden)
            hidden = [state.detach() for state in hidden]
            losses = loss(output.reshape(-3, -1), ids[i + 1 : i + 1 + size.bptt].reshape(-1))
            mx.nd.sum(losses).asscalar()

    take(0, warmup)
    started = time.perf_counter()
    take(warmup, warmup + steps)
    return {"tokens_per_second": steps * EVALUATION_STREAMS * size.bptt / (time.perf_counter() - started)}


def train_peer_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return train_peer(size, warmup, steps)


def evaluate_peer_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return evaluate_peer(size, warmup, steps)


def timed_steps(size: Size, warmup: int, steps: int, take: Callable[[int, int], None]) -> dict[str, float]:
    """Take `warmup` steps, then `steps` with the clock running."""
    import mxnet as mx

    take(0, warmup)
    mx.nd.waitall()
    started = time.perf_counter()
    take(warmup, warmup + steps)
    mx.nd.waitall()
    return {"tokens_per_second": steps * size.batch_size * size.bptt / (time.perf_counter() - started)}


MEASUREMENTS = {
    function.__name__: function
    for function in (
        train_ours,
        train_peer,
        train_peer_set_alike,
        evaluate_ours,
        evaluate_ours_exactly,
        evaluate_peer,
        evaluate_peer_set_alike,
    )
}


def measure(name: str, size: str, warmup: int, steps: int) -> dict[str, float]:
    """Run one measurement in this process; with it, the peak of the process's resident memory."""
    result = MEASUREMENTS[name](SIZES[size], warmup, steps)
    return {**result, "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000}


# ---------------------------------------------------------------- cases and rounds


@dataclass
class Case:
    """A measurement under an environment, and what it gave."""

    label: str
    measurement: str
    environment: dict[str, str] = field(default_factory=dict)
    results: list[dict[str, float]] = field(default_factory=list)

    @property
    def is_peer(self) -> bool:
        return "_peer" in self.measurement

    def values(self, metric: str) -> list[float]:
        return [result[metric] for result in self.results]

    def median(self, metric: str) -> float:
        return statistics.median(self.values(metric))


def peer_cases(measurement: str) -> list[Case]:
    """The peer as published, with our allocator setting, and with all that our commands set."""
    return [
        Case("gluonnlp, as published", measurement),
        Case("gluonnlp, our allocator setting", measurement, ALLOCATOR),
        Case("gluonnlp, our allocator and thread settings", f"{measurement}_set_alike"),
    ]


def training_cases() -> list[Case]:
    return [Case("gluon_lm", "train_ours"), *peer_cases("train_peer")]


def evaluation_cases() -> list[Case]:
    return [
        Case(f"gluon_lm, {EVALUATION_STREAMS} streams", "evaluate_ours"),
        Case("gluon_lm, one stream (exact)", "evaluate_ours_exactly"),
        *peer_cases("evaluate_peer"),
    ]


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with our source tree first, and no allocator setting but `extra`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **extra}


def run_case(case: Case, size: str, warmup: int, steps: int) -> None:
    """Measure `case` once more, in a new process."""
    command = [sys.executable, __file__, "measure", case.measurement, size, str(warmup), str(steps)]
    done = subprocess.run(
        command,
        env=child_environment(case.environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{case.label}: {case.measurement} ended with {done.returncode}\n{done.stderr}")
    case.results.append(json.loads(done.stdout.splitlines()[-1]))


def run_rounds(title: str, cases: list[Case], options: argparse.Namespace, size: str, steps: int) -> dict[str, Any]:
    """Measure all cases in turn, `options.rounds` times, and print their table."""
    cases = [case for case in cases if options.peers or not case.is_peer]
    for n in range(options.rounds):
        for case in cases:
            run_case(case, size, options.warmup, steps)
            note(
                f"{title} {n + 1}/{options.rounds}  {case.label}: {case.results[-1]['tokens_per_second']:,.0f} tokens/s"
            )
    ours = cases[0].median("tokens_per_second")
    rows = [
        [
            case.label,
            spread(case.values("tokens_per_second")),
            spread(case.values("peak_memory_mb")),
            f"{ours / case.median('tokens_per_second'):.2f}",
        ]
        for case in cases
    ]
    print_table(title, ["", "tokens/s (range)", "peak memory, MB (range)", f"{cases[0].label} is faster by"], rows)
    return {"title": title, "cases": [asdict(case) for case in cases]}


# ---------------------------------------------------------------- start-up


def synthetic_text(folder: Path) -> Path:
    """A corpus as large as WikiText-2 in words and vocabulary: train.txt, valid.txt and test.txt."""
    folder.mkdir()
    for name, count in (("train", 2_051_910), ("valid", 213_886), ("test", 241_211)):
        words = [f"w{i}" for i in zipf_ids(count)]
        if name == "train":
            words += [f"w{i}" for i in range(VOCAB_SIZE)]
        lines = (" ".join(words[i : i + 56]) for i in range(0, len(words), 56))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def seconds_to_import(module: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=child_environment({}),
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=PROCESS_TIMEOUT_S,
    )
    return time.perf_counter() - started


def seconds_to_first_step(corpus: str, data_dir: Path, work: Path) -> float:
    """From the start of the training command to the end of its first step, as its metrics.jsonl has it."""
    run = work / "run"
    command = [
        sys.executable,
        "-m",
        "gluon_lm.train",
        "--data",
        corpus,
        "--data-dir",
        str(data_dir),
        "--save",
        str(run),
        "--overwrite",
        "--recipe",
        "lm",
        "--tied",
        "--cpus",
        "1",
    ]
    (run / "metrics.jsonl").unlink(missing_ok=True)
    log = work / "log.txt"
    with open(log, "w", encoding="utf-8") as output:
        started = time.time()
        process = subprocess.Popen(
            command,
            env=child_environment({}),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = started + PROCESS_TIMEOUT_S
        while time.time() < deadline and process.poll() is None:
            first = first_step_time(run / "metrics.jsonl")
            if first is not None:
                return first - started
            time.sleep(0.05)
        raise SystemExit(f"{' '.join(command)} took no step:\n{log.read_text(encoding='utf-8')}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def first_step_time(metrics: Path) -> float | None:
    if not metrics.is_file():
        return None
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["event"] == "first_step":
            return json.loads(line)["time"]
    return None


def run_startup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first training step, with the corpus encoded already, beside what importing MXNet takes."""
    imports: dict[str, list[float]] = {"mxnet": [], "gluon_lm": []}
    first_steps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        work = Path(folder)
        data_dir = options.data_dir.resolve() if options.corpus else work
        corpus = options.corpus or str(synthetic_text(work / "text"))
        note("start-up: encoding the corpus once")
        seconds_to_first_step(corpus, data_dir, work)
        for n in range(options.rounds):
            for module, seconds in imports.items():
                seconds.append(seconds_to_import(module))
            first_steps.append(seconds_to_first_step(corpus, data_dir, work))
            note(
                f"start-up {n + 1}/{options.rounds}  import mxnet {imports['mxnet'][-1]:.2f} s, "
                f"first step after {first_steps[-1]:.2f} s"
            )
    beyond = statistics.median(first_steps) - statistics.median(imports["mxnet"])
    rows = [[f"python -c 'import {module}'", spread(seconds, 2)] for module, seconds in imports.items()]
    rows += [
        ["python -m gluon_lm.train, to the end of the first step", spread(first_steps, 2)],
        ["the same beyond import mxnet", f"{beyond:.2f}"],
    ]
    title = f"Start-up, {options.corpus or 'WikiText-2-sized text'}, cache warm"
    print_table(title, ["", "seconds (range)"], rows)
    return [{"title": title, "imports": imports, "first_step": first_steps, "beyond_mxnet": beyond}]


def run_training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Training and evaluation speed, peak memory, and start-up."""
    if options.peers and find_spec("gluonnlp") is None:
        note("gluonnlp is not installed here: run 'bash scripts/environment.sh peers', or give --no-peers")
        raise SystemExit(2)
    results = []
    for size in options.sizes:
        description = SIZES[size].description
        results.append(run_rounds(f"Training, {size}: {description}", training_cases(), options, size, options.steps))
        results.append(
            run_rounds(f"Evaluation, {size}: {description}", evaluation_cases(), options, size, 3 * options.steps)
        )
    return results + run_startup(options)


BENCHMARKS = {"training": run_training, "startup": run_startup}


# ---------------------------------------------------------------- reporting


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n**{title}**\n")
    for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    packages = ("gluon_lm", "mxnet", "numpy", "gluonnlp")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"Python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "thread_settings": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
        "load_average": os.getloadavg(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["measure"]:
        name, size, warmup, steps = argv[1:]
        print(json.dumps(measure(name, size, int(warmup), int(steps))))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        default=list(SIZES),
        help="; ".join(f"{name}: {size.description}" for name, size in SIZES.items()),
    )
    parser.add_argument("--rounds", type=positive, default=3, help="how often each case is measured (default 3)")
    parser.add_argument("--steps", type=positive, default=40, help="timed training steps (default 40)")
    parser.add_argument("--warmup", type=positive, default=8, help="steps before the clock runs (default 8)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours alone")
    parser.add_argument("--corpus", help="corpus of the start-up measurement (default: a text made for it)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where --corpus lies (default ./data)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    options = parser.parse_args(argv)

    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['cpu']}, {about['cores']} cores | {versions} | {load_average()}")
    results = BENCHMARKS[options.benchmark](options)
    print(f"{load_average()} at the end")
    if options.json is not None:
        report = {
            "machine": about,
            "load_average_at_end": os.getloadavg(),
            "rounds": options.rounds,
            "steps": options.steps,
            "warmup": options.warmup,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def load_average() -> str:
    return f"load average {', '.join(f'{value:.2f}' for value in os.getloadavg())}"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
