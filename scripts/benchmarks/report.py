"""Reports of benchmarks: JSON and Markdown, and what became slower since an earlier one."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from .harness import METRICS, Row, Table
from .machine import describe


def to_json(about: dict[str, Any], rounds: int, tables: list[Table]) -> str:
    return json.dumps({"machine": about, "rounds": rounds, "tables": [asdict(table) for table in tables]}, indent=2)


def to_markdown(about: dict[str, Any], rounds: int, tables: list[Table]) -> str:
    """The tables below a line that says where and with what they were measured."""
    loads = "; ".join(
        f"load average {when} {', '.join(f'{value:.2f}' for value in about[name])}"
        for when, name in (("at the start", "load_average"), ("at the end", "load_average_at_end"))
        if name in about
    )
    medians = f"Medians (and ranges) of {rounds} rounds" if rounds > 1 else "One round"
    head = f"{describe(about)}\n\n{medians}; {about['started']}; {loads}.\n"
    return "\n".join([head, *(table.markdown() for table in tables)])


class ReportError(ValueError):
    """A file that is no report of ours."""


def read_report(path: Path) -> tuple[dict[str, Any], list[Table]]:
    """A report that `to_json` wrote: its machine and its tables.

    Raises
    ------
    ReportError
        For any other file.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        tables = [Table(**{**table, "rows": [Row(**row) for row in table["rows"]]}) for table in report["tables"]]
        describe(report["machine"])
    except OSError as error:
        raise ReportError(f"{path}: cannot be read ({error.strerror}); name a file that --json wrote") from error
    except (ValueError, TypeError, KeyError) as error:
        raise ReportError(f"{path}: is no report of this script; name a file that --json wrote") from error
    return report["machine"], tables


class Change(NamedTuple):
    """A figure then and now.

    Attributes
    ----------
    what, metric : str
    before, now : float
        Medians.
    worse_by : float
        How much worse the best of the new rounds is than the worst of the old ones, as a share of the earlier median:
        what lies beyond both spreads. Negative where they overlap.
    """

    what: str
    metric: str
    before: float
    now: float
    worse_by: float


def changes(old: list[Table], new: list[Table]) -> list[Change]:
    """Every figure that both reports have."""
    earlier = {
        (table.title, row.label, metric): values
        for table in old
        for row in table.rows
        for metric, values in row.values.items()
    }
    found = []
    for table in new:
        for row in table.rows:
            for metric, values in row.values.items():
                before = earlier.get((table.title, row.label, metric))
                if not before or metric not in METRICS:
                    continue
                if METRICS[metric].more_is_better:
                    gap = min(before) - max(values)
                else:
                    gap = min(values) - max(before)
                reference = statistics.median(before)
                worse_by = gap / reference if reference else 0.0
                found.append(
                    Change(f"{table.title}: {row.label}", metric, reference, statistics.median(values), worse_by)
                )
    return found


def comparison(found: list[Change], threshold: float) -> tuple[str, list[Change]]:
    """A Markdown table of all changes, and those that are worse by more than `threshold` beyond the spreads."""
    slower = [change for change in found if change.worse_by > threshold]
    lines = ["| | | before | now | change | |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for change in found:
        heading, digits, _ = METRICS[change.metric]
        relative = f"{100 * (change.now / change.before - 1):+.1f} %" if change.before else ""
        mark = "**worse**" if change in slower else ""
        before, now = (f"{value:,.{digits}f}" for value in (change.before, change.now))
        lines.append(f"| {change.what} | {heading} | {before} | {now} | {relative} | {mark} |")
    return "\n".join(lines) + "\n", slower
