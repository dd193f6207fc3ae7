"""The training step: the same on any number of devices, equal to numpy's, safe where it is not finite."""

from __future__ import annotations

from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import (
    VOCAB_SIZE,
    build_step,
    communicator_on,
    random_ids,
    relative_error,
    take_steps,
    values_of,
)

from gluon_lm.config import OptimConfig
from gluon_lm.data.windows import Streams
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.distributed.compression import CALIBRATION_STEPS
from gluon_lm.distributed.kvstore import KVStoreCommunicator
from gluon_lm.errors import CheckpointError, DistributedError, TrainingDiverged
from gluon_lm.inputs import InputCopies
from gluon_lm.optim.norms import square_sums
from gluon_lm.training import step as step_module
from gluon_lm.training.loss_scale import LossScale
from gluon_lm.training.step import TrainingStep, step_seed

EOS, BATCH, BPTT = 0, 4, 5
# Windows of an epoch: three of 20 targets and one of 6, whose second row is short.
NUM_TOKENS = 3 * BPTT * BATCH + 6


def text(num_tokens=NUM_TOKENS):
    return random_ids(num_tokens, seed=4)


# Every regulariser of an AWD-LSTM that draws a mask.
MASKS = {
    "model": "awd-lstm",
    "dropout": 0.2,
    "dropout_input": 0.3,
    "dropout_hidden": 0.2,
    "dropout_embed": 0.1,
    "weight_drop": 0.3,
}


def train(step, num_steps=10, ids=None, seed=3):
    """Take steps over the text, or another one; what each returned."""
    return take_steps(step, Streams(text() if ids is None else ids, BATCH, EOS).windows(BPTT), range(num_steps), seed)


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(("num_devices", "kvstore"), [(2, "device"), (4, "local")])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.3, "model": "lstm"},
        {"clip_norm": 0.3, "model": "gru", "tied": True},
        {"clip_norm": None, "model": "lstm", "tied": True, "optimizer": "adam", "lr": 0.01},
        {"clip_norm": 0.3, "model": "awd-lstm", "tied": True, "alpha": 2.0, "beta": 1.0, "weight_decay": 0.01},
        {"clip_norm": None, "model": "awd-gru", "alpha": 20.0, "beta": 30.0},
        {"clip_norm": 0.3, "num_experts": 3, "tied": True, "alpha": 2.0, "beta": 1.0},
        {"clip_norm": 0.3, "num_sampled": VOCAB_SIZE, "tied": True},
        {"clip_norm": 0.3, "cutoffs": (3,)},
    ],
    ids=[
        "sgd-clip",
        "sgd-clip-gru-tied",
        "adam-tied",
        "penalties-decay-awd-tied",
        "penalties-awd-gru",
        "mixture",
        "all-sampled-tied",
        "adaptive",
    ],
)
def test_any_number_of_devices_gives_the_parameters_of_one(num_devices, kvstore, settings):
    one, one_step = build_step(communicator_on(1), **settings)
    many, many_step = build_step(communicator_on(num_devices, kvstore), **settings)
    first = values_of(one)
    for expected, found in zip(train(one_step), train(many_step)):
        assert found.num_targets == expected.num_targets
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    expected = values_of(one)
    for i in range(num_devices):
        for name, value in values_of(many, mx.cpu(i)).items():
            assert relative_error(value, expected[name]) < 1e-5, name
            assert relative_error(first[name], expected[name]) > 1e-3, name


@pytest.mark.parametrize(("num_devices", "small_batch_size"), [(1, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("num_experts", [None, 3])
def test_a_batch_in_small_parts_gives_the_parameters_of_the_whole(num_devices, small_batch_size, num_experts):
    settings = {"clip_norm": 0.3, "num_experts": num_experts, "alpha": 2.0, "beta": 1.0}
    whole, whole_step = build_step(communicator_on(1), **settings)
    parts, parts_step = build_step(communicator_on(num_devices), small_batch_size=small_batch_size, **settings)
    for expected, found in zip(train(whole_step), train(parts_step)):
        assert found.num_targets == expected.num_targets
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-5)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-5)
    for i in range(num_devices):
        for name, value in values_of(parts, mx.cpu(i)).items():
            assert relative_error(value, values_of(whole)[name]) < 1e-5, name
    for state, expected in zip(parts_step.carried_state(), whole_step.states[0]):
        assert relative_error(state.asnumpy(), expected.asnumpy()) < 1e-5


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_last_row", [1, 2])
def test_a_last_row_that_does_not_reach_every_device(tied, in_last_row):
    """The last window is one short row: some devices have no target in it."""
    num_tokens = BPTT * BATCH + in_last_row
    one, one_step = build_step(communicator_on(1), tied=tied)
    four, four_step = build_step(communicator_on(4), tied=tied)
    results = train(one_step, 4, text(num_tokens)), train(four_step, 4, text(num_tokens))
    assert [result.num_targets for result in results[1]] == [20, in_last_row] * 2
    assert [r.loss_sum for r in results[1]] == pytest.approx([r.loss_sum for r in results[0]], rel=1e-5)
    for i in range(4):
        for name, value in values_of(four, mx.cpu(i)).items():
            assert relative_error(value, values_of(one)[name]) < 1e-5, name


@pytest.mark.parametrize("num_devices", [1, 2])
def test_states_are_carried_on_each_device(num_devices):
    model, step = build_step(communicator_on(num_devices))
    assert step.states is None
    train(step, 1)
    assert len(step.states) == num_devices
    for i, states in enumerate(step.states):
        assert [state.context for state in states] == [mx.cpu(i)] * 4
        assert all(state.shape[1] == BATCH // num_devices for state in states)
        assert all(np.abs(state.asnumpy()).max() > 0 for state in states)


@pytest.mark.parametrize(("num_before", "num_after"), [(1, 4), (4, 2), (2, 1)])
def test_states_are_carried_on_to_another_number_of_devices(num_before, num_after):
    _, before = build_step(communicator_on(num_before))
    _, after = build_step(communicator_on(num_after))
    train(before, 1)
    after.restore_carried_state(before.carried_state(), BATCH, Path("run"))
    assert [state.context for states in after.states for state in states] == [
        mx.cpu(i) for i in range(num_after) for _ in range(4)
    ]
    for state, expected in zip(after.carried_state(), before.carried_state()):
        assert state.shape[1] == BATCH
        np.testing.assert_array_equal(state.asnumpy(), expected.asnumpy())
    before.states = None
    after.restore_carried_state(before.carried_state(), BATCH, Path("run"))
    assert after.states is None


@pytest.mark.parametrize(
    "change", [{"num_layers": 3}, {"num_layers": 1}, {"hidden_size": 7}, {"model": "gru"}], ids=str
)
def test_a_state_of_another_model_or_batch_is_not_carried_on(change):
    _, before = build_step(communicator_on(1))
    _, after = build_step(communicator_on(1), **change)
    train(before, 1)
    for step, batch_size in ((after, BATCH), (before, 2 * BATCH)):
        with pytest.raises(CheckpointError, match=rf"^run: [^\n]* with --batch-size {batch_size} has [^\n]*$"):
            step.restore_carried_state(before.carried_state(), batch_size, Path("run"))


# ---------------------------------------------------------------- against numpy


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": None},
        {"clip_norm": 0.05},
        {"clip_norm": 100.0},
        {"clip_norm": 0.05, "model": "rnn_tanh", "tied": True},
        {"clip_norm": None, "optimizer": "adam", "lr": 0.01},
        {"clip_norm": 0.05, "num_sampled": VOCAB_SIZE},
        {"clip_norm": 0.05, "cutoffs": (3,)},
    ],
    ids=["mean", "clipped", "not-clipped", "clipped-tied", "adam", "all-sampled", "adaptive"],
)
def test_ten_steps_agree_with_numpy(num_devices, settings):
    model, step = build_step(communicator_on(num_devices), **settings)
    cell, lr = settings.get("model", "lstm"), settings.get("lr", 0.5)
    rule = reference.Adam(lr) if settings.get("optimizer") == "adam" else reference.SGD(lr)
    parameters = values_of(model)
    windows = list(Streams(text(), BATCH, EOS).windows(BPTT))
    for k, result in enumerate(train(step)):
        if k % len(windows) == 0:
            states = reference.zero_states(cell, parameters, BATCH)
        window = windows[k % len(windows)]
        loss, gradients, states = reference.loss_and_gradients(
            cell, parameters, window.tokens_TN, window.targets_TN, states, window.num_targets
        )
        update, norm = reference.clipped_mean(gradients, window.num_targets, settings["clip_norm"])
        rule.update(parameters, update)
        assert result.num_targets == window.num_targets
        assert result.loss_sum == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, value in values_of(model).items():
        assert relative_error(value, parameters[name]) < 1e-5, name


@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_a_clipped_update_has_the_length_of_the_bound(num_devices):
    model, step = build_step(communicator_on(num_devices), clip_norm=0.05, lr=1.0)
    before = values_of(model)
    (result,) = train(step, 1)
    assert result.grad_norm > 0.1
    change = np.sqrt(sum(((value - before[name]) ** 2).sum() for name, value in values_of(model).items()))
    assert change == pytest.approx(0.05, rel=1e-5)


def test_the_norm_is_exact_where_rows_differ_in_size():
    """A reduction that adds in order in float32 is nearly 1 % off here."""
    rng = np.random.RandomState(0)
    values = (rng.randn(33278, 100) * np.exp(rng.randn(33278, 1))).astype(np.float32)
    found = square_sums([mx.nd.array(values), mx.nd.array(values[0]), mx.nd.ones((2, 3))]).asnumpy()
    exact = [np.square(array.astype(np.float64)).sum() for array in (values, values[0], np.ones((2, 3)))]
    np.testing.assert_allclose(found, exact, rtol=1e-5)


# ---------------------------------------------------------------- the same again


@pytest.mark.parametrize("num_devices", [1, 2])
def test_two_runs_with_one_seed_are_equal_to_the_bit(num_devices):
    def run(seed):
        model, step = build_step(communicator_on(num_devices), clip_norm=0.3, dropout=0.4)
        results = train(step, seed=seed)
        return [result.loss_sum for result in results], [
            value for i in range(num_devices) for value in values_of(model, mx.cpu(i)).values()
        ]

    losses, values = run(seed=3)
    mx.nd.random.uniform(shape=(3,))
    losses_again, values_again = run(seed=3)
    assert losses_again == losses
    for value, again in zip(values, values_again):
        np.testing.assert_array_equal(value, again)
    assert run(seed=4)[0] != losses


def test_dropout_masks_depend_on_the_step_alone():
    """A run that is stopped and continued drops what it would have dropped."""
    windows = list(Streams(text(), BATCH, EOS).windows(BPTT))

    def loss(seed, number):
        _, step = build_step(communicator_on(1), dropout=0.5)
        return step(windows[0], seed, number).loss_sum

    assert loss(1, 7) == loss(1, 7)
    assert len({loss(1, 7), loss(1, 8), loss(2, 7)}) == 3


def test_devices_draw_different_masks():
    _, step = build_step(communicator_on(2), dropout=0.5)
    window = Streams(np.tile(text(10), 4), BATCH, EOS).window(0, BPTT)  # the same column four times
    step(window, 1, 0)
    first, second = (states[0].asnumpy() for states in step.states)
    assert not np.allclose(first[:, 0], second[:, 0])


def test_step_seeds_are_distinct_and_in_range():
    seeds = {step_seed(seed, step) for seed in range(30) for step in range(100)}
    assert len(seeds) > 2990  # chance alone makes two of these equal once in 500 tries
    assert all(0 <= seed < 2**31 for seed in seeds)


# ---------------------------------------------------------------- rehearsal


@pytest.mark.parametrize("in_mid_text", [False, True])
@pytest.mark.parametrize(("num_devices", "threshold"), [(1, None), (2, None), (2, 0.5)])
def test_a_rehearsal_leaves_no_trace(num_devices, threshold, in_mid_text):
    """Before the first step, and between two of them where states are carried and residuals are kept."""

    def run(rehearses):
        model, step = build_step(
            communicator_on(num_devices, threshold=threshold), 0.3, alpha=2.0, beta=1.0, weight_decay=0.01, **MASKS
        )
        windows = list(Streams(text(), BATCH, EOS).windows(BPTT))
        results = [step(windows[k], 3, k) for k in range(2 * in_mid_text)]
        before = values_of(model)
        if rehearses:
            step.rehearse(Streams(text(), BATCH, EOS).window(0, 2 * BPTT))
            for name, value in values_of(model).items():
                np.testing.assert_array_equal(value, before[name])
        carried = [state.asnumpy() for states in step.states or [] for state in states]
        results += [step(windows[k], 3, k) for k in range(len(results), 4)]
        return results, carried, [v for i in range(num_devices) for v in values_of(model, mx.cpu(i)).values()]

    (results, carried, values), (results_after, carried_after, values_after) = run(False), run(True)
    assert results_after == results
    assert len(carried_after) == len(carried)
    for array, after in zip([*carried, *values], [*carried_after, *values_after]):
        np.testing.assert_array_equal(after, array)


# ---------------------------------------------------------------- not finite


def run_into(communicator, damage, warm_up=0, **settings):
    """Take `warm_up` good steps, do the damage, and take a step that must be refused."""
    model, step = build_step(communicator, clip_norm=0.25, **settings)
    windows = list(Streams(text(), BATCH, EOS).windows(BPTT))
    for k in range(warm_up):
        step(windows[0], 0, k)
    damage(model)
    before = [values_of(model, device) for device in communicator.devices]
    with pytest.raises(TrainingDiverged) as caught:
        step(windows[0], 0, 417)
    for device, values in zip(communicator.devices, before):
        for name, value in values_of(model, device).items():
            np.testing.assert_array_equal(value, values[name])
    return str(caught.value)


def spoil(name, what):
    def damage(model):
        parameter = model.named_parameters()[name]
        values = parameter.list_data()[0].asnumpy()
        values.flat[:] = what
        parameter.set_data(mx.nd.array(values))

    return damage


@pytest.mark.parametrize("name", ["encoder.embedding.weight", "encoder.layers.1.h2h_weight", "head.decoder.bias"])
@pytest.mark.parametrize("what", [np.nan, np.inf])
@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_that_is_not_finite_changes_nothing_and_says_so(name, what, num_devices):
    message = run_into(communicator_on(num_devices), spoil(name, what))
    assert message.startswith("step 418: ") and "\n" not in message
    assert "--lr (now 0.5)" in message and "--clip (now 0.25)" in message


def test_a_loss_that_is_finite_does_not_hide_a_gradient_that_is_not():
    # Decoder weights near the largest float32 make the gradient of the hidden vectors overflow; vectors
    # of zero, from an encoder of zeros, keep every logit at zero.
    def damage(model):
        for parameter in model.named_parameters().values():
            parameter.set_data(mx.nd.zeros(parameter.shape))
        signs = np.where(np.arange(VOCAB_SIZE) % 2, 1, -1)[:, None] * np.ones((1, 5))
        model.named_parameters()["head.decoder.weight"].set_data(mx.nd.array(3e38 * signs))

    message = run_into(communicator_on(1), damage)
    assert f"loss {np.log(VOCAB_SIZE):g} " in message


def test_gradients_that_were_sent_in_half_precision_are_suspected_too():
    communicator = communicator_on(1)
    communicator.sends_float16 = True
    message = run_into(communicator, spoil("encoder.layers.0.h2h_weight", np.nan))
    assert message.endswith(", or send the gradients in float32, with --gctype none")


def test_two_bits_do_not_hide_it_either():
    message = run_into(
        communicator_on(2, threshold=0.5),
        spoil("encoder.layers.0.h2h_weight", np.nan),
        warm_up=CALIBRATION_STEPS + 2,
    )
    assert message.startswith("step 418: ")


def test_a_learning_rate_far_too_large_ends_in_this_error():
    _, step = build_step(communicator_on(1), lr=1e30, model="rnn_relu")
    with pytest.raises(TrainingDiverged, match=r"^step [1-9]: loss"):
        train(step)


# ---------------------------------------------------------------- compression


def test_two_bit_training_learns_as_much_as_without():
    """At the default threshold, after calibration, on gradients of a few hundredths."""

    def run(threshold):
        model, step = build_step(
            communicator_on(2, threshold=threshold),
            clip_norm=0.25,
            lr=1.0,
            model="rnn_tanh",
            embed_size=16,
            hidden_size=16,
            num_layers=1,
        )
        results = train(step, CALIBRATION_STEPS + 40, ids=np.arange(80, dtype=np.int32) % 4)
        for value, first in zip(values_of(model, mx.cpu(1)).values(), values_of(model).values()):
            np.testing.assert_array_equal(value, first)
        return [result.loss_sum / result.num_targets for result in results]

    compressed, exact = run(0.5), run(None)
    assert compressed[:CALIBRATION_STEPS] == exact[:CALIBRATION_STEPS]
    assert compressed[CALIBRATION_STEPS + 1] != exact[CALIBRATION_STEPS + 1]
    assert compressed[CALIBRATION_STEPS] > 0.2
    assert compressed[-1] < 0.05


def test_two_bit_training_learns_with_every_regulariser_on():
    """Four words in turn: guessing among them is a loss of ln 4, and only what came before tells which it is."""
    model, step = build_step(
        communicator_on(2, threshold=0.5),
        clip_norm=0.25,
        lr=1.0,
        weight_decay=1e-4,
        alpha=0.1,
        beta=0.1,
        embed_size=16,
        hidden_size=16,
        tied=True,
        **MASKS,
    )
    results = train(step, CALIBRATION_STEPS + 80, ids=np.arange(80, dtype=np.int32) % 4)
    losses = [result.loss_sum / result.num_targets for result in results]
    for value, first in zip(values_of(model, mx.cpu(1)).values(), values_of(model).values()):
        np.testing.assert_array_equal(value, first)
        assert np.isfinite(value).all()
    assert losses[CALIBRATION_STEPS] > np.log(4)
    assert np.mean(losses[-20:]) < np.log(4) / 2


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {"clip_norm": 0.3, "tied": True, "embed_size": 5, "alpha": 2.0, "beta": 1.0},
        {"clip_norm": None, "num_experts": 3, "optimizer": "adam", "lr": 0.01, "small_batch_size": 2},
        {"clip_norm": 0.3, **MASKS},
        {"clip_norm": 0.3, "layer_norm": True},
    ],
    ids=["penalties-tied", "mixture-adam-parts", "masks", "step by step"],
)
def test_a_scaled_loss_changes_no_bit(num_devices, settings):
    """Clipping, penalties, optimiser and what is reported see the gradient as it is."""
    plain, plain_step = build_step(communicator_on(num_devices), **settings)
    scaled, scaled_step = build_step(communicator_on(num_devices), loss_scale=LossScale(), **settings)
    assert train(scaled_step) == train(plain_step)
    for name, value in values_of(plain).items():
        np.testing.assert_array_equal(values_of(scaled)[name], value)


def overflowing(monkeypatch, steps, device, name="encoder.layers.0.h2h_weight"):
    """Let one gradient on one device overflow at some steps, as float16's do; the step is known by its seed."""
    seeds, current = {step_seed(3, step): step for step in range(100)}, [0]
    original = step_module.backward_through_model

    def backward(model, window, states, on, **settings):
        result = original(model, window, states, on, **settings)
        if current[0] in steps and on == device:
            model.named_parameters()[name].grad(on)[0] = np.inf
        return result

    seed = mx.random.seed
    monkeypatch.setattr(mx.random, "seed", lambda state: (current.__setitem__(0, seeds[state]), seed(state)))
    monkeypatch.setattr(step_module, "backward_through_model", backward)


@pytest.mark.parametrize(("num_devices", "threshold"), [(1, None), (2, None), (2, 0.5)], ids=["one", "two", "two bits"])
def test_steps_that_overflow_on_any_device_are_as_if_not_taken(num_devices, threshold, monkeypatch):
    """Adam counts no such step, compression keeps nothing of it; the recurrent state goes on."""
    skipped, num_steps = {0, 1, 5, 23}, 26
    settings = {"clip_norm": 0.3, "optimizer": "adam", "lr": 0.01, "dropout": 0.2}
    expected, expected_step = build_step(communicator_on(num_devices, threshold=threshold), **settings)
    reduce, update = expected_step._communicator.reduce_gradients, expected_step._trainer.update
    numbers = iter(range(num_steps))

    def reduce_unless_skipped(parameters):
        if next(numbers) in skipped:
            expected_step._trainer.update = lambda size: None
        else:
            expected_step._trainer.update = update
            reduce(parameters)

    expected_step._communicator.reduce_gradients = reduce_unless_skipped
    train(expected_step, num_steps)
    scale = LossScale()
    found, found_step = build_step(communicator_on(num_devices, threshold=threshold), loss_scale=scale, **settings)
    overflowing(monkeypatch, skipped, mx.cpu(num_devices - 1))
    results = train(found_step, num_steps)
    assert {k for k, result in enumerate(results) if not result.was_taken} == skipped
    assert all(np.isfinite(result.loss_sum) for result in results)
    assert scale.scale == 2.0**12 and scale.taken == 2
    for i in range(num_devices):
        for name, value in values_of(expected, mx.cpu(i)).items():
            np.testing.assert_array_equal(values_of(found, mx.cpu(i))[name], value)


def test_the_next_words_are_on_their_way_before_gradients_are_waited_for(monkeypatch):
    events = []

    class Watched(SingleDevice):
        def allgather(self, numbers):
            events.append("allgather")
            return super().allgather(numbers)

        def reduce_gradients(self, parameters):
            events.append("reduce")

    monkeypatch.setattr(InputCopies, "begin", lambda self, window: events.append(window))
    _, step = build_step(Watched([mx.cpu(0)]), loss_scale=LossScale())
    first, second = list(Streams(text(), BATCH, EOS).windows(BPTT))[:2]
    step(first, 3, 0, upcoming=second)
    assert events == [second, "allgather", "reduce", "allgather"]


def test_a_step_that_overflows_on_another_worker_is_not_taken():
    class BesideAnother(SingleDevice):
        """One of two workers; the other's gradient has overflowed, and its numbers are else the same."""

        def allgather(self, numbers):
            return np.array([numbers, [0.0] if len(numbers) == 1 else numbers], dtype=np.float64)

        def reduce_gradients(self, parameters):
            raise AssertionError("the other worker does not take part")

    model, step = build_step(BesideAnother([mx.cpu(0)]), loss_scale=LossScale())
    before = values_of(model)
    (result,) = train(step, 1)
    assert not result.was_taken
    for name, value in values_of(model).items():
        np.testing.assert_array_equal(value, before[name])


def test_overflow_in_the_last_of_many_parameters_is_seen(monkeypatch):
    """MXNet's operator has room for 200 arrays, and crashes on more."""
    _, step = build_step(communicator_on(1), loss_scale=LossScale(), num_layers=51)
    *_, last = step._parameters
    names = {parameter: name for name, parameter in step._model.named_parameters().items()}
    assert len(names) > 200
    overflowing(monkeypatch, {1}, mx.cpu(0), names[last])
    assert [result.was_taken for result in train(step, 3)] == [True, False, True]


def test_overflow_that_no_scale_helps_against_ends_in_an_error(monkeypatch):
    _, step = build_step(communicator_on(1), loss_scale=LossScale())
    overflowing(monkeypatch, range(100), mx.cpu(0))
    with pytest.raises(TrainingDiverged, match=r"^step 17: .* float16 .* --lr \(now 0.5\), or use --amp none$"):
        train(step, 17)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("num_experts", [None, 3])
def test_two_devices_in_bfloat16_equal_one_that_works_on_halves_of_the_batch(num_experts):
    """The same products, rounded alike, whose gradients are added up in float32, if in another order."""
    settings = {"clip_norm": 0.3, "num_experts": num_experts, "tied": True, "embed_size": 5}
    one, one_step = build_step(communicator_on(1), small_batch_size=BATCH // 2, **settings)
    two, two_step = build_step(communicator_on(2), **settings)
    whole, whole_step = build_step(communicator_on(1), **settings)
    for model in (one, two):
        model.train_in_half_precision("bfloat16")
    for found, expected, _ in zip(train(two_step, 4), train(one_step, 4), train(whole_step, 4)):
        assert found.loss_sum == pytest.approx(expected.loss_sum, rel=1e-6)
        assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)
    for name, value in values_of(one).items():
        for i in range(2):
            assert relative_error(values_of(two, mx.cpu(i))[name], value) < 1e-6, name
        assert relative_error(value, values_of(whole)[name]) > 2e-6, name


# ---------------------------------------------------------------- GPU


MODELS = {
    "lstm": {"model": "lstm"},
    "gru-tied": {"model": "gru", "tied": True},
    "mixture": {"num_experts": 3},
    "sampled-tied": {"num_sampled": 4, "tied": True, "embed_size": 5},
    "adaptive": {"cutoffs": (3,)},
    "layer-norm": {"layer_norm": True},
}


@pytest.mark.gpu
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_the_gpu_gives_the_parameters_of_the_cpu(settings):
    cpu, cpu_step = build_step(SingleDevice([mx.cpu(0)]), clip_norm=0.3, **settings)
    gpu, gpu_step = build_step(SingleDevice([mx.gpu(0)]), clip_norm=0.3, **settings)
    losses = [[result.loss_sum for result in train(step)] for step in (cpu_step, gpu_step)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in values_of(gpu, mx.gpu(0)).items():
        assert relative_error(value, values_of(cpu)[name]) < 1e-4, name


@pytest.mark.gpu
def test_square_sums_on_the_gpu_are_those_of_float64():
    arrays = [np.random.RandomState(i).normal(size=shape).astype("f") for i, shape in enumerate([(33278, 200), (7,)])]
    found = square_sums([mx.nd.array(array, ctx=mx.gpu(0)) for array in arrays]).asnumpy()
    np.testing.assert_allclose(found, [np.square(array, dtype=np.float64).sum() for array in arrays], rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("kvstore", ["device", "local"])
@pytest.mark.parametrize("settings", MODELS.values(), ids=MODELS)
def test_two_gpus_give_the_parameters_of_one(kvstore, settings):
    if mx.context.num_gpus() < 2:
        pytest.skip("there is one GPU")
    gpus = [mx.gpu(0), mx.gpu(1)]
    one, one_step = build_step(SingleDevice(gpus[:1]), clip_norm=0.3, small_batch_size=BATCH // 2, **settings)
    two, two_step = build_step(KVStoreCommunicator(gpus, kvstore), clip_norm=0.3, **settings)
    losses = [[result.loss_sum for result in train(step)] for step in (one_step, two_step)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in values_of(one, gpus[0]).items():
        for gpu in gpus:
            assert relative_error(values_of(two, gpu)[name], value) < 1e-4, name


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"dropout": 0.4}, MASKS], ids=["dropout", "awd-lstm"])
def test_masks_on_the_gpu_follow_from_seed_and_step_and_not_from_what_was_drawn_before(settings):
    def run(seed=3):
        _, step = build_step(SingleDevice([mx.gpu(0)]), **settings)
        return [result.loss_sum for result in train(step, seed=seed)]

    first = run()
    mx.nd.Dropout(mx.nd.ones((7,), ctx=mx.gpu(0)), mode="always", cudnn_off=True).wait_to_read()
    assert run() == pytest.approx(first, rel=1e-5)
    assert run(seed=4)[0] != pytest.approx(first[0], rel=1e-3)


@pytest.mark.gpu
def test_words_that_are_sent_ahead_to_the_gpu_are_not_overwritten_on_their_way():
    windows = list(Streams(random_ids(40_000, 4, 10**6), 8, EOS).windows(50))
    copies, taken = InputCopies(), []
    for window, upcoming in zip(windows, [*windows[1:], None]):
        for start in (0, 4):
            taken.append((window.columns(start, start + 4), copies.take(window, start, start + 4, mx.gpu(0))))
        if upcoming is not None:
            copies.begin(upcoming)
    for expected, (tokens_TN, targets_R) in taken:
        assert tokens_TN.context == targets_R.context == mx.gpu(0)
        np.testing.assert_array_equal(tokens_TN.asnumpy(), expected.tokens_TN)
        np.testing.assert_array_equal(targets_R.asnumpy(), expected.targets_TN.ravel()[: expected.num_targets])


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [{"tied": True, "embed_size": 5}, {"num_experts": 3}, {"layer_norm": True}])
def test_float16_on_the_gpu_loses_little_against_float32(settings):
    whole, whole_step = build_step(SingleDevice([mx.gpu(0)]), clip_norm=0.3, **settings)
    half, half_step = build_step(SingleDevice([mx.gpu(0)]), clip_norm=0.3, loss_scale=LossScale(), **settings)
    half.train_in_half_precision("float16")
    results = train(half_step, 20)
    assert all(result.was_taken for result in results)
    assert [r.loss_sum for r in results] == pytest.approx([r.loss_sum for r in train(whole_step, 20)], rel=0.01)
    for name, value in values_of(half, mx.gpu(0)).items():
        assert 1e-6 < relative_error(value, values_of(whole, mx.gpu(0))[name]) < 0.01, name


# ---------------------------------------------------------------- what a caller may get wrong


def test_gradients_add_up_whatever_the_model_was_initialised_for():
    """MXNet's own default, grad_req 'write', would keep those of the last chunk, and the head's of a tied matrix."""
    expected, expected_step = build_step(communicator_on(1), tied=True)
    found, _ = build_step(communicator_on(1), tied=True)
    for parameter in found.named_parameters().values():
        parameter.grad_req = "write"
    step = TrainingStep(found, communicator_on(1), OptimConfig(lr=0.5, clip_norm=None))
    assert [result.grad_norm for result in train(step, 3)] == [result.grad_norm for result in train(expected_step, 3)]
    for name, value in values_of(expected).items():
        np.testing.assert_array_equal(values_of(found)[name], value)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_step_that_failed_leaves_the_states_of_before(num_devices):
    model, step = build_step(communicator_on(num_devices))
    first, second, *_ = Streams(text(), BATCH, EOS).windows(BPTT)
    step(first, 3, 0)
    before = [[state.asnumpy() for state in states] for states in step.states]
    model.encoder.embedding.weight.set_data(model.encoder.embedding.weight.data(mx.cpu(0)) * np.nan)
    with pytest.raises(TrainingDiverged):
        step(second, 3, 1)
    for states, expected in zip(step.states, before):
        for state, values in zip(states, expected):
            np.testing.assert_array_equal(state.asnumpy(), values)


def test_a_batch_that_the_devices_cannot_share_is_refused():
    _, step = build_step(communicator_on(3))
    with pytest.raises(DistributedError, match="a batch of 4 streams on 3 devices: must be a multiple"):
        train(step, 1)
    with pytest.raises(DistributedError, match="2 devices: must be one"):
        SingleDevice([mx.cpu(0), mx.cpu(1)])


@pytest.mark.parametrize(("optimizer", "smallest"), [("sgd", 20 / 4**49), ("adam", 1.001e-30)])
def test_the_optimisers_take_any_learning_rate(optimizer, smallest):
    model, step = build_step(communicator_on(1), optimizer=optimizer)
    for lr in (smallest, 1e-30, 1e-60, 0):
        step.set_learning_rate(lr)
        before = values_of(model)
        train(step, 1)
        for name, value in values_of(model).items():
            np.testing.assert_allclose(value, before[name], atol=1e-12)
