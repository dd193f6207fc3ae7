"""Exported folders: the model's own numbers, in MXNet and in onnxruntime; whole or absent; refused when changed."""

from __future__ import annotations

import ctypes
import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import sys

import mxnet as mx
import numpy as np
import onnx
import onnxruntime
import pytest
from builders import VOCAB_SIZE, VOCABULARY, build_model, int32, save_run

import gluon_lm
from gluon_lm import exporting_onnx
from gluon_lm.config import read_config
from gluon_lm.errors import CheckpointError, ConfigError, GluonLMError, MissingDependency
from gluon_lm.exporting import export_run, write_export
from gluon_lm.exporting_onnx import export_onnx
from gluon_lm.models import HEADS
from gluon_lm.trained import load_predictor
from gluon_lm.training.checkpoint import TrainingState, load_checkpoint, save_checkpoint
from gluon_lm.training.run_folder import RunFolder

LENGTHS = (1, 6, 3)  # of windows, each from the state of the one before
MODELS = {
    **{
        f"{cell}-{'tied' if tied else 'untied'}": {"model": cell, "tied": tied}
        for cell in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for tied in (False, True)
    },
    "one layer": {"model": "gru", "num_layers": 1},
    "five layers": {"num_layers": 5},
    "layer-norm-untied": {"layer_norm": True},
    "layer-norm-tied": {"layer_norm": True, "tied": True},
    "mixture-tied": {"num_experts": 3, "tied": True, "last_hidden_size": 7},
    "mixture-untied": {"num_experts": 2, "model": "gru", "num_layers": 1},
    "sampled-tied": {"num_sampled": 4, "tied": True, "num_layers": 1},
    "adaptive": {"cutoffs": (3, 8), "last_hidden_size": 16, "num_layers": 1},
    "every dropout": {
        "model": "awd-lstm", "tied": True, "weight_drop": 0.5, "input_weight_drop": 0.2, "dropout": 0.3,
        "dropout_embed": 0.2, "dropout_embed_elements": 0.2, "dropout_candidate": 0.3, "dropout_input": 0.4,
    },
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS.values(), ids=MODELS.keys())
def any_run(request, tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("runs") / "run", **request.param)


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


def outputs_of(predictor, num_streams):
    """Log-probabilities and states of some windows, one after another."""
    rng, states, found = np.random.RandomState(num_streams), predictor.begin_state(num_streams), []
    for length in LENGTHS:
        tokens_TN = rng.randint(0, VOCAB_SIZE, (length, num_streams))
        log_probs_TNV, states = predictor.log_probs(int32(tokens_TN), states)
        found += [array.asnumpy() for array in (log_probs_TNV, *states)]
    return found


def onnx_outputs_of(folder, num_streams):
    """The same in onnxruntime, by the manifest's word alone."""
    manifest = json.loads((folder / "manifest.json").read_text())
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), providers=["CPUExecutionProvider"])
    tokens, *states = manifest["inputs"]
    assert [entry["next"] for entry in manifest["outputs"][1:]] == [entry["name"] for entry in states]
    feed = {entry["name"]: np.zeros((1, num_streams, entry["shape"][2]), entry["dtype"]) for entry in states}
    rng, found = np.random.RandomState(num_streams), []
    for length in LENGTHS:
        feed[tokens["name"]] = rng.randint(0, VOCAB_SIZE, (length, num_streams)).astype(tokens["dtype"])
        outputs = session.run([entry["name"] for entry in manifest["outputs"]], feed)
        feed.update({entry["next"]: array for entry, array in zip(manifest["outputs"][1:], outputs[1:])})
        found += outputs
    return found


def assert_all_close(found, expected, atol):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def content_of(folder):
    """Every file and link below a folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return True


# ---------------------------------------------------------------- the same numbers


def test_a_loaded_export_is_the_trained_model(any_run, tmp_path):
    export_run(any_run, tmp_path / "exported")
    trained = load_predictor(any_run, mx.cpu())
    description = trained.describe()
    assert description["training"].pop("run") == any_run.name
    exported = gluon_lm.load_exported(tmp_path / "exported"), load_predictor(tmp_path / "exported", mx.cpu())
    assert [predictor.describe() for predictor in exported] == [description] * 2
    for num_streams in (1, 4):
        for predictor in exported:
            assert_all_close(outputs_of(predictor, num_streams), outputs_of(trained, num_streams), atol=1e-6)


@pytest.mark.parametrize("name", ["lstm-untied", "mixture-tied", "one layer"])
def test_an_export_reads_text_in_pieces_and_without_its_head(tmp_path, name, monkeypatch):
    monkeypatch.setattr("gluon_lm.prediction._TOKENS_READ_AT_ONCE", 8)
    export_run(save_run(tmp_path / "run", **MODELS[name]), tmp_path / "exported")
    predictor = gluon_lm.load_exported(tmp_path / "exported")
    tokens_TN, states = np.random.RandomState(1).randint(0, VOCAB_SIZE, (9, 2)), predictor.begin_state(2)
    for tokens_N in tokens_TN:
        _, states = predictor.log_probs(int32(tokens_N[np.newaxis]), states)
    predictor.network = None
    found = predictor.read(tokens_TN, predictor.begin_state(2))
    assert_all_close([state.asnumpy() for state in found], [state.asnumpy() for state in states], atol=1e-6)


def test_onnxruntime_gives_the_trained_models_numbers(any_run, tmp_path):
    export_onnx(any_run, tmp_path / "exported")
    onnx.checker.check_model(str(tmp_path / "exported/model.onnx"), full_check=True)
    trained = load_predictor(any_run, mx.cpu())
    for num_streams in (1, 4):
        expected = outputs_of(trained, num_streams)
        assert_all_close(onnx_outputs_of(tmp_path / "exported", num_streams), expected, atol=1e-5)


def test_every_head_can_be_written_as_onnx():
    assert set(exporting_onnx._HEADS) == set(HEADS)


def test_onnx_weights_beyond_protobufs_limit_get_a_file_of_their_own(run, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting_onnx, "_MAX_FILE_BYTES", 0)
    manifest = export_onnx(run, tmp_path / "exported")
    assert manifest["sha256"].keys() == {"model.onnx", "model.onnx.data", "vocab.txt"}
    expected = outputs_of(load_predictor(run, mx.cpu()), 2)
    assert_all_close(onnx_outputs_of(tmp_path / "exported", 2), expected, atol=1e-5)


def test_averaged_weights_are_those_that_are_exported(tmp_path):
    run = save_run(tmp_path / "run", averaged=True)
    assert export_run(run, tmp_path / "exported")["training"]["averaged"] is True
    averages = outputs_of(load_predictor(save_run(tmp_path / "averages"), mx.cpu()), 2)
    assert_all_close(outputs_of(gluon_lm.load_exported(tmp_path / "exported"), 2), averages, atol=1e-6)


def test_the_files_depend_on_the_run_alone(run, tmp_path):
    export_run(run, tmp_path / "one")
    build_model(model="gru")
    export_run(run, tmp_path / "other")
    assert content_of(tmp_path / "one") == content_of(tmp_path / "other")


# ---------------------------------------------------------------- the manifest


@pytest.mark.parametrize("export", [export_run, export_onnx])
def test_manifest_says_what_the_files_are(tmp_path, export):
    manifest = export(save_run(tmp_path / "run", tied=True, num_layers=2), tmp_path / "exported")
    assert json.loads((tmp_path / "exported/manifest.json").read_text()) == manifest
    files = content_of(tmp_path / "exported")
    del files["manifest.json"]
    assert manifest["sha256"] == {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    tokens, *states = manifest["inputs"]
    log_probs, *new_states = manifest["outputs"]
    assert (tokens["name"], tokens["shape"], log_probs["shape"]) == ("tokens", ["T", "N"], ["T", "N", "V"])
    assert [(s["name"], s["layer"], s["kind"], s["shape"], s["initial"], s["dtype"]) for s in states] == [
        ("state_0", 0, "hidden", [1, "N", 5], 0, "float32"),
        ("state_1", 0, "cell", [1, "N", 5], 0, "float32"),
        ("state_2", 1, "hidden", [1, "N", 4], 0, "float32"),
        ("state_3", 1, "cell", [1, "N", 4], 0, "float32"),
    ]
    assert [s["next"] for s in new_states] == ["state_0", "state_1", "state_2", "state_3"]
    if export is export_run:
        outputs = mx.sym.load(str(tmp_path / "exported/model-symbol.json")).list_outputs()
    else:
        outputs = [output.name for output in onnx.load(str(tmp_path / "exported/model.onnx")).graph.output]
    assert outputs == [entry["name"] for entry in manifest["outputs"]]
    assert manifest["model"] == {
        "cell": "lstm", "embed_size": 4, "layer_sizes": [5, 4], "tied": True, "num_experts": 1,
        "vocab_size": VOCAB_SIZE,
    }  # fmt: skip
    assert manifest["text"] == {
        "name": "tales", "licence": "CC-BY-4.0", "tokenizer": "words", "begins_with": "<eos>",
        "eos_id": 1, "unk_id": 0,
    }  # fmt: skip
    assert manifest["training"] == {
        "checkpoint": "step-70", "epochs": 3, "steps": 70, "averaged": False,
        "validation_loss": 2.5, "validation_perplexity": math.exp(2.5),
    }  # fmt: skip


def test_a_loss_without_a_finite_perplexity_is_exported_without_one(tmp_path):
    training = export_run(save_run(tmp_path / "run", loss=800.0), tmp_path / "exported")["training"]
    assert (training["validation_loss"], training["validation_perplexity"]) == (800.0, None)


def test_a_checkpoint_that_was_not_evaluated_has_no_result(tmp_path):
    training = export_run(save_run(tmp_path / "run", evaluated=False), tmp_path / "exported")["training"]
    assert (training["validation_loss"], training["validation_perplexity"]) == (None, None)


# ---------------------------------------------------------------- a run that is being trained


def test_a_best_checkpoint_that_is_replaced_while_it_is_read_is_not_missed(run, tmp_path, monkeypatch):
    steps = []

    def train_on_and_read(path):
        if steps:
            training = TrainingState(step=steps[0], best_loss=1.0, best_step=steps.pop(0))
            config, checkpoint = (run / "config.yaml").read_text(), load_checkpoint(run / "best")
            checkpoint = dataclasses.replace(checkpoint, training=training)
            save_checkpoint(RunFolder(run), checkpoint, config, VOCABULARY, keep=1, is_best=True)
        return read_config(path)

    monkeypatch.setattr("gluon_lm.trained.read_config", train_on_and_read)
    steps += [80, 90]
    assert load_predictor(run).describe()["training"]["steps"] == 90
    steps += [100, 110]
    assert export_run(run, tmp_path / "exported")["training"]["steps"] == 110
    steps += [120]
    with pytest.raises(GluonLMError, match="step-110"):
        load_predictor(run / "checkpoints/step-110")
    steps += range(130, 200, 10)
    with pytest.raises(GluonLMError):
        load_predictor(run)


# ---------------------------------------------------------------- what is refused when loading


@pytest.mark.parametrize("name", ["model-symbol.json", "model-0000.params", "vocab.txt", "manifest.json"])
@pytest.mark.parametrize("harm", ["missing", "cut short", "one byte changed"])
def test_a_folder_that_is_not_as_it_was_written_is_refused(run, tmp_path, name, harm):
    export_run(run, tmp_path / "exported")
    file = tmp_path / "exported" / name
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "cut short":
        file.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        gluon_lm.load_exported(tmp_path / "exported")
    assert one_line(caught, tmp_path / "exported", name, "export the run again")


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["text"].update(tokenizer="whitespace"),
        lambda manifest: manifest["inputs"][1]["shape"].__setitem__(2, 6),
        lambda manifest: manifest["inputs"].reverse(),
        lambda manifest: manifest.pop("digest"),
        lambda manifest: manifest.update(format=manifest["format"] + 1),
    ],
    ids=["tokenizer", "state size", "order of inputs", "no digest", "later format"],
)
def test_a_manifest_edited_by_hand_is_refused(run, tmp_path, change):
    export_run(run, tmp_path / "exported")
    manifest = json.loads((tmp_path / "exported/manifest.json").read_text())
    change(manifest)
    (tmp_path / "exported/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError) as caught:
        gluon_lm.load_exported(tmp_path / "exported")
    assert one_line(caught, tmp_path / "exported", "export the run again")


@pytest.mark.parametrize("manifest", ["", "[]", "3", "{}", '{"format": {}}'])
def test_a_manifest_that_is_none_of_ours_is_refused(tmp_path, manifest):
    (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(CheckpointError) as caught:
        gluon_lm.load_exported(tmp_path)
    assert one_line(caught, tmp_path)


def test_an_onnx_export_is_not_loaded_as_symbol_and_parameters(run, tmp_path):
    export_onnx(run, tmp_path / "exported")
    with pytest.raises(CheckpointError) as caught:
        gluon_lm.load_exported(tmp_path / "exported")
    assert one_line(caught, tmp_path / "exported", "onnx")


# ---------------------------------------------------------------- what an export leaves behind


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
def test_an_export_that_fails_leaves_the_old_one_whole(run, tmp_path, failure):
    export_run(run, tmp_path / "exports/exported")
    before = content_of(tmp_path / "exports")

    def write_model(trained, folder):
        (folder / "model-symbol.json").write_text("half")
        assert content_of(tmp_path / "exports/exported") == content_of(before_copy)
        raise failure

    before_copy = shutil.copytree(tmp_path / "exports/exported", tmp_path / "copy")
    with pytest.raises(ConfigError if failure is OSError else failure):
        write_export(run, tmp_path / "exports/exported", "symbol", write_model)
    assert content_of(tmp_path / "exports") == before


@pytest.mark.parametrize("export", [export_run, export_onnx])
def test_a_file_that_cannot_be_written_whole_is_noticed_and_leaves_the_old_export(run, tmp_path, export):
    export(run, tmp_path / "exports/exported")
    before = content_of(tmp_path / "exports")
    large = save_run(tmp_path / "large", hidden_size=100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # less than the weights, more than any other file
    try:
        with pytest.raises(ConfigError) as caught:
            export(large, tmp_path / "exports/exported")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert one_line(caught, "--output", tmp_path / "exports/exported", "cannot be written")
    assert content_of(tmp_path / "exports") == before


class OldLibrary:
    """A C library without `renameat2`."""

    def __init__(self, name):
        pass


@pytest.mark.parametrize("library", [ctypes.CDLL, OldLibrary], ids=["in one step", "in three"])
@pytest.mark.parametrize("export", [export_run, export_onnx])
def test_an_export_takes_the_place_of_another(run, tmp_path, export, library, monkeypatch):
    export(save_run(tmp_path / "gru", model="gru"), tmp_path / "fresh")
    export_run(run, tmp_path / "exports/exported")
    monkeypatch.setattr(ctypes, "CDLL", library)
    export(tmp_path / "gru", tmp_path / "exports/exported")
    assert content_of(tmp_path / "exports/exported") == content_of(tmp_path / "fresh")
    assert os.listdir(tmp_path / "exports") == ["exported"]


def test_a_link_to_an_export_stays_a_link(run, tmp_path):
    export_run(save_run(tmp_path / "gru", model="gru"), tmp_path / "exported")
    (tmp_path / "link").symlink_to("exported")
    manifest = export_run(run, tmp_path / "link")
    assert os.readlink(tmp_path / "link") == "exported"
    assert json.loads((tmp_path / "exported/manifest.json").read_text()) == manifest


def test_an_empty_folder_is_filled_and_missing_ones_are_made(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "missing/exported"):
        export_run(run, output)
        gluon_lm.load_exported(output)


@pytest.mark.parametrize("kind", ["file", "other files", "other manifest", "export with notes", "broken link", "run"])
@pytest.mark.parametrize("export", [export_run, export_onnx])
def test_what_is_no_export_of_ours_is_left_alone(run, tmp_path, export, kind):
    output = tmp_path / "output"
    if kind == "file":
        output.write_text("precious")
    elif kind == "broken link":
        output.symlink_to("nowhere")
    elif kind == "run":
        output = run
    elif kind == "export with notes":
        export_run(run, output)
        (output / "notes.txt").write_text("precious")
    else:
        output.mkdir()
        (output / ("manifest.json" if kind == "other manifest" else "page.html")).write_text('{"name": "precious"}')
    before = content_of(tmp_path)
    with pytest.raises(ConfigError) as caught:
        export(run, output)
    assert one_line(caught, "--output", output, "name another folder")
    assert content_of(tmp_path) == before


def test_without_onnx_the_extra_is_named_and_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    before = content_of(tmp_path)
    with pytest.raises(MissingDependency) as caught:
        export_onnx(run, tmp_path / "exported")
    assert one_line(caught, "pip install 'gluon_lm[onnx]'")
    assert content_of(tmp_path) == before
