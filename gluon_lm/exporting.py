"""Symbol and parameter files that run with MXNet alone, and loading them back.

An exported folder holds ``model-symbol.json``, ``model-0000.params``, ``vocab.txt`` and ``manifest.json``. The graph's
inputs are ``tokens``, of shape (T, N), and the states as a flat list; its outputs are log-probabilities (T, N, V) and
the new states.
"""

from __future__ import annotations

import dataclasses
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mxnet as mx
from mxnet import gluon

from . import __version__
from .config import CELLS, Config, ModelConfig, read_config, show
from .data import Vocabulary
from .data.tokenizers import TOKENIZERS
from .errors import CheckpointError, ConfigError, GluonLMError, reason
from .files import check_folder, digest_of, file_hash, replaced_folder, sealed
from .logs import LOGGER
from .memory import is_allocation_failure
from .models import LanguageModel
from .prediction import Predictor, describe_model
from .progress import progress_bar
from .training.checkpoint import describe_checkpoint, load_arrays, load_by_name, set_parameters, verify_checkpoint
from .training.run_folder import CONFIG, PARAMETERS as PARAMETERS_OF_RUN, VOCABULARY

SYMBOL, PARAMETERS, MANIFEST = "model-symbol.json", "model-0000.params", "manifest.json"
_FORMAT = 1
_ELEMENTS_AT_ONCE = 1 << 24  # of probabilities, 64 MiB of float32


@dataclasses.dataclass(frozen=True)
class TrainedModel:
    """A checkpoint as it is exported: its model on the CPU, without dropout, and a description."""

    path: Path
    model: LanguageModel
    vocabulary: Vocabulary
    config: Config
    description: dict[str, Any]


def is_exported(path: Path) -> bool:
    """Whether a folder was written by `export_run`."""
    return (path / MANIFEST).is_file()


def export_run(name: str | Path | None, output: str | Path) -> dict[str, Any]:
    """Write a run's model as symbol and parameters; an older export of that name is replaced once all is written.

    Parameters
    ----------
    name : str or Path, optional
        The run, or a checkpoint in it, as `gluon_lm.training.run_folder.find_run` takes it.
    output : str or Path
        The folder.

    Returns
    -------
    dict
        The manifest.

    Raises
    ------
    CheckpointError
        If there is no such run, or it is damaged.
    ConfigError
        If `output` exists and was not exported by us, or cannot be written.
    """
    return write_export(name, output, "symbol", _write_symbol)


def write_export(
    name: str | Path | None, output: str | Path, kind: str, write_model: Callable[[TrainedModel, Path], dict[str, Any]]
) -> dict[str, Any]:
    """Make an exported folder atomically: at any time it is absent or complete, the old one or the new one.

    Parameters
    ----------
    kind : str
        ``symbol`` or ``onnx``, recorded in the manifest.
    write_model : callable
        Writes the model's files into a folder and returns the manifest's entries on its inputs and outputs.
    """
    output = Path(output)
    if (output.exists() or output.is_symlink()) and not _may_be_replaced(output):
        raise ConfigError(
            f"--output {output}: exists and is not an exported model, or has other files in it; name another folder"
        )
    check_folder("--output", output)
    with progress_bar(total=3, desc=f"exporting {output}", unit="step") as bar:
        trained = load_trained(name)
        bar.update(1)
        target = Path(os.path.realpath(output))  # a link to an export stays a link
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced_folder(target) as fresh:
                interface = write_model(trained, fresh)
                bar.update(1)
                trained.vocabulary.save(fresh / VOCABULARY)
                content = {
                    "format": _FORMAT,
                    "kind": kind,
                    "gluon_lm": __version__,
                    "mxnet": mx.__version__,
                    **interface,
                    **trained.description,
                }
                manifest = sealed(content, fresh)
                written = json.dumps(manifest, indent=1, ensure_ascii=False)
                (fresh / MANIFEST).write_text(f"{written}\n", encoding="utf-8", errors="backslashreplace")
        except OSError as error:
            raise ConfigError(
                f"--output {output}: cannot be written ({error.strerror or error}); name another folder"
            ) from error
        bar.update(1)
    LOGGER.info(
        "%s | %s, vocabulary %s | %s",
        trained.path,
        trained.config.model.summary,
        f"{len(trained.vocabulary):,}",
        output,
    )
    return manifest


def load_trained(name: str | Path | None) -> TrainedModel:
    """A run's best model on the CPU, without dropout."""

    def load(path: Path) -> TrainedModel:
        state = verify_checkpoint(path)
        config = read_config(path / CONFIG)
        vocabulary = Vocabulary.load(path / VOCABULARY)
        with mx.name.NameManager():  # its names do not depend on models made before
            model = LanguageModel(config.model.without_dropout(), len(vocabulary), prefix="")
        model.initialize_parameters(0, [mx.cpu()])
        set_parameters(model, load_arrays(path / PARAMETERS_OF_RUN), path)
        description = describe_model(config.model, len(vocabulary))
        description.update(describe_checkpoint(path, state, config, vocabulary))
        return TrainedModel(path, model, vocabulary, config, description)

    return load_by_name(name, load)


def state_layout(config: ModelConfig) -> list[dict[str, Any]]:
    """The recurrent state as it goes in and out: name, layer, kind and shape of each array."""
    kinds = ("hidden", "cell")[: CELLS[config.cell].num_states]
    arrays = [(layer, kind, size) for layer, size in enumerate(config.layer_sizes) for kind in kinds]
    return [
        {"name": f"state_{i}", "layer": layer, "kind": kind, "shape": [1, "N", size], "initial": 0}
        for i, (layer, kind, size) in enumerate(arrays)
    ]


def _write_symbol(trained: TrainedModel, folder: Path) -> dict[str, Any]:
    states = state_layout(trained.config.model)
    tokens = mx.sym.var("tokens")
    with mx.name.NameManager():  # as in `load_trained`
        outputs = mx.sym.Group(list(trained.model(tokens, *[mx.sym.var(state["name"]) for state in states])))
    (folder / SYMBOL).write_text(outputs.tojson(), encoding="utf-8")
    parameters = {f"arg:{p.name}": p.data() for p in trained.model.named_parameters().values()}
    try:
        mx.nd.save(str(folder / PARAMETERS), parameters)
        # MXNet's writer does not notice that the disk is full at the last block of a file; its reader does.
        mx.nd.load(str(folder / PARAMETERS))
    except mx.MXNetError as error:
        raise OSError(f"{PARAMETERS} was not written completely") from error
    log_probs, *new_states = outputs.list_outputs()
    return {
        "inputs": [
            {"name": "tokens", "shape": ["T", "N"], "dtype": "float32 or int32", "what": "word ids"},
            *({**state, "dtype": "float32"} for state in states),
        ],
        "outputs": [
            {"name": log_probs, "shape": ["T", "N", "V"], "dtype": "float32", "what": "log-probability, base e"},
            *({"name": name, "next": state["name"]} for name, state in zip(new_states, states)),
        ],
    }


def _may_be_replaced(output: Path) -> bool:
    """Whether nothing but an export, complete or not, would be lost."""
    try:
        names = {path.name for path in output.iterdir()}
        if not names:
            return True
        manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        return "gluon_lm" in manifest and names <= {MANIFEST, *manifest["sha256"]}
    except (OSError, ValueError, KeyError, TypeError):
        return False


# ---------------------------------------------------------------- loading


class ExportedPredictor(Predictor):
    """The model of an exported folder."""

    def __init__(self, folder: Path, manifest: dict[str, Any], device: mx.Context) -> None:
        text = manifest["text"]
        super().__init__(Vocabulary.load(folder / VOCABULARY), text["tokenizer"], device)
        self._manifest, self.path = manifest, folder
        # The graph computes all softmaxes of all rows at once.
        width = len(self.vocabulary) * manifest["model"]["num_experts"]
        self.rows_at_once = max(1, _ELEMENTS_AT_ONCE // width)
        self._state_sizes = [entry["shape"][2] for entry in manifest["inputs"][1:]]
        names = [entry["name"] for entry in manifest["inputs"]]
        with warnings.catch_warnings():
            # Tokens may be of any type, so that C programs can pass floats; MXNet warns that it cannot infer the type.
            warnings.filterwarnings("ignore", "Cannot decide type", UserWarning)
            self.network = gluon.SymbolBlock.imports(str(folder / SYMBOL), names, str(folder / PARAMETERS), ctx=device)
            # The graph without its head, for text of which only the state is needed.
            new_states, inputs = mx.sym.load(str(folder / SYMBOL))[1:], [mx.sym.var(name) for name in names]
            self._encoder = gluon.SymbolBlock(new_states, inputs, self.network.params)
        for block in (self.network, self._encoder):
            block.hybridize(static_alloc=True)

    def describe(self):
        return {name: self._manifest[name] for name in ("model", "text", "training")}

    def begin_state(self, num_streams):
        return [mx.nd.zeros((1, num_streams, size), ctx=self.device) for size in self._state_sizes]

    def log_probs(self, tokens_TN, states):
        log_probs_TNV, *states = self.network(tokens_TN, *states)
        return log_probs_TNV, states

    def _read(self, tokens_TN, states):
        new_states = self._encoder(tokens_TN, *states)
        return new_states if isinstance(new_states, list) else [new_states]  # a single one is not in a list


def load_exported(folder: str | Path, device: mx.Context | None = None) -> ExportedPredictor:
    """A predictor from an exported folder.

    Raises
    ------
    CheckpointError
        If a file is missing or was changed.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT or manifest["kind"] != "symbol":
            raise CheckpointError(
                f"{folder}: is an export as {manifest['kind']} of format {manifest['format']}, and gluon_lm "
                f"{__version__} loads those as symbol of format {_FORMAT}; export the run again, with --format symbol"
            )
        if manifest["digest"] != digest_of(manifest):
            raise CheckpointError(f"{folder}: {MANIFEST} is not as it was written; export the run again")
        for name in (SYMBOL, PARAMETERS, VOCABULARY):
            if file_hash(folder / name) != manifest["sha256"][name]:
                raise CheckpointError(f"{folder}: {name} is not the file that the manifest names; export the run again")
        predictor = ExportedPredictor(folder, manifest, device or mx.cpu())
        _try_out(predictor)
        return predictor
    except GluonLMError:
        raise
    except Exception as error:  # MXNet's errors for a graph that it cannot read or run have no common base class
        if is_allocation_failure(error):
            raise
        raise CheckpointError(
            f"{folder}: is not a complete export according to its {MANIFEST} ({reason(error)}); export the run again"
        ) from error


def _try_out(predictor: ExportedPredictor) -> None:
    """Predict a word, to refuse files that match each other but make no working model before they are used."""
    if predictor.tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer {show(predictor.tokenizer)} is unknown")
    before = predictor.begin_state(1)
    log_probs_TNV, after = predictor.log_probs(mx.nd.zeros((1, 1), ctx=predictor.device, dtype="int32"), before)
    shapes = [array.shape for array in (log_probs_TNV, *after)]
    if shapes != [(1, 1, len(predictor.vocabulary)), *(array.shape for array in before)]:
        raise ValueError(f"the graph's outputs are of shapes {shapes}")
    log_probs_TNV.wait_to_read()
