"""Symbol and parameter files that run with MXNet alone; `gluon_lm.exported` describes and loads them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mxnet as mx

from . import __version__
from .config import CELLS, ModelConfig
from .errors import ConfigError
from .exported import FORMAT, MANIFEST, NOT_UTF8, PARAMETERS, SYMBOL
from .files import check_folder, in_utf8, replaced_folder, write_seal
from .logs import LOGGER
from .progress import progress_bar
from .trained import TrainedModel, load_trained
from .training.run_folder import VOCABULARY


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
    target = Path(os.path.realpath(output))  # a link to an export stays a link
    if in_utf8(target) != str(target):
        raise ConfigError(f"--output {output}: {NOT_UTF8.format(in_utf8(target))}; name another folder")
    with progress_bar(total=3, desc=f"exporting {output}", unit="step") as bar:
        trained = load_trained(name, mx.cpu())
        bar.update(1)
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with replaced_folder(target) as fresh:
                interface = write_model(trained, fresh)
                bar.update(1)
                trained.vocabulary.save(fresh / VOCABULARY)
                content = {
                    "format": FORMAT,
                    "kind": kind,
                    "gluon_lm": __version__,
                    "mxnet": mx.__version__,
                    **interface,
                    **trained.describe(),
                }
                manifest = write_seal(fresh, MANIFEST, content)
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
