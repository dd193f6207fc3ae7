"""One step of training, shared by every recipe.

Shapes: T time, N batch, H hidden width, W workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mxnet as mx
import numpy as np
from mxnet import gluon

from ..config import OptimConfig, show
from ..data.windows import Window
from ..distributed.communicator import Communicator
from ..errors import CheckpointError, TrainingDiverged
from ..inputs import InputCopies
from ..losses import backward_through_model
from ..models import LanguageModel, State
from ..optim.norms import square_sums
from ..optim.optimizers import SGD, create_optimizer, load_optimizer_state, optimizer_state
from ..optim.rows import FilledRows
from .loss_scale import LossScale

# MXNet's operator has room for 200 arrays, and does not check whether there are more.
_CHECKED_AT_ONCE = 200
_SMALLEST_LR = 1e-30  # MXNet's operators refuse rates that underflow float32; weights stop changing far above that
_SAMPLES = 1  # distinguishes these seeds from others that begin with the run's


class StepResult(NamedTuple):
    """Sums over one global window.

    Attributes
    ----------
    loss_sum : float
        Negative log-likelihood of all targets, in nats.
    num_targets : int
    grad_norm : float
        Global L2 norm of the mean loss's gradient, before clipping.
    stop_signal : int
        A signal by which a worker was asked to stop, the same on every worker; 0 if none was.
    was_taken : bool
        Whether the parameters were updated; False if a scaled gradient overflowed, and its norm is then NaN.
    """

    loss_sum: float
    num_targets: int
    grad_norm: float
    stop_signal: int
    was_taken: bool = True


class TrainingStep:
    """Forward, backward, reduce, clip, update, over the devices of a communicator.

    The loss is a *sum* over targets until the gradients of all devices are summed too; one factor then makes it a mean
    and clips it, so that the arithmetic does not depend on how the batch was split. Random draws do: dropout masks, and
    the words of a sampled softmax.

    Parameters
    ----------
    model : LanguageModel
        Initialised on the communicator's devices.
    communicator : Communicator
    optim : OptimConfig
        The update rule, weight decay, clipping and regularisation. With ``small_batch_size`` that many streams, over
        all devices together, are processed at a time, which takes less memory, and gradients are accumulated over the
        whole batch. It must divide the batch, and be a multiple of the number of devices. Windows, averages and changes
        of the learning rate are left to the caller.
    loss_scale : LossScale, optional
        For gradients in float16. They are unscaled right after the backward pass.

    Attributes
    ----------
    states : list of State, or None
        The recurrent state that each device carries into the next window; None starts it from zero.
    """

    def __init__(
        self,
        model: LanguageModel,
        communicator: Communicator,
        optim: OptimConfig,
        loss_scale: LossScale | None = None,
    ) -> None:
        self._model, self._communicator, self._optim, self._loss_scale = model, communicator, optim, loss_scale
        named = model.named_parameters()
        self._names, self._parameters = list(named), list(named.values())
        for parameter in self._parameters:
            parameter.grad_req = "add"  # head and encoder, and all chunks, add to one gradient
        self._filled = FilledRows(named)
        is_alone = communicator.size == len(communicator.devices) == 1
        self._optimizer = create_optimizer(optim)
        self._updates_rows = is_alone and isinstance(self._optimizer, SGD) and not optim.weight_decay
        self._trainer = gluon.Trainer(self._parameters, self._optimizer, kvstore=None)
        self.states: list[State] | None = None
        self._inputs = InputCopies()

    def __call__(
        self,
        window: Window,
        seed: int,
        step: int,
        stop_signal: Callable[[], int] = lambda: 0,
        upcoming: Window | None = None,
    ) -> StepResult:
        """Take one step.

        Parameters
        ----------
        window : Window
            All columns; each device of each worker takes its own.
        seed, step : int
            The run's seed, and the steps taken before. Dropout masks depend only on them, the worker's rank and the
            device; the words that a device samples only on them and the position of its columns in the batch.
        stop_signal : callable
            Returns the signal by which this worker was asked to stop, or 0; every worker knows it after this step.
        upcoming : Window, optional
            The next step's, which is sent to the devices while they are busy with this one.

        Raises
        ------
        TrainingDiverged
            If the loss is not finite, or the gradient, unless a smaller scale of the loss may help. Neither parameters
            nor states have changed then.

        Notes
        -----
        MXNet's generators are seeded for each step, from `seed`, `step` and the worker's rank.
        """
        states, clip_norm = self.states, self._optim.clip_norm
        mx.random.seed(step_seed(seed, step, self._communicator.rank))
        self._filled.clear()
        factor = 1.0 if self._loss_scale is None else self._loss_scale.factor(window.num_targets)
        loss_sums = self._forward_backward(window, seed, step, factor)
        if upcoming is not None:  # before anything waits for the devices
            self._inputs.begin(upcoming)
        has_overflowed = self._loss_scale is not None and not self._unscale_gradients(factor)
        if not has_overflowed:
            self._communicator.reduce_gradients(self._parameters)
        # The only read-back of a step in float32: whether to update at all depends on it.
        own_loss_sum = sum(float(loss.asscalar()) for loss in loss_sums)
        grad_norm = 0.0 if has_overflowed else self._gradient_norm() / window.num_targets
        numbers = [own_loss_sum, grad_norm, stop_signal()]
        loss_sums_W, grad_norms_W, signals_W = self._communicator.allgather(numbers).T
        agreed_signal = int(signals_W.max())
        # All have the same gradient; rank 0's norm is used, so that all clip it identically, to the last bit.
        is_finite = np.isfinite(grad_norms_W).all()
        loss_sum, grad_norm = float(loss_sums_W.sum()), float(grad_norms_W[0] if is_finite else np.nan)
        if not (np.isfinite(loss_sum) and np.isfinite(grad_norm)):
            self.states = states
            raise TrainingDiverged(
                f"step {step + 1}: loss {loss_sum / window.num_targets:g} and gradient norm {grad_norm:g} must be "
                "finite; no parameter was changed by this step. The learning rate is likely too high: lower --lr (now "
                f"{self._trainer.learning_rate:g}) or --clip (now {show(clip_norm)})"
                + (", or send the gradients in float32, with --gctype none" if self._communicator.sends_float16 else "")
            )
        if self._loss_scale is not None:
            if has_overflowed and self._loss_scale.is_smallest:
                self.states = states
                raise TrainingDiverged(
                    f"step {step + 1}: gradients overflow float16 however the loss is scaled; no parameter was changed "
                    f"by this step. Lower --lr (now {self._trainer.learning_rate:g}), or use --amp none"
                )
            self._loss_scale.update(has_overflowed)
        if has_overflowed:
            return StepResult(loss_sum, window.num_targets, np.nan, agreed_signal, was_taken=False)
        clip_factor = 1.0
        if clip_norm is not None and grad_norm > clip_norm:
            clip_factor = clip_norm / grad_norm
        if self._updates_rows:
            self._optimizer.rows = self._filled.by_index
        self._trainer.update(window.num_targets / clip_factor)
        return StepResult(loss_sum, window.num_targets, grad_norm, agreed_signal)

    def rehearse(self, window: Window) -> None:
        """Process a window forwards and backwards, to allocate its memory; nothing else changes.

        A window that is longer than all before it takes more memory; with the longest one rehearsed at the start,
        training does not run out of memory hours later.
        """
        states = self.states
        self._filled.clear()
        self._forward_backward(window, seed=0, step=0, loss_scale=1.0)
        mx.nd.waitall()
        self.states = states

    def set_learning_rate(self, lr: float) -> None:
        """Set that of the next steps. 1e-30 or less counts as 0."""
        self._trainer.set_learning_rate(lr if lr > _SMALLEST_LR else 0)

    def optimizer_state(self) -> dict[str, mx.nd.NDArray]:
        """What the optimiser keeps from step to step: arrays by name."""
        return optimizer_state(self._trainer, self._names)

    def load_optimizer_state(self, arrays: Mapping[str, mx.nd.NDArray], num_updates: int) -> None:
        """Restore what `optimizer_state` returned after so many updates.

        Raises
        ------
        CheckpointError
            If the arrays belong to another optimiser or model.
        """
        load_optimizer_state(self._trainer, self._names, arrays, num_updates)

    def carried_state(self) -> list[mx.nd.NDArray]:
        """The recurrent state of all streams, if there is one: arrays (1, N, H) on rank 0, maybe none on the others.

        All workers call it together.
        """
        if not self.states:
            return []
        own = [np.concatenate([part.asnumpy() for part in parts], axis=1) for parts in zip(*self.states)]
        workers = self._communicator.gather_arrays(own)
        return [mx.nd.array(np.concatenate(parts, axis=1)) for parts in zip(*workers)]

    def restore_carried_state(self, arrays: Sequence[mx.nd.NDArray], batch_size: int, origin: Path) -> None:
        """Restore what `carried_state` returned, on any number of devices that divides the batch.

        Parameters
        ----------
        arrays : sequence of NDArray
        batch_size : int
            N, of all devices together.
        origin : Path
            Where the arrays are from, for the message of an error.

        Raises
        ------
        CheckpointError
            If they are not those of this model and batch.
        """
        if not arrays:
            self.states = None
            return
        expected = [array.shape for array in self._model.begin_state(batch_size, mx.cpu())]
        found = [array.shape for array in arrays]
        if found != expected:
            raise CheckpointError(
                f"{origin}: carries a recurrent state of shapes {found}, and this model with --batch-size {batch_size} "
                f"has {expected}; both must stay as they were"
            )
        self.states = [
            [array[:, share].as_in_context(device) for array in arrays]
            for share, device in zip(self._communicator.shares(batch_size), self._communicator.devices)
        ]

    def _unscale_gradients(self, loss_scale: float) -> bool:
        """Divide the gradients by the scale of the loss, if they are finite on every device of every worker."""
        gradients_of_devices = list(zip(*(parameter.list_grad() for parameter in self._parameters)))
        flags = [
            mx.nd.multi_all_finite(*some, num_arrays=len(some))
            for grads in gradients_of_devices
            for some in (grads[start : start + _CHECKED_AT_ONCE] for start in range(0, len(grads), _CHECKED_AT_ONCE))
        ]
        is_finite = all(flag.asscalar() for flag in flags)
        # All or none: a worker that went on would wait for the others, and compression would keep NaN or infinity.
        if not self._communicator.allgather([is_finite]).all():
            return False
        for grads in gradients_of_devices:
            for grad in grads:
                grad /= loss_scale
        return True

    def _forward_backward(self, window: Window, seed: int, step: int, loss_scale: float) -> list[mx.nd.NDArray]:
        devices, optim = self._communicator.devices, self._optim
        batch_size = window.tokens_TN.shape[1]
        part_width = (optim.small_batch_size or batch_size) // self._communicator.num_devices
        # Like the loss, penalties are sums that become means when they are divided by the targets of the whole window.
        # Pairs of neighbours are fewer than targets, so beta is scaled to give a mean over pairs.
        num_pairs = max(1, window.num_targets - batch_size)
        beta = optim.beta * window.num_targets / num_pairs
        shares = self._communicator.shares(batch_size)
        before = self.states or [
            self._model.begin_state(share.stop - share.start, device) for share, device in zip(shares, devices)
        ]
        after: list[State] = []
        loss_sums = []
        filled: dict[str, list[np.ndarray]] = {}
        for i, (device, share) in enumerate(zip(devices, shares)):
            for parameter in self._parameters:
                parameter.data(device)._fresh_grad = True  # even if a short row ends before this device's columns
            parts = []
            for column in range(share.start, share.stop, part_width):
                columns = window.columns(column, column + part_width)
                start = column - share.start
                states = [state[:, start : start + part_width] for state in before[i]]
                if columns.num_targets:
                    inputs = self._inputs.take(window, column, column + part_width, device)
                    head = self._model.head.for_window(np.random.default_rng([_SAMPLES, seed, step, column]))
                    loss_sum, states = backward_through_model(
                        self._model,
                        columns,
                        states,
                        device,
                        alpha=optim.alpha,
                        beta=beta,
                        inputs=inputs,
                        head=head,
                        loss_scale=loss_scale,
                    )
                    loss_sums.append(loss_sum)
                    if self._updates_rows:
                        for name, rows in self._model.gradient_rows(columns, head).items():
                            filled.setdefault(name, []).append(rows)
                parts.append(states)
            after.append(parts[0] if len(parts) == 1 else [mx.nd.concat(*same, dim=1) for same in zip(*parts)])
        self.states = after
        self._filled.note(filled)
        return loss_sums

    def _gradient_norm(self) -> float:
        squares = square_sums(self._filled.gradients()).asnumpy()
        return float(np.sqrt(np.sum(squares, dtype=np.float64)))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """A 31-bit seed for a worker's generators at one step: their state cannot be saved, so each step reseeds them."""
    entropy = [seed, step, rank] if rank else [seed, step]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
