"""Generated text: its distribution, its seed."""

from __future__ import annotations

from itertools import islice

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, values_of

from gluon_lm.data import Vocabulary
from gluon_lm.generation.detokenize import detokenize
from gluon_lm.generation.generator import generate
from gluon_lm.generation.sampling import Sampling
from gluon_lm.prediction import ModelPredictor

VOCABULARY = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))


def build():
    model = build_model(model="gru", num_layers=1)
    weight = model.head.decoder.weight
    weight.set_data(4 * weight.data())  # a sharp distribution, that depends on what came before
    return model


def write(model, num_words, seed=1111, temperature=1.0):
    """The words of one text."""
    predictor = ModelPredictor(model, VOCABULARY, "whitespace", mx.cpu())
    return [word for (word,) in generate(predictor, num_words, Sampling(temperature), seed=seed)]


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
    words = write(model, 1500, seed=7, temperature=temperature)
    assert len(words) == 1500
    assert misfit(model, words, temperature) < 2.5 * VOCAB_SIZE
    assert misfit(model, words, other) > 5 * VOCAB_SIZE


@pytest.mark.parametrize(
    ("head", "temperature"),
    [
        pytest.param({}, 1.0, id="softmax"),
        pytest.param({}, 0.5, id="softmax, low temperature"),
        pytest.param({}, 2.0, id="softmax, high temperature"),
        pytest.param({"tied": True}, 1.0, id="tied softmax"),
        pytest.param({"tied": True, "num_experts": 3, "last_hidden_size": 9}, 1.0, id="mixture"),
        pytest.param({"num_sampled": 4}, 1.0, id="sampled"),
        pytest.param({"cutoffs": (3,)}, 1.0, id="adaptive"),
    ],
)
def test_a_hundred_thousand_words_fit_the_distribution(head, temperature):
    model = build_model(model="gru", **head)
    predictor = ModelPredictor(model, VOCABULARY, "whitespace", mx.cpu())
    (words,) = generate(predictor, 1, Sampling(temperature), prompt=["w3", "w5"], num_samples=100_000, seed=3)
    observed = np.bincount(VOCABULARY.encode(words), minlength=VOCAB_SIZE)
    parameters = values_of(model)
    tokens = np.array([VOCABULARY.eos_id, *VOCABULARY.encode(["w3", "w5"])])[:, None]
    log_probs, _ = reference.log_probs("gru", parameters, tokens, reference.zero_states("gru", parameters, 1))
    expected = np.exp(reference.log_softmax(log_probs[-1, 0] / temperature)) * len(words)
    assert expected.min() > 5
    assert ((observed - expected) ** 2 / expected).sum() < 50  # 12 degrees of freedom: one chance in a million


def test_the_seed_decides_the_text():
    model = build()
    first = write(model, 40, seed=1)
    mx.nd.random.uniform(shape=(3,))
    assert write(model, 40, seed=1) == first
    assert write(model, 40, seed=2) != first


def test_words_come_one_after_another():
    model = build()
    predictor = ModelPredictor(model, VOCABULARY, "whitespace", mx.cpu())
    endless = generate(predictor, 10**9, seed=1)
    assert [word for (word,) in islice(endless, 5)] == write(model, 5, seed=1)
    assert write(model, 0) == []


def test_a_text_is_the_same_beside_others():
    predictor = ModelPredictor(build(), VOCABULARY, "whitespace", mx.cpu())
    together = list(zip(*generate(predictor, 60, num_samples=5, seed=9)))
    assert len(set(together)) == 5
    (alone,) = zip(*generate(predictor, 60, num_samples=1, seed=9))
    assert together[0] == alone


def test_a_text_goes_on_from_its_prompt():
    model = build()
    predictor = ModelPredictor(model, VOCABULARY, "whitespace", mx.cpu())
    prompt = ["w3", "never-seen", "w4"]
    (text,) = zip(*generate(predictor, 20, Sampling(temperature=0), prompt=prompt))
    parameters = values_of(model)
    states, ids = reference.zero_states("gru", parameters, 1), [VOCABULARY.eos_id, *VOCABULARY.encode(prompt)]
    for place in range(20):
        log_probs, states = reference.log_probs("gru", parameters, np.array(ids)[:, None], states)
        ids = [int(log_probs[-1, 0].argmax())]
        assert text[place] == VOCABULARY.words[ids[0]]


def test_a_text_ends_with_its_first_line_where_that_is_asked_for():
    predictor = ModelPredictor(build(), VOCABULARY, "whitespace", mx.cpu())
    to_the_end = list(zip(*generate(predictor, 200, num_samples=8, seed=2)))
    stopped = list(zip(*generate(predictor, 200, num_samples=8, seed=2, stop_at_eos=True)))
    for whole, cut in zip(to_the_end, stopped):
        length = whole.index("<eos>") + 1
        assert cut[:length] == whole[:length] and set(cut[length:]) <= {None}


def test_text_that_reads():
    first = 'the cost rose to 1 @,@ 000 ( $ 3 @.@ 5 ) , he said : " do n\'t " . <eos>'
    second = "it 's a well @-@ known ' case ' ? <eos>"
    assert detokenize(f"{first} {second}".split()) == (
        "the cost rose to 1,000 ($3.5), he said: \"don't\".\nit's a well-known ' case '?\n"
    )
    assert detokenize('he said : " ( really ) ? no ! " then left .'.split()) == 'he said: "(really)? no!" then left.'
    assert detokenize("a .22 rifle in C# minor for US$ 5 , a :)".split()) == "a .22 rifle in C# minor for US$5, a:)"


def test_a_low_temperature_takes_the_likeliest_word():
    model = build()
    words = write(model, 30, seed=5, temperature=1e-3)
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
    texts = [write(model, 30, seed=2) for model in (with_dropout, without)]
    assert texts[0] == texts[1]
