"""A server in a process of its own, and a plain client, for tests."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import Process, environment, wait_until

from gluon_lm.train import main as train

PATIENCE = 60  # seconds; nothing here takes that long unless it hangs


def train_tiny_run(folder: Path) -> Path:
    """A run of three steps on a few lines: its words are nearly drawn evenly."""
    text = folder / "text"
    text.mkdir()
    for split in ("train", "valid", "test"):
        (text / f"{split}.txt").write_text("the cat sees a tree .\na dog hears the river , and sleeps .\n" * 20)
    flags = f"--data {text} --save {folder / 'run'} --model lstm --emsize 8 --nhid 8 --batch-size 4 --bptt 5"
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setenv("GLUON_LM_CACHE", str(folder / "cache"))
        assert train([*flags.split(), "--max-steps", "3", "--epochs", "1"]) == 0
    return folder / "run"


class Server:
    """``python -m gluon_lm.serve`` on a free port, ended when the block is left.

    Attributes
    ----------
    url : str
        Without a slash at its end.
    lines : list of str
        What it has printed so far.
    """

    def __init__(self, run: Path, *flags: object) -> None:
        words = [sys.executable, "-u", "-m", "gluon_lm.serve", run, "--port", 0, *flags]
        self.process = Process(*words, env=environment(OMP_NUM_THREADS="1"))
        self.lines = self.process.lines

    def __enter__(self) -> Server:
        try:
            self.url = self.process.wait_for("serving at ").split()[2].rstrip("/")
            self.host, _, port = self.url.removeprefix("http://").rpartition(":")
            self.port = int(port)
            wait_until(lambda: self.ask("GET", "/readyz").status == 200)
        except BaseException:
            self.process.kill()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate(timeout=PATIENCE)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Tell it to stop and wait until it has; its exit code."""
        self.process.send_signal(number)
        self.process.communicate(timeout=PATIENCE)
        return self.process.returncode

    def ask(
        self, method: str, path: str, body: bytes | None = None, content_type: str | None = None, **headers: str
    ) -> Answer:
        """Send one request and read the answer whole."""
        with self.open(method, path, body, content_type, **headers) as answer:
            return Answer(answer.status, dict(answer.headers.items()), answer.read().decode())

    def ask_json(self, path: str, body: object) -> Answer:
        return self.ask("POST", path, json.dumps(body).encode(), "application/json")

    @contextlib.contextmanager
    def open(
        self, method: str, path: str, body: bytes | None = None, content_type: str | None = None, **headers: str
    ) -> Iterator[http.client.HTTPResponse]:
        """Send one request; the answer is to be read, and the client goes away when the block is left."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=PATIENCE)
        try:
            headers |= {} if content_type is None else {"Content-Type": content_type}
            connection.request(method, path, body, headers)
            yield connection.getresponse()
        finally:
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()

    @contextlib.contextmanager
    def stream(self, **body: object) -> Iterator[Iterator[tuple[str, dict]]]:
        """The events of a text, as they come."""
        asked = json.dumps({**body, "stream": True}).encode()
        with self.open("POST", "/v1/generate", asked, "application/json") as answer:
            assert answer.status == 200, answer.read()
            yield _events(answer)

    def figure(self, name: str) -> float:
        """One of the figures of /metrics."""
        lines = self.ask("GET", "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(f"{name} ")).split()[1])

    def num_answered(self, status: int) -> int:
        """Requests for text through JSON that are counted with this status."""
        start = f'gluon_lm_requests_total{{method="POST",route="/v1/generate",status="{status}"}} '
        lines = self.ask("GET", "/metrics").text.splitlines()
        return next((int(line.split()[1]) for line in lines if line.startswith(start)), 0)


class Answer:
    """Status, headers and text of an answer."""

    def __init__(self, status: int, headers: dict[str, str], text: str) -> None:
        self.status, self.text = status, text
        self.headers = {name.lower(): value for name, value in headers.items()}

    @property
    def json(self):
        return json.loads(self.text)


def _events(answer: http.client.HTTPResponse) -> Iterator[tuple[str, dict]]:
    kind = "word"
    for line in answer:
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name == "event":
            kind = value
        elif name == "data":
            yield kind, json.loads(value)
            kind = "word"
