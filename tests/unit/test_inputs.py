"""Words on their way to the devices: what was sent ahead is what was asked for."""

from __future__ import annotations

import mxnet as mx
import numpy as np

from gluon_lm.data.windows import Streams
from gluon_lm.inputs import InputCopies

CPUS = [mx.cpu(0), mx.cpu(1)]


def test_what_was_sent_ahead_is_what_is_taken_and_nothing_else_is():
    first, second, last = Streams(np.arange(8, dtype=np.int32), num_streams=3, eos=7).windows(1)
    copies = InputCopies()
    parts = [(0, 2, CPUS[0]), (2, 3, CPUS[1])]
    for window, upcoming in ((first, second), (second, first), (last, None)):  # the last is not the one sent ahead
        for start, stop, device in parts:
            expected = window.columns(start, stop)
            if not expected.num_targets:  # the last row ends before these columns
                continue
            tokens_TN, targets_R = copies.take(window, start, stop, device)
            assert tokens_TN.context == targets_R.context == device
            assert tokens_TN.dtype == targets_R.dtype == np.int32
            np.testing.assert_array_equal(tokens_TN.asnumpy(), expected.tokens_TN)
            np.testing.assert_array_equal(targets_R.asnumpy(), expected.targets_TN.ravel()[: expected.num_targets])
        if upcoming is not None:
            copies.begin(upcoming)
    assert last.columns(2, 3).num_targets == 0


def test_copies_that_were_begun_are_handed_out_once():
    first, second = Streams(np.arange(8, dtype=np.int32), num_streams=2, eos=7).windows(2)
    copies = InputCopies()
    copies.take(first, 0, 2, CPUS[0])
    copies.begin(second)
    second.tokens_TN[:] = 0  # nothing reads the window again
    taken, _ = copies.take(second, 0, 2, CPUS[0])
    assert taken.asnumpy().any()
    anew, _ = copies.take(second, 0, 2, CPUS[0])
    assert not anew.asnumpy().any()
