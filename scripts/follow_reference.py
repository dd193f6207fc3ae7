"""The first steps of a published AWD-LSTM recipe, ours and gluonnlp's, from the same weights on the same windows.

    python scripts/follow_reference.py awd-ptb --data-dir data --steps 200
    python scripts/follow_reference.py awd-wikitext-2 --data-dir data --steps 200 --json losses.json
    python scripts/follow_reference.py awd-wikitext-2 --data-dir data --steps 200 --dropoute 0
    python scripts/follow_reference.py awd-ptb --data-dir data --steps 20 --no-dropout

Both draw their own dropout masks, so the losses agree but for that noise. Ours trains twice, under two seeds: how far
these two lie apart shows how large it is. Once hybridized, gluonnlp's embedding dropout also takes its words from the
tied output layer, as ours does not; --dropoute 0 compares without. With --no-dropout nothing is random: then the losses
are the same but for rounding. gluonnlp comes with `bash scripts/environment.sh peers`; its AWDRNN is trained by the
loop of its word_language_model.py. With --json, what was interrupted goes on with
the next model.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from benchmarks.peers import detached

from gluon_lm.config import Config, resolve
from gluon_lm.files import atomic_write
from gluon_lm.progress import progress_bar
from gluon_lm.runtime import prepare_training

INTERVAL = 20  # steps whose losses are averaged for a row of the table


def windows_of(config: Config, corpus, steps: int):
    """The first windows of the first epoch, and the factor of the learning rate that goes with each."""
    from gluon_lm.data.windows import TrainingWindows

    cut = TrainingWindows(
        corpus.train,
        config.training.batch_size,
        config.training.bptt,
        corpus.vocabulary.eos_id,
        config.training.seed,
        max_seq_len_delta=config.optim.max_seq_len_delta,
    )
    epoch = cut.epoch(0)
    windows = [epoch.window(i) for i in range(min(steps, len(epoch)))]
    return [(window, cut.relative_size(window)) for window in windows]


def new_model(config: Config, vocab_size: int, device):
    from gluon_lm.models import LanguageModel

    model = LanguageModel(config.model, vocab_size)
    model.initialize_parameters(config.training.seed, [device])
    return model


def train_ours(config: Config, vocab_size: int, windows, seed: int, what: str) -> list[float]:
    import mxnet as mx

    from gluon_lm.distributed.communicator import SingleDevice
    from gluon_lm.training.step import TrainingStep

    model = new_model(config, vocab_size, mx.cpu())
    model.hybridize_for_use()
    step = TrainingStep(model, SingleDevice([mx.cpu()]), config.optim)
    losses = []
    with progress_bar(total=len(windows), desc=what, unit="step") as bar:
        for number, (window, relative_size) in enumerate(windows):
            step.set_learning_rate(config.optim.lr * relative_size)
            result = step(window, seed, number)
            losses.append(result.loss_sum / result.num_targets)
            bar.update(1)
    return losses


def train_peer(config: Config, vocab_size: int, windows, what: str) -> list[float]:
    import gluonnlp as nlp
    import mxnet as mx

    settings, optim = config.model, config.optim
    mx.random.seed(config.training.seed)
    model = nlp.model.train.AWDRNN(
        settings.cell,
        vocab_size,
        settings.embed_size,
        settings.hidden_size,
        settings.num_layers,
        settings.tied,
        settings.dropout,
        settings.weight_drop,
        settings.dropout_hidden,
        settings.dropout_input,
        settings.dropout_embed,
    )
    model.initialize(mx.init.Xavier(), ctx=mx.cpu())
    begin_with_ours(model, new_model(config, vocab_size, mx.cpu()), config)
    model.hybridize(static_alloc=True)
    loss = mx.gluon.loss.SoftmaxCrossEntropyLoss()
    activation = nlp.loss.ActivationRegularizationLoss(optim.alpha)
    change = nlp.loss.TemporalActivationRegularizationLoss(optim.beta)
    trainer = mx.gluon.Trainer(
        model.collect_params(), "sgd", {"learning_rate": optim.lr, "momentum": 0, "wd": optim.weight_decay}
    )
    gradients = [p.grad(mx.cpu()) for p in model.collect_params().values() if p.grad_req != "null"]
    hidden = model.begin_state(batch_size=config.training.batch_size, func=mx.nd.zeros, ctx=mx.cpu())
    losses = []
    with progress_bar(total=len(windows), desc=what, unit="step") as bar:
        for window, relative_size in windows:
            trainer.set_learning_rate(optim.lr * relative_size)
            hidden = detached(hidden)
            targets_R = mx.nd.array(window.targets_TN.reshape(-1))
            with mx.autograd.record():
                output, hidden, raw, dropped = model(mx.nd.array(window.tokens_TN), hidden)
                losses_R = loss(output.reshape(-3, -1), targets_R)
                total = (losses_R + activation(*dropped[-1:]) + change(*raw[-1:])).mean()
            total.backward()
            mx.gluon.utils.clip_global_norm(gradients, optim.clip_norm)
            trainer.step(1)
            losses.append(float(losses_R.mean().asscalar()))
            bar.update(1)
    return losses


def begin_with_ours(peer, ours, config: Config) -> None:
    """Set the peer's weights to those that our model begins with."""
    import mxnet as mx

    ours = {name: parameter.data() for name, parameter in ours.named_parameters().items()}
    sizes = config.model.layer_sizes
    peer(mx.nd.zeros((1, 1)), peer.begin_state(batch_size=1, func=mx.nd.zeros, ctx=mx.cpu()))  # gives them their shapes
    parameters = {name: p for name, p in peer.collect_params().items() if p.grad_req != "null"}

    def take(ending: str, index: int, value) -> None:
        matching = [p for name, p in parameters.items() if name.endswith(ending)]
        if len(matching) <= index or matching[index].shape != value.shape:
            raise SystemExit(f"gluonnlp's {ending} {index} is not what this script expects: {list(parameters)}")
        matching[index].set_data(value)

    take("embedding0_weight", 0, ours["encoder.embedding.weight"])
    for layer in range(len(sizes)):
        for part in ("i2h_weight", "h2h_weight", "i2h_bias", "h2h_bias"):
            take(part, layer, ours[f"encoder.layers.{layer}.{part}"])
    take("embedding0_bias", 0, ours["head.decoder.bias"])  # of the tied output layer


def finished_losses(path: Path | None, training: dict, num_steps: int) -> dict[str, list[float]]:
    """What an earlier call wrote about as many steps of this training."""
    if path is not None and not path.parent.is_dir():
        raise SystemExit(f"--json {path}: there is no folder {path.parent}; make it first")
    if path is None or not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    losses = found.pop("losses")
    if found != training or any(len(values) != num_steps for values in losses.values()):
        rule = f"holds other losses ({json.dumps(found)}) than {num_steps} of {json.dumps(training)}"
        raise SystemExit(f"{path}: {rule}; name another file or remove it")
    return losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=("awd-ptb", "awd-wikitext-2"))
    parser.add_argument("--data", help="the text (default: the recipe's corpus)")
    parser.add_argument("--data-dir", default="data", help="where the corpora lie (default ./data)")
    dropouts = parser.add_mutually_exclusive_group()
    dropouts.add_argument("--dropoute", type=float, metavar="P", help="embedding dropout (default: the recipe's)")
    dropouts.add_argument("--no-dropout", action="store_true", help="every dropout off, that of the weights included")
    parser.add_argument("--steps", type=int, default=200, help="steps to compare (default 200)")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write every loss to FILE; what it has already is not trained again"
    )
    options = parser.parse_args()
    if find_spec("gluonnlp") is None:
        parser.error("gluonnlp is not installed here: bash scripts/environment.sh peers")
    config = resolve(recipe=options.recipe).config
    if options.no_dropout:
        config = replace(config, model=config.model.without_dropout())
    elif options.dropoute is not None:
        config = replace(config, model=replace(config.model, dropout_embed=options.dropoute))
    prepare_training(config)
    from gluon_lm.data import load_corpus

    data = config.data if options.data is None else replace(config.data, data=(options.data,))
    corpus = load_corpus(replace(data, data_dir=options.data_dir))
    windows, vocab_size = windows_of(config, corpus, options.steps), len(corpus.vocabulary)
    seed = config.training.seed
    trainings: dict[str, Callable[[str], list[float]]] = {
        "gluon_lm": lambda what: train_ours(config, vocab_size, windows, seed, what),
        "gluonnlp": lambda what: train_peer(config, vocab_size, windows, what),
    }
    if not options.no_dropout:
        trainings["gluon_lm, another seed"] = lambda what: train_ours(config, vocab_size, windows, seed + 1, what)
    training = {
        "recipe": options.recipe,
        "data": list(data.data),
        "dropout_embed": config.model.dropout_embed,
        "no_dropout": options.no_dropout,
    }
    losses = finished_losses(options.json, training, len(windows))
    for what, train in trainings.items():
        if what not in losses:
            losses[what] = train(what)
            if options.json is not None:
                with atomic_write(options.json) as file:
                    file.write(json.dumps({**training, "losses": losses}).encode() + b"\n")
    dropout = "no dropout" if options.no_dropout else f"embedding dropout {config.model.dropout_embed:g}"
    print(f"\n**{options.recipe}, {dropout}: mean loss, {len(windows)} steps**\n")
    print(f"| steps | {' | '.join(losses)} |\n| --- |{' ---: |' * len(losses)}")
    for start in range(0, len(windows), INTERVAL):
        means = [np.mean(values[start : start + INTERVAL]) for values in losses.values()]
        stop = min(start + INTERVAL, len(windows))
        print(f"| {start + 1} to {stop} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
