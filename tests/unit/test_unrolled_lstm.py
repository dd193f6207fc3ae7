"""The LSTM computed step by step: the fused one without its knobs, and numpy's with layer norm or candidate dropout."""

from __future__ import annotations

import mxnet as mx
import numpy as np
import pytest
from builders import (
    VOCAB_SIZE,
    assert_drops,
    build_model,
    forward_backward,
    gradients_of,
    int32,
    relative_error,
    values_of,
)
from reference import sigmoid

from gluon_lm.models import RecurrentLayer, UnrolledLSTMLayer

T, N, H, INPUT_SIZE = 6, 3, 5, 4
GATES = ["input", "forget", "candidate", "output"]
HYBRIDIZE = pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])
LAYER_NORM = pytest.mark.parametrize("layer_norm", [False, True], ids=["plain", "layer-norm"])


def initialised(layer, hybridize=True):
    """The layer with large parameters, which are the same for all layers of one architecture."""
    rng = np.random.RandomState(0)
    for name, parameter in sorted(layer._collect_params_with_prefix().items()):
        parameter.initialize()
        parameter.set_data(mx.nd.array(rng.uniform(-0.9, 0.9, parameter.shape) + name.endswith("_scale")))
    if hybridize:
        layer.hybridize(static_alloc=True)
    return layer


def sample(length=T, batch_size=N):
    """Inputs, hidden and cell state; and weights that make one number of what a layer returns."""
    rng = np.random.RandomState(1)
    state, widths = (1, batch_size, H), (INPUT_SIZE, H)
    inputs, weights = ([rng.uniform(-1, 1, shape) for shape in ((length, batch_size, w), state, state)] for w in widths)
    return inputs, weights


def run(layer, inputs, weights, seed=2):
    """In training: outputs and states, and the gradients of their weighted sum by inputs, states and parameters."""
    arrays = [mx.nd.array(array) for array in inputs]
    for array in arrays:
        array.attach_grad()
    mx.random.seed(seed)
    with mx.autograd.record():
        results = layer(*arrays)
        total = mx.nd.add_n(*[(result * mx.nd.array(weight)).sum() for result, weight in zip(results, weights)])
    total.backward()
    gradients = {name: array.grad.asnumpy() for name, array in zip(("inputs", "hidden", "cell"), arrays)}
    gradients.update({name: p.grad().asnumpy() for name, p in layer._collect_params_with_prefix().items()})
    return [result.asnumpy() for result in results], gradients


def evaluated(layer, inputs):
    return [result.asnumpy() for result in layer(*map(mx.nd.array, inputs))]


def assert_close(found, expected):
    for array, expected_array in zip(found[0], expected[0]):
        assert relative_error(array, expected_array) < 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, gradient in found[1].items():
        assert relative_error(gradient, expected[1][name]) < 1e-5, name


# ---------------------------------------------------------------- the layer in numpy


def numpy_layer(parameters, inputs, candidate_masks_TNH, epsilon=1e-5):
    """Outputs and states in float64; normalised where there are scales."""
    inputs_TNI, hidden_NH, cell_NH = inputs[0], inputs[1][0], inputs[2][0]
    outputs = []

    def norm(array, name):
        if f"{name}_scale" not in parameters:
            return array
        variance = array.var(axis=-1, keepdims=True)
        standard = (array - array.mean(axis=-1, keepdims=True)) / np.sqrt(variance + epsilon)
        return parameters[f"{name}_scale"] * standard + parameters[f"{name}_shift"]

    for x_NI, mask_NH in zip(inputs_TNI, candidate_masks_TNH):
        gates = x_NI @ parameters["i2h_weight"].T + hidden_NH @ parameters["h2h_weight"].T
        gates = gates + parameters.get("i2h_bias", 0) + parameters.get("h2h_bias", 0)
        i, f, g, o = (norm(gate, name) for gate, name in zip(np.split(gates, 4, axis=1), GATES))
        cell_NH = norm(sigmoid(f) * cell_NH + sigmoid(i) * np.tanh(g) * mask_NH, "cell")
        hidden_NH = sigmoid(o) * np.tanh(cell_NH)
        outputs.append(hidden_NH)
    return [np.stack(outputs), hidden_NH[None], cell_NH[None]]


def numpy_run(layer, inputs, weights, candidate_masks_TNH):
    """As `run`; the gradients are central differences, whose error is near 1e-9."""
    parameters = {name: p.data().asnumpy().astype(float) for name, p in layer._collect_params_with_prefix().items()}
    inputs = [array.astype(np.float32).astype(float) for array in inputs]

    def total():
        results = numpy_layer(parameters, inputs, candidate_masks_TNH)
        return sum((result * weight).sum() for result, weight in zip(results, weights))

    gradients = {}
    for name, array in {**dict(zip(("inputs", "hidden", "cell"), inputs)), **parameters}.items():
        gradients[name] = np.zeros_like(array)
        for index in np.ndindex(array.shape):
            value, slopes = array[index], []
            for step in (1e-5, -1e-5):
                array[index] = value + step
                slopes.append(total() / (2 * step))
            array[index] = value
            gradients[name][index] = sum(slopes)
    return numpy_layer(parameters, inputs, candidate_masks_TNH), gradients


def candidate_masks(rate, seed=2, shape=(T, N), hybridize=True):
    """What the candidate is multiplied with under a seed: of a layer whose output shows it, and nothing else."""
    layer = initialised(UnrolledLSTMLayer(INPUT_SIZE, H, candidate_dropout=rate), hybridize)
    for matrix in (layer.i2h_weight, layer.h2h_weight):
        matrix.set_data(mx.nd.zeros(matrix.shape))
    layer.h2h_bias.set_data(mx.nd.zeros(4 * H))
    open_gate, closed_gate = 200.0, -200.0
    layer.i2h_bias.set_data(mx.nd.array(np.repeat([open_gate, closed_gate, 0.5, open_gate], H)))
    (outputs_TNH, *_), _ = run(layer, *sample(*shape), seed=seed)
    masks_TNH = (outputs_TNH != 0) / (1 - rate)
    np.testing.assert_allclose(outputs_TNH, np.tanh(np.tanh(0.5) * masks_TNH), rtol=1e-5)
    return masks_TNH


# ---------------------------------------------------------------- without its knobs


@HYBRIDIZE
@pytest.mark.parametrize(("length", "batch_size"), [(T, N), (1, N), (T, 1), (1, 1)])
@pytest.mark.parametrize("drops", [(0.0, 0.0), (0.3, 0.5)], ids=["whole", "weight-drop"])
def test_it_equals_the_fused_layer(hybridize, length, batch_size, drops):
    layers = [RecurrentLayer("lstm", INPUT_SIZE, H, *drops), UnrolledLSTMLayer(INPUT_SIZE, H, *drops)]
    expected, found = (run(initialised(layer, hybridize), *sample(length, batch_size)) for layer in layers)
    assert_close(found, expected)


# ---------------------------------------------------------------- layer norm, candidate dropout


@HYBRIDIZE
@LAYER_NORM
@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_it_equals_numpy_with_the_same_masks(hybridize, layer_norm, rate):
    """Candidate dropout is on tanh(j) alone, and layer norm on the gates and the cell that is carried on."""
    layer = initialised(UnrolledLSTMLayer(INPUT_SIZE, H, candidate_dropout=rate, layer_norm=layer_norm), hybridize)
    masks_TNH = candidate_masks(rate)
    assert len(np.unique(masks_TNH)) == (2 if rate else 1)
    assert_close(run(layer, *sample()), numpy_run(layer, *sample(), masks_TNH))


@HYBRIDIZE
@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_candidate_masks_are_drawn_anew_at_each_step(hybridize, rate):
    masks_TNH = candidate_masks(rate, shape=(20, 50), hybridize=hybridize)
    assert_drops(masks_TNH, rate)
    has_changed = masks_TNH[::2] != masks_TNH[1::2]
    share = 2 * rate * (1 - rate)
    assert abs(has_changed.mean() - share) < 5 * (share * (1 - share) / has_changed.size) ** 0.5
    assert not np.array_equal(candidate_masks(rate, 3, (20, 50), hybridize), masks_TNH)


@HYBRIDIZE
@LAYER_NORM
def test_nothing_is_dropped_in_evaluation(hybridize, layer_norm):
    inputs, _ = sample()
    results = [
        evaluated(initialised(UnrolledLSTMLayer(INPUT_SIZE, H, *rates, layer_norm=layer_norm), hybridize), inputs)
        for rates in [(0.0, 0.0, 0.0), (0.3, 0.5, 0.4)]
    ]
    for without, found in zip(*results):
        np.testing.assert_array_equal(found, without)


# ---------------------------------------------------------------- in the model

KNOBS = {
    "locked": True,
    "tied": True,
    "dropout": 0.3,
    "dropout_embed": 0.2,
    "dropout_embed_elements": 0.2,
    "input_weight_drop": 0.2,
    "weight_drop": 0.4,
    "dropout_candidate": 0.3,
}


@LAYER_NORM
def test_hybridized_equals_imperative_with_states_over_windows_of_any_length(layer_norm):
    models = [build_model(hybridize=hybridize, layer_norm=layer_norm, **KNOBS) for hybridize in (False, True)]
    states = [model.begin_state(N, mx.cpu(0)) for model in models]
    ids = np.random.RandomState(0).randint(0, VOCAB_SIZE, (2, 8, N))
    for seed, length in enumerate([6, 6, 3, 8, 1, 6]):
        losses, gradients = [], []
        for k, model in enumerate(models):
            mx.random.seed(seed)
            loss, states[k] = forward_backward(model, ids[0, :length], ids[1, :length], states[k])
            losses.append(loss)
            gradients.append(gradients_of(model))
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        for imperative, hybrid in zip(*states):
            np.testing.assert_allclose(hybrid.asnumpy(), imperative.asnumpy(), rtol=1e-5, atol=1e-6)
        for name, gradient in gradients[0].items():
            assert relative_error(gradients[1][name], gradient) < 1e-5, name


@LAYER_NORM
@HYBRIDIZE
def test_weight_drop_in_an_unrolled_model(layer_norm, hybridize):
    settings = {"hybridize": hybridize, "hidden_size": 12, "layer_norm": layer_norm, "dropout_candidate": 0.3}
    model = build_model(weight_drop=0.4, **settings)
    assert all(isinstance(layer, UnrolledLSTMLayer) for layer in model.encoder.layers)
    ids = np.random.RandomState(0).randint(0, VOCAB_SIZE, (2, T, 8))
    hidden = []
    for each in (model, build_model(**settings)):
        mx.random.seed(1)
        forward_backward(each, *ids, each.begin_state(8, mx.cpu(0)))
        with mx.autograd.predict_mode():
            hidden.append(each.encoder(int32(ids[0]), *each.begin_state(8, mx.cpu(0)))[0].asnumpy())
    np.testing.assert_array_equal(*hidden)
    gradients = gradients_of(model)
    masks = [(gradients[f"encoder.layers.{i}.h2h_weight"] != 0) / 0.6 for i in range(2)]
    assert_drops(np.stack(masks), 0.4)
    assert not np.array_equal(*masks)
    assert all(np.all(gradients[f"encoder.layers.{i}.i2h_weight"] != 0) for i in range(2))


def test_layer_norm_takes_the_place_of_the_biases_and_starts_neutral():
    model = build_model(layer_norm=True, wide=False, num_layers=1)
    values = {name.rpartition(".")[2]: value for name, value in values_of(model).items() if ".layers." in name}
    vectors = {f"{name}_{vector}" for name in [*GATES, "cell"] for vector in ("scale", "shift")}
    assert values.keys() == {"i2h_weight", "h2h_weight"} | vectors
    for name in vectors:
        is_one = name.endswith("_scale") or name == "forget_shift"
        np.testing.assert_array_equal(values[name], np.full(5, float(is_one)))


@pytest.mark.parametrize("knobs", [{}, {"weight_drop": 0.5, "input_weight_drop": 0.2, "dropout_embed_elements": 0.1}])
def test_the_fused_layer_serves_wherever_it_can(knobs):
    assert all(type(layer) is RecurrentLayer for layer in build_model(**knobs).encoder.layers)
