"""The mixture of softmaxes by the command lines of its authors' page, from training to served text."""

from __future__ import annotations

import re

import pytest
from processes import figures

SMALL = (
    "--data",
    "text",
    "--emsize",
    6,
    "--nhid",
    8,
    "--n_experts",
    3,
    "--batch_size",
    4,
    "--bptt",
    10,
    "--log-interval",
    4,
)


def test_the_reference_page_from_training_to_dynamic_evaluation(project):
    """Its three steps for Penn Treebank, and a generated and a scored text."""
    flags = ("--dropouti", 0.4, "--dropoutl", 0.29, "--dropouth", 0.225, "--seed", 28, "--lr", 20.0, "--single_gpu")
    devices = ("--no-cuda",)
    output = project.run("train", *SMALL, *flags[:-1], *devices, "--epoch", 2, "--nhidlast", 7, "--save", "PTB")
    (name,) = re.findall(r"run folder (PTB-\d{8}-\d{6})", output)
    assert "recipe mos" in output and "8x8x7 tied mixture of 3" in output
    flags = ("--dropouti", 0.4, "--dropoutl", 0.29, "--dropouth", 0.225, "--seed", 28, "--lr", 25.0)
    output = project.run("finetune", *SMALL, *flags, *devices, "--epoch", 1, "--save", name)
    assert (project.path / name / "finetune_model/best").exists()
    static, _ = figures(project.run("evaluate", f"{name}/finetune_model"), "test")
    output = project.run("dynamiceval", "--model", f"{name}/finetune_model.pt", "--lamb", 0.075, "--batch_size", 10)
    assert figures(output, "test")[0] != static
    assert len(project.run("generate", name, "--words", 30).split()) >= 30
    project.run("score", name, "text/test.txt", "--outf", "scores.tsv")
    assert (project.path / "scores.tsv").read_text().strip()


@pytest.mark.parametrize("devices", [("--cpus", 1), ("--cpus", 2)])
def test_small_parts_of_a_batch_train_as_the_whole_does(project, devices):
    calm = ("--dropout", 0, "--dropouti", 0, "--dropouth", 0, "--dropoute", 0, "--wdrop", 0, "--lr", 2)
    results = []
    for parts in ((), ("--small_batch_size", 2)):
        output = project.run("train", *SMALL, *calm, *devices, *parts, "--max-steps", 12, "--save", "run")
        results.append([float(loss) for loss in re.findall(r"loss +([\d.]+)", output)])
    assert results[0] == pytest.approx(results[1], rel=1e-4) and len(results[0]) > 3


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--n_experts", 0), "--n-experts 0: must be a whole number, 1 or more"),
        (("--small_batch_size", 3), "--small-batch-size 3 with --batch-size 4: the batch must be a multiple of it"),
        (
            ("--small_batch_size", 1, "--cpus", 2),
            "--small-batch-size 1: must be a multiple of the number of devices, 2",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(project, flags, reason):
    output = project.run("train", *SMALL, *flags, "--save", "run", code=2)
    assert len(output.splitlines()) == 1 and reason in output


def test_a_tied_softmax_needs_a_last_layer_as_wide_as_the_embedding(project):
    output = project.run("train", "--data", "text", "--tied", "--emsize", 6, "--nhidlast", 7, code=2)
    assert len(output.splitlines()) == 1
    assert "--nhidlast 7 with --tied: a tied output layer needs the last layer as wide as the embedding, 6" in output
