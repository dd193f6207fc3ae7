"""The model against the numpy reference, hybridized and not; its parameters, states and dropout."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest
import reference
from builders import VOCAB_SIZE, build_model, forward_backward, gradients_of, int32, relative_error, values_of

from gluon_lm.config import CELLS, ModelConfig
from gluon_lm.models import LanguageModel

T, N = 7, 4


def windows(count, seed=0):
    """`count` consecutive windows: (tokens, targets), some words twice and some never."""
    ids = np.random.RandomState(seed).randint(0, VOCAB_SIZE - 1, (count * T + 1, N))
    return [(ids[k * T : (k + 1) * T], ids[k * T + 1 : (k + 1) * T + 1]) for k in range(count)]


def begin(model):
    return model.begin_state(num_streams=N, device=mx.cpu(0))


def flat(states):
    return [state.asnumpy()[0] for state in states]


# ---------------------------------------------------------------- the reference itself


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("num_targets", [3 * N + 1, 2])
@pytest.mark.parametrize(
    "head",
    [{}, {"tied": True}, {"num_experts": 3}, {"tied": True, "num_experts": 3}, {"cutoffs": (3, 8)}],
    ids=["softmax", "softmax-tied", "mixture", "mixture-tied", "adaptive"],
)
def test_the_reference_gradients_are_the_slopes_of_its_loss(cell, num_targets, head):
    model = build_model(model=cell, last_hidden_size=16 if "cutoffs" in head else None, **head)
    parameters = values_of(model)
    ((tokens, targets),) = windows(1)
    states = [state + 0.3 for state in reference.zero_states(cell, parameters, N)]
    rng = np.random.RandomState(3)
    masks = [rng.uniform(0.5, 1.5, (T, N, width)) for width in (6, *model.encoder.layer_sizes)]
    latent_mask = rng.uniform(0.5, 1.5, (T * N, 3, 6)) if "num_experts" in head else None

    def run():
        loss, gradients, _ = reference.loss_and_gradients(
            cell, parameters, tokens, targets, states, num_targets, masks, alpha=2.0, beta=1.0, latent_mask=latent_mask
        )
        raw, *_ = reference.encode(cell, parameters, tokens, states, masks)
        penalty, *_ = reference.activation_penalty(raw * masks[-1], raw, num_targets, alpha=2.0, beta=1.0)
        return loss + num_targets * penalty, gradients

    gradients, epsilon = run()[1], 1e-6
    for name, value in parameters.items():
        direction = rng.randn(*value.shape)
        value += epsilon * direction
        above = run()[0]
        value -= 2 * epsilon * direction
        below = run()[0]
        value += epsilon * direction
        slope = (above - below) / (2 * epsilon)
        assert slope == pytest.approx((gradients[name] * direction).sum(), rel=1e-6, abs=1e-7), name


# ---------------------------------------------------------------- forward and gradients


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("num_layers", [1, 3])
@pytest.mark.parametrize("mixture", [{}, {"num_experts": 3, "last_hidden_size": 7}], ids=["softmax", "mixture"])
@pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])
@pytest.mark.parametrize("layers", ["oneDNN's", "MXNet's own"])  # those of training, and of writing word by word
def test_forward_and_gradients_agree_with_numpy_over_two_windows(
    cell, tied, num_layers, mixture, hybridize, layers, monkeypatch
):
    mx.nd.waitall()  # what an earlier test left to be computed, by the layers that it began with
    monkeypatch.setenv("MXNET_USE_MKLDNN_RNN", str(int(layers == "oneDNN's")))
    model = build_model(model=cell, tied=tied, num_layers=num_layers, hybridize=hybridize, **mixture)
    parameters = values_of(model)
    states, expected_states = begin(model), reference.zero_states(cell, parameters, N)
    for tokens, targets in windows(2):
        log_probs, *_ = model(int32(tokens), *states)
        expected_log_probs, _ = reference.log_probs(cell, parameters, tokens, expected_states)
        assert relative_error(log_probs.asnumpy(), expected_log_probs) < 1e-5

        loss, states = forward_backward(model, tokens, targets, states)
        expected_loss, expected, expected_states = reference.loss_and_gradients(
            cell, parameters, tokens, targets, expected_states
        )
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert len(states) == len(expected_states)
        for state, expected_state in zip(states, expected_states):
            assert state.shape == (1, *expected_state.shape)
            assert relative_error(state.asnumpy()[0], expected_state) < 1e-5
        gradients = gradients_of(model)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            assert relative_error(gradient, expected[name]) < 1e-5, name


def test_gradients_add_up_over_backward_passes():
    model = build_model()
    ((tokens, targets),) = windows(1)
    forward_backward(model, tokens, targets, begin(model))
    once = gradients_of(model)
    with mx.autograd.record():
        log_probs, *_ = model(int32(tokens), *begin(model))
        loss = -mx.nd.pick(log_probs, int32(targets)).sum()
    loss.backward()
    for name, gradient in gradients_of(model).items():
        assert relative_error(gradient, 2 * once[name]) < 1e-5, name


# ---------------------------------------------------------------- hybridized


@pytest.mark.parametrize("cell", sorted(CELLS))
def test_hybridized_equals_imperative_with_states_over_windows_of_any_length(cell):
    models = [build_model(model=cell, tied=True, hybridize=hybridize) for hybridize in (False, True)]
    states = [begin(model) for model in models]
    for length, (tokens, targets) in zip([T, T, 3, T, 1], windows(5)):
        losses = []
        for i, model in enumerate(models):
            loss, states[i] = forward_backward(model, tokens[:length], targets[:length], states[i])
            losses.append(loss)
        assert losses[1] == pytest.approx(losses[0], rel=1e-6)
        for imperative, hybrid in zip(flat(states[0]), flat(states[1])):
            np.testing.assert_allclose(hybrid, imperative, rtol=1e-6, atol=1e-7)
        for imperative, hybrid in zip(gradients_of(models[0]).values(), gradients_of(models[1]).values()):
            assert relative_error(hybrid, imperative) < 1e-6


@pytest.mark.parametrize("training", [False, True])
def test_memory_that_a_graph_keeps_does_not_overwrite_carried_states(training):
    model = build_model()
    states, handles, copies = begin(model), [], []
    for tokens, targets in windows(4):
        if training:
            _, states = forward_backward(model, tokens, targets, states)
        else:
            _, *states = model.encoder(int32(tokens), *states)
        handles.append(states)
        copies.append(flat(states))
    for handle, copy in zip(handles, copies):
        for now, then in zip(flat(handle), copy):
            np.testing.assert_array_equal(now, then)


# ---------------------------------------------------------------- parameters


def test_a_tied_matrix_is_one_parameter_and_the_last_layer_has_its_width():
    model = build_model(tied=True, embed_size=6, hidden_size=5, num_layers=3)
    assert model.head.decoder.weight is model.encoder.embedding.weight
    names = list(model.named_parameters())
    assert "head.decoder.weight" not in names and "head.decoder.bias" in names
    assert len(names) == 1 + 3 * 4 + 1
    assert model.encoder.layer_sizes == [5, 5, 6]
    assert [state.shape for state in begin(model)] == [(1, N, 5)] * 4 + [(1, N, 6)] * 2


def test_an_untied_model_has_two_matrices():
    model = build_model(embed_size=6, hidden_size=5)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters().items()}
    assert shapes["encoder.embedding.weight"] == (VOCAB_SIZE, 6)
    assert shapes["head.decoder.weight"] == (VOCAB_SIZE, 5)
    assert model.encoder.layer_sizes == [5, 5]


UNIFORM = {
    "encoder.embedding.weight": 0.1,
    "encoder.layers.0.i2h_weight": 25**-0.5,
    "encoder.layers.0.i2h_bias": 25**-0.5,
    "encoder.layers.0.h2h_weight": 25**-0.5,
    "encoder.layers.1.h2h_bias": 25**-0.5,
    "head.decoder.weight": 0.1,
    "head.decoder.bias": 0.0,
}
XAVIER = {
    "encoder.embedding.weight": 0.1,
    "encoder.layers.0.i2h_weight": (6 / (100 + 30)) ** 0.5,
    "encoder.layers.0.i2h_bias": 0.0,
    "encoder.layers.1.h2h_weight": (6 / (100 + 25)) ** 0.5,
    "encoder.layers.1.h2h_bias": 0.0,
    "head.decoder.weight": (6 / (200 + 25)) ** 0.5,
    "head.decoder.bias": 0.0,
}


@pytest.mark.parametrize(
    ("init", "name", "bound"),
    [("uniform", *item) for item in UNIFORM.items()] + [("xavier", *item) for item in XAVIER.items()],
)
def test_first_weights_fill_their_range(init, name, bound):
    model = build_model(vocab_size=200, embed_size=30, hidden_size=25, init=init, wide=False)
    values = values_of(model)[name]
    assert np.abs(values).max() <= bound * (1 + 1e-6)
    if bound:
        assert np.abs(values).max() > 0.9 * bound
        assert values.std() == pytest.approx(bound / 3**0.5, rel=0.2)
        assert abs(values.mean()) < 0.2 * bound


def test_uniform_bound_of_a_tied_last_layer_is_of_its_own_width():
    model = build_model(tied=True, vocab_size=50, embed_size=64, hidden_size=4, wide=False)
    values = values_of(model)
    assert np.abs(values["encoder.layers.1.i2h_weight"]).max() <= 64**-0.5 < 4**-0.5
    assert np.abs(values["encoder.layers.0.i2h_weight"]).max() > 0.9 * 4**-0.5


def test_first_weights_depend_on_the_seed_alone():
    def draw(seed, devices):
        mx.random.seed(int(np.random.randint(1 << 30)))
        return build_model(devices, seed=seed, wide=False)

    devices = [mx.cpu(i) for i in range(3)]
    one, three, other = values_of(draw(5, devices[:1])), draw(5, devices), values_of(draw(6, devices[:1]))
    for device in devices:
        for name, value in values_of(three, device).items():
            np.testing.assert_array_equal(value, one[name])
    assert not np.array_equal(other["encoder.embedding.weight"], one["encoder.embedding.weight"])


# ---------------------------------------------------------------- dropout


def hidden_vectors(model, tokens, seed=None):
    """What the head is given: in training with that seed, or in evaluation."""
    mx.random.seed(seed or 0)
    with mx.autograd.pause() if seed is None else mx.autograd.record():
        hidden, *_ = model.encoder(int32(tokens), *model.begin_state(tokens.shape[1], mx.cpu(0)))
        return model.output_dropout(hidden).asnumpy()


@pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])
def test_dropout_follows_the_seed_and_is_off_in_evaluation(hybridize):
    model = build_model(dropout=0.5, hybridize=hybridize)
    without = build_model(dropout=0.0, hybridize=hybridize)
    ((tokens, _),) = windows(1)
    first = hidden_vectors(model, tokens, seed=1)
    np.testing.assert_array_equal(hidden_vectors(model, tokens, seed=1), first)
    assert not np.array_equal(hidden_vectors(model, tokens, seed=2), first)
    np.testing.assert_array_equal(hidden_vectors(model, tokens), hidden_vectors(without, tokens))


@pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])
def test_output_dropout_keeps_the_expected_value(hybridize):
    rate = 0.25
    model = build_model(dropout=rate, num_layers=1, hybridize=hybridize)
    model.encoder.embedding.weight.set_data(mx.nd.zeros((VOCAB_SIZE, 6)))  # no input for dropout to act on
    tokens = np.zeros((5, 400), int)
    kept, dropped = hidden_vectors(model, tokens), hidden_vectors(model, tokens, seed=3)
    gone = dropped == 0
    np.testing.assert_allclose(dropped[~gone], kept[~gone] / (1 - rate), rtol=1e-5)
    assert gone.mean() == pytest.approx(rate, abs=0.02)  # 10,000 draws: five standard deviations


@pytest.mark.parametrize("cell", sorted(CELLS))
@pytest.mark.parametrize("hybridize", [False, True], ids=["imperative", "hybrid"])
def test_dropout_acts_between_the_layers(cell, hybridize):
    def changed(num_layers):
        """Share of the outputs that survive the last dropout and are not what they are without dropout."""
        model = build_model(model=cell, dropout=0.5, num_layers=num_layers, hybridize=hybridize)
        model.encoder.embedding.weight.set_data(mx.nd.zeros((VOCAB_SIZE, 6)))
        tokens = np.zeros((3, 50), int)
        kept, dropped = hidden_vectors(model, tokens), hidden_vectors(model, tokens, seed=3)
        survived = dropped != 0
        return np.mean(~np.isclose(dropped[survived], 2 * kept[survived], rtol=1e-5))

    assert changed(num_layers=1) == 0
    assert changed(num_layers=2) > 0.9


def operators(graph):
    """The nodes of a graph in JSON, and of the loops in it."""
    for node in graph["nodes"]:
        yield node
        for inner in node.get("subgraphs", []):
            yield from operators(inner)


@pytest.mark.parametrize(
    ("settings", "number"),
    [
        ({"dropout": 0.2, "dropout_embed": 0.1, "dropout_embed_elements": 0.1}, 5),
        ({"model": "awd-gru", "dropout": 0.2, "weight_drop": 0.3, "input_weight_drop": 0.1}, 7),
        ({"dropout": 0.2, "dropout_candidate": 0.1}, 5),
        ({"dropout": 0.2, "num_experts": 3}, 4),
    ],
    ids=["plain", "weights", "candidate", "mixture"],
)
def test_no_dropout_is_cudnns_which_the_seed_does_not_reach(settings, number):
    model = build_model(**settings, hybridize=False)
    inputs = [mx.sym.var(f"data{i}") for i in range(1 + len(begin(model)))]
    graph = json.loads(mx.sym.Group(list(model(*inputs))).tojson())
    found = [node["attrs"]["cudnn_off"] for node in operators(graph) if node["op"] == "Dropout"]
    assert found == ["True"] * number


def test_dropout_acts_on_the_embedded_words():
    model = build_model(dropout=0.5, num_layers=1)
    tokens = np.full((1, 50), 2)
    kept, dropped = hidden_vectors(model, tokens), hidden_vectors(model, tokens, seed=3)
    survived = dropped != 0
    assert np.mean(~np.isclose(dropped[survived], 2 * kept[survived], rtol=1e-5)) > 0.9


def test_a_model_is_called_as_one_block():
    model = LanguageModel(ModelConfig(embed_size=3, hidden_size=4), 5)
    model.initialize_parameters(0, [mx.cpu(0)])
    model.hybridize()
    log_probs, *states = model(int32([[1, 2]]), *model.begin_state(2, mx.cpu(0)))
    assert log_probs.shape == (1, 2, 5)
    assert len(states) == 4
    np.testing.assert_allclose(np.exp(log_probs.asnumpy()).sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("layer_norm", [False, True])
def test_gluons_own_initialisation_knows_biases_and_normalisation(layer_norm):
    model = LanguageModel(ModelConfig(embed_size=6, hidden_size=5, layer_norm=layer_norm), VOCAB_SIZE)
    model.initialize(mx.init.Xavier())
    for name, values in values_of(model).items():
        if values.ndim == 1:
            starts_at = float(name.endswith(("_scale", "forget_shift")))
            assert (values == starts_at).all(), name
