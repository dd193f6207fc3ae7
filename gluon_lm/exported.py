"""Exported folders, as `gluon_lm.exporting` writes them: symbol and parameter files, loaded back.

A folder holds ``model-symbol.json``, ``model-0000.params``, ``vocab.txt`` and ``manifest.json``. The graph's inputs are
``tokens``, of shape (T, N), and the states as a flat list; its outputs are log-probabilities (T, N, V) and the new
states.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import mxnet as mx
from mxnet import gluon

from . import __version__
from .config import show
from .data import Vocabulary
from .data.tokenizers import TOKENIZERS
from .errors import CheckpointError, GluonLMError, reason
from .files import in_utf8, read_seal, verify_files
from .memory import is_allocation_failure
from .prediction import Predictor
from .training.run_folder import VOCABULARY

SYMBOL, PARAMETERS, MANIFEST = "model-symbol.json", "model-0000.params", "manifest.json"
FORMAT = 1
NOT_UTF8 = "MXNet takes only paths that are UTF-8, and {} is not"
_ELEMENTS_AT_ONCE = 1 << 24  # of probabilities, 64 MiB of float32


def is_exported(path: Path) -> bool:
    """Whether a folder was written by `gluon_lm.exporting.export_run`."""
    return (path / MANIFEST).is_file()


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
    if in_utf8(folder) != str(folder):
        raise CheckpointError(f"{folder}: {NOT_UTF8.format(in_utf8(folder))}; rename what is not")
    try:
        manifest = read_seal(folder, MANIFEST)
        if manifest["format"] != FORMAT or manifest["kind"] != "symbol":
            raise CheckpointError(
                f"{folder}: is an export as {manifest['kind']} of format {manifest['format']}, and gluon_lm "
                f"{__version__} loads those as symbol of format {FORMAT}; export the run again, with --format symbol"
            )
        if manifest["sha256"].keys() != {SYMBOL, PARAMETERS, VOCABULARY}:
            raise ValueError(f"{MANIFEST} names other files than an export has")
        verify_files(folder, manifest)
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
