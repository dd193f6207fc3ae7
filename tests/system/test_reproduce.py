"""The script that reproduces the published tables: rows run, stop, go on, and end up in the README."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
import reproduce
import yaml
from processes import figures, running, wait_until

from gluon_lm.finetune import parse_finetune
from gluon_lm.train import parse_train

pytestmark = pytest.mark.timeout(300)
ROWS = reproduce.read_rows(reproduce.ROWS)
MODEL = "--data text --model lstm --emsize 8 --nhid 8 --batch-size 4 --bptt 5 --lr 1 --dropout 0.2 --log-interval 10"
TINY = {
    "short": {"table": "Tiny", "title": "two epochs", "train": f"{MODEL} --epochs 2", "published": {"test": 9}},
    "long": {"table": "Tiny", "title": "more", "after": "short", "train": "--epochs 6", "source": "us"},
    "tuned": {
        "table": "Tiny",
        "title": "tuned and dynamic",
        "after": "long",
        "finetune": "--epochs 2",
        "evaluate": "dynamiceval --lamb 0.1 --batch-size 4",
    },
    "memory": {
        "table": "Tiny",
        "title": "memory",
        "train": f"{MODEL} --max-steps 3",
        "evaluate": "none",
        "published": {"memory_mb": 500},
    },
    "large": {
        "table": "Tiny",
        "title": "large",
        "train": MODEL,
        "needs_gpu": True,
        "published": {"valid": 5, "test": 4},
    },
}


@pytest.fixture
def arguments(project):
    """Options that keep all that the script reads and writes in the project's folder."""
    (project.path / "rows.yaml").write_text(yaml.safe_dump(TINY, sort_keys=False))
    for page in ("README.md", "all.md"):
        (project.path / page).write_text(f"above\n{reproduce.BEGIN}\nold\n{reproduce.END}\nbelow\n")
    options = {"rows": "rows.yaml", "results": "found.json", "runs": "runs", "readme": "README.md", "page": "all.md"}
    return [word for name, value in options.items() for word in (f"--{name}", str(project.path / value))]


@pytest.mark.slow
def test_rows_that_were_killed_go_on_to_the_figures_of_the_plain_commands_and_into_the_readme(project, arguments):
    run = project.path / "runs" / "short"

    def steps() -> int:
        return int(os.readlink(run / "latest").rpartition("-")[2]) if (run / "latest").exists() else 0

    script = (sys.executable, reproduce.__file__, *arguments)
    process = project.start_process(*script, "tuned")
    wait_until(lambda: steps() > 84, 240, process)  # those of "short", so that "long" is under way
    process.send_signal(signal.SIGKILL)
    process.communicate()
    wait_until(lambda: not running(project.path), 120)
    printed, _ = project.start_process(*script, "tuned", "memory", "--render").communicate(timeout=280)

    project.train("whole", *shlex.split(MODEL), "--epochs", 6)
    plain = {("long", s): project.run("evaluate", "whole", "--split", s) for s in ("valid", "test")}
    project.run("finetune", "whole", "--epochs", 2)
    dynamic = ("dynamiceval", "whole/finetune_model", "--lamb", 0.1, "--batch-size", 4)
    plain["tuned", "valid"], plain["tuned", "test"] = project.run(*dynamic, "--val"), project.run(*dynamic)
    found = project.path / "found.json"
    kept = json.loads(found.read_text())
    for (row, split), expected in plain.items():
        assert kept[row][split] == figures(expected, split)[0], printed
    assert "resuming at step" in printed
    assert f"== short: done, {kept['short']['valid']:.2f} / {kept['short']['test']:.2f}; to run it anew" in printed
    assert kept["long"]["tokens"]["test"] == figures(plain["long", "test"], "test")[1]
    assert kept["memory"]["memory_mb"] > 50 and kept["long"]["seconds"] > 0

    readme, page = ((project.path / name).read_text() for name in ("README.md", "all.md"))
    for text in (readme, page):
        assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
        assert f"**{kept['tuned']['test']:.2f}**" in text
    large = next(line for line in page.splitlines() if line.startswith("| `large`"))
    assert "not run: needs a GPU" in large and "5 / 4" in large
    assert "not run" not in readme

    # What is kept belongs to those who ran it: rows are run wherever their run is not.
    again, _ = project.start_process(*script, "--runs", project.path / "elsewhere", "short").communicate(timeout=280)
    assert "End of training" in again
    anew = json.loads(found.read_text())
    assert anew["short"]["test"] == kept["short"]["test"] and anew["long"] == kept["long"]


def test_a_run_that_was_copied_without_its_links_is_gone_on_with(project, arguments):
    project.train("runs/short", *shlex.split(MODEL), "--epochs", 2)
    for link in ("best", "latest"):
        (project.path / "runs/short" / link).unlink()
    before = (project.path / "runs/short/metrics.jsonl").read_text()
    assert reproduce.main([*arguments, "short"]) == 0
    assert (project.path / "runs/short/metrics.jsonl").read_text() == before


def test_a_run_that_has_gone_beyond_a_row_is_not_taken_for_it(project, arguments, capsys):
    project.train("runs/short", *shlex.split(MODEL), "--epochs", 3)
    assert reproduce.main([*arguments, "short"]) == 2
    assert "epochs 3 where the row has 2" in capsys.readouterr().err
    assert not (project.path / "found.json").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nothing-like-it"], "nothing-like-it"),
        (["large"], "large: needs a GPU"),
        (["--readme", "no.md", "--render"], "no.md"),
        (["--page", "no.md", "--render"], "no.md"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(arguments, words, said, capsys, monkeypatch):
    monkeypatch.setattr(reproduce, "has_gpu", lambda: False)
    assert reproduce.main([*arguments, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_each_row_is_a_command_that_is_accepted(row, project):
    command = reproduce.training_command(row, Path("RUN"))
    if command is not None:
        name, *flags = command
        parsed = parse_finetune(flags) if name == "finetune" else parse_train(flags)
        assert not getattr(parsed, "problems", None)
    if row.evaluate != "none":
        name, *flags = reproduce.evaluation_command(row, Path("RUN"), "valid")
        assert "there is no such run" in project.run(name, *flags, code=2)  # so the flags were accepted


def test_the_figures_that_are_kept_belong_to_rows_and_are_on_their_pages():
    kept = json.loads(reproduce.RESULTS.read_text())
    assert set(kept) <= set(ROWS)
    results = reproduce.Results(reproduce.RESULTS)
    assert reproduce.tables(ROWS, results, only_done=True) in reproduce.README.read_text()
    assert reproduce.tables(ROWS, results) in reproduce.PAGE.read_text()  # as `--render` writes them
