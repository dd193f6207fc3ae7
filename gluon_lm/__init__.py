"""gluon_lm: word-level language models in MXNet Gluon, trained on one device or several.

Importing the package is light: the public names load what they need when they are first used. Its only side effect is
a hook that prepares the process for MXNet when something imports that (`gluon_lm.compatibility`).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .compatibility import supply_when_imported

if TYPE_CHECKING:  # what type checkers see of _HOME
    from .config import (
        Config as Config,
        DataConfig as DataConfig,
        DeviceConfig as DeviceConfig,
        ModelConfig as ModelConfig,
        OptimConfig as OptimConfig,
        TrainingConfig as TrainingConfig,
    )
    from .data import Corpus as Corpus, Vocabulary as Vocabulary, load_corpus as load_corpus
    from .errors import (
        CheckpointError as CheckpointError,
        ConfigError as ConfigError,
        DataError as DataError,
        DistributedError as DistributedError,
        GluonLMError as GluonLMError,
        MissingDependency as MissingDependency,
        OutOfMemory as OutOfMemory,
        TrainingDiverged as TrainingDiverged,
    )
    from .exported import load_exported as load_exported
    from .exporting import export_run as export_run
    from .generation.sampling import Sampling as Sampling
    from .models import LanguageModel as LanguageModel
    from .trained import load_model as load_model, load_predictor as load_predictor
    from .training.session import train_run as train_run

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
    "train_run": "training.session",
    "load_model": "trained",
    "load_predictor": "trained",
    "load_exported": "exported",
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
