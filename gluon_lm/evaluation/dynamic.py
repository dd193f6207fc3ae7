"""Dynamic evaluation: a model that keeps learning from the text on which it is evaluated.

Krause et al. 2017, "Dynamic Evaluation of Neural Sequence Models", section 5: gradient descent scaled by the root mean
square of the training text's gradients (RMS), and decay towards the trained parameters, fastest where these gradients
are large (global decay, RMS again). Each window of the text is predicted before it is learnt from.

Shapes: T time, N streams.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mxnet as mx
import numpy as np

from ..data.windows import Streams, Window
from ..errors import DataError, TrainingDiverged, reason
from ..files import atomic_write, read_arrays, write_arrays
from ..logs import LOGGER
from ..losses import backward_through_model
from ..models import LanguageModel
from ..progress import progress_bar
from .static import Evaluation, check_ids

_FORMAT = 1
_NUM_WINDOWS = "num_windows"


@dataclass(frozen=True)
class GradientStatistics:
    """The size of the gradients of a text's windows, element by element.

    Attributes
    ----------
    square_sums : mapping of str to ndarray of float32
        Sum over the windows of the squared gradient of a window's mean loss, by parameter name.
    num_windows : int
    """

    square_sums: Mapping[str, np.ndarray]
    num_windows: int

    def root_squares(self, of_mean: bool = False) -> dict[str, np.ndarray]:
        """Square root of the sums, or of the means over the windows, in float64."""
        divisor = self.num_windows if of_mean else 1
        return {name: np.sqrt(sums.astype(np.float64) / divisor) for name, sums in self.square_sums.items()}


def gradient_statistics(
    model: LanguageModel,
    ids: np.ndarray,
    eos: int,
    device: mx.Context,
    *,
    bptt: int = 5,
    batch_size: int = 100,
    max_batches: int | None = None,
    folder: Path | None = None,
    progress: str | None = None,
) -> GradientStatistics:
    """Sum the squares of the gradients of the training text's windows. All dropout is off.

    Parameters
    ----------
    model : LanguageModel
        It is not changed.
    ids : ndarray of int32, shape (num_tokens,)
        The training text, at least one window for each stream.
    eos : int
        The id of ``<eos>``.
    device : Context
        Where the model's parameters are.
    bptt : int
        T, words in a window.
    batch_size : int
        N, streams that the text is cut into.
    max_batches : int, optional
        Windows after which to stop; by default all are used.
    folder : Path, optional
        Where the statistics are kept, so that they are computed once for a model, a text and its windows. A damaged
        file is reported and computed again; if the folder cannot be written, the statistics are just not kept.
    progress : str, optional
        What to call the work in a progress bar.

    Raises
    ------
    DataError
        If the text is too short, or has ids outside the model's vocabulary.
    TrainingDiverged
        If a loss is not finite.
    """
    check_ids(model, ids)
    if len(ids) < batch_size * bptt:
        raise DataError(
            f"{len(ids)} training tokens are less than one window for each stream, --batch-size {batch_size} x --bptt "
            f"{bptt}, {batch_size * bptt} in all; lower these or add text"
        )
    path = None
    if folder is not None:
        path = folder / f"gradients-{_key(model, ids, eos, bptt, batch_size, max_batches)[:24]}.npz"
        kept = _load(path, model)
        if kept is not None:
            return kept
    streams = Streams(ids, batch_size, eos)
    num_windows = -(-streams.num_rows // bptt)
    if max_batches is not None:
        num_windows = min(num_windows, max_batches)
    advice = "the run itself has diverged, so use an earlier checkpoint of it"
    gradient_pass = _GradientPass(model, device, batch_size, advice)
    sums = [mx.nd.zeros_like(gradient) for gradient in gradient_pass.gradients]
    with progress_bar(total=min(num_windows * bptt * batch_size, len(ids)), desc=progress, unit="token") as bar:
        for window in itertools.islice(streams.windows(bptt), num_windows):
            gradient_pass.read(window)
            for square_sum, gradient in zip(sums, gradient_pass.gradients):
                square_sum += mx.nd.square(gradient / window.num_targets)
            bar.update(window.num_targets)
    gradient_pass.total_loss()  # must be finite
    names = gradient_pass.model.named_parameters()
    statistics = GradientStatistics({name: s.asnumpy() for name, s in zip(names, sums)}, num_windows)
    if path is not None:
        _save(path, statistics)
    return statistics


def dynamic_evaluate(
    model: LanguageModel,
    ids: np.ndarray,
    eos: int,
    device: mx.Context,
    statistics: GradientStatistics,
    *,
    lamb: float = 0.02,
    epsilon: float = 0.001,
    lr: float = 0.002,
    bptt: int = 5,
    of_mean: bool = False,
    progress: str | None = None,
) -> Evaluation:
    """Evaluate a model that learns, window by window, from what it has just been evaluated on. All dropout is off.

    With the gradient g of a window's mean loss, MS of `GradientStatistics.root_squares` and the trained parameters W0,
    each window is followed by ``W += lamb decay (W0 - W) - lr g / (MS + epsilon)``, where ``decay`` is MS over the sum
    of all parameters' mean MS, and at most ``1 / lamb``.

    Parameters
    ----------
    model : LanguageModel
        It is not changed: a copy learns.
    ids : ndarray of int32, shape (num_tokens,)
        The text, read in one stream. Every token counts, as in `gluon_lm.evaluation.static.evaluate`.
    eos : int
        The id of ``<eos>``.
    device : Context
        Where the model's parameters are.
    statistics : GradientStatistics
        Of the same model.
    lamb : float
        Strength of the decay towards the trained parameters, 0 or more.
    epsilon : float
        Added to MS before dividing by it, above 0; it bounds the steps of elements whose gradients were small.
    lr : float
        Learning rate.
    bptt : int
        T, words in a window.
    of_mean : bool
        Whether MS is the root of the mean of the squares, not of their sum.
    progress : str, optional
        What to call the work in a progress bar.

    Raises
    ------
    DataError
        If there are no ids, or some outside the model's vocabulary.
    TrainingDiverged
        If the loss stops being finite.
    """
    check_ids(model, ids)
    gradient_pass = _GradientPass(model, device, 1, f"the learning rate is likely too high: lower --lr (now {lr:g})")
    trained = {name: parameter.data(device) for name, parameter in model.named_parameters().items()}
    root_squares = statistics.root_squares(of_mean)
    mean_sum = sum(root.mean() for root in root_squares.values())

    def on_device(values: np.ndarray) -> mx.nd.NDArray:
        return mx.nd.array(values, ctx=device, dtype="float32")

    # Every window that is followed by another one is full, so its mean loss is the sum divided by bptt.
    terms = [
        (
            parameter.data(device),
            trained[name],
            mx.nd.zeros_like(trained[name]),  # W - W0, which float32 represents more precisely than W
            on_device(1 - np.minimum(lamb * root_squares[name] / mean_sum, 1)),
            parameter.grad(device),
            on_device(lr / (bptt * (root_squares[name] + epsilon))),
        )
        for name, parameter in gradient_pass.model.named_parameters().items()
    ]
    with progress_bar(total=len(ids), desc=progress, unit="token") as bar:
        for window in Streams(ids, 1, eos).windows(bptt):
            gradient_pass.read(window)
            for current, origin, change, kept, gradient, rate in terms:
                change *= kept
                gradient *= rate
                change -= gradient
                mx.nd.elemwise_add(origin, change, out=current)
            bar.update(window.num_targets)
    return Evaluation(gradient_pass.total_loss(), len(ids))


class _GradientPass:
    """A pass over a text, window by window, by a copy of a model without dropout, with the gradient of each window.

    Parameters
    ----------
    model : LanguageModel
    device : Context
    num_streams : int
        N.
    advice : str
        What to do if the loss is not finite.

    Attributes
    ----------
    model : LanguageModel
        The copy.
    gradients : list of NDArray
        With respect to each parameter: of the summed loss of the window that was read last.
    """

    def __init__(self, model: LanguageModel, device: mx.Context, num_streams: int, advice: str) -> None:
        self.model = LanguageModel(model.config.without_dropout(), model.vocab_size)
        self.model.allocate_parameters([device])
        copies = self.model.named_parameters()
        for name, parameter in model.named_parameters().items():
            copies[name].set_data(parameter.data(device))
        self.model.hybridize_for_use()
        self.gradients = [parameter.grad(device) for parameter in copies.values()]
        self._device, self._advice = device, advice
        self._states = self.model.begin_state(num_streams, device)
        self._loss_sum, self._num_windows = 0.0, 0
        self._pending: mx.nd.NDArray | None = None

    def read(self, window: Window) -> None:
        """Go through the next window, forwards and backwards."""
        mx.nd.reset_arrays(*self.gradients, num_arrays=len(self.gradients))
        loss_sum, self._states = backward_through_model(self.model, window, self._states, self._device)
        self._take_pending()  # while the device works on this window
        self._pending = loss_sum

    def total_loss(self) -> float:
        """Summed loss of all windows, in nats.

        Raises
        ------
        TrainingDiverged
            If it is not finite; `read` raises it too, one window later.
        """
        self._take_pending()
        return self._loss_sum

    def _take_pending(self) -> None:
        if self._pending is None:
            return
        loss_sum, self._pending = float(self._pending.asscalar()), None
        self._num_windows += 1
        if not math.isfinite(loss_sum):
            raise TrainingDiverged(f"window {self._num_windows}: the loss is {loss_sum:g}, not finite; {self._advice}")
        self._loss_sum += loss_sum


# ---------------------------------------------------------------- the statistics on disk


def _key(model: LanguageModel, ids: np.ndarray, eos: int, *how: int | None) -> str:
    """A hash of everything that the statistics depend on."""
    digest = hashlib.sha256(repr((_FORMAT, model.config.without_dropout(), model.vocab_size, eos, how)).encode())
    for name, parameter in model.named_parameters().items():
        digest.update(name.encode())
        digest.update(parameter.list_data()[0].asnumpy().data)
    digest.update(np.ascontiguousarray(ids).data)
    return digest.hexdigest()


def _load(path: Path, model: LanguageModel) -> GradientStatistics | None:
    """What `_save` wrote, None where there is no such file or it is damaged."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters().items()}
    if not path.exists():
        return None
    try:
        arrays = dict(read_arrays(path))  # which verifies the CRC of every array
        num_windows = int(arrays.pop(_NUM_WINDOWS))
        if {name: array.shape for name, array in arrays.items()} != shapes:
            raise ValueError("it is of another model")
        statistics = GradientStatistics(arrays, num_windows)
    except (ValueError, TypeError, KeyError) as error:
        LOGGER.info("%s: is damaged (%s); it is computed again", path, reason(error))
        return None
    LOGGER.info("squared gradients of the training text (windows: %s) from %s", f"{num_windows:,}", path)
    return statistics


def _save(path: Path, statistics: GradientStatistics) -> None:
    try:
        path.parent.mkdir(exist_ok=True)
        with atomic_write(path) as file:
            write_arrays(file, [(_NUM_WINDOWS, np.array(statistics.num_windows)), *statistics.square_sums.items()])
    except OSError as error:
        LOGGER.info("%s: cannot be written (%s); next time they are computed again", path, error.strerror)
    else:
        LOGGER.info(
            "squared gradients of the training text (windows: %s) kept in %s", f"{statistics.num_windows:,}", path
        )
