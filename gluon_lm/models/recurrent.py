"""One recurrent layer over a window of time steps.

Shapes: T time, N batch, I input width, H hidden width, G gates (LSTM 4, GRU 3, RNN 1).
"""

from __future__ import annotations

from typing import NamedTuple

from mxnet import gluon


class Cell(NamedTuple):
    """What sets the recurrent cells apart: gates a unit has, and arrays of state a layer carries."""

    gates: int
    num_states: int


CELLS = {
    "rnn_tanh": Cell(gates=1, num_states=1),
    "rnn_relu": Cell(gates=1, num_states=1),
    "gru": Cell(gates=3, num_states=1),
    "lstm": Cell(gates=4, num_states=2),
}


class RecurrentLayer(gluon.HybridBlock):
    """A single recurrent layer through MXNet's fused ``RNN`` operator (oneDNN on CPU, cuDNN on GPU).

    Layers are kept apart because the operator's own dropout between layers does nothing on CPU; the stack above
    puts dropout between them as an operator of its own. LSTM gates are ordered input, forget, candidate, output;
    GRU gates reset, update, candidate, with the reset gate applied after the recurrent product, as cuDNN has it.

    Parameters
    ----------
    cell : str
        A key of `CELLS`.
    input_size, hidden_size : int
        Widths I and H.
    """

    def __init__(self, cell: str, input_size: int, hidden_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.cell, self.hidden_size = cell, hidden_size
        rows = CELLS[cell].gates * hidden_size
        with self.name_scope():
            self.i2h_weight = self.params.get("i2h_weight", shape=(rows, input_size))
            self.h2h_weight = self.params.get("h2h_weight", shape=(rows, hidden_size))
            self.i2h_bias = self.params.get("i2h_bias", shape=(rows,))
            self.h2h_bias = self.params.get("h2h_bias", shape=(rows,))

    def hybrid_forward(self, F, inputs_TNI, *states_1NH, i2h_weight, h2h_weight, i2h_bias, h2h_bias):
        """Return ``(outputs_TNH, *states_1NH)``; the states are hidden, and cell for an LSTM."""
        # The operator takes one flat vector. Joined as matrices as wide as a bias, which all four are multiples of,
        # the copy is oneDNN's; joined as vectors it would take six times as long.
        width = CELLS[self.cell].gates * self.hidden_size
        parts = [F.reshape(part, shape=(-1, width)) for part in (i2h_weight, h2h_weight, i2h_bias, h2h_bias)]
        return F.RNN(
            inputs_TNI,
            F.reshape(F.concat(*parts, dim=0), shape=(-1,)),
            *states_1NH,
            state_size=self.hidden_size,
            num_layers=1,
            mode=self.cell,
            state_outputs=True,
        )
