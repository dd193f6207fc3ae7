"""``python -m gluon_lm.serve RUN``: serve a model over HTTP, with a form, a JSON API and a page."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import math
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

from .cli import CommandParser, DebugOptions, Section, run_command
from .config import DeviceConfig, integer, option, optional, text
from .errors import ConfigError, MissingDependency
from .logs import LOGGER, RESULT, log_to_terminal
from .runtime import prepare_process
from .serving.limits import Limits

_IDLE_CONNECTIONS = 256


@dataclasses.dataclass(frozen=True)
class ServeOptions(Section):
    """Where it listens."""

    host: str = option("127.0.0.1", text("HOST"), "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8000, integer(0, 65535), "port to listen on; 0: any that is free")
    root_path: str | None = option(
        None, optional(text("PATH")), "prefix that a proxy leaves before paths; a form may be sent to any path below it"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_serve, argv)


def _serve(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "serve",
        "Serve a run or an exported model over HTTP until Ctrl-C or SIGTERM.",
        "python -m gluon_lm.serve runs/latest --port 8000",
    )
    parser.add_argument("run", metavar="RUN", help="run folder, checkpoint or exported folder")
    parser.add_section(ServeOptions, "address")
    parser.add_section(Limits, "limits")
    parser.add_device()
    parser.add_section(DebugOptions, "messages")
    parsed = parser.parse(argv)
    options, limits = parsed.build(ServeOptions), parsed.build(Limits)
    problems = []
    if options.root_path is not None and not options.root_path.startswith("/"):
        problems.append(f"--root-path {options.root_path}: must begin with /; write /{options.root_path}")
    if limits.max_texts > limits.capacity:
        problems.append(
            f"--max-texts {limits.max_texts}: is more than --slots and --max-waiting together "
            f"({limits.capacity}); lower it, or raise one of them"
        )
    if problems:
        raise ConfigError(problems)
    _require_packages()
    log_to_terminal(parsed.verbosity)
    # The address is taken first: loading a model takes longer than finding out that it is not free.
    with _bind(options.host, options.port) as listener:
        prepare_process(own_layers=True)
        from .distributed import resolve_single_device
        from .prediction import load_predictor
        from .serving.app import create_app

        predictor = load_predictor(parsed.arguments.run, resolve_single_device(parsed.build(DeviceConfig)))
        _run(create_app(predictor, limits, options.root_path), limits, listener)
    return 0


def _require_packages() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if find_spec("python_multipart") is None and find_spec("multipart") is None:
        missing.append("python-multipart")
    if missing:
        raise MissingDependency(f"serve needs {', '.join(missing)}: pip install 'gluon_lm[serve]'")


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(
            f"--host {host}: is not an address of this machine ({error.strerror}); name another"
        ) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        return listener
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot be listened on ({error.strerror}); name another port, or 0 for any"
        ) from error


def _run(app: Any, limits: Limits, listener: socket.socket) -> None:
    import uvicorn

    class Server(uvicorn.Server):
        """Says where it listens and, on the first signal, how much is left to do; ends well on any."""

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            host, port, *_ = listener.getsockname()
            LOGGER.log(RESULT, "serving at http://%s:%d/ (Ctrl-C stops)", f"[{host}]" if ":" in host else host, port)

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            self.install_signal_handlers()
            yield

        def install_signal_handlers(self) -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                asyncio.get_running_loop().add_signal_handler(number, self._stop, number)

        def _stop(self, number: signal.Signals) -> None:
            if self.should_exit:
                self.force_exit |= number == signal.SIGINT
                return
            LOGGER.info("%s: finishing %d text(s); Ctrl-C again stops at once", number.name, app.state.engine.num_live)
            self.should_exit = True

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.capacity + _IDLE_CONNECTIONS,
        timeout_graceful_shutdown=math.ceil(limits.timeout),
    )
    try:
        Server(config).run(sockets=[listener])
    finally:
        app.state.engine.close(0)  # where a second Ctrl-C left no time for the application to do so


if __name__ == "__main__":
    sys.exit(main())
