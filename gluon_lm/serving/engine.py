"""The only thread that calls MXNet; it steps the texts of all requests together.

A step runs the model on a batch of a fixed number of slots, one for each text; slots without a text are padding. The
size never changes, because matrix products of different sizes differ in their last bits: so a seed gives the same text,
word for word, whoever else is served. Prompts and lines to score are read separately, in pieces between two steps.

Shapes: T time, N slots, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import mxnet as mx
import numpy as np

from ..data import Vocabulary
from ..generation.generator import begin_text
from ..generation.sampling import AS_IS, Sampler, Sampling
from ..logs import LOGGER
from ..models import State
from ..prediction import Predictor
from ..scoring import LineScore

_WORDS_PER_PIECE = 64
_PIECES_PER_STEP = 2


class Busy(Exception):
    """The engine has as much work as it may accept."""


class Closed(Exception):
    """The engine is stopping and takes no more work, or stopped before this work was done."""


@dataclasses.dataclass(frozen=True)
class TextRequest:
    """A text to write. `ValueError` for a text without words.

    Attributes
    ----------
    num_words : int
        Its maximum length.
    sampling : Sampling
    seed, index : int
        They determine the words; up to rounding, the text is number `index` of those of
        `gluon_lm.generation.generator.generate`.
    prompt : sequence of str, optional
        Words that come before it; without them it begins after a word drawn uniformly from the vocabulary.
    stop_at_eos : bool
        End with the first ``<eos>``.
    """

    num_words: int
    sampling: Sampling = AS_IS
    seed: int = 1111
    index: int = 0
    prompt: Sequence[str] | None = None
    stop_at_eos: bool = False

    def __post_init__(self) -> None:
        if self.num_words < 1:
            raise ValueError(f"num_words {self.num_words}: must be 1 or more")


class _Text:
    """A text being written: its last word, which is its next input, and the source of its random numbers.

    The words before that one are read first, and `states` are those after them; None: the zero state.
    """

    def __init__(
        self,
        request: TextRequest,
        done: Future[list[str]],
        on_word: Callable[[str], None] | None,
        vocabulary: Vocabulary,
    ) -> None:
        self.request, self.done, self.on_word = request, done, on_word
        self.words: list[str] = []
        ids, self.rng = begin_text(vocabulary, request.prompt, request.seed, request.index)
        self.before, self.last_word = tuple(ids[:-1]), ids[-1]
        self.states: State | None = None


class Engine:
    """Writes texts and scores lines for many callers at once.

    Use it as a context manager, once; work that is unfinished when the block is left fails with `Closed`. `generate`
    and `score` may be called from any thread; cancelling the future that they return frees its slot before the next
    step.

    Parameters
    ----------
    predictor : Predictor
        Nobody else may use it while the engine runs.
    num_slots : int
        Texts that are written at the same time. Padding costs as much as they do.
    max_waiting : int
        Texts and scoring requests that may wait for their turn.
    """

    def __init__(self, predictor: Predictor, num_slots: int = 32, max_waiting: int = 256) -> None:
        self.num_slots, self.capacity = num_slots, num_slots + max_waiting
        self.num_words = 0
        self._predictor, self._vocabulary = predictor, predictor.vocabulary
        self._slots: list[_Text | None] = [None] * num_slots
        self._waiting: deque[_Text] = deque()
        self._pieces: deque[tuple[list[Future[Any]], Iterator[None]]] = deque()  # for whom, and what is to be read
        self._states: State = []
        self._sampling = [AS_IS] * num_slots
        self._sampler = Sampler(
            predictor.network, self._sampling, len(self._vocabulary), self._vocabulary.unk_id, predictor.device
        )
        # Shared with other threads, under the lock of `_changed`:
        self._changed = threading.Condition()
        self._accepted: list[Callable[[], None]] = []
        self._unfinished: set[Future[Any]] = set()
        self._is_closing = self._is_aborted = False
        self._thread = threading.Thread(target=self._run, name="gluon_lm engine", daemon=True)
        self._is_ready = threading.Event()
        self._failure: Exception | None = None

    # ------------------------------------------------------------ from any thread

    def __enter__(self) -> Engine:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close(0)

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    @property
    def is_ready(self) -> bool:
        """Whether work is accepted."""
        has_room = len(self._unfinished) < self.capacity
        return has_room and self._is_ready.is_set() and self.is_alive and not self._is_closing

    def wait_until_ready(self) -> None:
        """Wait until the first step has been taken; raises the error if it failed."""
        self._is_ready.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def num_live(self) -> int:
        """Texts that have a slot."""
        return sum(text is not None for text in self._slots)

    @property
    def num_waiting(self) -> int:
        """Texts and scoring requests that have been accepted and have no slot."""
        return max(0, len(self._unfinished) - self.num_live)

    def generate(
        self, requests: Sequence[TextRequest], on_word: Callable[[int, str], None] | None = None
    ) -> list[Future[list[str]]]:
        """Write texts; either all or none are accepted.

        Parameters
        ----------
        requests : sequence of TextRequest
        on_word : callable, optional
            Called with the index of a text in `requests` and its next word, in the engine's thread: it must be quick.
            An exception that it raises ends that text and becomes the error of its future.

        Returns
        -------
        list of Future
            The words of each text.

        Raises
        ------
        Busy
            If the engine has as much work as it may accept.
        Closed
            If it has not started, is stopping or has stopped.
        """
        futures: list[Future[list[str]]] = [Future() for _ in requests]
        texts = [
            _Text(request, future, None if on_word is None else _bind(on_word, place), self._vocabulary)
            for place, (request, future) in enumerate(zip(requests, futures))
        ]

        def begin() -> None:
            by_before: dict[tuple[int, ...], list[_Text]] = {}
            for text in texts:
                if text.before:
                    by_before.setdefault(text.before, []).append(text)
                else:
                    self._waiting.append(text)
            for before, alike in by_before.items():
                self._pieces.append(([text.done for text in alike], self._read_prompt(before, alike)))

        self._accept(futures, begin)
        return futures

    def score(self, lines: Sequence[Sequence[str]]) -> Future[list[LineScore]]:
        """Score lines, each on its own, as `gluon_lm.scoring.score_lines` does; raises `Busy` or `Closed`."""
        future: Future[list[LineScore]] = Future()
        ids = [self._vocabulary.encode(line) for line in lines]  # here, so that an invalid line is the caller's error
        self._accept([future], lambda: self._pieces.append(([future], self._score(lines, ids, future))))
        return future

    def close(self, timeout: float) -> None:
        """Accept no more work, finish accepted work for up to `timeout` seconds, and stop the thread."""
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if self._thread.ident is None:
            return
        self._thread.join(timeout)
        with self._changed:
            self._is_aborted = True
            self._changed.notify_all()
        self._thread.join()

    def _accept(self, futures: Sequence[Future[Any]], begin: Callable[[], None]) -> None:
        with self._changed:
            if self._is_closing or not self.is_alive:
                raise Closed(
                    "the server is stopping"
                    if self._is_closing
                    else "the engine has not started; use it as a context manager"
                    if self._thread.ident is None
                    else "the engine has stopped"
                )
            if len(self._unfinished) + len(futures) > self.capacity:
                raise Busy
            self._unfinished.update(futures)
            self._accepted.append(begin)
            self._changed.notify_all()
        for future in futures:
            future.add_done_callback(self._forget)

    def _forget(self, future: Future[Any]) -> None:
        with self._changed:
            self._unfinished.discard(future)
            self._changed.notify_all()

    # ------------------------------------------------------------ in the engine's own thread

    def _run(self) -> None:
        try:
            self._reset()
            self._step()  # of padding alone, for what MXNet does once
        except Exception as error:
            self._failure = error
            self._fail_unfinished(error)
            return
        finally:
            self._is_ready.set()
        while self._wait_for_work():
            try:
                self._drop_cancelled()
                self._fill_slots()
                self._advance_pieces()
                if self.num_live:
                    self._step()
            except Exception as error:
                LOGGER.exception("the engine failed; all work in progress is given up")
                self._fail_all(error)
        self._fail_all(Closed("the server is stopping"))

    def _wait_for_work(self) -> bool:
        """Take over accepted work, sleeping while there is nothing to do; False when the thread must end."""
        with self._changed:
            while not self._is_aborted and not self._accepted and not self._has_work():
                if self._is_closing:
                    return False
                self._changed.wait()
            accepted, self._accepted = self._accepted, []
        for begin in accepted:
            begin()
        return not self._is_aborted

    def _has_work(self) -> bool:
        return bool(self._waiting or self._pieces or self.num_live)

    def _reset(self) -> None:
        self._slots = [None] * self.num_slots
        self._states = self._predictor.begin_state(self.num_slots)
        self._waiting.clear()
        self._pieces.clear()

    def _fail_all(self, error: Exception) -> None:
        self._fail_unfinished(error)
        self._reset()

    def _fail_unfinished(self, error: Exception) -> None:
        with self._changed:
            futures = [*self._unfinished]
            self._accepted.clear()
        for future in futures:
            if not future.done() and future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        self._slots = [None if text is None or text.done.cancelled() else text for text in self._slots]
        self._waiting = deque(text for text in self._waiting if not text.done.cancelled())
        self._pieces = deque(entry for entry in self._pieces if not all(future.cancelled() for future in entry[0]))

    def _fill_slots(self) -> None:
        for slot, occupant in enumerate(self._slots):
            if not self._waiting:
                return
            if occupant is None:
                text = self._slots[slot] = self._waiting.popleft()
                for i, state_1NH in enumerate(self._states):
                    state_1NH[:, slot : slot + 1] = 0 if text.states is None else text.states[i]
                text.states = None

    def _advance_pieces(self) -> None:
        """Read prompts and lines in turn, a few pieces between two steps, so that texts are not held up."""
        for _ in range(min(_PIECES_PER_STEP, len(self._pieces))):
            futures, pieces = self._pieces.popleft()
            if next(pieces, pieces) is not pieces:
                self._pieces.append((futures, pieces))

    def _read_prompt(self, before: Sequence[int], texts: Sequence[_Text]) -> Iterator[None]:
        """Read the words before the last of a prompt once for all texts that continue it."""
        states = self._predictor.begin_state(1)
        for start in range(0, len(before), _WORDS_PER_PIECE):
            piece = before[start : start + _WORDS_PER_PIECE]
            states = self._predictor.read(np.array(piece, np.int32)[:, None], states)
            yield
        for text in texts:
            text.states = states
            self._waiting.append(text)

    def _score(
        self, lines: Sequence[Sequence[str]], ids: Sequence[np.ndarray], future: Future[list[LineScore]]
    ) -> Iterator[None]:
        eos = self._vocabulary.eos_id
        scores, num_read = [], 0
        for line, ids_of_line in zip(lines, ids):
            targets = [*ids_of_line, eos]
            tokens = [eos, *targets[:-1]]
            states = self._predictor.begin_state(1)
            log_probs = []
            for start in range(0, len(targets), _WORDS_PER_PIECE):
                piece = slice(start, start + _WORDS_PER_PIECE)
                losses_R, states = self._losses(tokens[piece], targets[piece], states)
                log_probs.append(-losses_R.asnumpy())
                num_read += max(len(losses_R), _WORDS_PER_PIECE // 4)  # one word takes about as long as these
                if num_read >= _WORDS_PER_PIECE:  # short lines together make one piece
                    num_read = 0
                    yield
            scores.append(LineScore.of(line, np.concatenate(log_probs), self._vocabulary))
        _finish(future, scores)

    def _losses(self, tokens: Sequence[int], targets: Sequence[int], states: State) -> tuple[mx.nd.NDArray, State]:
        device = self._predictor.device
        tokens_T1 = mx.nd.array(np.array(tokens)[:, None], ctx=device, dtype="int32")
        return self._predictor.target_losses(tokens_T1, mx.nd.array(targets, ctx=device, dtype="int32"), states)

    def _step(self) -> None:
        """Write the next word of every text that has a slot."""
        texts = self._slots
        tokens_1N = np.array([[0 if text is None else text.last_word for text in texts]])
        uniforms_N = np.array([0.0 if text is None else text.rng.random(dtype=np.float32) for text in texts])
        sampling = [AS_IS if text is None else text.request.sampling for text in texts]
        if sampling != self._sampling:
            self._sampling = sampling
            self._sampler.set(sampling)
        tokens_1N, self._states = self._sampler(
            mx.nd.array(tokens_1N, ctx=self._predictor.device, dtype="int32"), self._states, uniforms_N
        )
        for slot, (text, word) in enumerate(zip(texts, tokens_1N.asnumpy()[0].tolist())):
            if text is not None and not self._extend(text, word):
                self._slots[slot] = None

    def _extend(self, text: _Text, word: int) -> bool:
        """Add a word to a text; returns whether it continues."""
        text.last_word = word
        text.words.append(self._vocabulary.words[word])
        self.num_words += 1
        if text.on_word is not None:
            try:
                text.on_word(text.words[-1])
            except Exception as error:
                if text.done.set_running_or_notify_cancel():
                    text.done.set_exception(error)
                return False
        has_ended = text.request.stop_at_eos and word == self._vocabulary.eos_id
        if len(text.words) < text.request.num_words and not has_ended:
            return True
        _finish(text.done, text.words)
        return False


def _bind(on_word: Callable[[int, str], None], place: int) -> Callable[[str], None]:
    return lambda word: on_word(place, word)


def _finish(future: Future[Any], result: Any) -> None:
    if future.set_running_or_notify_cancel():
        future.set_result(result)
