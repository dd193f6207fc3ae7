"""The published tables, row by row: train, evaluate and note the figures, and write them into their pages.

    python scripts/reproduce.py                          # every row: published, kept, what was run here
    python scripts/reproduce.py ptb-2x200-tied-40        # this row, and those that it goes on from
    python scripts/reproduce.py 'ptb-awd-small*'         # all rows of that name, one after the other
    python scripts/reproduce.py --render                 # write the tables into README.md and docs/results.md

Each step of a row is the documented command in a process of its own. Ctrl-C and SIGTERM let it write a checkpoint; the
same call later goes on from there, also after a power cut. The rows are in scripts/reproduce.yaml; a row's figures are
kept with its run, and go into scripts/reproduced.json, from which the tables are made, when the row is done. A finished
run that was trained elsewhere by the row's command counts once its folder lies in --runs under the row's name.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT))  # gluon_lm of this source tree, installed or not

from benchmarks.machine import version_of  # noqa: E402

from gluon_lm.config import resolve  # noqa: E402
from gluon_lm.errors import GluonLMError  # noqa: E402
from gluon_lm.files import atomic_write  # noqa: E402
from gluon_lm.history import RunHistory, duration  # noqa: E402
from gluon_lm.locks import exclusive_lock  # noqa: E402
from gluon_lm.processors import cpu_model  # noqa: E402
from gluon_lm.train import parse_train  # noqa: E402
from gluon_lm.training.run_folder import FINETUNED, RunFolder  # noqa: E402

ROWS = ROOT / "scripts" / "reproduce.yaml"
RESULTS = ROOT / "scripts" / "reproduced.json"
PROGRESS = "reproduced.json"  # in the folder of a run
README, PAGE = ROOT / "README.md", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- reproduced: begin -->", "<!-- reproduced: end -->"
SPLITS = ("valid", "test")
PR_SET_PDEATHSIG = 1
# On a run's figures; a run also has the tokenizer of its corpus.
WITHOUT_EFFECT = {"log_interval", "checkpoint_every", "keep_checkpoints", "gen_word_len", "data_dir", "tokenizer"}
WITHOUT_EFFECT |= {"gpus", "cuda", "single_gpu", "kvstore", "horovod"}


class Problem(Exception):
    """What the user can mend; its text is the one line that is shown."""


@dataclass(frozen=True)
class Row:
    """One row of a published table. The fields are described at the top of reproduce.yaml."""

    name: str
    title: str
    table: str
    train: str | None = None
    finetune: str | None = None
    after: str | None = None
    evaluate: str = "evaluate"
    published: dict[str, float] = field(default_factory=dict)
    source: str = ""
    needs_gpu: bool = False
    note: str = ""


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of a file, by name, checked.

    Raises
    ------
    Problem
        Naming the row and the rule.
    """
    try:
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))
        rows = {name: Row(name=name, **values) for name, values in listed.items()}
    except OSError as error:
        raise Problem(f"--rows {path}: cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, AttributeError, TypeError) as error:
        raise Problem(f"--rows {path}: {error}; see the top of {ROWS.name} for what a row has") from error
    above: set[str] = set()
    for name, row in rows.items():
        if row.after is not None and row.after not in above:
            raise Problem(f"{path}: {name}: after {row.after}: must name a row above it")
        if row.train is None and row.after is None:
            raise Problem(f"{path}: {name}: needs flags to train with, or a row that it comes after")
        if row.finetune is not None and (row.train is not None or row.after is None):
            raise Problem(f"{path}: {name}: finetune goes with after, and without train")
        above.add(name)
    return rows


class Results:
    """What was found out, in a JSON file that is replaced after each step.

    For each row: ``trained`` once its training is done, ``valid`` and ``test`` (perplexities), ``tokens`` (of each
    text), ``vocabulary``, ``seconds``, ``memory_mb`` (peak of training, where the row is about it), ``machine``,
    ``version``, ``finished``.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = self._read()

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        except (OSError, ValueError) as error:
            raise Problem(f"{self._path}: cannot be read ({error}); restore it, or move it away") from error

    def of(self, row: Row) -> dict[str, Any]:
        return self._rows.get(row.name, {})

    def note(self, row: Row, **values: Any) -> None:
        with exclusive_lock(self._path.with_name(f".{self._path.name}.lock"), is_needed=False):
            self._rows = self._read()  # other rows may have come since, from another process
            self._rows[row.name] = {**self.of(row), **values}
            with atomic_write(self._path) as file:
                file.write((json.dumps(self._rows, indent=2) + "\n").encode("utf-8"))


# ---------------------------------------------------------------- commands


def run_folder(row: Row, rows: dict[str, Row], runs: Path) -> Path:
    """The folder of the run that a row trains or evaluates."""
    if row.after is None:
        return runs / row.name
    before = run_folder(rows[row.after], rows, runs)
    return before / FINETUNED if row.finetune is not None else before


def progress(row: Row, rows: dict[str, Row], runs: Path) -> Results:
    """How far a row has come, which is kept with its run: where that is gone, the row has not begun."""
    return Results(run_folder(row, rows, runs) / PROGRESS)


def training_flags(row: Row, rows: dict[str, Row]) -> list[str]:
    """Flags of the one command that equals a run which several rows train one after the other."""
    given: dict[str, list[str]] = {}
    for part in (() if row.after is None else training_flags(rows[row.after], rows), shlex.split(row.train or "")):
        flag = ""
        for word in part:
            if word.startswith("--"):
                flag, given[word] = word, []
            else:
                given[flag].append(word)
    return [word for flag, values in given.items() for word in (flag, *values)]


def training_command(row: Row, folder: Path) -> list[str] | None:
    """The command that brings a row's run to its end from where it stands; None where the row trains nothing."""
    has_checkpoint = bool(RunFolder(folder).saved_checkpoints())  # its links may be missing where it was copied
    if row.finetune is not None:
        begin = "--continue-train" if has_checkpoint else "--overwrite"
        return ["finetune", str(folder.parent), begin, *shlex.split(row.finetune)]
    if row.train is None:
        return None
    flags = shlex.split(row.train)
    if row.after is not None:
        return ["train", "--resume", str(folder), *flags]
    if has_checkpoint:
        return ["train", "--resume", str(folder)]
    return ["train", *flags, "--save", str(folder), *(["--overwrite"] if folder.exists() else [])]


def evaluation_command(row: Row, folder: Path, split: str) -> list[str]:
    """The command that gives a row's figure on a part of the text."""
    name, *flags = shlex.split(row.evaluate)
    part = ["--split", split] if name == "evaluate" else ["--val"] * (split == "valid")
    return [name, str(folder), *flags, *part]


_LIBC = ctypes.CDLL(None) if sys.platform.startswith("linux") else None


def _end_with_parent() -> None:
    """In a process that is about to become a command: have the kernel ask it to end when this script is killed."""
    if _LIBC is not None:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Stopped(Exception):
    """A signal asked to stop."""


class Runner:
    """Runs commands of gluon_lm one at a time, and ends the one that runs when it is told to end itself."""

    def __init__(self) -> None:
        self.stopped: signal.Signals | None = None
        self._process: subprocess.Popen | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stop)

    def _stop(self, number: int, frame: object) -> None:
        self.stopped = signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)  # it writes a checkpoint

    def run(self, command: list[str], flags: list[str], output: int | None = None) -> tuple[str, float]:
        """Run ``python -m gluon_lm.<command>`` to its end; what it wrote to `output`, and its peak memory in MB.

        Raises
        ------
        Stopped
            When a signal came.
        Problem
            When the command failed.
        """
        words = [*command, *flags]
        print(f"\n$ python -m gluon_lm.{shlex.join(words)}", flush=True)
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", f"gluon_lm.{words[0]}", *words[1:]],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=output,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C comes to us alone, and goes on as a SIGTERM
            preexec_fn=_end_with_parent,
        )
        if self.stopped:  # between the line above and here
            process.send_signal(signal.SIGTERM)
        written = "" if process.stdout is None else process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode, self._process = os.waitstatus_to_exitcode(status), None
        if self.stopped:
            raise Stopped
        if process.returncode:
            raise Problem(
                f"python -m gluon_lm.{shlex.join(words)}: ended with {process.returncode}, see above\n{written}"
            )
        return written, usage.ru_maxrss * 1024 / 1e6


# ---------------------------------------------------------------- a row


def reproduce(row: Row, rows: dict[str, Row], options: argparse.Namespace, runner: Runner) -> dict[str, Any]:
    """Do what of a row is not done yet: train, then evaluate the validation text and the test text. Its figures."""
    folder, results = run_folder(row, rows, options.runs), progress(row, rows, options.runs)
    flags = ["--data-dir", str(options.data_dir)] if options.data_dir is not None else []
    if is_done(row, results):
        print(
            f"\n== {row.name}: done, {shown_figures(row, results.of(row))}; to run it anew, move {folder} away",
            flush=True,
        )
        return results.of(row)
    print(f"\n== {row.name}: {row.title}", flush=True)
    if not results.of(row).get("trained"):
        train(row, rows, folder, flags, results, runner)
    only_evaluates = row.train is None and row.finetune is None
    if row.evaluate != "none":
        for split in SPLITS:
            if split not in results.of(row):
                started = time.monotonic()
                written, _ = runner.run(evaluation_command(row, folder, split), flags, subprocess.PIPE)
                print(written, end="", flush=True)
                perplexity, tokens = figures(written, split)
                counted = {**results.of(row).get("tokens", {}), split: tokens}
                results.note(row, **{split: perplexity}, tokens=counted)
                if only_evaluates:
                    results.note(row, seconds=results.of(row).get("seconds", 0.0) + time.monotonic() - started)
    results.note(
        row,
        vocabulary=sum(1 for _ in open(RunFolder(folder).vocabulary, encoding="utf-8")),
        machine=f"{cpu_model()}, {len(os.sched_getaffinity(0))} cores",
        version=f"gluon_lm {version_of('gluon_lm')}{commit()}, mxnet {version_of('mxnet')}",
        finished=time.strftime("%Y-%m-%d"),
    )
    return results.of(row)


def train(row: Row, rows: dict[str, Row], folder: Path, flags: list[str], results: Results, runner: Runner) -> None:
    command = training_command(row, folder)
    if command is not None:
        if "--resume" in command:
            check_is_of_row(row, rows, folder)
        _, memory_mb = runner.run(command, flags)
        results.note(row, seconds=RunHistory(folder).training_seconds)
        if "memory_mb" in row.published:
            results.note(row, memory_mb=memory_mb)
    results.note(row, trained=True)


def check_is_of_row(row: Row, rows: dict[str, Row], folder: Path) -> None:
    """Make sure that a run was begun by the row's command, in what decides its figures, and has not gone beyond it.

    Raises
    ------
    Problem
        Naming what differs.
    """
    wanted = parse_train(training_flags(row, rows)).config
    found = resolve(config_file=RunFolder(folder).config, default_recipe=None).config
    if row.after is not None and found.training.epochs < wanted.training.epochs:  # about to go on
        found = replace(found, training=replace(found.training, epochs=wanted.training.epochs))
    differing = [
        f"{name} {theirs!r} where the row has {ours!r}"
        for section in ("data", "model", "optim", "training", "devices")
        for name, ours in vars(getattr(wanted, section)).items()
        if name not in WITHOUT_EFFECT and ours != (theirs := getattr(getattr(found, section), name))
    ]
    if differing:
        raise Problem(f"{folder}: is not a run of {row.name}: {'; '.join(differing)}; move it away")


def figures(written: str, split: str) -> tuple[float, int]:
    """Perplexity and number of tokens from what `evaluate` or `dynamiceval` printed."""
    found = re.search(rf"^{split} .*perplexity ([\d.]+) .*tokens (\d+)", written, re.MULTILINE)
    if found is None:
        raise Problem(f"no perplexity of the {split} text in what the command printed:\n{written}")
    return float(found[1]), int(found[2])


def commit() -> str:
    """The commit of this source tree, in brackets; nothing where git knows none."""
    asked = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        described = ""
    return f" ({described})" if described else ""


def is_done(row: Row, results: Results) -> bool:
    return "finished" in results.of(row)


def selected(patterns: list[str], rows: dict[str, Row]) -> list[Row]:
    """The rows that the patterns name, each after those that it goes on from."""
    names: list[str] = []

    def add(name: str) -> None:
        if rows[name].after is not None:
            add(rows[name].after)
        if name not in names:
            names.append(name)

    for pattern in patterns:
        matching = fnmatch.filter(rows, pattern)
        if not matching:
            raise Problem(f"{pattern}: matches no row; without a name, all are listed")
        for name in matching:
            add(name)
    return [rows[name] for name in names]


def has_gpu() -> bool:
    asked = [sys.executable, "-c", "import gluon_lm, mxnet; print(mxnet.context.num_gpus())"]
    answer = subprocess.run(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise Problem("MXNet cannot be imported, see above; python -m gluon_lm.doctor says why")
    return int(answer.stdout) > 0


# ---------------------------------------------------------------- tables


def state(row: Row) -> str:
    """Where a row stands that is not done, in words."""
    return "not run: needs a GPU" if row.needs_gpu else "not run"


def shown_figures(row: Row, values: dict[str, Any]) -> str:
    """The figures that a row is about."""
    names = ("memory_mb",) if "memory_mb" in row.published else SPLITS
    return " / ".join(f"{values[name]:.2f}" for name in names if name in values)


def shown_command(row: Row, rows: dict[str, Row]) -> str:
    """What a reader types, RUN being the run folder; a run in several parts is shown as the one that equals it."""
    if row.train is not None:
        return f"python -m gluon_lm.train {shlex.join(training_flags(row, rows))}"
    if row.finetune is not None:
        return f"python -m gluon_lm.finetune RUN {row.finetune}".rstrip()
    name, *flags = shlex.split(row.evaluate)
    is_finetuned = row.after is not None and rows[row.after].finetune is not None
    return f"python -m gluon_lm.{shlex.join([name, f'RUN/{FINETUNED}' if is_finetuned else 'RUN', *flags])}"


def tables(rows: dict[str, Row], results: Results, only_done: bool = False) -> str:
    """The Markdown tables of all rows, or of those that have been run."""
    lines = []
    shown = [row for row in rows.values() if is_done(row, results) or not only_done]
    for heading in dict.fromkeys(row.table for row in shown):
        lines += [f"**{heading}**", ""]
        lines += ["| row | command | published | validation | test | words, test tokens | machine, time |"]
        lines += ["| --- | --- | --- | ---: | ---: | ---: | --- |"]
        lines += [table_line(row, rows, results) for row in shown if row.table == heading]
        lines.append("")
    return "\n".join(lines)


def table_line(row: Row, rows: dict[str, Row], results: Results) -> str:
    found = results.of(row)
    if "memory_mb" in row.published:
        published = f"{row.published['memory_mb']:g} MB"
    else:
        published = " / ".join(f"{row.published[split]:g}" for split in SPLITS if split in row.published)
    if row.source:
        published += f" ({row.source})"
    title = f"`{row.name}`: {row.title}" + (f"; {row.note}" if row.note else "")
    if not is_done(row, results):
        return f"| {title} | `{shown_command(row, rows)}` | {published} | {state(row)} | | | |"
    valid, test = (f"{found[split]:.2f}" if split in found else "" for split in SPLITS)
    if "memory_mb" in row.published:
        test = f"{found['memory_mb']:.0f} MB"
    counts = f"{found['vocabulary']:,}" if "vocabulary" in found else ""
    if "tokens" in found:
        counts += f", {found['tokens']['test']:,}"
    machine = found.get("machine", "") + (f", {duration(found['seconds'])}" if "seconds" in found else "")
    return f"| {title} | `{shown_command(row, rows)}` | {published} | {valid} | **{test}** | {counts} | {machine} |"


def render(page: Path, text: str) -> None:
    """Replace what stands between the two markers of a page."""
    try:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise Problem(f"{page}: cannot be read ({error.strerror}); name another with --readme or --page") from error
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise Problem(f"{page}: needs the line {BEGIN} and below it the line {END}")
    with atomic_write(page) as file:
        file.write(f"{before}{BEGIN}\n{text}\n{END}{after}".encode())


def print_overview(rows: dict[str, Row], results: Results, runs: Path) -> None:
    width = max(map(len, rows))
    print(f"{'row':{width}}  {'published':>17}  {'kept':>17}  here, in {runs}")
    for row in rows.values():
        published, kept = (shown_figures(row, values) for values in (row.published, results.of(row)))
        here = progress(row, rows, runs)
        stands = shown_figures(row, here.of(row)) if is_done(row, here) else "begun" if here.of(row) else state(row)
        print(f"{row.name:{width}}  {published:>17}  {kept:>17}  {stands}".rstrip())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python scripts/reproduce.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("rows_wanted", nargs="*", metavar="ROW", help="rows to run, by name or pattern")
    parser.add_argument("--render", action="store_true", help="write the tables into their pages, after any rows")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/reproduce"), help="run folders (default runs/reproduce)"
    )
    parser.add_argument("--data-dir", type=Path, help="where the corpora lie (default ./data)")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE", help="the rows (default reproduce.yaml)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE", help="the figures (reproduced.json)")
    parser.add_argument(
        "--readme", type=Path, default=README, metavar="FILE", help="for rows that were run (README.md)"
    )
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE", help="for all rows (docs/results.md)")
    options = parser.parse_args(argv)
    try:
        return _main(options)
    except (Problem, GluonLMError) as problem:
        print(problem, file=sys.stderr)
        return 2


def _main(options: argparse.Namespace) -> int:
    rows, results = read_rows(options.rows), Results(options.results)
    if not options.rows_wanted and not options.render:
        print_overview(rows, results, options.runs)
        return 0
    wanted = selected(options.rows_wanted, rows)
    needy = [row.name for row in wanted if row.needs_gpu and not is_done(row, progress(row, rows, options.runs))]
    if needy and not has_gpu():
        raise Problem(f"{', '.join(needy)}: needs a GPU, and MXNet sees none here; name other rows")
    runner = Runner()
    for row in wanted:
        try:
            results.note(row, **reproduce(row, rows, options, runner))
        except Stopped:
            print(f"stopped in {row.name}; the same command goes on with it", flush=True)
            return 128 + runner.stopped
    if options.render:
        render(options.readme, tables(rows, results, only_done=True))
        render(options.page, tables(rows, results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
