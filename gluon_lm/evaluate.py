"""``python -m gluon_lm.evaluate RUN``: perplexity of a run on a text, exact over every token."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from .cli import CommandParser, Parsed, Section, as_command
from .config import DataConfig, DeviceConfig, choice, integer, option, real, show, switch
from .data.corpora import find_spec
from .errors import ConfigError
from .logs import LOGGER, RESULT, log_to_terminal
from .runtime import prepare_process

_CACHE_FLAGS = ("window", "theta", "cache_weight")


@dataclasses.dataclass(frozen=True)
class EvaluateOptions(Section):
    """How the text is read, and whether the model adapts to it."""

    split: str | None = option(
        None,
        choice("train", "valid", "test", "all"),
        "part of the corpus (default: test; all of it where --data is one file)",
    )
    eval_batch_size: int = option(1, integer(), "pieces into which the text is cut, to be read side by side")
    bptt: int | None = option(None, integer(), "words in a window; the result is the same for any")
    cache: bool = option(
        False, switch(), "mix in a neural cache: words seen in contexts like the current one gain probability"
    )
    window: int = option(2000, integer(), "positions that the cache looks back at")
    # A product of hidden vectors and a larger theta could overflow float32.
    theta: float = option(0.662, real(0, 1e6), "how strongly the cache prefers positions like the current one")
    cache_weight: float = option(
        0.1279, real(0, 1), "the cache's share of the probability", "lambda", "lambdas", "lambdasm"
    )


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "evaluate",
        "Loss, perplexity and bits per word of a run, exact over every token.",
        "python -m gluon_lm.evaluate runs/latest --split test",
        instead={
            "--model": "a run knows its own model; leave it out",
            "--model-name": "no trained models are included; name a run that was trained here",
            "--path-to-params-file": "parameters of another system cannot be read; name a run that was trained here",
        },
    )
    parser.add_section(EvaluateOptions, "evaluation")
    parser.add_data()
    parser.add_run("--checkpoint", "--save")
    parser.add_device()
    parsed = parser.parse(argv)
    options, device_config = parsed.build(EvaluateOptions), parsed.build(DeviceConfig)
    _check_cache(options, parsed)
    named = parsed.build(DataConfig).data if "data" in parsed.settings else ()
    is_file = len(named) == 1 and find_spec(named[0]) is None and Path(named[0]).is_file()
    split = options.split or ("all" if is_file else "test")
    if split == "all" and not is_file:
        raise ConfigError("--split all: goes with one file, as in --data FILE; name train, valid or test")
    log_to_terminal(parsed.verbosity)
    prepare_process()
    from .data import load_corpus
    from .distributed.devices import resolve_single_device
    from .evaluation.neural_cache import NeuralCache
    from .evaluation.static import evaluate
    from .losses import target_losses
    from .trained import load_trained
    from .training.run_folder import find_run

    run, named_checkpoint = find_run(parsed.run)
    device = resolve_single_device(device_config)
    trained = load_trained(named_checkpoint or run.path, device)
    data, of_run = parsed.over(run.with_text_of(trained.config.data)), "data" not in parsed.settings
    corpus = load_corpus(data, vocabulary=trained.vocabulary, splits=(split,), of_run=of_run)
    window_losses = target_losses
    if options.cache:
        window_losses = NeuralCache(options.window, options.theta, options.cache_weight).losses
    result = evaluate(
        trained.model,
        corpus.ids[split],
        trained.vocabulary.eos_id,
        device,
        options.eval_batch_size,
        options.bptt,
        progress=split,
        window_losses=window_losses,
    )
    LOGGER.info("%s | %s", trained.path, corpus.describe())
    for doubt in corpus.doubts():
        LOGGER.warning("%s", doubt)
    num_streams = min(options.eval_batch_size, result.num_tokens)
    if num_streams == 1:
        LOGGER.info(
            "one stream, state carried; all %s tokens count, the first one predicted from <eos>",
            f"{result.num_tokens:,}",
        )
    else:
        LOGGER.info(
            "%d streams, each begun from <eos> and the zero state, which cuts %d contexts; all %s tokens count",
            num_streams,
            num_streams - 1,
            f"{result.num_tokens:,}",
        )
    if options.cache:
        LOGGER.info(
            "neural cache mixed in: window %d, theta %g, lambda %g, over what came before in this text",
            options.window,
            options.theta,
            options.cache_weight,
        )
    LOGGER.log(RESULT, "%s %s", split, result)
    return 0


def _check_cache(options: EvaluateOptions, parsed: Parsed) -> None:
    problems = []
    if options.cache and options.eval_batch_size > 1:
        problems.append(
            f"--eval-batch-size {options.eval_batch_size} with --cache: the cache reads the text as one stream; "
            "leave one of them out"
        )
    if not options.cache:
        problems += [
            f"{setting.flag} {show(setting.value)}: has no effect without --cache; add it, or leave the flag out"
            for name, setting in parsed.settings.items()
            if name in _CACHE_FLAGS
        ]
    if problems:
        raise ConfigError(problems)


if __name__ == "__main__":
    sys.exit(main())
