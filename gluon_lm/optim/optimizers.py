"""Registry of optimisers, and their state as plain arrays.

A checkpoint must not contain pickles (`gluon.Trainer.save_states` writes one), so the state is taken from the
trainer's updaters here, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mxnet as mx
from mxnet import gluon

from ..config import OptimConfig
from ..errors import CheckpointError
from ..indexing import set_rows


class SGD(mx.optimizer.Optimizer):
    """Stochastic gradient descent without momentum: ``w -= lr * (rescale_grad * g + wd * w)``.

    MXNet's own uses the update for several arrays even for a single one, which takes twice as long on CPU.

    Attributes
    ----------
    rows : dict of int to NDArray of int32
        By parameter number, for parameters whose gradient is zero in all other rows: the rows to update. Without weight
        decay, that is the same as updating all.
    """

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.rows: dict[int, mx.nd.NDArray] = {}

    def create_state(self, index, weight):
        return None

    def update(self, index, weight, grad, state):
        self._update_count(index)
        rows = self.rows.get(index)
        found, slope = (weight, grad) if rows is None else (mx.nd.take(weight, rows), mx.nd.take(grad, rows))
        mx.nd.sgd_update(
            found,
            slope,
            out=found,
            lr=self._get_lr(index),
            wd=self._get_wd(index),
            rescale_grad=self.rescale_grad,
            clip_gradient=-1 if self.clip_gradient is None else self.clip_gradient,  # -1: no bound
        )
        if rows is not None:
            set_rows(weight, rows, found)


OPTIMIZERS = {"sgd": SGD, "adam": mx.optimizer.Adam}


def create_optimizer(config: OptimConfig) -> mx.optimizer.Optimizer:
    """The optimiser of a run: SGD, or Adam (Kingma & Ba 2015) with MXNet's defaults."""
    return OPTIMIZERS[config.optimizer](learning_rate=config.lr, wd=config.weight_decay)


def optimizer_state(trainer: gluon.Trainer, names: Sequence[str]) -> dict[str, mx.nd.NDArray]:
    """State arrays of the optimiser as ``name/k``; those of the first device, as they are the same on all.

    Parameters
    ----------
    trainer : gluon.Trainer
    names : sequence of str
        Names of the trainer's parameters, in its order.
    """
    return {
        f"{names[index]}/{k}": array
        for index, state in trainer._updaters[0].states.items()
        for k, array in enumerate(_as_tuple(state))
    }


def load_optimizer_state(
    trainer: gluon.Trainer, names: Sequence[str], arrays: Mapping[str, mx.nd.NDArray], num_updates: int
) -> None:
    """Restore what `optimizer_state` returned, on every device.

    Parameters
    ----------
    num_updates : int
        Updates made so far; Adam's bias correction depends on it.

    Raises
    ------
    CheckpointError
        If the arrays belong to another optimiser or model.
    """
    optimizer = trainer._optimizer
    optimizer.begin_num_update = optimizer.num_update = num_updates
    parameters = [trainer._params[index] for index in range(len(names))]
    expected = set()
    for device_index, updater in enumerate(trainer._updaters):
        for index, (name, parameter) in enumerate(zip(names, parameters)):
            weight = parameter.list_data()[device_index]
            state = optimizer.create_state_multi_precision(index, weight)
            for k, array in enumerate(_as_tuple(state)):
                expected.add(f"{name}/{k}")
                if num_updates and f"{name}/{k}" in arrays:
                    if arrays[f"{name}/{k}"].shape != array.shape:
                        raise CheckpointError(f"optimizer state {name}/{k} has the shape of another model's")
                    arrays[f"{name}/{k}"].copyto(array)
            updater.states[index], updater.states_synced[index] = state, True
    if num_updates and expected != set(arrays):
        raise CheckpointError(
            f"optimizer state holds {len(arrays)} arrays where {type(optimizer).__name__} has "
            f"{len(expected)}; it belongs to another optimiser or model"
        )


def _as_tuple(state) -> tuple:
    if state is None:
        return ()
    return tuple(state) if isinstance(state, (tuple, list)) else (state,)
