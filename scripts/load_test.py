"""Measure a server: words a second for one client and for many, how evenly they are served, and memory over time.

    python scripts/load_test.py RUN --clients 32 --requests 320 --words 50 --soak 10000

It starts ``python -m gluon_lm.serve RUN`` on a free port of this machine, sends it a bounded number of requests, and
stops it. Of the soak's requests a tenth go before the first look at the memory, so that what is set up once is there.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.flags import positive

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 300
Request = tuple[str, dict[str, Any]]  # path and body


class Client:
    """One connection that is used again and again."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT)

    def post(self, path: str, asked: dict[str, Any]) -> bytes:
        self._connection.request("POST", path, json.dumps(asked), {"Content-Type": "application/json"})
        answer = self._connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{answer.status}: {body.decode()}")
        return body

    def close(self) -> None:
        self._connection.close()


def start_server(run: str, flags: list[str]) -> tuple[subprocess.Popen[str], int]:
    """The process and the port that it listens on."""
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "gluon_lm.serve", run, "--port", "0", *flags],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        text=True,
        stdout=subprocess.PIPE,
    )
    assert server.stdout is not None
    for line in server.stdout:
        if line.startswith("serving at "):
            threading.Thread(target=lambda: [None for _ in server.stdout or ()], daemon=True).start()
            return server, int(line.split()[2].rstrip("/").rpartition(":")[2])
    raise SystemExit(f"the server did not start (exit code {server.wait()})")


def run_clients(port: int, num_clients: int, requests: Iterable[Request]) -> tuple[float, list[float]]:
    """Send requests from many clients, each with one at a time; seconds for all of them, and for each."""
    queue, lock = iter(requests), threading.Lock()
    times: list[float] = []
    errors: list[Exception] = []

    def work() -> None:
        client = Client(port)
        try:
            while not errors:
                with lock:
                    request = next(queue, None)
                if request is None:
                    return
                began = time.perf_counter()
                client.post(*request)
                times.append(time.perf_counter() - began)
        except Exception as error:
            errors.append(error)
        finally:
            client.close()

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return time.perf_counter() - began, times


def texts(count: int, words: int) -> Iterator[Request]:
    for seed in range(count):
        yield "/v1/generate", {"words": words, "seed": seed}


def mixed(rng: random.Random) -> Iterator[Request]:
    """Requests of every kind, for ever."""
    word: Callable[[], str] = lambda: rng.choice(["the", "of", "and", "a", "in", "nowhere"])  # noqa: E731
    while True:
        prompt = " ".join(word() for _ in range(rng.randrange(1, 80)))
        asked = {"words": rng.randrange(1, 20), "prompt": prompt, "n": rng.randrange(1, 3)}
        yield "/v1/generate", {**asked, "temperature": rng.choice([0.0, 0.5, 1.0, 2.0])}
        yield "/v1/generate", {"words": rng.randrange(1, 20), "stream": True, "suppress_unk": True}
        yield "/v1/generate", {"words": 5, rng.choice(["top_k", "top_p"]): 1}
        yield "/v1/score", {"text": prompt}


def resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder or exported folder; flags that are not listed here go to the server")
    parser.add_argument("--clients", type=positive, default=32, help="clients at the same time")
    parser.add_argument("--requests", type=positive, default=320, help="requests of these clients together")
    parser.add_argument("--words", type=positive, default=50, help="words of each of them")
    parser.add_argument("--soak", type=int, default=0, help="requests of the soak")
    arguments, flags = parser.parse_known_args()
    server, port = start_server(arguments.run, flags)
    try:
        run_clients(port, 1, texts(2, 5))
        num_alone = max(5, arguments.requests // arguments.clients)
        rates = {}
        print(f"{'clients':>8} {'requests':>9} {'words/s':>9} {'median s':>9} {'slowest 1 % s':>14} {'ratio':>6}")
        for clients, requests in ((1, num_alone), (arguments.clients, arguments.requests)):
            seconds, times = run_clients(port, clients, texts(requests, arguments.words))
            rate = rates[clients] = requests * arguments.words / seconds
            median, slowest = statistics.median(times), sorted(times)[int(0.99 * len(times))]
            print(f"{clients:8d} {requests:9d} {rate:9.0f} {median:9.3f} {slowest:14.3f} {slowest / median:6.2f}")
        print(f"{arguments.clients} clients get {rates[arguments.clients] / rates[1]:.1f} times the words of one")
        if arguments.soak:
            requests = mixed(random.Random(1))
            first = arguments.soak // 10
            run_clients(port, arguments.clients, itertools.islice(requests, first))
            sizes = [resident_mib(server.pid)]
            for _ in range(3):
                run_clients(port, arguments.clients, itertools.islice(requests, (arguments.soak - first) // 3))
                sizes.append(resident_mib(server.pid))
            listed = ", ".join(f"{size:.0f}" for size in sizes)
            print(f"memory after 10 %, 40 %, 70 % and 100 % of {arguments.soak} mixed requests, MiB: {listed}")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(TIMEOUT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
