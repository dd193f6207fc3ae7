"""The language model: embedding, recurrent stack, head.

Shapes: T time, N batch, V vocabulary, E embedding width, H width of a layer.
"""

from __future__ import annotations

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from ..config import CELLS, ModelConfig
from ..data.windows import Window
from ..heartbeat import beat
from .dropout import Dropout, drop
from .heads import HEADS, TrainingHead
from .precision import HalfProducts, check_half_precision, in_float16
from .recurrent import RecurrentLayer, UnrolledLSTMLayer

_BLOCK = 1 << 22
State = list  # of NDArrays (1, N, H), layer by layer; an LSTM layer has hidden and cell


class WordEmbedding(nn.Embedding):
    """An embedding whose look-up, in training, drops whole words or single elements of their vectors.

    Whole words: Gal & Ghahramani 2016, "A Theoretically Grounded Application of Dropout in Recurrent Neural Networks";
    Merity et al. 2017, section 4.3. A word or element that is dropped is dropped wherever the word occurs in the
    window, and the rest is scaled by 1 / (1 - p). The matrix itself is not masked, so a tied output layer uses all of
    it.

    Parameters
    ----------
    vocab_size, embed_size : int
        V and E.
    word_dropout, element_dropout : float
        Probability of dropping a word and of dropping an element of a word's vector, in [0, 1).
    """

    def __init__(
        self, vocab_size: int, embed_size: int, word_dropout: float = 0.0, element_dropout: float = 0.0, **kwargs
    ) -> None:
        super().__init__(vocab_size, embed_size, **kwargs)
        self._vocab_size, self._word_dropout, self._element_dropout = vocab_size, word_dropout, element_dropout

    def hybrid_forward(self, F, tokens_TN, weight):
        embedded_TNE = super().hybrid_forward(F, tokens_TN, weight)
        if self._word_dropout:
            ones_V1 = F.ones_like(F.BlockGrad(F.slice_axis(weight, axis=1, begin=0, end=1)))
            mask_V1 = drop(F, ones_V1, self._word_dropout)
            mask_TN1 = F.Embedding(tokens_TN, mask_V1, input_dim=self._vocab_size, output_dim=1)
            embedded_TNE = F.broadcast_mul(embedded_TNE, mask_TN1)
        if self._element_dropout:
            # One row of the mask for each distinct word of the window, not for each word of the vocabulary.
            ones_RE = F.ones_like(F.BlockGrad(F.reshape(embedded_TNE, shape=(-3, 0))))
            mask_RE = drop(F, ones_RE, self._element_dropout)
            mask_TNE = F.reshape_like(F.take(mask_RE, _number_of_word(F, tokens_TN)), embedded_TNE)
            embedded_TNE = embedded_TNE * mask_TNE
        return embedded_TNE


def _number_of_word(F, tokens_TN):
    """Numbers 0, 1, ... for the distinct words of a window, in order of their ids: float32 of shape (T x N,)."""
    tokens_R = F.cast(F.reshape(tokens_TN, shape=(-1,)), dtype="float32")
    order_R = F.argsort(tokens_R)
    sorted_R = F.take(tokens_R, order_R)
    first_1 = F.slice_axis(sorted_R, axis=0, begin=0, end=1)
    previous_R = F.slice_axis(F.concat(first_1, sorted_R, dim=0), axis=0, begin=0, end=-1)
    numbers_R = F.cumsum(sorted_R != previous_R, axis=0)
    return F.take(numbers_R, F.argsort(order_R))


class Encoder(gluon.HybridBlock):
    """Embedding and a stack of recurrent layers, with dropout on the input of each.

    The dropout mask is drawn for each word (Zaremba et al. 2014, "Recurrent Neural Network Regularization"), or locked:
    one mask for all words of a window (Gal & Ghahramani 2016).

    Parameters
    ----------
    config : ModelConfig
    vocab_size : int
        V.
    """

    def __init__(self, config: ModelConfig, vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.cell, self.layer_sizes = config.cell, config.layer_sizes
        with self.name_scope():
            self.embedding = WordEmbedding(
                vocab_size, config.embed_size, config.dropout_embed, config.dropout_embed_elements
            )
            self.dropouts = nn.HybridSequential()
            self.layers = nn.HybridSequential()
            input_sizes = [config.embed_size, *self.layer_sizes]
            for rate, input_size, hidden_size in zip(config.layer_dropouts, input_sizes, self.layer_sizes):
                self.dropouts.add(make_dropout(rate, config.has_locked_dropout))
                self.layers.add(_make_layer(config, input_size, hidden_size))

    def hybrid_forward(self, F, tokens_TN, *states):
        """Return ``(hidden_TNH, *new_states)``."""
        hidden = self.embedding(tokens_TN)
        num_states = CELLS[self.cell].num_states
        new_states = []
        for i, (dropout, layer) in enumerate(zip(self.dropouts, self.layers)):
            hidden, *layer_states = layer(dropout(hidden), *states[i * num_states : (i + 1) * num_states])
            new_states += layer_states
        return (hidden, *new_states)


def make_dropout(rate: float, locked: bool) -> Dropout:
    """Dropout of elements of a (T, N, ...) array; if locked, with one mask for all T."""
    return Dropout(rate, axes=(0,) if locked else ())


def _make_layer(config: ModelConfig, input_size: int, hidden_size: int) -> RecurrentLayer:
    if config.dropout_candidate or config.layer_norm:
        return UnrolledLSTMLayer(
            input_size,
            hidden_size,
            config.input_weight_drop,
            config.weight_drop,
            config.dropout_candidate,
            config.layer_norm,
        )
    return RecurrentLayer(config.cell, input_size, hidden_size, config.input_weight_drop, config.weight_drop)


class LanguageModel(gluon.HybridBlock):
    """A recurrent language model over a vocabulary of words.

    Called as a block it maps ``tokens_TN, *states`` to ``log_probs_TNV, *new_states``. Training calls
    `training_encoder`, `output_dropout` and `head` separately, and evaluation `encoder` and `head`, because the head
    works on chunks of rows.

    Parameters
    ----------
    config : ModelConfig
    vocab_size : int
    """

    _float16_encoder: tuple[gluon.SymbolBlock, ...] = ()  # in a tuple, or it would be registered as a child block

    def __init__(self, config: ModelConfig, vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.config, self.vocab_size = config, vocab_size
        with self.name_scope():
            self.encoder = Encoder(config, vocab_size)
            self.output_dropout = make_dropout(config.dropout, config.has_locked_dropout)
            self.head = HEADS[config.head](config, vocab_size, self.encoder.embedding if config.tied else None)

    def hybrid_forward(self, F, tokens_TN, *states):
        hidden_TNH, *new_states = self.encoder(tokens_TN, *states)
        return (self.head(self.output_dropout(hidden_TNH)), *new_states)

    def begin_state(self, num_streams: int, device: mx.Context) -> State:
        """The zero state of `num_streams` streams on a device: a list of arrays of shape (1, N, H)."""
        return [
            mx.nd.zeros((1, num_streams, size), ctx=device)
            for size in self.encoder.layer_sizes
            for _ in range(CELLS[self.encoder.cell].num_states)
        ]

    def named_parameters(self) -> dict[str, gluon.Parameter]:
        """Each parameter once, by the path of its block: a tied matrix has the embedding's name."""
        named, seen = {}, set()
        for name, parameter in self._collect_params_with_prefix().items():
            if parameter not in seen:
                seen.add(parameter)
                named[name] = parameter
        return named

    def gradient_rows(self, window: Window, head: TrainingHead) -> dict[str, np.ndarray]:
        """For parameters where only some rows get a gradient from training on a window: the ids of these, by name.

        `head` is what `Head.for_window` returned for that window.
        """
        words = window.tokens_TN.reshape(-1)
        by_head = head.gradient_rows(window.targets_TN.reshape(-1)[: window.num_targets])
        if by_head is None:
            return {} if self.config.tied else {"encoder.embedding.weight": words}
        if self.config.tied:
            return {"encoder.embedding.weight": np.append(words, by_head), "head.decoder.bias": by_head}
        return {"encoder.embedding.weight": words, "head.decoder.weight": by_head, "head.decoder.bias": by_head}

    def allocate_parameters(self, devices: list[mx.Context], grad_req: str = "add") -> None:
        """Make room for the parameters, which are zero at first, and for their gradients.

        Gradients are accumulated: a custom training loop must clear them before each step, with
        ``model.collect_params().zero_grad()``. With ``grad_req`` ``"null"`` there are none.
        """
        for parameter in self.named_parameters().values():
            parameter.grad_req = grad_req
            parameter.initialize(mx.init.Zero(), ctx=devices)

    def initialize_parameters(self, seed: int, devices: list[mx.Context]) -> None:
        """Draw the parameters on the host, so that they depend on the seed alone and not on the devices.

        ``uniform`` (PyTorch's word_language_model): embedding and decoder U(-0.1, 0.1), recurrent weights and
        biases, those of a mixture's priors and experts and an adaptive softmax's projections U(-1/sqrt(H), 1/sqrt(H)),
        decoder bias 0. ``xavier`` (MXNet's example): embedding U(-0.1, 0.1), every other matrix U(-a, a) with
        a = sqrt(6 / (rows + columns)) (Glorot & Bengio 2010), biases 0. In both, layer normalisation starts with scale
        1 and shift 0, but 1 for the forget gate.

        There is room for gradients too, which are accumulated: see `allocate_parameters`.
        """
        self.allocate_parameters(devices)
        rng = np.random.RandomState(seed)
        for name, parameter in self.named_parameters().items():
            bound = self._initial_bound(name, parameter.shape)
            centre = float(name.endswith(("_scale", "forget_shift")))
            values = parameter.data(devices[0])
            flat = values.reshape((-1,))
            for start in range(0, values.size, _BLOCK):  # numpy draws in float64, twice the size of the matrix
                stop = min(start + _BLOCK, values.size)
                flat[start:stop] = rng.uniform(centre - bound, centre + bound, stop - start)
                beat()
            for device in devices[1:]:
                values.copyto(parameter.data(device))

    def _initial_bound(self, name: str, shape: tuple[int, ...]) -> float:
        if name == "encoder.embedding.weight":
            return 0.1
        if name.endswith(("_scale", "_shift")):
            return 0.0
        if self.config.init == "xavier":
            return float(np.sqrt(6 / sum(shape))) if len(shape) == 2 else 0.0
        if name.startswith("encoder.layers."):
            return self.encoder.layer_sizes[int(name.split(".")[2])] ** -0.5
        if name.startswith(("head.prior.", "head.latent.")) or name.endswith(".projection.weight"):
            return self.encoder.layer_sizes[-1] ** -0.5
        return 0.0 if name.endswith("bias") else 0.1

    def hybridize_for_use(self, by_layer: bool = False) -> None:
        """Compile the encoder into one graph that keeps its memory from call to call.

        The head is not compiled: its few operators work in place on a chunk of logits, and a graph would hold several
        chunks permanently.

        Parameters
        ----------
        by_layer : bool
            Make a graph of each layer. MXNet releases the gradients of a graph all at once, after the backward pass
            through all of it; with a graph per layer, those of the last layer can be sent while the earlier layers are
            computed.
        """
        for block in (self.encoder.embedding, *self.encoder.layers) if by_layer else (self.encoder,):
            block.hybridize(static_alloc=True)

    def train_in_half_precision(self, kind: str) -> None:
        """Let training compute products in ``bfloat16`` or ``float16`` from now on; nothing else changes.

        This applies to the products of the output layer, except for those of a `SampledSoftmax`, which stay float32.
        The recurrent layers use ``float16`` as well, but stay float32 with ``bfloat16``, which MXNet's recurrent
        operator does not support.

        Raises
        ------
        ConfigError
            If a device of the model does not support it.
        """
        for device in self.encoder.embedding.weight.list_ctx():
            check_half_precision(kind, device)
        self.head.products = HalfProducts(kind)
        if kind == "float16":
            num_inputs = 1 + len(self.encoder.layer_sizes) * CELLS[self.encoder.cell].num_states
            encoder = in_float16(self.encoder, num_inputs, whole=self.encoder.embedding)
            encoder.hybridize(static_alloc=True)
            self._float16_encoder = (encoder,)

    @property
    def training_encoder(self) -> gluon.HybridBlock:
        """The encoder as training computes it; its parameters are those of `encoder`."""
        return self._float16_encoder[0] if self._float16_encoder else self.encoder
