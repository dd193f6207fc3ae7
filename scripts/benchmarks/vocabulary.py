"""The heads for large vocabularies, at the number of words of WikiText-103: speed, memory, and what each learns."""

from __future__ import annotations

import argparse
from typing import Any

from gluon_lm.config import ModelConfig, OptimConfig

from .harness import SEED, SIZES, Case, Size, Table, benchmark, run_rounds, timed_steps
from .ours import ours_step

LARGE_VOCAB_SIZE = 267_735

# A model whose speed is measured, and a small one that learns for a while.
SIZES["large"] = Size(
    ModelConfig(embed_size=400, hidden_size=1024, num_layers=3, dropout=0.0),
    OptimConfig(lr=1.0),
    batch_size=32,
    bptt=96,
    warmup=1,
    steps=3,
    vocab_size=LARGE_VOCAB_SIZE,
)
SIZES["learning"] = Size(
    ModelConfig(embed_size=64, hidden_size=64, num_layers=1, dropout=0.0),
    OptimConfig(lr=20.0, clip_norm=0.25),
    batch_size=32,
    bptt=35,
    warmup=0,
    steps=150,
    vocab_size=LARGE_VOCAB_SIZE,
)


def chained_words(count: int, vocab_size: int):
    """Text with something to learn in it: half of the words follow from the one before.

    The others are drawn like `harness.zipf_ids`, and each word's successor is drawn so too, once. Ids are ranks by
    frequency.
    """
    import numpy as np

    cumulative = np.cumsum(1.0 / np.arange(1, vocab_size + 1))
    rng = np.random.RandomState(SEED)

    def draw(number: int):
        return np.searchsorted(cumulative, rng.random_sample(number) * cumulative[-1]).clip(max=vocab_size - 1)

    ids, successors, follows = draw(count), draw(vocab_size), rng.random_sample(count) < 0.5
    for i in np.flatnonzero(follows[1:]) + 1:
        ids[i] = successors[ids[i - 1]]
    ranks = np.empty(vocab_size, np.int32)
    ranks[np.argsort(-np.bincount(ids, minlength=vocab_size), kind="stable")] = np.arange(vocab_size)
    return ranks[ids]


def train_and_evaluate(size: Size, warmup: int, steps: int) -> dict[str, float]:
    """Speed of training, and the perplexity of held-out text on the whole vocabulary afterwards."""
    step = ours_step(size)
    import mxnet as mx

    from gluon_lm.data.windows import Streams
    from gluon_lm.evaluation.static import evaluate

    num_trained = (warmup + steps) * size.batch_size * size.bptt
    ids = chained_words(num_trained + max(1_000, num_trained // 10), size.vocab_size)
    streams = Streams(ids[:num_trained], size.batch_size, eos=0)

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            step(streams.window(i * size.bptt, size.bptt), SEED, i)

    speed = timed_steps(size, warmup, steps, take)
    perplexity = evaluate(step._model, ids[num_trained:], 0, mx.cpu(), num_streams=10).perplexity
    return {**speed, "perplexity": perplexity}


def heads(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Changes to the model, by what they are called."""
    num_sampled, cutoffs = (8, (10, 30)) if options.check else (8192, (8_000, 40_000))
    return {
        "full softmax": {},
        f"sampled softmax, {num_sampled:,} words": {"num_sampled": num_sampled},
        "adaptive softmax, " + " and ".join(f"{cutoff:,}" for cutoff in cutoffs): {"cutoffs": cutoffs},
        "full softmax, tied": {"tied": True},
        "sampled softmax, tied": {"tied": True, "num_sampled": num_sampled},
    }


@benchmark("vocabulary", "large", "learning")
def run_vocabulary(options: argparse.Namespace) -> list[Table]:
    """Speed, memory and perplexity of each head at the vocabulary of WikiText-103."""
    cases = [Case(label, train_and_evaluate, model=head) for label, head in heads(options).items()]
    ratio = "time, that of the full softmax being 1"
    return [run_rounds("Large vocabulary", cases, options, name, ratio=ratio) for name in options.sizes]
