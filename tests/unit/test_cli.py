"""Command lines: those of the systems that this one replaces, the errors, and how a command ends."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st
from processes import ROOT

import gluon_lm
from gluon_lm import launch
from gluon_lm.__main__ import COMMANDS, main as package_main
from gluon_lm.cli import CommandParser, normalise_argv, run_command
from gluon_lm.config import SECTIONS, Config, DeviceConfig, config_folder, get, read_config, recipe_names, resolve
from gluon_lm.errors import CheckpointError, ConfigError, GluonLMError
from gluon_lm.finetune import parse_finetune
from gluon_lm.train import parse_train, train_parser
from gluon_lm.training.command import FIXED, FIXED_ON_RESUME


def parse(line):
    return parse_train(shlex.split(line))


def parse_tuning(line):
    return parse_finetune(shlex.split(line))


def problems_of(line, parse=parse):
    with pytest.raises(ConfigError) as caught:
        parse(line)
    return caught.value.problems


# ---------------------------------------------------------------- the command lines of the references

MXNET = {
    "recipe": "lm",
    "cuda": True,
    "tied": True,
    "model": "lstm",
    "batch_size": 20,
    "bptt": 35,
    "lr": 20.0,
}
FLOYD = {
    "recipe": "lm",
    "cuda": True,
    "num_layers": 2,
    "lr": 20.0,
    "lr_decay": 4.0,
    "clip_norm": 0.25,
    "bptt": 35,
}
MOS = {
    "recipe": "mos", "model": "lstm", "num_experts": 15, "tied": True, "dropout": 0.4,
    "dropout_embed": 0.1, "weight_drop": 0.5, "alpha": 2.0, "beta": 1.0, "weight_decay": 1.2e-6,
    "num_layers": 3, "bptt": 70, "epochs": 1000, "dropout_latent": 0.29, "max_seq_len_delta": 40,
    "nonmono": 5, "clip_norm": 0.25, "lr_decay": None,
}  # fmt: skip
MOS_PTB = {
    **MOS, "data": ("data/penn",), "dropout_input": 0.4, "dropout_hidden": 0.225, "seed": 28,
    "batch_size": 12, "hidden_size": 960, "embed_size": 280, "single_gpu": True, "small_batch_size": None,
}  # fmt: skip
MOS_WT2 = {
    **MOS, "data": ("data/wikitext-2",), "dropout_hidden": 0.2, "seed": 1882, "hidden_size": 1150,
    "embed_size": 300, "batch_size": 15, "max_seq_len_delta": 20, "dropout_input": 0.55,
}  # fmt: skip
WT2_LINE = (
    "--epochs 1000 --data data/wikitext-2 --save WT2 --dropouth 0.2 --seed 1882 --n_experts 15 --nhid 1150 "
    "--nhidlast 650 --emsize 300 --batch_size 15 --lr 15.0 --dropoutl 0.29 --max_seq_len_delta 20 "
    "--dropouti 0.55 "
)
WT2_FINETUNE_LINE = (
    "--epochs 1000 --data data/wikitext-2 --save PATH_TO_FOLDER --dropouth 0.2 --seed 1882 --n_experts 15 "
    "--nhid 1150 --emsize 300 --batch_size 15 --lr 20.0 --dropoutl 0.29 --max_seq_len_delta 20 "
    "--dropouti 0.55 "
)
REFERENCE_LINES = [
    # MXNet's word language model
    (
        "--cuda --tied --nhid 200 --emsize 200 --epochs 20  --dropout 0.2",
        {
            **MXNET, "hidden_size": 200, "embed_size": 200, "epochs": 20, "dropout": 0.2,
            "data": ("wikitext-2",),
        },
    ),
    (
        "--cuda --tied --nhid 650 --emsize 650 --epochs 40  --dropout 0.5",
        {**MXNET, "hidden_size": 650, "embed_size": 650, "epochs": 40, "dropout": 0.5},
    ),
    (
        "--cuda --tied --nhid 1500 --emsize 1500 --epochs 60  --dropout 0.65",
        {**MXNET, "hidden_size": 1500, "embed_size": 1500, "epochs": 60, "dropout": 0.65},
    ),
    # a PyTorch demo
    (
        "--batch_size 20 --epochs 20 --gen_word_len 15",
        {"recipe": "lm", "batch_size": 20, "epochs": 20, "gen_word_len": 15},
    ),
    # the mixture of softmaxes
    (
        "--data data/penn --dropouti 0.4 --dropoutl 0.29 --dropouth 0.225 --seed 28 --batch_size 12 --lr "
        "20.0 --epoch 1000 --nhid 960 --nhidlast 620 --emsize 280 --n_experts 15  --save PTB --single_gpu",
        {**MOS_PTB, "lr": 20.0, "last_hidden_size": 620, "save": "PTB"},
    ),
    (
        "--data data/penn --dropouti 0.4 --dropoutl 0.29 --dropouth 0.225 --seed 28 --batch_size 12 --lr "
        "25.0 --epoch 1000 --nhid 960 --emsize 280 --n_experts 15  --save PATH_TO_FOLDER --single_gpu",
        {**MOS_PTB, "lr": 25.0, "last_hidden_size": None, "save": "PATH_TO_FOLDER"},
    ),
    (
        WT2_LINE + "--small_batch_size 5 --single_gpu",
        {
            **MOS_WT2, "lr": 15.0, "last_hidden_size": 650, "small_batch_size": 5, "single_gpu": True,
            "save": "WT2",
        },
    ),
    (
        WT2_FINETUNE_LINE + "--small_batch_size 5 --single_gpu",
        {**MOS_WT2, "lr": 20.0, "last_hidden_size": None, "small_batch_size": 5, "single_gpu": True},
    ),
    (
        WT2_LINE + "--small_batch_size 15",
        {**MOS_WT2, "lr": 15.0, "last_hidden_size": 650, "small_batch_size": 15, "single_gpu": False},
    ),
    (
        WT2_FINETUNE_LINE + "--small_batch_size 15",
        {**MOS_WT2, "lr": 20.0, "last_hidden_size": None, "small_batch_size": 15, "single_gpu": False},
    ),
    # PyTorch's word language model on FloydHub
    *(
        (
            f"--cuda --emsize {size} --nhid {size} --dropout {dropout} --epochs 40" + tied * " --tied",
            {
                **FLOYD, "embed_size": size, "hidden_size": size, "dropout": dropout, "epochs": 40,
                "tied": tied,
            },
        )
        for size, dropout in [(650, 0.5), (1500, 0.65)]
        for tied in (False, True)
    ),
    ("--cuda --epochs 7", {**FLOYD, "epochs": 7, "tied": False, "hidden_size": 200, "dropout": 0.2}),
    ("--cuda --epochs 7 --tied", {**FLOYD, "epochs": 7, "tied": True, "embed_size": 200}),
    ("--cuda --tied", {**FLOYD, "epochs": 40, "tied": True}),
    # every flag that they document, in one line
    (
        "--model RNN_TANH --emsize 10 --nhid 11 --nlayers 3 --lr 5 --clip 1 --epochs 6 --batch_size 21 "
        "--bptt 7 --dropout 0.1 --decay 2 --tied --seed 3 --cuda --log-interval 9 --save m.params "
        "--gctype none --data ptb",
        {
            "model": "rnn_tanh", "embed_size": 10, "hidden_size": 11, "num_layers": 3, "lr": 5.0,
            "clip_norm": 1.0, "epochs": 6, "batch_size": 21, "bptt": 7, "dropout": 0.1, "lr_decay": 2.0,
            "tied": True, "seed": 3, "cuda": True, "log_interval": 9, "save": "m.params",
            "gctype": "none", "data": ("ptb",),
        },
    ),
    (
        "--gctype 2bit --gcthreshold 0.1 --gpus 0,1,2,3 --grad_clip 0.5 --hidden_dim 8 --embed-dim=9 "
        "--model GRU",
        {
            "gctype": "2bit", "gcthreshold": 0.1, "gpus": (0, 1, 2, 3), "clip_norm": 0.5,
            "hidden_size": 8, "embed_size": 9, "model": "gru",
        },
    ),
    (
        "--model awd-lstm --dropout_h 0.2 --dropout_i 0.65 --dropout_e 0.1 --weight_dropout 0.5 --wd "
        "1.2e-06 --alpha 2 --beta 1 --ntasgd --optimizer sgd --gpu 0 --when -1",
        {
            "recipe": "awd", "model": "awd-lstm", "dropout_hidden": 0.2, "weight_drop": 0.5,
            "weight_decay": 1.2e-6, "gpus": (0,), "when": None, "ntasgd": True,
        },
    ),
    # every flag of the regularised models, as their first code, as GluonNLP and as the mixture spells it
    (
        "--data data/penn/ --model LSTM --emsize 10 --nhid 11 --nlayers 4 --lr 29 --clip 0.5 --epochs 7 "
        "--batch_size 21 --bptt 71 --dropout 0.41 --dropouth 0.31 --dropouti 0.66 --dropoute 0.11 --wdrop 0.51 "
        "--seed 3 --ntasgd --nonmono 4 --cuda --log-interval 9 --save m.pt --alpha 3 --beta 2 --wdecay 1.3e-06 "
        "--optimizer sgd --when 3 5 --max_seq_len_delta 13",
        {
            "recipe": "lm", "data": ("data/penn/",), "model": "lstm", "embed_size": 10, "hidden_size": 11,
            "num_layers": 4, "lr": 29.0, "clip_norm": 0.5, "epochs": 7, "batch_size": 21, "bptt": 71, "dropout": 0.41,
            "dropout_hidden": 0.31, "dropout_input": 0.66, "dropout_embed": 0.11, "weight_drop": 0.51, "seed": 3,
            "ntasgd": True, "nonmono": 4, "cuda": True, "log_interval": 9, "save": "m.pt", "alpha": 3.0, "beta": 2.0,
            "weight_decay": 1.3e-6, "optimizer": "sgd", "when": (3, 5), "max_seq_len_delta": 13, "lr_decay": None,
        },
    ),
    (
        "--model lstm --emsize 10 --nhid 11 --nlayers 4 --lr 0.001 --clip 0.5 --epochs 7 --batch_size 21 --bptt 71 "
        "--dropout 0.41 --dropout_h 0.31 --dropout_i 0.66 --dropout_e 0.11 --weight_dropout 0.51 --tied --log-interval "
        "9 --save m.params --gpu 2 --optimizer adam --wd 1.3e-06 --alpha 3 --beta 2",
        {
            "recipe": "lm", "dropout_hidden": 0.31, "dropout_input": 0.66, "dropout_embed": 0.11, "weight_drop": 0.51,
            "tied": True, "gpus": (2,), "optimizer": "adam", "weight_decay": 1.3e-6, "alpha": 3.0, "beta": 2.0,
            "ntasgd": False, "lr": 0.001, "lr_decay": 4.0,
        },
    ),
    (
        "--n_experts 3 --nhidlast 12 --dropoutl 0.28 --small_batch_size 7 --batch_size 21 --max_seq_len_delta 0 "
        "--dropouth 0.31 --dropouti 0.66 --dropoute 0.11 --wdrop 0.51 --nonmono 4 --alpha 3 --beta 2 --wdecay 1.3e-06",
        {
            "recipe": "mos", "num_experts": 3, "last_hidden_size": 12, "dropout_latent": 0.28, "small_batch_size": 7,
            "batch_size": 21, "max_seq_len_delta": 0, "dropout_hidden": 0.31, "dropout_input": 0.66,
            "dropout_embed": 0.11, "weight_drop": 0.51, "nonmono": 4, "ntasgd": True, "alpha": 3.0, "beta": 2.0,
            "weight_decay": 1.3e-6,
        },
    ),
    (
        "--model awd-lstm --optimizer adam --lr 1e-3 --max-seq-len-delta 5",
        {"recipe": "awd", "optimizer": "adam", "ntasgd": False, "asgd": False, "weight_drop": 0.5, "lr": 1e-3},
    ),
    ("--nhidlast -1 --small_batch_size -1", {"recipe": "lm", "last_hidden_size": None, "small_batch_size": None}),
]  # fmt: skip


def _value(command, name):
    return getattr(command, name) if name in ("recipe", "save") else get(command.config, name)


@pytest.mark.parametrize("line, expected", REFERENCE_LINES, ids=[line for line, _ in REFERENCE_LINES])
def test_reference_command_lines(line, expected):
    command = parse(line + " --print-config")
    assert {name: _value(command, name) for name in expected} == expected
    hyphens = parse(
        " ".join(w.replace("_", "-") if w.startswith("--") else w for w in line.split()) + " --print-config"
    )
    assert hyphens.config == command.config


@pytest.mark.parametrize("line, expected", REFERENCE_LINES, ids=[line for line, _ in REFERENCE_LINES])
def test_printing_a_configuration_checks_it_alike(line, expected):
    assert parse(line).config == parse(line + " --print-config").config


def test_switches_of_the_mxnet_example_that_are_always_on(capsys):
    command = parse("--hybridize --static_alloc --static-shape --tied")
    assert command.config == parse("--tied").config
    captured = capsys.readouterr()
    assert captured.err == "warning: --hybridize --static-alloc --static-shape: is always on here; leave it out\n"


# ---------------------------------------------------------------- reading flags


def test_nothing_given_is_the_lm_recipe():
    command = parse("")
    assert command.config == resolve(recipe="lm").config
    assert (command.recipe, command.save, command.resume) == ("lm", None, None)
    assert not (command.overwrite or command.print_config or command.dry_run)


def test_flags_of_the_run():
    command = parse("--save out.pt --overwrite --dry-run --debug --recipe mxnet")
    assert (command.save, command.overwrite, command.dry_run) == ("out.pt", True, True)
    assert command.recipe == "mxnet"


def test_switches_mean_on_and_off():
    assert parse("--tied").config.model.tied is True
    assert parse("--tied --no-tied").config.model.tied is False
    assert parse("--cuda").config.devices.cuda is True
    assert parse("--no_cuda").config.devices.cuda is False
    assert parse("--gpu -1").config.devices == DeviceConfig(cuda=False)


def test_last_of_two_spellings_wins():
    command = parse("--nhid 3 --hidden_size=4 --hidden-dim 5")
    assert command.config.model.hidden_size == 5
    assert command.sources["hidden_size"] == "flag --hidden-dim"


def test_data_takes_one_or_three():
    assert parse("--data a b c --tied").config.data.data == ("a", "b", "c")
    assert problems_of("--data a b") == [
        "--data a b: must be one corpus, folder or file, or three files (training, validation, test); "
        "for example wikitext-2"
    ]


def test_home_is_found_where_the_shell_has_not_looked_for_it(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/a")
    (tmp_path / "my.yaml").write_text("data: ~/text\nvocab: ~/words.txt\n", encoding="utf-8")
    command = parse(f"--config {tmp_path}/my.yaml --save=~/run --data-dir=~")
    assert command.save == "/home/a/run"
    data = command.config.data
    assert (data.data, data.vocab, data.data_dir) == (("/home/a/text",), "/home/a/words.txt", "/home/a")
    # Of a user that there is not it is a name like any other.
    assert parse("--data ~no-such-user/a b ./~/c").config.data.data == ("~no-such-user/a", "b", "./~/c")


def test_normalised_words():
    words = ["--batch_size", "3", "--n_experts=a_b", "--lr", "-1e-3", "x_y", "--", "--a_b"]
    assert normalise_argv(words) == [
        "--batch-size",
        "3",
        "--n-experts=a_b",
        "--lr=-1e-3",
        "x_y",
        "--",
        "--a_b",
    ]


@pytest.mark.parametrize("path", sorted(config_folder().glob("*.yaml")), ids=lambda path: path.stem)
def test_the_commands_above_a_recipe_use_it(path):
    header = re.split(r"^(?!#)", path.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)[0]
    commands = re.findall(r"python -m gluon_lm\.train ([^&\n]+)", header.replace("\\\n#", ""))
    assert commands
    for line in commands:
        command = parse(f"{line} --print-config")
        assert command.recipe == path.stem, line


def test_config_file_and_its_recipe(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("recipe: mxnet\nnhid: 5\nlr: 1e-4\n", encoding="utf-8")
    command = parse(f"--config {path} --lr 3")
    assert (command.recipe, command.config.model.hidden_size, command.config.optim.lr) == ("mxnet", 5, 3.0)
    assert [command.sources[n] for n in ("recipe", "hidden_size", "lr", "embed_size", "seed")] == [
        str(path), str(path), "flag --lr", "recipe mxnet", "default"
    ]  # fmt: skip


def test_describe_is_a_config_file_that_gives_the_same(tmp_path):
    command = parse("--recipe demo --nhid 5 --cpus 2 --batch-size 4 --clip none --data 'my text'")
    path = tmp_path / "printed.yaml"
    path.write_text(command.describe(), encoding="utf-8")
    again = parse(f"--config {path}")
    assert (again.config, again.recipe) == (command.config, "demo")
    assert "hidden_size: 5  # flag --nhid\n" in command.describe()


# ---------------------------------------------------------------- refusing flags


def test_every_switch_of_every_command_is_on_where_its_flag_is_given():
    switches = 0
    for command in COMMANDS:
        module = importlib.import_module(f"gluon_lm.{command}")
        sections = [*SECTIONS.values(), *(thing for thing in vars(module).values() if inspect.isclass(thing))]
        for section in (s for s in sections if dataclasses.is_dataclass(s)):
            for field in dataclasses.fields(section):
                if "kind" in field.metadata and field.metadata["kind"].is_switch:
                    parser = CommandParser(command, "", "")
                    parser.add_section(section, "all")
                    (setting,) = parser.parse([f"--{field.name}"]).settings.values()
                    assert setting.value is True, (command, field.name)
                    switches += 1
    assert switches > 100


def test_every_problem_at_once(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("hiden_size: 5\n", encoding="utf-8")
    assert problems_of("--nhid 0 --dropout 1.5 --batch_sise 3 --model lsmt extra") == [
        "--batch-sise: unknown flag; did you mean --batch-size?",
        "extra: is not the value of any flag; see python -m gluon_lm.train --help",
        "--nhid 0: must be a whole number, 1 or more; for example 200",
        "--dropout 1.5: must be a number, 0 or more and below 1; for example 0.2",
        "--model lsmt: must be one of lstm, gru, rnn_tanh, rnn_relu, awd-lstm, awd-gru, awd-rnn; did you mean lstm?",
    ]
    assert problems_of(f"--continue-train --recipe nobody --config {path}") == [
        "--continue-train: needs the run to continue; add --save RUN, or use --resume RUN",
        f"{path} line 1: unknown key hiden_size; did you mean hidden_size?",
        f"--recipe nobody: must be one of {', '.join(recipe_names())}",
    ]
    assert problems_of("--ntasgd --optimizer adam --dropouth 0.2 --nlayers 1 --gctype 2bit --dropoutl 0.3") == [
        "--ntasgd with --optimizer adam: the weights are averaged under SGD only; use --optimizer sgd, and a --lr "
        "for it",
        "--dropouth 0.2: has no effect here, there is one layer; raise --num-layers, or leave it out",
        "--dropoutl 0.3: has no effect here, there is one softmax; add --n-experts K, or leave it out",
        "--gctype 2bit: nothing to compress, one device exchanges no gradients; name several, as in --gpus "
        "0,1 or --cpus 2, or use none",
    ]
    assert problems_of("--when 0 --ntasgd --optimizer adam") == [
        "--when 0: must be different epochs, each a whole number, 1 or more, or none"
    ]
    assert len(problems_of("--emsize x --tied --nhidlast 100")) == 1
    assert len(problems_of("--nhid x --cutoffs 20 30 40 50")) == 1
    assert problems_of("--nonmono 0") == ["--nonmono 0: must be a whole number, 1 or more; for example 5"]
    assert len(problems_of("--locked --dropout 0 --dropout-last-input 2")) == 1
    assert problems_of("--cpus 0 --gctype 2bit") == ["--cpus 0: must be a whole number, 1 or more, or none"]
    assert problems_of("--gpuss 0,1 --gctype 2bit") == ["--gpuss: unknown flag; did you mean --gpus?"]
    assert problems_of("--cpus 3 --gctype 2bit --kvstore local --n-experts 2 --recipe lm") == [
        "--batch-size 20 (recipe lm): must be a multiple of the number of devices, 3; make that 2 or 4, or in a new "
        "run use --batch-size 18 or 21",
        "--gctype 2bit with --kvstore local: local cannot compress; use --kvstore device",
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ("--nhi 3", ["--nhi: unknown flag", "did you mean --nhid?"]),
        ("--epo 3", ["--epo: unknown flag", "did you mean --epoch?"]),
        ("--zzzzzzzz", ["--zzzzzzzz: unknown flag", "--help"]),
        ("--eval_only", ["--eval-only: unknown flag", "gluon_lm.evaluate"]),
        ("--export-model", ["--export-model: unknown flag", "gluon_lm.export RUN --output DIR"]),
        ("--onnx-export model.onnx", ["--onnx-export: unknown flag", "--format onnx"]),
        ("--k 8192", ["--k: unknown flag", "--num-sampled"]),
        ("-x", ["-x: unknown flag"]),
        ("--nhid", ["--nhid", "needs a value", "a whole number, 1 or more"]),
        ("--nhid --tied", ["--nhid", "needs a value"]),
        ("--data --tied", ["--data", "needs a value"]),
        ("--tied=3", ["--tied: takes no value"]),
        ("--debug=3", ["--debug: takes no value"]),
        ("--nhid 2.5", ["--nhid 2.5", "whole number"]),
        ("--lr -1e-3", ["--lr -1e-3", "above 0"]),
        ("--clip 0", ["--clip 0", "above 0, or none"]),
        ("--decay 1", ["--decay 1", "above 1, or none"]),
        ("--cpus 0", ["--cpus 0", "1 or more"]),
        ("--gpus 0,0", ["--gpus 0,0"]),
        ("--gpu -1 --cuda", ["--gpu -1", "means the CPU"]),
        ("--gpus 0 --cpus 1", ["--gpus 0 with --cpus 1"]),
        ("--cuda --cpus 1", ["--cuda with --cpus 1"]),
        ("--gcthreshold 0.5", ["--gcthreshold 0.5", "no effect"]),
        ("--gctype 2bit", ["--gctype 2bit", "one device"]),
        ("--gctype 3bit", ["--gctype 3bit", "one of none, 2bit, fp16"]),
        ("--kvstore device --cpus 1", ["--kvstore device", "one device"]),
        ("--batch_size 21 --gpus 0,1", ["--batch-size 21", "make that 1 or 3", "use --batch-size 20 or 22"]),
        ("--vocab v --min_freq 2", ["--min-freq 2 with --vocab"]),
        ("--ntasgd --asgd", ["--ntasgd with --asgd"]),
        ("--asgd --when 3", ["--asgd with --when 3"]),
        ("--wd -1e-6", ["--wd -1e-6", "0 or more"]),
        ("--dropouth 1", ["--dropouth 1", "below 1, or none"]),
        ("--max_seq_len_delta -1", ["--max-seq-len-delta -1", "0 or more, or none"]),
        ("--when 5 5", ["--when 5 5", "different epochs"]),
        ("--optimizer asgd", ["--optimizer asgd", "one of sgd, adam"]),
        ("--num-sampled 0", ["--num-sampled 0", "1 or more, or none"]),
        ("--cutoffs 200,20", ["--cutoffs 200,20", "rising order"]),
        ("--cutoffs 20 20", ["--cutoffs 20 20", "rising order"]),
        ("--cutoffs 0 20", ["--cutoffs 0 20", "1 or more"]),
        ("--cutoffs 20 --tied", ["--tied with --cutoffs 20", "narrower than their embeddings", "--num-sampled"]),
        ("--cutoffs 20 --num-sampled 8", ["--num-sampled 8 with --cutoffs 20", "leave one of them out"]),
        ("--num-sampled 8 --n-experts 2", ["--n-experts 2 with --num-sampled 8", "leave one of them out"]),
        ("--num-sampled 8 --amp bfloat16", ["--amp bfloat16 with --num-sampled 8", "full output layer", "--cutoffs"]),
        ("--cutoffs 20 --n-experts 2 --no-tied", ["--n-experts 2 with --cutoffs 20", "leave one of them out"]),
        ("--cutoffs 20 30 40 --nhid 60", ["--cutoffs 20,30,40", "60 units", "--nhid to 64"]),
        ("--recurrent_keep_prob 0.9", ["--recurrent-keep-prob: unknown flag"]),
        ("--config /nonexistent/a.yaml", ["/nonexistent/a.yaml", "No such file"]),
        ("--save ''", ["--save ''", "a name or a path"]),
        ("--resume A --save B", ["--save B with --resume A"]),
        ("--resume A --overwrite", ["--overwrite with --resume"]),
        ("--overwrite", ["--overwrite: has no effect without --save RUN"]),
        ("-- --tied", ["--: belongs to launch alone"]),
        ("--resume A --config B", ["--config with --resume"]),
        ("--resume A --recipe lm", ["--recipe with --resume"]),
        ("--resume A --continue-train --save A", ["--continue-train with --resume"]),
    ],
)
def test_what_cannot_be_is_refused_on_one_line(line, words):
    (problem,) = problems_of(line)
    assert all(word in problem for word in words), problem
    assert "\n" not in problem


# ---------------------------------------------------------------- resuming


@pytest.fixture
def write_run(tmp_path):
    """Make a run folder as far as the command line reads it: its configuration, from flags."""

    def write(line):
        command = parse(line)
        (tmp_path / "RUN" / "checkpoints").mkdir(parents=True)
        path = tmp_path / "RUN" / "config.yaml"
        path.write_text(command.config.to_yaml(command.sources, command.recipe), encoding="utf-8")
        return path

    return write


def test_resume_lays_the_flags_over_the_configuration_of_the_run(write_run):
    line = "--recipe mxnet --nhid 5 --gpus 0,1 --gctype 2bit --gcthreshold 0.3"
    path = write_run(line)
    command = parse("--resume RUN --epochs 50 --cpus 1 --gctype none")
    assert command.resume == "RUN"
    command = command.over(path, FIXED_ON_RESUME)
    assert (command.recipe, command.resume) == ("mxnet", "RUN")
    assert command.config.training.epochs == 50
    assert command.config.devices == DeviceConfig(cpus=1)
    assert command.config.model == parse(line).config.model
    assert [command.sources[name] for name in ("epochs", "hidden_size")] == ["flag --epochs", f"run {path.parent}"]
    with pytest.raises(ConfigError, match="multiple of the number of devices, 3"):
        parse("--resume RUN --cpus 3").over(path, FIXED_ON_RESUME)


def test_resume_is_checked_against_the_run_and_not_the_defaults(write_run):
    path = write_run("--cpus 4 --gctype 2bit")
    command = parse("--resume RUN --gcthreshold 0.3").over(path, FIXED_ON_RESUME)
    assert command.config.devices.gcthreshold == 0.3


def test_what_a_run_must_keep_may_be_repeated_and_not_changed(write_run):
    path = write_run("--recipe awd --nhid 5 --seed 3")
    same = parse("--resume RUN --nhid 5 --seed 3 --model awd-lstm --tied --lr 10").over(path, FIXED_ON_RESUME)
    assert same.config.optim.lr == 10
    with pytest.raises(ConfigError) as caught:
        parse("--resume RUN --hidden-size 6 --seed 4 --lr 10 --dropoute 0.1 --cpus 3").over(path, FIXED_ON_RESUME)
    assert caught.value.problems == [
        f"--hidden-size 6: {path.parent} was trained with 5; leave the flag out, or train a new run",
        f"--seed 4: {path.parent} was trained with 3; leave the flag out, or train a new run",
        f"--batch-size 80 (run {path.parent}): must be a multiple of the number of devices, 3; make that 2 or 4, or in "
        "a new run use --batch-size 78 or 81",
    ]


@pytest.mark.parametrize(
    "run, flags, problem",
    [
        (
            "--optimizer adam",
            "--ntasgd",
            "--ntasgd with --optimizer adam (RUN): the weights are averaged under SGD only; leave it out, or in a new "
            "run use --optimizer sgd, and a --lr for it",
        ),
        (
            "--model awd-lstm --asgd",
            "--ntasgd",
            "--ntasgd with --asgd (RUN): averaging starts either when validation stops improving or at once; leave one "
            "of them out",
        ),
        (
            "--model awd-lstm --asgd",
            "--when 5",
            "--asgd (RUN) with --when 5: the learning rate stays as it is while the weights are averaged; use --when "
            "none, or in a new run use --no-asgd",
        ),
        (
            "--num-sampled 8",
            "--amp bfloat16",
            "--amp bfloat16 with --num-sampled 8 (RUN): bfloat16 applies to the products of the full output layer, "
            "which training on a sample does without; leave one of them out, or in a new run use --cutoffs",
        ),
        (
            "--nlayers 1",
            "--dropouth 0.3",
            "--dropouth 0.3: has no effect here, there is one layer; leave it out, or in a new run raise --num-layers",
        ),
        (
            "--nlayers 2",
            "--dropoutl 0.3",
            "--dropoutl 0.3: has no effect here, there is one softmax; leave it out, or in a new run add --n-experts K",
        ),
        (
            "--bptt 1",
            "--beta 1",
            "--beta 1: has no effect here, a window of one word has no change over time; leave it out, or in a new run "
            "raise --bptt",
        ),
        (
            "--optimizer adam",
            "--nonmono 3",
            "--nonmono 3: has no effect here, the weights are not averaged; leave it out, or in a new run add --ntasgd "
            "--optimizer sgd",
        ),
        (
            "--optimizer sgd",
            "--nonmono 3",
            "--nonmono 3: has no effect here, the weights are not averaged; add --ntasgd, or leave it out",
        ),
    ],
)
def test_what_a_run_must_keep_is_advised_for_a_new_one_only(write_run, run, flags, problem):
    path = write_run(run)
    with pytest.raises(ConfigError) as caught:
        parse(f"--resume RUN {flags}").over(path, FIXED_ON_RESUME)
    assert caught.value.problems == [problem.replace("RUN", f"run {path.parent}")]


def test_a_run_is_not_answered_for_by_who_resumes_it(write_run):
    path = write_run("--ntasgd --nonmono 3 --dropouth 0.3 --when 30 --epochs 40 --beta 1")
    for line in ("--epochs 20", "--bptt 1", "--no-ntasgd", "--optimizer adam", "--no-ntasgd --lr-decay 2"):
        command = parse(f"--resume RUN {line}").over(path, FIXED)
        assert command.config.model.dropout_hidden == 0.3
    with pytest.raises(ConfigError) as caught:
        parse("--resume RUN --lr-decay 2").over(path, FIXED)
    assert caught.value.problems == [
        f"--ntasgd (run {path.parent}) with --lr-decay 2: averaging takes the place of a falling learning rate; "
        "use --lr-decay none, or --no-ntasgd"
    ]


def test_what_may_change_while_a_run_goes_on():
    """A new knob must be put on one side or the other."""
    knobs = {name for section in SECTIONS.values() for name in section.__dataclass_fields__}
    may_change = {
        *("data", "data_dir", "amp", "lr", "lr_decay", "when", "clip_norm", "weight_decay", "alpha", "beta", "ntasgd"),
        *("nonmono", "epochs", "max_steps", "small_batch_size", "tf32", "log_interval", "eval_every", "patience"),
        *("eval_batch_size", "checkpoint_every", "keep_checkpoints", "tensorboard", "gen_word_len", "weight_drop"),
        *("dropout", "dropout_input", "dropout_hidden", "dropout_embed", "dropout_embed_elements", "dropout_candidate"),
        *("dropout_inner_input", "dropout_last_input", "dropout_latent", "input_weight_drop"),
        *DeviceConfig.__dataclass_fields__,
    }
    assert not may_change & FIXED_ON_RESUME
    assert may_change | FIXED_ON_RESUME == knobs


def test_masks_stay_what_they_were_while_a_run_goes_on(write_run):
    path = write_run("--recipe lm --dropout 0.2")
    for line in ("--dropouth 0.3", "--dropouti 0.1 --no-locked"):
        model = parse(f"--resume RUN {line}").over(path, FIXED_ON_RESUME).config.model
        assert not model.has_locked_dropout
    assert parse("--init-from RUN --dropouth 0.3").over(path, FIXED, False).config.model.has_locked_dropout
    with pytest.raises(ConfigError, match="--locked: .* was trained with false; leave the flag out"):
        parse("--resume RUN --locked").over(path, FIXED_ON_RESUME)


def test_continue_train_names_the_run_by_save():
    assert parse("--continue_train --save RUN").resume == "RUN"
    assert parse("--resume RUN --save RUN").resume == "RUN"


def test_resuming_changes_how_hard_a_run_is_regularised_and_not_what_is_trained(write_run, capsys):
    from gluon_lm.train import main

    run = write_run("--model awd-lstm --data ptb").parent
    line = f"--resume {run} --print-config --dropouth 0.2 --wdrop 0.1 --lr 3 --no-ntasgd --when 5 --epochs 9 --alpha 1"
    assert main(shlex.split(line)) == 0
    printed = read_config(capsys.readouterr().out)
    assert (printed.model.dropout_hidden, printed.model.weight_drop, printed.optim.ntasgd) == (0.2, 0.1, False)
    assert main(shlex.split(f"{line} --nhid 6 --layer-norm --optimizer adam --seed 3 --bptt 3 --min-freq 3")) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for flag in ("--nhid 6", "--layer-norm", "--optimizer adam", "--seed 3", "--bptt 3", "--min-freq 3"):
        assert any(row.startswith(f"error: {flag}: {run} was trained with ") for row in lines), flag


# ---------------------------------------------------------------- finetuning

TUNE_PTB = (
    "--data data/penn --dropouti 0.4 --dropoutl 0.29 --dropouth 0.225 --seed 28 --batch_size 12 --lr 25.0 --epoch 1000 "
    "--nhid 960 --emsize 280 --n_experts 15 --save PATH_TO_FOLDER --single_gpu"
)
TUNE_WT2 = WT2_FINETUNE_LINE + "--small_batch_size 5 --single_gpu"


@pytest.mark.parametrize("line, expected", [(TUNE_PTB, {**MOS_PTB, "lr": 25.0}), (TUNE_WT2, {**MOS_WT2, "lr": 20.0})])
def test_reference_command_lines_of_finetuning(line, expected):
    parsed = parse_tuning(line)
    assert (parsed.run, parsed.is_continued) == ("PATH_TO_FOLDER", False)
    command = parsed.command
    assert (command.recipe, command.save, command.resume) == (None, None, None)
    read = {name: get(command.config, name) for name in command.settings}
    assert {"dropout_input", "dropout_latent", "num_experts", "hidden_size", "single_gpu"} <= set(read)
    assert {name: value for name, value in read.items() if name in expected} == {
        name: value for name, value in expected.items() if name in read
    }


def test_finetuning_names_its_run_first_or_by_save():
    lines = ("RUN", "--save RUN", "RUN --save RUN", "--checkpoint=RUN", "")
    assert [parse_tuning(line).run for line in lines] == ["RUN"] * 4 + [None]
    assert parse_tuning("--save=~/run").run == str(Path.home() / "run")
    assert [parse_tuning(line).is_continued for line in ("RUN", "RUN --continue_train")] == [False, True]
    command = parse_tuning("RUN --overwrite --dry-run --debug").command
    assert command.overwrite and command.dry_run and not command.print_config
    assert len(problems_of("RUN --print-config --dry-run", parse_tuning)) == 1
    both = "RUN with --save OTHER: both name the run; leave one of them out"
    assert problems_of("RUN --save OTHER", parse_tuning) == [both]
    assert len(problems_of("RUN --save=", parse_tuning)) == 1
    assert problems_of("RUN --overwrite --continue-train", parse_tuning) == [
        "--overwrite with --continue-train: it is either continued or replaced; leave one of them out",
    ]


@pytest.mark.parametrize(
    "flag, instead",
    [
        ("--ntasgd", "averages the weights from its first step"),
        ("--no-ntasgd", "averages the weights from its first step"),
        ("--asgd", "averages the weights from its first step"),
        ("--no-asgd", "averages the weights from its first step"),
        ("--when 3", "the learning rate stays"),
        ("--resume R", "RUN --continue-train"),
        ("--recipe lm", "the run's own config.yaml"),
        ("--config c.yaml", "the run's own config.yaml"),
    ],
)
def test_finetuning_has_no_flags_for_what_it_decides_itself(flag, instead):
    (problem,) = problems_of(f"RUN {flag}", parse_tuning)
    assert problem.startswith(f"{flag.split()[0]}: unknown flag; ") and instead in problem


def test_finetuning_reports_every_bad_flag_at_once():
    assert problems_of("RUN --nonmono 0 --foooooooo --dropouth 1", parse_tuning) == [
        "--foooooooo: unknown flag; see python -m gluon_lm.finetune --help",
        "--nonmono 0: must be a whole number, 1 or more; for example 5",
        "--dropouth 1: must be a number, 0 or more and below 1, or none",
    ]


@pytest.mark.parametrize("line", ["--model awd-lstm --when 9 --nonmono 3", "--recipe lm --decay 2 --when 9"])
def test_finetuning_averages_from_the_first_step_whatever_the_run_did(line, write_run):
    path = write_run(line)
    before = parse(line).config
    command = parse_tuning("RUN --lr 25 --dropouth 0.225 --bptt 30 --cpus 2").command
    config = command.over(path, FIXED).config
    averaging = {"asgd": True, "ntasgd": False, "when": None, "lr_decay": None}
    given = {"lr": 25.0, "dropout_hidden": 0.225, "bptt": 30, "cpus": 2}
    for name in (name for section in SECTIONS.values() for name in section.__dataclass_fields__):
        assert get(config, name) == {**averaging, **given}.get(name, get(before, name)), name


def finetune(line):
    from gluon_lm.finetune import main

    return main(shlex.split(line))


def test_finetuning_keeps_text_and_architecture_and_takes_all_else_from_the_line(write_run, capsys):
    path = write_run("--model awd-lstm --nhid 5 --data ptb")
    line = f"{path.parent} --print-config --model awd-lstm --nhid 5 --data data/penn --tied"
    assert finetune(f"{line} --lr 25 --dropouti 0.1 --wdrop 0.2 --alpha 1 --nonmono 2 --seed 5 --batch-size 8") == 0
    printed = capsys.readouterr().out
    for row in ("lr: 25.0  # flag --lr", "dropout_input: 0.1  # flag --dropouti", "asgd: true  # finetune"):
        assert f"\n{row}\n" in printed
    assert "\nhidden_size: 5  # flag --nhid\n" in printed
    assert f"\ndropout_hidden: 0.3  # run {path.parent}\n" in printed
    assert read_config(printed).optim.ntasgd is False

    line = f"{path.parent} --nhid 6 --model lstm --no-tied --max-vocab 9 --init xavier --nlayers 2 --lr 25"
    assert finetune(line) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6
    for flag, value in [("--nhid 6", 5), ("--model lstm", "awd-lstm"), ("--nlayers 2", 3), ("--no-tied", "true")]:
        assert f"error: {flag}: {path.parent} was trained with {value}; leave the flag out, or train a new run" in lines


def test_finetuning_is_given_no_advice_that_it_refuses(write_run, capsys):
    assert finetune(f"{write_run('--model awd-lstm').parent} --decay 4") == 2
    reason = "averaging takes the place of a falling learning rate"
    assert capsys.readouterr().err == f"error: --asgd (finetune) with --decay 4: {reason}; use --lr-decay none\n"


def test_finetuning_a_run_that_does_not_exist_or_a_second_time_is_refused(write_run, capsys):
    path = write_run("--model awd-lstm")
    assert finetune(f"{path.parent}x") == 2
    assert "there is no such run" in capsys.readouterr().err
    assert finetune(f"{path.parent} --continue-train") == 2
    assert "there is no such run" in capsys.readouterr().err
    (path.parent / "finetune_model").mkdir()
    assert finetune(f"{path.parent}") == 2
    assert "exists already; continue it with --continue-train" in capsys.readouterr().err


# ---------------------------------------------------------------- help, and other commands


def test_help_has_every_flag_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for section in SECTIONS.values():
        for f in section.__dataclass_fields__.values():
            for name in (f.name, *f.metadata["aliases"]):
                assert "--" + name.replace("_", "-") in text
    assert "words in a window, through which gradients flow back (default: 35)" in text
    assert "--locked, --no-locked" in text and "--wdrop, --weight-dropout X" in text
    assert "example:\n  python -m gluon_lm.train" in text
    assert max(map(len, text.splitlines())) <= 110


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_every_command_has_groups_defaults_and_an_example_that_is_read(command, capsys, monkeypatch):
    main = importlib.import_module(f"gluon_lm.{command}").main
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    usage, *_, example = shown.rstrip().splitlines()
    assert usage.startswith(f"usage: python -m gluon_lm.{command} ")
    assert "\nmessages:\n" in shown and "--quiet" in shown and "--verbose" in shown
    assert max(map(len, shown.splitlines())) <= 110
    for flag in re.split(r"\n(?=  -)", shown.partition("\nexample:")[0])[1:]:
        has_value = re.match(r"  (--[\w-]+(, )?)+ [^-\s]", flag)  # a switch has two spaces before its help
        assert not has_value or "(default: " in " ".join(flag.split()), flag

    read = []
    parse_words = CommandParser.parse

    def note(self, argv=None):
        read.append(parse_words(self, argv))
        raise ConfigError("that is enough")

    monkeypatch.setattr(CommandParser, "parse", note)
    python, _, module, *words = shlex.split(example)
    assert (python, module) == ("python", f"gluon_lm.{command}")
    assert main(words) == 2 and len(read) == 1 and (words == [] or read[0].settings or vars(read[0].arguments))
    assert capsys.readouterr().err == "error: that is enough\n"
    if "--" in words:
        with pytest.raises(ConfigError, match="that is enough"):
            parse_train(words[words.index("--") + 1 :])


def test_the_launcher_has_its_workers_say_as_much_as_it_is_told(monkeypatch, tmp_path):
    text, started = tmp_path / "text.txt", []
    text.write_text("some words of a line\n" * 100)
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(launch, "log_to_terminal", lambda verbosity: None)
    monkeypatch.setattr(launch, "parameter_server", lambda hosts, workers, servers, words: started.append(words))
    monkeypatch.setattr(launch.Supervisor, "__init__", lambda *arguments: None)
    monkeypatch.setattr(launch.Supervisor, "run", lambda self: 0)
    for flag in ("--quiet", "--verbose"):
        assert launch.main([flag, "--", "--data", str(text)]) == 0
        assert flag in started[-1]
    assert launch.main(["--quiet", "--", "--verbose"]) == 2


def test_the_commands_are_listed_with_a_line_each(capsys):
    for words in ([], ["--help"]):
        assert package_main(words) == 0
        lines = capsys.readouterr().out.splitlines()
        for command, what in COMMANDS.items():
            assert len([line for line in lines if line.split() == [command, *what.split()]]) == 1
            assert importlib.import_module(f"gluon_lm.{command}").__doc__.startswith(f"``python -m gluon_lm.{command}")
    assert package_main(["--version"]) == 0
    assert capsys.readouterr().out == f"gluon_lm {gluon_lm.__version__}\n"
    modules = {path.stem for path in Path(gluon_lm.__file__).parent.glob("*.py") if "\ndef main(" in path.read_text()}
    assert modules - {"__main__"} == COMMANDS.keys()


def test_a_command_of_its_own_with_the_device_flags():
    parser = CommandParser("score", "Score a text.", "python -m gluon_lm.score RUN")
    parser.add_argument("run")
    parser.add_device()
    parsed = parser.parse(["RUN", "--gpu", "1,2"])
    assert parsed.arguments.run == "RUN"
    assert parsed.build(DeviceConfig) == DeviceConfig(gpus=(1, 2))
    with pytest.raises(ConfigError, match="--cpus 1 with|with --cpus 1"):
        parser.parse(["RUN", "--cuda", "--cpus", "1"]).build(DeviceConfig)
    with pytest.raises(ConfigError, match="--horovod: unknown flag; it joins devices"):
        parser.parse(["RUN", "--horovod"])
    with pytest.raises(ConfigError, match="run"):
        parser.parse([])


def test_usage_names_the_positionals(capsys):
    parser = CommandParser("fetch", "Fetch.", "python -m gluon_lm.fetch ptb")
    parser.add_argument("name", nargs="+")
    with pytest.raises(SystemExit):
        parser.parse(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m gluon_lm.fetch NAME ... [flags]\n")


def test_some_fields_of_a_section():
    parser = CommandParser("score", "Score a text.", "python -m gluon_lm.score RUN")
    parser.add_section(SECTIONS["data"], "data", only=("data", "data_dir"))
    assert parser.parse(["--data", "ptb"]).build(SECTIONS["data"]).data == ("ptb",)
    with pytest.raises(ConfigError, match="--min-freq: unknown flag"):
        parser.parse(["--min-freq", "2"])


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([f for f in train_parser()._option_string_actions if f not in ("-h", "--help")]),
            st.sampled_from(["--quiet", "--verbose", "--debug"]),
            st.sampled_from(["0", "-1", "1e-4", "2bit", "lstm", "none", "0,1", "--nhid=3", "--tied=", "-"]),
            st.text(max_size=5).filter(lambda word: not word.startswith("-h")),
        ),
        max_size=6,
    )
)
def test_any_words_are_a_command_or_a_config_error(words):
    try:
        assert isinstance(parse_train(words).config, Config)
    except ConfigError as error:
        assert error.problems and all(problem.strip() for problem in error.problems)


def test_parsers_do_not_share_what_they_read():
    parser = train_parser()
    parser.parse(["--tied"])
    assert parser.parse([]).settings == {}


# ---------------------------------------------------------------- how a command ends


def raising(error):
    def work(argv):
        raise error

    return work


@pytest.mark.parametrize(
    "error, line",
    [
        (CheckpointError("run x:\nis damaged"), "error: run x: is damaged"),
        (
            ModuleNotFoundError("No module named 'mxnet'", name="mxnet"),
            "error: MXNet is not installed: pip install 'gluon_lm[cpu]', or 'gluon_lm[cu112]' for CUDA 11.2 GPUs",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "/a/b"),
            "error: /a/b: no permission; choose another folder, or change its permissions",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            "error: cannot be written (No space left on device); fix that, or choose another folder",
        ),
        (
            OSError("libcuda.so.1: cannot open shared object file: No such file or directory"),
            "error: MXNet's library does not load (libcuda.so.1: cannot open shared object file: "
            "No such file or "
            "directory): install what is missing, or the CPU build with pip install 'gluon_lm[cpu]'",
        ),
    ],
)
def test_an_error_that_a_user_can_mend_is_one_line_and_exit_code_2(error, line, capsys):
    assert run_command(raising(error), []) == 2
    assert capsys.readouterr() == ("", line + "\n")
    with pytest.raises(type(error)):
        run_command(raising(error), ["--debug"])


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        ModuleNotFoundError("no", name="gluon_lm.nothing"),
        FileNotFoundError(errno.ENOENT, "no"),
    ],
)
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error)):
        run_command(raising(error), [])


def test_exit_codes():
    assert run_command(lambda argv: 0, []) == 0
    assert run_command(lambda argv: len(argv), ["a", "b", "c"]) == 3
    assert run_command(raising(KeyboardInterrupt()), []) == 130


def test_every_problem_is_a_line_of_its_own(capsys):
    assert run_command(raising(ConfigError(["one", "two\nlines"])), []) == 2
    assert capsys.readouterr().err == "error: one\nerror: two lines\n"


def run_python(*arguments, **more):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, **more)


def test_the_package_lists_its_commands():
    done = run_python("-m", "gluon_lm")
    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert run_python("-m", "gluon_lm", "--version").stdout == f"gluon_lm {gluon_lm.__version__}\n"


def test_an_unknown_command_is_refused_by_the_process():
    done = run_python("-m", "gluon_lm", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (f"error: trian: must be a command, one of {', '.join(COMMANDS)}; did you mean train?\n")


def test_bad_flags_are_refused_by_the_process_without_mxnet():
    program = (
        "import sys; sys.modules['mxnet'] = None\n"
        "from gluon_lm.cli import run_command\n"
        "from gluon_lm.train import parse_train\n"
        "sys.exit(run_command(lambda argv: print(parse_train(argv).describe()) or 0))\n"
    )
    done = run_python("-c", program, "--nhid", "0", "--batch_sise", "3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines() == [
        "error: --batch-sise: unknown flag; did you mean --batch-size?",
        "error: --nhid 0: must be a whole number, 1 or more; for example 200",
    ]
    done = run_python("-c", program, "--nhid", "5")
    assert done.returncode == 0 and "hidden_size: 5  # flag --nhid" in done.stdout


def test_a_missing_mxnet_is_named_by_the_process():
    program = (
        "import sys; sys.modules['mxnet'] = None\n"
        "from gluon_lm.cli import run_command\n"
        "def work(argv):\n    import mxnet\n"
        "sys.exit(run_command(work))\n"
    )
    done = run_python("-c", program)
    assert done.returncode == 2
    assert done.stderr.startswith("error: MXNet is not installed") and done.stderr.count("\n") == 1


def test_a_reader_that_goes_away_is_no_traceback():
    program = (
        "import sys\nfrom gluon_lm.cli import run_command\n"
        "def work(argv):\n    sys.stdin.read()\n    print('x' * 100000)\n    return 0\n"
        "sys.exit(run_command(work))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=60) == 141
    assert stderr == b""


def test_a_process_without_output_does_its_work(tmp_path):
    command = f"{shlex.quote(sys.executable)} -m gluon_lm.runs {shlex.quote(str(tmp_path))} >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], cwd=ROOT, timeout=60).returncode == 0


def test_importing_the_package_imports_neither_mxnet_nor_numpy():
    program = "import sys, gluon_lm, gluon_lm.cli; print({'mxnet', 'numpy', 'tqdm'} & set(sys.modules))"
    assert run_python("-c", program).stdout == "set()\n"


def test_public_names_load_when_they_are_used():
    assert gluon_lm.Config is Config
    assert {"Config", "ConfigError", "load_corpus"} <= set(dir(gluon_lm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gluon_lm.nothing


def test_every_error_that_a_user_of_the_package_may_catch_is_a_public_name():
    kinds = {
        kind for kind in vars(gluon_lm.errors).values() if inspect.isclass(kind) and issubclass(kind, GluonLMError)
    }
    assert {getattr(gluon_lm, kind.__name__) for kind in kinds} == kinds
