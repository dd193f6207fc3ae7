"""``python -m gluon_lm.generate RUN``: write text with a trained model."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from .cli import CommandParser, Section, run_command
from .config import DeviceConfig, integer, option, optional, real, text
from .errors import ConfigError
from .files import atomic_write
from .logs import LOGGER, log_to_terminal
from .runtime import prepare_process

WORDS_PER_LINE = 20


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Section):
    """What to write."""

    words: int = option(1000, integer(), "number of words")
    temperature: float = option(1.0, real(0, above=True), "below 1 keeps to likely words, above 1 is more daring")
    seed: int = option(1111, integer(0, 2**31 - 1), "decides the text")
    outf: str | None = option(None, optional(text("FILE")), "file to write (default: the terminal)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_generate, argv)


def _generate(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "generate",
        "Write text with a trained model, 20 words a line.",
        "python -m gluon_lm.generate runs/latest --words 100 --temperature 0.8",
    )
    parser.add_section(GenerateOptions, "text")
    parser.add_run()
    parsed = parser.parse(argv)
    options, device_config = parsed.build(GenerateOptions), parsed.build(DeviceConfig)
    out = Path(options.outf) if options.outf else None
    if out is not None and (out.is_dir() or not out.absolute().parent.is_dir()):
        raise ConfigError(f"--outf {out}: must be a file in a folder that exists; name another")
    log_to_terminal()
    prepare_process()
    from .distributed import resolve_single_device
    from .generation.generator import generate
    from .training.checkpoint import load_model

    device = resolve_single_device(device_config)
    model, vocabulary, _, _ = load_model(parsed.arguments.run, device)
    lines = _lines(
        generate(
            model,
            vocabulary,
            options.words,
            temperature=options.temperature,
            seed=options.seed,
            device=device,
        )
    )
    if out is None:
        for line in lines:
            print(line, flush=True)
        return 0
    with atomic_write(out) as file:
        file.writelines(f"{line}\n".encode() for line in lines)
    LOGGER.info("%d words in %s", options.words, out)
    return 0


def _lines(words: Iterable[str]) -> Iterator[str]:
    words = iter(words)
    while line := list(itertools.islice(words, WORDS_PER_LINE)):
        yield " ".join(line)


if __name__ == "__main__":
    sys.exit(main())
