"""``python -m gluon_lm.runs DIR``: the runs in a folder, their progress and results."""

from __future__ import annotations

import dataclasses
import json
import sys
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli import CommandParser, Section, as_command
from .config import option, show, switch
from .errors import CheckpointError, ConfigError
from .history import UNTOLD, RunHistory, age, run_folders
from .logs import LOGGER, log_to_terminal

_COLUMNS = ("run", "state", "model", "corpus", "steps", "epoch", "valid ppl", "test ppl", "written")
_NUMBERS = {"steps", "epoch", "valid ppl", "test ppl", "written"}


@dataclasses.dataclass(frozen=True)
class RunsOptions(Section):
    """How they are listed."""

    json: bool = option(False, switch(), "one JSON object instead of a table")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "runs",
        "List the runs in a folder: state, model, corpus, steps, best validation and test perplexity, age.",
        "python -m gluon_lm.runs runs --json",
    )
    parser.add_argument("folder", nargs="?", metavar="DIR", default="runs", help="folder of runs (default: runs)")
    parser.add_section(RunsOptions, "output")
    parsed = parser.parse(argv)
    folder = Path(parsed.arguments.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is not a folder; name one that has runs in it")
    log_to_terminal(parsed.verbosity)
    runs, broken = [], []
    for path in run_folders(folder):
        name = path.relative_to(folder).as_posix() if path != folder else path.resolve().name
        LOGGER.debug("reading %s", path)
        try:
            runs.append({"name": name, **RunHistory(path).summary()})
        except CheckpointError as error:
            broken.append({"name": name, "path": str(path), "problem": str(error)})
    runs.sort(key=lambda run: run["updated"], reverse=True)
    if parsed.build(RunsOptions).json:
        print(json.dumps({"runs": runs, "broken": broken}, indent=1))
        return 0
    for line in _table(runs) if runs else [f"no runs in {folder}"]:
        print(line)
    for run in runs:
        if run["state"] == "failed":
            print(f"{show(run['name'])}: failed ({' '.join((run['reason'] or 'no reason is known').split())})")
    for run in broken:
        print(f"{show(run['name'])}: broken ({run['problem']})")
    return 0


def _table(runs: list[dict[str, Any]]) -> list[str]:
    rows = [_row(run) for run in runs]
    widths = [max(_width(row[i]) for row in [_COLUMNS, *rows]) for i in range(len(_COLUMNS))]

    def padded(name: str, cell: str, width: int) -> str:
        room = " " * (width - _width(cell))
        return room + cell if name in _NUMBERS else cell + room

    return ["  ".join(map(padded, _COLUMNS, row, widths)).rstrip() for row in [_COLUMNS, *rows]]


def _width(cell: str) -> int:
    """Columns of a terminal that a text takes: two for an East Asian wide character."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in cell)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    def figure(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    return (
        show(run["name"]),
        run["state"] + (f" ({run['reason']})" if run["reason"] in ("killed", UNTOLD) else ""),
        run["model"],
        run["corpus"],
        f"{run['steps']:,}",
        f"{run['epoch']}/{run['epochs']}",
        figure(run["best_perplexity"]),
        figure(run["test_perplexity"]),
        f"{age(run['updated'])} ago",
    )


if __name__ == "__main__":
    sys.exit(main())
