"""The benchmark script: every benchmark runs, and what became worse is told from noise."""

from __future__ import annotations

import argparse
import json
import math
import os
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import benchmark  # noqa: F401  (registers them all)
import pytest
from benchmarks.harness import BENCHMARKS, METRICS, SIZES, Case, Row, Table, run_case
from benchmarks.ours import train_ours
from benchmarks.report import changes, comparison
from processes import environment

pytestmark = pytest.mark.timeout(300)
SCRIPT = Path(benchmark.__file__)


def run(*arguments: object, code: int = 0) -> str:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def check(folder: Path, *arguments: str) -> Path:
    """Run benchmarks with tiny models; the report that they write, which has one in Markdown beside it."""
    run(*arguments, "--check", "--json", folder / "now.json", "--markdown", folder / "now.md")
    return folder / "now.json"


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return check(tmp_path_factory.mktemp("report"), "generation", "--no-peers")


def tables_of(report):
    """The tables of a report that names machine and versions, and says all of it in Markdown, too."""
    written, markdown = json.loads(report.read_text()), report.with_suffix(".md").read_text()
    assert written["machine"]["cpu"] and written["machine"]["versions"]["mxnet"]
    assert written["machine"]["cpu"] in markdown
    for table in written["tables"]:
        assert f"**{table['title']}**" in markdown
        for row in table["rows"]:
            assert f"| {row['label']} |" in markdown
            for values in row["values"].values():
                assert len(values) == 1 and math.isfinite(values[0])
    return written["tables"]


def test_a_benchmark_is_reported_with_machine_and_versions(report):
    (table,) = tables_of(report)
    assert table["title"].startswith("Generation") and len(table["rows"]) == 2


@pytest.mark.slow
def test_every_benchmark_runs_and_is_reported(tmp_path):
    tables = tables_of(check(tmp_path, "all", *([] if find_spec("gluonnlp") else ["--no-peers"])))
    titles = " | ".join(table["title"] for table in tables)
    for words in (
        "Training, A",
        "Evaluation, B",
        "Generation",
        "mixture",
        "unrolled",
        "Memory",
        "Start-up",
        "codec",
        "Large vocabulary, large",
        "Large vocabulary, learning",
        "Encoding",
    ):
        assert words in titles
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)  # MXNet's profiler deletes the file that it is told to write
    floors = [table for table in tables if table["title"].startswith("Floor")]
    assert len(floors) == len(BENCHMARKS["floor"].sizes)


def test_a_slowdown_is_named_and_ends_with_exit_code_1(report, tmp_path):
    earlier = json.loads(report.read_text())
    for table in earlier["tables"]:
        for row in table["rows"]:
            row["values"] = {metric: [value * 1e6 for value in values] for metric, values in row["values"].items()}
    path = tmp_path / "before.json"
    path.write_text(json.dumps(earlier))
    printed = run("generation", "--check", "--no-peers", "--compare", path, code=1)
    assert "worse by" in printed and "one text, tokens_per_second" in printed
    assert "one text, peak_memory_mb" not in printed  # a millionth of the memory is no slowdown
    path.write_text("[]")
    assert str(path) in run("generation", "--check", "--no-peers", "--compare", path, code=2)


@pytest.mark.parametrize(
    ("metric", "before", "now", "is_worse"),
    [
        ("tokens_per_second", [100, 110], [80, 90], True),
        ("tokens_per_second", [100, 110], [80, 96], False),  # 4 of 105 beyond the spreads
        ("tokens_per_second", [80, 90], [100, 110], False),
        ("seconds", [2.0, 2.2], [2.4, 2.5], True),
        ("seconds", [2.0, 2.6], [2.5, 2.9], False),  # the spreads overlap
        ("peak_memory_mb", [500], [480], False),
    ],
)
def test_worse_is_what_lies_beyond_both_spreads(metric, before, now, is_worse):
    found = changes([Table("t", [Row("r", {metric: before})])], [Table("t", [Row("r", {metric: now})])])
    text, worse = comparison(found, threshold=0.05)
    assert len(found) == 1
    assert bool(worse) is is_worse
    assert ("**worse**" in text) is is_worse


def test_a_measurement_has_a_process_of_its_own():
    options, size = argparse.Namespace(check=False, torch=None), SIZES["A"].tiny()
    before = {key: value for key, value in os.environ.items() if key.startswith("OMP_")}
    found = run_case(Case("gluon_lm", train_ours, model={"tied": False}), options, size, 1, 2)
    assert set(found) == {"tokens_per_second", "peak_memory_mb"} <= set(METRICS)
    assert {key: value for key, value in os.environ.items() if key.startswith("OMP_")} == before


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_first_steps_of_a_published_recipe_follow_gluonnlps(project):
    """From the same weights, without dropout, to rounding; what was trained before is not trained again."""
    pytest.importorskip("gluonnlp", reason="gluonnlp is not installed: bash scripts/environment.sh peers")
    lines = [f"{i % 7} {i % 11} {i % 13} the cat sees a {i % 5}" for i in range(900)]
    (project.path / "long").mkdir()
    for split, part in (("train", lines), ("valid", lines[:50]), ("test", lines[:50])):
        (project.path / f"long/{split}.txt").write_text("\n".join(part))
    words = [SCRIPT.with_name("follow_reference.py"), "awd-ptb", "--data", "long", "--no-dropout", "--json", "l.json"]

    def follow(*more):
        command = [sys.executable, *map(str, words), *map(str, more)]
        return subprocess.run(command, cwd=project.path, env=environment(), capture_output=True, text=True)

    ended = follow("--steps", 4)
    assert ended.returncode == 0, ended.stderr
    losses = json.loads((project.path / "l.json").read_text())["losses"]
    assert losses["gluonnlp"] == pytest.approx(losses["gluon_lm"], rel=1e-5) and len(losses["gluon_lm"]) == 4
    assert max(losses["gluon_lm"]) - min(losses["gluon_lm"]) > 0.1  # their steps matter to the losses that agree
    assert "4 of 4 step" not in follow("--steps", 4).stderr
    assert "l.json: holds other losses" in follow("--steps", 3).stderr
