"""Streams, windows and epochs: no token lost, none twice, each predicted from the one before it."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given, strategies as st

from gluon_lm.data.windows import Streams, TrainingWindows, Window

EOS = 7


@st.composite
def texts(draw):
    """A text of different ids, none of them EOS, with a number of streams and a window length."""
    num_tokens = draw(st.integers(1, 60))
    return (
        np.arange(100, 100 + num_tokens, dtype=np.int32),
        draw(st.integers(1, num_tokens)),
        draw(st.integers(1, 70)),
    )


def columns_of(windows, num_streams):
    """(inputs, targets) of each column over all windows, padding left out."""
    columns = [([], []) for _ in range(num_streams)]
    for window in windows:
        for k in range(window.num_targets):
            row, n = divmod(k, num_streams)
            columns[n][0].append(window.tokens_TN[row, n])
            columns[n][1].append(window.targets_TN[row, n])
    return columns


@given(texts())
def test_every_token_is_the_target_once_in_order_and_follows_its_input(text):
    ids, num_streams, length = text
    windows = list(Streams(ids, num_streams, EOS).windows(length))
    columns = columns_of(windows, num_streams)
    assert [target for _, targets in columns for target in targets] == ids.tolist()
    for inputs, targets in columns:
        assert inputs == [EOS, *targets[:-1]]
    lengths = [len(targets) for _, targets in columns]
    assert max(lengths) - min(lengths) <= 1
    assert sum(window.num_targets for window in windows) == len(ids)


@given(texts())
def test_windows_have_the_asked_length_and_only_the_last_row_is_short(text):
    ids, num_streams, length = text
    *whole, last = Streams(ids, num_streams, EOS).windows(length)
    for window in whole:
        assert window.tokens_TN.shape == window.targets_TN.shape == (length, num_streams)
        assert window.num_targets == length * num_streams
    rows = len(last.targets_TN)
    assert 1 <= rows <= length
    assert (rows - 1) * num_streams < last.num_targets <= rows * num_streams


@given(texts(), st.data())
def test_a_window_starts_at_any_row(text, data):
    ids, num_streams, length = text
    streams = Streams(ids, num_streams, EOS)
    start = data.draw(st.integers(0, streams.num_rows - 1))
    whole, part = streams.window(0, streams.num_rows), streams.window(start, length)
    stop = start + len(part.targets_TN)
    assert stop == min(start + length, streams.num_rows)
    kept = part.num_targets
    np.testing.assert_array_equal(part.targets_TN.reshape(-1)[:kept], whole.targets_TN[start:stop].reshape(-1)[:kept])
    np.testing.assert_array_equal(part.tokens_TN.reshape(-1)[:kept], whole.tokens_TN[start:stop].reshape(-1)[:kept])


@given(texts(), st.data())
def test_columns_partition_a_window(text, data):
    ids, num_streams, length = text
    cuts = sorted(data.draw(st.sets(st.integers(1, num_streams), max_size=8)) | {0, num_streams})
    for window in Streams(ids, num_streams, EOS).windows(length):
        parts = [window.columns(start, stop) for start, stop in zip(cuts, cuts[1:])]
        np.testing.assert_array_equal(np.concatenate([p.tokens_TN for p in parts], axis=1), window.tokens_TN)
        np.testing.assert_array_equal(np.concatenate([p.targets_TN for p in parts], axis=1), window.targets_TN)
        assert sum(part.num_targets for part in parts) == window.num_targets
        real = set(window.targets_TN.reshape(-1)[: window.num_targets].tolist())
        assert {t for p in parts for t in p.targets_TN.reshape(-1)[: p.num_targets].tolist()} == real


def test_a_text_in_numbers():
    windows = list(Streams(np.arange(1, 9, dtype=np.int32), num_streams=3, eos=0).windows(2))
    assert [window.num_targets for window in windows] == [6, 2]
    np.testing.assert_array_equal(windows[0].targets_TN, [[1, 4, 7], [2, 5, 8]])
    np.testing.assert_array_equal(windows[0].tokens_TN, [[0, 0, 0], [1, 4, 7]])
    np.testing.assert_array_equal(windows[1].targets_TN[:, :2], [[3, 6]])
    np.testing.assert_array_equal(windows[1].tokens_TN[:, :2], [[2, 5]])


@pytest.mark.parametrize(("start", "stop", "num_targets"), [(0, 2, 4), (2, 4, 3), (4, 6, 2), (0, 6, 9)])
def test_columns_count_a_short_last_row(start, stop, num_targets):
    window = Window(np.zeros((2, 6), np.int32), np.zeros((2, 6), np.int32), num_targets=9)
    assert window.columns(start, stop).num_targets == num_targets


def test_ids_in_a_read_only_memory_map(tmp_path):
    ids = np.arange(10, dtype=np.int32)
    ids.tofile(tmp_path / "ids")
    mapped = np.memmap(tmp_path / "ids", dtype=np.int32, mode="r")
    window = Streams(mapped, 2, EOS).window(0, 5)
    assert window.tokens_TN.dtype == window.targets_TN.dtype == np.int32
    np.testing.assert_array_equal(window.tokens_TN[0], [EOS, EOS])
    np.testing.assert_array_equal(mapped, ids)


# ---------------------------------------------------------------- epochs of random windows


@st.composite
def contiguous_windows(draw):
    """A text, and the settings of windows that follow each other."""
    num_streams = draw(st.integers(1, 5))
    ids = np.arange(100, 100 + draw(st.integers(num_streams, 400)), dtype=np.int32)
    bptt = draw(st.integers(1, 30))
    seed = draw(st.integers(0, 2**31 - 1))
    delta, random_start = draw(st.none() | st.integers(0, 20)), draw(st.booleans())
    return TrainingWindows(ids, num_streams, bptt, EOS, seed, max_seq_len_delta=delta, random_start=random_start), {
        "ids": ids,
        "num_streams": num_streams,
        "bptt": bptt,
        "longest": bptt + (delta or 0),
    }


@st.composite
def shuffled_windows(draw):
    """A text that is just long enough, or longer, and the settings of windows in random order."""
    num_streams, bptt = draw(st.integers(1, 5)), draw(st.integers(1, 12))
    random_start = draw(st.booleans())
    num_tokens = (num_streams + random_start) * bptt + draw(st.integers(0, 200))
    ids = np.arange(100, 100 + num_tokens, dtype=np.int32)
    seed = draw(st.integers(0, 2**31 - 1))
    windows = TrainingWindows(ids, num_streams, bptt, EOS, seed, random_start=random_start, shuffle=True)
    return windows, ids, num_streams, bptt


def windows_of(epoch):
    return [epoch.window(k) for k in range(len(epoch))]


def contents(epoch):
    return [(w.tokens_TN.tolist(), w.targets_TN.tolist(), w.num_targets) for w in windows_of(epoch)]


@given(contiguous_windows(), st.integers(0, 5))
def test_however_it_is_cut_an_epoch_has_every_token_as_target_once_in_order(drawn, number):
    training_windows, expected = drawn
    epoch = training_windows.epoch(number)
    assert epoch.carries_state
    columns = columns_of(windows_of(epoch), expected["num_streams"])
    assert [target for _, targets in columns for target in targets] == expected["ids"].tolist()
    for inputs, targets in columns:
        assert inputs == [EOS, *targets[:-1]]


@given(contiguous_windows(), st.integers(0, 5))
def test_lengths_stay_within_their_bound_and_sizes_are_relative_to_a_whole_window_of_bptt(drawn, number):
    training_windows, expected = drawn
    epoch = training_windows.epoch(number)
    windows = windows_of(epoch)
    rows = [len(window.targets_TN) for window in windows]
    assert 1 <= min(rows) and max(rows) <= expected["longest"]
    relative = [training_windows.relative_size(window) for window in windows]
    assert relative[:-1] == [length / expected["bptt"] for length in rows[:-1]]
    assert sum(relative) * expected["bptt"] * expected["num_streams"] == pytest.approx(len(expected["ids"]))


@given(contiguous_windows() | shuffled_windows(), st.permutations(range(4)))
def test_an_epoch_depends_on_its_number_alone_and_not_on_what_was_asked_before(drawn, order):
    training_windows = drawn[0]
    first = [contents(training_windows.epoch(number)) for number in range(4)]
    assert [contents(training_windows.epoch(number)) for number in order] == [first[number] for number in order]


@pytest.mark.parametrize(
    ("bptt", "settings"),
    [(20, {"max_seq_len_delta": 5}), (2000, {"random_start": True}), (20, {"shuffle": True})],
    ids=["random lengths", "random start", "shuffled"],
)
def test_epochs_and_seeds_differ_and_equal_seeds_agree(bptt, settings):
    ids = np.arange(5000, dtype=np.int32)
    by_seed = [TrainingWindows(ids, 2, bptt, EOS, seed, **settings) for seed in (1, 2, 1)]
    epochs = [[contents(windows.epoch(number)) for number in range(20)] for windows in by_seed]
    assert epochs[0] == epochs[2]
    # Chance alone makes two of 40 starts below 2,000 equal one time in three, and three pairs one time in 130.
    assert len({str(epoch) for epoch in (*epochs[0], *epochs[1])}) >= 38


@pytest.mark.parametrize(("bptt", "delta"), [(70, 40), (70, 4), (35, 20), (12, 0)])
def test_lengths_are_distributed_as_published(bptt, delta):
    """Within a bound that so many draws exceed once in 10**9 (Dvoretzky, Kiefer & Wolfowitz 1956)."""
    num_draws = 300_000
    text = np.broadcast_to(np.int32(1), (bptt + delta) * num_draws)
    epoch = TrainingWindows(text, 1, bptt, EOS, seed=3, max_seq_len_delta=delta).epoch(0)
    lengths = np.array([epoch.window(k).num_targets for k in range(num_draws)])

    longest = bptt + delta
    values = np.arange(longest + 1)
    # max(5, int(x)) is at most k where x < k + 1, for k of 5 and more.
    below = [0.95 * NormalDist(bptt, 5).cdf(k + 1) + 0.05 * NormalDist(bptt / 2, 5).cdf(k + 1) for k in values]
    expected = np.where(values < 5, 0, np.where(values < longest, below, 1))
    found = np.searchsorted(np.sort(lengths), values, side="right") / num_draws
    assert np.abs(found - expected).max() < math.sqrt(math.log(2e9) / (2 * num_draws))


def test_every_start_below_bptt_is_as_likely():
    windows = TrainingWindows(np.arange(200, dtype=np.int32), 2, 8, EOS, seed=3, random_start=True)
    num_epochs = 4000
    first = np.bincount([len(windows.epoch(k).window(0).targets_TN) for k in range(num_epochs)], minlength=9)
    assert first[0] == 0  # a start at 0 is a first window of bptt
    assert np.abs(first[1:] - num_epochs / 8).max() < 5 * math.sqrt(num_epochs / 8 * 7 / 8)


def test_the_longest_window_is_as_long_as_any_can_be():
    ids = np.arange(1000, dtype=np.int32)
    assert TrainingWindows(ids, 2, 20, EOS, random_start=True).longest() is None
    assert TrainingWindows(ids, 2, 20, EOS, max_seq_len_delta=7).longest().targets_TN.shape == (27, 2)
    assert TrainingWindows(ids, 50, 20, EOS, max_seq_len_delta=7).longest().targets_TN.shape == (20, 50)


# ---------------------------------------------------------------- shuffled epochs


@given(shuffled_windows(), st.integers(0, 5))
def test_shuffled_windows_are_pieces_of_the_text_that_do_not_overlap(drawn, number):
    training_windows, ids, num_streams, bptt = drawn
    epoch = training_windows.epoch(number)
    assert len(epoch) >= 1 and not epoch.carries_state
    before = {token: previous for previous, token in itertools.pairwise([EOS, *ids.tolist()])}
    seen, phases = [], set()
    for window in windows_of(epoch):
        assert window.tokens_TN.shape == window.targets_TN.shape == (bptt, num_streams)
        assert window.tokens_TN.dtype == window.targets_TN.dtype == np.int32
        assert window.num_targets == bptt * num_streams and training_windows.relative_size(window) == 1
        for tokens, targets in zip(window.tokens_TN.T.tolist(), window.targets_TN.T.tolist()):
            assert targets == list(range(targets[0], targets[0] + bptt))
            assert tokens == [before[target] for target in targets]
            phases.add((targets[0] - 100) % bptt)
            seen += targets
    assert len(phases) == 1  # pieces lie end to end
    assert len(set(seen)) == len(seen) > len(ids) - (num_streams + 1) * bptt


def test_each_piece_is_as_likely_in_every_place():
    num_epochs, num_pieces = 2000, 8
    windows = TrainingWindows(np.arange(num_pieces * 3, dtype=np.int32), 2, 3, EOS, seed=3, shuffle=True)
    counts = np.zeros((num_pieces, num_pieces), int)
    for number in range(num_epochs):
        for k, window in enumerate(windows_of(windows.epoch(number))):
            for column, first in enumerate(window.targets_TN[0]):
                counts[2 * k + column, first // 3] += 1
    assert np.abs(counts - num_epochs / 8).max() < 5 * math.sqrt(num_epochs / 8 * 7 / 8)
