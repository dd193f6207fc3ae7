"""Negative log-likelihood of every token, computed in chunks of rows.

Logits for a whole window can be larger than the model: 1,120 tokens with a vocabulary of 33,278 take 149 MB, several
times over, and a mixture has as many for each of its experts. So every head gets a chunk of rows at a time, and memory
depends on neither batch size nor window.

Shapes: T time, N batch, H hidden width, F width of the head's features, R rows = T x N in time-major order,
S softmaxes (rows x softmaxes per row), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import mxnet as mx

from .data.windows import Window
from .inputs import Inputs, copy_inputs
from .models import Head, LanguageModel, State, TrainingHead

CHUNK_SOFTMAXES = 1024  # of a chunk: enough for the time of its products to outweigh reading the matrix again
CHUNK_LOGITS = 1 << 27  # of a chunk, 512 MiB: fewer softmaxes with more than 131,072 words, to save memory


def row_chunks(num_rows: int, softmaxes_per_row: int, logits_width: int = 1) -> list[slice]:
    """Cut rows (at least one) into the fewest near-equal chunks within `CHUNK_SOFTMAXES` and `CHUNK_LOGITS`.

    A chunk has at least one row.
    """
    most = min(CHUNK_SOFTMAXES, CHUNK_LOGITS // logits_width)
    num_chunks = -(-num_rows // max(1, most // softmaxes_per_row))
    rows = -(-num_rows // num_chunks)
    return [slice(start, min(start + rows, num_rows)) for start in range(0, num_rows, rows)]


def largest_chunk(head: TrainingHead, num_rows: int) -> int:
    """Elements of the logits that a head has in memory at a time when it works on so many rows."""
    first = row_chunks(num_rows, head.softmaxes_per_row, head.logits_width)[0]
    return (first.stop - first.start) * head.softmaxes_per_row * head.logits_width


def _chunks(
    head: TrainingHead, features_TNF: mx.nd.NDArray, targets_R: mx.nd.NDArray
) -> Iterator[tuple[slice, mx.nd.NDArray, mx.nd.NDArray]]:
    """Chunks of rows: where they are, their features, and their targets."""
    features_RF = features_TNF.reshape((-1, features_TNF.shape[-1]))
    for rows in row_chunks(targets_R.shape[0], head.softmaxes_per_row, head.logits_width):
        yield rows, features_RF[rows], targets_R[rows]


def backward_through_head(
    head: TrainingHead,
    features_TNF: mx.nd.NDArray,
    targets_R: mx.nd.NDArray,
    loss_scale: float = 1.0,
) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
    """Loss of a window and its gradient with respect to the features; adds that of the head's parameters to theirs.

    The parameters' ``grad_req`` must be ``"add"``, as `LanguageModel.initialize_parameters` sets it; otherwise only the
    gradient of the last chunk of rows remains.

    Parameters
    ----------
    head : TrainingHead
    features_TNF : NDArray
        What `Head.features` returns, detached.
    targets_R : NDArray of int32
        Targets of the first R <= T x N rows in time-major order; the rows after them have none.
    loss_scale : float
        All gradients are multiplied by it, the loss is not.

    Returns
    -------
    loss_sum : NDArray, shape (1,)
        Sum over the targets, in nats.
    grad_TNF : NDArray
        Gradient of that sum, to propagate back through the features and the encoder.
    """
    grad_TNF = mx.nd.zeros_like(features_TNF)
    grad_RF = grad_TNF.reshape((-1, grad_TNF.shape[-1]))
    head.products.begin_window(features_TNF.context)
    loss_sums = []
    for rows, features_RF, targets in _chunks(head, features_TNF, targets_R):
        losses, grad_RF[rows] = head.backward(features_RF, targets, loss_scale)
        loss_sums.append(losses.sum())
    return mx.nd.add_n(*loss_sums), grad_TNF


def backward_through_model(
    model: LanguageModel,
    window: Window,
    states: State,
    device: mx.Context,
    *,
    alpha: float = 0.0,
    beta: float = 0.0,
    inputs: Inputs | None = None,
    head: TrainingHead | None = None,
    loss_scale: float = 1.0,
) -> tuple[mx.nd.NDArray, State]:
    """Loss of a window, and its gradient added to the model's, whose ``grad_req`` is ``"add"``.

    Parameters
    ----------
    model : LanguageModel
    window : Window
        With at least one target.
    states : State
        The state before it.
    device : Context
    alpha, beta : float
        Weights of the `activation_penalties` of the window, whose gradient is added as well.
    inputs : tuple of NDArray, optional
        What `copy_inputs` returned for the window, if it was called before.
    head : TrainingHead, optional
        What `Head.for_window` returned for this window; by default the model's head, whose loss is over all words.
    loss_scale : float
        All gradients are multiplied by it, the loss is not.

    Returns
    -------
    loss_sum : NDArray, shape (1,)
        Sum over the targets, in nats, without the penalties.
    states : State
        The state after it, detached.
    """
    tokens_TN, targets_R = inputs or copy_inputs(window, device)
    with mx.autograd.record():
        raw_TNH, *states = model.training_encoder(tokens_TN, *states)
        hidden_TNH = model.output_dropout(raw_TNH)
        features_TNF = model.head.features(hidden_TNH)
        terms = activation_penalties(hidden_TNH, raw_TNH, window.num_targets, alpha, beta)
    loss_sum, grad_TNF = backward_through_head(head or model.head, features_TNF.detach(), targets_R, loss_scale)
    grads = [mx.nd.full(term.shape, loss_scale, ctx=device) for term in terms]
    mx.autograd.backward([features_TNF, *terms], [grad_TNF, *grads])
    return loss_sum, [state.detach() for state in states]


def target_losses(head: Head, hidden_TNH: mx.nd.NDArray, targets_R: mx.nd.NDArray) -> mx.nd.NDArray:
    """Negative log-likelihood, in nats, of each of the first R rows' targets (no gradient): shape (R,)."""
    chunks = _chunks(head, head.features(hidden_TNH), targets_R)
    return mx.nd.concat(*[head.losses(*chunk) for _, *chunk in chunks], dim=0)


def activation_penalties(
    hidden_TNH: mx.nd.NDArray, raw_TNH: mx.nd.NDArray, num_targets: int, alpha: float, beta: float
) -> list[mx.nd.NDArray]:
    """Activation and temporal activation regularisation, summed over the first `num_targets` rows; differentiable.

    ``alpha * sum mean_H(hidden[t]^2) + beta * sum mean_H((raw[t+1] - raw[t])^2)``, the first sum over all targets, the
    second over the pairs of which both are targets (Merity et al. 2017, section 4.6, with means over units and rows as
    in their code).

    Parameters
    ----------
    hidden_TNH, raw_TNH : NDArray
        Output of the last layer with and without dropout.
    num_targets : int
        Rows, in time-major order, that have a target.

    Returns
    -------
    list of NDArray
        The terms to add, of shape (1,) each; may be empty.
    """
    width = hidden_TNH.shape[-1]
    terms = []
    if alpha:
        terms.append(mx.nd.square(hidden_TNH.reshape((-1, width))[:num_targets]).sum() * (alpha / width))
    num_pairs = num_targets - hidden_TNH.shape[1]
    if beta and num_pairs > 0:
        changes_RH = (raw_TNH[1:] - raw_TNH[:-1]).reshape((-1, width))
        terms.append(mx.nd.square(changes_RH[:num_pairs]).sum() * (beta / width))
    return terms
