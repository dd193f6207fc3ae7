"""Several machines on one: network namespaces of this kernel, joined by links whose rate is limited.

What runs in a namespace sees one interface, ``eth0``, and reaches the other hosts over it and nothing else. The files
and process numbers are those of the machine.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

_PREFIX = "gluon-lm-"
_BURST_S = 0.002  # what a link lets through at once
_QUEUE = "50ms"  # what waits before a link for longer is dropped

# Stands for ssh, for the programs that start others by it: runs the command in the namespace of that address.
_SSH = """#!/bin/sh
while :; do
    case "$1" in
        -[ipo]) shift 2 ;;
        -*) shift ;;
        *) [ -z "$host" ] || break; host=$1; shift ;;
    esac
done
exec ip netns exec "%s$host" sh -c "$*"
"""


class Traffic(NamedTuple):
    """Bytes that an interface has sent and received, with all headers."""

    sent: int
    received: int


class Network:
    """Hosts, each in a network namespace of its own, joined by a switch. Use it in a ``with`` block.

    Parameters
    ----------
    num_hosts : int
    rate_mbit : float, optional
        Of each host's link, in each direction; by default as fast as this machine is.

    Attributes
    ----------
    addresses : list of str
        IPv4 address of each host, which is its name, too.

    Raises
    ------
    OSError
        By ``with``, in one line: where this needs root or a program that is not here, or the kernel refuses.
    """

    def __init__(self, num_hosts: int, rate_mbit: float | None = None) -> None:
        self.addresses = [f"10.77.0.{number}" for number in range(1, num_hosts + 1)]
        self._rate_mbit = rate_mbit
        self.name = f"{_PREFIX}{os.getpid()}-"
        self._switch = f"{self.name}switch"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Network:
        missing = [program for program in ("ip", "tc") if shutil.which(program) is None]
        if os.geteuid() != 0 or missing:
            needed = f"{' and '.join(missing)} (apt-get install iproute2)" if missing else "root"
            raise OSError(f"network namespaces: need {needed}, which is not here")
        _remove_orphans()
        with contextlib.ExitStack() as stack:
            self._add_namespace(stack, self._switch)
            _run("ip", "-n", self._switch, "link", "add", "bridge", "type", "bridge")
            _run("ip", "-n", self._switch, "link", "set", "bridge", "up")
            for number, address in enumerate(self.addresses, 1):
                self._add_host(stack, f"port{number}", address)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gluon_lm-network-")))
            ssh = folder / "ssh"
            ssh.write_text(_SSH % self.name)
            ssh.chmod(ssh.stat().st_mode | stat.S_IXUSR)
            self._folder = folder
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def command(self, address: str, *words: str) -> list[str]:
        """The command line that runs `words` on a host."""
        return ["ip", "netns", "exec", self.name + address, *words]

    @property
    def environment(self) -> Mapping[str, str]:
        """This process's environment, in which ``ssh`` leads to the hosts without any server or key."""
        return {**os.environ, "PATH": f"{self._folder}:{os.environ['PATH']}"}

    def cut(self, address: str) -> None:
        """Pull a host's plug: from now on nothing reaches it and nothing comes from it."""
        port = f"port{self.addresses.index(address) + 1}"
        _run("ip", "-n", self._switch, "link", "set", port, "down")

    def _add_namespace(self, stack: contextlib.ExitStack, name: str) -> None:
        _run("ip", "netns", "add", name)
        stack.callback(_delete, name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _add_host(self, stack: contextlib.ExitStack, port: str, address: str) -> None:
        host, switch = self.name + address, self._switch
        self._add_namespace(stack, host)
        _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", host, "address", "add", f"{address}/24", "dev", "eth0")
        _run("ip", "-n", host, "link", "set", "eth0", "up")
        if self._rate_mbit is not None:
            burst = max(64 << 10, int(self._rate_mbit * 1e6 / 8 * _BURST_S))
            limit = ("root", "tbf", "rate", f"{self._rate_mbit:g}mbit", "burst", str(burst), "latency", _QUEUE)
            _run("tc", "-n", host, "qdisc", "add", "dev", "eth0", *limit)
            _run("tc", "-n", switch, "qdisc", "add", "dev", port, *limit)


def read_traffic(network_name: str, address: str) -> Traffic:
    """What a host of the network of that name has sent and received; from any process of this machine."""
    lines = _run("ip", "netns", "exec", network_name + address, "cat", "/proc/self/net/dev").splitlines()
    (numbers,) = (line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:"))
    return Traffic(sent=int(numbers[8]), received=int(numbers[0]))


def _remove_orphans() -> None:
    """Delete the namespaces of processes that were killed before they could."""
    for name in list(_names()):
        if not Path("/proc", name[len(_PREFIX) :].partition("-")[0]).exists():
            _delete(name)


def _delete(name: str) -> None:
    """Delete a namespace with its ends of all links, and kill what still runs in it."""
    for pid in _run("ip", "netns", "pids", name).split():
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    _run("ip", "netns", "delete", name)


def _names() -> Iterator[str]:
    for line in _run("ip", "netns", "list").splitlines():
        if line.startswith(_PREFIX):
            yield line.split()[0]


def _run(*command: str) -> str:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
    return done.stdout
