"""Runs everything that is particular to GPUs, on a machine that has one or more, and writes a report.

    python scripts/gpu_check.py --output gpu-report      # report.md and report.json, in less than five minutes
    python scripts/gpu_check.py --cpu 2                  # the same code on CPU contexts, to try the script itself

Correctness: the losses and the updates of a few steps, on each device and on all together over each KVStore, against
one CPU context, in float32 without TF32; then the tests marked ``gpu``. Speed: `gluon_lm.train` with each recipe, on a
text of Zipf-distributed words that is made here, in float32 and float16 and without TF32; and with 1, 2, 4, ... devices
over each KVStore, with 2-bit compression and without. The share of the peak is that of the fastest large matrix product
measured on the same device in the same precision, and counts the matrix products of the model alone.

Each measurement is a process of its own. When the time of all (``--minutes``) is up, the rest is left out, and the
report says so. Exit code: 0, 1 where a check failed, 2 without a GPU that MXNet can use.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gluon_lm import doctor  # noqa: E402
from gluon_lm.config import CELLS, ModelConfig, recipe_names, resolve  # noqa: E402
from gluon_lm.runtime import prepare_process  # noqa: E402

RECIPES = ("lm", "mxnet", "awd", "mos")
MODELS: dict[str, dict[str, Any]] = {
    "lstm": {"model": "lstm", "tied": True},
    "gru": {"model": "gru"},
    "rnn_relu": {"model": "rnn_relu"},
    "awd-lstm": {"model": "awd-lstm", "tied": True},
    "mixture": {"model": "lstm", "tied": True, "num_experts": 3},
    "sampled": {"num_sampled": 20, "tied": True},
    "adaptive": {"cutoffs": (30, 60)},
    "layer-norm": {"layer_norm": True},
}
TOLERANCE = 1e-3  # of an update, in relative L2 distance: float32, summed in another order
Row = dict[str, Any]


class Check:
    """What is measured on, how long it may still take, and what has been found."""

    def __init__(self, options: argparse.Namespace, devices: list[str], work: Path) -> None:
        self.options, self.devices, self.work = options, devices, work
        self.deadline = time.monotonic() + 60 * options.minutes
        self.correctness: list[Row] = []
        self.speed: list[Row] = []
        self.scaling: list[Row] = []
        self.peaks: dict[str, float | None] = {}
        self.left_out: list[str] = []
        self.failed: list[str] = []

    @property
    def on_gpu(self) -> bool:
        return not self.options.cpu

    def flags(self, count: int) -> list[str]:
        """The flags of a command that choose the first devices."""
        if self.options.cpu:
            return ["--cpus", str(count)]
        return ["--gpus", ",".join(device.removeprefix("gpu") for device in self.devices[:count])]

    def run(self, what: str, command: Sequence[object], **environment: str) -> str | None:
        """What a process prints on standard output; None where it failed or there was no time, which is noted."""
        seconds = self.deadline - time.monotonic()
        if seconds < 5:
            self.left_out.append(what)
            return None
        print(f"{what} ...", flush=True)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "GLUON_LM_CACHE": str(self.work / "cache"), **environment}
        try:
            done = subprocess.run(
                [sys.executable, *map(str, command)],
                cwd=self.work,
                env=variables,
                capture_output=True,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            self.left_out.append(f"{what} (not finished in time)")
            return None
        if done.returncode:
            said = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["nothing"]
            self.failed.append(f"{what}: exit code {done.returncode}: {said[-1]}")
            return None
        return done.stdout


# ---------------------------------------------------------------- what a process of its own does


def compare_with_cpu(devices: list[str]) -> list[Row]:
    """A few steps of each model on the devices and on the CPU: how far losses and updates lie apart."""
    prepare_process(len(devices))
    import mxnet as mx

    from gluon_lm.config import DeviceConfig, OptimConfig
    from gluon_lm.data.windows import Streams
    from gluon_lm.distributed.communicator import SingleDevice
    from gluon_lm.distributed.devices import COMMUNICATORS
    from gluon_lm.models import LanguageModel
    from gluon_lm.training.step import TrainingStep

    contexts = [mx.Context(device.rstrip("0123456789"), int(device.lstrip("cpug"))) for device in devices]
    stores = ["device", "local"]
    if contexts[0].device_type == "gpu" and mx.runtime.Features().is_enabled("NCCL"):
        stores.append("nccl")
    together = {f"{len(contexts)} devices, KVStore {kind}": kind for kind in stores if len(contexts) > 1}
    vocab_size, batch_size, bptt, steps = 97, 4 * len(contexts), 7, 4
    ids = np.random.default_rng(1).integers(0, vocab_size, batch_size * (bptt * steps + 1)).astype(np.int32)
    windows = list(Streams(ids, batch_size, eos=0).windows(bptt))[:steps]

    def train(settings, communicator):
        model_config = ModelConfig(embed_size=24, hidden_size=24, dropout=0.0, **settings)
        model = LanguageModel(model_config, vocab_size)
        model.initialize_parameters(3, communicator.devices)
        model.hybridize_for_use()
        before = {name: p.data(communicator.devices[0]).asnumpy() for name, p in model.named_parameters().items()}
        # Four streams at a time wherever they are, because each part of a batch draws a sample of its own.
        optim = OptimConfig(small_batch_size=4 * len(communicator.devices))
        step = TrainingStep(model, communicator, optim)
        losses = [
            step(window, 5, i, upcoming=following).loss_sum
            for i, (window, following) in enumerate(zip(windows, [*windows[1:], None]))
        ]
        after = {name: p.data(communicator.devices[0]).asnumpy() for name, p in model.named_parameters().items()}
        communicator.close()
        return np.array(losses), np.concatenate([(after[name] - before[name]).ravel() for name in sorted(after)])

    rows = []
    for name, settings in MODELS.items():
        losses, update = train(settings, SingleDevice([mx.cpu(0)]))
        others = {str(context): lambda context=context: SingleDevice([context]) for context in contexts}
        for where, kind in together.items():
            others[where] = lambda kind=kind: COMMUNICATORS[kind](contexts, DeviceConfig(kvstore=kind))
        for where, make in others.items():
            own_losses, own_update = train(settings, make())
            row = {
                "model": name,
                "where": where,
                "loss_error": float(np.abs(own_losses / losses - 1).max()),
                "update_error": float(np.linalg.norm(own_update - update) / np.linalg.norm(update)),
            }
            rows.append({**row, "passed": max(row["loss_error"], row["update_error"]) < TOLERANCE})
    return rows


def measure_peak(device: str, dtype: str) -> float:
    """Floating-point operations a second of the largest of a few square matrix products; the fastest counts."""
    import mxnet as mx

    context = mx.Context(device.rstrip("0123456789"), int(device.lstrip("cpug")))
    best = 0.0
    for size in (2048, 4096, 8192) if context.device_type == "gpu" else (512, 1024):
        a, b = (mx.nd.random.normal(shape=(size, size), ctx=context).astype(dtype) for _ in range(2))
        for _ in range(3):
            mx.nd.FullyConnected(a, b, num_hidden=size, no_bias=True).wait_to_read()
            started = time.perf_counter()
            for _ in range(5):
                product = mx.nd.FullyConnected(a, b, num_hidden=size, no_bias=True)
            product.wait_to_read()
            best = max(best, 5 * 2 * size**3 / (time.perf_counter() - started))
    return best


# ---------------------------------------------------------------- what is asked of them


def check_correctness(check: Check) -> None:
    what = "the same updates as the CPU"
    printed = check.run(what, [__file__, "--within", "compare", *check.devices], NVIDIA_TF32_OVERRIDE="0")
    if printed is not None:
        check.correctness = json.loads(printed.splitlines()[-1])
        check.failed += [f"{row['model']} on {row['where']}" for row in check.correctness if not row["passed"]]


def run_gpu_tests(check: Check) -> None:
    what = "the tests marked gpu"
    missing = [name for name in ("pytest", "pytest_timeout", "hypothesis") if not importlib.util.find_spec(name)]
    if not check.on_gpu:
        check.left_out.append(f"{what} (there is no GPU)")
        return
    if missing:
        check.left_out.append(f"{what} (there is no {', '.join(missing)}; pip install 'gluon_lm[test]' has it)")
        return
    command = ["-m", "pytest", "-q", "-m", "gpu", "--rootdir", ROOT, "-p", "no:cacheprovider"]
    printed = check.run(what, [*command, ROOT / "tests" / "distributed"], NVIDIA_TF32_OVERRIDE="0")
    if printed is not None:
        last = printed.strip().splitlines()[-1]
        check.correctness.append({"model": "pytest -m gpu", "where": last, "passed": " passed" in last})


def measure_peaks(check: Check) -> None:
    kinds = {"float32": {}, "float16": {}, "float32, no TF32": {"NVIDIA_TF32_OVERRIDE": "0"}}
    for kind, environment in kinds.items():
        if kind != "float32" and not check.on_gpu:
            continue
        command = [__file__, "--within", "peak", check.devices[0], kind.split(",")[0]]
        printed = check.run(f"the fastest matrix product, {kind}", command, **environment)
        check.peaks[kind] = None if printed is None else float(printed.splitlines()[-1])


def train(check: Check, what: str, recipe: str, count: int, *flags: object) -> Row | None:
    """Speed and last loss of a short run of the train command; None where there is none."""
    run = check.work / f"run-{len(list(check.work.glob('run-*')))}"
    command = ["-m", "gluon_lm.train", "--data", check.work / "text", "--recipe", recipe, "--save", run]
    log_interval = max(1, check.options.steps // 5)
    command += ["--max-steps", check.options.steps, "--log-interval", log_interval, "--gen-word-len", 0]
    printed = check.run(what, [*command, *check.flags(count), *flags])
    found = sorted(check.work.glob(f"{run.name}*/metrics.jsonl"))
    if printed is None or not found:
        return None
    events = [json.loads(line) for line in found[0].read_text(encoding="utf-8").splitlines()]
    lines = [event for event in events if event["event"] == "train"][1:]  # the first has the start in it
    shutil.rmtree(found[0].parent)
    if not lines:
        check.failed.append(f"{what}: took too few steps to be timed")
        return None
    return {
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines),
        "loss": lines[-1]["loss"],
    }


def measure_speed(check: Check) -> None:
    kinds: dict[str, list[str]] = {"float32": []}
    if check.on_gpu:
        kinds |= {"float16": ["--amp", "float16"], "float32, no TF32": ["--no-tf32"]}
    for kind, flags in kinds.items():
        for recipe in check.options.recipes:
            config = resolve(recipe=recipe).config
            row = train(check, f"{recipe}, {kind}", recipe, 1, *flags)
            if row is None:
                continue
            peak = check.peaks.get(kind)
            needed = row["tokens_per_second"] * training_operations(config.model, check.options.vocabulary)
            share = needed / peak if peak else None
            check.speed.append({"recipe": recipe, "precision": kind, **row, "share_of_peak": share})


def measure_scaling(check: Check) -> None:
    """As many streams on each device, so that twice the devices are at best twice as fast."""
    counts = [count for count in (1, 2, 4, 8, 16) if count <= len(check.devices)]
    if len(counts) == 1:
        check.left_out.append("scaling, KVStores and 2-bit compression: there is one device")
        return
    recipe = check.options.recipes[0]
    per_device = resolve(recipe=recipe).config.training.batch_size
    stores = {"device": [], "device, 2-bit": ["--gctype", "2bit"], "local": []}
    if check.on_gpu:
        stores = {"nccl": [], **stores}
    for count in counts:
        for store, flags in stores.items() if count > 1 else [("", [])]:
            joined = ["--kvstore", store.split(",")[0], *flags] if store else []
            what = f"{recipe}, {count} devices" + (f", KVStore {store}" if store else "")
            row = train(check, what, recipe, count, "--batch-size", count * per_device, *joined)
            if row is not None:
                check.scaling.append({"devices": count, "kvstore": store or "none", **row})
    alone = next((row["tokens_per_second"] for row in check.scaling if row["devices"] == 1), None)
    for row in check.scaling:
        row["times_one_device"] = row["tokens_per_second"] / alone if alone else None


def training_operations(model: ModelConfig, vocab_size: int) -> int:
    """Floating-point operations of all matrix products for one word: two a product, once forwards, twice backwards."""
    products, inputs, experts = 0, model.embed_size, model.num_experts or 1
    for width in model.layer_sizes:
        products += CELLS[model.cell].gates * width * (inputs + width)
        inputs = width
    if model.num_experts:
        products += inputs * experts * (model.embed_size + 1)
        inputs = model.embed_size
    return 6 * (products + experts * inputs * vocab_size)


# ---------------------------------------------------------------- the report


def write_text(folder: Path, num_words: int, vocab_size: int) -> None:
    """Lines of twenty words that occur as often as Zipf's law has it, each of them at least once."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    chances = 1 / np.arange(1, vocab_size + 1)
    drawn = rng.choice(vocab_size, num_words, p=chances / chances.sum())
    for split, ids in (
        ("train", np.concatenate([np.arange(vocab_size), drawn])),
        ("valid", drawn[:400]),
        ("test", drawn[:400]),
    ):
        lines = [" ".join(f"w{word}" for word in ids[start : start + 20]) for start in range(0, len(ids), 20)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def to_markdown(report: dict[str, Any]) -> str:
    machine = report["machine"]
    where = ", ".join(report["devices"])
    title = "GPU check" if report["on_gpu"] else "The GPU check's code on CPU contexts (nothing here ran on a GPU)"
    gpus = [f"{gpu['name']} ({'.'.join(map(str, gpu['compute_capability']))})" for gpu in machine["gpus"]["devices"]]
    lines = [
        f"# {title}",
        "",
        f"{where}; {', '.join(gpus) or 'no GPU'}; {machine['cpu']['model']}; "
        f"{', '.join(f'{name} {version}' for name, version in machine['mxnet']['packages'].items())}, "
        f"Python {machine['python']['version']}, numpy {machine['numpy']}, gluon_lm {machine['gluon_lm']}; "
        f"{report['seconds']:.0f} s",
        "",
        "**Failed:** " + "; ".join(report["failed"]) if report["failed"] else "All checks that ran passed.",
    ]
    if report["left_out"]:
        lines += ["", "Left out: " + "; ".join(report["left_out"]) + "."]
    peaks = [f"{kind} {peak / 1e12:.3g} TFLOP/s" for kind, peak in report["peaks"].items() if peak]
    lines += ["", "Fastest matrix product: " + (", ".join(peaks) or "not measured") + "."]
    tables = {
        "Correctness (relative distance from one CPU context, float32)": report["correctness"],
        "Speed": report["speed"],
        "Several devices": report["scaling"],
    }
    for heading, rows in tables.items():
        if rows:
            columns = list(rows[0])
            lines += ["", f"## {heading}", "", "| " + " | ".join(columns).replace("_", " ") + " |"]
            lines += ["|" + "---|" * len(columns)]
            lines += ["| " + " | ".join(_show(row.get(column)) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _show(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "" if value is None else str(value)


def usable_devices(options: argparse.Namespace, machine: dict[str, Any]) -> list[str]:
    """The devices to check, as ``gpu0``; one line and exit code 2 where there are none."""
    if machine["errors"]:
        raise SystemExit(_refuse(machine["errors"][0]))
    if options.cpu:
        return [f"cpu{i}" for i in range(options.cpu)]
    gpus = machine["gpus"]["devices"]
    usable = [f"gpu{gpu['index']}" for gpu in gpus if gpu["machine_code"] is not False]
    if not usable:
        raise SystemExit(_refuse(gpus[0]["advice"] if gpus else "there is no GPU here"))
    if "CUDA" not in machine["mxnet"]["features"]:
        raise SystemExit(_refuse("this MXNet is built for the CPU; pip install 'gluon_lm[cu112]' has the one for GPUs"))
    return usable


def _refuse(reason: str) -> int:
    print(f"error: {reason}; to try this script without a GPU: --cpu 2", file=sys.stderr)
    return 2


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu-report"), metavar="FOLDER", help="(gpu-report)")
    parser.add_argument("--cpu", type=int, default=0, metavar="N", help="check N CPU contexts in place of the GPUs")
    parser.add_argument("--minutes", type=float, default=4.8, help="time for all (4.8)")
    parser.add_argument(
        "--recipes",
        nargs="+",
        choices=recipe_names(),
        default=RECIPES,
        metavar="NAME",
        help=f"({' '.join(RECIPES)})",
    )
    parser.add_argument("--steps", type=int, default=100, help="of each training run (100)")
    parser.add_argument("--vocabulary", type=int, default=10000, help="words in the text (10000)")
    parser.add_argument("--within", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.within:
        task, *arguments = options.within
        print(json.dumps(compare_with_cpu(arguments)) if task == "compare" else measure_peak(*arguments))
        return 0
    started = time.monotonic()
    machine = doctor.examine(options.output)
    devices = usable_devices(options, machine)
    with tempfile.TemporaryDirectory(prefix="gluon_lm-gpu-check-") as folder:
        check = Check(options, devices, Path(folder))
        write_text(check.work / "text", 200 * options.vocabulary, options.vocabulary)
        for part in (check_correctness, run_gpu_tests, measure_peaks, measure_speed, measure_scaling):
            part(check)
    report = {
        "machine": machine,
        "devices": devices,
        "on_gpu": check.on_gpu,
        "seconds": time.monotonic() - started,
        **{name: getattr(check, name) for name in ("failed", "left_out", "peaks", "correctness", "speed", "scaling")},
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    text = to_markdown(report)
    (options.output / "report.md").write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.output}")
    return 1 if report["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
