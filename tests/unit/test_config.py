"""How flags, YAML files, recipes and defaults become a configuration, and which ones are refused."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from gluon_lm.config import (
    SECTIONS,
    Config,
    DataConfig,
    DeviceConfig,
    ModelConfig,
    OptimConfig,
    Setting,
    TrainingConfig,
    build,
    config_folder,
    device_count,
    flag_of,
    get,
    read_config,
    real,
    recipe_names,
    resolve,
    share_problems,
    validate,
)
from gluon_lm.errors import ConfigError

FIELDS = {f.name: f for section in SECTIONS.values() for f in dataclasses.fields(section)}
CONFIG_FILES = sorted(config_folder().glob("*.yaml"))


def flags(**values):
    return {name: Setting(value, f"flag {flag_of(name)}") for name, value in values.items()}


def problems_of(call, *args, **kwargs):
    with pytest.raises(ConfigError) as caught:
        call(*args, **kwargs)
    return caught.value.problems


# ---------------------------------------------------------------- the table


def test_names_and_aliases_are_unique():
    names = [name for f in FIELDS.values() for name in (f.name, *f.metadata["aliases"], f.metadata["keep"]) if name]
    assert len(names) == len(set(names))
    assert len(FIELDS) == sum(len(dataclasses.fields(section)) for section in SECTIONS.values())


def test_every_default_obeys_its_own_rule():
    for name, f in FIELDS.items():
        if name != "lr":  # which is the optimiser's
            assert f.metadata["kind"].read(f.default) == f.default, name


@pytest.mark.parametrize(
    "name, raw, value",
    [
        ("model", "LSTM", "lstm"),
        ("model", "RNN_TANH", "rnn_tanh"),
        ("model", "rnn-relu", "rnn_relu"),
        ("model", "AWD_LSTM", "awd-lstm"),
        ("gctype", "2BIT", "2bit"),
        ("lr", "1e-4", 1e-4),
        ("lr", 20, 20.0),
        ("lr_decay", "none", None),
        ("clip_norm", "None", None),
        ("gpus", "0,1,2,3", (0, 1, 2, 3)),
        ("gpus", [2, 0], (2, 0)),
        ("gpus", 3, (3,)),
        ("when", ["10", "20,30"], (10, 20, 30)),
        ("when", ["-1"], None),
        ("dropout_input", "0.65", 0.65),
        ("dropout_hidden", "none", None),
        ("locked", False, False),
        ("locked", None, None),
        ("last_hidden_size", "-1", None),
        ("small_batch_size", -1, None),
        ("data", "ptb", ("ptb",)),
        ("data", ["a", "b", "c"], ("a", "b", "c")),
        ("max_seq_len_delta", "0", 0),
        ("cuda", None, None),
        ("dropout", 0, 0.0),
    ],
)
def test_values_are_read(name, raw, value):
    read = FIELDS[name].metadata["kind"].read
    assert read(raw) == value
    assert type(read(raw)) is type(value)
    assert read(read(raw)) == value


@pytest.mark.parametrize(
    "name, raw",
    [
        ("hidden_size", 0),
        ("hidden_size", 20.0),
        ("hidden_size", True),
        ("hidden_size", "1e3"),
        ("hidden_size", None),
        ("bptt", "-1"),
        ("epochs", "0"),
        ("seed", 2**31),
        ("seed", -1),
        ("dropout", 1),
        ("dropout", -0.1),
        ("dropout", math.nan),
        ("lr", 0),
        ("lr", "inf"),
        ("lr", 10**400),
        ("lr_decay", 1),
        ("clip_norm", 0),
        ("gcthreshold", 0),
        ("model", "transformer"),
        ("model", 3),
        ("gpus", "0,0"),
        ("gpus", "0,x"),
        ("gpus", -2),
        ("gpus", True),
        ("gpus", []),
        ("data", ["a", "b"]),
        ("data", {"a": 1}),
        ("data", 5),
        ("data", ""),
        ("tied", "yes"),
        ("tied", 1),
        ("when", "0"),
        ("dropout_hidden", 1),
        ("locked", "yes"),
        ("nonmono", 0),
        ("nonmono", None),
        ("optimizer", "asgd"),
    ],
)
def test_values_that_break_their_rule_are_refused(name, raw):
    with pytest.raises((ValueError, TypeError, OverflowError)):
        FIELDS[name].metadata["kind"].read(raw)


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().model.hidden_size = 5  # type: ignore[misc]


# ---------------------------------------------------------------- recipes

LM = {
    "model": "lstm", "embed_size": 200, "hidden_size": 200, "num_layers": 2, "tied": False,
    "dropout": 0.2, "init": "uniform", "optimizer": "sgd", "lr": 20.0, "lr_decay": 4.0, "clip_norm": 0.25,
    "epochs": 40, "batch_size": 20, "bptt": 35,
}  # fmt: skip
AWD = {
    "embed_size": 400, "hidden_size": 1150, "num_layers": 3, "tied": True, "dropout": 0.4,
    "dropout_input": 0.65, "dropout_hidden": 0.3, "dropout_embed": 0.1, "weight_drop": 0.5,
    "optimizer": "sgd", "lr": 30.0, "lr_decay": None, "clip_norm": 0.25, "weight_decay": 1.2e-6,
    "alpha": 2.0, "beta": 1.0, "ntasgd": True, "nonmono": 5, "epochs": 8000, "bptt": 70,
}  # fmt: skip
RECIPES = {
    "lm": LM,
    "mxnet": {**LM, "embed_size": 650, "hidden_size": 650, "dropout": 0.5, "init": "xavier"},
    "awd": {**AWD, "model": "awd-lstm", "batch_size": 80},
    "mos": {**AWD, "model": "lstm", "batch_size": 20, "num_experts": 10, "max_seq_len_delta": 40},
    "demo": {
        "model": "lstm", "embed_size": 600, "hidden_size": 600, "num_layers": 2, "tied": False,
        "dropout": 0.5, "optimizer": "adam", "lr": 1e-4, "lr_decay": None, "clip_norm": 0.25,
        "epochs": 20, "batch_size": 20, "bptt": 30, "min_freq": 10, "log_interval": 100,
    },
}  # fmt: skip


OPENSEQ2SEQ = {
    "model": "lstm", "num_layers": 3, "tied": True, "layer_norm": True, "locked": False, "dropout_candidate": 0.3,
    "optimizer": "adam", "lr_decay": None, "clip_norm": None, "weight_decay": 2e-6,
    "random_start": True, "shuffle": True, "epochs": 1500, "bptt": 96, "log_interval": 40,
}  # fmt: skip
PUBLISHED = {
    **RECIPES,
    "openseq2seq-wikitext-103": {
        **OPENSEQ2SEQ, "embed_size": 400, "hidden_size": 1024, "dropout_embed_elements": 0.2, "dropout_hidden": 0.15,
        "dropout": 0.15, "lr": 1e-3, "batch_size": 896, "eval_every": 160,
    },
    "openseq2seq-wikitext-2": {
        **OPENSEQ2SEQ, "embed_size": 256, "hidden_size": 896, "dropout_embed_elements": 0.63, "dropout_hidden": 0.4,
        "dropout": 0.4, "lr": 4e-4, "batch_size": 320, "eval_every": 80,
    },
}  # fmt: skip


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_recipes_have_the_published_values(recipe):
    resolved = resolve(recipe=recipe)
    assert {name: get(resolved.config, name) for name in PUBLISHED[recipe]} == PUBLISHED[recipe]
    assert resolved.recipe == recipe
    assert validate(resolved.config, resolved.sources) == []


def test_recipes_that_name_no_corpus_leave_text_and_seed_to_the_user():
    assert set(RECIPES) <= set(recipe_names())
    for recipe in RECIPES:
        keys = yaml.safe_load((config_folder() / f"{recipe}.yaml").read_text(encoding="utf-8"))
        assert not set(keys) & {"data", "seed"}, recipe


def test_the_mixture_for_wikitext_2_goes_on_the_three_gpus_of_its_authors():
    assert share_problems(resolve(recipe="mos-wikitext-2").config, 3) == []


@pytest.mark.parametrize("path", CONFIG_FILES, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_is_sound(path):
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not set(keys) & {"recipe", "data_dir", *DeviceConfig.__dataclass_fields__}, "those are the user's to choose"
    as_recipe = resolve(recipe=path.stem)
    assert validate(as_recipe.config, as_recipe.sources) == []
    as_file = resolve(config_file=path, default_recipe=None)  # here, a knob without effect is refused as well
    assert validate(as_file.config, as_file.sources) == []
    assert as_file.config == as_recipe.config


def test_defaults_are_the_lm_recipe_without_its_falling_learning_rate():
    assert Config().optim.lr_decay is None
    assert resolve().config == dataclasses.replace(Config(), optim=OptimConfig(lr_decay=4.0))


@pytest.mark.parametrize(
    "given_flags, recipe",
    [
        ({}, "lm"),
        ({"model": "gru"}, "lm"),
        ({"model": "awd-gru"}, "awd"),
        ({"num_experts": 15}, "mos"),
        ({"num_experts": 15, "model": "awd-lstm"}, "mos"),
        ({"num_experts": None}, "lm"),
    ],
)
def test_recipe_follows_from_the_flags(given_flags, recipe):
    resolved = resolve(flags(**given_flags))
    assert (resolved.recipe, resolved.sources["recipe"]) == (recipe, "default")


def test_recipe_follows_from_the_file():
    assert resolve(config_file="n_experts: 3").recipe == "mos"
    assert resolve(config_file="model: AWD-LSTM").recipe == "awd"
    assert resolve(flags(model="lstm"), config_file="model: awd-lstm").recipe == "lm"
    assert resolve(config_file="recipe: mxnet").config.model.hidden_size == 650
    assert resolve(config_file="recipe: mxnet", recipe="demo").recipe == "demo"


def test_numbers_of_a_file_are_those_of_flags():
    assert read_config("seed: 010\nlr: 1e-3\nwhen: [3, 5]\n") == read_config("seed: 10\nlr: 0.001\nwhen: 3,5\n")
    for line in ("lr: 1:30", "seed: 0x10", "epochs: 1.0"):
        with pytest.raises(ConfigError, match=re.escape(line) + ": must be"):
            read_config(f"{line}\n")


def test_a_file_with_every_value_needs_no_recipe_and_one_without_does():
    config = resolve(recipe="mxnet").config
    assert read_config(config.to_yaml(recipe="nobodys")) == config
    with pytest.raises(ConfigError, match="recipe nobodys .*must be one of"):
        read_config("recipe: nobodys\nhidden_size: 5\n")


def test_a_recipe_that_a_file_leaves_nothing_to_is_refused(tmp_path):
    printed = resolve(recipe="mxnet").config.to_yaml(recipe="mxnet")
    (tmp_path / "my.yaml").write_text(printed, encoding="utf-8")
    assert problems_of(resolve, config_file=tmp_path / "my.yaml", recipe="demo") == [
        f"--recipe demo: has no effect, {tmp_path}/my.yaml has every value; leave it out"
    ]
    assert resolve(flags(seed=5), config_file=tmp_path / "my.yaml").recipe == "mxnet"
    without_seed = printed.replace("seed: 1111\n", "")
    assert resolve(config_file=without_seed, recipe="demo").recipe == "demo"


def test_a_file_is_no_recipe_and_a_recipe_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./mine", "mine.yaml"):
        (problem,) = problems_of(resolve, recipe=name)
        assert problem.endswith("; a file of your own is given by --config")
    assert problems_of(resolve, recipe="awd-small.yaml")[0].endswith("; did you mean awd-small?")
    for name in ("awd-small", "awd-small.yaml"):
        (problem,) = problems_of(resolve, config_file=Path(name))
        assert problem.endswith("(No such file or directory); the recipe is --recipe awd-small")


def test_an_edited_optimiser_does_not_keep_the_recipes_learning_rate():
    printed = resolve(recipe="lm").config.to_yaml(recipe="lm")
    edited = printed.replace("optimizer: sgd", "optimizer: adam")
    assert edited != printed
    assert problems_of(resolve, config_file=edited) == [
        "config.yaml: lr 20 is that of recipe lm for sgd; with optimizer adam name another one, or leave it out"
    ]
    assert resolve(config_file=edited.replace("lr: 20.0", "lr: 0.002")).config.optim.lr == 0.002
    assert resolve(flags(lr=0.003), config_file=edited).config.optim.lr == 0.003
    assert resolve(flags(optimizer="sgd"), config_file=edited).config.optim.lr == 20
    assert resolve(config_file=printed).config.optim.lr == 20
    of_run = resolve(flags(optimizer="adam", lr=20), recipe="lm").config
    assert read_config(of_run.to_yaml(recipe="lm")) == of_run


def test_unknown_recipe_gets_the_nearest():
    assert problems_of(resolve, recipe="mxnett") == [
        f"--recipe mxnett: must be one of {', '.join(recipe_names())}; did you mean mxnet?"
    ]
    assert "(config.yaml)" in problems_of(resolve, config_file="recipe: lmm")[0]


# ---------------------------------------------------------------- precedence


def test_flags_over_file_over_recipe_over_default():
    resolved = resolve(flags(hidden_size=7), config_file="nhid: 8\nemsize: 9\n", recipe="mxnet")
    model = resolved.config.model
    assert (model.hidden_size, model.embed_size, model.dropout, model.weight_drop) == (7, 9, 0.5, 0.0)
    names = ("hidden_size", "embed_size", "dropout", "weight_drop", "recipe")
    assert [resolved.sources[name] for name in names] == [
        "flag --hidden-size", "config.yaml", "recipe mxnet", "default", "flag --recipe"
    ]  # fmt: skip


NUMBERS = {
    name: st.integers(1, 9)
    for name in (
        "embed_size",
        "hidden_size",
        "num_layers",
        "epochs",
        "batch_size",
        "bptt",
        "seed",
        "patience",
    )
}
LAYERS = st.fixed_dictionaries({}, optional=NUMBERS)


@settings(deadline=None, max_examples=50)
@given(LAYERS, LAYERS, st.sampled_from(["lm", "mxnet", "demo"]))
def test_merging_takes_each_value_from_the_highest_layer(flag_values, file_values, recipe):
    resolved = resolve(flags(**flag_values), config_file=yaml.safe_dump(file_values), recipe=recipe)
    base = yaml.safe_load((config_folder() / f"{recipe}.yaml").read_text(encoding="utf-8"))
    for name in NUMBERS:
        layers = [flag_values, file_values, base, {name: FIELDS[name].default}]
        assert get(resolved.config, name) == next(layer[name] for layer in layers if name in layer)


@pytest.mark.parametrize(
    "above, below, expected",
    [
        ({"cpus": 2}, "gpus: [0, 1]\ncuda: true", {"cpus": 2, "gpus": None, "cuda": None}),
        ({"gpus": (3,)}, "cpus: 4", {"cpus": None, "gpus": (3,)}),
        ({"gpus": (3,)}, "single_gpu: true", {"single_gpu": False, "gpus": (3,)}),
        ({"gpus": (-1,)}, "gpus: [0, 1]", {"gpus": None, "cuda": False}),
        ({"cuda": False}, "gpus: [0, 1]", {"gpus": None, "cuda": False}),
        ({"cuda": False}, "cpus: 4", {"cpus": 4, "cuda": False}),
        ({"cuda": True}, "gpus: [0, 1]", {"gpus": (0, 1), "cuda": True}),
        ({"cuda": True}, "cpus: 4", {"cpus": None, "cuda": True}),
        ({"single_gpu": True}, "gpus: [0, 1]", {"gpus": None, "single_gpu": True}),
        ({"single_gpu": True}, "cuda: false", {"cuda": None, "single_gpu": True}),
        (
            {"gctype": "none"},
            "gctype: 2bit\ngcthreshold: 0.3\ncpus: 2",
            {"gctype": "none", "gcthreshold": 0.5},
        ),
        ({"vocab": "v.txt"}, "recipe: demo", {"vocab": "v.txt", "min_freq": None}),
        ({"max_vocab": 9}, "vocab: v.txt", {"vocab": None, "max_vocab": 9}),
        (
            {"optimizer": "adam"},
            "recipe: awd\nnonmono: 3",
            {"optimizer": "adam", "ntasgd": False, "asgd": False, "nonmono": 5},
        ),
        ({"optimizer": "adam"}, "asgd: true", {"optimizer": "adam", "asgd": False}),
        ({"ntasgd": True}, "recipe: lm", {"ntasgd": True, "lr_decay": None}),
        ({"ntasgd": True}, "asgd: true", {"ntasgd": True, "asgd": False}),
        ({"asgd": True}, "recipe: awd\nnonmono: 3", {"asgd": True, "ntasgd": False, "nonmono": 3}),
        ({"asgd": True}, "recipe: mxnet", {"asgd": True, "lr_decay": None}),
        ({"ntasgd": False}, "recipe: awd\nnonmono: 3", {"ntasgd": False, "nonmono": 5, "lr_decay": None}),
        ({"asgd": False}, "ntasgd: true\nnonmono: 3", {"ntasgd": True, "nonmono": 3}),
        ({"ntasgd": False, "lr_decay": 2.0}, "recipe: awd", {"ntasgd": False, "lr_decay": 2.0}),
        ({"shuffle": True}, "max_seq_len_delta: 0", {"shuffle": True, "max_seq_len_delta": None}),
        ({"max_seq_len_delta": 0}, "shuffle: true", {"shuffle": False, "max_seq_len_delta": 0}),
    ],
)
def test_a_higher_layer_replaces_what_contradicts_it(above, below, expected):
    resolved = resolve(flags(**above), config_file=below)
    assert {name: get(resolved.config, name) for name in expected} == expected
    assert validate(resolved.config, resolved.sources) == []


# ---------------------------------------------------------------- YAML


@pytest.mark.parametrize("recipe", RECIPES)
def test_print_config_is_yaml_that_loads_back_equal(recipe, tmp_path):
    resolved = resolve(flags(hidden_size=7, gpus=(0, 1), data=("a b", "#c", "é: d")), recipe=recipe)
    printed = resolved.config.to_yaml(resolved.sources, resolved.recipe)
    (tmp_path / "config.yaml").write_text(printed, encoding="utf-8")
    assert read_config(tmp_path / "config.yaml") == resolved.config
    assert set(yaml.safe_load(printed)) == {"recipe", *FIELDS}
    assert "hidden_size: 7  # flag --hidden-size\n" in printed
    assert f"recipe: {recipe}  # flag --recipe\n" in printed
    assert "seed: 1111  # default\n" in printed
    assert f"lr: {resolved.config.optim.lr}  # recipe {recipe}\n" in printed


def _values(f):
    if f.default is False or f.default is True:
        return st.booleans()
    if f.name in ("lr", "lr_decay", "clip_norm"):
        return st.floats(1.01, 1e9)
    if f.name in ("dropout_input", "dropout_hidden", "locked"):
        return st.none() | (st.booleans() if f.name == "locked" else st.floats(0, 0.99))
    if isinstance(f.default, float):
        return st.floats(1e-12, 0.99)
    if isinstance(f.default, int):
        return st.integers(1, 2**31 - 1)
    return st.just(f.default)


CONFIGS = st.builds(
    Config,
    **{
        name: st.builds(section, **{f.name: _values(f) for f in dataclasses.fields(section)})
        for name, section in SECTIONS.items()
        if name != "data"
    },
    data=st.builds(
        DataConfig,
        data=st.lists(st.text(min_size=1).filter(str.strip), min_size=3, max_size=3).map(tuple),
        vocab=st.text(min_size=1).filter(lambda s: s.strip() and s.lower() not in ("none", "null")),
    ),
)


@settings(deadline=None, max_examples=50)
@given(CONFIGS, st.text(max_size=8))
def test_any_configuration_survives_yaml(config, source):
    assert read_config(config.to_yaml()) == config
    assert read_config(config.to_yaml(dict.fromkeys(FIELDS, source), "lm")) == config


def test_yaml_takes_both_spellings_aliases_and_short_floats():
    config = read_config("batch-size: 3\nnhid: 4\nembed-dim: 5\nlr: 1e-4\nclip: none\ngpus: 0,1\n")
    assert config.training.batch_size == 3
    assert (config.model.hidden_size, config.model.embed_size) == (4, 5)
    assert (config.optim.lr, config.optim.clip_norm, config.devices.gpus) == (1e-4, None, (0, 1))


def test_empty_yaml_changes_nothing():
    assert read_config("# nothing\n") == Config()


def test_every_problem_of_a_file_is_reported_with_its_line(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("hiden_size: 5\nlr: fast\nlr: 3\nnhid: 0\nhidden_size: 3\nqqqqqqqq: 1\n5: 6\n", encoding="utf-8")
    assert problems_of(resolve, config_file=path) == [
        f"{path} line 1: unknown key hiden_size; did you mean hidden_size?",
        f"{path} line 2: lr: fast: must be a number above 0",
        f"{path} line 3: lr: given a second time, first in line 2; keep one of them",
        f"{path} line 4: nhid: 0: must be a whole number, 1 or more; for example 200",
        f"{path} line 5: hidden_size: given a second time, first in line 4; keep one of them",
        f"{path} line 6: unknown key qqqqqqqq; --print-config lists every key",
        f"{path} line 7: unknown key 5; --print-config lists every key",
    ]


@pytest.mark.parametrize(
    "content",
    [
        "a: [1",
        "- 1",
        "just words",
        "lr: 1\n\tclip: 2",
        "lr: !!python/object:os.system x",
        "lr: !!bool x",
        "lr: !!timestamp x",
        "lr: 2001-99-99",
        "lr: \x07",
        "? [a]\n: 1",
        "? {a: 1}\n: 1",
        "lr: *nobody",
        "a: " + "[" * 1000,
        "lr: 1\n---\nlr: 2",
    ],
)
def test_what_is_not_flat_yaml_is_refused_on_one_line(content, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(content, encoding="utf-8")
    (problem,) = problems_of(resolve, config_file=path)
    assert problem.startswith(str(path)) and "\n" not in problem


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.yaml").write_bytes("data: é".encode("latin-1"))
    for name, reason in [("missing.yaml", "No such file"), ("", "directory"), ("latin.yaml", "UTF-8")]:
        (problem,) = problems_of(read_config, tmp_path / name)
        assert reason in problem and str(tmp_path) in problem


# ---------------------------------------------------------------- the names of OpenSeq2Seq

KEEP_NAMES = {
    "encoder_emb_keep_prob": "dropout_embed_elements",
    "encoder_dp_input_keep_prob": "dropout_inner_input",
    "encoder_dp_output_keep_prob": "dropout_hidden",
    "encoder_last_input_keep_prob": "dropout_last_input",
    "encoder_last_output_keep_prob": "dropout",
    "input_weight_keep_prob": "input_weight_drop",
    "recurrent_weight_keep_prob": "weight_drop",
    "recurrent_keep_prob": "dropout_candidate",
}


def test_openseq2seq_names_of_switches():
    config = read_config("rand_start: true\nweight_tied: true\n")
    assert config == Config(model=ModelConfig(tied=True), optim=OptimConfig(random_start=True))


def test_flags_about_the_run_itself_are_no_values_of_a_file():
    assert problems_of(read_config, "save: runs/x\nprint-config: true\nnhid: 5\n") == [
        "config.yaml line 1: save: is not a value of the configuration; give --save as a flag",
        "config.yaml line 2: print-config: is not a value of the configuration; give --print-config as a flag",
    ]


@pytest.mark.parametrize("key, name", KEEP_NAMES.items())
def test_a_probability_of_keeping_is_read_as_one_of_dropping(key, name):
    for keep, drop in [("0.9", 0.1), ("0.85", 0.15), ("0.37", 0.63), ("1e-2", 0.99), ("1", 0.0), ("1.0", 0.0)]:
        resolved = resolve(config_file=f"{key}: {keep}")
        assert get(resolved.config, name) == drop  # 1 - 0.9 in floating point is not 0.1
        assert resolved.sources[name] == "config.yaml"
    assert get(read_config(f"{key.replace('_', '-')}: '0.7'"), name) == 0.3
    assert get(resolve(flags(**{name: 0.2}), config_file=f"{key}: 0.9").config, name) == 0.2


@pytest.mark.parametrize("key, name", KEEP_NAMES.items())
def test_a_probability_of_keeping_acts_in_its_one_place(key, name):
    model = read_config(f"recipe: lm\nnum_layers: 3\n{key}: 0.6").model
    expected = {
        "encoder_dp_input_keep_prob": [0.4, 0.4, 0],
        "encoder_dp_output_keep_prob": [0, 0.4, 0.4],
        "encoder_last_input_keep_prob": [0, 0, 0.4],
    }
    assert model.layer_dropouts == expected.get(key, [0, 0, 0]) and not model.has_locked_dropout
    over = resolve(flags(dropout_input=0.1, locked=True), config_file=f"{key}: 0.6").config.model
    assert resolve(flags(dropout_input=0.1), config_file=f"{key}: 0.6").config.model.has_locked_dropout
    assert over.layer_dropouts[0] >= 0.1 and over.has_locked_dropout
    of_recipe = read_config(f"recipe: openseq2seq-wikitext-2\n{key}: 1.0").model
    assert get(Config(model=of_recipe), name) == 0
    assert of_recipe.dropout_hidden == (0 if name == "dropout_hidden" else 0.4)
    for asks_for_locked in ("recipe: awd-ptb", "recipe: mos-ptb", "model: awd-lstm", "dropout_input: 0.4"):
        assert read_config(f"{asks_for_locked}\n{key}: 0.5").model.has_locked_dropout


@pytest.mark.parametrize("recipe", ["openseq2seq-wikitext-103", "openseq2seq-wikitext-2"])
def test_a_rate_under_our_name_locks_the_masks_of_a_recipe_with_probabilities_of_keeping(recipe):
    for name in ("dropout_hidden", "dropout_input"):
        assert resolve(flags(**{name: 0.3}), recipe=recipe).config.model.has_locked_dropout
        assert read_config(f"recipe: {recipe}\n{name}: 0.3").model.has_locked_dropout
        assert not resolve(flags(**{name: 0.3}, locked=False), recipe=recipe).config.model.has_locked_dropout
    assert not resolve(flags(dropout=0.3), recipe=recipe).config.model.has_locked_dropout
    keeping = f"recipe: {recipe}\nencoder_dp_output_keep_prob: 0.7"
    assert not read_config(keeping).model.has_locked_dropout
    assert resolve(flags(dropout_hidden=0.3), config_file=keeping).config.model.has_locked_dropout


def test_what_probabilities_of_keeping_imply_comes_from_where_they_are():
    of_recipe = resolve(flags(dropout=0.3), recipe="openseq2seq-wikitext-2")
    of_file = resolve(flags(dropout=0.3), config_file="encoder_last_output_keep_prob: 0.6")
    for name in ("dropout_input", "locked"):
        assert of_recipe.sources[name] == "recipe openseq2seq-wikitext-2"
        assert of_file.sources[name] == "config.yaml"
    assert of_file.config.model.dropout == 0.3 and of_file.config.model.dropout_input == 0


@given(st.integers(1, 10**6))
def test_keeping_and_dropping_add_up_to_one_as_decimals(millionths):
    model = read_config(f"recurrent_weight_keep_prob: {millionths / 10**6}").model
    assert model.weight_drop == (10**6 - millionths) / 10**6


@pytest.mark.parametrize("key, name", KEEP_NAMES.items())
def test_probabilities_of_keeping_outside_their_range_are_refused_together(key, name, tmp_path):
    path = tmp_path / "my.yaml"
    rule = f"must be a number above 0, at most 1 (it sets {name} to 1 - value)"
    for value, shown in [
        ("0", "0"),
        ("1.01", "1.01"),
        ("-0.5", "-0.5"),
        (".nan", ".nan"),
        ("true", "true"),
        ("", "none"),
    ]:
        path.write_text(f"nhid: 0\n\n{key}: {value}\n", encoding="utf-8")
        assert problems_of(resolve, config_file=path) == [
            f"{path} line 1: nhid: 0: must be a whole number, 1 or more; for example 200",
            f"{path} line 3: {key}: {shown}: {rule}",
        ]
    for value in (".inf", "high", "[0.5]", "1e-30", "1e9999999", "1e-999999999999999999999"):
        assert problems_of(read_config, f"{key}: {value}")[0].endswith(rule)


@pytest.mark.parametrize("key, name", KEEP_NAMES.items())
def test_a_probability_given_under_both_names_is_refused(key, name):
    for first, second in [(key, name), (name, key), (key, key.replace("_", "-"))]:
        assert problems_of(read_config, f"{first}: 0.5\n{second}: 0.5\n") == [
            f"config.yaml line 2: {second}: given a second time, first in line 1; keep one of them"
        ]


@pytest.mark.parametrize(
    "line, advice",
    [
        ("num_gpus: 2", "unknown key num_gpus; name them, as in --gpus 0,1,2,3"),
        ("batch_size_per_gpu: 160", "unknown key batch_size_per_gpu; --batch-size is that of all devices together"),
        ("forget_bias: 1.0", "unknown key forget_bias; it starts at 1 with --layer-norm, and is learnt"),
    ],
)
def test_a_name_of_another_system_gets_what_is_in_its_place(line, advice):
    assert problems_of(read_config, line) == [f"config.yaml line 1: {advice}"]


def test_openseq2seqs_steps_are_understood():
    training = read_config("eval_steps: 80\nsave_checkpoint_steps: 40\nprint_loss_steps: 48").training
    assert (training.eval_every, training.checkpoint_every, training.log_interval) == (80, 40, 48)


def test_a_misspelt_openseq2seq_name_gets_the_nearest():
    assert problems_of(read_config, "recurent_keep_prob: 0.5") == [
        "config.yaml line 1: unknown key recurent_keep_prob; did you mean recurrent_keep_prob?"
    ]


# ---------------------------------------------------------------- rules between fields


def config_with(**values):
    return resolve(flags(**values)).config


def complaints(file=None, recipe=None, **values):
    resolved = resolve(flags(**values), config_file=file, recipe=recipe)
    return validate(resolved.config, resolved.sources)


@pytest.mark.parametrize(
    "values, words",
    [
        ({"cpus": 3}, ["--batch-size 20", "multiple", "devices, 3; make that 2 or 4", "use --batch-size 18 or 21"]),
        ({"gpus": tuple(range(21))}, ["--batch-size 20", "make that 20, or in a new run use --batch-size 21"]),
        (
            {"cpus": 2, "small_batch_size": 5},
            ["--small-batch-size 5", "devices, 2; make that 1 or 5, or use --small-batch-size 4 or 10"],
        ),
        ({"cpus": 3, "small_batch_size": 10}, ["--small-batch-size 10", "devices, 3; make that 2 or 5"]),
        ({"cpus": 2, "small_batch_size": 8}, ["--small-batch-size 8 with --batch-size 20", "use 2, 4, 10, 20"]),
        ({"cpus": 2, "gpus": (0,)}, ["--gpus 0 with --cpus 2", "leave one of them out"]),
        ({"cpus": 2, "cuda": True}, ["--cuda with --cpus 2"]),
        ({"cpus": 2, "single_gpu": True}, ["--single-gpu with --cpus 2"]),
        ({"gpus": (0,), "cuda": False}, ["--gpus 0 with --no-cuda"]),
        ({"gpus": (0, 1), "single_gpu": True}, ["--gpus 0,1 with --single-gpu"]),
        ({"single_gpu": True, "cuda": False}, ["--single-gpu with --no-cuda"]),
        ({"gpus": (0, -1)}, ["--gpus 0,-1", "-1 means the CPU"]),
        ({"gctype": "2bit"}, ["--gctype 2bit", "nothing to compress", "--gpus 0,1"]),
        ({"gctype": "2bit", "cpus": 1}, ["--gctype 2bit", "one device"]),
        ({"gctype": "2bit", "gpus": (3,)}, ["--gctype 2bit", "one device"]),
        (
            {"gctype": "2bit", "cpus": 2, "kvstore": "local"},
            ["--gctype 2bit with --kvstore local", "kvstore device"],
        ),
        (
            {"gctype": "2bit", "gpus": (0, 1), "kvstore": "nccl"},
            ["--gctype 2bit with --kvstore nccl", "kvstore device"],
        ),
        ({"kvstore": "nccl", "cpus": 2}, ["--kvstore nccl with --cpus 2", "GPUs only"]),
        ({"kvstore": "device"}, ["--kvstore device", "one device"]),
        ({"gcthreshold": 0.3}, ["--gcthreshold 0.3", "no effect", "--gctype 2bit"]),
        ({"nonmono": 3}, ["--nonmono 3", "no effect", "--ntasgd"]),
        ({"vocab": "v.txt", "min_freq": 2}, ["--min-freq 2 with --vocab"]),
        ({"vocab": "v.txt", "max_vocab": 2}, ["--max-vocab 2 with --vocab"]),
    ],
)
def test_combinations_that_cannot_be(values, words):
    (problem,) = validate(
        dataclasses.replace(
            Config(),
            **{
                name: section(**{k: v for k, v in values.items() if k in section.__dataclass_fields__})
                for name, section in SECTIONS.items()
            },
        )
    )
    assert all(word in problem for word in words), problem


@pytest.mark.parametrize(
    "values",
    [
        {"gctype": "2bit", "gpus": (0, 1, 2, 3)},
        {"gctype": "2bit", "gcthreshold": 0.1, "cpus": 4},
        {"kvstore": "local", "cpus": 2},
        {"kvstore": "nccl", "gpus": (0, 1)},
        {"gpus": (0,), "cuda": True},
        {"gpus": (0,), "single_gpu": True},
        {"cpus": 4, "cuda": False},
        {"tied": True, "hidden_size": 300},
        {"max_vocab": 5, "min_freq": 2},
        {"clip_norm": None, "lr_decay": None},
        {"ntasgd": True, "nonmono": 3},
        {"asgd": True, "nonmono": 3},
        {"optimizer": "adam", "lr_decay": 2.0},
        {"ntasgd": False, "asgd": False, "lr_decay": 2.0},
        {"model": "awd-lstm", "optimizer": "adam"},
        {"model": "awd-gru", "weight_drop": 0.5, "input_weight_drop": 0.5},
        {"model": "awd-lstm", "layer_norm": True, "dropout_candidate": 0.1},
        {"shuffle": True, "random_start": True},
        {"max_seq_len_delta": 0, "random_start": True},
        {"num_layers": 1, "dropout_last_input": 0.1},
        {"num_layers": 1, "dropout_hidden": 0.0, "dropout_inner_input": 0.0},
        {"dropout": 0.0, "locked": False},
        {"dropout": 0.0, "locked": True, "dropout_last_input": 0.1},
        {"bptt": 1, "alpha": 2.0, "beta": 0.0},
        {"bptt": 2, "beta": 1.0},
        {"when": (39, 50), "epochs": 40},
        {"gcthreshold": 0.5, "gctype": "2bit", "cpus": 2},
    ],
)
def test_combinations_that_can_be(values):
    assert complaints(**values) == []


CONTRADICTIONS = [
    (
        {"ntasgd": True, "asgd": True},
        "--ntasgd with --asgd: averaging starts either when validation stops improving or at once; "
        "leave one of them out",
    ),
    (
        {"ntasgd": True, "optimizer": "adam"},
        "--ntasgd with --optimizer adam: the weights are averaged under SGD only; use --optimizer sgd, and a --lr "
        "for it",
    ),
    (
        {"asgd": True, "optimizer": "adam"},
        "--asgd with --optimizer adam: the weights are averaged under SGD only; use --optimizer sgd, and a --lr for it",
    ),
    (
        {"ntasgd": True, "lr_decay": 4.0},
        "--ntasgd with --lr-decay 4: averaging takes the place of a falling learning rate; "
        "use --lr-decay none, or --no-ntasgd",
    ),
    (
        {"asgd": True, "lr_decay": 4.0},
        "--asgd with --lr-decay 4: averaging takes the place of a falling learning rate; use --lr-decay none",
    ),
    (
        {"shuffle": True, "max_seq_len_delta": 0},
        "--shuffle with --max-seq-len-delta 0: shuffled windows all have the same length; leave one of them out",
    ),
    (
        {"dropout_candidate": 0.1, "model": "gru"},
        "--dropout-candidate 0.1 with --model gru: only an LSTM has it; leave one of them out",
    ),
    (
        {"layer_norm": True, "model": "awd-rnn"},
        "--layer-norm with --model awd-rnn: only an LSTM has it; leave one of them out",
    ),
]


@pytest.mark.parametrize("values, problem", CONTRADICTIONS)
def test_knobs_that_contradict_each_other_are_refused(values, problem):
    assert complaints(**values) == [problem]


def test_every_contradiction_is_reported_at_once():
    values = {name: value for given_values, _ in CONTRADICTIONS for name, value in given_values.items()}
    found = complaints(**{**values, "model": "gru"})
    assert len(found) == len(CONTRADICTIONS)
    for _, problem in CONTRADICTIONS:
        assert problem.replace("awd-rnn", "gru") in found


def test_a_contradiction_names_where_each_value_comes_from():
    assert complaints(recipe="awd", lr_decay=4.0) == [
        "--ntasgd (recipe awd) with --lr-decay 4: averaging takes the place of a falling learning rate; "
        "use --lr-decay none, or --no-ntasgd"
    ]
    assert complaints("asgd: true", recipe="demo") == [
        "--asgd (config.yaml) with --optimizer adam (recipe demo): the weights are averaged under SGD only; "
        "use --optimizer sgd, and a --lr for it"
    ]


WITHOUT_EFFECT = [
    ({"nonmono": 3}, {}, "--nonmono 3: has no effect here, the weights are not averaged; add --ntasgd"),
    ({"dropout_hidden": 0.3}, {"num_layers": 1}, "--dropout-hidden 0.3: has no effect here, there is one layer; raise "
     "--num-layers"),
    ({"dropout_inner_input": 0.3}, {"num_layers": 1}, "--dropout-inner-input 0.3: has no effect here, there is one "
     "layer; raise --num-layers"),
    ({"hidden_size": 650}, {"num_layers": 1, "tied": True}, "--hidden-size 650: has no effect here, the one layer has "
     "200 units, as --nhidlast or else --emsize says; raise --nlayers"),
    ({"locked": True}, {"dropout": 0.0}, "--locked: has no effect here, there is no dropout that it could lock; add "
     "--dropout P"),
    ({"beta": 1.0}, {"bptt": 1}, "--beta 1: has no effect here, a window of one word has no change over time; raise "
     "--bptt"),
    ({"when": (3, 5)}, {"epochs": 3}, "--when 3,5: has no effect here, training ends after 3 epochs; name an earlier "
     "one"),
]  # fmt: skip


@pytest.mark.parametrize("idle, others, problem", WITHOUT_EFFECT)
def test_knobs_without_effect_are_refused_where_the_user_set_them(idle, others, problem):
    assert complaints(**idle, **others) == [f"{problem}, or leave it out"]
    file = yaml.safe_dump({name: list(v) if isinstance(v, tuple) else v for name, v in idle.items()})
    named = problem.replace(":", " (config.yaml):", 1)
    assert complaints(file, **others) == [f"{named}, or leave it out"]


@pytest.mark.parametrize("origin", ["recipe lm", "run runs/a", "default"])
@pytest.mark.parametrize("idle, others, problem", WITHOUT_EFFECT)
def test_knobs_without_effect_are_kept_where_nobody_asked_for_them(idle, others, problem, origin):
    resolved = resolve(flags(**idle, **others))
    assert validate(resolved.config, {**resolved.sources, **dict.fromkeys(idle, origin)}) == []


def test_every_knob_without_effect_is_reported_at_once():
    assert complaints(
        dropout_hidden=0.0, num_layers=1, dropout=0.0, locked=True, bptt=1, beta=1.0, epochs=3, when=(3, 5), nonmono=3
    ) == [f"{WITHOUT_EFFECT[i][2]}, or leave it out" for i in (0, 4, 5, 6)]


@pytest.mark.parametrize(
    "settings",
    [
        {"num_layers": 1, "num_experts": 3, "dropout_hidden": 0.3, "embed_size": 200},
        {"bptt": 1, "max_seq_len_delta": 20, "beta": 1.0},
        {"num_layers": 1, "tied": True, "hidden_size": 128, "embed_size": 128},
        {"num_layers": 1, "hidden_size": 128},
        {"num_layers": 2, "tied": True, "hidden_size": 650},
    ],
)
def test_knobs_with_an_effect_are_taken(settings):
    assert complaints(recipe="lm", **settings) == []


def test_one_flag_over_a_recipe_makes_no_knob_of_the_recipe_a_problem():
    for changed in ({"num_layers": 1}, {"bptt": 1}, {"ntasgd": False}, {"optimizer": "adam"}, {"dropout": 0.0}):
        assert complaints(recipe="awd", **changed) == []


def test_a_value_at_its_default_is_refused_as_a_flag_and_accepted_in_a_file():
    assert complaints(gcthreshold=0.5) == [
        "--gcthreshold 0.5: has no effect without 2-bit compression; add --gctype 2bit, or leave it out"
    ]
    assert complaints(nonmono=5) == [
        "--nonmono 5: has no effect here, the weights are not averaged; add --ntasgd, or leave it out"
    ]
    assert complaints(Config().to_yaml()) == []


def test_a_file_is_answered_for_whatever_its_name(tmp_path):
    for name in ("default.yaml", "runs.yaml", "recipe.yaml"):
        (tmp_path / name).write_text("nonmono: 3", encoding="utf-8")
        (problem,) = complaints(tmp_path / name)
        assert problem.startswith(f"--nonmono 3 ({tmp_path / name}): has no effect")


def test_a_file_is_answered_for_only_where_it_differs_from_the_default():
    assert complaints("gcthreshold: 0.3\nnonmono: 5\n") == [
        "--gcthreshold 0.3 (config.yaml): has no effect without 2-bit compression; add --gctype 2bit, or leave it out"
    ]


def test_problems_name_the_recipe_or_file_of_a_value():
    resolved = resolve(flags(cpus=3), config_file="gctype: 2bit\nkvstore: local")
    assert validate(resolved.config, resolved.sources) == [
        "--batch-size 20 (recipe lm): must be a multiple of the number of devices, 3; make that 2 or 4, or in a new "
        "run use --batch-size 18 or 21",
        "--gctype 2bit (config.yaml) with --kvstore local (config.yaml): local cannot compress; use --kvstore device",
    ]


def test_a_configuration_made_in_python_is_read_by_the_same_rules(tmp_path):
    assert problems_of(ModelConfig, dropout=1.5, hidden_size=0) == [
        "ModelConfig.hidden_size 0: must be a whole number, 1 or more; for example 200",
        "ModelConfig.dropout 1.5: must be a number, 0 or more and below 1; for example 0.2",
    ]
    assert problems_of(OptimConfig, ntasgd=1) == ["OptimConfig.ntasgd 1: must be true or false"]
    assert problems_of(DataConfig, tokenizer="word")[0].endswith("did you mean words?")
    made = Config(
        data=DataConfig(data=tmp_path, data_dir=tmp_path),
        model=ModelConfig(model="LSTM", hidden_size=np.int64(3), dropout=np.float32(0.5)),
        optim=OptimConfig(optimizer="Adam", when=[3, 5], lr_decay=np.linspace(2, 3, 2)[0]),
        training=TrainingConfig(bptt=np.int32(7)),
    )
    assert DataConfig(data="ptb").data == ("ptb",) and made.data.data == (str(tmp_path),)
    assert (made.model.model, made.optim.optimizer, made.optim.when) == ("lstm", "adam", (3, 5))
    assert read_config(made.to_yaml()) == made


@pytest.mark.parametrize("value", ["1e300", "1e-40", "inf", "nan"])
def test_numbers_that_float32_does_not_hold_are_refused(value):
    assert "must be a number above 0" in problems_of(read_config, f"lr: {value}")[0]
    with pytest.raises(ValueError):
        real(2).read(1e-40)
    assert problems_of(read_config, "clip_norm: 1e39")[0].endswith("; float32 holds 1.2e-38 to 3.4e+38")
    assert read_config("weight_decay: 0").optim.weight_decay == 0


def test_gpu_minus_one_is_the_cpu_in_python_too():
    assert DeviceConfig(gpus=-1) == DeviceConfig(cuda=False) == read_config("gpus: -1").devices


def test_a_learning_rate_is_that_of_the_optimiser_where_none_is_given():
    assert [OptimConfig(optimizer=name).lr for name in ("sgd", "adam")] == [20.0, 0.001]
    assert OptimConfig(optimizer="adam", lr=20).lr == 20.0
    assert problems_of(read_config, "lr: none") == ["config.yaml line 1: lr: none: must be a number above 0"]


@pytest.mark.parametrize(
    "values, count",
    [
        ({}, 1),
        ({"cuda": True}, 1),
        ({"cpus": 4}, 4),
        ({"gpus": (2, 3)}, 2),
        ({"num_experts": 2}, None),
        ({"num_experts": 2, "cuda": True}, None),
        ({"num_experts": 2, "single_gpu": True}, 1),
        ({"num_experts": 2, "cuda": False}, 1),
    ],
)
def test_number_of_devices(values, count):
    assert device_count(config_with(**values)) == count


def test_devices_of_any_command():
    assert build(DeviceConfig, flags(gpus=(-1,))) == DeviceConfig(cuda=False)
    assert build(DeviceConfig, flags(gpus=(0, 1))) == DeviceConfig(gpus=(0, 1))
    assert len(problems_of(build, DeviceConfig, flags(gpus=(0, 1), cpus=2, cuda=True))) == 2
