"""Which machines a cluster has, and which process runs where."""

from __future__ import annotations

import ipaddress
import itertools
import os
import re
import shlex
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..config import show
from ..errors import ConfigError, DistributedError
from .control import WORKER_VARIABLE

_HOST_LINE = re.compile(r"((?:[\w.-]+@)?[A-Za-z0-9][\w.-]*)(?:(?:\s+slots\s*=|\s*:)\s*(\d+))?")
_HERE = ("localhost", "127.0.0.1")
# The variables of this process's environment that those on other machines get.
_HANDED_ON = ("DMLC_", "GLUON_LM_", "GOMP_", "KMP_", "MXNET_", "OMP_", "PS_", "PYTHON")
_SSH = "ssh -T -o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3".split()


@dataclass(frozen=True)
class Host:
    """A machine.

    Attributes
    ----------
    name : str
        As ssh takes it: ``host`` or ``user@host``.
    address : str
        IPv4 address at which the others reach it.
    slots : int
        Workers that it gets in each round.
    """

    name: str = "localhost"
    address: str = "127.0.0.1"
    slots: int = 1

    @property
    def is_here(self) -> bool:
        """Whether it is this machine."""
        return self.name in (*_HERE, socket.gethostname())

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` there, in this folder and with this PYTHONPATH."""
        if self.is_here:
            return list(words)
        path = os.environ.get("PYTHONPATH")
        settings = [] if path is None else ["env", f"PYTHONPATH={path}"]
        return [*_SSH, self.name, f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([*settings, *words])}"]


@dataclass(frozen=True)
class Process:
    """A process of a cluster: its role (``worker``, ``server`` or ``scheduler``), number, machine and command."""

    role: str
    index: int
    argv: Sequence[str]
    host: Host = Host()
    env: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What it is called in messages: ``worker 1``."""
        return self.role if self.role == "scheduler" else f"{self.role} {self.index}"


def read_hosts(path: Path) -> list[Host]:
    """Read a host file: a line for each machine, ``host``, ``host slots=N`` or ``host:N``; ``#`` begins a comment.

    Raises
    ------
    ConfigError
        For a file that is not there or names no host, and for every line that is wrong.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read ({getattr(error, 'strerror', error)})") from None
    problems: list[str] = []
    slots_by_name: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].strip()
        if not words:
            continue
        match = _HOST_LINE.fullmatch(words)
        name, slots = match.groups("1") if match else ("", "0")
        if int(slots) < 1:
            problems.append(f"{path}, line {number}: {show(words)}: must be host, host slots=N or host:N, N 1 or more")
        elif name in slots_by_name:
            problems.append(f"{path}, line {number}: {name} is listed already; name it once, with slots=N")
        else:
            slots_by_name[name] = int(slots)
    if not problems and not slots_by_name:
        problems = [f"--hostfile {path}: names no host; write one per line, or leave it out"]
    if problems:
        raise ConfigError(problems)
    return _resolved(slots_by_name)


def _resolved(slots_by_name: Mapping[str, int]) -> list[Host]:
    hosts, problems = [], []
    for name, slots in slots_by_name.items():
        try:
            found = socket.getaddrinfo(name.rpartition("@")[2], None, socket.AF_INET, socket.SOCK_STREAM)
        except OSError as error:
            problems.append(f"host {name}: has no address ({error.strerror}); correct it, or name its IPv4 address")
        else:
            hosts.append(Host(name, str(found[0][4][0]), slots))
    if problems:
        raise DistributedError("; ".join(problems))
    own = [host for host in hosts if ipaddress.ip_address(host.address).is_loopback]
    if own and len(own) < len(hosts):
        raise DistributedError(
            f"host {own[0].name}: on the other machines, {own[0].address} means those themselves; name it as they "
            "reach it"
        )
    return hosts


def parameter_server(
    hosts: Sequence[Host], num_workers: int, num_servers: int, worker_argv: Sequence[str]
) -> list[Process]:
    """The processes of a parameter-server cluster, the scheduler first.

    Workers are distributed over the hosts by their slots, round-robin, and servers one by one, because they carry the
    traffic.

    Parameters
    ----------
    hosts : sequence of Host
    num_workers, num_servers : int
    worker_argv : sequence of str
        The command line of each worker.
    """
    for_workers = itertools.cycle([host for host in hosts for _ in range(host.slots)])
    for_servers = itertools.cycle(hosts)
    # MXNet becomes a scheduler or a server when it is imported, and ends the program when it is done. It would unpickle
    # an optimiser, although we never send one, from anybody who reaches its port.
    service = [sys.executable, "-c", "import pickle; pickle.loads = None; import gluon_lm, mxnet"]
    places = [("scheduler", 0, service, hosts[0])]
    places += [("server", index, service, next(for_servers)) for index in range(num_servers)]
    places += [("worker", index, list(worker_argv), next(for_workers)) for index in range(num_workers)]
    shared = {
        "DMLC_PS_ROOT_URI": hosts[0].address,
        "DMLC_NUM_SERVER": str(num_servers),
        "DMLC_NUM_WORKER": str(num_workers),
        "PYTHONUNBUFFERED": "1",
    }
    handed_on = {name: value for name, value in os.environ.items() if name.startswith(_HANDED_ON)}
    return [
        Process(
            role,
            index,
            argv,
            host,
            {**handed_on, **shared, "DMLC_ROLE": role, "DMLC_NODE_HOST": host.address, WORKER_VARIABLE: str(index)},
        )
        for role, index, argv, host in places
    ]
