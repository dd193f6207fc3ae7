"""Flags over a YAML file over a recipe over the defaults: how these become one `Config`."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ..errors import ConfigError
from .foreign_flags import INSTEAD_OF_TRAINING
from .kinds import keep_probability, key_of, read_value, show
from .rules import device_problems, flag_within, named_setting
from .sections import (
    OPTIMIZER_LR,
    REGULARISED_CELLS,
    SECTIONS,
    Config,
    DeviceConfig,
    RunOptions,
    Section,
    fields_by_name,
    flag_of,
    keep_names,
    names_by_key,
)

DEFAULT_RECIPE = "lm"

_Section = TypeVar("_Section", bound=Section)


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from (``flag --nhid``, ``my.yaml``, ``recipe lm``).

    `as_keep_probability` says that it was given as one, under another name.
    """

    value: Any
    source: str
    as_keep_probability: bool = False

    @property
    def flag(self) -> str:
        """The flag that gave it, as it was spelled; for another source, the source."""
        return flag_within(self.source) or self.source


Settings = dict[str, Setting]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` where one of `known` is close to `name`, else nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


_NUMBERS = ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")


class _FlatLoader(yaml.SafeLoader):
    """Refuses aliases of lists and mappings: a few lines of them can expand beyond any memory.

    Numbers stay text for the kinds of values, which read them as they read flags: to YAML 1.1, 010 is 8, and 1:30 90.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: Any, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if is_alias and not isinstance(node, yaml.ScalarNode):
            mark = node.start_mark if node else None
            raise yaml.composer.ComposerError(None, None, "an alias may stand for a single value only", mark)
        return node


def _yaml_lines(source: str | Path, origin: str) -> list[tuple[Any, Any, int]]:
    """Key, value and number of each line of YAML text, or of a file (a `Path`), that `origin` names in messages.

    Raises
    ------
    ConfigError
        If it cannot be read, or is anything but such lines.
    """
    try:
        content = source.read_text(encoding="utf-8-sig") if isinstance(source, Path) else source
        loader = _FlatLoader(content)
        node = loader.get_single_node()
        if node is None:
            return []
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{origin}: must be lines of the form name: value, for example hidden_size: 200")
        read = partial(loader.construct_object, deep=True)
        return [(read(key), read(value), key.start_mark.line + 1) for key, value in node.value]
    except OSError as error:
        is_recipe = Path(origin).stem in recipe_names() and Path(origin).parent == Path()
        fix = f"the recipe is --recipe {Path(origin).stem}" if is_recipe else "name a YAML file"
        raise ConfigError(f"{origin}: cannot be read ({error.strerror}); {fix}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{origin}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
        # PyYAML's constructors raise all of these for explicit tags that do not fit their value.
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(f"{origin}{where}: is not YAML that can be read ({what}); write name: value lines") from None


def _field_of(key: Any) -> tuple[str | None, bool]:
    """The field that a key of a file names, and whether as a keep probability; None: no such field."""
    if not isinstance(key, str):
        return None, False
    keep = keep_names().get(key_of(key))
    return keep or names_by_key().get(key_of(key)), keep is not None


def _unknown_key(key: Any) -> str:
    """What is wrong with a key that names no field."""
    key_of_field = key_of(str(key))
    if key_of_field.replace("-", "_") in RunOptions.__dataclass_fields__:
        return f"{key}: is not a value of the configuration; give {flag_of(key_of_field)} as a flag"
    known = [name.replace("-", "_") for name in (*names_by_key(), *keep_names())]
    if f"--{key_of_field}" in INSTEAD_OF_TRAINING:
        return f"unknown key {key}; {INSTEAD_OF_TRAINING[f'--{key_of_field}']}"
    hint = did_you_mean(str(key).lower().replace("-", "_")[:80], known) or "; --print-config lists every key"
    return f"unknown key {show(key)}{hint}"


def _read_yaml(source: str | Path, origin: str, problems: list[str]) -> tuple[Settings, str | None]:
    """The settings of a YAML file, and the recipe that it names."""
    layer: Settings = {}
    recipe: str | None = None
    seen: dict[str, int] = {}
    for key, raw, line in _yaml_lines(source, origin):
        where = f"{origin} line {line}:"
        name, is_kept = ("recipe", False) if key == "recipe" else _field_of(key)
        if name is None:
            problems.append(f"{where} {_unknown_key(key)}")
            continue
        if name in seen:
            problems.append(f"{where} {key}: given a second time, first in line {seen[name]}; keep one of them")
            continue
        seen[name] = line
        if name == "recipe":
            recipe = str(raw)
            continue
        kind = keep_probability(name) if is_kept else None
        value = read_value(fields_by_name()[name], raw, f"{where} {key}:", problems, kind)
        layer[name] = Setting(value, origin, is_kept)
    return layer, recipe


def config_folder() -> Path:
    """The folder of the recipes: in the package when installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in config_folder().glob("*.yaml"))


def _choose_recipe(flags: Settings, file: Settings) -> str:
    both = {**file, **flags}
    if "num_experts" in both and both["num_experts"].value is not None:
        return "mos"
    if "model" in both and both["model"].value in REGULARISED_CELLS:
        return "awd"
    return DEFAULT_RECIPE


# Fields of lower layers that a layer's field overrides, because both together make no sense: where its value meets the
# condition, they are dropped. So `--cpus 2` continues a run that was configured with GPUs, and `--vocab FILE` goes with
# any recipe.
_REPLACES: tuple[tuple[str, Callable[[Any], bool], frozenset[str]], ...] = (
    ("cpus", bool, frozenset({"gpus", "cuda", "single_gpu"})),
    ("gpus", bool, frozenset({"cpus", "cuda", "single_gpu"})),
    ("single_gpu", bool, frozenset({"cpus", "gpus", "cuda"})),
    ("cuda", bool, frozenset({"cpus"})),
    ("cuda", lambda value: value is False, frozenset({"gpus", "single_gpu"})),
    ("gctype", lambda value: value in ("none", "fp16"), frozenset({"gcthreshold"})),
    ("horovod", bool, frozenset({"kvstore"})),
    ("kvstore", bool, frozenset({"horovod"})),
    ("vocab", bool, frozenset({"min_freq", "max_vocab"})),
    ("min_freq", bool, frozenset({"vocab"})),
    ("max_vocab", bool, frozenset({"vocab"})),
    ("optimizer", lambda value: value != "sgd", frozenset({"ntasgd", "asgd", "nonmono"})),
    ("ntasgd", bool, frozenset({"asgd", "lr_decay"})),
    ("asgd", bool, frozenset({"ntasgd", "lr_decay"})),
    ("shuffle", bool, frozenset({"max_seq_len_delta"})),
    ("max_seq_len_delta", lambda value: value is not None, frozenset({"shuffle"})),
)


def _replaced_by(layer: Settings) -> set[str]:
    replaced = [names for field, is_such, names in _REPLACES if field in layer and is_such(layer[field].value)]
    return set().union(*replaced)


def _implied_by_keeping(source: str, merged: Settings) -> Settings:
    """What the keep probabilities of `source` imply for other fields, unless a layer sets those.

    As in OpenSeq2Seq, each concerns one place only, while our rates are also defaults for other places. There each word
    has its own masks, which holds here too unless the model, or a rate under our name, asks for locked ones.
    """
    rates = {"dropout_input", "dropout_hidden"}
    implied: Settings = {name: Setting(0.0, source) for name in rates}
    asks_for_locked = any(not merged[name].as_keep_probability for name in rates & merged.keys())
    if _value(merged, "model") not in REGULARISED_CELLS and not asks_for_locked:
        implied["locked"] = Setting(False, source)
    return implied


def _value(layer: Settings, name: str) -> Any:
    """A field's value in `layer`, or its default."""
    return layer[name].value if name in layer else fields_by_name()[name].default


def _merge(layers: Iterable[Settings], fixed: Set[str] = frozenset()) -> Settings:
    """Lay `layers`, lowest first, over each other; no other field replaces one of the `fixed`."""
    merged: Settings = {}
    for layer in layers:
        gpus, cuda = layer.get("gpus"), layer.get("cuda")
        if gpus and gpus.value == (-1,) and not (cuda and cuda.value):
            layer = {**layer, "gpus": Setting(None, gpus.source), "cuda": Setting(False, gpus.source)}
        optimizer = layer.get("optimizer")
        if optimizer and "lr" not in layer and _value(merged, "optimizer") != optimizer.value:
            # A learning rate suits one optimiser only.
            layer = {**layer, "lr": Setting(OPTIMIZER_LR[optimizer.value], optimizer.source)}
        for name in _replaced_by(layer) - fixed:
            merged.pop(name, None)
        merged.update(layer)
        averaging = ("ntasgd", "asgd")
        is_off = not any(name in merged and merged[name].value for name in averaging)
        if is_off and not layer.keys().isdisjoint(averaging) and "nonmono" not in layer:
            merged.pop("nonmono", None)  # it belongs to the averaging that this layer turns off
    return merged


@dataclass(frozen=True)
class Resolved:
    """A configuration, the source of each value by field name (and of ``recipe``), and the recipe."""

    config: Config
    sources: dict[str, str]
    recipe: str | None


def resolve(
    flags: Settings | None = None,
    config_file: str | Path | None = None,
    recipe: str | None = None,
    default_recipe: str | None = DEFAULT_RECIPE,
    fixed: Set[str] = frozenset(),
) -> Resolved:
    """Lay flags over the file over the recipe over the defaults.

    Parameters
    ----------
    flags : Settings, optional
        What was given on the command line.
    config_file : Path or str, optional
        A YAML file, or YAML text if it is a `str`.
    recipe : str, optional
        Name of a recipe; without it the file's, else the one that the model asks for, else `default_recipe`.
    default_recipe : str or None
        None: where no recipe is named, none is used.
    fixed : set of str
        Fields that a flag changes only by their own name: they are not dropped for one that goes badly with them.

    Raises
    ------
    ConfigError
        With every problem of the file and the recipe. `validate` checks the rules between fields.
    """
    problems: list[str] = []
    flags = flags or {}
    file: Settings = {}
    file_recipe: str | None = None
    origin = str(config_file) if isinstance(config_file, Path) else "config.yaml"
    if config_file is not None:
        try:
            file, file_recipe = _read_yaml(config_file, origin, problems)
        except ConfigError as error:
            problems.extend(error.problems)

    is_complete = fields_by_name().keys() <= file.keys()
    if recipe is not None:
        recipe_source = "flag --recipe"
        if is_complete:
            problems.append(f"--recipe {recipe}: has no effect, {origin} has every value; leave it out")
    elif file_recipe is not None:
        recipe, recipe_source = file_recipe, origin
    else:
        recipe, recipe_source = (_choose_recipe(flags, file) if default_recipe else None), "default"

    base: Settings = {}
    if recipe is not None and recipe not in recipe_names():
        # A run's own file has every value, so it is valid even where its recipe is not known.
        is_needed = recipe_source != origin or not is_complete
        hint = did_you_mean(recipe, recipe_names())
        named = named_setting("recipe", recipe, {"recipe": recipe_source})
        if is_needed:
            if Path(recipe).stem not in recipe_names() and (recipe.endswith((".yaml", ".yml")) or "/" in recipe):
                hint = "; a file of your own is given by --config"
            problems.append(f"{named}: must be one of {', '.join(recipe_names())}{hint}")
    elif recipe is not None:
        base, _ = _read_yaml(config_folder() / f"{recipe}.yaml", f"recipe {recipe}", problems)

    # A value that a file only repeats from its recipe, as a printed configuration does, still counts as the recipe's.
    file = {name: base[name] if base.get(name, s).value == s.value and name in base else s for name, s in file.items()}
    if default_recipe is not None and flags.keys().isdisjoint({"lr", "optimizer"}):  # the file is not a run's own
        problems += _rate_of_another_optimizer(base, file, f"{origin}:", f"recipe {recipe}")
    merged = _merge((base, file, flags), fixed)
    keeping = [setting for layer in (file, base) for setting in layer.values() if setting.as_keep_probability]
    if keeping:
        merged = {**_implied_by_keeping(keeping[0].source, merged), **merged}
    if problems:
        raise ConfigError(problems)
    sections: dict[str, Any] = {section: _make(cls, merged) for section, cls in SECTIONS.items()}
    sources = {name: merged[name].source if name in merged else "default" for name in fields_by_name()}
    return Resolved(Config(**sections), {"recipe": recipe_source, **sources}, recipe)


def _rate_of_another_optimizer(base: Settings, file: Settings, where: str, recipe: str) -> list[str]:
    """What is wrong where a file names an optimiser other than the recipe's, but repeats its learning rate."""
    if not {"optimizer", "lr"} <= base.keys() & file.keys():
        return []
    own, other, lr = base["optimizer"].value, file["optimizer"].value, base["lr"]
    if own == other or file["lr"] != lr:
        return []
    rate = show(lr.value)
    return [
        f"{where} lr {rate} is that of {recipe} for {own}; with optimizer {other} name another one, or leave it out"
    ]


def read_config(source: str | Path) -> Config:
    """Read a YAML file (a `Path`) or YAML text (a `str`) over its recipe, if any, and the defaults.

    One that holds every value, as a run's does, may name a recipe that does not exist.

    Raises
    ------
    ConfigError
        The file cannot be read, or holds unknown keys or invalid values. `validate` checks combinations.
    """
    return resolve(config_file=source, default_recipe=None).config


def _make(section: type[_Section], values: Settings) -> _Section:
    return section(**{f.name: values[f.name].value for f in dataclasses.fields(section) if f.name in values})


def build(section: type[_Section], values: Settings) -> _Section:
    """One section from the settings that were given, the defaults elsewhere.

    Raises
    ------
    ConfigError
        With every problem of a combination, where `section` is `DeviceConfig`.
    """
    merged = _merge([values])
    made = _make(section, merged)
    if isinstance(made, DeviceConfig):
        sources = {name: setting.source for name, setting in merged.items()}
        problems = device_problems(made, sources, made.count or 1)
        if problems:
            raise ConfigError(problems)
    return made
