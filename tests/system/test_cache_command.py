"""Evaluation with a neural cache, as a command."""

from __future__ import annotations

import functools

import pytest
from processes import figures


@pytest.fixture
def run(project):
    project.train("run", "--epochs", 1)
    (project.path / "lines.txt").write_text("the cat sees a tree .\n" * 30)
    return project


def perplexity_of(output):
    return figures(output, "all")[0]


def test_every_spelling_of_the_flags_mixes_the_cache_in(run):
    evaluate = functools.partial(run.run, "evaluate", "run", "--data", "lines.txt")
    expected = evaluate("--cache", "--window", 50, "--theta", 0.5, "--lambda", 0.3)
    assert "neural cache mixed in: window 50, theta 0.5, lambda 0.3" in expected
    for weight in ("--lambdas", "--lambdasm", "--cache-weight", "--cache_weight"):
        assert evaluate("--cache", "--window", 50, "--theta", 0.5, weight, 0.3) == expected
    in_short_windows = evaluate("--cache", "--window=50", "--theta=0.5", "--lambda=0.3", "--bptt", 7)
    assert perplexity_of(in_short_windows) == pytest.approx(perplexity_of(expected), rel=2e-4)  # three decimals

    alone = evaluate()
    assert "neural cache" not in alone
    assert perplexity_of(expected) < perplexity_of(alone)
    assert perplexity_of(evaluate("--cache", "--lambda", 0)) == perplexity_of(alone)
    assert "neural cache mixed in: window 2000, theta 0.662, lambda 0.1279" in evaluate("--cache")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (
            ("--cache", "--eval-batch-size", 4),
            "--eval-batch-size 4 with --cache: the cache reads the text as one stream",
        ),
        (("--window", 100), "--window 100: has no effect without --cache"),
        (("--theta", 0.5), "--theta 0.5: has no effect without --cache"),
        (("--lambda", 0.1), "--lambda 0.1: has no effect without --cache"),
        (("--lambdasm", 0.1), "--lambdasm 0.1: has no effect without --cache"),
        (("--cache", "--lambda", 1), "--lambda 1: must be a number, 0 or more and below 1"),
        (("--cache", "--lambda", -0.1), "--lambda -0.1: must be"),
        (("--cache", "--theta", -1), "--theta -1: must be a number, 0 or more"),
        (("--cache", "--theta", "nan"), "--theta nan: must be a number, 0 or more"),
        (("--cache", "--window", 0), "--window 0: must be a whole number, 1 or more"),
        (("--cache", "--window", 1.5), "--window 1.5: must be a whole number, 1 or more"),
    ],
)
def test_what_the_cache_cannot_do_is_refused(project, flags, complaint):
    output = project.run("evaluate", "nowhere", *flags, code=2)
    assert output.startswith("error: ") and complaint in output and len(output.splitlines()) == 1
