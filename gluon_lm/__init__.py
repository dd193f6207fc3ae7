"""gluon_lm: word-level language models in MXNet Gluon, trained on one device or several.

Importing the package is light: the public names load what they need when they are first used. The one thing that it
does is to see to it that MXNet, once something imports it, finds what it needs (`gluon_lm.compatibility`).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .compatibility import supply_when_imported

__version__ = "0.1.0"

_HOME = {
    "Config": "config",
    "DataConfig": "config",
    "DeviceConfig": "config",
    "ModelConfig": "config",
    "OptimConfig": "config",
    "TrainingConfig": "config",
    "Corpus": "data",
    "Vocabulary": "data",
    "load_corpus": "data",
    "LanguageModel": "models",
    "Trainer": "training.trainer",
    "train_run": "training.session",
    "load_model": "training.checkpoint",
    "load_predictor": "prediction",
    "load_exported": "exporting",
    "export_run": "exporting",
    "Sampling": "generation.sampling",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "DataError": "errors",
    "DistributedError": "errors",
    "GluonLMError": "errors",
    "MissingDependency": "errors",
    "OutOfMemory": "errors",
    "TrainingDiverged": "errors",
}
__all__ = ["__version__", *_HOME]

supply_when_imported()


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
