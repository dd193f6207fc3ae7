"""``python -m gluon_lm.serve RUN``: serve a model over HTTP, with a form, a JSON API and a page."""

from __future__ import annotations

import dataclasses
import ipaddress
import socket
import sys
from collections.abc import Sequence
from importlib.util import find_spec

from .cli import CommandParser, Section, as_command
from .config import DeviceConfig, integer, option, optional, text
from .errors import ConfigError, MissingDependency, reason
from .logs import LOGGER, log_to_terminal, tolerate_closed_pipes
from .runtime import prepare_process
from .serving.limits import Limits


@dataclasses.dataclass(frozen=True)
class ServeOptions(Section):
    """Where it listens."""

    host: str = option("127.0.0.1", text("HOST"), "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8000, integer(0, 65535), "port to listen on; 0: any that is free")
    root_path: str | None = option(
        None,
        optional(text("PATH")),
        "path prefix under which a proxy forwards requests; a form may be sent to any path below it",
    )
    allowed_hosts: str | None = option(
        None,
        optional(text("NAME,NAME")),
        "host names that requests may be addressed to, besides localhost and IP addresses, and names or addresses "
        "under which browsers reach a proxy over plain HTTP (default: any, but on a loopback address none)",
    )


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "serve",
        "Serve a run or an exported model over HTTP until Ctrl-C or SIGTERM.",
        "python -m gluon_lm.serve runs/latest --port 8000",
    )
    parser.add_run(or_export=True)
    parser.add_section(ServeOptions, "address")
    parser.add_section(Limits, "limits")
    parser.add_device()
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
    tolerate_closed_pipes()
    # The address is taken first: loading a model takes longer than finding out that it is not free.
    with _bind(options.host, options.port) as listener:
        prepare_process(own_layers=True)
        from .distributed.devices import resolve_single_device
        from .serving.app import create_app
        from .serving.server import run_server
        from .trained import load_predictor

        predictor = load_predictor(parsed.run, resolve_single_device(parsed.build(DeviceConfig)))
        LOGGER.info("loaded %s", predictor.path)
        hosts = options.allowed_hosts
        if hosts is None and ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
            hosts = options.host
        allowed = None if hosts is None else [name.strip().lower() for name in hosts.split(",")]
        run_server(create_app(predictor, limits, options.root_path, allowed), limits, listener)
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
    except (OSError, UnicodeError) as error:
        why = error.strerror if isinstance(error, OSError) else reason(error)
        raise ConfigError(f"--host {host}: is not an address of this machine ({why}); name another") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()  # otherwise a second server could bind it while this one loads its model
        return listener
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"--host {host} --port {port}: cannot listen there ({error.strerror}); name another port, or 0 for any"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
