"""Command lines: those of the systems that this one replaces, the errors, and how a command ends."""

from __future__ import annotations

import errno
import os
import shlex
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import gluon_lm
from gluon_lm.__main__ import COMMANDS
from gluon_lm.cli import CommandParser, normalise_argv, parse_train, run_command, train_parser
from gluon_lm.config import SECTIONS, Config, DeviceConfig, get
from gluon_lm.errors import CheckpointError, ConfigError

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(gluon_lm.__file__)))


def parse(line):
    return parse_train(shlex.split(line))


def problems_of(line):
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
def test_reference_command_lines_train_unless_they_ask_for_a_missing_feature(line, expected):
    if expected.get("recipe") in ("mos", "awd"):
        assert all(problem.endswith("is not available in this version") for problem in problems_of(line))
    else:
        assert parse(line).config == parse(line + " --print-config").config


def test_switches_of_the_mxnet_example_that_are_always_on(capsys):
    command = parse("--hybridize --static_alloc --static-shape --tied")
    assert command.config == parse("--tied").config
    captured = capsys.readouterr()
    assert captured.err == "warning: --hybridize --static-alloc --static-shape: always so here; leave it out\n"


# ---------------------------------------------------------------- reading flags


def test_nothing_given_is_the_lm_recipe():
    command = parse("")
    assert command.config == Config()
    assert (command.recipe, command.save, command.resume) == ("lm", None, None)
    assert not (command.overwrite or command.print_config or command.dry_run or command.debug)


def test_flags_of_the_run():
    command = parse("--save out.pt --overwrite --dry-run --debug --recipe mxnet")
    assert (command.save, command.overwrite, command.dry_run, command.debug) == ("out.pt", True, True, True)
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


def test_every_problem_at_once(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("hiden_size: 5\n", encoding="utf-8")
    assert problems_of("--nhid 0 --dropout 1.5 --batch_sise 3 --model lsmt extra") == [
        "--batch-sise: unknown flag; did you mean --batch-size?",
        "extra: belongs to no flag; see python -m gluon_lm.train --help",
        "--nhid 0: must be a whole number, 1 or more; for example 200",
        "--dropout 1.5: must be a number, 0 or more and below 1; for example 0.2",
        "--model lsmt: must be one of lstm, gru, rnn_tanh, rnn_relu, awd-lstm, awd-gru, awd-rnn; did you mean lstm?",
    ]
    assert problems_of(f"--continue-train --recipe nobody --config {path}") == [
        "--continue-train: needs the run to continue; add --save RUN, or use --resume RUN",
        f"{path} line 1: unknown key hiden_size; did you mean hidden_size?",
        "--recipe nobody: must be one of awd, demo, lm, mos, mxnet",
    ]
    assert problems_of("--nhid 0 --gctype 2bit --alpha 2") == [
        "--nhid 0: must be a whole number, 1 or more; for example 200",
        "--gctype 2bit: nothing to compress, one device exchanges no gradients; name several, as in --gpus "
        "0,1 or --cpus 2, or leave it out",
        "--alpha 2: activation regularisation is not available in this version",
    ]
    assert problems_of("--cpus 0 --gctype 2bit") == ["--cpus 0: must be a whole number, 1 or more, or none"]
    assert problems_of("--gpuss 0,1 --gctype 2bit") == ["--gpuss: unknown flag; did you mean --gpus?"]
    assert problems_of("--cpus 3 --gctype 2bit --kvstore local --n-experts 2 --recipe lm") == [
        "--batch-size 20 (recipe lm): must be a multiple of the number of devices, 3; use 18 or 21",
        "--gctype 2bit with --kvstore local: local cannot compress; use --kvstore device",
        "--n-experts 2: the mixture of softmaxes is not available in this version",
    ]


@pytest.mark.parametrize(
    "line, words",
    [
        ("--nhi 3", ["--nhi: unknown flag", "did you mean --nhid?"]),
        ("--epo 3", ["--epo: unknown flag", "did you mean --epoch?"]),
        ("--zzzzzzzz", ["--zzzzzzzz: unknown flag", "--help"]),
        ("--eval_only", ["--eval-only: unknown flag", "gluon_lm.evaluate"]),
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
        ("--gctype 3bit", ["--gctype 3bit", "one of none, 2bit"]),
        ("--kvstore device --cpus 1", ["--kvstore device", "one device"]),
        ("--batch_size 21 --gpus 0,1", ["--batch-size 21", "use 20 or 22"]),
        ("--vocab v --min_freq 2", ["--min-freq 2 with --vocab"]),
        ("--config /nonexistent/a.yaml", ["/nonexistent/a.yaml", "No such file"]),
        ("--save ''", ["--save ''", "a name or a path"]),
        ("--resume A --save B", ["--save B with --resume A"]),
        ("--resume A --overwrite", ["--overwrite with --resume"]),
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


def test_resume_lays_the_flags_over_the_configuration_of_the_run(tmp_path):
    path = tmp_path / "config.yaml"
    first = parse("--recipe mxnet --nhid 5 --gpus 0,1 --gctype 2bit --gcthreshold 0.3")
    path.write_text(first.config.to_yaml(recipe=first.recipe), encoding="utf-8")
    command = parse("--resume RUN --epochs 50 --cpus 1 --gctype none")
    assert command.resume == "RUN"
    command = command.over(path)
    assert (command.recipe, command.resume) == ("mxnet", "RUN")
    assert command.config.training.epochs == 50
    assert command.config.devices == DeviceConfig(cpus=1)
    assert command.config.model == first.config.model
    with pytest.raises(ConfigError, match="multiple of the number of devices, 3"):
        parse("--resume RUN --cpus 3").over(path)


def test_resume_is_checked_against_the_run_and_not_the_defaults(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(parse("--cpus 4 --gctype 2bit").config.to_yaml(), encoding="utf-8")
    assert parse("--resume RUN --gcthreshold 0.3").over(path).config.devices.gcthreshold == 0.3


def test_continue_train_names_the_run_by_save():
    assert parse("--continue_train --save RUN").resume == "RUN"
    assert parse("--resume RUN --save RUN").resume == "RUN"


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
    assert "example:\n  python -m gluon_lm.train" in text
    assert max(map(len, text.splitlines())) <= 110


def test_a_command_of_its_own_with_the_device_flags():
    parser = CommandParser("score", "Score a text.", "python -m gluon_lm.score RUN")
    parser.add_argument("run")
    parser.add_section(DeviceConfig, "devices")
    parsed = parser.parse(["RUN", "--gpu", "1,2"])
    assert parsed.arguments.run == "RUN"
    assert parsed.build(DeviceConfig) == DeviceConfig(gpus=(1, 2))
    with pytest.raises(ConfigError, match="--cpus 1 with|with --cpus 1"):
        parser.parse(["RUN", "--cuda", "--cpus", "1"]).build(DeviceConfig)
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
            "error: cannot be written (No space left on device); free some space, or choose another folder",
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
        "from gluon_lm.cli import parse_train, run_command\n"
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


def test_importing_the_package_imports_neither_mxnet_nor_numpy():
    program = "import sys, gluon_lm, gluon_lm.cli; print({'mxnet', 'numpy', 'tqdm'} & set(sys.modules))"
    assert run_python("-c", program).stdout == "set()\n"


def test_public_names_load_when_they_are_used():
    assert gluon_lm.Config is Config
    assert {"Config", "ConfigError", "load_corpus"} <= set(dir(gluon_lm))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gluon_lm.nothing
