"""The sampled softmax in training: what it draws, its loss and gradients, and what a step touches."""

from __future__ import annotations

import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import (
    build_model,
    build_step,
    communicator_on,
    gradients_of,
    int32,
    random_ids,
    relative_error,
    take_steps,
    values_of,
)

from gluon_lm import losses
from gluon_lm.data.windows import Streams
from gluon_lm.losses import backward_through_head
from gluon_lm.models import SampledHead
from gluon_lm.optim import rows

V, S = 60, 12


def draws(count, vocab_size=V, num_sampled=S):
    head = SampledHead(vocab_size, 3, num_sampled)
    return [head.for_window(np.random.default_rng(seed)) for seed in range(count)]


def assert_within_five_errors(samples, expected):
    """Of the mean of independent samples, along the first axis."""
    error = samples.std(axis=0) / len(samples) ** 0.5
    assert np.all(np.abs(samples.mean(axis=0) - expected) < 5 * error)


# ---------------------------------------------------------------- the sample


def test_a_sample_is_the_first_different_words_of_log_uniform_draws():
    probs_V = np.log((np.arange(V) + 2) / (np.arange(V) + 1)) / np.log(V + 1)
    rng, expected_V = np.random.RandomState(3), np.zeros(V)
    for _ in range(4000):
        seen: dict[int, None] = {}
        for word in rng.choice(V, 1000, p=probs_V):
            seen[word] = None
            if len(seen) == S:
                break
        expected_V[list(seen)] += 1 / 4000
    samples = draws(4000)
    assert all(np.array_equal(sample.ids_S, np.unique(sample.ids_S)) and len(sample.ids_S) == S for sample in samples)
    included = np.array([np.bincount(sample.ids_S, minlength=V) for sample in samples])
    error = (expected_V * (1 - expected_V) * 2 / 4000) ** 0.5
    assert np.all(np.abs(included.mean(axis=0) - expected_V) < 5 * error)


@pytest.mark.parametrize("num_sampled", [1, S, V - 1])
def test_sums_over_the_sample_divided_by_the_expected_counts_are_those_over_all_words(num_sampled):
    values_V = np.random.RandomState(5).uniform(0, 1, (3, V))
    found = np.array(
        [
            (values_V[:, sample.ids_S] / sample.expected_V[sample.ids_S]).sum(axis=1)
            for sample in draws(4000, num_sampled=num_sampled)
        ]
    )
    assert_within_five_errors(found, values_V.sum(axis=1))


# ---------------------------------------------------------------- loss and gradients


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows_in_chunk", [7, 1024])
def test_loss_and_gradients_agree_with_numpy(tied, rows_in_chunk, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", rows_in_chunk)
    model = build_model(vocab_size=V, tied=tied, num_sampled=S)
    width = model.encoder.layer_sizes[-1]
    parameters, sample = values_of(model), model.head.for_window(np.random.default_rng(2))
    hidden_RH = np.random.RandomState(1).randn(24, width).astype(np.float32)
    targets_R = np.random.RandomState(2).randint(0, V, 24)
    targets_R[:6] = sample.ids_S[[0, 0, 3, -1, -1, 5]]  # words that the sample has too, and some twice
    expected_R, expected, by_hidden_RH = reference.sampled_loss_and_gradients(
        parameters, hidden_RH.astype(np.float64), targets_R, sample.ids_S, sample.expected_V
    )
    loss, grad_RF = backward_through_head(sample, mx.nd.array(hidden_RH), int32(targets_R))
    assert loss.asscalar() == pytest.approx(expected_R.sum(), rel=1e-5)
    assert relative_error(grad_RF.asnumpy(), by_hidden_RH) < 1e-5
    found = gradients_of(model)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-5, name
    filled = sample.gradient_rows(targets_R)
    for name in expected:
        assert not np.delete(found[name], filled, axis=0).any()


def test_the_references_gradients_are_the_slopes_of_its_loss():
    parameters, rng = values_of(build_model(vocab_size=V)), np.random.RandomState(4)
    hidden_RH, targets_R, ids, expected_V = rng.randn(9, 5), rng.randint(0, V, 9), np.arange(0, V, 5), rng.rand(V)

    def loss():
        return reference.sampled_loss_and_gradients(parameters, hidden_RH, targets_R, ids, expected_V)

    _, gradients, by_hidden_RH = loss()
    for value, gradient in [(hidden_RH, by_hidden_RH), *((parameters[name], gradients[name]) for name in gradients)]:
        direction = rng.randn(*value.shape)
        value += 1e-6 * direction
        above = loss()[0].sum()
        value -= 2e-6 * direction
        below = loss()[0].sum()
        value += 1e-6 * direction
        assert (above - below) / 2e-6 == pytest.approx((gradient * direction).sum(), rel=1e-6)


def test_a_model_that_has_the_words_frequencies_is_left_alone():
    counts_W = np.array([20, 12, 9, 7, 6, 5, 4, 3, 3, 2, 2, 2, 2, 1, 1, 1])
    targets_R, size = np.repeat(np.arange(16), counts_W), len(counts_W)
    head = build_model(vocab_size=size, num_sampled=8).head
    head.decoder.weight.set_data(mx.nd.zeros((size, 5)))
    head.decoder.bias.set_data(mx.nd.log(mx.nd.array(counts_W)))
    found, uncorrected = [], []
    for seed in range(300):
        sample = head.for_window(np.random.default_rng(seed))
        head.decoder.bias.zero_grad()
        backward_through_head(sample, mx.nd.zeros((len(targets_R), 5)), int32(targets_R))
        found.append(head.decoder.bias.grad().asnumpy())
        sample.expected_V = np.ones(size)
        head.decoder.bias.zero_grad()
        backward_through_head(sample, mx.nd.zeros((len(targets_R), 5)), int32(targets_R))
        uncorrected.append(head.decoder.bias.grad().asnumpy())
    assert_within_five_errors(np.array(found), 0)
    with pytest.raises(AssertionError):
        assert_within_five_errors(np.array(uncorrected), 0)


MEMORY = """
from pathlib import Path
from gluon_lm.runtime import prepare_process
prepare_process(keep_up_to=1 << 20)
from gluon_lm.losses import backward_through_head
from gluon_lm.models import HEADS
from gluon_lm.config import ModelConfig
import mxnet as mx, numpy as np, sys

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024

config = ModelConfig(embed_size=64, hidden_size=64, num_sampled=100 if sys.argv[1] == "sampled" else None)
head = HEADS[config.head](config, 400_000, None)
for parameter in head.collect_params().values():
    parameter.initialize(mx.init.Zero())
    parameter.grad_req = "add"
features, targets = mx.nd.ones((8, 64)), mx.nd.zeros((8,), dtype="int32")
head._workspace(8 * 400_000, mx.cpu())[:] = 0
mx.nd.waitall()
before = peak()
for seed in range(6):
    backward_through_head(head.for_window(np.random.default_rng(seed)), features, targets)
    mx.nd.waitall()
print(peak() - before)
"""


@pytest.mark.parametrize(("head", "matrices"), [("sampled", 0), ("softmax", 1)])
def test_room_beside_the_matrix_and_its_gradient(head, matrices):
    """A sample needs none of that size; a whole softmax has one in which a gradient is before it is added."""
    printed = subprocess.run(
        [sys.executable, "-c", MEMORY, head], check=True, capture_output=True, text=True, timeout=120
    ).stdout
    assert float(printed) < 102.4 * (matrices + 0.5)  # a matrix has 102.4 MB


# ---------------------------------------------------------------- in the training step

BATCH, BPTT = 4, 5
NUM_TOKENS = 3 * BPTT * BATCH + 6  # the last window is short


def build_step_on(num_devices=1, **settings):
    return build_step(communicator_on(num_devices), **{"clip_norm": 0.3, "vocab_size": V, **settings})


def train(step, numbers, seed=3):
    return take_steps(step, Streams(random_ids(NUM_TOKENS, 4, V), BATCH, 0).windows(BPTT), numbers, seed)


@pytest.fixture
def drawn(monkeypatch):
    """The samples that all heads draw, in order."""
    found, draw = [], SampledHead.for_window

    def note(head, rng):
        sample = draw(head, rng)
        found.append(sample.ids_S.tolist())
        return sample

    monkeypatch.setattr(SampledHead, "for_window", note)
    return found


def test_each_step_and_device_has_its_own_sample_that_depends_on_the_seed_alone(drawn):
    train(build_step_on(num_devices=2, num_sampled=S)[1], range(5))
    first = drawn.copy()
    assert len({tuple(ids) for ids in first}) == 10
    drawn.clear()
    mx.nd.random.uniform(shape=(3,))
    np.random.rand()
    train(build_step_on(num_devices=2, num_sampled=S)[1], range(3, 5))  # as a run that is resumed there
    assert drawn == first[6:]
    drawn.clear()
    train(build_step_on(num_devices=2, num_sampled=S)[1], range(5), seed=4)
    assert not {tuple(ids) for ids in drawn} & {tuple(ids) for ids in first}


@pytest.mark.parametrize("clip_norm", [None, 0.05])
@pytest.mark.parametrize(
    "head", [{}, {"num_sampled": S}, {"num_sampled": S, "tied": True}, {"cutoffs": (20,)}], ids=str
)
@pytest.mark.parametrize("small_batch_size", [None, 2])
def test_updating_the_filled_rows_alone_is_updating_all(head, clip_norm, small_batch_size, monkeypatch):
    found = []
    for worth_it in (0, 10**9):
        monkeypatch.setattr(rows, "_WORTH_IT", worth_it)
        model, step = build_step_on(clip_norm=clip_norm, small_batch_size=small_batch_size, **head)
        first = values_of(model)
        longest = Streams(np.arange(NUM_TOKENS, dtype=np.int32) % V, BATCH, 0).window(0, 2 * BPTT)
        step.rehearse(longest)
        train(step, range(10))
        assert bool(step._filled.by_index) == (worth_it == 0)
        found.append(values_of(model))
    for name, value in found[0].items():
        assert relative_error(value, found[1][name]) < 1e-6, name
        assert relative_error(value, first[name]) > 1e-4, name


@pytest.mark.parametrize("settings", [{"weight_decay": 0.01}, {"optimizer": "adam"}, {"num_devices": 2}], ids=str)
def test_what_changes_every_row_updates_all(settings, monkeypatch):
    monkeypatch.setattr(rows, "_WORTH_IT", 0)
    _, step = build_step_on(num_sampled=S, **settings)
    train(step, range(2))
    assert not step._filled.by_index
