"""The 2-bit codec: equal to numpy bit for bit, nothing lost, nothing hidden."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest

from gluon_lm.distributed.codec import TwoBitCodec
from gluon_lm.errors import CheckpointError

CPU = mx.cpu(0)
# One element; sizes that are no multiples of four, or are; and one that is worked on in several pieces.
SHAPES = [(1,), (5,), (6, 4), (3, 7), (2,), (140_001,)]
SIZES = [int(np.prod(shape)) for shape in SHAPES]
THRESHOLDS = [2.0, 2.0**-5, 0.5, 2.0**-14, 64.0, 0.25]


class NumpyCodec:
    """The same rule in float32, parameter by parameter and without any packing of several into one array."""

    def __init__(self, thresholds):
        self.thresholds = np.array(thresholds, np.float32)
        self.residuals = [np.zeros(shape, np.float32) for shape in SHAPES]

    def codes(self, gradients):
        """-1, 0 or 1 for each element of each parameter, as float32."""
        found = []
        for residual, gradient, threshold in zip(self.residuals, gradients, self.thresholds):
            residual += gradient * (np.float32(1) / threshold)
            codes = np.clip(np.trunc(residual), -1, 1)
            residual -= codes
            found.append(codes)
        return found


def pack(codes):
    """Four codes to a byte, each parameter filled up with zeros, and a byte that says that all were finite."""
    padded = [np.append(c.ravel(), np.zeros(-c.size % 4)) + 1 for c in codes] + [np.ones(4)]
    quads = np.concatenate(padded).astype(np.uint8).reshape(-1, 4)
    return quads[:, 0] | quads[:, 1] << 2 | quads[:, 2] << 4 | quads[:, 3] << 6


def draw(step, rank, thresholds=THRESHOLDS):
    """One step's gradients on one rank: float32, half a threshold in size."""
    rng = np.random.RandomState(100 * step + rank)
    return [(t / 2 * rng.standard_normal(shape)).astype(np.float32) for shape, t in zip(SHAPES, thresholds)]


def on_device(arrays):
    return [mx.nd.array(array, ctx=CPU) for array in arrays]


def exchange(codecs, gradients):
    """Encode and decode as that many ranks would; what each then has, ``[rank][parameter]``, and what went between."""
    held = [on_device(arrays) for arrays in gradients]
    sent = [codec.encode(arrays) for codec, arrays in zip(codecs, held)]
    for arrays, before in zip(held, gradients):
        for array, expected in zip(arrays, before):
            np.testing.assert_array_equal(array.asnumpy(), expected)
    for codec, arrays in zip(codecs, held):
        codec.decode(mx.nd.stack(*sent), arrays)
    return [[array.asnumpy() for array in arrays] for arrays in held], [array.asnumpy() for array in sent]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("factor", [1.0, 0.6], ids=["powers-of-two", "any"])
def test_thirty_steps_agree_with_numpy_to_the_bit(num_ranks, factor):
    thresholds = [factor * threshold for threshold in THRESHOLDS]
    codecs = [TwoBitCodec(SIZES, thresholds, CPU) for _ in range(num_ranks)]
    expected = [NumpyCodec(thresholds) for _ in range(num_ranks)]
    for step in range(30):
        gradients = [draw(step, rank, thresholds) for rank in range(num_ranks)]
        found, sent = exchange(codecs, gradients)
        codes = [codec.codes(arrays) for codec, arrays in zip(expected, gradients)]
        for bytes_B, own in zip(sent, codes):
            np.testing.assert_array_equal(bytes_B, pack(own))
        for k, threshold in enumerate(np.array(thresholds, np.float32)):
            total = np.zeros(SHAPES[k], np.float32)
            for own in codes:
                total += own[k] * threshold
            for arrays in found:
                np.testing.assert_array_equal(arrays[k], total)
    for codec, reference in zip(codecs, expected):
        padded = [np.append(r.ravel(), np.zeros(-r.size % 4, np.float32)) for r in reference.residuals]
        np.testing.assert_array_equal(codec.residual.asnumpy(), np.concatenate(padded))


def test_what_was_sent_and_what_waits_add_up_to_the_gradients():
    """Exactly, where every sum fits into a float32: gradients are multiples of 2^-9 thresholds here."""
    codec, steps = TwoBitCodec(SIZES, THRESHOLDS, CPU), 30
    sent = [np.zeros(shape) for shape in SHAPES]
    total = [np.zeros(shape) for shape in SHAPES]
    for step in range(steps):
        gradients = [np.clip(np.round(512 * g / t), -512, 512) / 512 * t for g, t in zip(draw(step, 0), THRESHOLDS)]
        ((found), *_), _ = exchange([codec], [gradients])
        for k in range(len(SHAPES)):
            sent[k] += found[k]
            total[k] += gradients[k]
    residual = codec.residual.asnumpy().astype(np.float64)
    # No gradient was larger than a threshold, so no more than one waits.
    assert 0.9 < np.abs(residual).max() < 1
    offset = 0
    for k, threshold in enumerate(THRESHOLDS):
        waiting = residual[offset : offset + SIZES[k]].reshape(SHAPES[k]) * threshold
        np.testing.assert_array_equal(sent[k] + waiting, total[k])
        offset += SIZES[k] + -SIZES[k] % 4
    assert offset == residual.size


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("parameter", "element"), [(0, 0), (3, 20), (5, 140_000)])
def test_one_element_that_is_not_finite_is_seen_by_every_rank(what, rank, parameter, element):
    codecs = [TwoBitCodec(SIZES, THRESHOLDS, CPU) for _ in range(2)]
    found, _ = exchange(codecs, [draw(0, 0), draw(0, 1)])
    assert all(np.isfinite(array).all() for arrays in found for array in arrays)
    gradients = [draw(1, 0), draw(1, 1)]
    gradients[rank][parameter].flat[element] = what
    found, _ = exchange(codecs, gradients)
    for arrays in found:
        assert not all(np.isfinite(array).all() for array in arrays)


def test_a_codec_goes_on_from_a_kept_residual():
    first = [TwoBitCodec(SIZES, THRESHOLDS, CPU) for _ in range(2)]
    for step in range(3):
        exchange(first, [draw(step, rank) for rank in range(2)])
    again = [TwoBitCodec(SIZES, THRESHOLDS, CPU, codec.residual) for codec in first]
    fresh = [TwoBitCodec(SIZES, THRESHOLDS, CPU) for _ in range(2)]
    gradients = [draw(3, rank) for rank in range(2)]
    expected, sent = exchange(first, gradients)
    found, sent_again = exchange(again, gradients)
    _, sent_afresh = exchange(fresh, gradients)
    for k in range(len(SHAPES)):
        np.testing.assert_array_equal(found[0][k], expected[0][k])
    np.testing.assert_array_equal(sent_again, sent)
    assert np.mean(np.array(sent_afresh) != sent) > 0.1


def test_a_residual_of_another_model_is_refused():
    with pytest.raises(
        CheckpointError, match=r"shape \(8,\) and must have \(16,\); they are of another model"
    ) as caught:
        TwoBitCodec([1, 9], [1.0, 1.0], CPU, mx.nd.zeros((8,)))
    assert "\n" not in str(caught.value)


def test_two_bits_an_element_and_a_byte():
    codec = TwoBitCodec([4, 1, 4000], [1.0] * 3, CPU)
    assert codec.encode([mx.nd.zeros((size,)) for size in (4, 1, 4000)]).shape == (1 + 1 + 1000 + 1,)
