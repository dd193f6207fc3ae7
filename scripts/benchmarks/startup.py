"""Time to the first training step."""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .harness import PROCESS_TIMEOUT_S, VOCAB_SIZE, Row, Table, benchmark, child_environment, note, zipf_ids

WITH_MXNET = "gluon_lm, mxnet"  # gluon_lm supplies what MXNet expects of numpy
WIKITEXT_2_TOKENS = {"train": 2_051_910, "valid": 213_886, "test": 241_211}


def synthetic_text(folder: Path, vocab_size: int, tokens: dict[str, int]) -> Path:
    """A corpus of so many words, of which the training text has each: train.txt, valid.txt and test.txt."""
    folder.mkdir()
    for name, count in tokens.items():
        words = [f"w{i}" for i in zipf_ids(count, vocab_size)]
        if name == "train":
            words += [f"w{i}" for i in range(vocab_size)]
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
    flags = ["--data", corpus, "--data-dir", str(data_dir), "--save", str(run), "--overwrite"]
    flags += ["--recipe", "lm", "--tied", "--cpus", "1"]
    command = [sys.executable, "-m", "gluon_lm.train", *flags]
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


@benchmark("startup")
def run_startup(options: argparse.Namespace) -> list[Table]:
    """Time to the first training step, with the corpus encoded already, beside what importing MXNet takes."""
    imports: dict[str, list[float]] = {WITH_MXNET: [], "gluon_lm": []}
    first_steps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        work = Path(folder)
        data_dir = options.data_dir.resolve() if options.corpus else work
        if options.corpus:
            corpus, shown = options.corpus, options.corpus
        elif options.check:
            tokens = dict.fromkeys(WIKITEXT_2_TOKENS, 3000)
            corpus, shown = str(synthetic_text(work / "text", 50, tokens)), "a tiny text"
        else:
            corpus, shown = str(synthetic_text(work / "text", VOCAB_SIZE, WIKITEXT_2_TOKENS)), "WikiText-2-sized text"
        note("start-up: encoding the corpus once")
        seconds_to_first_step(corpus, data_dir, work)
        for n in range(options.rounds):
            for module, seconds in imports.items():
                seconds.append(seconds_to_import(module))
            first_steps.append(seconds_to_first_step(corpus, data_dir, work))
            note(
                f"start-up {n + 1}/{options.rounds}  import mxnet {imports[WITH_MXNET][-1]:.2f} s, "
                f"first step after {first_steps[-1]:.2f} s"
            )
    beyond = statistics.median(first_steps) - statistics.median(imports[WITH_MXNET])
    rows = [Row(f"python -c 'import {module}'", {"seconds": seconds}) for module, seconds in imports.items()]
    rows += [
        Row("python -m gluon_lm.train, to the end of the first step", {"seconds": first_steps}),
        Row("the same beyond the first of these", {"seconds": [beyond]}),
    ]
    return [Table(f"Start-up, {shown}, cache warm", rows)]
