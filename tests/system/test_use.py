"""What is done with a trained run: text, scores."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys

import pytest
from processes import environment

from gluon_lm import generate, score


@pytest.fixture
def run(project):
    project.have_trained("run", "--epochs", 8, "--lr", 10)
    return project


def words_of(output):
    return [line.split() for line in output.splitlines()]


def test_commands_that_take_the_newest_run_say_which_it_is(project, capsys):
    for name in ("runs/older", "runs/newest", "elsewhere"):
        project.train(name, "--max-steps", 1)
    newest = str(project.path / "runs/newest/checkpoints/step-1")
    capsys.readouterr()
    assert generate.main(["--words", "5"]) == 0
    printed = capsys.readouterr()
    assert newest in printed.err and newest not in printed.out
    assert newest in project.run("export", "--output", "exported")


def test_text_from_a_prompt_in_many_samples(run):
    def text(prompt, *flags):
        return run.run("generate", "run", "--prompt", prompt, *flags, "--quiet")

    output = text("the cat", "--samples", 3, "--words", 6, "--top-k", 2, "--seed", 4)
    samples = output.strip().split("\n\n")
    assert len(samples) == 3 and all(sample.startswith("the cat ") for sample in samples)
    assert all(len(sample.split()) == 2 + 6 for sample in samples)
    assert output == text("the cat", "--samples", 3, "--words", 6, "--top-k", 2, "--seed", 4)
    greedy = text("the cat", "--words", 30, "--greedy")
    for flags in (("--top-k", 1), ("--temperature", 0)):
        assert greedy == text("the cat", "--words", 30, *flags)
    daring = [run.run("generate", "run", "--words", 300, "--temperature", 50, *flags) for flags in ((), ("--no-unk",))]
    assert ["<unk>" in words.split() for words in daring] == [True, False]
    sentence = text("a dog", "--words", 40, "--greedy", "--stop-at-eos", "--detokenize")
    assert sentence.strip().endswith(".") and " ." not in sentence and "<eos>" not in sentence


def test_words_of_a_prompt_that_the_model_does_not_know_are_told_beside_the_text(run, capsys):
    flags = ["run", "--words", "5", "--data", "ptb"]
    assert generate.main([*flags, "--prompt", "the Cat sees Cat <unk> zebra"]) == 0
    printed = capsys.readouterr()
    assert '--prompt: the model does not know "Cat", "zebra", and reads <unk>' in printed.err
    assert "--data ptb: has no effect here" in printed.err
    (line,) = printed.out.splitlines()
    assert line.startswith("the Cat sees Cat <unk> zebra ") and len(line.split()) == 6 + 5
    assert generate.main(["run", "--words", "5", "--prompt", "the <unk> cat"]) == 0
    assert "does not know" not in capsys.readouterr().err


def test_a_line_break_of_a_prompt_ends_a_line(run):
    def text(prompt, *flags):
        return run.run("generate", "run", "--prompt", prompt, "--words", 30, "--seed", 5, *flags)

    assert text("the cat .\na dog") == text("the cat . <eos> a dog") != text("the cat . a dog")
    assert "\nnone " in text("none")


@pytest.mark.parametrize("flag", ["--seed", "--samples", "--top-k"])
def test_the_likeliest_words_after_a_prompt_are_not_drawn(run, flag):
    for greedy in (("--greedy",), ("--temperature", 0.0005)):
        line = run.refused("generate", "run", *greedy, "--prompt", "the", flag, 3)
        assert f"{' '.join(map(str, greedy))} with {flag}: the likeliest word needs no choice" in line


def test_the_references_flags_of_generation(run):
    output = run.run(
        "generate",
        "--checkpoint",
        "run.pt",
        "--data",
        "elsewhere",
        "--words",
        10,
        "--log-interval",
        5,
        "--outf",
        "o.txt",
    )
    assert "| Generated 5/10 words" in output and "--data elsewhere: has no effect" in output
    assert len((run.path / "o.txt").read_text().split()) == 10


def test_a_prompt_that_is_not_utf_8_is_written_as_it_can_be(run):
    prompt = os.fsdecode(b"caf\xe9 a")
    run.run("generate", "run", "--words", 10, "--prompt", prompt, "--outf", "latin.txt")
    assert (run.path / "latin.txt").read_text().startswith("caf\\udce9 a ")


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (("run", "--checkpoint", "other"), "run with --checkpoint other: both name the run"),
        (("run", "--model", "LSTM"), "--model: unknown flag; a run knows its own model"),
        (("run", "--greedy", "--top-p", 0.5), "--greedy with --top-p"),
        (("run", "--temperature", -1), "--temperature -1: must be a number, 0 or more"),
        (("run", "--top-p", 1.5), "--top-p 1.5: must be"),
        (("run", "--outf", "no/such/folder.txt"), "must be a file in a folder that exists"),
        (("run", "--outf", "/dev"), "--outf /dev: must be a file"),
        (("run", "--outf", "/dev/fd/987654"), "--outf /dev/fd/987654: cannot be written to (Bad file descriptor)"),
        (("nothing",), "there is no such run"),
    ],
)
def test_what_cannot_be_written_is_refused(project, flags, complaint):
    output = project.run("generate", *flags, code=2)
    assert complaint in output and output.startswith("error: ") and len(output.splitlines()) == 1


def test_a_file_name_that_stands_for_no_run_gets_the_run_that_begins_with_it(project):
    assert "model.pt: there is no such run" in project.refused("generate", "--checkpoint", "model.pt")
    project.train("model-20260101-120000", "--max-steps", 1)
    for name in ("model.pt", "model"):
        error = project.refused("generate", "--checkpoint", name)
        assert f"{name}: there is no such run" in error and error.endswith("did you mean model-20260101-120000?")
    assert project.run("generate", "model-20260101-120000/model.pt", "--words", 3, "--quiet")


def test_scores_tell_what_the_model_learnt(run, monkeypatch):
    (run.path / "lines.txt").write_text("the cat sees a tree .\ntree a sees the cat .\n\nan elephant\n")
    header, *rows, told = [line.split("\t") for line in run.run("score", "run", "lines.txt").splitlines()]
    assert told == ["2 of 14 words are not known to the model and scored as <unk>"]
    assert header == ["line", "position", "log_prob", "perplexity", "tokens", "text"]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"] and [row[4] for row in rows] == ["7", "7", "1", "3"]
    assert float(rows[0][2]) > float(rows[1][2]) + 5
    assert float(rows[0][3]) == pytest.approx(math.exp(-float(rows[0][2]) / 7), rel=1e-4)

    with_words = [line.split("\t") for line in run.run("score", "run", "lines.txt", "--words").splitlines()[1:]]
    assert [row[5] for row in with_words[:8]] == ["the cat sees a tree .", *"the cat sees a tree . <eos>".split()]
    assert sum(float(row[2]) for row in with_words[1:8]) == pytest.approx(float(rows[0][2]), abs=1e-4)

    run.run("score", "run", "lines.txt", "--format", "jsonl", "--outf", "scores.jsonl")
    objects = [json.loads(line) for line in (run.path / "scores.jsonl").read_text().splitlines()]
    assert [o["log_prob"] for o in objects] == pytest.approx([float(row[2]) for row in rows], abs=1e-5)
    assert [w["unknown"] for w in objects[3]["words"]] == [True, True, False]

    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("ein Käfer 🐞\n".encode())))
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BytesIO(), encoding="latin-1", write_through=True))
    assert score.main(["run", "-", "--format", "jsonl", "--quiet"]) == 0
    printed = json.loads(sys.stdout.buffer.getvalue())
    assert [word["word"] for word in printed["words"]] == ["ein", "Käfer", "🐞", "<eos>"]


def test_what_is_open_already_is_written_to_and_not_replaced(run):
    generate_ten = [*run.command("generate", "run", "--words", 10, "--outf", "/dev/stdout", "--quiet")]
    with open(run.path / "whole.txt", "wb") as file:
        for words in (["echo", "before"], generate_ten, ["echo", "after"]):
            subprocess.run(words, stdout=file, env=environment(), check=True, timeout=120)
    first, text, last = (run.path / "whole.txt").read_text().splitlines()
    assert (first, last) == ("before", "after") and len(text.split()) == 10
    piped = subprocess.run(generate_ten, stdout=subprocess.PIPE, env=environment(), check=True, timeout=120)
    assert piped.stdout.decode().strip() == text


def test_samples_of_readable_text_are_set_apart_by_one_blank_line(run):
    flags = ("--words", 40, "--samples", 4, "--stop-at-eos", "--detokenize", "--prompt", "the cat")
    assert len(run.run("generate", "run", *flags).rstrip("\n").split("\n\n")) == 4


def test_a_text_that_ends_early_is_counted_as_it_is(run):
    flags = ("--words", 500, "--samples", 2, "--stop-at-eos", "--outf", "o.txt", "--seed", 3)
    output = run.run("generate", "run", *flags)
    assert f"{len((run.path / 'o.txt').read_text().split()):,} words in o.txt" in output


def test_lines_come_from_standard_input_where_the_file_is_a_hyphen(run):
    (run.path / "lines.txt").write_text("the cat sees a tree .\na dog\n")
    command = run.command("score", "run", "-", "--quiet")
    piped = subprocess.run(command, input=b"the cat sees a tree .\na dog\n", stdout=subprocess.PIPE, env=environment())
    assert piped.returncode == 0
    assert piped.stdout.decode() == run.run("score", "run", "lines.txt", "--quiet")


def test_standard_input_that_is_closed_has_no_lines(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    assert run.refused("score", "run", "-").startswith("error: ")


def test_how_many_words_the_model_does_not_know_is_told_beside_the_scores(run, capsys):
    (run.path / "lines.txt").write_text("the cat sees the zebra .\nthe Cat\n")
    assert score.main(["run", "lines.txt"]) == 0
    printed = capsys.readouterr()
    assert "2 of 8 words are not known to the model and scored as <unk>" in printed.err
    assert [row.split("\t")[0] for row in printed.out.splitlines()] == ["line", "1", "2"]
    (run.path / "lines.txt").write_text("the cat sees the <unk> .\n")
    assert score.main(["run", "lines.txt"]) == 0
    assert "not known" not in capsys.readouterr().err


def test_lines_are_scored_as_they_are_read_in_training(run):
    """Neither a byte order mark nor the line breaks of Windows are words, and no other sign breaks a line."""
    plain, marked = (
        run.run("score", "run", name)
        for name, content in [
            ("plain.txt", b"the cat\n\nsees a\x0c tree\n"),
            ("marked.txt", b"\xef\xbb\xbfthe cat\r\n\r\nsees a\xe2\x80\xa8 tree"),
        ]
        if (run.path / name).write_bytes(content)
    )
    assert plain == marked and len(plain.splitlines()) == 4


@pytest.mark.parametrize(
    "content, complaint",
    [(b"", "is empty"), (b"fine\n\xff\xfe\n", "line 2: is not UTF-8"), (None, "cannot be read")],
)
def test_a_file_that_cannot_be_scored_is_refused(project, content, complaint):
    if content is not None:
        (project.path / "lines.txt").write_bytes(content)
    output = project.run("score", "run", "lines.txt", code=2)
    assert output.startswith("error: lines.txt") and complaint in output and len(output.splitlines()) == 1
