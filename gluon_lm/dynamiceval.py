"""``python -m gluon_lm.dynamiceval RUN``: perplexity of a run that learns from the text while it is evaluated on it."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

from .cli import CommandParser, Section, as_command
from .config import DeviceConfig, integer, option, optional, real, switch
from .errors import DataError
from .logs import LOGGER, RESULT, log_to_terminal
from .runtime import prepare_process

FOLDER = "dynamiceval"


@dataclasses.dataclass(frozen=True)
class DynamicOptions(Section):
    """How the model learns."""

    lamb: float = option(0.02, real(0), "pull back towards the trained parameters")
    epsilon: float = option(
        0.001, real(0, above=True), "added to the root of the squared gradients before dividing by it"
    )
    lr: float = option(0.002, real(0, above=True), "learning rate")
    ms: bool = option(False, switch(), "use the root mean square of the gradients, not the root of the sum")
    bptt: int = option(5, integer(), "words in a window, which are predicted first and then learnt from")
    batch_size: int = option(100, integer(), "streams of the training text, for the squared gradients")
    max_batches: int | None = option(
        None, optional(integer(), -1), "windows of the training text to take (default: all of it)"
    )
    val: bool = option(False, switch(), "evaluate the validation text, not the test text, to tune the values above")


@as_command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = CommandParser(
        "dynamiceval",
        "Perplexity of a run that keeps learning from the text, from each window after predicting it.",
        "python -m gluon_lm.dynamiceval runs/latest --lamb 0.075",
    )
    parser.add_section(DynamicOptions, "dynamic evaluation")
    parser.add_data()
    parser.add_run("--model", "--checkpoint", "--save")
    parser.add_device()
    parsed = parser.parse(argv)
    options, device_config = parsed.build(DynamicOptions), parsed.build(DeviceConfig)
    split = "valid" if options.val else "test"
    log_to_terminal(parsed.verbosity)
    prepare_process()
    from .data import load_corpus
    from .distributed.devices import resolve_single_device
    from .evaluation.dynamic import dynamic_evaluate, gradient_statistics
    from .trained import load_trained
    from .training.checkpoint import TRAINING_TEXT, training_and_text
    from .training.run_folder import find_run

    run, named_checkpoint = find_run(parsed.run)
    device = resolve_single_device(device_config)
    trained = load_trained(named_checkpoint or run.path, device)
    data = parsed.over(run.with_text_of(trained.config.data))
    try:
        corpus = load_corpus(data, vocabulary=trained.vocabulary, splits=("train", split))
    except DataError as error:
        raise DataError(
            f"{error}; dynamic evaluation needs the training text of the run as well as the {split} text: name a text "
            "that has both with --data"
        ) from error
    _, trained_on = training_and_text(trained.path, trained.state)
    if trained_on.get(TRAINING_TEXT) != corpus.hashes["train"]:
        raise DataError(
            f"--data {' '.join(data.data)}: its training text is not the one that {run.path} was trained on; "
            "name that one"
        )
    LOGGER.info("%s | %s", trained.path, corpus.describe())
    for doubt in corpus.doubts():
        LOGGER.warning("%s", doubt)
    eos = trained.vocabulary.eos_id
    statistics = gradient_statistics(
        trained.model,
        corpus.train,
        eos,
        device,
        bptt=options.bptt,
        batch_size=options.batch_size,
        max_batches=options.max_batches,
        folder=run.path / FOLDER,
        progress="squared gradients",
    )
    result = dynamic_evaluate(
        trained.model,
        corpus.ids[split],
        eos,
        device,
        statistics,
        lamb=options.lamb,
        epsilon=options.epsilon,
        lr=options.lr,
        bptt=options.bptt,
        of_mean=options.ms,
        progress=split,
    )
    LOGGER.log(RESULT, "%s %s", split, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
