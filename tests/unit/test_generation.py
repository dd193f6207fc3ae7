"""Generated text: its distribution, its seed."""

from __future__ import annotations

from itertools import islice

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, values_of

from gluon_lm.data import Vocabulary
from gluon_lm.generation.generator import generate

VOCABULARY = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))


def build():
    model = build_model(model="gru", num_layers=1)
    weight = model.head.decoder.weight
    weight.set_data(4 * weight.data())  # a sharp distribution, that depends on what came before
    return model


def misfit(model, words, temperature, burn_in=50):
    """How far the words' frequencies are from the model's; near `VOCAB_SIZE` if they fit (chi-square).

    At each place the model's distribution is that of the reference after the very words before it. The first
    input is not part of the text; it is forgotten over the burn-in.
    """
    parameters, states = values_of(model), reference.zero_states("gru", values_of(model), 1)
    ids = [VOCABULARY.words.index(word) for word in words]
    surplus, variance = np.zeros(VOCAB_SIZE), np.zeros(VOCAB_SIZE)
    for place, (previous, word) in enumerate(zip(ids, ids[1:])):
        log_probs, states = reference.log_probs("gru", parameters, np.array([[previous]]), states)
        probs = np.exp(reference.log_softmax(log_probs[0, 0] / temperature))
        if place >= burn_in:
            surplus += (np.arange(VOCAB_SIZE) == word) - probs
            variance += probs * (1 - probs)
    return (surplus**2 / variance).sum()


@pytest.mark.parametrize(("temperature", "other"), [(1.0, 0.5), (0.5, 1.0), (2.0, 1.0)])
def test_words_follow_the_distribution_at_their_temperature(temperature, other):
    model = build()
    words = list(generate(model, VOCABULARY, 1500, temperature=temperature, seed=7))
    assert len(words) == 1500
    assert misfit(model, words, temperature) < 2.5 * VOCAB_SIZE
    assert misfit(model, words, other) > 5 * VOCAB_SIZE


def test_the_seed_decides_the_text():
    model = build()

    def write(seed):
        return list(generate(model, VOCABULARY, 40, seed=seed))

    first = write(1)
    mx.nd.random.uniform(shape=(3,))
    assert write(1) == first
    assert write(2) != first


def test_words_come_one_after_another():
    model = build()
    assert list(islice(generate(model, VOCABULARY, 10**9, seed=1), 5)) == list(generate(model, VOCABULARY, 5, seed=1))
    assert list(generate(model, VOCABULARY, 0)) == []


def test_a_low_temperature_takes_the_likeliest_word():
    model = build()
    words = list(generate(model, VOCABULARY, 30, temperature=1e-3, seed=5))
    parameters, states = values_of(model), reference.zero_states("gru", values_of(model), 1)

    def greedy(start):
        word, now, text = start, states, []
        for _ in range(30):
            log_probs, now = reference.log_probs("gru", parameters, np.array([[word]]), now)
            word = int(log_probs.argmax())
            text.append(VOCABULARY.words[word])
        return text

    assert words in [greedy(start) for start in range(VOCAB_SIZE)]


def test_dropout_is_off():
    with_dropout = build_model(dropout=0.9)
    without = build_model(dropout=0.0)
    texts = [list(generate(model, VOCABULARY, 30, seed=2)) for model in (with_dropout, without)]
    assert texts[0] == texts[1]
