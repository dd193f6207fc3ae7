"""Exported folders of models that were trained here, without this package: in stock MXNet, from Python and from C."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from processes import events

import gluon_lm.export
import gluon_lm.train
from gluon_lm import exported
from gluon_lm.trained import load_predictor

SMALL = ("--emsize", 6, "--nhid", 8, "--batch-size", 4, "--bptt", 5, "--lr", 5, "--max-steps", 10)
RUNS = {
    **{
        f"{cell}-{'tied' if tied else 'untied'}": ("--model", cell, *(["--tied"] if tied else []))
        for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for tied in (False, True)
    },
    "layer-norm": ("--model", "lstm", "--layer-norm"),
    "weight-dropped": ("--model", "awd-lstm", "--tied", "--wdrop", 0.5, "--dropoute", 0.2, "--dropouth", 0.3),
    "averaged": ("--model", "awd-gru", "--asgd", "--eval-every", 5, "--wdrop", 0.3),
    "mixture": ("--recipe", "lm", "--n_experts", 3, "--nhidlast", 7, "--nlayers", 2),
    "mixture-tied": ("--recipe", "lm", "--tied", "--n_experts", 2, "--nlayers", 1, "--nhid", 6, "--dropoutl", 0.4),
    "sampled": ("--num-sampled", 4, "--nlayers", 1),
    "adaptive": ("--cutoffs", 3, "--nlayers", 1),
}
LENGTHS, NUM_STREAMS = (1, 6, 3), 4  # of windows, each from the state of the one before


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """A folder with a run and an export, NAME and NAME-exported, of each of `RUNS`."""
    folder = tmp_path_factory.mktemp("exports")
    rng = random.Random(7)
    lines = (" ".join(rng.choice("abcdefghij") for _ in range(8)) for _ in range(80))
    (folder / "text.txt").write_text("\n".join(lines) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLUON_LM_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        for name, flags in RUNS.items():
            flags = map(str, ("--data", "text.txt", "--save", name, *SMALL, *flags))
            assert gluon_lm.train.main([*flags]) == 0
            assert gluon_lm.export.main([name, "--output", f"{name}-exported"]) == 0
    return folder


def windows_of(vocab_size):
    rng = np.random.RandomState(3)
    return [rng.randint(0, vocab_size, (length, NUM_STREAMS)) for length in LENGTHS]


def expected_of(run):
    """The trained model's log-probabilities and states after each window, and the windows."""
    predictor = load_predictor(run, mx.cpu())
    windows, states, found = windows_of(len(predictor.vocabulary)), predictor.begin_state(NUM_STREAMS), []
    for tokens_TN in windows:
        log_probs_TNV, states = predictor.log_probs(mx.nd.array(tokens_TN, dtype="int32"), states)
        found += [array.asnumpy() for array in (log_probs_TNV, *states)]
    return found, windows


STOCK_MXNET = """
import sys
sys.modules["gluon_lm"] = None  # any import of it fails
import json, warnings
from pathlib import Path
import numpy as np
np.bool = bool  # all that stock MXNet needs to work with numpy 1.24 and later
import mxnet as mx

def predict(folder, windows):
    inputs = json.loads((folder / "manifest.json").read_text())["inputs"]
    model = mx.gluon.SymbolBlock.imports(
        str(folder / "model-symbol.json"), [entry["name"] for entry in inputs], str(folder / "model-0000.params")
    )
    states = [mx.nd.zeros((1, windows[0].shape[1], entry["shape"][2])) for entry in inputs[1:]]
    for tokens in windows:
        log_probs, *states = model(mx.nd.array(tokens), *states)
        yield from (array.asnumpy() for array in (log_probs, *states))

for name in sys.argv[1:]:
    with np.load(name + "-windows.npz") as windows:
        windows = [windows[key] for key in windows.files]
    np.savez(name + "-found.npz", *predict(Path(name + "-exported"), windows))
"""


def test_stock_mxnet_gives_the_trained_models_numbers(exports):
    expected = {}
    for name in RUNS:
        expected[name], windows = expected_of(exports / name)
        np.savez(exports / f"{name}-windows.npz", *windows)
    subprocess.run([sys.executable, "-c", STOCK_MXNET, *RUNS], cwd=exports, check=True)
    for name in RUNS:
        with np.load(exports / f"{name}-found.npz") as found:
            assert len(found.files) == len(expected[name])
            for key, array in zip(found.files, expected[name]):
                np.testing.assert_allclose(found[key], array, rtol=0, atol=1e-6, err_msg=name)


@pytest.fixture(scope="module")
def predict(tmp_path_factory):
    """The C program, compiled against the library of the installed MXNet."""
    program = tmp_path_factory.mktemp("predict") / "predict"
    library = Path(mx.libinfo.find_lib_path()[0])
    subprocess.run(
        [
            "gcc",
            *("-std=c99", "-Wall", "-Wextra", "-Werror"),
            Path(__file__).with_name("predict.c"),
            f"-I{mx.libinfo.find_include_path()}",
            library,
            f"-Wl,-rpath,{library.parent}",
            *("-o", program),
        ],
        check=True,
    )
    return program


@pytest.mark.parametrize("name", RUNS)
def test_the_c_predict_api_gives_the_trained_models_numbers(exports, predict, name):
    expected, windows = expected_of(exports / name)
    folder = exports / f"{name}-exported"
    _, *states = json.loads((folder / "manifest.json").read_text())["inputs"]
    printed = subprocess.run(
        [
            predict,
            folder / "model-symbol.json",
            folder / "model-0000.params",
            *(str(entry["shape"][2]) for entry in states),
        ],
        input="\n".join(f"{len(w)} {NUM_STREAMS} {' '.join(map(str, w.ravel()))}" for w in windows),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert printed.returncode == 0, printed.stderr
    lines = printed.stdout.splitlines()
    assert len(lines) == len(expected)
    for line, array in zip(lines, expected):
        np.testing.assert_allclose(np.array(line.split(), np.float32), array.ravel(), rtol=0, atol=1e-6)


def test_the_manifest_has_the_result_of_the_best_checkpoint(exports):
    for name in RUNS:
        manifest = json.loads((exports / f"{name}-exported/manifest.json").read_text())
        evaluated = events(exports / name, "valid")
        best = min(evaluated, key=lambda event: event["loss"])
        assert os.readlink(exports / name / "best").endswith(manifest["training"]["checkpoint"])
        assert manifest["training"]["steps"] == best["step"]
        assert manifest["training"]["validation_loss"] == pytest.approx(best["loss"], rel=1e-9)
        assert manifest["training"]["validation_perplexity"] == pytest.approx(math.exp(best["loss"]), rel=1e-9)
        assert manifest["training"]["averaged"] is (name == "averaged")
        assert manifest["text"]["tokenizer"] == "whitespace"


@pytest.mark.parametrize("head", [(), ("--n-experts", 3, "--recipe", "lm")], ids=["softmax", "mixture"])
def test_an_export_writes_and_scores_text_as_its_run_does(project, monkeypatch, head):
    project.train("run", "--max-steps", 20, *head)
    monkeypatch.setattr(exported, "_ELEMENTS_AT_ONCE", 200)  # so that lines are cut
    sources = ("run", "exported")
    project.run("export", "run", "--output", "exported")
    texts = [project.run("generate", source, "--words", 100, "--seed", 3, "--quiet") for source in sources]
    assert texts[0] == texts[1] and texts[0].strip()
    log_probs = [
        [json.loads(line)["log_prob"] for line in printed.splitlines()]
        for printed in (project.run("score", source, "text/test.txt", "--format", "jsonl") for source in sources)
    ]
    assert log_probs[0] == pytest.approx(log_probs[1], rel=1e-5) and len(log_probs[0]) == 20


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("run",), "--output"),
        (("nowhere", "--output", "exported"), "nowhere: there is no such run"),
        (("--output", "exported"), "no run is named"),
        (("run", "--output", "text"), "--output text: exists and is not an exported model"),
        (("run", "--output", "exported", "--format", "onx"), "--format"),
    ],
    ids=["no output", "unknown run", "no run", "folder in the way", "unknown format"],
)
def test_what_cannot_be_exported_is_answered_in_one_line(project, flags, reason):
    project.train("run", "--max-steps", 1)
    before = sorted(project.path.rglob("*"))
    output = project.run("export", *flags, code=2)
    (line,) = output.splitlines()
    assert line.startswith("error: ") and reason in line
    assert sorted(project.path.rglob("*")) == before


def test_onnx_by_the_command(project):
    project.train("run", "--max-steps", 1)
    output = project.run("export", "run", "--output", "exported", "--format", "onnx")
    assert "exported" in output
    assert {path.name for path in (project.path / "exported").iterdir()} == {
        "model.onnx",
        "vocab.txt",
        "manifest.json",
    }
