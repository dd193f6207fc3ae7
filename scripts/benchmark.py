"""Speed, memory and start-up of gluon_lm, beside peers on the same machine in the same run.

    python scripts/benchmark.py all --json now.json --markdown now.md
    python scripts/benchmark.py all --json now.json --compare before.json    # exit code 1 where something became worse
    python scripts/benchmark.py training --sizes A --rounds 5
    python scripts/benchmark.py training floor --sizes C      # the AWD-LSTM; a step takes many seconds
    python scripts/benchmark.py startup --corpus wikitext-2   # the corpus's files must be in --data-dir
    python scripts/benchmark.py all --check                   # everything once, with tiny models: whether it works

Each measurement is a process of its own, so that memory and allocator settings are clean. The cases take turns, round
after round, so that a change of the machine's speed meets all of them; the tables give medians and ranges.

The peers are gluonnlp's StandardRNN or AWDRNN in the training loop of its word_language_model.py (`bash
scripts/environment.sh peers` installs it) and PyTorch's layers in that of its example, where PyTorch is installed, or
in the Python that --torch names. The text is random, Zipf-distributed words of a vocabulary of WikiText-2's size.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # gluon_lm of this source tree, installed or not

from benchmarks import (  # noqa: E402, F401  (they register)
    amp,
    compression,
    encoding,
    floor,
    generation,
    mixture,
    startup,
    training,
    vocabulary,
)
from benchmarks.flags import positive  # noqa: E402
from benchmarks.harness import BENCHMARKS, ROOT, SIZES, answer_call, note  # noqa: E402
from benchmarks.machine import describe, load_average, machine  # noqa: E402
from benchmarks.report import ReportError, changes, comparison, read_report, to_json, to_markdown  # noqa: E402

from gluon_lm.files import atomic_write  # noqa: E402


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["call"]:  # by `benchmarks.harness.in_own_process`
        answer_call(*argv[1:])
        return 0
    options = parse(argv)
    try:
        earlier = None if options.compare is None else read_report(options.compare)
    except ReportError as error:
        note(f"--compare {error}")
        return 2
    about = machine()
    print(f"{describe(about)} | {load_average()}\n")
    tables, only_sizes = [], options.sizes
    for name in options.benchmarks:
        options.sizes = only_sizes or BENCHMARKS[name].sizes
        for table in BENCHMARKS[name].run(options):
            print(table.markdown(), flush=True)
            tables.append(table)
        if tables:
            about["load_average_at_end"] = machine()["load_average"]
            write_reports(options, about, tables)
    if not tables:  # what could not be measured here has said so
        return 2
    print(f"{load_average()} at the end")
    return 0 if earlier is None else compare(options, about, tables, earlier)


def write_reports(options: argparse.Namespace, about, tables) -> None:
    """Write what has been measured so far: a whole run takes more than an hour."""
    for path, text in (
        (options.json, to_json(about, options.rounds, tables)),
        (options.markdown, to_markdown(about, options.rounds, tables)),
    ):
        if path is not None:
            with atomic_write(path) as file:
                file.write((text.rstrip("\n") + "\n").encode())


def compare(options: argparse.Namespace, about, tables, earlier) -> int:
    """Print what changed since the earlier report; 1 where something is worse, 2 where nothing can be compared."""
    machine_before, tables_before = earlier
    found = changes(tables_before, tables)
    if not found:
        note(f"--compare {options.compare}: has none of the figures that were measured now")
        return 2
    before, now = describe(machine_before), describe(about)
    if before != now:
        note(f"not the same machine or versions, so the figures may differ for that reason:\n  {before}\n  {now}")
    text, worse = comparison(found, options.threshold / 100)
    print(f"\n**Compared with {options.compare}**\n\n{text}")
    for change in worse:
        note(f"worse by {100 * change.worse_by:.1f} % beyond the spreads: {change.what}, {change.metric}")
    return 1 if worse else 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    listed = "; ".join(
        f"{name}: {' '.join((registered.run.__doc__ or '').split())}" for name, registered in BENCHMARKS.items()
    )
    parser.add_argument(
        "benchmarks", nargs="+", choices=["all", *BENCHMARKS], metavar="BENCHMARK", help=f"all, or {listed}"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        metavar="SIZE",
        help="; ".join(f"{name}: {size.description}" for name, size in SIZES.items())
        + "; by default "
        + ", ".join(f"{name} {' '.join(found.sizes)}" for name, found in BENCHMARKS.items() if found.sizes),
    )
    parser.add_argument("--rounds", type=positive, help="how often each case is measured (default 3)")
    parser.add_argument("--steps", type=positive, help="timed training steps (default 40, C: 3, D: 4, memory: 1000)")
    parser.add_argument("--warmup", type=positive, help="steps before the clock runs (default 8, C and D: 1)")
    parser.add_argument("--tokens", type=positive, default=100_000_000, help="words to encode (default 100 million)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours alone")
    parser.add_argument(
        "--torch", metavar="PYTHON", help="a Python that has PyTorch, numpy and PyYAML (default: this one)"
    )
    parser.add_argument("--corpus", help="corpus of the start-up measurement (default: a text made for it)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where --corpus lies (default ./data)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure to FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to FILE")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="compare with FILE, which --json wrote before")
    parser.add_argument(
        "--threshold", type=float, default=5.0, metavar="PERCENT", help="what counts as worse, beyond the spreads (5)"
    )
    parser.add_argument(
        "--check", action="store_true", help="tiny models, one round, mostly in this process: the figures mean nothing"
    )
    options = parser.parse_args(argv)
    options.rounds = options.rounds or (1 if options.check else 3)
    if "all" in options.benchmarks:
        options.benchmarks = list(BENCHMARKS)
    if options.sizes and not any(BENCHMARKS[name].sizes for name in options.benchmarks):
        parser.error(f"--sizes: has no effect on {' '.join(options.benchmarks)}; leave it out")
    for flag, path in (("--json", options.json), ("--markdown", options.markdown)):
        if path is not None and not path.absolute().parent.is_dir():
            parser.error(f"{flag} {path}: {path.absolute().parent} is not a directory; make it, or name another file")
    if options.peers:
        if find_spec("gluonnlp") is None:
            parser.error("gluonnlp is not installed here: run 'bash scripts/environment.sh peers', or give --no-peers")
        if options.torch is not None and shutil.which(options.torch) is None:
            parser.error(f"--torch {options.torch}: is not a program; name a Python that has PyTorch")
        if options.torch is None and find_spec("torch") is None:
            note("PyTorch is not installed here, so it is left out; --torch PYTHON names a Python that has it")
    return options


if __name__ == "__main__":
    sys.exit(main())
