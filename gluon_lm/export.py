"""``python -m gluon_lm.export RUN --output DIR``: write a model that runs without this package."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from .cli import CommandParser, Section, as_command
from .config import choice, option, optional, pathname
from .errors import ConfigError
from .logs import log_to_terminal
from .runtime import prepare_process


@dataclasses.dataclass(frozen=True)
class ExportOptions(Section):
    """Where to, and as what."""

    output: str | None = option(
        None,
        optional(pathname("DIR")),
        "folder to write (required); an older export in it is replaced (default: none)",
    )
    format: str = option("symbol", choice("symbol", "onnx"), "MXNet symbol and parameters, or ONNX")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "export",
        "Write a run's model as files that MXNet, or an ONNX runtime, runs without this package.",
        "python -m gluon_lm.export runs/latest --output exported",
    )
    parser.add_section(ExportOptions, "export")
    parser.add_run()
    parsed = parser.parse(argv)
    options = parsed.build(ExportOptions)
    if options.output is None:
        raise ConfigError("--output: is required, the folder to write; add --output DIR")
    log_to_terminal(parsed.verbosity)
    prepare_process()
    if options.format == "onnx":
        from .exporting_onnx import export_onnx

        export_onnx(parsed.run, options.output)
    else:
        from .exporting import export_run

        export_run(parsed.run, options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
