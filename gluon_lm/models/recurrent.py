"""One recurrent layer over a window of time steps.

Shapes: T time, N batch, I input width, H hidden width, G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

from mxnet import gluon

from ..config import CELLS
from .dropout import drop


class WeightDropLayer(gluon.HybridBlock):
    """The parameters of a recurrent layer, whose matrices have elements dropped in training.

    DropConnect (Wan et al. 2013, "Regularization of Neural Networks using DropConnect"; Merity et al. 2017,
    "Regularizing and Optimizing LSTM Language Models", section 2): one mask for a whole window, the rest scaled by
    1 / (1 - p).

    Parameters
    ----------
    cell : str
        A key of `CELLS`.
    input_size, hidden_size : int
        Widths I and H.
    input_weight_drop, weight_drop : float
        Probability of dropping an element of the input-to-hidden and of the hidden-to-hidden matrix, in [0, 1).
    has_biases : bool
        Whether there are an input-to-hidden and a hidden-to-hidden bias.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        input_weight_drop: float = 0.0,
        weight_drop: float = 0.0,
        has_biases: bool = True,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.cell, self.hidden_size, self.num_rows = cell, hidden_size, CELLS[cell].gates * hidden_size
        self._input_weight_drop, self._weight_drop = input_weight_drop, weight_drop
        with self.name_scope():
            self.i2h_weight = self.params.get("i2h_weight", shape=(self.num_rows, input_size))
            self.h2h_weight = self.params.get("h2h_weight", shape=(self.num_rows, hidden_size))
            if has_biases:
                self.i2h_bias = self.params.get("i2h_bias", shape=(self.num_rows,), init="zeros")
                self.h2h_bias = self.params.get("h2h_bias", shape=(self.num_rows,), init="zeros")

    def drop_weights(self, F, i2h_weight, h2h_weight):
        """The matrices for one window."""
        if self._input_weight_drop:
            i2h_weight = drop(F, i2h_weight, self._input_weight_drop)
        if self._weight_drop:
            h2h_weight = drop(F, h2h_weight, self._weight_drop)
        return i2h_weight, h2h_weight


class RecurrentLayer(WeightDropLayer):
    """A single recurrent layer through MXNet's fused ``RNN`` operator (oneDNN on CPU, cuDNN on GPU).

    Layers are separate because the operator's own dropout between layers does nothing on CPU; the stack that uses them
    inserts dropout as an operator of its own. LSTM gates are ordered input, forget, candidate, output; GRU gates reset,
    update, candidate, with the reset gate applied after the recurrent product, as in cuDNN.
    """

    def hybrid_forward(self, F, inputs_TNI, *states_1NH, i2h_weight, h2h_weight, i2h_bias, h2h_bias):
        """Return ``(outputs_TNH, *states_1NH)``; the states are hidden, and cell for an LSTM."""
        matrices = self.drop_weights(F, i2h_weight, h2h_weight)
        # The operator takes one flat vector. Concatenated as matrices as wide as a bias, of which all four are
        # multiples, the copy is oneDNN's; concatenated as vectors it would take six times as long.
        parts = [F.reshape(part, shape=(-1, self.num_rows)) for part in (*matrices, i2h_bias, h2h_bias)]
        return F.RNN(
            inputs_TNI,
            F.reshape(F.concat(*parts, dim=0), shape=(-1,)),
            *states_1NH,
            state_size=self.hidden_size,
            num_layers=1,
            mode=self.cell,
            state_outputs=True,
        )


class UnrolledLSTMLayer(WeightDropLayer):
    """An LSTM layer computed step by step, for what the fused operator cannot do; without that the two agree.

    Parameters
    ----------
    input_size, hidden_size, input_weight_drop, weight_drop
        As in `WeightDropLayer`.
    candidate_dropout : float
        Probability of dropping an element of the candidate, tanh(j), anew at each step (Semeniuta et al. 2016,
        "Recurrent Dropout without Memory Loss").
    layer_norm : bool
        Normalise each of the four gates, and the carried cell state, over the units (Ba et al. 2016, "Layer
        Normalization"). The normalisation's shift replaces the biases; the forget gate's starts at 1.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        input_weight_drop: float = 0.0,
        weight_drop: float = 0.0,
        candidate_dropout: float = 0.0,
        layer_norm: bool = False,
        **kwargs,
    ) -> None:
        super().__init__("lstm", input_size, hidden_size, input_weight_drop, weight_drop, not layer_norm, **kwargs)
        self._candidate_dropout, self._layer_norm = candidate_dropout, layer_norm
        if layer_norm:
            with self.name_scope():
                for name in ("input", "forget", "candidate", "output", "cell"):
                    for vector in (f"{name}_scale", f"{name}_shift"):
                        start = "ones" if vector.endswith("scale") or vector == "forget_shift" else "zeros"
                        setattr(self, vector, self.params.get(vector, shape=(hidden_size,), init=start))

    def hybrid_forward(self, F, inputs_TNI, hidden_1NH, cell_1NH, i2h_weight, h2h_weight, **vectors):
        """Return ``(outputs_TNH, hidden_1NH, cell_1NH)``."""
        i2h_weight, h2h_weight = self.drop_weights(F, i2h_weight, h2h_weight)
        i2h = {"no_bias": True} if self._layer_norm else {"bias": vectors["i2h_bias"]}
        h2h = {"no_bias": True} if self._layer_norm else {"bias": vectors["h2h_bias"]}
        from_inputs_TNG = F.FullyConnected(inputs_TNI, i2h_weight, num_hidden=self.num_rows, flatten=False, **i2h)

        def norm(array, name):
            if not self._layer_norm:
                return array
            return F.LayerNorm(array, vectors[f"{name}_scale"], vectors[f"{name}_shift"], axis=-1)

        def sigmoid(array):
            return F.Activation(array, act_type="sigmoid")  # oneDNN's; F.sigmoid takes ten times as long on a CPU

        def tanh(array):
            return F.Activation(array, act_type="tanh")

        def step(from_input_NG, states):
            hidden_NH, cell_NH = states
            gates_NG = from_input_NG + F.FullyConnected(hidden_NH, h2h_weight, num_hidden=self.num_rows, **h2h)
            input_NH, forget_NH, candidate_NH, output_NH = F.split(gates_NG, num_outputs=4, axis=-1)
            candidate_NH = tanh(norm(candidate_NH, "candidate"))
            if self._candidate_dropout:
                candidate_NH = drop(F, candidate_NH, self._candidate_dropout)
            kept_NH = sigmoid(norm(forget_NH, "forget")) * cell_NH
            cell_NH = norm(kept_NH + sigmoid(norm(input_NH, "input")) * candidate_NH, "cell")
            hidden_NH = sigmoid(norm(output_NH, "output")) * tanh(cell_NH)
            return hidden_NH, [hidden_NH, cell_NH]

        first = [F.squeeze(state, axis=0) for state in (hidden_1NH, cell_1NH)]
        outputs_TNH, last = F.contrib.foreach(step, from_inputs_TNG, first)
        return (outputs_TNH, *[F.expand_dims(state, axis=0) for state in last])
