"""The batching engine: texts are the same in any company, and what is given up is given up at once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future

import mxnet as mx
import numpy as np
import pytest
from builders import VOCAB_SIZE, build_model
from processes import wait_until

from gluon_lm.data import Vocabulary
from gluon_lm.generation.generator import generate
from gluon_lm.generation.sampling import Sampler, Sampling
from gluon_lm.prediction import ModelPredictor
from gluon_lm.scoring import score_lines
from gluon_lm.serving.engine import Busy, Closed, Engine, TextRequest

VOCABULARY = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))
LONG_PROMPT = [f"w{i * i % 11}" for i in range(150)]  # more than two pieces
ENDLESS = 10**9
REQUESTS = [
    TextRequest(20, seed=3),
    TextRequest(12, seed=3, index=1),
    TextRequest(15, Sampling(temperature=0.5, suppress_unk=True), seed=4, prompt=["w1", "w2"]),
    TextRequest(15, Sampling(temperature=2.0, top_k=3), seed=5, prompt=LONG_PROMPT),
    TextRequest(16, Sampling(top_p=0.6), seed=6, prompt=[]),
    TextRequest(10, Sampling(temperature=0), seed=7, prompt=["nowhere"]),
    TextRequest(40, seed=8, stop_at_eos=True),
]
PATIENCE = 60


class Watched(ModelPredictor):
    """A predictor that notes who calls it, and fails when it is told to."""

    def __init__(self, model="lstm", **config):
        super().__init__(build_model(model=model, **config), VOCABULARY, "whitespace", mx.cpu())
        self.callers, self.fails, self.words_read = set(), False, 0
        self.network.note = self.note

    def read(self, tokens_TN, states):
        self.note()
        self.words_read += tokens_TN.size
        return super().read(tokens_TN, states)

    def target_losses(self, tokens_TN, targets_R, states):
        self.note()
        return super().target_losses(tokens_TN, targets_R, states)

    def note(self):
        self.callers.add(threading.get_ident())
        if self.fails:
            raise RuntimeError("told to fail")


class WatchedSampler(Sampler):
    """A sampler that tells its predictor of each step."""

    def __call__(self, tokens_1N, states, uniforms_N):
        self._network.note()
        return super().__call__(tokens_1N, states, uniforms_N)


@pytest.fixture(autouse=True)
def watch_steps(monkeypatch):
    monkeypatch.setattr("gluon_lm.serving.engine.Sampler", WatchedSampler)


@pytest.fixture
def engine():
    with Engine(Watched(), num_slots=3, max_waiting=5) as engine:
        yield engine


def written(predictor, request):
    """The text as the generator writes it, alone."""
    steps = generate(
        predictor,
        request.num_words,
        request.sampling,
        prompt=request.prompt,
        num_samples=request.index + 1,
        seed=request.seed,
        stop_at_eos=request.stop_at_eos,
    )
    return [step[request.index] for step in steps if step[request.index] is not None]


def begin_endless(engine, count):
    """Texts without an end, and a way to wait until each has a word more."""
    words = threading.Semaphore(0)
    futures = engine.generate([TextRequest(ENDLESS, seed=n) for n in range(count)], lambda place, word: words.release())

    def wait_for_words(number):
        for _ in range(number):
            assert words.acquire(timeout=PATIENCE)

    return futures, wait_for_words


@pytest.mark.parametrize("model", ["lstm", "gru"])
def test_texts_are_those_of_the_generator_in_any_company(model):
    predictor = Watched(model)
    expected = [written(predictor, request) for request in REQUESTS]
    with Engine(predictor, num_slots=3, max_waiting=100) as engine:
        alone = [engine.generate([request])[0].result(PATIENCE) for request in REQUESTS]
        crowd = [engine.generate([request])[0] for _ in range(2) for request in REQUESTS]
        together = [future.result(PATIENCE) for future in crowd]
    assert alone == expected
    assert together == expected * 2


def test_a_prompt_is_read_once_for_all_texts_that_go_on_from_it():
    predictor = Watched()
    requests = [TextRequest(5, seed=3, index=n, prompt=LONG_PROMPT) for n in range(3)]
    expected = [written(predictor, request) for request in requests]
    assert predictor.words_read == 3 * len(LONG_PROMPT)  # <eos> comes before it, and its last word is the next input
    with Engine(predictor, num_slots=2) as engine:
        given_up, *futures = engine.generate(requests)
        given_up.cancel()
        assert [future.result(PATIENCE) for future in futures] == expected[1:]
    assert predictor.words_read == 4 * len(LONG_PROMPT)


def test_words_are_told_as_they_are_written(engine):
    told = []
    futures = engine.generate(REQUESTS[:2], lambda place, word: told.append((place, word)))
    texts = [future.result(PATIENCE) for future in futures]
    assert [[word for n, word in told if n == place] for place in (0, 1)] == texts


def test_scores_are_those_of_the_library_while_texts_are_written():
    predictor = Watched()
    lines = [["w1", "w2", "nowhere"], [], LONG_PROMPT]
    expected = list(score_lines(predictor, lines))
    with Engine(predictor, num_slots=2) as engine:
        _, wait_for_words = begin_endless(engine, 2)
        wait_for_words(1)
        scores = engine.score(lines).result(PATIENCE)
    for score, other in zip(scores, expected):
        assert (score.words, score.is_unknown) == (other.words, other.is_unknown)
        np.testing.assert_allclose(score.log_probs, other.log_probs, atol=1e-5)


@pytest.mark.parametrize(
    "lines, num_pieces",
    [([["w1"]] * 100, 25), ([[]] * 100, 25), ([["w1"] * 31] * 100, 50), ([LONG_PROMPT], (len(LONG_PROMPT) + 1) // 64)],
)
def test_lines_are_scored_between_steps_in_pieces_of_64_words_and_at_most_four_lines(lines, num_pieces):
    engine, future = Engine(Watched()), Future()
    assert len([*engine._score(lines, [VOCABULARY.encode(line) for line in lines], future)]) == num_pieces
    assert len(future.result(0)) == len(lines)


def test_only_the_engines_thread_calls_mxnet():
    predictor = Watched()
    with Engine(predictor, num_slots=2) as engine:
        callers = [
            threading.Thread(target=lambda: [f.result(PATIENCE) for f in engine.generate(REQUESTS[2:4])]),
            threading.Thread(target=lambda: engine.score([["w1"]]).result(PATIENCE)),
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert len(predictor.callers) == 1
    assert threading.get_ident() not in predictor.callers


def test_more_than_it_may_accept_is_refused_and_a_cancelled_text_makes_room(engine):
    live, wait_for_words = begin_endless(engine, 3)
    wait_for_words(3)
    waiting = engine.generate([TextRequest(5, seed=1, prompt=["w1"])] * 4)
    last = engine.score([["w1"]])
    assert last.result(PATIENCE)  # a scoring needs no slot
    wait_until(lambda: engine.num_waiting == 4)  # it has a result before it is forgotten
    waiting += engine.generate([TextRequest(5, seed=1)])
    for refused in (lambda: engine.generate([TextRequest(5)]), lambda: engine.score([[]])):
        with pytest.raises(Busy):
            refused()
    waiting[-1].cancel()
    (accepted,) = engine.generate([TextRequest(5, seed=2)])
    wait_for_words(30)
    assert not any(future.done() for future in waiting[:-1])
    assert not engine.is_ready
    live[1].cancel()
    assert all(len(future.result(PATIENCE)) == 5 for future in [*waiting[:-1], accepted])
    assert not live[0].done()


def test_all_texts_of_a_request_are_accepted_or_none(engine):
    begin_endless(engine, 3)
    engine.generate([TextRequest(5)] * 3)
    with pytest.raises(Busy):
        engine.generate([TextRequest(5)] * 3)
    engine.generate([TextRequest(5)] * 2)


def test_without_work_the_thread_sleeps(engine):
    engine.generate([TextRequest(3)])[0].result(PATIENCE)
    clock = time.pthread_getcpuclockid(engine._thread.ident)
    time.sleep(0.1)
    before = time.clock_gettime(clock)
    time.sleep(0.5)
    assert time.clock_gettime(clock) - before < 0.1


def test_closing_finishes_what_was_accepted():
    with Engine(Watched(), num_slots=1) as engine:
        futures = engine.generate([TextRequest(20, prompt=LONG_PROMPT)] * 3)
        engine.close(PATIENCE)
        assert [len(future.result(0)) for future in futures] == [20] * 3
        with pytest.raises(Closed):
            engine.generate([TextRequest(1)])
    assert not engine.is_alive


def test_closing_gives_up_what_takes_longer_than_it_may():
    with Engine(Watched(), num_slots=1) as engine:
        live, wait_for_words = begin_endless(engine, 2)
        wait_for_words(1)
        engine.close(0.1)
        for future in live:
            with pytest.raises(Closed):
                future.result(0)
    assert not engine.is_alive


def test_a_failure_ends_what_was_running_and_nothing_else(engine):
    predictor = engine._predictor
    futures, wait_for_words = begin_endless(engine, 4)
    wait_for_words(1)
    predictor.fails = True
    for future in futures:
        with pytest.raises(RuntimeError, match="told to fail"):
            future.result(PATIENCE)
    predictor.fails = False
    (future,) = engine.generate(REQUESTS[:1])
    assert future.result(PATIENCE) == written(predictor, REQUESTS[0])
    assert engine.is_ready


def test_a_callback_that_fails_ends_its_own_text_alone(engine):
    (other,) = engine.generate([TextRequest(30, seed=1)])

    def fail(place, word):
        raise KeyError("mine")

    failing, spared = engine.generate(
        [TextRequest(ENDLESS, seed=2), TextRequest(5, seed=3)], lambda place, word: place or fail(place, word)
    )
    with pytest.raises(KeyError, match="mine"):
        failing.result(PATIENCE)
    assert len(spared.result(PATIENCE)) == 5 and len(other.result(PATIENCE)) == 30
    wait_until(lambda: engine.num_live == 0)


def test_text_in_place_of_words_is_its_callers_error_alone(engine):
    (other,) = engine.generate([TextRequest(30, seed=1)])
    with pytest.raises(TypeError, match="is a text, not words"):
        engine.score(["w1 w2"])
    with pytest.raises(TypeError, match="is a text, not words"):
        engine.generate([TextRequest(5, prompt="w1 w2")])
    assert len(other.result(PATIENCE)) == 30 and engine.num_waiting == 0


def test_what_is_asked_wrongly_is_said():
    with pytest.raises(ValueError, match="num_words 0: must be 1 or more"):
        TextRequest(0)
    with pytest.raises(Closed, match="has not started; use it as a context manager"):
        Engine(Watched()).generate([TextRequest(1)])
