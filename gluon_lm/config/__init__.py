"""What a run is: every knob, declared once, and how flags, YAML files and recipes become one frozen `Config`.

Where values come from, highest first: flags, ``--config``, the recipe, the default.
"""

from .elsewhere import INSTEAD_OF_TRAINING
from .kinds import Kind, choice, integer, option, optional, pathname, pathnames, read_value, real, show, switch, text
from .layers import Layer, Setting, build, config_folder, nearest, read_config, recipe_names, resolve
from .rules import device_count, share_problems, validate, vocabulary_problems
from .sections import (
    CELLS,
    OPTIMIZER_STATES,
    SECTIONS,
    TAIL_FACTOR,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimConfig,
    RunOptions,
    Section,
    TrainingConfig,
    flag_of,
    get,
    origins_in,
)

__all__ = [
    "INSTEAD_OF_TRAINING",
    "CELLS",
    "Config",
    "DataConfig",
    "DeviceConfig",
    "Kind",
    "Layer",
    "ModelConfig",
    "OPTIMIZER_STATES",
    "OptimConfig",
    "RunOptions",
    "SECTIONS",
    "Section",
    "Setting",
    "TAIL_FACTOR",
    "TrainingConfig",
    "build",
    "choice",
    "config_folder",
    "device_count",
    "flag_of",
    "get",
    "integer",
    "nearest",
    "option",
    "optional",
    "origins_in",
    "pathname",
    "pathnames",
    "read_config",
    "read_value",
    "real",
    "recipe_names",
    "resolve",
    "share_problems",
    "show",
    "switch",
    "text",
    "validate",
    "vocabulary_problems",
]
