"""``python -m gluon_lm.launch``: train on several machines, or in several processes, with a parameter server."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cli import CommandParser, DebugOptions, as_command
from .config import Section, device_count, integer, option, optional, pathname, real, share_problems, show
from .data import Vocabulary
from .distributed.cluster import Host, parameter_server, read_hosts
from .distributed.supervisor import Supervisor
from .errors import ConfigError
from .logs import LOGGER, NOTICE, log_to_terminal
from .train import parse_train, resolve_run, train_parser, without_superfluous
from .training.command import TrainCommand
from .training.run_folder import RunFolder, strip_model_suffix

_KVSTORES = ("dist_sync", "dist_device_sync")


@dataclass(frozen=True)
class ClusterOptions(Section):
    """The processes of a cluster, and where they run."""

    workers: int = option(2, integer(), "processes that train; --batch-size is that of all together")
    servers: int = option(1, integer(), "processes that sum gradients")
    hostfile: str | None = option(
        None,
        optional(pathname("FILE")),
        "the machines, one per line: host, host slots=N or host:N; reached by ssh (default: this one)",
    )
    timeout: float = option(60.0, real(2), "seconds without progress after which everything is ended")
    port: int = option(0, integer(0, 65535), "port of the scheduler on the first machine; 0: any free one")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "launch",
        "Train with several workers and MXNet's parameter server; the flags after -- are those of train.",
        "python -m gluon_lm.launch --workers 4 --servers 2 --hostfile hosts.txt -- --data ptb --tied --save runs/ptb",
        instead=dict.fromkeys(train_parser().flags, "it is a flag of train: write it after --"),
    )
    parser.add_section(ClusterOptions, "cluster")
    words = list(argv or ())
    split = words.index("--") if "--" in words else len(words)
    parsed = parser.parse(words[:split])
    options = parsed.build(ClusterOptions)
    if split + 1 >= len(words):
        raise ConfigError("no flags for train: add them after --, as in --workers 2 -- --data ptb --tied")
    messages = [setting.flag for setting in parsed.of(DebugOptions).values()]
    is_here = options.hostfile is None
    flags, command, run = _train_command([*words[split + 1 :], *messages], is_here)
    if command.print_config:
        print(command.describe(), end="")
        return 0
    if run is not None or command.base is None:  # otherwise the batch is that of a run on another machine
        num_devices = options.workers * (device_count(command.config) or 1)
        problems = share_problems(command.config, num_devices, command.sources)
        if problems:
            raise ConfigError(problems)
    hosts = [Host()] if options.hostfile is None else read_hosts(Path(options.hostfile))
    log_to_terminal(command.verbosity)
    if is_here:
        if command.resume is None:
            command.check_place()
        # Problems with the text are reported once, and the workers find it encoded.
        command.load_corpus(None if run is None else Vocabulary.load(run.vocabulary))
    elif command.base is not None and run is None:
        kvstore = command.config.devices.kvstore
        LOGGER.log(NOTICE, "%s is not seen from here, so whatever it has, --kvstore %s is used", command.base, kvstore)
    worker = [sys.executable, "-m", "gluon_lm.train", *flags]
    processes = parameter_server(hosts, options.workers, options.servers, worker)
    return Supervisor(processes, options.timeout, options.port).run()


def _train_command(words: Sequence[str], is_here: bool) -> tuple[list[str], TrainCommand, RunFolder | None]:
    """The flags of each worker, their meaning and the run that they continue, checked once before any is started.

    With a host file (not `is_here`), the run's folder is read only if it is visible from this machine.

    Raises
    ------
    ConfigError
        As `parse_train` and `resolve_run`, and for another way to train in several processes.
    """

    def understood(flags: Sequence[str]) -> tuple[TrainCommand, RunFolder | None]:
        command = parse_train(flags)
        is_seen = is_here or (command.base is not None and strip_model_suffix(command.base).exists())
        return resolve_run(command)[:2] if is_seen else (command, None)

    flags = without_superfluous(words)
    given = train_parser().parse(flags).settings
    problems = []
    if "kvstore" in given and not (given["kvstore"].value or "").startswith("dist"):
        kvstore = show(given["kvstore"].value)
        problems.append(f"--kvstore {kvstore}: must be {' or '.join(_KVSTORES)} here, or left out")
    if "horovod" in given and given["horovod"].value:
        problems.append("--horovod: is for processes that horovodrun starts; leave it out, or use horovodrun")
    if problems:
        raise ConfigError(problems)
    if "kvstore" not in given:
        with contextlib.suppress(ConfigError):  # for example that a single device has nothing to sum
            command, run = understood(flags)
            if command.config.devices.kvstore in _KVSTORES:
                return flags, command, run
        flags += ["--kvstore", "dist_sync"]
    return flags, *understood(flags)


if __name__ == "__main__":
    sys.exit(main())
