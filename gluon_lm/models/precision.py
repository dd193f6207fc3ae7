"""Training with matrix products in half precision: parameters, their gradients and everything else stay float32.

MXNet's automatic mixed precision has lists of the operators that may compute in half precision, and a pass that
inserts casts into a graph; the encoder's graph goes through it. The head is not a graph: between its forward and
backward products the logits are processed in float32. So its products are cast here, by the same operator.

Shapes: S rows of inputs, E their width, V width of the output.
"""

from __future__ import annotations

import ctypes
import json
import warnings

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet._ctypes.ndarray import _imperative_invoke
from mxnet.base import _LIB, OpHandle, c_str, check_call
from mxnet.contrib import amp
from mxnet.gluon import nn

from ..errors import ConfigError
from ..processors import cpu_flags

DTYPES = {"bfloat16": amp.amp.bfloat16, "float16": np.dtype(np.float16)}
# Elements that are cast at a time, so that the cast of the whole need not be kept; on a GPU each piece is a launch.
_BLOCK = {"cpu": 1 << 20, "gpu": 1 << 24}
# For each number of rows that it meets, oneDNN permanently keeps a float32 copy of the output of a half-precision
# product, and windows of random length make many: so the forward pass is cut into pieces of few different sizes.
FORWARD_ROWS = 512
FORWARD_MULTIPLE = 64


def check_half_precision(kind: str, device: mx.Context) -> None:
    """Make sure that a device can compute products in ``bfloat16`` or ``float16``.

    Raises
    ------
    ConfigError
        Naming what is missing.
    """
    if kind not in DTYPES:
        raise ConfigError(f"{kind}: must be one of {', '.join(DTYPES)}")
    on_cpu = device.device_type.startswith("cpu")
    if kind == "float16" and on_cpu:
        raise ConfigError(
            f"--amp float16: needs a GPU, and this run is on {device}; name one with --gpus 0, or use --amp bfloat16 "
            "on a CPU that has it"
        )
    if kind == "bfloat16" and not on_cpu:
        raise ConfigError(
            f"--amp bfloat16: MXNet {mx.__version__} computes in it on CPUs only, and this run is on {device}; use "
            "--amp float16"
        )
    if kind == "bfloat16" and "avx512_bf16" not in cpu_flags():
        raise ConfigError(
            "--amp bfloat16: this processor lacks AVX512-BF16 (avx512_bf16 in /proc/cpuinfo); use --amp none"
        )
    if kind == "bfloat16" and not mx.runtime.Features().is_enabled("MKLDNN"):
        raise ConfigError("--amp bfloat16: this MXNet is built without oneDNN, which computes it; use --amp none")


# ---------------------------------------------------------------- the head


class Affine:
    """``inputs W^T + b`` of a layer, and its gradient, in float32.

    Parameters
    ----------
    layer : nn.Dense
        Without activation.
    inputs_SE : NDArray
    output_SV : NDArray
        Where the result is written.

    Attributes
    ----------
    output_SV : NDArray
        The result. The backward pass does not need it, so its memory may be reused for what is computed from it.
    """

    def __init__(self, layer: nn.Dense, inputs_SE: mx.nd.NDArray, output_SV: mx.nd.NDArray) -> None:
        self._inputs_SE, device = inputs_SE, inputs_SE.context
        inputs_SE.attach_grad()
        self.output_SV = _recorded(inputs_SE, layer.weight.data(device), layer.bias.data(device), output_SV)

    def backward(self, grad_SV: mx.nd.NDArray) -> mx.nd.NDArray:
        """Gradient with respect to the inputs; adds that of the layer's parameters to theirs."""
        self.output_SV.backward(grad_SV)
        return self._inputs_SE.grad


class Products:
    """How a head computes its affine maps in training: in float32."""

    def begin_window(self, device: mx.Context) -> None:
        """Called before a head processes a window on a device: the parameters may have changed."""

    def affine(self, layer: nn.Dense, inputs_SE: mx.nd.NDArray, output_SV: mx.nd.NDArray) -> Affine:
        """An `Affine`, or what replaces it."""
        return Affine(layer, inputs_SE, output_SV)


class HalfProducts(Products):
    """Affine maps whose three products are in half precision; what goes in and comes out is float32.

    Following Micikevicius et al. 2018, "Mixed Precision Training", section 3: a parameter stays float32 and is
    cast once for each window; its gradients from the chunks of rows are summed in float32. What is as wide as the
    vocabulary, the logits and their gradient, is cast once each per chunk.

    Parameters
    ----------
    kind : str
        A key of `DTYPES`.
    """

    def __init__(self, kind: str) -> None:
        self.dtype = DTYPES[kind]
        self._cast: dict[tuple[gluon.Parameter, mx.Context], mx.nd.NDArray] = {}
        self._fresh: set[tuple[gluon.Parameter, mx.Context]] = set()
        self._workspaces: dict[tuple[str, mx.Context], mx.nd.NDArray] = {}

    def begin_window(self, device):
        self._fresh = {key for key in self._fresh if key[1] != device}

    def affine(self, layer, inputs_SE, output_SV):
        return _HalfAffine(self, layer, inputs_SE, output_SV)

    def cast(self, parameter: gluon.Parameter, device: mx.Context) -> mx.nd.NDArray:
        """The parameter in half precision."""
        key, master = (parameter, device), parameter.data(device)
        if key not in self._cast:
            self._cast[key] = mx.nd.empty(master.shape, ctx=device, dtype=self.dtype)
        if key not in self._fresh:
            mx.nd.amp_cast(master, dtype=self.dtype, out=self._cast[key])
            self._fresh.add(key)
        return self._cast[key]

    def workspace(self, purpose: str, shape: tuple[int, ...], device: mx.Context) -> mx.nd.NDArray:
        """An array in half precision, which is allocated only once: all calls for a purpose share its memory."""
        key, size = (purpose, device), int(np.prod(shape))
        if key not in self._workspaces or self._workspaces[key].size < size:
            self._workspaces[key] = mx.nd.zeros((size,), ctx=device, dtype=self.dtype)
        return self._workspaces[key][:size].reshape(shape)


class _HalfAffine(Affine):
    def __init__(self, products, layer, inputs_SE, output_SV):
        device, (num_rows, width) = inputs_SE.context, inputs_SE.shape
        self._products, self._parameters = products, (layer.weight, layer.bias)
        self._weight_VE, bias_V = (products.cast(parameter, device) for parameter in self._parameters)
        vocab_size = bias_V.shape[0]
        num_padded = -(-num_rows // FORWARD_MULTIPLE) * FORWARD_MULTIPLE  # the contents of the other rows do not matter
        inputs = products.workspace("inputs", (num_padded, width), device)
        outputs = products.workspace("outputs", (num_padded, vocab_size), device)
        self._inputs_SE, self._half_SV, self.output_SV = inputs[:num_rows], outputs[:num_rows], output_SV
        mx.nd.amp_cast(inputs_SE, dtype=products.dtype, out=self._inputs_SE)
        for start in range(0, num_padded, FORWARD_ROWS):
            rows = slice(start, min(start + FORWARD_ROWS, num_padded))
            mx.nd.FullyConnected(inputs[rows], self._weight_VE, bias_V, num_hidden=vocab_size, out=outputs[rows])
        mx.nd.amp_cast(self._half_SV, dtype="float32", out=output_SV)

    def backward(self, grad_SV):
        device, products = grad_SV.context, self._products
        mx.nd.amp_cast(grad_SV, dtype=products.dtype, out=self._half_SV)
        grad_SE = mx.nd.empty(self._inputs_SE.shape, ctx=device, dtype=products.dtype)
        grads = [products.workspace(f"gradient of {i}", p.shape, device) for i, p in enumerate(self._parameters)]
        fully_connected_backward(self._half_SV, self._inputs_SE, self._weight_VE, [grad_SE, *grads])
        for half, parameter in zip(grads, self._parameters):
            _add(half, parameter.grad(device))
        return mx.nd.amp_cast(grad_SE, dtype="float32")


def fully_connected_backward(
    grad_SV: mx.nd.NDArray, inputs_SE: mx.nd.NDArray, weight_VE: mx.nd.NDArray, grads: list[mx.nd.NDArray]
) -> None:
    """Write the gradients of a ``FullyConnected`` with respect to its inputs, weight and bias into `grads`.

    It is the operator that autograd calls, for which MXNet has no Python function that takes arrays.
    """
    operator, operands, num_hidden = OpHandle(), [grad_SV, inputs_SE, weight_VE], grad_SV.shape[1]
    check_call(_LIB.NNGetOpHandle(c_str("_backward_FullyConnected"), ctypes.byref(operator)))
    _imperative_invoke(operator.value, operands, ["num_hidden"], [num_hidden], grads, False, True)


def _recorded(inputs_SE, weight_VE, bias_V, output_SV):
    with mx.autograd.record():
        return mx.nd.FullyConnected(inputs_SE, weight_VE, bias_V, num_hidden=weight_VE.shape[0], out=output_SV)


def _add(half: mx.nd.NDArray, total: mx.nd.NDArray) -> None:
    """Add an array in half precision to a float32 one, in place."""
    half, total, size = half.reshape((-1,)), total.reshape((-1,)), _BLOCK[total.context.device_type]
    for start in range(0, total.size, size):
        block = total[start : start + size]
        block += mx.nd.amp_cast(half[start : start + size], dtype="float32")


# ---------------------------------------------------------------- the encoder


def in_float16(block: gluon.HybridBlock, num_inputs: int, whole: gluon.Block) -> gluon.SymbolBlock:
    """A block's graph after MXNet's pass for mixed precision, with the block's own Parameters.

    Recurrent layers and affine maps get their operands cast to float16 and compute in it; the graph's outputs are cast
    back. MXNet's pass does not enter loops, so what is computed step by step stays float32.

    Parameters
    ----------
    block : gluon.HybridBlock
    num_inputs : int
        Arguments that it is called with.
    whole : gluon.Block
        A part of it in which nothing is cast.
    """
    inputs = [mx.sym.var(f"data{i}") for i in range(num_inputs)]
    graph = mx.sym.Group(list(block(*inputs)))
    nodes = [node["name"] for node in json.loads(graph.tojson())["nodes"] if node["op"] != "null"]
    graph = amp.convert_symbol(
        graph,
        "float16",
        fp32_ops=[*amp.list_fp32_ops("float16"), "_foreach"],
        excluded_sym_names=[name for name in nodes if name.startswith(whole.prefix)],
        data_names=graph.list_inputs(),
    )
    with warnings.catch_warnings():
        # The type of the tokens, which MXNet warns that it cannot infer, does not matter: they only index a table.
        warnings.filterwarnings("ignore", "Cannot decide type", UserWarning)
        return gluon.SymbolBlock(graph, inputs, params=block.collect_params())
