"""Training between machines: network namespaces of this one, and hosts that a real sshd answers for."""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from namespaces import Network
from processes import HAS_HOROVOD, NO_HOROVOD, ROOT, running, wait_until, with_horovod

SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
FLAGS = ("--data", "text", "--recipe", "lm", "--tied", "--emsize", 8, "--nhid", 8, "--batch-size", 4, "--bptt", 5)
FLAGS += ("--lr", 2, "--dropout", 0, "--cpus", 1)

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")]
with_sshd = pytest.mark.skipif(SSHD is None, reason="no sshd here: apt-get install openssh-server")


@pytest.fixture
def network():
    """Two hosts on a fast network."""
    with contextlib.ExitStack() as stack:
        try:
            network = stack.enter_context(Network(2))
        except OSError as error:
            pytest.skip(str(error))
        yield network


# ---------------------------------------------------------------- bytes on the wire


def start_benchmark(project, *exchanges):
    """Two steps of a model that is small, but large beside what processes tell each other."""
    command = [sys.executable, ROOT / "scripts/network_benchmark.py", "--rates", "unlimited", "--output", project.path]
    command += ["--vocabularies", 2000, "--hidden-size", 400, "--worker-batch-size", 2, "--bptt", 5, "--steps", 2]
    return project.start_process(*command, "--exchanges", *exchanges)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dist_sync", "horovod"])
def test_two_bits_are_a_fourteenth_of_the_bytes_that_a_worker_sends(project, network, backend):
    """By the kernel's counters: what is pushed to a server, or passed between two processes."""
    if backend == "horovod" and not HAS_HOROVOD:
        pytest.skip(NO_HOROVOD)
    benchmark = start_benchmark(project, f"{backend}:none", f"{backend}:2bit")
    printed, _ = benchmark.communicate(timeout=280)
    assert benchmark.returncode == 0, printed
    plain, compressed = json.loads((project.path / "network.json").read_text())["results"]
    worker, (sent, received) = next(iter(plain["step"]["traffic"].items()))
    sent_compressed, received_compressed = compressed["step"]["traffic"][worker]
    whole = 4 * plain["elements"]
    assert whole <= sent <= 1.1 * whole and whole <= received <= 1.1 * whole
    assert 14 * sent_compressed <= sent
    if backend == "horovod":
        assert 14 * received_compressed <= received
    else:  # MXNet compresses what is pushed and not what is pulled
        assert whole <= received_compressed <= 1.1 * whole
    assert f"| {backend} 2bit |" in printed


@pytest.mark.slow
def test_a_benchmark_that_is_interrupted_leaves_nothing(project, network):
    benchmark = start_benchmark(project, "dist_sync:none")
    prefix = f"gluon-lm-{benchmark.pid}-"
    asked = f"ip netns pids {prefix}{network.addresses[0]} 2>/dev/null"
    wait_until(lambda: subprocess.getoutput(asked), process=benchmark)
    benchmark.send_signal(signal.SIGINT)
    printed, _ = benchmark.communicate(timeout=60)
    assert benchmark.returncode == 130, printed
    assert prefix not in subprocess.getoutput("ip netns list")
    wait_until(lambda: not running(project.path))


# ---------------------------------------------------------------- over ssh


class Sshd:
    """An sshd with a host key, a port and a configuration of its own, and the ssh that finds its way to it.

    Parameters
    ----------
    project : Project
    hosts : sequence of str
        Addresses of the hosts that it answers for.
    network : Network, optional
        Where these hosts are; by default they are addresses of this machine.
    """

    def __init__(self, project, hosts, network=None):
        folder = project.path / "sshd"
        folder.mkdir()
        for name in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # where it locks itself in
        (folder / "sshd_config").write_text(
            f"Port {port}\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/user.pub\nPidFile none\nUsePAM no\n"
            "PasswordAuthentication no\nStrictModes no\nPermitRootLogin yes\n"
            + "".join(f"ListenAddress {host}\n" for host in hosts)
        )
        key = (folder / "host.pub").read_text()
        (folder / "known_hosts").write_text("".join(f"[{host}]:{port} {key}" for host in hosts))
        (folder / "ssh_config").write_text(
            f"Port {port}\nUser {getpass.getuser()}\nIdentityFile {folder}/user\nIdentitiesOnly yes\n"
            f"UserKnownHostsFile {folder}/known_hosts\nGlobalKnownHostsFile none\nStrictHostKeyChecking yes\n"
        )
        ssh = folder / "ssh"
        ssh.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {folder}/ssh_config "$@"\n')
        ssh.chmod(0o755)
        self.path = f"{folder}:{os.environ['PATH']}"
        command = [SSHD, "-D", "-e", "-f", str(folder / "sshd_config")]
        commands = [command] if network is None else [network.command(host, *command) for host in hosts]
        self._processes = [project.start_process(*command) for command in commands]
        for process in self._processes:
            process.wait_for("Server listening on", times=len(hosts) // len(commands))

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        for process in self._processes:
            process.terminate()
            process.wait(20)


def start_cluster(project, sshd, hosts, *flags, timeout_s=60, network=None):
    """Start a cluster of two workers on these hosts, from the first one where they are in a network."""
    (project.path / "hosts.txt").write_text("".join(f"{host}\n" for host in hosts))
    command = project.command("launch", "--hostfile", "hosts.txt", "--timeout", timeout_s, "--", *FLAGS, *flags)
    command = command if network is None else network.command(hosts[0], *command)
    return project.start_process(*command, PATH=sshd.path)


@with_sshd
def test_hosts_that_are_reached_by_ssh_train_as_one_process(project):
    flags = ("--max-steps", 6)
    project.run("train", *FLAGS, *flags, "--save", "alone")
    hosts = ("127.0.0.2", "127.0.0.3")
    with Sshd(project, hosts) as sshd:
        cluster = start_cluster(project, sshd, hosts, *flags, "--save", "together")
        output, _ = cluster.communicate(timeout=240)
    assert cluster.returncode == 0, output
    project.assert_agree("together", "alone")


def assert_goes_on_to_the_same_numbers(project, flags, *alone):
    """Resumed by one process, the run reaches what a run reaches that was never cut."""
    reached = int(os.readlink(project.path / "run/latest").rpartition("-")[2])
    goal = ("--epochs", 1000, "--max-steps", reached + 3)
    project.run("train", "--resume", "run", *alone, *goal)
    project.run("train", *FLAGS, *flags, *goal, "--save", "alone")
    project.assert_agree("run", "alone")


@pytest.mark.slow
@with_sshd
def test_a_machine_that_is_cut_off_in_mid_run_ends_all_on_both_sides_of_the_cut(project, network):
    flags = ("--checkpoint-every", 4, "--eval-every", 1000)
    hosts = network.addresses
    with Sshd(project, hosts, network) as sshd:
        cluster = start_cluster(
            project, sshd, hosts, *flags, "--epochs", 1000, "--save", "run", timeout_s=30, network=network
        )
        wait_until((project.path / "run/latest").exists, 120, cluster)
        network.cut(hosts[1])
        output, _ = cluster.communicate(timeout=100)
        assert cluster.returncode == 2, output
        assert re.match(rf"error: .*\bhost {re.escape(hosts[1])}\b", output.splitlines()[-1]), output
        wait_until(lambda: not running(project.path))  # on the far side, too, which is cut off
    assert_goes_on_to_the_same_numbers(project, flags, "--kvstore", "none")


@with_sshd
@with_horovod
def test_horovods_processes_end_on_both_sides_of_the_cut(project, network):
    flags = ("--checkpoint-every", 4, "--eval-every", 1000)
    hosts = network.addresses
    with Sshd(project, hosts, network) as sshd:
        horovodrun = [str(Path(sys.executable).with_name("horovodrun")), "--network-interfaces", "eth0", "-np", "2"]
        train = project.command("train", "--horovod", *FLAGS, *flags, "--epochs", 1000, "--save", "run")
        command = network.command(hosts[0], *horovodrun, "-H", f"{hosts[0]}:1,{hosts[1]}:1", *train)
        cluster = project.start_process(*command, PATH=sshd.path, HOROVOD_GLOO_TIMEOUT_SECONDS="10")
        wait_until((project.path / "run/latest").exists, 120, cluster)
        network.cut(hosts[1])
        output, _ = cluster.communicate(timeout=100)
        assert cluster.returncode != 0, output
        assert "worker 0 of 2: could not exchange data with the others" in output
        wait_until(lambda: not running(project.path))  # on the far side, too, which is cut off
    assert_goes_on_to_the_same_numbers(project, flags, "--no-horovod")
