"""Write text with a model, one word after another.

Shapes: T time (1), N streams (1), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import mxnet as mx
import numpy as np

from ..data import Vocabulary
from ..models import LanguageModel


def generate(
    model: LanguageModel,
    vocabulary: Vocabulary,
    num_words: int,
    *,
    temperature: float = 1.0,
    seed: int = 1111,
    device: mx.Context | None = None,
) -> Iterator[str]:
    """Sample words from ``p(word)^(1 / temperature)``, each fed back as the next input.

    The first input is a word drawn evenly from the vocabulary, and is not part of the text.

    Parameters
    ----------
    model : LanguageModel
    vocabulary : Vocabulary
    num_words : int
    temperature : float
        Above 0; below 1 prefers likely words, above 1 evens them out.
    seed : int
        Decides the text.
    device : Context, optional
        Where the model's parameters are; by default their first context.

    Yields
    ------
    str
        One word; ``<eos>`` ends a line.
    """
    device = device or next(iter(model.named_parameters().values())).list_ctx()[0]
    rng = np.random.RandomState(seed)
    word = int(rng.randint(len(vocabulary)))
    states = model.begin_state(1, device)
    for _ in range(num_words):
        tokens_TN = mx.nd.array([[word]], ctx=device, dtype="int32")
        hidden_TNH, *states = model.encoder(tokens_TN, *states)
        log_probs_V = model.head(hidden_TNH).reshape((-1,))
        probs_V = mx.nd.softmax(log_probs_V / temperature)
        # Inverse of the cumulative distribution at a uniform number; one number is read back.
        below_V = mx.nd.cumsum(probs_V) < rng.random_sample() * probs_V.sum()
        word = min(int(below_V.sum().asscalar()), len(vocabulary) - 1)
        yield vocabulary.words[word]
