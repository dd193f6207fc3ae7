"""``python -m gluon_lm``: lists the commands; ``python -m gluon_lm train ...`` runs one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from gluon_lm import __version__
from gluon_lm.cli import as_command
from gluon_lm.config import did_you_mean, show
from gluon_lm.errors import ConfigError

COMMANDS = {
    "train": "train a language model, or continue a run",
    "launch": "train on several machines, or in several processes",
    "finetune": "train a finished run further, with averaged weights",
    "evaluate": "loss, perplexity and bits per word of a run on a text",
    "dynamiceval": "the same, with a model that keeps learning from the text as it reads",
    "generate": "write text with a run",
    "score": "log-probability of each line of a file, and of each word",
    "runs": "list runs: state, model, steps, perplexity",
    "report": "runs as one page: curves, results, configurations, texts",
    "serve": "serve a model over HTTP: a form, a JSON API, a page",
    "export": "write a model that runs with MXNet alone, or as ONNX",
    "download": "fetch corpora",
    "doctor": "what MXNet finds on this machine, and what is wrong",
}


def _list_commands() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        [
            f"gluon_lm {__version__}: word-level language models in MXNet Gluon",
            "",
            "python -m gluon_lm COMMAND [flags], or gluon-lm COMMAND [flags]",
            "",
            *lines,
            "",
            "python -m gluon_lm COMMAND --help shows its flags.",
        ]
    )


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names, or list the commands."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(_list_commands())
        return 0
    if argv[0] == "--version":
        print(f"gluon_lm {__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        hint = did_you_mean(command, COMMANDS)
        raise ConfigError(f"{show(command)}: must be a command, one of {', '.join(COMMANDS)}{hint}")
    return int(import_module(f"gluon_lm.{command}").main(rest))


if __name__ == "__main__":
    sys.exit(main())
