"""Speed, memory and start-up of gluon_lm, beside a peer on the same machine in the same run.

    python scripts/benchmark.py training                      # the plain LSTMs, with start-up
    python scripts/benchmark.py training --sizes A --rounds 5 --json result.json
    python scripts/benchmark.py training --sizes C            # the AWD-LSTM; a step takes many seconds
    python scripts/benchmark.py mixture                       # 15 softmaxes, beside the plain way to mix them
    python scripts/benchmark.py amp                           # float32 beside bfloat16, where this CPU has it
    python scripts/benchmark.py memory                        # resident memory over 1,000 windows of random length
    python scripts/benchmark.py generation                    # many texts side by side, and one
    python scripts/benchmark.py vocabulary                    # the heads for 267,735 words, and what each learns
    python scripts/benchmark.py encoding                      # 100 million words of 250,000 kinds become ids
    python scripts/benchmark.py unrolled                      # what goes beyond the fused recurrent operator costs this
    python scripts/benchmark.py startup --corpus wikitext-2   # the corpus's files must be in --data-dir

Each measurement is a process of its own, so that memory and allocator settings are clean. The cases take
turns, round after round, so that a change of the machine's speed meets all of them; the tables give medians
and ranges over the rounds.

The peer is gluonnlp's StandardRNN or AWDRNN in the training loop of its word_language_model.py (`bash
scripts/environment.sh peers` installs it). The text is random, Zipf-distributed words of a WikiText-2-sized vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gluon_lm.config import Config, ModelConfig, OptimConfig, TrainingConfig, resolve

ROOT = Path(__file__).resolve().parent.parent
VOCAB_SIZE = 33_278
SEED = 1111
PROCESS_TIMEOUT_S = 1800
STEP_TIMEOUT_S = 60  # for each step of a measurement, start-up included

# The allocator part of `gluon_lm.runtime.prepare_process`, in the form that any program on glibc takes.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


@dataclass(frozen=True)
class Size:
    """A model, how it is trained, and how many steps before and while the clock runs give a steady figure."""

    model: ModelConfig
    optim: OptimConfig
    batch_size: int
    bptt: int
    warmup: int = 8
    steps: int = 40

    @property
    def description(self) -> str:
        model = self.model
        tied = " tied" if model.tied else ""
        return (
            f"{model.model.upper()} {model.num_layers}x{model.hidden_size}{tied}, "
            f"batch {self.batch_size}, bptt {self.bptt}"
        )


def lstm(hidden_size: int, dropout: float) -> ModelConfig:
    return ModelConfig(embed_size=hidden_size, hidden_size=hidden_size, tied=True, dropout=dropout)


def of_recipe(name: str, warmup: int, steps: int) -> Size:
    """A recipe's model, with the whole batch at once, in windows of one length."""
    config = resolve(recipe=name).config
    optim = replace(config.optim, max_seq_len_delta=None, small_batch_size=None)
    return Size(config.model, optim, config.training.batch_size, config.training.bptt, warmup, steps)


SIZES = {
    "A": Size(lstm(200, dropout=0.2), OptimConfig(lr=1.0), batch_size=32, bptt=35),
    "A70": Size(lstm(200, dropout=0.2), OptimConfig(lr=1.0), batch_size=20, bptt=70),
    "B": Size(lstm(650, dropout=0.5), OptimConfig(lr=1.0), batch_size=32, bptt=35),
    "C": of_recipe("awd-wikitext-2", warmup=1, steps=3),
    "D": of_recipe("mos-wikitext-2", warmup=1, steps=4),
}
# For `vocabulary`: the words of WikiText-103, a model whose speed is measured, and a small one that learns for a while.
LARGE_VOCAB_SIZE = 267_735
LARGE = {
    "large": Size(
        ModelConfig(embed_size=400, hidden_size=1024, num_layers=3, dropout=0.0),
        OptimConfig(lr=1.0),
        batch_size=32,
        bptt=96,
        warmup=1,
        steps=3,
    ),
    "small": Size(
        ModelConfig(embed_size=64, hidden_size=64, num_layers=1, dropout=0.0),
        OptimConfig(lr=20.0, clip_norm=0.25),
        batch_size=32,
        bptt=35,
        warmup=0,
        steps=150,
    ),
}
ENCODED_TYPES = 250_000
GENERATED_TEXTS = 64
EVALUATION_STREAMS = 10  # the batch size that the peer evaluates with
PLAIN_MIXTURE_STREAMS = 5  # that the mixture's authors work on at once, for the sake of memory
MAX_SEQ_LEN_DELTA = 20  # of the windows of random length, as in the recipe awd


# ---------------------------------------------------------------- measurements, each in a process of its own


def zipf_ids(count: int):
    """`count` word ids, the one of rank r drawn with a probability proportional to 1 / r: an int32 array."""
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, VOCAB_SIZE + 1))
    draws = np.random.RandomState(SEED).random_sample(count) * cumulative[-1]
    return np.searchsorted(cumulative, draws).clip(max=VOCAB_SIZE - 1).astype(np.int32)


def ours_model(size: Size, vocab_size: int = VOCAB_SIZE):
    """Our model and its communicator, made as `gluon_lm.train` makes them once the process is prepared."""
    from gluon_lm.config import DeviceConfig
    from gluon_lm.distributed import create_communicator
    from gluon_lm.models import LanguageModel

    communicator = create_communicator(DeviceConfig(cuda=False))
    model = LanguageModel(size.model, vocab_size)
    model.initialize_parameters(SEED, communicator.devices)
    model.hybridize_for_use()
    return model, communicator


def ours_step(size: Size, max_seq_len_delta: int | None = None, vocab_size: int = VOCAB_SIZE):
    """Our training step, made as `gluon_lm.train` makes it."""
    from gluon_lm.runtime import prepare_training

    training = TrainingConfig(batch_size=size.batch_size, bptt=size.bptt)
    optim = replace(size.optim, max_seq_len_delta=max_seq_len_delta)
    prepare_training(Config(model=size.model, optim=optim, training=training))
    model, communicator = ours_model(size, vocab_size)
    from gluon_lm.optim.optimizers import create_optimizer
    from gluon_lm.training.step import TrainingStep

    optim = size.optim
    communicator.broadcast_parameters(list(model.named_parameters().values()))
    return TrainingStep(model, create_optimizer(optim), communicator, optim.clip_norm, optim.alpha, optim.beta)


def train_ours(size: Size, warmup: int, steps: int, amp: str | None = None) -> dict[str, float]:
    step = ours_step(size)
    if amp is not None:
        step._model.train_in_half_precision(amp)
    from gluon_lm.data.windows import Streams

    streams = Streams(zipf_ids((warmup + steps) * size.batch_size * size.bptt), size.batch_size, eos=0)

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)

    return timed_steps(size, warmup, steps, take)


def train_ours_in_bfloat16(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return train_ours(size, warmup, steps, amp="bfloat16")


def train_plain_mixture(size: Size, warmup: int, steps: int) -> dict[str, float]:
    """The mixture as its authors' code has it: all experts of a part of the batch at once, in plain operators."""
    import mxnet as mx

    step = ours_step(size)
    from gluon_lm.data.windows import Streams

    model, trainer = step._model, step.trainer
    head, parameters = model.head, list(model.named_parameters().values())
    streams = Streams(zipf_ids((warmup + steps) * size.batch_size * size.bptt), size.batch_size, eos=0)
    starts = range(0, size.batch_size, PLAIN_MIXTURE_STREAMS)
    states = {start: model.begin_state(PLAIN_MIXTURE_STREAMS, mx.cpu()) for start in starts}

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            window = streams.window(i * size.bptt, size.bptt)
            for parameter in parameters:
                parameter.zero_grad()
            for first in states:
                part = window.columns(first, first + PLAIN_MIXTURE_STREAMS)
                with mx.autograd.record():
                    raw, *new = model.encoder(mx.nd.array(part.tokens_TN, dtype="int32"), *states[first])
                    hidden = model.output_dropout(raw)
                    latents = head.latent_dropout(head.latent(hidden)).reshape((-1, size.model.embed_size))
                    probs = mx.nd.softmax(head.decoder(latents)).reshape((-1, size.model.num_experts, VOCAB_SIZE))
                    priors = mx.nd.softmax(head.prior(hidden)).reshape((-1, size.model.num_experts, 1))
                    mixed = mx.nd.log(mx.nd.broadcast_mul(probs, priors).sum(axis=1) + 1e-8)
                    loss = -mx.nd.pick(mixed, mx.nd.array(part.targets_TN.reshape(-1))).sum()
                loss.backward()
                states[first] = [state.detach() for state in new]
            loss.asscalar()
            trainer.update(window.num_targets)

    return timed_steps(size, warmup, steps, take)


def memory_of_ours(size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Resident memory over steps on windows of random length, noted ten times; the longest is rehearsed first."""
    step = ours_step(size, MAX_SEQ_LEN_DELTA)
    from gluon_lm.data.windows import TrainingWindows

    ids = zipf_ids(100 * size.batch_size * size.bptt)
    windows = TrainingWindows(ids, size.batch_size, size.bptt, 0, SEED, max_seq_len_delta=MAX_SEQ_LEN_DELTA)
    trace: list[dict[str, float]] = []

    def look(done: int) -> None:
        trace.append({"steps": done, "memory_mb": memory_mb(), "peak_memory_mb": peak_memory_mb()})
        note(f"{done} steps: {trace[-1]['memory_mb']:,.1f} MB, peak {trace[-1]['peak_memory_mb']:,.1f} MB")

    step.rehearse(windows.longest())
    look(0)
    epochs = (windows.epoch(number) for number in itertools.count())
    text = (epoch.window(i) for epoch in epochs for i in range(len(epoch)))
    for done, window in enumerate(itertools.islice(text, steps), 1):
        step(window, SEED, done)
        if done % max(1, steps // 10) == 0:
            look(done)
    return {"trace": trace}


def evaluate_ours(size: Size, warmup: int, steps: int, num_streams: int = EVALUATION_STREAMS) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    model, communicator = ours_model(size)
    from gluon_lm.evaluation.static import evaluate

    ids = zipf_ids((warmup + steps) * EVALUATION_STREAMS * size.bptt)
    split = warmup * EVALUATION_STREAMS * size.bptt
    device = communicator.devices[0]
    evaluate(model, ids[:split], 0, device, num_streams)
    started = time.perf_counter()
    evaluate(model, ids[split:], 0, device, num_streams)
    return {"tokens_per_second": (len(ids) - split) / (time.perf_counter() - started)}


def evaluate_ours_exactly(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return evaluate_ours(size, warmup, steps, num_streams=1)


def generate_ours(size: Size, warmup: int, steps: int, num_samples: int = GENERATED_TEXTS) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process(own_layers=True)
    model, communicator = ours_model(size)
    from gluon_lm.data import Vocabulary
    from gluon_lm.generation.generator import generate
    from gluon_lm.prediction import ModelPredictor

    vocabulary = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))
    predictor = ModelPredictor(model, vocabulary, "whitespace", communicator.devices[0])
    words = generate(predictor, warmup + steps, num_samples=num_samples)
    for _ in range(warmup):
        next(words)
    started = time.perf_counter()
    for _ in words:
        pass
    return {"tokens_per_second": steps * num_samples / (time.perf_counter() - started)}


def generate_one_text(size: Size, warmup: int, steps: int) -> dict[str, float]:
    return generate_ours(size, warmup, steps, num_samples=1)


def chained_words(count: int):
    """Text of `LARGE_VOCAB_SIZE` words with something to learn in it: half of the words follow from the one before.

    The others are drawn like `zipf_ids`, and each word's successor is drawn so too, once. Ids are ranks by frequency.
    """
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, LARGE_VOCAB_SIZE + 1))
    rng = np.random.RandomState(SEED)

    def draw(number: int):
        return np.searchsorted(cumulative, rng.random_sample(number) * cumulative[-1]).clip(max=LARGE_VOCAB_SIZE - 1)

    ids, successors, follows = draw(count), draw(LARGE_VOCAB_SIZE), rng.random_sample(count) < 0.5
    for i in np.flatnonzero(follows[1:]) + 1:
        ids[i] = successors[ids[i - 1]]
    ranks = np.empty(LARGE_VOCAB_SIZE, np.int32)
    ranks[np.argsort(-np.bincount(ids, minlength=LARGE_VOCAB_SIZE), kind="stable")] = np.arange(LARGE_VOCAB_SIZE)
    return ranks[ids]


def train_on_large_vocabulary(size: Size, warmup: int, steps: int) -> dict[str, float]:
    """Speed of training, and the perplexity of held-out text on the whole vocabulary afterwards."""
    step = ours_step(size, vocab_size=LARGE_VOCAB_SIZE)
    import mxnet as mx

    from gluon_lm.data.windows import Streams
    from gluon_lm.evaluation.static import evaluate

    num_trained = (warmup + steps) * size.batch_size * size.bptt
    ids = chained_words(num_trained + max(1_000, num_trained // 10))
    streams = Streams(ids[:num_trained], size.batch_size, eos=0)

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)

    speed = timed_steps(size, warmup, steps, take)
    perplexity = evaluate(step._model, ids[num_trained:], 0, mx.cpu(), num_streams=10).perplexity
    return {**speed, "perplexity": perplexity, "trained_tokens": num_trained}


def peer_model(size: Size, train: bool):
    """The peer's model, initialised and compiled as its word_language_model.py does it."""
    import gluonnlp as nlp
    import mxnet as mx

    mx.random.seed(SEED)
    models, config = nlp.model.train if train else nlp.model, size.model
    shape = (config.cell, VOCAB_SIZE, config.embed_size, config.hidden_size, config.num_layers)
    if config.weight_drop:
        inner = (config.weight_drop, config.dropout_hidden, config.dropout_input, config.dropout_embed)
        model = models.AWDRNN(*shape, config.tied, config.dropout, *inner)
    else:
        model = models.StandardRNN(*shape, config.dropout, config.tied)
    model.initialize(mx.init.Xavier(), ctx=mx.cpu())
    if train:
        model.hybridize(static_alloc=True)
    return model


def peer_batches(size: Size, batch_size: int, windows: int):
    """Word ids as the peer's batchify gives them: an NDArray of shape (rows, batch_size)."""
    import mxnet as mx

    rows = windows * size.bptt + 1
    return mx.nd.array(zipf_ids(rows * batch_size).reshape(batch_size, rows).T)


def detached(states):
    """The peer's recurrent state, arrays in lists in lists, cut from what it was computed from."""
    return [detached(state) for state in states] if isinstance(states, (list, tuple)) else states.detach()


def train_peer(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import gluonnlp as nlp
    import mxnet as mx
    from mxnet import autograd, gluon

    model, optim = peer_model(size, train=True), size.optim
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    activation = nlp.loss.ActivationRegularizationLoss(optim.alpha)
    change = nlp.loss.TemporalActivationRegularizationLoss(optim.beta)
    settings = {"learning_rate": optim.lr, "momentum": 0, "wd": optim.weight_decay}
    trainer = gluon.Trainer(model.collect_params(), "sgd", settings)
    parameters = model.collect_params().values()
    ids = peer_batches(size, size.batch_size, warmup + steps)
    hidden = model.begin_state(batch_size=size.batch_size, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            tokens, targets = ids[i : i + size.bptt], ids[i + 1 : i + 1 + size.bptt]
            hidden = detached(hidden)
            with autograd.record():
                output, hidden, raw, dropped = model(tokens, hidden)
                losses = loss(output.reshape(-3, -1), targets.reshape(-1))
                if optim.alpha:
                    losses = losses + activation(*dropped)
                if optim.beta:
                    losses = losses + change(*raw)
                mean_loss = losses / tokens.size
            mean_loss.backward()
            gluon.utils.clip_global_norm([parameter.grad(mx.cpu()) for parameter in parameters], optim.clip_norm)
            trainer.step(1)
            mx.nd.sum(mean_loss).asscalar()

    return timed_steps(size, warmup, steps, take)


def evaluate_peer(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import mxnet as mx
    from mxnet import gluon

    model = peer_model(size, train=False)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    ids = peer_batches(size, EVALUATION_STREAMS, warmup + steps)
    hidden = model.begin_state(batch_size=EVALUATION_STREAMS, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            output, hidden = model(ids[i : i + size.bptt], hidden)
            hidden = detached(hidden)
            losses = loss(output.reshape(-3, -1), ids[i + 1 : i + 1 + size.bptt].reshape(-1))
            mx.nd.sum(losses).asscalar()

    take(0, warmup)
    started = time.perf_counter()
    take(warmup, warmup + steps)
    return {"tokens_per_second": steps * EVALUATION_STREAMS * size.bptt / (time.perf_counter() - started)}


def train_peer_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return train_peer(size, warmup, steps)


def evaluate_peer_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return evaluate_peer(size, warmup, steps)


def timed_steps(size: Size, warmup: int, steps: int, take: Callable[[int, int], None]) -> dict[str, float]:
    """Take `warmup` steps, then `steps` with the clock running."""
    import mxnet as mx

    take(0, warmup)
    mx.nd.waitall()
    started = time.perf_counter()
    take(warmup, warmup + steps)
    mx.nd.waitall()
    return {"tokens_per_second": steps * size.batch_size * size.bptt / (time.perf_counter() - started)}


MEASUREMENTS = {
    function.__name__: function
    for function in (
        train_ours,
        train_ours_in_bfloat16,
        train_peer,
        train_peer_set_alike,
        train_plain_mixture,
        train_on_large_vocabulary,
        memory_of_ours,
        evaluate_ours,
        evaluate_ours_exactly,
        generate_ours,
        generate_one_text,
        evaluate_peer,
        evaluate_peer_set_alike,
    )
}


def measure(name: str, size: Size, warmup: int, steps: int) -> dict[str, Any]:
    """Run one measurement in this process; with it, the peak of the process's resident memory."""
    return {**MEASUREMENTS[name](size, warmup, steps), "peak_memory_mb": peak_memory_mb()}


def peak_memory_mb() -> float:
    return _status_mb("VmHWM")


def memory_mb() -> float:
    """Resident memory of this process now."""
    return _status_mb("VmRSS")


def _status_mb(name: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


# ---------------------------------------------------------------- cases and rounds


@dataclass
class Case:
    """A measurement under an environment, with changes to the size's model, and what it gave."""

    label: str
    measurement: str
    environment: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_peer(self) -> bool:
        return "_peer" in self.measurement

    def values(self, metric: str) -> list[float]:
        return [result[metric] for result in self.results]

    def median(self, metric: str) -> float:
        return statistics.median(self.values(metric))


def peer_cases(measurement: str) -> list[Case]:
    """The peer as published, with our allocator setting, and with all that our commands set."""
    return [
        Case("gluonnlp, as published", measurement),
        Case("gluonnlp, our allocator setting", measurement, ALLOCATOR),
        Case("gluonnlp, our allocator and thread settings", f"{measurement}_set_alike"),
    ]


def training_cases() -> list[Case]:
    return [Case("gluon_lm", "train_ours"), *peer_cases("train_peer")]


def evaluation_cases() -> list[Case]:
    return [
        Case(f"gluon_lm, {EVALUATION_STREAMS} streams", "evaluate_ours"),
        Case("gluon_lm, one stream (exact)", "evaluate_ours_exactly"),
        *peer_cases("evaluate_peer"),
    ]


def generation_cases() -> list[Case]:
    return [Case(f"{GENERATED_TEXTS} texts side by side", "generate_ours"), Case("one text", "generate_one_text")]


def mixture_cases() -> list[Case]:
    return [Case("gluon_lm", "train_ours"), Case("all experts at once, in plain operators", "train_plain_mixture")]


def amp_cases() -> list[Case]:
    return [Case("bfloat16", "train_ours_in_bfloat16"), Case("float32", "train_ours")]


def unrolled_cases() -> list[Case]:
    return [
        Case("fused", "train_ours"),
        Case("unrolled, dropout_candidate 0.3", "train_ours", model={"dropout_candidate": 0.3}),
        Case("unrolled, layer_norm", "train_ours", model={"layer_norm": True}),
    ]


def child_environment(extra: dict[str, str]) -> dict[str, str]:
    """This process's environment with our source tree first, and no allocator setting but `extra`."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**inherited, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore", **extra}


def run_case(case: Case, size: str, warmup: int, steps: int) -> None:
    """Measure `case` once more, in a new process."""
    arguments = [case.measurement, size, str(warmup), str(steps), json.dumps(case.model)]
    done = subprocess.run(
        [sys.executable, __file__, "measure", *arguments],
        env=child_environment(case.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=STEP_TIMEOUT_S * (warmup + steps),
        check=False,
    )
    if done.returncode != 0:
        raise SystemExit(f"{case.label}: {case.measurement} ended with {done.returncode}, see above")
    case.results.append(json.loads(done.stdout.splitlines()[-1]))


def run_rounds(
    kind: str, cases: list[Case], options: argparse.Namespace, size: str, windows_a_step: int = 1
) -> dict[str, Any]:
    """Measure all cases in turn, `options.rounds` times, and print their table."""
    cases = [case for case in cases if options.peers or not case.is_peer]
    title = f"{kind}, {size}: {SIZES[size].description}"
    warmup = options.warmup or SIZES[size].warmup
    steps = windows_a_step * (options.steps or SIZES[size].steps)
    for n in range(options.rounds):
        for case in cases:
            run_case(case, size, warmup, steps)
            note(
                f"{title} {n + 1}/{options.rounds}  {case.label}: {case.results[-1]['tokens_per_second']:,.0f} tokens/s"
            )
    ours = cases[0].median("tokens_per_second")
    rows = [
        [
            case.label,
            spread(case.values("tokens_per_second")),
            spread(case.values("peak_memory_mb")),
            f"{ours / case.median('tokens_per_second'):.2f}",
        ]
        for case in cases
    ]
    print_table(title, ["", "tokens/s (range)", "peak memory, MB (range)", f"{cases[0].label} is faster by"], rows)
    return {"title": title, "warmup": warmup, "steps": steps, "cases": [asdict(case) for case in cases]}


# ---------------------------------------------------------------- start-up


def synthetic_text(folder: Path) -> Path:
    """A corpus as large as WikiText-2 in words and vocabulary: train.txt, valid.txt and test.txt."""
    folder.mkdir()
    for name, count in (("train", 2_051_910), ("valid", 213_886), ("test", 241_211)):
        words = [f"w{i}" for i in zipf_ids(count)]
        if name == "train":
            words += [f"w{i}" for i in range(VOCAB_SIZE)]
        lines = (" ".join(words[i : i + 56]) for i in range(0, len(words), 56))
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def seconds_to_import(module: str) -> float:
    started = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", f"import {module}"],
        env=child_environment({}),
        check=True,
        stdin=subprocess.DEVNULL,
        timeout=PROCESS_TIMEOUT_S,
    )
    return time.perf_counter() - started


def seconds_to_first_step(corpus: str, data_dir: Path, work: Path) -> float:
    """From the start of the training command to the end of its first step, as its metrics.jsonl has it."""
    run = work / "run"
    command = [
        sys.executable,
        "-m",
        "gluon_lm.train",
        "--data",
        corpus,
        "--data-dir",
        str(data_dir),
        "--save",
        str(run),
        "--overwrite",
        "--recipe",
        "lm",
        "--tied",
        "--cpus",
        "1",
    ]
    (run / "metrics.jsonl").unlink(missing_ok=True)
    log = work / "log.txt"
    with open(log, "w", encoding="utf-8") as output:
        started = time.time()
        process = subprocess.Popen(
            command,
            env=child_environment({}),
            cwd=work,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = started + PROCESS_TIMEOUT_S
        while time.time() < deadline and process.poll() is None:
            first = first_step_time(run / "metrics.jsonl")
            if first is not None:
                return first - started
            time.sleep(0.05)
        raise SystemExit(f"{' '.join(command)} took no step:\n{log.read_text(encoding='utf-8')}")
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def first_step_time(metrics: Path) -> float | None:
    if not metrics.is_file():
        return None
    for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n") and json.loads(line)["event"] == "first_step":
            return json.loads(line)["time"]
    return None


def run_startup(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time to the first training step, with the corpus encoded already, beside what importing MXNet takes."""
    imports: dict[str, list[float]] = {"mxnet": [], "gluon_lm": []}
    first_steps: list[float] = []
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        work = Path(folder)
        data_dir = options.data_dir.resolve() if options.corpus else work
        corpus = options.corpus or str(synthetic_text(work / "text"))
        note("start-up: encoding the corpus once")
        seconds_to_first_step(corpus, data_dir, work)
        for n in range(options.rounds):
            for module, seconds in imports.items():
                seconds.append(seconds_to_import(module))
            first_steps.append(seconds_to_first_step(corpus, data_dir, work))
            note(
                f"start-up {n + 1}/{options.rounds}  import mxnet {imports['mxnet'][-1]:.2f} s, "
                f"first step after {first_steps[-1]:.2f} s"
            )
    beyond = statistics.median(first_steps) - statistics.median(imports["mxnet"])
    rows = [[f"python -c 'import {module}'", spread(seconds, 2)] for module, seconds in imports.items()]
    rows += [
        ["python -m gluon_lm.train, to the end of the first step", spread(first_steps, 2)],
        ["the same beyond import mxnet", f"{beyond:.2f}"],
    ]
    title = f"Start-up, {options.corpus or 'WikiText-2-sized text'}, cache warm"
    print_table(title, ["", "seconds (range)"], rows)
    return [{"title": title, "imports": imports, "first_step": first_steps, "beyond_mxnet": beyond}]


def run_training(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Training and evaluation speed, peak memory, and start-up."""
    if options.peers and find_spec("gluonnlp") is None:
        note("gluonnlp is not installed here: run 'bash scripts/environment.sh peers', or give --no-peers")
        raise SystemExit(2)
    results = []
    for size in options.sizes or ["A", "B"]:
        results.append(run_rounds("Training", training_cases(), options, size))
        results.append(run_rounds("Evaluation", evaluation_cases(), options, size, windows_a_step=3))
    return results + run_startup(options)


def run_generation(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Words a second of text that is written."""
    return [run_rounds("Generation", generation_cases(), options, size, 4) for size in options.sizes or ["A"]]


def run_mixture(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Training speed of a mixture of softmaxes, beside that of the same computed in plain operators."""
    return [run_rounds("Training", mixture_cases(), options, size) for size in options.sizes or ["D"]]


def run_amp(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Training speed in mixed precision, beside that in float32."""
    from gluon_lm.runtime import cpu_flags

    if "avx512_bf16" not in cpu_flags():
        note("this processor lacks AVX512-BF16 (avx512_bf16 in /proc/cpuinfo): there is nothing to measure here")
        raise SystemExit(2)
    return [run_rounds("Training", amp_cases(), options, size) for size in options.sizes or ["A", "B", "D"]]


def run_unrolled(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Training speed of an LSTM that is computed step by step, beside the fused operator's."""
    return [run_rounds("Training", unrolled_cases(), options, size) for size in options.sizes or ["A"]]


def run_memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Resident memory in the course of training on windows of random length."""
    results = []
    for size in options.sizes or ["A70"]:
        case = Case("gluon_lm", "memory_of_ours")
        run_case(case, size, 0, options.steps or 1000)
        trace = case.results[0]["trace"]
        rows = [
            [f"{now['steps']} steps" if now["steps"] else "the longest window, rehearsed"]
            + [f"{now[metric]:,.1f}" for metric in ("memory_mb", "peak_memory_mb")]
            for now in trace
        ]
        title = f"Memory, {size}: {SIZES[size].description}, up to {MAX_SEQ_LEN_DELTA} longer"
        print_table(title, ["after", "resident, MB", "peak, MB"], rows)
        results.append({"title": title, "trace": trace})
    return results


def run_vocabulary(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Speed, memory and perplexity of each head at the vocabulary of WikiText-103."""
    heads: dict[str, dict[str, Any]] = {
        "full softmax": {},
        "sampled softmax, 8,192 words": {"num_sampled": 8192},
        "adaptive softmax, 4,000 and 40,000": {"cutoffs": (4_000, 40_000)},
        "full softmax, tied": {"tied": True},
        "sampled softmax, tied": {"tied": True, "num_sampled": 8192},
    }
    results = []
    for size in LARGE:
        cases = [Case(label, "train_on_large_vocabulary", model=head) for label, head in heads.items()]
        warmup = LARGE[size].warmup if options.warmup is None else options.warmup
        for n in range(options.rounds if size == "large" else 1):
            for case in cases:
                run_case(case, size, warmup, options.steps or LARGE[size].steps)
                found = case.results[-1]
                note(f"{size} {n + 1}  {case.label}: {found['tokens_per_second']:,.0f} tokens/s")
        full = {False: cases[0], True: cases[3]}
        metric = "tokens_per_second" if size == "large" else "perplexity"
        rows = []
        for case in cases:
            share = case.median(metric) / full[case.model.get("tied", False)].median(metric)
            memory = spread(case.values("peak_memory_mb"))
            rows.append([case.label, spread(case.values(metric)), f"{share:.3g}", memory])
        what = "tokens/s" if size == "large" else f"perplexity after {cases[0].results[0]['trained_tokens']:,} words"
        title = f"{LARGE_VOCAB_SIZE:,} words: {LARGE[size].description}"
        header = ["", f"{what} (range)", "times that of the full softmax", "peak memory, MB (range)"]
        print_table(title, header, rows)
        results.append({"title": title, "cases": [asdict(case) for case in cases]})
    return results


def write_words(path: Path, num_tokens: int, num_types: int) -> None:
    """A text file in lines of 24 Zipf-distributed words and <eos>, in which every kind of word occurs."""
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, num_types + 1))
    words = np.array([f"word{i}" for i in range(num_types - 1)], dtype=object)  # and <eos>
    rng, block = np.random.RandomState(SEED), 24 * 50_000
    with open(path, "w", encoding="ascii") as file:
        for start in range(0, num_tokens, block // 24 * 25):
            ids = np.searchsorted(cumulative, rng.random_sample(block) * cumulative[-1]).clip(max=num_types - 2)
            if start == 0:
                ids[: len(words)] = rng.permutation(len(words))
            left = (num_tokens - start) // 25 * 24
            for line in words[ids[:left]].reshape(-1, 24).tolist():
                file.write(" ".join(line) + "\n")


def encode(folder: Path) -> dict[str, float]:
    """Read a folder of text for the first time, in this process."""
    from gluon_lm.config import DataConfig
    from gluon_lm.data import load_corpus

    started = time.perf_counter()
    corpus = load_corpus(DataConfig(data=(str(folder),)))
    seconds = time.perf_counter() - started
    num_tokens = sum(len(ids) for ids in corpus.ids.values())
    return {
        "seconds": seconds,
        "num_tokens": num_tokens,
        "num_types": len(corpus.vocabulary),
        "tokens_per_second": num_tokens / seconds,
        "peak_memory_mb": peak_memory_mb(),
    }


def run_encoding(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time and memory of making ids from text, vocabulary and hashes included."""
    results = []
    with tempfile.TemporaryDirectory(prefix="gluon_lm-benchmark-") as folder:
        text = Path(folder) / "text"
        text.mkdir()
        note(f"writing {options.tokens:,} words")
        write_words(text / "train.txt", options.tokens, ENCODED_TYPES)
        for name in ("valid", "test"):
            (text / f"{name}.txt").write_text("word1 word2\n", encoding="ascii")
        for n in range(options.rounds):
            done = subprocess.run(
                [sys.executable, __file__, "encode", str(text)],
                env=child_environment({"GLUON_LM_CACHE": f"{folder}/cache-{n}"}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                text=True,
                timeout=PROCESS_TIMEOUT_S,
                check=True,
            )
            shutil.rmtree(f"{folder}/cache-{n}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
            note(f"encoding {n + 1}/{options.rounds}: {results[-1]['seconds']:.1f} s")
    columns = {name: [result[name] for result in results] for name in results[0]}
    title = f"Encoding {results[0]['num_tokens']:,} words of {results[0]['num_types']:,} kinds"
    rows = [
        [spread(columns["seconds"], 1), spread(columns["tokens_per_second"]), spread(columns["peak_memory_mb"])],
    ]
    print_table(title, ["seconds (range)", "words/s (range)", "peak memory, MB (range)"], rows)
    return [{"title": title, "results": results}]


BENCHMARKS = {
    "training": run_training,
    "generation": run_generation,
    "mixture": run_mixture,
    "vocabulary": run_vocabulary,
    "encoding": run_encoding,
    "amp": run_amp,
    "unrolled": run_unrolled,
    "memory": run_memory,
    "startup": run_startup,
}


# ---------------------------------------------------------------- reporting


def note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(values: list[float], digits: int = 0) -> str:
    """Median and range."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n**{title}**\n")
    for row in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor(),
    )


def version_of(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def machine() -> dict[str, Any]:
    packages = ("gluon_lm", "mxnet", "numpy", "gluonnlp")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "versions": {"Python": platform.python_version(), **{name: version_of(name) for name in packages}},
        "thread_settings": {name: value for name, value in os.environ.items() if name.startswith("OMP_")},
        "load_average": os.getloadavg(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
    }


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["measure"]:
        name, size, warmup, steps, model = argv[1:]
        measured = {**SIZES, **LARGE}[size]
        changed = replace(measured, model=replace(measured.model, **json.loads(model)))
        print(json.dumps(measure(name, changed, int(warmup), int(steps))))
        return 0
    if argv[:1] == ["encode"]:
        print(json.dumps(encode(Path(argv[1]))))
        return 0
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument(
        "--sizes",
        nargs="+",
        choices=SIZES,
        help="; ".join(f"{name}: {size.description}" for name, size in SIZES.items())
        + " (default: training A B, generation A, mixture D, amp A B D, unrolled A, memory A70)",
    )
    parser.add_argument("--rounds", type=positive, default=3, help="how often each case is measured (default 3)")
    parser.add_argument("--steps", type=positive, help="timed training steps (default 40, C: 3, D: 4, memory: 1000)")
    parser.add_argument("--warmup", type=positive, help="steps before the clock runs (default 8, C and D: 1)")
    parser.add_argument("--tokens", type=positive, default=100_000_000, help="words to encode (default 100 million)")
    parser.add_argument("--no-peers", dest="peers", action="store_false", help="measure ours alone")
    parser.add_argument("--corpus", help="corpus of the start-up measurement (default: a text made for it)")
    parser.add_argument("--data-dir", type=Path, default=ROOT / "data", help="where --corpus lies (default ./data)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number to FILE")
    options = parser.parse_args(argv)

    about = machine()
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if version)
    print(f"{about['cpu']}, {about['cores']} cores | {versions} | {load_average()}")
    results = BENCHMARKS[options.benchmark](options)
    print(f"{load_average()} at the end")
    if options.json is not None:
        report = {
            "machine": about,
            "load_average_at_end": os.getloadavg(),
            "rounds": options.rounds,
            "results": results,
        }
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


def load_average() -> str:
    return f"load average {', '.join(f'{value:.2f}' for value in os.getloadavg())}"


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be 1 or more")
    return value


if __name__ == "__main__":
    sys.exit(main())
