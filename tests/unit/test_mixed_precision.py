"""Mixed precision: what is rounded and by how much, what is not rounded at all, and the scale of the loss."""

from __future__ import annotations

import json
import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from builders import build_model, forward_backward, gradients_of, int32, relative_error, values_of
from hypothesis import given, strategies as st
from processes import environment

from gluon_lm import losses
from gluon_lm.errors import ConfigError
from gluon_lm.losses import backward_through_head
from gluon_lm.models import language_model, precision
from gluon_lm.processors import may_multiply_tiles
from gluon_lm.training.loss_scale import LossScale

CPU = mx.cpu(0)
VOCAB_SIZE = 40
needs_bfloat16 = pytest.mark.usefixtures("bfloat16")


@pytest.fixture(params=["bfloat16", "float16"])
def kind(request, monkeypatch):
    """A half precision; float16's products, which MXNet has on GPUs only, are made in its place by numpy."""
    if request.param == "float16":
        monkeypatch.setattr(language_model, "check_half_precision", lambda kind, device: None)
        monkeypatch.setattr(mx.nd, "FullyConnected", with_float16(mx.nd.FullyConnected, float16_product))
        backward = with_float16(precision.fully_connected_backward, float16_product_backward)
        monkeypatch.setattr(precision, "fully_connected_backward", backward)
    else:
        request.getfixturevalue("bfloat16")
    return request.param


def with_float16(original, in_float16):
    """An operator that also takes float16, all operands of it."""

    def operator(first, *others, **settings):
        arrays = [first, *(array for array in others if isinstance(array, mx.nd.NDArray))]
        if first.dtype != np.float16:
            return original(first, *others, **settings)
        assert all(array.dtype == np.float16 for array in arrays)
        return in_float16(first, *others, **settings)

    return operator


# What a GPU gives: sums in float32, rounded to float16.


def float16_product(inputs, weight, bias, num_hidden, out):
    assert num_hidden == weight.shape[0] and out.dtype == np.float16
    inputs, weight, bias = (array.astype("float32").asnumpy() for array in (inputs, weight, bias))
    out[:] = mx.nd.array(inputs @ weight.T + bias, dtype="float16")


def float16_product_backward(grad, inputs, weight, grads):
    assert all(array.dtype == np.float16 for array in grads)
    grad, inputs, weight = (array.astype("float32").asnumpy() for array in (grad, inputs, weight))
    for out, value in zip(grads, (grad @ weight, grad.T @ inputs, grad.sum(axis=0))):
        out[:] = mx.nd.array(value, dtype="float16")


# ---------------------------------------------------------------- what is rounded, and by how much


FLOAT32 = 2.0**-24  # unit roundoff
# Unit roundoff, and half the distance of the numbers around zero: Higham 2002, "Accuracy and Stability of Numerical
# Algorithms", section 2.1.
ROUNDING = {"bfloat16": (2.0**-8, 2.0**-134), "float16": (2.0**-11, 2.0**-25)}


class Bounded:
    """Arrays with bounds on how far each element is off, through the products of a head and their roundings."""

    def __init__(self, value, error=0.0):
        self.value, self.error = value, error + np.zeros_like(value)

    def rounded(self, kind):
        unit, tiny = ROUNDING[kind]
        return Bounded(self.value, self.error + unit * (np.abs(self.value) + self.error) + tiny)

    def __matmul__(self, other):
        """With sums in float32, of which each of n terms is off by n units at most (Higham 2002, section 3.1)."""
        mine, theirs = np.abs(self.value) + self.error, np.abs(other.value) + other.error
        error = self.error @ np.abs(other.value) + mine @ other.error
        return Bounded(self.value @ other.value, error + (self.value.shape[-1] + 1) * FLOAT32 * (mine @ theirs))

    def __add__(self, other):
        return Bounded(self.value + other.value, self.error + other.error)

    @property
    def T(self):  # noqa: N802
        return Bounded(self.value.T, self.error.T)

    def holds(self, found, scale=1.0):
        assert (np.abs(found / scale - self.value) <= self.error).all()
        assert relative_error(found / scale, self.value) > 2.0**-18, "float32 would be that close"
        # The bound is worth something: a quarter of what is bounded at most, taken together.
        assert np.linalg.norm(self.error) < np.linalg.norm(self.value) / 4


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
@pytest.mark.parametrize("num_experts", [None, 3])
def test_loss_and_gradient_are_off_by_no_more_than_the_products_roundings(kind, num_experts, loss_scale, monkeypatch):
    """Every element, over several chunks, against float64 and bounds that follow from the roundings alone."""
    monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", 8)
    model = build_model(vocab_size=VOCAB_SIZE, num_experts=num_experts, wide=False, embed_size=5)
    model.train_in_half_precision(kind)
    rng, K, E = np.random.RandomState(0), num_experts or 1, 5
    inputs_RKE = rng.uniform(-1, 1, (12, K, E))
    priors_RK = rng.dirichlet(np.ones(K), 12)
    targets_R = rng.randint(0, VOCAB_SIZE, 12)
    features_RF = inputs_RKE.reshape(12, -1)
    if num_experts:
        features_RF = np.concatenate([features_RF, np.log(priors_RK)], axis=1)
    for parameter in model.named_parameters().values():
        parameter.zero_grad()

    loss, grad_TNF = backward_through_head(
        model.head, mx.nd.array(features_RF.reshape(3, 4, -1)), int32(targets_R), loss_scale
    )

    parameters = {name: mx.nd.array(v).asnumpy().astype(np.float64) for name, v in values_of(model).items()}
    X, W, b = (
        Bounded(mx.nd.array(array).asnumpy().astype(np.float64)).rounded(kind)
        for array in (inputs_RKE.reshape(-1, E), parameters["head.decoder.weight"], parameters["head.decoder.bias"])
    )
    logits = (X @ W.T + b).rounded(kind)
    # Logits that are off by d change a logarithm of a probability by 2 d, the logarithm of p(target) of a mixture too,
    # and so that of a responsibility by 4 d; the float32 work in between is good to 1e-5.
    d = logits.error.max() + 1e-5
    probs_SV = np.exp(logits.value) / np.exp(logits.value).sum(axis=1, keepdims=True)
    onehot_SV = np.eye(VOCAB_SIZE)[np.repeat(targets_R, K)]
    joint_RK = priors_RK * (probs_SV * onehot_SV).sum(axis=1).reshape(-1, K)
    share_S1 = (joint_RK / joint_RK.sum(axis=1, keepdims=True)).reshape(-1, 1)
    share_off, both_off = (np.expm1(4 * d), np.expm1(6 * d)) if num_experts else (0.0, np.expm1(2 * d))
    grad = Bounded(share_S1 * (probs_SV - onehot_SV), share_S1 * (probs_SV * both_off + onehot_SV * (share_off + 1e-5)))
    unit, tiny = ROUNDING[kind]
    half_grad = grad.rounded(kind)

    assert abs(float(loss.asscalar()) + np.log(joint_RK.sum(axis=1)).sum()) <= 12 * 2 * d
    # A chunk's share of a parameter's gradient is rounded by itself: together by at most what its terms' sizes give.
    sizes_VS = (np.abs(half_grad.value) + half_grad.error).T
    for name, rows in (("weight", X), ("bias", Bounded(np.ones((12 * K, 1))))):
        bounded = half_grad.T @ rows
        bounded.error += unit * (sizes_VS @ (np.abs(rows.value) + rows.error)) + 5 * tiny
        bounded.holds(gradients_of(model)[f"head.decoder.{name}"].reshape(bounded.value.shape), loss_scale)
    grad_RF = grad_TNF.asnumpy().reshape(12, -1)
    (half_grad @ W).rounded(kind).holds(grad_RF[:, : K * E].reshape(-1, E), loss_scale)
    if num_experts:
        found = grad_RF[:, K * E :].reshape(-1, 1) / loss_scale
        assert (np.abs(found + share_S1) <= share_S1 * share_off + 1e-5).all()


HEADS = {
    "softmax": {},
    "tied": {"tied": True, "embed_size": 5},
    "mixture": {"num_experts": 3, "embed_size": 5},
    "adaptive": {"hidden_size": 16, "cutoffs": (10, 25)},
}


@pytest.mark.parametrize("settings", HEADS.values(), ids=HEADS)
def test_but_for_the_rounding_every_head_is_as_in_float32(settings, monkeypatch):
    """With float32 in the place of half precision: to the bit, in window after window of changing parameters."""
    monkeypatch.setattr(losses, "CHUNK_SOFTMAXES", 8)
    monkeypatch.setattr(precision, "FORWARD_MULTIPLE", 1)  # other numbers of rows, other last bits
    monkeypatch.setattr(language_model, "check_half_precision", lambda kind, device: None)
    monkeypatch.setitem(precision.DTYPES, "bfloat16", np.dtype(np.float32))
    whole, halved = (build_model(vocab_size=VOCAB_SIZE, **settings) for _ in range(2))
    halved.train_in_half_precision("bfloat16")
    rng = np.random.RandomState(3)
    for _ in range(3):
        hidden_TNH = mx.nd.array(rng.uniform(-1, 1, (3, 4, whole.encoder.layer_sizes[-1])))
        targets_R = int32(rng.randint(0, VOCAB_SIZE, 12))
        results = []
        for model, loss_scale in ((whole, 1.0), (halved, 1024.0)):
            for parameter in model.named_parameters().values():
                parameter.zero_grad()
            features_TNF = model.head.features(hidden_TNH)
            loss, grad_TNF = backward_through_head(model.head, features_TNF, targets_R, loss_scale)
            grads = [grad for grad in gradients_of(model).values() if np.abs(grad).max() > 0]
            results.append([loss.asnumpy(), *(array / loss_scale for array in (grad_TNF.asnumpy(), *grads))])
            for parameter in model.named_parameters().values():
                parameter.set_data(parameter.data() * 0.9)
        assert len(results[0]) == len(results[1]) >= 3
        for one, other in zip(*results):
            np.testing.assert_array_equal(one, other)


@needs_bfloat16
def test_windows_of_any_length_take_products_of_few_sizes_and_no_row_is_lost(monkeypatch):
    """OneDNN keeps memory as large as the logits for every number of rows that it has met."""
    num_rows, fully_connected = [], mx.nd.FullyConnected

    def noted(inputs, *others, **settings):
        num_rows.append(inputs.shape[0])
        return fully_connected(inputs, *others, **settings)

    monkeypatch.setattr(mx.nd, "FullyConnected", noted)
    head = build_model(vocab_size=VOCAB_SIZE).head
    products = precision.HalfProducts("bfloat16")
    products.begin_window(CPU)
    weight_VE, bias_V = (
        mx.nd.amp_cast(mx.nd.amp_cast(parameter.data(), dtype=products.dtype), dtype="float32").asnumpy()
        for parameter in (head.decoder.weight, head.decoder.bias)
    )
    rng = np.random.RandomState(0)
    for rows in (1, 63, 64, 65, 255, 256, 257, 300, 511, 513, 700, 1024, 5):
        inputs_SE = rng.randint(-8, 9, (rows, weight_VE.shape[1])) / 8  # exact in bfloat16
        room_SV = mx.nd.full((rows, VOCAB_SIZE), np.nan)
        found = products.affine(head.decoder, mx.nd.array(inputs_SE), room_SV).output_SV.asnumpy()
        expected = inputs_SE @ weight_VE.T.astype(np.float64) + bias_V
        assert (np.abs(found - expected) <= 2.0**-8 * np.abs(expected) + 1e-6).all()
    assert set(num_rows) == {64, 128, 192, 256, 320, 512}


@needs_bfloat16
@pytest.mark.parametrize(
    "settings",
    [{"model": "lstm"}, {"model": "gru", "num_experts": 2}, {"layer_norm": True}],
    ids=["lstm", "mixture", "step by step"],
)
def test_beside_the_heads_products_bfloat16_changes_no_bit(settings, monkeypatch):
    """The encoder goes back from the head's gradient exactly as it does in float32."""
    tokens_TN, targets_TN = np.random.RandomState(3).randint(0, VOCAB_SIZE, (2, 6, 4)).astype(np.int32)
    halved, whole = (build_model(vocab_size=VOCAB_SIZE, **settings) for _ in range(2))
    halved.train_in_half_precision("bfloat16")
    by_features = []

    def noted(*arguments):
        loss, grad_TNF = backward_through_head(*arguments)
        by_features.append(grad_TNF.copy())
        return loss, grad_TNF

    monkeypatch.setattr(losses, "backward_through_head", noted)
    forward_backward(halved, tokens_TN, targets_TN, halved.begin_state(4, CPU))
    for parameter in whole.named_parameters().values():
        parameter.zero_grad()
    with mx.autograd.record():
        hidden_TNH, *_ = whole.encoder(int32(tokens_TN), *whole.begin_state(4, CPU))
        features_TNF = whole.head.features(hidden_TNH)
    features_TNF.backward(by_features[0])
    found = gradients_of(halved)
    compared = {name: value for name, value in gradients_of(whole).items() if not name.startswith("head.decoder.")}
    assert len(compared) > 5
    for name, value in compared.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.mark.skipif(not may_multiply_tiles(), reason="no AMX here, or the kernel does not allow it")
def test_the_bounds_hold_on_the_processors_matrix_unit():
    code = """
import sys, pytest
from gluon_lm.config import Config, TrainingConfig
from gluon_lm.runtime import prepare_training
prepare_training(Config(training=TrainingConfig(amp="bfloat16")))
raise SystemExit(pytest.main([sys.argv[1], "-q", "-s", "-k", "bfloat16 and roundings", "-p", "no:cacheprovider"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, __file__],
        env=environment(DNNL_VERBOSE="1"),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    assert "Intel AMX with bfloat16" in done.stdout and "src_bf16" in done.stdout and "4 passed" in done.stdout


@needs_bfloat16
def test_evaluation_and_use_stay_float32():
    """To the bit, between and after windows of training in half precision."""
    tokens_TN = np.random.RandomState(3).randint(0, VOCAB_SIZE, (6, 4)).astype(np.int32)

    def outcome(model):
        states = model.begin_state(4, CPU)
        hidden_TNH, *_ = model.encoder(int32(tokens_TN), *states)
        scored = losses.target_losses(model.head, hidden_TNH, int32(tokens_TN.reshape(-1)))
        return [scored.asnumpy(), model(int32(tokens_TN), *states)[0].asnumpy(), *values_of(model).values()]

    whole, halved = (build_model(vocab_size=VOCAB_SIZE, num_experts=2) for _ in range(2))
    halved.train_in_half_precision("bfloat16")
    forward_backward(halved, tokens_TN, tokens_TN, halved.begin_state(4, CPU))
    for found, expected in zip(outcome(halved), outcome(whole)):
        np.testing.assert_array_equal(found, expected)


# ---------------------------------------------------------------- float16: the graph of the encoder


def graph_in_float16(model, num_inputs):
    """The nodes of the encoder's graph with the types of their outputs, and the types of the whole's outputs."""
    graph = precision.in_float16(model.encoder, num_inputs, whole=model.encoder.embedding)._cached_graph[1]
    types = {name: "int32" if name == "data0" else "float32" for name in graph.list_arguments()}
    internals = graph.get_internals()
    described = json.loads(internals.tojson(remove_amp_cast=False))
    nodes = described["nodes"]
    for (number, output, *_), dtype in zip(described["heads"], internals.infer_type(**types)[1]):
        nodes[number].setdefault("types", {})[output] = np.dtype(dtype).name
    return nodes, [np.dtype(dtype).name for dtype in graph.infer_type(**types)[1]]


@pytest.mark.parametrize(
    ("settings", "num_inputs", "halves"),
    [
        ({"model": "lstm", "tied": True, "embed_size": 5}, 5, {"RNN": 2}),
        (
            {"model": "awd-gru", "weight_drop": 0.3, "dropout": 0.2, "dropout_embed": 0.1, "num_layers": 3},
            4,
            {"RNN": 3},
        ),
        ({"model": "rnn_relu", "dropout_embed_elements": 0.3, "input_weight_drop": 0.1}, 3, {"RNN": 2}),
        ({"layer_norm": True, "dropout_candidate": 0.1}, 5, {"FullyConnected": 2}),
    ],
    ids=["lstm", "awd-gru", "elements dropped", "step by step"],
)
@pytest.mark.filterwarnings("error")
def test_recurrent_layers_and_affine_maps_alone_compute_in_float16(settings, num_inputs, halves):
    nodes, outputs = graph_in_float16(build_model(vocab_size=VOCAB_SIZE, **settings), num_inputs)
    in_half = [node for node in nodes if node["op"] in ("RNN", "FullyConnected")]
    assert {op: sum(node["op"] == op for node in in_half) for op in halves} == halves
    for node in in_half:
        assert set(node["types"].values()) == {"float16"}
        assert {nodes[number]["types"][output] for number, output, *_ in node["inputs"]} == {"float16"}
    # What moves values about and computes nothing may have either type.
    neutral = {"amp_cast", "Dropout", "_copy", "null"}
    for node in nodes:
        if node["op"] not in neutral and node not in in_half:
            assert set(node["types"].values()) <= {"float32", "int32"}, node["name"]
    assert set(outputs) == {"float32"}
    cast = {nodes[node["inputs"][0][0]]["name"] for node in nodes if node["op"] == "amp_cast"}
    assert not [name for name in cast if "embedding" in name], "nothing as wide as the vocabulary is cast"


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "awd-lstm", "weight_drop": 0.3, "dropout": 0.2, "dropout_embed": 0.1, "tied": True, "embed_size": 5},
        {"layer_norm": True},
    ],
    ids=["awd-lstm", "step by step"],
)
def test_the_graph_that_casts_are_put_into_is_the_encoder(settings, monkeypatch):
    """Without the casts, which no CPU can follow, it gives the encoder's numbers and gradients, on every device."""
    monkeypatch.setattr(precision.amp, "convert_symbol", lambda graph, kind, **settings: graph)
    monkeypatch.setattr(language_model, "check_half_precision", lambda kind, device: None)
    tokens_TN = np.random.RandomState(3).randint(0, VOCAB_SIZE, (6, 4)).astype(np.int32)
    devices = [mx.cpu(0), mx.cpu(1)]
    expected, found = (build_model(devices, vocab_size=VOCAB_SIZE, **settings) for _ in range(2))
    found.train_in_half_precision("float16")
    found.head.products = expected.head.products
    assert found.training_encoder is not found.encoder
    assert list(found.named_parameters()) == list(expected.named_parameters())
    for device in devices:
        results = []
        for model in (expected, found):
            mx.random.seed(5)
            loss, states = forward_backward(model, tokens_TN, tokens_TN, model.begin_state(4, device))
            grads = [parameter.grad(device).asnumpy() for parameter in model.named_parameters().values()]
            results.append([np.array(loss), *[state.asnumpy() for state in states], *grads])
        for one, other in zip(*results):
            np.testing.assert_array_equal(one, other)
            assert np.abs(one).max() > 0


# ---------------------------------------------------------------- the scale of the loss


@given(st.lists(st.integers(0, 6001), min_size=1, max_size=6))
def test_the_scale_follows_the_runs_of_steps_between_overflows(runs):
    """Doubled after each 2,000 steps in a row, halved by each overflow."""
    scale = LossScale()
    for i, run in enumerate(runs):
        if i:
            scale.update(has_overflowed=True)
        for _ in range(run):
            scale.update(has_overflowed=False)
    assert scale.scale == 2.0 ** (16 - (len(runs) - 1) + sum(run // 2000 for run in runs)) or scale.scale == 2.0**24
    assert scale.taken == runs[-1] % 2000
    again = LossScale()
    again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert vars(again) == vars(scale)


def test_the_scale_stays_in_its_bounds():
    scale = LossScale()
    for _ in range(9 * 2000):
        scale.update(has_overflowed=False)
    assert scale.scale == 2.0**24
    while not scale.is_smallest:
        scale.update(has_overflowed=True)
    assert scale.scale == 1


@pytest.mark.parametrize(("num_targets", "rounded"), [(1, 1), (2, 2), (3, 4), (1024, 1024), (1120, 2048)])
def test_the_factor_is_that_of_a_mean_and_a_power_of_two(num_targets, rounded):
    assert LossScale().factor(num_targets) == 2.0**16 / rounded


# ---------------------------------------------------------------- who may not


@pytest.mark.parametrize(
    ("kind", "flags", "device", "said"),
    [
        ("bfloat16", {"avx512f", "avx512_vnni"}, CPU, "(avx512_bf16 in /proc/cpuinfo); use --amp none"),
        ("bfloat16", {"avx512_bf16"}, mx.gpu(0), "on CPUs only, and this run is on gpu(0); use --amp float16"),
        ("float16", {"avx512_bf16"}, CPU, "needs a GPU, and this run is on cpu(0)"),
    ],
)
def test_a_device_that_lacks_it_is_refused_in_a_line_that_says_why(kind, flags, device, said, monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", lambda: frozenset(flags))
    with pytest.raises(ConfigError, match=rf"^--amp {kind}: [^\n]+$") as caught:
        precision.check_half_precision(kind, device)
    assert said in str(caught.value)


def test_a_model_checks_its_devices(monkeypatch):
    monkeypatch.setattr(precision, "cpu_flags", frozenset)
    with pytest.raises(ConfigError, match="AVX512-BF16"):
        build_model().train_in_half_precision("bfloat16")
