"""``python -m gluon_lm.generate RUN``: write text with a trained model."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO

from .cli import CommandParser, Section, as_command
from .config import DeviceConfig, integer, option, optional, pathname, pathnames, real, show, switch, text
from .errors import ConfigError
from .files import open_output, output_file
from .generation import HIGHEST_TEMPERATURE, LOWEST_TEMPERATURE, WORDS_PER_LINE, lines_of
from .logs import DETAIL, LOGGER, NOTICE, has_bars, is_terminal, log_to_terminal
from .progress import counted
from .runtime import prepare_process


@dataclasses.dataclass(frozen=True)
class GenerateOptions(Section):
    """What to write."""

    words: int = option(1000, integer(), "number of words")
    prompt: str | None = option(None, text("TEXT"), "words to continue (default: one drawn at random)")
    samples: int = option(1, integer(1, 4096), "texts to write side by side, each of --words words")
    temperature: float = option(
        1.0, real(0, HIGHEST_TEMPERATURE), "below 1 favours likely words, above 1 gives more variety; 0: as --greedy"
    )
    top_k: int | None = option(None, optional(integer()), "draw from the K likeliest words")
    top_p: float | None = option(
        None,
        optional(real(0, 1, above=True)),
        "draw from the smallest set of likeliest words whose total probability reaches this",
    )
    greedy: bool = option(False, switch(), "take the likeliest word each time")
    no_unk: bool = option(False, switch(), "never write <unk>")
    stop_at_eos: bool = option(False, switch(), "end a text after its first line")
    detokenize: bool = option(False, switch(), "write ordinary English text, line by line")
    seed: int = option(1111, integer(0, 2**31 - 1), "decides the text")
    outf: str | None = option(None, optional(pathname("FILE")), "file to write (default: the terminal)")
    data: tuple[str, ...] | None = option(
        None, optional(pathnames(1, 3, rule="a corpus", metavar="DATA")), "no effect: a run has its own vocabulary"
    )
    log_interval: int = option(100, integer(), "words between progress lines, with --outf")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "generate",
        f"Write text with a run or an exported model, {WORDS_PER_LINE} words a line.",
        "python -m gluon_lm.generate runs/latest --words 100 --temperature 0.8 --prompt 'the war'",
        instead={"--model": "a run knows its own model; leave it out"},
    )
    parser.add_section(GenerateOptions, "text")
    parser.add_run("--checkpoint", "--save", or_export=True)
    parser.add_device()
    parsed = parser.parse(argv)
    options, device_config = parsed.build(GenerateOptions), parsed.build(DeviceConfig)
    if options.greedy or options.temperature < LOWEST_TEMPERATURE:
        greedy = "--greedy" if options.greedy else f"--temperature {options.temperature:g}"
        drawing = ["top_k", "top_p", *(["temperature"] if options.greedy else [])]
        if options.prompt is not None:  # otherwise the first word is drawn
            drawing += ["seed", "samples"]
        problems = [
            f"{greedy} with --{flag.replace('_', '-')}: the likeliest word needs no choice; leave one of them out"
            for flag in drawing
            if flag in parsed.settings
        ]
        if problems:
            raise ConfigError(problems)
    out = None if options.outf is None else output_file("--outf", options.outf)
    log_to_terminal(parsed.verbosity, has_other_output=out is None)
    if options.data is not None:
        LOGGER.log(NOTICE, "--data %s: has no effect here, a run has its own vocabulary", " ".join(options.data))
    if out is None and "log_interval" in parsed.settings:
        LOGGER.log(NOTICE, "--log-interval %d: has no effect without --outf", options.log_interval)
    prepare_process(own_layers=True)
    from .data.tokenizers import words_of
    from .distributed.devices import resolve_single_device
    from .generation.generator import generate
    from .generation.sampling import Sampling
    from .trained import load_predictor

    predictor = load_predictor(parsed.run, resolve_single_device(device_config))
    LOGGER.info("loaded %s", predictor.path)
    prompt = None if options.prompt is None else words_of(options.prompt, predictor.tokenizer)
    unknown = predictor.vocabulary.unknown(prompt or [])
    if unknown:
        quoted = ", ".join(f'"{show(word)}"' for word in unknown)
        LOGGER.warning("--prompt: the model does not know %s, and reads <unk>", quoted)
    sampling = Sampling(
        0.0 if options.greedy else options.temperature, options.top_k, options.top_p, suppress_unk=options.no_unk
    )
    words = generate(
        predictor,
        options.words,
        sampling,
        prompt=prompt,
        num_samples=options.samples,
        seed=options.seed,
        stop_at_eos=options.stop_at_eos,
    )
    with open_output(out) as file:
        num_words = _write(_watched(words, options, out), prompt or [], options, file)
    if out is not None:
        LOGGER.info("%s words in %s", f"{num_words:,}", out)
    return 0


def _watched(
    words: Iterable[list[str | None]], options: GenerateOptions, out: Path | None
) -> Iterator[list[str | None]]:
    """The words, with progress: a bar, or lines in the format of the replaced systems."""
    is_shown = out is None and is_terminal(sys.stdout) and _comes_word_by_word(options)
    if out is None or has_bars():
        words = counted(words, options.words, None if is_shown else "generating", "word")
    for n, step in enumerate(words, 1):
        yield step
        if out is not None and n % options.log_interval == 0:
            LOGGER.log(DETAIL, "| Generated %d/%d words", n, options.words)


def _comes_word_by_word(options: GenerateOptions) -> bool:
    return options.samples == 1 and not options.detokenize


def _write(words: Iterable[list[str | None]], prompt: list[str], options: GenerateOptions, file: IO[str]) -> int:
    """Write the texts, each after the prompt, with an empty line between them; a single text word by word.

    Returns
    -------
    int
        Words that were generated, in all texts.
    """
    from .generation.detokenize import detokenize

    def put(line: str) -> None:
        file.write(f"{line}\n")
        file.flush()

    num_words = 0
    written: list[list[str]] = [list(prompt) for _ in range(options.samples)]

    def arriving() -> Iterator[list[str | None]]:
        nonlocal num_words
        for step in words:
            num_words += sum(word is not None for word in step)
            yield step

    if _comes_word_by_word(options):
        only = (word for (word,) in arriving() if word is not None)
        for line in lines_of(itertools.chain(prompt, only)):
            put(line)
        return num_words
    for step in arriving():
        for sample, word in zip(written, step):
            if word is not None:
                sample.append(word)
    for n, sample in enumerate(written):
        if n:
            put("")
        for line in [detokenize(sample).rstrip("\n")] if options.detokenize else lines_of(sample):
            put(line)
    return num_words


if __name__ == "__main__":
    sys.exit(main())
