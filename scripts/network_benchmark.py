"""Time and traffic of training on several machines, over networks of different speed.

    sudo .venv/bin/python scripts/network_benchmark.py                                     # everything: about an hour
    sudo .venv/bin/python scripts/network_benchmark.py --rates 100 --vocabularies 10000    # minutes
    sudo .venv/bin/python scripts/network_benchmark.py --exchanges horovod:none horovod:2bit --steps 3 --output figures

The machines are network namespaces of this one, joined by links that are limited in both directions (root, Debian's
iproute2). Each worker is one of them, and so is each parameter server; the scheduler is with the first. They train an
LSTM 2x650 with tied weights on random words. All share the cores of this machine, so that computing takes longer than
on machines of their own; what the network takes is what it would take there. For how long a worker's processor works
is in brackets.

Measured for each exchange of gradients, as the mean over the steps:

- step: whole training steps, in which gradients travel as soon as they are there;
- step, one after the other: the same, but nothing travels before all is computed;
- exchange: sending, adding up and compression alone;
- compute: forwards and backwards alone;
- traffic: what the kernel has counted at each machine's interface in a whole step.

2-bit compression is measured with the thresholds of one step's gradients. It writes a table (Markdown), every number
(JSON) and a plot (PNG, with matplotlib).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.flags import positive
from benchmarks.harness import SEED, SIZES, note, zipf_ids
from benchmarks.machine import load_average, machine
from namespaces import Network, read_traffic

from gluon_lm.config import DeviceConfig, ModelConfig

ROOT = Path(__file__).resolve().parent.parent
UNLIMITED = 0.0
EXCHANGES = ("dist_sync:none", "dist_sync:2bit", "horovod:none", "horovod:fp16", "horovod:2bit")
OPTIM = SIZES["B"].optim
TIMEOUT_S = 600  # without progress
MEASURED = "measured: "  # begins the lines of a worker that are shown


@dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes
    ----------
    rate_mbit : float
        0: unlimited.
    exchange : str
        How gradients travel: back-end and compression.
    """

    rate_mbit: float
    vocab_size: int
    exchange: str
    workers: int
    servers: int
    hidden_size: int
    worker_batch_size: int
    bptt: int
    steps: int

    @property
    def devices(self) -> DeviceConfig:
        backend, _, compression = self.exchange.partition(":")
        if backend == "horovod":
            return DeviceConfig(cpus=1, horovod=True, gctype=compression)
        return DeviceConfig(cpus=1, kvstore=backend, gctype=compression)

    @property
    def model(self) -> ModelConfig:
        return dataclasses.replace(SIZES["B"].model, embed_size=self.hidden_size, hidden_size=self.hidden_size)

    @property
    def network(self) -> str:
        return f"{self.rate_mbit:g} Mbit/s" if self.rate_mbit else "unlimited"

    @property
    def label(self) -> str:
        return f"{self.network}, vocabulary {self.vocab_size:,}, {self.exchange.replace(':', ' ')}"


# ---------------------------------------------------------------- what a worker does


def work(case: Case, network_name: str, addresses: list[str], result: Path) -> None:
    """Train as a worker of the cluster; the first one writes what was measured."""
    from gluon_lm.runtime import prepare_process

    prepare_process(case.workers)
    import mxnet as mx

    from gluon_lm.data.windows import Streams
    from gluon_lm.distributed.devices import create_communicator
    from gluon_lm.heartbeat import beat
    from gluon_lm.models import LanguageModel
    from gluon_lm.training.step import TrainingStep

    communicator = create_communicator(case.devices)
    model = LanguageModel(case.model, case.vocab_size)
    model.initialize_parameters(SEED, communicator.devices)
    model.hybridize_for_use(by_layer=True)
    parameters = list(model.named_parameters().values())
    communicator.broadcast_parameters(parameters)
    step = TrainingStep(model, communicator, OPTIM)
    batch_size = case.workers * case.worker_batch_size
    ids = zipf_ids(batch_size * case.bptt * 8) % case.vocab_size
    streams = Streams(ids, batch_size, eos=0)
    windows = itertools.cycle(list(streams.windows(case.bptt)))
    steps_taken = itertools.count()
    reduce_gradients = communicator.reduce_gradients

    def take_step() -> None:
        done = next(steps_taken)
        beat(done)
        step(next(windows), SEED, done)

    def exchange() -> None:
        beat(next(steps_taken))
        reduce_gradients(parameters)
        mx.nd.waitall()

    def compute() -> None:
        step.rehearse(next(windows))

    def reduce_when_all_is_there(parameters: Any) -> None:
        mx.nd.waitall()
        reduce_gradients(parameters)

    def measure(what: str, act: Callable[[], None]) -> dict[str, Any]:
        communicator.allgather_object("ready")
        before = {address: read_traffic(network_name, address) for address in addresses if communicator.is_primary}
        communicator.allgather_object("set")
        started, computed = time.perf_counter(), time.process_time()
        for _ in range(case.steps):
            act()
        mx.nd.waitall()
        communicator.allgather_object("done")
        seconds = (time.perf_counter() - started) / case.steps
        cpu_seconds = (time.process_time() - computed) / case.steps
        if communicator.is_primary:
            print(f"{MEASURED}{what}: {seconds:.2f} s, of which its processor works {cpu_seconds:.2f} s", flush=True)
        traffic = {
            address: [(now - then) / case.steps for now, then in zip(read_traffic(network_name, address), numbers)]
            for address, numbers in before.items()
        }
        return {"seconds": seconds, "cpu_seconds": cpu_seconds, "traffic": traffic}

    step.rehearse(next(windows))
    if case.devices.gctype == "2bit":
        state = thresholds_of_one_step(parameters, communicator.num_devices)
        communicator.restore_compression(communicator.broadcast_object(state), residuals={})
    take_step()
    found = {"step": measure("step", take_step)}
    communicator.reduce_gradients = reduce_when_all_is_there
    found["step, one after the other"] = measure("step, one after the other", take_step)
    found["exchange"] = measure("exchange", exchange)
    found["compute"] = measure("compute", compute)
    if communicator.is_primary:
        elements = sum(parameter.data().size for parameter in parameters)
        result.write_text(json.dumps({"elements": elements, **found}))
    communicator.close()


def thresholds_of_one_step(parameters: list[Any], num_devices: int) -> dict[str, Any]:
    """The state of compression that has seen the present gradients as often as it takes to set its thresholds."""
    import numpy as np

    from gluon_lm.distributed.compression import CALIBRATION_STEPS, Compression

    compression = Compression(num_devices, threshold=0.5)
    for _ in range(CALIBRATION_STEPS):
        compression.next_factors(lambda: [[p.grad() for p in parameters]], lambda numbers: np.array([numbers]))
    return compression.state_dict()


def supervise(case: Case, addresses: list[str], worker: list[str]) -> int:
    """Run a parameter-server cluster: a worker on each of the first hosts, a server on each of the others."""
    from gluon_lm.distributed.cluster import Host, parameter_server
    from gluon_lm.distributed.supervisor import Supervisor

    hosts = [Host(address, address) for address in addresses]
    processes = parameter_server(hosts[: case.workers], case.workers, case.servers, worker)
    for i, process in enumerate(processes):
        if process.role == "server":
            host = hosts[case.workers + process.index]
            processes[i] = dataclasses.replace(process, host=host, env={**process.env, "DMLC_NODE_HOST": host.address})
    return Supervisor(processes, TIMEOUT_S).run()


# ---------------------------------------------------------------- one measurement


def measure_case(case: Case) -> dict[str, Any]:
    """Build the network, run the workers in it, and return what the first one found."""
    is_horovod = case.devices.horovod
    num_hosts = case.workers + (0 if is_horovod else case.servers)
    with contextlib.ExitStack() as stack:
        network = stack.enter_context(Network(num_hosts, case.rate_mbit or None))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gluon_lm-network-")))
        result = folder / "result.json"
        arguments = [json.dumps(asdict(case)), network.name, ",".join(network.addresses), str(result)]
        worker = [sys.executable, __file__, "work", *arguments]
        if is_horovod:
            hosts = ",".join(f"{address}:1" for address in network.addresses)
            horovodrun = [str(Path(sys.executable).with_name("horovodrun")), "--network-interfaces", "eth0"]
            start = network.command(network.addresses[0], *horovodrun, "-np", str(case.workers), "-H", hosts, *worker)
        else:
            start = [sys.executable, __file__, "supervise", *arguments]
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        threads = max(1, len(os.sched_getaffinity(0)) // case.workers)
        environment = {"OMP_NUM_THREADS": str(threads), **network.environment, "PYTHONPATH": path}
        lines: list[str] = []
        with running(start, environment) as process:
            for line in process.stdout:  # type: ignore[union-attr]
                lines.append(line.rstrip())
                if MEASURED in line:
                    note(f"    {line.rpartition(MEASURED)[2].strip()}")
        if process.returncode != 0 or not result.exists():
            raise SystemExit("\n".join([*lines[-100:], f"{case.label}: ended with exit code {process.returncode}"]))
        return json.loads(result.read_text())


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A process that ends with the block, and what it started with it."""
    process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


# ---------------------------------------------------------------- reporting


@dataclass(frozen=True)
class Measured:
    """A case and what was found, with the uncompressed exchange of the same back-end where that was measured, too."""

    case: Case
    found: dict[str, Any]
    plain: dict[str, Any] | None

    def seconds(self, what: str) -> float:
        return self.found[what]["seconds"]

    def row(self) -> list[str]:
        sent, received = next(iter(self.found["step"]["traffic"].values()))
        row = [self.case.network, f"{self.case.vocab_size:,}", self.case.exchange.replace(":", " ")]
        row += [f"{self.seconds(what):.2f} ({self.found[what]['cpu_seconds']:.2f})" for what in TIMES]
        row += [f"{sent / 1e6:.2f}", f"{received / 1e6:.2f}"]
        if self.plain is None or self.plain is self.found:
            return [*row, "", "", ""]
        plain_sent = next(iter(self.plain["step"]["traffic"].values()))[0]
        row += [f"{self.plain[what]['seconds'] / self.seconds(what):.1f}" for what in ("step", "exchange")]
        return [*row, f"1/{plain_sent / sent:.1f}"]


TIMES = ("step", "step, one after the other", "exchange", "compute")
HEADER = ["network", "vocabulary", "exchange", *(f"{what}, s" for what in TIMES), "a worker sends, MB", "receives, MB"]
HEADER += ["step faster than none by", "exchange faster by", "sends of none's"]


def title_of(case: Case) -> str:
    servers = f", {case.servers} {'server' if case.servers == 1 else 'servers'} where there are any"
    return (
        f"LSTM {case.model.num_layers}x{case.hidden_size} tied, {case.workers} workers{servers}, "
        f"{case.worker_batch_size} x {case.bptt} tokens a worker and step, means of {case.steps} steps; in brackets "
        "the seconds for which a worker's processor works"
    )


def plot(results: list[Measured], path: Path) -> None:
    """Seconds a step and of the exchange alone: a panel for each network and vocabulary."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    networks = list(dict.fromkeys(result.case.network for result in results))
    vocabularies = list(dict.fromkeys(result.case.vocab_size for result in results))
    shape = len(vocabularies), len(networks)
    figure, axes = pyplot.subplots(*shape, figsize=(1 + 4 * shape[1], 0.6 + 2.4 * shape[0]), squeeze=False)
    for (i, vocab_size), (j, network) in itertools.product(enumerate(vocabularies), enumerate(networks)):
        panel = [r for r in results if r.case.vocab_size == vocab_size and r.case.network == network]
        names = [result.case.exchange.replace(":", " ") for result in panel]
        axis = axes[i][j]
        axis.barh(names, [result.seconds("step") for result in panel], 0.8, color="tab:blue", label="step")
        axis.barh(names, [result.seconds("exchange") for result in panel], 0.4, color="tab:orange", label="exchange")
        axis.invert_yaxis()
        axis.set_title(f"{network}, vocabulary {vocab_size:,}", fontsize=10)
        axis.set_xlabel("seconds")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def table(title: str, header: list[str], rows: list[list[str]]) -> str:
    lines = (f"| {' | '.join(row)} |" for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows))
    return "\n".join([f"\n**{title}**\n", *lines])


def report(results: list[Measured], about: dict[str, Any], folder: Path) -> None:
    """Write what has been measured so far."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [{"case": asdict(result.case), **result.found} for result in results]
    (folder / "network.json").write_text(json.dumps({"machine": about, "results": numbers}, indent=2) + "\n")
    measured_on = f"{about['cpu']}, {about['cores']} cores; {load_average()} at the end"
    rows = table(title_of(results[0].case), HEADER, [result.row() for result in results])
    (folder / "network.md").write_text(f"{measured_on}\n{rows}\n", encoding="utf-8")
    if find_spec("matplotlib") is not None:
        plot(results, folder / "network.png")


def rate(text: str) -> float:
    if text == "unlimited":
        return UNLIMITED
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text}: must be a number above 0, in Mbit/s, or unlimited")
    return value


def be_part(role: str, case_json: str, network_name: str, addresses: str, result: str) -> int:
    """Be a worker, or the supervisor of some; `measure_case` gives the arguments."""
    case = Case(**json.loads(case_json))
    if role == "work":
        work(case, network_name, addresses.split(","), Path(result))
        return 0
    from gluon_lm.cli import run_command

    worker = [sys.executable, __file__, "work", case_json, network_name, addresses, result]
    return run_command(lambda _: supervise(case, addresses.split(","), worker), [])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["work"], ["supervise"]):
        return be_part(*argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--rates",
        type=rate,
        nargs="+",
        default=[100.0, 1000.0, UNLIMITED],
        metavar="MBIT",
        help="Mbit/s of each link, or unlimited (default 100 1000 unlimited)",
    )
    parser.add_argument(
        "--vocabularies",
        type=positive,
        nargs="+",
        default=[10_000, 33_278],
        metavar="WORDS",
        help="(default 10000 33278)",
    )
    parser.add_argument("--exchanges", nargs="+", choices=EXCHANGES, default=EXCHANGES, help="(default all)")
    parser.add_argument("--workers", type=positive, default=2, help="(default 2)")
    parser.add_argument("--servers", type=positive, default=1, help="(default 1)")
    parser.add_argument("--hidden-size", type=positive, default=650, help="(default 650)")
    parser.add_argument("--worker-batch-size", type=positive, default=8, help="of each worker (default 8)")
    parser.add_argument("--bptt", type=positive, default=35, help="tokens of a window (default 35)")
    parser.add_argument("--steps", type=positive, default=5, help="of each measurement (default 5)")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("network-benchmark"),
        metavar="FOLDER",
        help="for network.md, network.json and network.png (default ./network-benchmark)",
    )
    options = parser.parse_args(argv)
    if any(exchange.startswith("horovod") for exchange in options.exchanges) and find_spec("horovod") is None:
        note("Horovod is not installed here: run 'bash scripts/install_horovod.sh', or leave it out of --exchanges")
        return 2
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, lambda number, _: sys.exit(128 + number))

    about = machine()
    results: list[Measured] = []
    plain: dict[tuple[float, int, str], dict[str, Any]] = {}
    cases = [
        Case(
            rate_mbit,
            vocab_size,
            exchange,
            options.workers,
            options.servers,
            options.hidden_size,
            options.worker_batch_size,
            options.bptt,
            options.steps,
        )
        for rate_mbit, vocab_size, exchange in itertools.product(options.rates, options.vocabularies, options.exchanges)
    ]
    try:
        for number, case in enumerate(cases, 1):
            note(f"{number}/{len(cases)}  {case.label}")
            found = measure_case(case)
            backend, _, compression = case.exchange.partition(":")
            key = case.rate_mbit, case.vocab_size, backend
            if compression == "none":
                plain[key] = found
            results.append(Measured(case, found, plain.get(key)))
            report(results, about, options.output)
    except OSError as error:
        note(f"error: {error}")
        return 2
    print((options.output / "network.md").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
