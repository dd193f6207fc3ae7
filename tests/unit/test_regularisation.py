"""Dropout of words, elements and weights, and the penalties on activations, against numpy with the same masks."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import (
    VOCAB_SIZE,
    assert_drops,
    build_model,
    build_step,
    communicator_on,
    drawn_masks,
    forward_backward,
    gradients_of,
    int32,
    relative_error,
    values_of,
)

from gluon_lm.config import CELLS, ModelConfig, OptimConfig
from gluon_lm.data.windows import Streams
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.models import LanguageModel
from gluon_lm.training.step import TrainingStep, step_seed

T, N = 7, 8
DROPOUTS = {
    "dropout": 0.3,
    "dropout_input": 0.25,
    "dropout_hidden": 0.2,
    "dropout_embed": 0.2,
    "dropout_embed_elements": 0.3,
    "dropout_inner_input": 0.1,
    "dropout_last_input": 0.1,
    "weight_drop": 0.5,
    "input_weight_drop": 0.2,
}
CELL = pytest.mark.parametrize("cell", sorted(CELLS))
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
LOCKED = pytest.mark.parametrize("locked", [False, True], ids=["unlocked", "locked"])
HYBRIDIZE = pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])


def random_window(seed=0, shape=(T, N)):
    """Tokens and targets, some words twice and some never."""
    tokens_TN, targets_TN = np.random.RandomState(seed).randint(0, VOCAB_SIZE - 1, (2, *shape))
    return tokens_TN, targets_TN


def build_lively_model(cell, **settings):
    """A model in which the gradient of a matrix is zero only where the matrix is dropped: every unit is active."""
    model = build_model(model=cell, **settings)
    if cell == "rnn_relu":
        for layer in model.encoder.layers:
            for matrix in (layer.i2h_weight, layer.h2h_weight):
                matrix.set_data(0.2 * matrix.data())
            layer.h2h_bias.set_data(mx.nd.full(layer.h2h_bias.shape, 2.0))
    return model


def train_window(model, window, seed, state=0.3):
    """Loss and gradients of a window under a seed, from a state that is `state` throughout."""
    states = [array + state for array in model.begin_state(window[0].shape[1], mx.cpu(0))]
    mx.random.seed(seed)
    loss, _ = forward_backward(model, *window, states)
    return loss, gradients_of(model)


def weight_masks(gradients, rates):
    """Masks of the layers' matrices, from where their gradients are zero, for the end of a name and its rate."""
    return {
        name: (gradient != 0) / (1 - rate)
        for ending, rate in rates.items()
        for name, gradient in gradients.items()
        if name.endswith(ending)
    }


def numpy_window(cell, model, window, masks, weight_masks, state=0.3, **settings):
    """Loss and gradients with dropped input vectors, outputs and weights, but with the whole decoder."""
    parameters = values_of(model)
    dropped = {name: value * weight_masks.get(name, 1) for name, value in parameters.items()}
    states = [array + state for array in reference.zero_states(cell, parameters, window[0].shape[1])]
    loss, gradients, _ = reference.loss_and_gradients(cell, dropped, *window, states, masks=masks, **settings)
    return loss, {name: gradient * weight_masks.get(name, 1) for name, gradient in gradients.items()}


# ---------------------------------------------------------------- all of them


@CELL
@TIED
@LOCKED
@HYBRIDIZE
def test_loss_and_gradients_are_those_of_numpy_with_the_same_masks(cell, tied, locked, hybridize):
    """Every dropout is where it belongs, once, scaled, and not in the decoder; one mask of weights for a window."""
    settings = {"tied": tied, "locked": locked, **DROPOUTS}
    model, window = build_lively_model(cell, hybridize=hybridize, **settings), random_window()
    loss, gradients = train_window(model, window, seed=5)
    masks = drawn_masks(build_lively_model(cell, hybridize=False, **settings), window[0], seed=5)
    expected_loss, expected = numpy_window(
        cell, model, window, masks, weight_masks(gradients, {"h2h_weight": 0.5, "i2h_weight": 0.2})
    )
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients.items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@HYBRIDIZE
def test_a_model_called_as_one_block_in_training_drops_its_output_too(hybridize):
    settings = {"dropout": 0.4, "dropout_embed": 0.2, "hybridize": False}
    model, (tokens_TN, _) = build_model(**settings), random_window()
    if hybridize:
        model.hybridize()
    mx.random.seed(5)
    with mx.autograd.record():
        log_probs_TNV, *_ = model(int32(tokens_TN), *model.begin_state(N, mx.cpu(0)))
    masks, parameters = drawn_masks(build_model(**settings), tokens_TN, seed=5), values_of(model)
    raw_TNH, *_ = reference.encode("lstm", parameters, tokens_TN, reference.zero_states("lstm", parameters, N), masks)
    logits_TNV = raw_TNH * masks[-1] @ parameters["head.decoder.weight"].T + parameters["head.decoder.bias"]
    assert relative_error(log_probs_TNV.asnumpy(), reference.log_softmax(logits_TNV)) < 1e-5


@CELL
@HYBRIDIZE
def test_nothing_is_dropped_in_evaluation(cell, hybridize):
    tokens_TN, _ = random_window()
    log_probs = []
    for dropouts in ({}, DROPOUTS):
        model = build_model(model=cell, tied=True, hybridize=hybridize, **dropouts)
        log_probs.append(model(int32(tokens_TN), *model.begin_state(N, mx.cpu(0)))[0].asnumpy())
    np.testing.assert_array_equal(*log_probs)


@pytest.mark.parametrize("name", sorted(DROPOUTS) + ["dropout_candidate"])
def test_masks_follow_the_step_and_differ_between_devices(name):
    settings = {"model": "lstm", "num_layers": 3, "locked": True, name: 0.4}
    window = Streams(np.tile(np.arange(10, dtype=np.int32), 4), 4, eos=0).window(0, 6)  # four equal columns
    devices = [mx.cpu(0), mx.cpu(1)]

    def gradients_by_device(step, settings=settings):
        """Without sums over devices each one is left with its own gradients."""
        model = build_model(devices, **settings)
        apart = SingleDevice(devices[:1])
        apart.devices = devices
        training_step = TrainingStep(model, apart, OptimConfig(clip_norm=None))
        training_step(window, 1, step)
        return [
            np.concatenate([p.grad(device).asnumpy().ravel() for p in model.named_parameters().values()])
            for device in devices
        ]

    first, second = gradients_by_device(7)
    assert relative_error(second, first) > 1e-3
    np.testing.assert_array_equal(gradients_by_device(7), [first, second])
    assert relative_error(gradients_by_device(8)[0], first) > 1e-3
    np.testing.assert_array_equal(*gradients_by_device(7, {**settings, name: 0.0}))


# ---------------------------------------------------------------- embedding


def embedded_mask(tokens_TN, seed=2, hybridize=True, **settings):
    """What the embedding in training multiplies each word's vector with."""
    model = build_model(vocab_size=400, hybridize=hybridize, **settings)
    mx.random.seed(seed)
    with mx.autograd.record():
        embedded_TNE = model.encoder.embedding(int32(tokens_TN)).asnumpy()
    return embedded_TNE / values_of(model)["encoder.embedding.weight"][tokens_TN]


@HYBRIDIZE
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_embedding_dropout_drops_whole_words_wherever_they_occur(hybridize, rate):
    tokens_TN = np.random.RandomState(0).permutation(np.repeat(np.arange(300), 4)).reshape(30, 40)
    mask_TNE = embedded_mask(tokens_TN, hybridize=hybridize, dropout_embed=rate)
    mask_V = np.zeros(300)
    mask_V[tokens_TN] = mask_TNE[..., 0]
    np.testing.assert_allclose(mask_TNE, np.broadcast_to(mask_V[tokens_TN][..., None], mask_TNE.shape), rtol=1e-5)
    assert_drops(mask_V, rate)


@HYBRIDIZE
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_element_dropout_is_alike_wherever_a_word_occurs_and_different_for_other_words(hybridize, rate):
    tokens_TN = np.random.RandomState(0).permutation(np.repeat(np.arange(50, 350), 4)).reshape(30, 40)
    settings = {"hybridize": hybridize, "embed_size": 32, "dropout_embed_elements": rate}
    mask_TNE = embedded_mask(tokens_TN, **settings)
    mask_VE = np.zeros((350, 32))
    mask_VE[tokens_TN] = mask_TNE
    np.testing.assert_allclose(mask_TNE, mask_VE[tokens_TN], rtol=1e-5)
    assert_drops(mask_VE[50:], rate)
    assert len(np.unique(mask_VE[50:] != 0, axis=0)) > 200  # two of these are equal with a chance of 0.8**32 at most


@HYBRIDIZE
def test_element_dropout_works_in_a_window_of_one_word(hybridize):
    mask_11E = embedded_mask(np.array([[7]]), hybridize=hybridize, embed_size=500, dropout_embed_elements=0.4)
    assert_drops(mask_11E, 0.4)


@HYBRIDIZE
@pytest.mark.parametrize("name", ["dropout_embed", "dropout_embed_elements"])
def test_a_tied_decoder_is_whole_while_the_embedding_is_dropped(hybridize, name):
    """Words that are dropped, or not even in the window, are scored, and taught, as any other."""
    model = build_model(tied=True, hybridize=hybridize, **{name: 0.9})
    hidden_TNE = mx.nd.array(np.random.RandomState(0).randn(T, N, 6))
    weight, bias = values_of(model)["encoder.embedding.weight"], values_of(model)["head.decoder.bias"]
    with mx.autograd.record():
        log_probs_TNV = model.head(hidden_TNE)
    expected = reference.log_softmax(hidden_TNE.asnumpy() @ weight.T + bias)
    assert relative_error(log_probs_TNV.asnumpy(), expected) < 1e-5
    _, gradients = train_window(model, random_window(), seed=1)
    assert np.all(gradients["encoder.embedding.weight"] != 0)


# ---------------------------------------------------------------- locked dropout


@LOCKED
def test_a_locked_mask_holds_for_all_words_of_a_window_and_for_one_column(locked):
    rates = {"dropout_input": 0.4, "dropout_hidden": 0.25, "dropout": 0.5}
    model = build_model(hybridize=False, locked=locked, **rates)
    model.encoder.embedding.weight.set_data(mx.nd.ones((VOCAB_SIZE, 6)))
    tokens_TN, _ = random_window(shape=(T, 200))
    masks = drawn_masks(model, tokens_TN, seed=3)
    for mask_TNH, rate in zip(masks, rates.values()):
        if locked:
            np.testing.assert_allclose(mask_TNH, np.broadcast_to(mask_TNH[:1], mask_TNH.shape), rtol=1e-5)
        assert_drops(mask_TNH[0] if locked else mask_TNH, rate)
        kept_TNH = mask_TNH != 0
        assert np.all(kept_TNH.any(axis=1) & ~kept_TNH.all(axis=1))  # each unit in some columns, and not in others
        is_constant_NH = kept_TNH.all(axis=0) | ~kept_TNH.any(axis=0)
        assert is_constant_NH.all() if locked else is_constant_NH.mean() < 0.2  # by chance: 0.75**7 = 0.13 at most


# ---------------------------------------------------------------- weight drop


@CELL
@HYBRIDIZE
@pytest.mark.parametrize(
    ("name", "matrix"), [("weight_drop", "h2h_weight"), ("input_weight_drop", "i2h_weight")], ids=["h2h", "i2h"]
)
def test_weight_drop_is_one_mask_a_window(cell, hybridize, name, matrix):
    settings = {"embed_size": 12, "hidden_size": 12, "hybridize": hybridize, name: 0.3}
    model, window = build_lively_model(cell, **settings), random_window()
    loss, gradients = train_window(model, window, seed=4)
    masks = weight_masks(gradients, {matrix: 0.3})
    first, second = masks.values()
    assert not np.array_equal(first, second)
    assert_drops(np.stack([first, second]), 0.3)
    expected_loss, expected = numpy_window(cell, model, window, None, masks)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for parameter, gradient in gradients.items():
        assert relative_error(gradient, expected[parameter]) < 1e-5, parameter
    for other in weight_masks(train_window(model, window, seed=6)[1], {matrix: 0.3}).values():
        assert not any(np.array_equal(other, mask) for mask in masks.values())


@CELL
@HYBRIDIZE
def test_weight_drop_leaves_the_first_step_from_zero_as_it_is(cell, hybridize):
    tokens_TN, _ = random_window()
    hidden = []
    for rate in (0.0, 0.5):
        model = build_model(model=cell, hybridize=hybridize, weight_drop=rate)
        with mx.autograd.record():
            hidden_TNH, *_ = model.encoder(int32(tokens_TN), *model.begin_state(N, mx.cpu(0)))
        hidden.append(hidden_TNH.asnumpy())
    np.testing.assert_allclose(hidden[1][0], hidden[0][0], rtol=1e-6)
    assert np.all([relative_error(dropped, whole) > 1e-2 for whole, dropped in zip(*hidden)][1:])


# ---------------------------------------------------------------- activation regularisation


def take_step(num_devices, window, alpha, beta, **settings):
    """The model, and what one training step from the zero state returns, before any update."""
    model, step = build_step(communicator_on(num_devices), lr=1e-30, alpha=alpha, beta=beta, **settings)
    return model, step(window, 3, 0)


@pytest.mark.parametrize("num_devices", [1, 2])
@pytest.mark.parametrize(
    ("num_tokens", "length"),
    [(4 * 9, 5), (4 * 4 + 3, 5), (4 * 4 + 1, 5), (4, 1), (3, 1), (4 + 1, 5)],
    ids=["full", "short-row", "one-in-the-last-row", "one-row", "one-short-row", "a-row-and-one"],
)
@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 0.0), (0.0, 3.0), (2.0, 1.0)])
def test_penalties_are_means_over_targets_and_over_their_pairs(num_devices, num_tokens, length, alpha, beta):
    ids = np.random.RandomState(num_tokens).randint(0, VOCAB_SIZE, num_tokens).astype(np.int32)
    window = Streams(ids, 4, eos=0).window(0, length)
    model, result = take_step(num_devices, window, alpha, beta, tied=True)
    parameters = values_of(model)
    expected_loss, expected, _ = reference.loss_and_gradients(
        "lstm",
        parameters,
        window.tokens_TN,
        window.targets_TN,
        reference.zero_states("lstm", parameters, 4),
        window.num_targets,
        alpha=alpha,
        beta=beta,
    )
    assert result.loss_sum == pytest.approx(expected_loss, rel=1e-5)  # without the penalties
    _, norm = reference.clipped_mean(expected, window.num_targets, None)
    assert result.grad_norm == pytest.approx(norm, rel=1e-5)
    for name, gradient in gradients_of(model).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


@CELL
@LOCKED
def test_alpha_is_on_the_dropped_output_and_beta_on_the_raw_one(cell, locked):
    settings = {"model": cell, "locked": locked, "dropout": 0.5}
    window = Streams(np.random.RandomState(0).randint(0, VOCAB_SIZE, 38).astype(np.int32), 4, eos=0).window(5, 5)
    model, result = take_step(1, window, 2.0, 1.0, **settings)
    masks = drawn_masks(build_model(hybridize=False, **settings), window.tokens_TN, step_seed(3, 0))
    expected_loss, expected = numpy_window(
        cell,
        model,
        (window.tokens_TN, window.targets_TN),
        masks,
        {},
        state=0.0,
        num_targets=window.num_targets,
        alpha=2.0,
        beta=1.0,
    )
    assert result.loss_sum == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in gradients_of(model).items():
        assert relative_error(gradient, expected[name]) < 1e-5, name


# ---------------------------------------------------------------- from knobs to rates


@pytest.mark.parametrize(
    ("knobs", "rates"),
    [
        ({"dropout": 0.2}, [0.2, 0.2, 0.2]),
        ({"dropout": 0.4, "dropout_input": 0.65, "dropout_hidden": 0.3}, [0.65, 0.3, 0.3]),
        ({"dropout": 0.4, "dropout_input": 0.0}, [0.0, 0.4, 0.4]),
        ({"dropout": 0.0, "dropout_inner_input": 0.1, "dropout_last_input": 0.3}, [0.1, 0.1, 0.3]),
        ({"dropout": 0.2, "dropout_inner_input": 0.5, "dropout_last_input": 0.1}, [0.6, 0.6, 0.28]),
        ({"dropout_input": 0.0, "dropout_hidden": 0.5, "dropout_inner_input": 0.2}, [0.2, 0.6, 0.5]),
        ({"dropout_input": 0.5, "dropout_hidden": 0.2, "dropout_last_input": 0.5}, [0.5, 0.2, 0.6]),
    ],
)
def test_rates_of_a_layers_input_are_taken_together(knobs, rates):
    config = ModelConfig(num_layers=3, **knobs)
    assert config.layer_dropouts == pytest.approx(rates, rel=1e-12)
    assert len(ModelConfig(num_layers=1, **knobs).layer_dropouts) == 1


def test_a_single_layer_is_the_last_one():
    config = ModelConfig(num_layers=1, dropout_input=0.0, dropout_inner_input=0.1, dropout_last_input=0.3)
    assert config.layer_dropouts == [0.3]


@pytest.mark.parametrize(
    ("knobs", "locked"),
    [
        ({}, False),
        ({"dropout": 0.5, "weight_drop": 0.5, "dropout_embed": 0.1}, False),
        ({"dropout_input": 0.0}, True),
        ({"dropout_hidden": 0.3}, True),
        ({"dropout_hidden": 0.3, "locked": False}, False),
        ({"locked": True}, True),
        ({"model": "awd-lstm"}, True),
        ({"model": "awd-gru"}, True),
        ({"model": "awd-rnn"}, True),
        ({"model": "awd-gru", "locked": False}, False),
    ],
)
def test_where_dropout_is_locked(knobs, locked):
    assert ModelConfig(**knobs).has_locked_dropout is locked


@pytest.mark.parametrize(
    ("model", "cell"),
    [("awd-lstm", "lstm"), ("awd-gru", "gru"), ("awd-rnn", "rnn_tanh"), *[(cell, cell) for cell in CELLS]],
)
def test_every_model_has_a_cell(model, cell):
    assert ModelConfig(model=model).cell == cell


@pytest.mark.parametrize(("num_layers", "tied", "sizes"), [(3, True, [7, 7, 4]), (3, False, [7, 7, 7]), (1, True, [4])])
def test_a_tied_last_layer_is_as_wide_as_the_embedding(num_layers, tied, sizes):
    config = ModelConfig(hidden_size=7, embed_size=4, num_layers=num_layers, tied=tied)
    assert config.layer_sizes == sizes


@pytest.mark.parametrize("layer_norm", [False, True])
def test_the_wikitext_103_architecture_has_123_7_million_parameters(layer_norm):
    config = ModelConfig(hidden_size=1024, embed_size=400, num_layers=3, tied=True, layer_norm=layer_norm)
    parameters = LanguageModel(config, 267_735).named_parameters().values()
    assert 123.6e6 < sum(np.prod(parameter.shape) for parameter in parameters) < 123.9e6
