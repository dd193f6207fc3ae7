"""``python -m gluon_lm.download NAME...``: fetch corpora, so that later commands need no network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandParser, as_command
from .config import DataConfig
from .data.corpora import CORPORA, SPLITS, find_spec, say_if_unused, unknown_corpus
from .errors import ConfigError
from .logs import LOGGER, log_to_terminal


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "download",
        "Fetch corpora and verify every file; files that are there already are not fetched again.",
        "python -m gluon_lm.download wikitext-2 ptb",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help=f"corpora: {', '.join(CORPORA)}")
    parser.add_section(DataConfig, "data", only=("data_dir",))
    parsed = parser.parse(argv)
    data_dir = parsed.build(DataConfig).data_dir
    specs = {name: find_spec(name) for name in parsed.arguments.names}
    problems = [unknown_corpus(name) for name, spec in specs.items() if spec is None]
    if problems:
        raise ConfigError(problems)
    log_to_terminal(parsed.verbosity)
    for spec in filter(None, specs.values()):
        say_if_unused(data_dir, (spec.name,))
        texts = spec.texts(spec.default_folder(Path(data_dir)), SPLITS)
        where = ", ".join(f"{split} {text.name}" for split, text in texts.items())
        LOGGER.info("%s (licence %s): %s", spec.name, spec.licence, where)
    return 0


if __name__ == "__main__":
    sys.exit(main())
