"""Streams and windows: no token lost, none twice, each predicted from the one before it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gluon_lm.data.windows import Streams, Window

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
