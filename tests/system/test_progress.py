"""Long work of every kind shows how far it is, where there is no terminal by lines, and not where it is to be quiet."""

from __future__ import annotations

from functools import partial

import pytest

from gluon_lm import progress


@pytest.fixture(autouse=True)
def at_every_step(monkeypatch):
    monkeypatch.setattr(progress, "PlainProgress", partial(progress.PlainProgress, interval_s=0.0))


def test_long_work_of_every_kind_shows_how_far_it_is(project):
    train = ("train", *project.training_flags, "--save", "run", "--max-steps", 2)
    for command, flags, names in (
        (train, (), ("encoding text/train.txt: ", "encoding text/test.txt: ", "validation: ", "test: ")),
        (("evaluate", "run"), ("--split", "valid"), ("valid: ",)),
        (("dynamiceval", "run"), ("--batch-size", 4, "--bptt", 5), ("squared gradients: ", "test: ")),
        (("generate", "run"), ("--words", 9, "--outf", "written.txt", "--log-interval", 4), ("| Generated 8/9 words",)),
        (("score", "run", "text/valid.txt"), ("--outf", "scores.txt"), ("scoring: ",)),
        (("export", "run"), ("--output", "exported"), ("exporting exported: ",)),
    ):
        lines = project.run(*command, *flags).splitlines()
        for name in names:
            assert any(line.startswith(name) for line in lines), (name, lines)


def test_quiet_work_shows_none(project):
    output = project.train("run", "--max-steps", 2, "--quiet")
    assert "test ppl" in output and " % (" not in output
