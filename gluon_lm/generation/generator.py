"""Write text with a model, word after word, in as many streams as are asked for.

Shapes: T time, N streams, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import mxnet as mx
import numpy as np

from ..prediction import Predictor
from .sampling import AS_IS, Sampler, Sampling


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
        lacks are read as ``<unk>``. Without it each text begins after a word drawn evenly from the vocabulary.
    num_samples : int
        Texts to write, N.
    seed : int
        Decides the texts: the same in any number of them, as far as matrix products of different sizes agree
        (their last bits differ, which changes a word once in many thousand).
    stop_at_eos : bool
        End a text with its first ``<eos>``.

    Yields
    ------
    list of str
        The next word of each text, ``<eos>`` at the end of a line; None once the text has ended.
    """
    vocabulary, device = predictor.vocabulary, predictor.device
    rngs = [np.random.default_rng([seed, n]) for n in range(num_samples)]
    if prompt is None:
        states = predictor.begin_state(num_samples)
        last_N = [rng.integers(len(vocabulary)) for rng in rngs]
    else:
        *before, last = [vocabulary.eos_id, *vocabulary.encode(prompt)]
        last_N = [last] * num_samples
        read = predictor.read(np.array(before, np.int32)[:, None], predictor.begin_state(1))  # once for all texts
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
        # Read the word before while the device works on this one.
        ids = written.asnumpy()[0].tolist()
        yield [None if ended else vocabulary.words[i] for i, ended in zip(ids, has_ended)]
        if stop_at_eos:
            has_ended = [ended or i == vocabulary.eos_id for i, ended in zip(ids, has_ended)]
            if all(has_ended):
                return
