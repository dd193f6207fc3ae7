"""``python -m gluon_lm.evaluate RUN``: perplexity of a run on a text, exact over every token."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandParser, Section, run_command
from .config import DataConfig, DeviceConfig, choice, integer, option
from .errors import ConfigError
from .logs import LOGGER, log_to_terminal
from .runtime import prepare_process

_DATA_FLAGS = ("data", "data_dir", "tokenizer")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(Section):
    """How the text is read."""

    split: str | None = option(
        None,
        choice("train", "valid", "test", "all"),
        "part of the corpus (default: test; all of it where --data is one file)",
    )
    eval_batch_size: int = option(1, integer(), "pieces that the text is cut into and that are read side by side")
    bptt: int | None = option(None, integer(), "words in a window; the result is the same for any")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(_evaluate, argv)


def _evaluate(argv: Sequence[str]) -> int:
    parser = CommandParser(
        "evaluate",
        "Loss, perplexity and bits per word of a run, exact over every token.",
        "python -m gluon_lm.evaluate runs/latest --split test",
    )
    parser.add_section(EvaluateOptions, "evaluation")
    parser.add_section(DataConfig, "data (default: the text of the run)", only=_DATA_FLAGS)
    parser.add_run()
    parsed = parser.parse(argv)
    options, device_config = parsed.build(EvaluateOptions), parsed.build(DeviceConfig)
    given = {name: parsed.settings[name].value for name in _DATA_FLAGS if name in parsed.settings}
    is_file = len(given.get("data", ())) == 1 and Path(given["data"][0]).expanduser().is_file()
    split = options.split or ("all" if is_file else "test")
    if split == "all" and not is_file:
        raise ConfigError("--split all: goes with one file, as in --data FILE; name train, valid or test")
    log_to_terminal()
    prepare_process()
    from .data import load_corpus
    from .distributed import resolve_single_device
    from .evaluation.static import evaluate
    from .training.checkpoint import load_model

    device = resolve_single_device(device_config)
    model, vocabulary, config, checkpoint = load_model(parsed.arguments.run, device)
    corpus = load_corpus(dataclasses.replace(config.data, **given), vocabulary=vocabulary, splits=(split,))
    result = evaluate(
        model,
        corpus.ids[split],
        vocabulary.eos_id,
        device,
        options.eval_batch_size,
        options.bptt,
        progress=split,
    )
    LOGGER.info("%s | %s", checkpoint, corpus.describe())
    if options.eval_batch_size == 1:
        LOGGER.info(
            "one stream, state carried; all %s tokens count, the first one predicted from <eos>",
            f"{result.num_tokens:,}",
        )
    else:
        LOGGER.info(
            "%d streams, each begun from <eos> and the zero state, so that %d contexts are cut; all %s tokens count",
            options.eval_batch_size,
            options.eval_batch_size - 1,
            f"{result.num_tokens:,}",
        )
    LOGGER.info(
        "%s loss %.5f | perplexity %.3f | bits per word %.4f | tokens %d",
        split,
        result.loss,
        result.perplexity,
        result.bits_per_word,
        result.num_tokens,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
