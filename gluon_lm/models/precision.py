"""Training with matrix products in half precision: parameters, their gradients and all else stay float32.

MXNet's automatic mixed precision has lists of the operators that may compute in half precision, and a pass that puts
casts into a graph; the encoder's graph goes through it. The head is no graph: between the way there and the way back
its logits are worked on in float32. So its products are cast here, by the same operator.

Shapes: S rows of inputs, E their width, V width of the output.
"""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.contrib import amp
from mxnet.gluon import nn

from ..errors import ConfigError
from ..runtime import cpu_flags

DTYPES = {"bfloat16": amp.amp.bfloat16, "float16": np.dtype(np.float16)}
_BLOCK = 1 << 20  # elements that are cast at a time where the whole would have to be kept


def check_half_precision(kind: str, device: mx.Context) -> None:
    """Make sure that a device computes products in ``bfloat16`` or ``float16``.

    Raises
    ------
    ConfigError
        Naming what it lacks.
    """
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
            "--amp bfloat16: this processor lacks AVX512-BF16 (avx512_bf16 in /proc/cpuinfo); train without --amp"
        )
    if kind == "bfloat16" and not mx.runtime.Features().is_enabled("MKLDNN"):
        raise ConfigError("--amp bfloat16: this MXNet is built without oneDNN, which computes it; train without --amp")


# ---------------------------------------------------------------- the head


class Affine:
    """``inputs W^T + b`` of a layer on its way to the gradient, in float32.

    Parameters
    ----------
    layer : nn.Dense
        Without activation.
    inputs_SE : NDArray
    output_SV : NDArray
        Room for the result.

    Attributes
    ----------
    output_SV : NDArray
        The result. The map does not need it to go back, so its memory may take what is made of it.
    """

    def __init__(self, layer: nn.Dense, inputs_SE: mx.nd.NDArray, output_SV: mx.nd.NDArray) -> None:
        self._inputs_SE, device = inputs_SE, inputs_SE.context
        inputs_SE.attach_grad()
        self.output_SV = _recorded(inputs_SE, layer.weight.data(device), layer.bias.data(device), output_SV)

    def backward(self, grad_SV: mx.nd.NDArray) -> mx.nd.NDArray:
        """Gradient by the inputs; that by the layer's parameters is added to theirs."""
        self.output_SV.backward(grad_SV)
        return self._inputs_SE.grad


class Products:
    """How a head computes its affine maps in training: in float32."""

    def begin_window(self, device: mx.Context) -> None:
        """Called before a head goes through a window on a device: the parameters may have changed."""

    def affine(self, layer: nn.Dense, inputs_SE: mx.nd.NDArray, output_SV: mx.nd.NDArray) -> Affine:
        """An `Affine`, or what takes its place."""
        return Affine(layer, inputs_SE, output_SV)


class HalfProducts(Products):
    """Affine maps whose three products are in half precision; what goes in and comes out is float32.

    Oriented after Micikevicius et al. 2018, "Mixed Precision Training", section 3: a parameter stays float32 and is
    cast once for each window; its gradient by each chunk of rows is added up in float32. What is as wide as the
    vocabulary is cast twice for each chunk, the logits and their gradient.

    Parameters
    ----------
    kind : str
        A key of `DTYPES`.
    """

    def __init__(self, kind: str) -> None:
        self.dtype = DTYPES[kind]
        self._cast: dict[tuple[gluon.Parameter, mx.Context], mx.nd.NDArray] = {}
        self._fresh: set[tuple[gluon.Parameter, mx.Context]] = set()
        self._room: dict[mx.Context, mx.nd.NDArray] = {}

    def begin_window(self, device):
        self._fresh = {key for key in self._fresh if key[1] != device}

    def affine(self, layer, inputs_SE, output_SV):
        return _HalfAffine(self, layer, inputs_SE, output_SV)

    def cast(self, parameter: gluon.Parameter, device: mx.Context) -> mx.nd.NDArray:
        """The parameter in half precision, with room for a gradient."""
        key, master = (parameter, device), parameter.data(device)
        if key not in self._cast:
            self._cast[key] = mx.nd.empty(master.shape, ctx=device, dtype=self.dtype)
            self._cast[key].attach_grad()
        if key not in self._fresh:
            mx.nd.amp_cast(master, dtype=self.dtype, out=self._cast[key])
            self._fresh.add(key)
        return self._cast[key]

    def room(self, shape: tuple[int, ...], device: mx.Context) -> mx.nd.NDArray:
        """An array in half precision; all calls share its memory, as in `gluon_lm.models.Head.room_for_logits`."""
        size, room = int(np.prod(shape)), self._room.get(device)
        if room is None or room.size < size:
            room = self._room[device] = mx.nd.empty((size,), ctx=device, dtype=self.dtype)
        return room[:size].reshape(shape)


class _HalfAffine(Affine):
    def __init__(self, products, layer, inputs_SE, output_SV):
        device, self._dtype = inputs_SE.context, products.dtype
        # Not on the tape: on CPU, MXNet's amp_cast does not go back into a gradient that is added to, and says nothing.
        weight_VE, bias_V = (products.cast(parameter, device) for parameter in (layer.weight, layer.bias))
        self._grads = (weight_VE.grad, layer.weight.grad(device)), (bias_V.grad, layer.bias.grad(device))
        self._inputs_SE = mx.nd.amp_cast(inputs_SE, dtype=self._dtype)
        self._inputs_SE.attach_grad()
        self._half_SV = _recorded(self._inputs_SE, weight_VE, bias_V, products.room(output_SV.shape, device))
        self.output_SV = mx.nd.amp_cast(self._half_SV, dtype="float32", out=output_SV)

    def backward(self, grad_SV):
        self._half_SV.backward(mx.nd.amp_cast(grad_SV, dtype=self._dtype, out=self._half_SV))
        for half, total in self._grads:
            _add(half, total)
        return mx.nd.amp_cast(self._inputs_SE.grad, dtype="float32")


def _recorded(inputs_SE, weight_VE, bias_V, output_SV):
    with mx.autograd.record():
        return mx.nd.FullyConnected(inputs_SE, weight_VE, bias_V, num_hidden=weight_VE.shape[0], out=output_SV)


def _add(half: mx.nd.NDArray, total: mx.nd.NDArray) -> None:
    """Add an array in half precision to a float32 one, in place."""
    half, total = half.reshape((-1,)), total.reshape((-1,))
    for start in range(0, total.size, _BLOCK):
        block = total[start : start + _BLOCK]
        block += mx.nd.amp_cast(half[start : start + _BLOCK], dtype="float32")


# ---------------------------------------------------------------- the encoder


def in_float16(block: gluon.HybridBlock, num_inputs: int, whole: gluon.Block) -> gluon.SymbolBlock:
    """A block's graph after MXNet's pass for mixed precision, with the block's own Parameters.

    Recurrent layers and affine maps get their operands cast to float16 and compute in it; what comes out of the graph
    is cast back. MXNet's pass does not look into loops, so what is computed step by step stays float32.

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
    return gluon.SymbolBlock(graph, inputs, params=block.collect_params())
