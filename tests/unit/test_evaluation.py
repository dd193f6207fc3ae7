"""Perplexity of a text: exact over every token, whatever the windows."""

from __future__ import annotations

import math
import sys
from concurrent.futures import ThreadPoolExecutor

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, random_ids, values_of

from gluon_lm.config import CELLS
from gluon_lm.errors import DataError
from gluon_lm.evaluation.static import Evaluation, evaluate

EOS = 3
TEXT = random_ids(57)


def run(model, ids, **how):
    return evaluate(model, ids, EOS, mx.cpu(0), **how)


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("head", [{}, {"tied": True}, {"tied": True, "num_sampled": 4}, {"cutoffs": (4,)}], ids=str)
def test_one_stream_is_the_sum_over_all_words_in_their_full_context(cell, head):
    model = build_model(model=cell, dropout=0.5, **head)
    result = run(model, TEXT)
    assert result.num_tokens == 57
    assert result.loss_sum == pytest.approx(reference.text_loss(cell, values_of(model), TEXT, EOS), rel=1e-5)


@pytest.mark.parametrize("num_streams", [1, 4])
def test_the_window_length_changes_nothing(num_streams):
    model = build_model()
    expected = run(model, TEXT, num_streams=num_streams)
    for bptt in (1, 2, 7, 56, 57, 500):
        found = run(model, TEXT, num_streams=num_streams, bptt=bptt)
        assert found.num_tokens == expected.num_tokens
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)


@pytest.mark.parametrize("num_streams", [2, 5, 57, 100])
@pytest.mark.parametrize("bptt", [None, 4])
def test_streams_drop_no_word(num_streams, bptt):
    model = build_model(model="gru")
    pieces = np.array_split(TEXT, min(num_streams, 57))
    expected = sum(reference.text_loss("gru", values_of(model), piece, EOS) for piece in pieces)
    result = run(model, TEXT, num_streams=num_streams, bptt=bptt)
    assert result.num_tokens == 57
    assert result.loss_sum == pytest.approx(expected, rel=1e-5)


def test_a_text_of_one_word():
    model = build_model()
    result = run(model, TEXT[:1])
    assert result.num_tokens == 1
    assert result.loss == pytest.approx(reference.text_loss("lstm", values_of(model), TEXT[:1], EOS), rel=1e-5)


def test_evaluation_leaves_parameters_and_gradients_alone():
    model = build_model()
    before = values_of(model)
    for parameter in model.named_parameters().values():
        parameter.grad()[:] = 5
    run(model, TEXT)
    for name, parameter in model.named_parameters().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name].astype(np.float32))
        assert np.all(parameter.grad().asnumpy() == 5)


def test_what_is_raised_before_a_window_ends_the_evaluation():
    class Enough(Exception):
        pass

    calls = []

    def count():
        calls.append(len(calls))
        if len(calls) == 3:
            raise Enough

    with pytest.raises(Enough):
        run(build_model(), TEXT, bptt=10, before_window=count)
    assert len(calls) == 3


def test_measures():
    result = Evaluation(loss_sum=20 * math.log(8), num_tokens=20)
    assert result.loss == pytest.approx(math.log(8))
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_word == pytest.approx(3)
    assert Evaluation(loss_sum=1e9, num_tokens=1).perplexity == math.inf


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids + 1, "word ids from 1 to 13: must be from 0 to 12"),
        (lambda ids: ids - 1, "word ids from -1 to"),
        (lambda ids: ids[:0], "there are no words to read"),
    ],
)
def test_ids_of_another_vocabulary_and_a_text_without_words_are_refused(change, words):
    with pytest.raises(DataError, match=words):
        run(build_model(), change(np.append(TEXT, VOCAB_SIZE - 1)))


def test_fewer_than_one_stream_is_refused():
    with pytest.raises(ValueError, match="num_streams 0: must be 1 or more"):
        run(build_model(), TEXT, num_streams=0)


def test_threads_that_share_a_model_do_not_disturb_each_other(monkeypatch):
    """Each has its own workspace for logits: with one for all, a thread reads what another has written over it."""
    monkeypatch.setattr("gluon_lm.losses.CHUNK_SOFTMAXES", 4)
    model, texts = build_model(), [TEXT, TEXT[::-1].copy()]
    expected = [run(model, ids).loss_sum for ids in texts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda ids: run(model, ids).loss_sum, texts * 10))
    finally:
        sys.setswitchinterval(interval)
    assert found == pytest.approx(expected * 10, rel=1e-6)
