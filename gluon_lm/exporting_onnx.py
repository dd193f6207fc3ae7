"""The same export as an ONNX graph, which onnxruntime runs: ``model.onnx`` instead of the symbol and parameters.

The graph uses the operators of opset 17: one LSTM, GRU or RNN operator per layer, or a Scan over time for a layer with
layer normalisation. Matrices hold a block of H rows for each gate; MXNet and ONNX order the blocks differently.

Shapes: T time, N streams, I input width, H hidden width, E embedding width, V vocabulary, R rows (T x N), K experts,
D = K x E, S softmaxes (R x K).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .config import SMALLEST_FLOAT32, ModelConfig
from .errors import MissingDependency
from .exporting import state_layout, write_export
from .trained import TrainedModel

MODEL, WEIGHTS = "model.onnx", "model.onnx.data"
_OPSET, _IR_VERSION = 17, 8
_MAX_FILE_BYTES = (1 << 31) - (1 << 24)  # protobuf's limit, less the graph; beyond it the weights get their own file
_LAYER_NORM_EPSILON = 1e-5  # of MXNet's operator
# The operator of each cell, the position in MXNet's order of each of ONNX's gates, and further attributes.
# MXNet: input, forget, candidate, output; reset, update, candidate. ONNX: input, output, forget, candidate; update,
# reset, candidate.
_CELLS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
}


def export_onnx(name: str | Path | None, output: str | Path) -> dict[str, Any]:
    """Write a run's model as ONNX; an older export of that name is replaced once all is written.

    Parameters and errors are those of `gluon_lm.exporting.export_run`, and:

    Raises
    ------
    MissingDependency
        If the package onnx is not installed.
    """
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise MissingDependency(
            f"--format onnx: needs the package onnx ({error}); pip install 'gluon_lm[onnx]'"
        ) from error
    return write_export(name, output, "onnx", _write_onnx)


def _write_onnx(trained: TrainedModel, folder: Path) -> dict[str, Any]:
    import onnx
    from onnx import TensorProto, helper

    from . import __version__

    model, layer_norm = trained.model, trained.config.model.layer_norm
    states = state_layout(trained.config.model)
    graph = _Graph({name: parameter.data().asnumpy() for name, parameter in model.named_parameters().items()})
    hidden_TNH = graph.add("Gather", [graph.weight("encoder.embedding.weight"), "tokens"])
    for layer in range(len(trained.config.model.layer_sizes)):
        old = [state["name"] for state in states if state["layer"] == layer]
        new = [f"new_{name}" for name in old]
        if layer_norm:
            hidden_TNH = _add_layer_norm_lstm(graph, layer, hidden_TNH, old, new)
        else:
            hidden_TNH = _add_layer(graph, model.config.cell, layer, hidden_TNH, old, new)
    hidden_RH = graph.add("Flatten", [hidden_TNH], axis=2)
    log_probs_RV = _HEADS[model.config.head](graph, hidden_RH, model.config)
    shape = graph.add("Concat", [graph.add("Shape", ["tokens"]), graph.integer(-1)], axis=0)
    graph.add("Reshape", [log_probs_RV, shape], "log_probs")

    inputs = [
        {"name": "tokens", "shape": ["T", "N"], "dtype": "int64", "what": "word ids"},
        *({**state, "dtype": "float32"} for state in states),
    ]
    outputs = [
        {"name": "log_probs", "shape": ["T", "N", "V"], "dtype": "float32", "what": "log-probability, base e"},
        *({"name": f"new_{state['name']}", "next": state["name"]} for state in states),
    ]
    floats = [("log_probs", ["T", "N", model.vocab_size]), *((f"new_{s['name']}", s["shape"]) for s in states)]
    proto = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "language_model",
            [
                helper.make_tensor_value_info("tokens", TensorProto.INT64, ["T", "N"]),
                *(helper.make_tensor_value_info(s["name"], TensorProto.FLOAT, s["shape"]) for s in states),
            ],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in floats],
        ),
        opset_imports=[helper.make_opsetid("", _OPSET)],
        ir_version=_IR_VERSION,
        producer_name="gluon_lm",
        producer_version=__version__,
    )
    proto.graph.initializer.extend(graph.initializers)  # last, because the helpers copy their arguments
    is_large = sum(len(tensor.raw_data) for tensor in graph.initializers) > _MAX_FILE_BYTES
    onnx.save_model(proto, str(folder / MODEL), save_as_external_data=is_large, location=WEIGHTS, size_threshold=0)
    return {"opset": _OPSET, "inputs": inputs, "outputs": outputs}


class _Graph:
    """Nodes and weights, as they are added.

    Parameters
    ----------
    parameters : mapping of str to ndarray
        The model's, by name.
    prefix : str
        Of generated names: a graph within a graph must not use those of the outer one.
    """

    def __init__(self, parameters: Mapping[str, np.ndarray], prefix: str = "") -> None:
        self.parameters, self._prefix = parameters, prefix
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def add(self, operator: str, inputs: list[str], outputs: str | list[str] | None = None, **attributes: Any) -> str:
        """Add a node; returns the name of its first output, which is generated if none is given."""
        from onnx import helper

        name = f"{self._prefix}{operator}_{len(self.nodes)}"
        names = [outputs] if isinstance(outputs, str) else outputs or [name]
        self.nodes.append(helper.make_node(operator, inputs, names, name=name, **attributes))
        return names[0]

    def integer(self, value: int) -> str:
        """Add a vector of one number."""
        return self.add("Constant", [], value_ints=[value])

    def constant(self, name: str, array: np.ndarray) -> str:
        """Store an array under a name, which it returns."""
        from onnx import numpy_helper

        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def weight(self, name: str) -> str:
        """Store a parameter as it is."""
        return self.constant(name, self.parameters[name])


def _add_layer(graph: _Graph, cell: str, layer: int, inputs_TNI: str, old: list[str], new: list[str]) -> str:
    operator, order, attributes = _CELLS[cell]
    prefix = f"encoder.layers.{layer}"

    def reordered(name: str) -> np.ndarray:
        blocks = np.split(graph.parameters[f"{prefix}.{name}"], len(order))
        return np.concatenate([blocks[i] for i in order])

    i2h_weight, h2h_weight = (
        graph.constant(f"{prefix}.{name}", reordered(name)[np.newaxis]) for name in ("i2h_weight", "h2h_weight")
    )
    biases = np.concatenate([reordered("i2h_bias"), reordered("h2h_bias")])[np.newaxis]
    outputs_T1NH = graph.add(
        operator,
        [inputs_TNI, i2h_weight, h2h_weight, graph.constant(f"{prefix}.bias", biases), "", *old],
        [f"{prefix}.outputs", *new],
        hidden_size=biases.size // (2 * len(order)),
        **attributes,
    )
    return graph.add("Squeeze", [outputs_T1NH, graph.integer(1)])


def _add_layer_norm_lstm(graph: _Graph, layer: int, inputs_TNI: str, old: list[str], new: list[str]) -> str:
    """As `gluon_lm.models.UnrolledLSTMLayer`, which normalises where the operator LSTM cannot."""
    from onnx import TensorProto, helper

    prefix = f"encoder.layers.{layer}"
    step = _Graph(graph.parameters, f"{prefix}.")  # its weights are the outer graph's, which it sees

    def norm(array_NH: str, name: str) -> str:
        vectors = [graph.weight(f"{prefix}.{name}_{vector}") for vector in ("scale", "shift")]
        return step.add("LayerNormalization", [array_NH, *vectors], axis=-1, epsilon=_LAYER_NORM_EPSILON)

    h2h_weight = graph.weight(f"{prefix}.h2h_weight")
    gates_NG = step.add("Gemm", ["hidden_NH", h2h_weight, "from_input_NG"], transB=1)
    input_NH, forget_NH, candidate_NH, output_NH = gates = [
        f"{prefix}.{gate}" for gate in ("input", "forget", "candidate", "output")
    ]
    step.add("Split", [gates_NG], gates, axis=-1)
    kept_NH = step.add("Mul", [step.add("Sigmoid", [norm(forget_NH, "forget")]), "cell_NH"])
    added_NH = step.add(
        "Mul",
        [step.add("Sigmoid", [norm(input_NH, "input")]), step.add("Tanh", [norm(candidate_NH, "candidate")])],
    )
    new_cell_NH = norm(step.add("Add", [kept_NH, added_NH]), "cell")
    new_hidden_NH = step.add("Mul", [step.add("Sigmoid", [norm(output_NH, "output")]), step.add("Tanh", [new_cell_NH])])
    step_output_NH = step.add("Identity", [new_hidden_NH])

    def declare(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)

    body = helper.make_graph(
        step.nodes,
        f"{prefix}.step",
        [declare(name) for name in ("hidden_NH", "cell_NH", "from_input_NG")],
        [declare(name) for name in (new_hidden_NH, new_cell_NH, step_output_NH)],
    )
    i2h_weight = graph.constant(f"{prefix}.i2h_weight", graph.parameters[f"{prefix}.i2h_weight"].T)
    from_inputs_TNG = graph.add("MatMul", [inputs_TNI, i2h_weight])
    axis = graph.integer(0)
    last_hidden_NH, last_cell_NH, outputs_TNH = (f"{prefix}.{name}" for name in ("hidden", "cell", "outputs"))
    graph.add(
        "Scan",
        [*(graph.add("Squeeze", [state, axis]) for state in old), from_inputs_TNG],
        [last_hidden_NH, last_cell_NH, outputs_TNH],
        num_scan_inputs=1,
        body=body,
    )
    for state, name in zip((last_hidden_NH, last_cell_NH), new):
        graph.add("Unsqueeze", [state, axis], name)
    return outputs_TNH


def _add_logits(graph: _Graph, inputs_SE: str) -> str:
    """The decoder. Its matrix is the embedding's if the model is tied, so it is not transposed in advance."""
    name = "head.decoder.weight"
    weight_VE = graph.weight(name) if name in graph.parameters else "encoder.embedding.weight"
    return graph.add("Gemm", [inputs_SE, weight_VE, graph.weight("head.decoder.bias")], transB=1)


def _add_softmax(graph: _Graph, hidden_RH: str, config: ModelConfig) -> str:
    return graph.add("LogSoftmax", [_add_logits(graph, hidden_RH)], axis=-1)


def _add_mixture(graph: _Graph, hidden_RH: str, config: ModelConfig) -> str:
    """As `gluon_lm.models.MixtureHead`."""

    def dense(name: str, *bias: str) -> str:
        return graph.add("Gemm", [hidden_RH, graph.weight(f"head.{name}.weight"), *bias], transB=1)

    latents_RD = graph.add("Tanh", [dense("latent", graph.weight("head.latent.bias"))])
    shape = graph.add("Constant", [], value_ints=[-1, config.embed_size])
    probs_SV = graph.add("Softmax", [_add_logits(graph, graph.add("Reshape", [latents_RD, shape]))], axis=-1)
    shape = graph.add("Constant", [], value_ints=[-1, config.num_experts, graph.parameters["head.decoder.bias"].size])
    probs_RKV = graph.add("Reshape", [probs_SV, shape])
    priors_RK = graph.add("Softmax", [dense("prior")], axis=-1)
    priors_R1K = graph.add("Unsqueeze", [priors_RK, graph.integer(1)])
    probs_RV = graph.add("Squeeze", [graph.add("MatMul", [priors_R1K, probs_RKV]), graph.integer(1)])
    smallest = graph.constant("head.smallest", np.array(SMALLEST_FLOAT32, np.float32))
    return graph.add("Log", [graph.add("Max", [probs_RV, smallest])])


def _add_adaptive(graph: _Graph, hidden_RH: str, config: ModelConfig) -> str:
    """As `gluon_lm.models.AdaptiveHead`."""

    def log_softmax(name: str, inputs: str) -> str:
        weights = [graph.weight(f"head.{name}.{part}") for part in ("weight", "bias")]
        return graph.add("LogSoftmax", [graph.add("Gemm", [inputs, *weights], transB=1)], axis=-1)

    num_groups = len(config.cutoffs or ())
    entries = [f"head.entries_{i}" for i in range(num_groups + 1)]  # of the words, and of each group
    sizes = graph.add("Constant", [], value_ints=[(config.cutoffs or (0,))[0], *[1] * num_groups])
    graph.add("Split", [log_softmax("shortlist", hidden_RH), sizes], entries, axis=-1)
    parts = entries[:1]
    for i, entry in enumerate(entries[1:]):
        projection = graph.weight(f"head.groups.{i}.projection.weight")
        projected_RE = graph.add("Gemm", [hidden_RH, projection], transB=1)
        parts.append(graph.add("Add", [log_softmax(f"groups.{i}.decoder", projected_RE), entry]))
    return graph.add("Concat", parts, axis=-1)


_HEADS = {"softmax": _add_softmax, "sampled": _add_softmax, "mixture": _add_mixture, "adaptive": _add_adaptive}
