"""The language model: embedding, recurrent stack, head.

Shapes: T time, N batch, V vocabulary, E embedding width, H width of a layer.
"""

from __future__ import annotations

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from ..config import ModelConfig
from .heads import HEADS
from .recurrent import CELLS, RecurrentLayer

State = list  # of NDArrays (1, N, H), layer after layer; an LSTM layer has hidden and cell


class Encoder(gluon.HybridBlock):
    """Embedding and a stack of recurrent layers, dropout on the embedded words, between layers and on the output.

    Zaremba et al. 2014, "Recurrent Neural Network Regularization": dropout on the non-recurrent connections only.

    Parameters
    ----------
    cell : str
        A key of `gluon_lm.models.recurrent.CELLS`.
    vocab_size, embed_size : int
        V and E.
    layer_sizes : sequence of int
        Width of each layer, first to last.
    dropout : float
        Probability of zeroing an element, in [0, 1).
    """

    def __init__(self, cell: str, vocab_size: int, embed_size: int, layer_sizes, dropout: float, **kwargs) -> None:
        super().__init__(**kwargs)
        self.cell, self.layer_sizes, self._dropout = cell, list(layer_sizes), dropout
        with self.name_scope():
            self.embedding = nn.Embedding(vocab_size, embed_size)
            self.layers = nn.HybridSequential()
            for input_size, hidden_size in zip([embed_size, *self.layer_sizes], self.layer_sizes):
                self.layers.add(RecurrentLayer(cell, input_size, hidden_size))

    def hybrid_forward(self, F, tokens_TN, *states):
        """Return ``(hidden_TNH, *new_states)``."""
        hidden = self._drop(F, self.embedding(tokens_TN))
        num_states = CELLS[self.cell].num_states
        new_states = []
        for i, layer in enumerate(self.layers):
            hidden, *layer_states = layer(hidden, *states[i * num_states : (i + 1) * num_states])
            hidden = self._drop(F, hidden)
            new_states += layer_states
        return (hidden, *new_states)

    def _drop(self, F, array):
        return F.Dropout(array, p=self._dropout) if self._dropout else array


class LanguageModel(gluon.HybridBlock):
    """A recurrent language model over a vocabulary of words.

    Called as a block it maps ``tokens_TN, *states`` to ``log_probs_TNV, *new_states``. Training and evaluation
    call `encoder` and `head` apart, because the head works on chunks of rows.

    Parameters
    ----------
    config : ModelConfig
    vocab_size : int
    """

    def __init__(self, config: ModelConfig, vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.config, self.vocab_size = config, vocab_size
        layer_sizes = [config.hidden_size] * config.num_layers
        if config.tied:
            layer_sizes[-1] = config.embed_size
        with self.name_scope():
            self.encoder = Encoder(config.model, vocab_size, config.embed_size, layer_sizes, config.dropout)
            self.head = HEADS["tied_softmax" if config.tied else "softmax"](
                vocab_size, layer_sizes[-1], self.encoder.embedding
            )

    def hybrid_forward(self, F, tokens_TN, *states):
        hidden_TNH, *new_states = self.encoder(tokens_TN, *states)
        return (self.head(hidden_TNH), *new_states)

    def begin_state(self, batch_size: int, ctx: mx.Context) -> State:
        """The zero state of `batch_size` streams on a device: a list of arrays of shape (1, N, H)."""
        return [
            mx.nd.zeros((1, batch_size, size), ctx=ctx)
            for size in self.encoder.layer_sizes
            for _ in range(CELLS[self.encoder.cell].num_states)
        ]

    def named_parameters(self) -> dict[str, gluon.Parameter]:
        """Each parameter once, by the path of its block: a tied matrix goes by the embedding's name."""
        named, seen = {}, set()
        for name, parameter in self._collect_params_with_prefix().items():
            if parameter not in seen:
                seen.add(parameter)
                named[name] = parameter
        return named

    def initialize_parameters(self, seed: int, devices: list[mx.Context]) -> None:
        """Draw the parameters on the host, so that they depend on the seed alone and not on the devices.

        ``uniform`` (PyTorch's word_language_model): embedding and decoder U(-0.1, 0.1), recurrent weights and
        biases U(-1/sqrt(H), 1/sqrt(H)), decoder bias 0. ``xavier`` (MXNet's example): embedding U(-0.1, 0.1),
        every other matrix U(-a, a) with a = sqrt(6 / (rows + columns)) (Glorot & Bengio 2010), biases 0.
        """
        rng = np.random.RandomState(seed)
        for name, parameter in self.named_parameters().items():
            bound = self._initial_bound(name, parameter.shape)
            parameter.initialize(mx.init.Zero(), ctx=devices)
            parameter.set_data(mx.nd.array(rng.uniform(-bound, bound, parameter.shape).astype(np.float32)))
            parameter.grad_req = "add"  # head and encoder, and chunk after chunk, add to one gradient

    def _initial_bound(self, name: str, shape: tuple[int, ...]) -> float:
        if name == "encoder.embedding.weight":
            return 0.1
        if self.config.init == "xavier":
            return float(np.sqrt(6 / sum(shape))) if len(shape) == 2 else 0.0
        if name.startswith("encoder.layers."):
            return self.encoder.layer_sizes[int(name.split(".")[2])] ** -0.5
        return 0.0 if name.endswith("bias") else 0.1

    def hybridize_for_use(self) -> None:
        """Compile the encoder into one graph that keeps its memory from call to call.

        The head stays as it is: its few operators work in place on a chunk of logits, and a graph of its own would hold
        several chunks for good.
        """
        self.encoder.hybridize(static_alloc=True)
