"""Dynamic evaluation: the rule as numpy follows it word by word, and the model and its files as they were."""

from __future__ import annotations

import dataclasses
import logging

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, random_ids, relative_error, values_of

from gluon_lm.data.windows import Streams
from gluon_lm.errors import DataError, TrainingDiverged
from gluon_lm.evaluation import dynamic
from gluon_lm.evaluation.dynamic import dynamic_evaluate, gradient_statistics
from gluon_lm.evaluation.static import evaluate
from gluon_lm.logs import LOGGER

EOS = 3
BPTT, BATCH_SIZE = 4, 5
MODELS = {
    "lstm-tied": {"tied": True},
    "gru-untied": {"model": "gru"},
    "mixture-tied": {"tied": True, "num_experts": 3, "last_hidden_size": 7},
}
KINDS = {
    **MODELS,
    "rnn": {"model": "rnn_relu", "num_layers": 1},
    "layer-norm": {"layer_norm": True},
    "mixture-untied": {"model": "gru", "num_experts": 2},
    "sampled-tied": {"tied": True, "num_sampled": 4},
    "adaptive": {"cutoffs": (4,)},
    "every dropout": {
        "model": "awd-lstm", "tied": True, "weight_drop": 0.5, "input_weight_drop": 0.2, "dropout": 0.6,
        "dropout_embed": 0.5, "dropout_embed_elements": 0.2, "dropout_candidate": 0.3, "dropout_input": 0.4,
    },
    "every dropout, mixed": {"model": "awd-gru", "num_experts": 2, "weight_drop": 0.5, "dropout_latent": 0.5},
}  # fmt: skip
RULES = {
    "sum": {"lamb": 0.1, "epsilon": 0.002, "lr": 0.05},
    "mean": {"lamb": 0.1, "epsilon": 0.01, "lr": 0.004, "of_mean": True},
    "clipped": {"lamb": 8.0, "epsilon": 0.002, "lr": 0.02},
}


TRAINING_TEXT = random_ids(113)  # 5 streams of 22 or 23 words: the last window is short
TEXT = random_ids(43, seed=9)


def statistics_of(model, **how):
    return gradient_statistics(model, TRAINING_TEXT, EOS, mx.cpu(0), bptt=BPTT, batch_size=BATCH_SIZE, **how)


def run(model, ids, statistics, **rule):
    return dynamic_evaluate(model, ids, EOS, mx.cpu(0), statistics, bptt=BPTT, **rule)


# ---------------------------------------------------------------- the rule in numpy


def windows(ids, num_streams, bptt):
    """Inputs, targets and number of targets, the streams side by side and each begun from <eos>."""
    streams = np.array_split(ids, num_streams)
    targets = np.full((len(streams[0]), num_streams), EOS)
    tokens = targets.copy()
    for n, stream in enumerate(streams):
        targets[: len(stream), n] = stream
        tokens[1 : len(stream), n] = stream[:-1]
    for start in range(0, len(targets), bptt):
        num_targets = sum(len(stream[start : start + bptt]) for stream in streams)
        yield tokens[start : start + bptt], targets[start : start + bptt], num_targets


def simulated_statistics(cell, parameters, max_batches=None):
    sums, count = dict.fromkeys(parameters, 0.0), 0
    states = reference.zero_states(cell, parameters, BATCH_SIZE)
    for tokens, targets, num_targets in list(windows(TRAINING_TEXT, BATCH_SIZE, BPTT))[:max_batches]:
        _, gradients, states = reference.loss_and_gradients(cell, parameters, tokens, targets, states, num_targets)
        sums = {name: sums[name] + (gradients[name] / num_targets) ** 2 for name in sums}
        count += 1
    return sums, count


def simulate(cell, trained, ids, lamb, epsilon, lr, of_mean=False):
    """Summed loss, and lamb times the decay rates before they are clipped."""
    sums, count = simulated_statistics(cell, trained)
    ms = {name: np.sqrt(value / count if of_mean else value) for name, value in sums.items()}
    decay = {name: value / sum(other.mean() for other in ms.values()) for name, value in ms.items()}
    parameters, total = dict(trained), 0.0
    states = reference.zero_states(cell, parameters, 1)
    for tokens, targets, num_targets in windows(ids, 1, BPTT):
        loss, gradients, states = reference.loss_and_gradients(cell, parameters, tokens, targets, states)
        total += loss
        parameters = {
            name: value
            + lamb * np.minimum(decay[name], 1 / lamb) * (trained[name] - value)
            - lr * gradients[name] / num_targets / (ms[name] + epsilon)
            for name, value in parameters.items()
        }
    return total, np.concatenate([lamb * rate.ravel() for rate in decay.values()])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", MODELS)
def test_every_window_is_predicted_and_then_learnt_from_by_the_rule(name, rule):
    model = build_model(**MODELS[name])
    cell, trained, statistics = model.config.cell, values_of(model), statistics_of(model)
    for length in (3, 8, 17, 30, len(TEXT)):  # after each window, and in the middle of one
        expected, rates = simulate(cell, trained, TEXT[:length], **RULES[rule])
        result = run(model, TEXT[:length], statistics, **RULES[rule])
        assert result.num_tokens == length
        assert result.loss_sum == pytest.approx(expected, rel=1e-5)
    assert abs(expected / reference.text_loss(cell, trained, TEXT, EOS) - 1) > 1e-3  # it has learnt
    assert ((rates > 1).any() and (rates < 1).any()) == (rule == "clipped")


@pytest.mark.parametrize("max_batches", [None, 1, 2, 100])
@pytest.mark.parametrize("name", MODELS)
def test_statistics_are_the_squared_gradients_of_the_windows_means(name, max_batches):
    model = build_model(**MODELS[name])
    expected, num_windows = simulated_statistics(model.config.cell, values_of(model), max_batches)
    found = statistics_of(model, max_batches=max_batches)
    assert found.num_windows == num_windows == min(max_batches or 6, 6)
    assert found.square_sums.keys() == expected.keys()
    for parameter, squares in expected.items():
        assert relative_error(found.square_sums[parameter], squares) < 1e-5, parameter


@pytest.mark.parametrize("name", KINDS)
def test_every_model_learns_what_repeats_without_dropout(name):
    model = build_model(**KINDS[name])
    statistics = statistics_of(model)
    static = evaluate(model, TEXT, EOS, mx.cpu(0)).loss
    assert run(model, TEXT, statistics, lr=1e-12).loss == pytest.approx(static, rel=1e-5)
    plain = build_model(**{k: v for k, v in KINDS[name].items() if "drop" not in k})
    np.testing.assert_equal(statistics.square_sums, statistics_of(plain).square_sums)
    repeated = np.tile(TEXT[:6], 20)
    dynamic_loss = run(model, repeated, statistics, lr=0.01).loss
    assert dynamic_loss == run(plain, repeated, statistics, lr=0.01).loss
    assert dynamic_loss < evaluate(model, repeated, EOS, mx.cpu(0)).loss - 0.2


# ---------------------------------------------------------------- what stays as it was


@pytest.mark.parametrize("lr", [0.02, 1e38])
def test_parameters_and_gradients_stay_bit_for_bit(lr):
    model = build_model(tied=True)
    for parameter in model.named_parameters().values():
        parameter.grad()[:] = 5
    before = values_of(model)
    statistics = statistics_of(model)
    try:
        run(model, TEXT, statistics, lr=lr)
    except TrainingDiverged as error:  # an end in the middle
        assert lr == 1e38 and "lower --lr (now 1e+38)" in str(error)
    else:
        assert lr == 0.02
    for name, parameter in model.named_parameters().items():
        np.testing.assert_array_equal(parameter.data().asnumpy(), before[name].astype(np.float32))
        assert np.all(parameter.grad().asnumpy() == 5)


def test_a_text_that_does_not_fit_is_refused():
    model = build_model()
    with pytest.raises(DataError, match=r"113 training tokens are less .* --batch-size 100 x --bptt 5, 500 in all"):
        gradient_statistics(model, TRAINING_TEXT, EOS, mx.cpu(0))
    statistics = statistics_of(model)
    for foreign in (VOCAB_SIZE, -1):
        ids = np.append(TRAINING_TEXT, np.int32(foreign))
        with pytest.raises(DataError, match="must be from 0 to 12"):
            gradient_statistics(model, ids, EOS, mx.cpu(0), bptt=BPTT, batch_size=BATCH_SIZE)
        with pytest.raises(DataError, match="must be from 0 to 12"):
            run(model, ids, statistics)


# ---------------------------------------------------------------- the statistics on disk


@pytest.fixture
def computed(monkeypatch):
    """Grows by one each time that a training text is gone through."""
    calls = []

    def counted(*args):
        calls.append(args)
        return Streams(*args)

    monkeypatch.setattr(dynamic, "Streams", counted)
    return calls


@pytest.fixture
def said():
    lines, handler = [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    yield lines
    LOGGER.removeHandler(handler)
    LOGGER.setLevel(level)


def cached(folder, model, ids=TRAINING_TEXT, **how):
    how = {"bptt": BPTT, "batch_size": BATCH_SIZE, **how}
    return gradient_statistics(model, ids, EOS, mx.cpu(0), folder=folder, **how)


def assert_same(found, expected):
    np.testing.assert_equal(dataclasses.asdict(found), dataclasses.asdict(expected))


def test_statistics_are_computed_once_for_what_they_depend_on(tmp_path, computed):
    folder, model = tmp_path / "kept", build_model()
    other = TRAINING_TEXT.copy()
    other[50] = (other[50] + 1) % VOCAB_SIZE
    variants = [
        (model, {}),
        (model, {"bptt": 3}),
        (model, {"batch_size": 4}),
        (model, {"max_batches": 2}),
        (model, {"ids": other}),
        (build_model(seed=2), {}),
        (build_model(model="rnn_tanh"), {}),
        (build_model(model="rnn_relu"), {}),
    ]
    first = [cached(folder, which, **how) for which, how in variants]
    assert len(computed) == len(variants)
    for (which, how), expected in zip(variants, first):
        assert_same(cached(folder, which, **how), expected)
    assert len(computed) == len(variants)
    assert_same(first[0], statistics_of(model))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content, array: content.replace(array, array[:-1] + bytes([array[-1] ^ 1])),
        lambda content, array: content[:-1],
        lambda content, array: content[:900],
        lambda content, array: b"",
        lambda content, array: b"no archive at all",
    ],
)
def test_a_damaged_file_is_made_anew_and_said_to_be(tmp_path, computed, said, damage):
    model = build_model()
    expected = cached(tmp_path, model)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole, expected.square_sums["encoder.embedding.weight"].tobytes()))
    assert_same(cached(tmp_path, model), expected)
    assert any(line.startswith(f"{path}: is damaged") for line in said)
    assert_same(cached(tmp_path, model), expected)
    assert len(computed) == 2 and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_in_costs_the_file_only(tmp_path, said):
    model = build_model()
    (tmp_path / "taken").write_text("a file")
    assert_same(cached(tmp_path / "taken", model), statistics_of(model))
    assert any("taken" in line and "cannot be written" in line for line in said)
