"""The command line: parsers made from the fields of `gluon_lm.config`, and how a command ends.

A command is ``main(argv=None) -> int``, run `as_command`. What needs MXNet is imported inside it, so that ``--help`` is
quick and a machine without MXNet gets an answer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import functools
import io
import os
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, cast

from gluon_lm.config import (
    SECTIONS,
    DataConfig,
    DeviceConfig,
    Kind,
    Section,
    Setting,
    Settings,
    build,
    did_you_mean,
    flag_of,
    option,
    pathname,
    read_value,
    show,
    switch,
)
from gluon_lm.errors import ConfigError, GluonLMError, OutOfMemory, reason
from gluon_lm.logs import LOGGER, Verbosity
from gluon_lm.memory import is_allocation_failure

_Section = TypeVar("_Section", bound=Section)
_Main = TypeVar("_Main", bound=Callable[..., int])
_RUN = "named_run"
_NUMBER = re.compile(r"-(\d|\.\d)[\d.,eE+-]*$")
_NO_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR)
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EIO)


@dataclass(frozen=True)
class DebugOptions(Section):
    """What every command has: how much it prints."""

    quiet: bool = option(False, switch(), "show no progress, and print only results and warnings")
    verbose: bool = option(False, switch(), "say more about what is being done")
    debug: bool = option(False, switch(), "show the traceback of an error")

    @property
    def verbosity(self) -> Verbosity:
        """`quiet` and `verbose` as one."""
        return Verbosity.QUIET if self.quiet else Verbosity.VERBOSE if self.verbose else Verbosity.NORMAL


class _Store(argparse.Action):
    """Record a flag as it was spelled, with its raw value; `CommandParser.parse` reads all of them together."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        flag = option_string or ""
        if self.nargs == 0:
            values = flag != flag_of(f"no_{self.dest}")
        namespace.given = {**getattr(namespace, "given", {}), self.dest: (flag, values)}


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Help in which a flag's spellings share one placeholder."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not isinstance(action, _Store):
            return super()._format_action_invocation(action)
        several = f" [{action.metavar} ...]" if action.nargs == "+" else ""
        return " ".join([", ".join(action.option_strings), str(action.metavar or "")]).rstrip() + several


@dataclass(frozen=True)
class Parsed:
    """What a command line gave: `arguments` (positionals, plain flags), the settings of the sections, and the run.

    `run` is what `CommandParser.add_run` reads; None where no run is named.
    """

    arguments: argparse.Namespace
    settings: Settings
    run: str | None

    def build(self, section: type[_Section]) -> _Section:
        """One section of these settings, defaults elsewhere; `ConfigError` for contradictory values."""
        return build(section, self.settings)

    def of(self, *sections: type[Section]) -> Settings:
        """The settings of the given sections only."""
        names = {field.name for section in sections for field in dataclasses.fields(section)}
        return {name: setting for name, setting in self.settings.items() if name in names}

    def over(self, section: _Section) -> _Section:
        """A section of a run's configuration, overridden by the settings that were given."""
        given = self.of(type(section))
        return dataclasses.replace(section, **{name: setting.value for name, setting in given.items()})

    @property
    def verbosity(self) -> Verbosity:
        """How much the command prints."""
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
        For flags that do not exist: what to do instead, by flag.
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

    def add_data(self) -> None:
        """Add the flags that name a text other than the run's; `Parsed.over` applies them to its `DataConfig`."""
        self.add_section(DataConfig, "data", only=("data", "data_dir", "tokenizer"), default="the run's")

    def add_run(self, *flags: str, or_export: bool = False) -> None:
        """Add the optional argument RUN (default: the newest run), and flags that may name it instead."""
        what = "run folder, checkpoint or exported folder" if or_export else "run folder or checkpoint"
        self.add_argument("run", nargs="?", metavar="RUN", help=f"{what} (default: the newest run under runs/)")
        if flags:
            named = "the run, if it is not the first argument (default: none)"
            group = self.add_argument_group("run")
            group.add_argument(*flags, action=_Store, dest=_RUN, metavar="RUN", default=argparse.SUPPRESS, help=named)
            self._declared[_RUN] = option(None, pathname("RUN"), named)

    @property
    def flags(self) -> Sequence[str]:
        """All flags of the command."""
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
            The arguments; None: those of the process.

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
                hint = did_you_mean(flag, self._option_string_actions) or f"; see {self.prog} --help"
                hint = f"; {self._instead[flag]}" if flag in self._instead else hint
                problems.append(f"{show(flag)}: unknown flag{hint}")
                previous = "" if equals else flag
            elif previous:
                previous = ""  # the unknown flag's value, and no problem of its own
            else:
                problems.append(f"{show(word)}: is not the value of any flag; see {self.prog} --help")
        settings: Settings = {}
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
            problems.append("--print-config with --dry-run: one prints, one builds the model; leave one of them out")
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


# ---------------------------------------------------------------- how a command ends


def run_command(work: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None) -> int:
    """Run a command, and turn errors that a user can cause into lines on standard error and an exit code.

    Parameters
    ----------
    work : callable
        Takes the arguments, returns the exit code.
    argv : sequence of str, optional
        The arguments; None: those of the process.

    Returns
    -------
    int
        What `work` returned; 2 for an error that the user can fix, 130 for Ctrl-C, 141 where the reader of
        the output went away, unless the command handles that itself. Any other exception is a bug and passes through
        with its traceback, as every error does under ``--debug``.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    started = time.perf_counter()
    for stream, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, stream) is None:  # the process was started with it closed
            setattr(sys, stream, open(os.devnull, mode, encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for characters that a terminal's encoding lacks
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
        # Here, because what the error holds is freed after this block, and MXNet may wait or crash then.
        for line in lines:
            print(f"error: {line}", file=sys.stderr)
        return 2


def as_command(main: _Main) -> _Main:
    """Make a function the ``main`` of a command: `run_command` calls it, with the arguments."""

    @functools.wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        return run_command(main, argv)

    return cast(_Main, run)


def _explain(error: Exception) -> list[str]:
    """The lines that tell a user what to fix; empty where the error is a bug of ours."""
    if isinstance(error, OutOfMemory) or is_allocation_failure(error):
        with contextlib.suppress(Exception):
            sys.modules["mxnet"].nd.waitall()  # otherwise MXNet prints tracebacks of further failures at exit
    if is_allocation_failure(error):
        return [
            f"out of memory ({reason(error)}): free some, use a smaller model, process less at once "
            "(--small-batch-size, --eval-batch-size, --samples; unless a run continues, --batch-size, --bptt), or "
            "allow this process more (ulimit -v)"
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
