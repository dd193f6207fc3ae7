"""Generate text with a model, word by word, in any number of streams.

Shapes: T time, N streams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mxnet as mx
import numpy as np

from ..data import Vocabulary
from ..prediction import Predictor
from .sampling import AS_IS, Sampler, Sampling


def begin_text(
    vocabulary: Vocabulary, prompt: Sequence[str] | None, seed: int, index: int
) -> tuple[list[int], np.random.Generator]:
    """The ids that text number `index` of a seed begins with, and the source of its random numbers.

    These are ``<eos>`` and the prompt, or without one a word drawn uniformly from the vocabulary.
    """
    rng = np.random.default_rng([seed, index])
    if prompt is None:
        return [int(rng.integers(len(vocabulary)))], rng
    return [vocabulary.eos_id, *vocabulary.encode(prompt).tolist()], rng


def generate(
    predictor: Predictor,
    num_words: int,
    sampling: Sampling = AS_IS,
    *,
    prompt: Sequence[str] | None = None,
    num_samples: int = 1,
    seed: int = 1111,
    stop_at_eos: bool = False,
) -> Iterator[list[str | None]]:
    """Sample texts side by side, each word fed back as the next input.

    Parameters
    ----------
    predictor : Predictor
    num_words : int
        Length of each text.
    sampling : Sampling
    prompt : sequence of str, optional
        Words that come before the text, after the end of a line; they are not part of it. Words that the vocabulary
        lacks are read as ``<unk>``. Without it each text begins after a word drawn uniformly from the vocabulary.
    num_samples : int
        Texts to write, N.
    seed : int
        Determines the texts: the same for any number of them, up to rounding (the last bits of matrix products of
        different sizes differ, which changes a word once in many thousand).
    stop_at_eos : bool
        End a text with its first ``<eos>``.

    Yields
    ------
    list of str
        The next word of each text, ``<eos>`` at the end of a line; None once the text has ended.
    """
    vocabulary, device = predictor.vocabulary, predictor.device
    beginnings, rngs = zip(*(begin_text(vocabulary, prompt, seed, n) for n in range(num_samples)))
    last_N = [ids[-1] for ids in beginnings]
    before_T = np.array(beginnings[0][:-1], np.int32)  # the same for all texts, so it is read once
    read = predictor.read(before_T[:, None], predictor.begin_state(1))
    states = [mx.nd.repeat(state_1NH, num_samples, axis=1) for state_1NH in read]
    sampler = Sampler(predictor.network, [sampling] * num_samples, len(vocabulary), vocabulary.unk_id, device)
    tokens_1N = mx.nd.array([last_N], ctx=device, dtype="int32")
    has_ended = [False] * num_samples
    pending = None
    for n in range(num_words + 1):
        written = pending
        if n < num_words:
            uniforms_N = np.array([rng.random(dtype=np.float32) for rng in rngs])
            tokens_1N, states = sampler(tokens_1N, states, uniforms_N)
            pending = tokens_1N
        if written is None:
            continue
        # Read the previous word while the device works on this one.
        ids = written.asnumpy()[0].tolist()
        yield [None if ended else vocabulary.words[i] for i, ended in zip(ids, has_ended)]
        if stop_at_eos:
            has_ended = [ended or i == vocabulary.eos_id for i, ended in zip(ids, has_ended)]
            if all(has_ended):
                return
