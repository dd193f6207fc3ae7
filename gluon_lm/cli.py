"""The command line: parsers made from the fields of `gluon_lm.config`, and how a command ends.

A command is ``main(argv=None) -> int``, which hands its work to `run_command`. What needs MXNet is imported
inside that work, so that ``--help`` is quick and a machine without MXNet gets an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gluon_lm.config import (
    SECTIONS,
    Config,
    DeviceConfig,
    Kind,
    Layer,
    RunOptions,
    Section,
    Setting,
    build,
    flag_of,
    get,
    nearest,
    option,
    origins_in,
    pathname,
    read_value,
    resolve,
    show,
    switch,
    validate,
)
from gluon_lm.errors import ConfigError, GluonLMError, OutOfMemory, reason
from gluon_lm.logs import LOGGER, Verbosity
from gluon_lm.memory import is_allocation_failure

_Section = TypeVar("_Section", bound=Section)
_RUN = "named_run"
_NUMBER = re.compile(r"-(\d|\.\d)[\d.,eE+-]*$")
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class DebugOptions(Section):
    """What every command has: how much it says."""

    quiet: bool = option(False, switch(), "show no progress, and print only results and warnings")
    verbose: bool = option(False, switch(), "say more about what is being done")
    debug: bool = option(False, switch(), "show the traceback of an error")

    @property
    def verbosity(self) -> Verbosity:
        """`quiet` and `verbose` as one."""
        return Verbosity.QUIET if self.quiet else Verbosity.VERBOSE if self.verbose else Verbosity.NORMAL


# Flags of the systems that these commands replace.
_ALWAYS_SO = ("--hybridize", "--static-alloc", "--static-shape")
_INSTEAD_OF_TRAINING = {
    "--checkpoint": "to continue a run, use --resume RUN; to begin a new one with its weights, --init-from RUN",
    "--from-epoch": "to continue a run, use --resume RUN",
    "--eval-only": "to evaluate a run, use python -m gluon_lm.evaluate RUN",
    "--test-mode": "for a short trial, use --max-steps 20",
    **dict.fromkeys(("--model-dir", "--model-name"), "name the run folder with --save"),
    "--export-model": "to write symbol and parameters, use python -m gluon_lm.export RUN --output DIR",
    "--onnx-export": "to write ONNX, use python -m gluon_lm.export RUN --output DIR --format onnx",
    "--use-optimizer": "name the optimiser with --optimizer adam",
    **dict.fromkeys(
        ("--lr-update-interval", "--lr-update-factor"),
        "--decay divides the learning rate where validation is no new best",
    ),
    "--num-gpus": "name them, as in --gpus 0,1,2,3",
    "--batch-size-per-gpu": "--batch-size is that of all devices together",
    **dict.fromkeys(("--mode", "--config-file"), "training and evaluation are commands; train --config reads YAML"),
    "--logdir": "name the run folder with --save",
    "--early-stopping": "--patience N stops after N evaluations with no new best",
    "--momentum": "SGD is plain here; leave it out, or use --optimizer adam",
    "--warmup": "the learning rate is not warmed up",
    "--nhead": "there is no transformer here",
    "--nproj": "no layer is projected; --nhidlast makes the last one narrower",
    "--k": "the words of a sampled softmax are --num-sampled",
}


class _Store(argparse.Action):
    """Note a flag as it was spelled, with its raw value; `CommandParser.parse` reads all of them together."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = option_string or ""
        if self.nargs == 0:
            values = flag != flag_of(f"no_{self.dest}")
        namespace.given = {**getattr(namespace, "given", {}), self.dest: (flag, values)}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in which a flag's spellings share one place holder."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Store):
            return super()._format_action_invocation(action)
        return " ".join([", ".join(action.option_strings), str(action.metavar or "")]).rstrip()


@dataclass(frozen=True)
class Parsed:
    """What a command line gave: `arguments` (positionals, plain flags), the settings of the sections, and the run.

    `run` is what `CommandParser.add_run` reads; None where no run is named.
    """

    arguments: argparse.Namespace
    settings: Layer
    run: str | None

    def build(self, section: type[_Section]) -> _Section:
        """One section of these settings, defaults elsewhere; `ConfigError` for values that contradict."""
        return build(section, self.settings)

    @property
    def verbosity(self) -> Verbosity:
        """How much the command is to say."""
        return self.build(DebugOptions).verbosity


class CommandParser(argparse.ArgumentParser):
    """An `argparse` parser whose flags come from sections of fields, and whose errors are `ConfigError`.

    Every command also has the flags of `DebugOptions`.

    Parameters
    ----------
    command : str
        Name of the module: ``train`` for ``python -m gluon_lm.train``.
    description : str
        One sentence on what it does.
    example : str
        One command line, shown at the end of the help.
    instead : mapping, optional
        What to do instead of giving a flag that is not there, by flag.
    """

    def __init__(self, command: str, description: str, example: str, instead: Mapping[str, str] | None = None) -> None:
        super().__init__(
            prog=f"python -m gluon_lm.{command}",
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=_Formatter,
            allow_abbrev=False,
        )
        self._declared: dict[str, dataclasses.Field[Any]] = {}
        self._instead = dict(instead or {})

    def add_section(
        self, section: type[Section], title: str, only: Sequence[str] | None = None, default: str | None = None
    ) -> None:
        """Add a flag, under all its names, for each field of `section` (or for those that `only` names).

        `default` says what holds where a flag is not given, if that is not the field's own default.
        """
        group = self.add_argument_group(title)
        for declared in dataclasses.fields(section):
            if only is not None and declared.name not in only:
                continue
            kind: Kind = declared.metadata["kind"]
            flags = [flag_of(name) for name in (declared.name, *declared.metadata["aliases"])]
            if kind.is_switch and section in SECTIONS.values():  # a YAML file may have switched it on
                flags.append(flag_of(f"no_{declared.name}"))
            what, has_own, _ = declared.metadata["help"].partition(" (default: ")
            if has_own and default is None:
                what = declared.metadata["help"]
            elif declared.default is not False:
                what += f" (default: {default or show(declared.default)})"
            group.add_argument(
                *flags,
                action=_Store,
                dest=declared.name,
                nargs=0 if kind.is_switch else kind.nargs,
                metavar=kind.metavar or None,
                default=argparse.SUPPRESS,
                help=what.replace("%", "%%"),
            )
            self._declared[declared.name] = declared

    def add_device(self, title: str = "device") -> None:
        """Add the flags that choose the one device of a command which does not train."""
        choosing = ("gpus", "cpus", "cuda", "single_gpu")
        self.add_section(DeviceConfig, title, only=choosing)
        joining = [field.name for field in dataclasses.fields(DeviceConfig) if field.name not in choosing]
        self._instead |= {flag_of(name): "it joins devices, and this command runs on one" for name in joining}

    def add_run(self, *flags: str, or_export: bool = False) -> None:
        """Add RUN, the newest one where it is not named, and flags that name it where it is not named first."""
        what = "run folder, checkpoint or exported folder" if or_export else "run folder or checkpoint"
        self.add_argument("run", nargs="?", metavar="RUN", help=f"{what} (default: the newest run under runs/)")
        if flags:
            named = "the run, where it is not named first (default: none)"
            group = self.add_argument_group("run")
            group.add_argument(*flags, action=_Store, dest=_RUN, metavar="RUN", default=argparse.SUPPRESS, help=named)
            self._declared[_RUN] = option(None, pathname("RUN"), named)

    @property
    def flags(self) -> Sequence[str]:
        """All flags that it knows."""
        return list(self._option_string_actions)

    def error(self, message: str) -> NoReturn:
        match = re.match(r"argument ([^:]+): (.*)", message, re.DOTALL)
        if match and match.group(1).startswith("-"):
            names, what = match.groups()
            flag = names.split("/")[0]
            declared = self._declared.get(flag[2:].replace("-", "_"))
            if what.startswith("expected"):
                rule = f", {declared.metadata['kind'].rule}" if declared else ""
                raise ConfigError(f"{names}: needs a value{rule}; write {flag} VALUE")
            if what.startswith("ignored explicit argument"):
                raise ConfigError(f"{flag}: takes no value; write {flag} alone")
        raise ConfigError(f"{message}; see {self.prog} --help")

    def parse(self, argv: Sequence[str] | None = None) -> Parsed:
        """Read a command line.

        Parameters
        ----------
        argv : sequence of str, optional
            The process's own words if None.

        Raises
        ------
        ConfigError
            With every unknown flag and every value that breaks its field's rule.
        """
        if "quiet" not in self._declared:
            self.add_section(DebugOptions, "messages")
        self.usage = " ".join(["%(prog)s", *map(_usage_of, self._get_positional_actions()), "[flags]"])
        words = normalise_argv(sys.argv[1:] if argv is None else argv)
        namespace, rest = self.parse_known_args(words)
        problems: list[str] = []
        if rest and "--" in words:
            problems.append("--: belongs to launch alone, before the flags of train; leave it out")
            rest = []
        previous = ""
        for word in rest:
            flag, equals, _ = word.partition("=")
            if word.startswith("-") and word != "-":
                hint = nearest(flag, self._option_string_actions) or f"; see {self.prog} --help"
                hint = f"; {self._instead[flag]}" if flag in self._instead else hint
                problems.append(f"{show(flag)}: unknown flag{hint}")
                previous = "" if equals else flag
            elif previous:
                previous = ""  # the unknown flag's value, and no problem of its own
            else:
                problems.append(f"{show(word)}: belongs to no flag; see {self.prog} --help")
        settings: Layer = {}
        for name, (flag, raw) in vars(namespace).pop("given", {}).items():
            settings[name] = Setting(read_value(self._declared[name], raw, flag, problems), f"flag {flag}")
        run, named = getattr(namespace, "run", None), settings.pop(_RUN, None)
        # The first word may be the value of an unknown flag.
        if not rest and named is not None and None not in (run, named.value) and run != named.value:
            problems.append(
                f"{show(run)} with {named.flag} {show(named.value)}: both name the run; leave one of them out"
            )
        if "quiet" in settings and "verbose" in settings:
            problems.append("--quiet with --verbose: one contradicts the other; leave one of them out")
        if "print_config" in settings and "dry_run" in settings:
            problems.append("--print-config with --dry-run: one prints and checks no more; leave one of them out")
        if problems:
            raise ConfigError(problems)
        return Parsed(namespace, settings, run if named is None else named.value)


def _usage_of(positional: argparse.Action) -> str:
    name = str(positional.metavar or positional.dest.upper())
    return {"?": f"[{name}]", "*": f"[{name} ...]", "+": f"{name} ..."}.get(str(positional.nargs), name)


def normalise_argv(argv: Sequence[str]) -> list[str]:
    """Flags with ``-`` for ``_``, and ``--lr=-1e-3`` for ``--lr -1e-3``, which argparse misreads."""
    words: list[str] = []
    for position, word in enumerate(argv):
        if word == "--":
            return words + list(argv[position:])
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            words.append(flag.replace("_", "-") + equals + value)
        elif _NUMBER.match(word) and words and words[-1].startswith("--") and "=" not in words[-1]:
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


# ---------------------------------------------------------------- train


# What a run that begins with the model of another has from that one: the architecture, and how text becomes ids.
FIXED = frozenset(
    {
        *("tokenizer", "min_freq", "max_vocab", "vocab"),
        *("model", "embed_size", "hidden_size", "num_layers", "tied", "init"),
        *("num_experts", "last_hidden_size", "layer_norm", "cutoffs"),
    }
)
# What stays while a run goes on: besides, what is trained, and on which windows in which order. The rest (the place of
# the text, devices, how long, how often, and how hard it is regularised) may change.
FIXED_ON_RESUME = FIXED | {
    *("num_sampled", "locked", "optimizer", "asgd"),
    *("max_seq_len_delta", "random_start", "shuffle", "batch_size", "bptt", "seed"),
}


@dataclass(frozen=True)
class TrainCommand:
    """A `train` command line, resolved.

    Attributes
    ----------
    config : Config
    sources : dict of str to str
        Where each value comes from, by field name; the recipe's source as ``recipe``.
    recipe : str or None
        Name of the recipe.
    save, resume, init_from : str or None
        The run folder to write, the run to continue, and the one to begin with, as the user named them. With one of
        the last two, `config` holds the command line alone, unchecked: `over` lays it over that run's configuration.
    overwrite, print_config, dry_run : bool
    verbosity : Verbosity
    settings : Layer
        The flags that were given.
    stem : str or None
        What the name of a new run begins with, where `save` does not name it: the time follows.
    kept_origins : mapping of str to str
        Where the values came from, when the run began, that are now those of the run that is gone on with.
    """

    config: Config
    sources: dict[str, str]
    recipe: str | None
    save: str | None
    resume: str | None
    init_from: str | None
    overwrite: bool
    print_config: bool
    dry_run: bool
    verbosity: Verbosity
    settings: Layer
    stem: str | None = None
    kept_origins: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """The run over whose configuration the flags are laid."""
        return self.init_from if self.resume is None else self.resume

    def describe(self) -> str:
        """The answer to ``--print-config``: YAML with the source of each value behind it."""
        return self.config.to_yaml({**self.sources, **self.kept_origins}, self.recipe)

    def with_tokenizer(self, tokenizer: str, corpus: str) -> TrainCommand:
        """With the tokenizer that the corpus was read with, so that other text is read alike later."""
        if self.config.data.tokenizer == tokenizer:
            return self
        data = dataclasses.replace(self.config.data, tokenizer=tokenizer)
        config = dataclasses.replace(self.config, data=data)
        return dataclasses.replace(self, config=config, sources={**self.sources, "tokenizer": f"corpus {corpus}"})

    def with_lr(self, lr: float) -> TrainCommand:
        """With the learning rate that a checkpoint was written under."""
        config = dataclasses.replace(self.config, optim=dataclasses.replace(self.config.optim, lr=lr))
        kept_origins = {name: origin for name, origin in self.kept_origins.items() if name != "lr"}
        sources = {**self.sources, "lr": "checkpoint"}
        return dataclasses.replace(self, config=config, sources=sources, kept_origins=kept_origins)

    def over(self, config_file: Path, fixed: Set[str], is_same_run: bool = True) -> TrainCommand:
        """The same command line over another YAML file: the ``config.yaml`` of the run that is gone on with.

        Parameters
        ----------
        config_file : Path
        fixed : set of str
            Fields that may not differ from the run's.
        is_same_run : bool
            Whether the run itself goes on, and its values keep their origin; another one has them from this run.

        Raises
        ------
        ConfigError
            As `parse_train`, and for every fixed field that differs.
        """
        before = resolve(config_file=config_file, default_recipe=None).config
        resolved = resolve(self.settings, config_file, default_recipe=None)
        was_locked = before.model.has_locked_dropout
        if "locked" in fixed and "locked" not in self.settings:  # which by default follows rates that may change
            model = dataclasses.replace(resolved.config.model, locked=was_locked)
            if model.has_locked_dropout != resolved.config.model.has_locked_dropout:
                resolved = dataclasses.replace(resolved, config=dataclasses.replace(resolved.config, model=model))
        run = f"run {config_file.parent}"
        own = {setting.source for setting in self.settings.values()}
        sources = {name: source if source in own else run for name, source in resolved.sources.items()}
        problems = []
        for name, setting in self.settings.items():
            value, old = get(resolved.config, name), was_locked if name == "locked" else get(before, name)
            if value != old and name in fixed:
                flag = setting.flag + ("" if isinstance(value, bool) else f" {show(value)}")
                was = f"{config_file.parent} was trained with {show(old)}"
                problems.append(f"{flag}: {was}; leave the flag out, or train anew")
        problems += validate(resolved.config, sources)
        if problems:
            raise ConfigError(problems)
        origins = origins_in(config_file.read_text(encoding="utf-8")) if is_same_run else {}
        kept = {name: origins[name] for name, source in sources.items() if source == run and name in origins}
        if get(resolved.config, "locked") != get(before, "locked"):
            kept["locked"] = "as the run began"
        return dataclasses.replace(self, **{**vars(resolved), "sources": sources}, kept_origins=kept)


def train_parser() -> CommandParser:
    """The parser of `python -m gluon_lm.train`."""
    parser = CommandParser(
        "train",
        "Train a word-level language model, keep its best checkpoint, and evaluate it on the test text.",
        "python -m gluon_lm.train --data wikitext-2 --tied --nhid 200 --emsize 200 --epochs 20 --dropout 0.2",
        instead=_INSTEAD_OF_TRAINING,
    )
    parser.add_section(RunOptions, "run")
    for name, section in SECTIONS.items():
        parser.add_section(section, name)
    return parser


def parse_train(argv: Sequence[str] | None = None) -> TrainCommand:
    """Read the command line of `train`: flags over ``--config`` over the recipe over the defaults.

    Raises
    ------
    ConfigError
        With every problem found.
    """
    words = normalise_argv(sys.argv[1:] if argv is None else argv)
    superfluous = [word for word in words if word in _ALWAYS_SO]
    if superfluous:
        print(f"warning: {' '.join(superfluous)}: always so here; leave it out", file=sys.stderr)
    parsed = train_parser().parse([word for word in words if word not in _ALWAYS_SO])
    problems: list[str] = []
    run = parsed.build(RunOptions)
    own = RunOptions.__dataclass_fields__.keys() | DebugOptions.__dataclass_fields__.keys()
    settings = {name: setting for name, setting in parsed.settings.items() if name not in own}

    resume = run.resume
    if run.continue_train:
        if run.save is None:
            problems.append("--continue-train: needs the run to continue; add --save RUN, or use --resume RUN")
        elif resume is not None:
            problems.append("--continue-train with --resume: both name the run to continue; leave one of them out")
        resume = run.save
    elif resume is not None and run.save not in (None, resume):
        both = f"--save {show(run.save)} with --resume {show(resume)}"
        problems.append(f"{both}: a run continues in its own folder; leave --save out")
    continued = "--continue-train" if run.continue_train else "--resume"
    if resume is not None and run.overwrite:
        problems.append(f"--overwrite with {continued}: a run is either continued or replaced; leave one of them out")
    if run.overwrite and run.save is None and resume is None:
        problems.append(
            "--overwrite: has no effect without --save RUN, for a run gets a new name; add it, or leave it out"
        )
    if resume is not None and run.init_from is not None:
        problems.append(f"--init-from with {continued}: a run begins once; leave one of them out")
    if run.init_from is not None:  # the other run's own bound is on its own steps
        settings.setdefault("max_steps", Setting(None, "flag --init-from"))
    is_based = resume is not None or run.init_from is not None
    base = continued if resume is not None else "--init-from"
    for flag, named in (("--config", run.config), ("--recipe", run.recipe)):
        if is_based and named is not None:
            problems.append(f"{flag} with {base}: the configuration is that run's config.yaml; leave {flag} out")

    config_file = None if run.config is None or is_based else Path(run.config)
    try:
        resolved = resolve(settings, config_file, None if is_based else run.recipe)
    except ConfigError as error:
        raise ConfigError(problems + error.problems) from None
    if not is_based:
        problems += validate(resolved.config, resolved.sources)
    if problems:
        raise ConfigError(problems)
    return TrainCommand(
        **vars(resolved),
        save=run.save,
        resume=resume,
        init_from=run.init_from,
        overwrite=run.overwrite,
        print_config=run.print_config,
        dry_run=run.dry_run,
        verbosity=parsed.verbosity,
        settings=settings,
    )


# ---------------------------------------------------------------- how a command ends


def run_command(work: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command and turn what a user can cause into lines on standard error and an exit code.

    Parameters
    ----------
    work : callable
        Takes the words of the command line, returns the exit code.
    argv : sequence of str, optional
        The process's own words if None.

    Returns
    -------
    int
        What `work` returned; 2 for an error that the user can mend, 130 for Ctrl-C, 141 where the reader of
        the output went away, unless it is to be outlived. Anything else that is raised is a bug and passes through
        with its traceback, as every error does under ``--debug``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    started = time.perf_counter()
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # the process was started with it closed
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # what a terminal's encoding lacks
    try:
        code = work(words)
        LOGGER.debug("done in %.1f s", time.perf_counter() - started)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit, which would complain about the same pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (GluonLMError, ImportError, OSError, MemoryError, RuntimeError) as error:
        lines = _explain(error)
        if debug or not lines:
            raise
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return 2


def _explain(error: Exception) -> list[str]:
    """The lines that tell a user what to mend; empty where the error is a bug of ours."""
    if isinstance(error, OutOfMemory) or is_allocation_failure(error):
        with contextlib.suppress(Exception):
            sys.modules["mxnet"].nd.waitall()  # or else it says at exit what else found no memory, with tracebacks
    if is_allocation_failure(error):
        return [
            f"memory is short ({reason(error)}): free some, take a smaller model, lower what is worked on at once "
            "(--batch-size, --bptt, --eval-batch-size, --samples), or allow this process more (ulimit -v)"
        ]
    if isinstance(error, ConfigError):
        return [" ".join(problem.split()) for problem in error.problems]
    if isinstance(error, GluonLMError):
        return [" ".join(str(error).split())]
    if isinstance(error, ImportError):
        if error.name != "mxnet":
            return []
        return ["MXNet is not installed: pip install 'gluon_lm[cpu]', or 'gluon_lm[cu112]' for CUDA 11.2 GPUs"]
    if not isinstance(error, OSError):
        return []
    if error.errno is None and "cannot open shared object file" in str(error):
        return [
            f"MXNet's library does not load ({' '.join(str(error).split())}): install what is missing, "
            "or the CPU build with pip install 'gluon_lm[cpu]'"
        ]
    where = "" if error.filename is None else f"{error.filename}: "
    if isinstance(error, PermissionError):
        return [f"{where}no permission; choose another folder, or change its permissions"]
    if error.errno in _NO_PATH:
        return [f"{where}cannot be a file or a folder ({error.strerror}); name another"]
    if error.errno in _NOT_WRITTEN:
        return [f"{where}cannot be written ({error.strerror}); fix that, or choose another folder"]
    return []
