"""Output layers: from hidden vectors to the distribution of the next word.

A head works in two parts. `Head.features` maps the hidden vectors of a window to the features that determine the
distribution; it is differentiable and has the head's dropout. What comes after is as wide as the vocabulary, and is
computed in three ways, which agree. As a HybridBlock a head returns log-probabilities, for generation and export.
`Head.losses` scores given targets, for evaluation. In training the head is the last node of the model, so
`Head.backward` computes the loss and its gradient together. The last two are called on one chunk of rows after another
(see `gluon_lm.losses`) and keep nothing that is as wide as the vocabulary for later.

Shapes: R rows (time x batch, flattened), H width of the last layer, F width of the features, E embedding width,
V vocabulary, K experts, S softmaxes (rows x experts), C candidates of a sampled softmax, G words of a group, P rows
whose target is in one group.
"""

from __future__ import annotations

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence

import mxnet as mx
import numpy as np
from mxnet import gluon
from mxnet.gluon import nn

from ..config import SMALLEST_FLOAT32, TAIL_FACTOR, ModelConfig
from ..indexing import set_elements, set_rows
from .dropout import Dropout
from .precision import Products

_PARTS = 4  # in which an adaptive softmax's widest group is computed, if all rows of a chunk are in it
_NEVER = -1e30  # a logit whose probability is 0


class TrainingHead:
    """An output layer as training sees it on one window: features become a loss and its gradient.

    Attributes
    ----------
    softmaxes_per_row : int
    logits_width : int
        Logits of each softmax that are in memory at a time: V, or fewer.
    products : Products
        How `backward` computes its affine maps.
    """

    softmaxes_per_row: int = 1
    logits_width: int
    products: Products

    @abstractmethod
    def backward(
        self, features_RF: mx.nd.NDArray, targets_R: mx.nd.NDArray, loss_scale: float = 1.0
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """The loss and its gradient with respect to the features; adds that of the parameters to theirs.

        Parameters
        ----------
        features_RF : NDArray
            Detached.
        targets_R : NDArray of int32
        loss_scale : float
            All gradients are multiplied by it, the losses are not.

        Returns
        -------
        losses_R : NDArray
            Negative log-likelihood of each target, in nats; not finite where the features are not.
        grad_RF : NDArray
            Gradient of their sum with respect to the features.
        """

    def gradient_rows(self, ids: np.ndarray) -> np.ndarray | None:
        """Rows of the decoder that get a gradient from training on these targets; None: any."""
        return None


class Head(TrainingHead, gluon.HybridBlock):
    """Base class of output layers. Called as a block: ``hidden_..H -> log_probs_..V``.

    Attributes
    ----------
    vocab_size : int
    """

    def __init__(self, vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.vocab_size = self.logits_width = vocab_size
        self.products = Products()
        self._of_thread = threading.local()

    def _workspace(self, num_elements: int, device: mx.Context) -> mx.nd.NDArray:
        """A vector on a device for a chunk's logits. All calls from one thread share its memory.

        It is allocated only once: an array of that size that is freed and allocated in each step never gets its old
        place back.
        """
        workspaces: dict[mx.Context, mx.nd.NDArray] = self._of_thread.__dict__
        if device not in workspaces or workspaces[device].size < num_elements:
            workspaces[device] = mx.nd.empty((num_elements,), ctx=device)
        return workspaces[device][:num_elements]

    def for_window(self, rng: np.random.Generator) -> TrainingHead:
        """What training on one window uses as the head: itself, or what it draws for that window."""
        return self

    @abstractmethod
    def scores(self, F, hidden_RH):
        """Log-probabilities up to a constant for each row: ``hidden_..H -> scores_..V``, in a graph or outside."""

    def features(self, hidden_TNH: mx.nd.NDArray) -> mx.nd.NDArray:
        """The features that determine the distribution after each word: here the hidden vectors themselves."""
        return hidden_TNH

    @abstractmethod
    def losses(self, features_RF: mx.nd.NDArray, targets_R: mx.nd.NDArray) -> mx.nd.NDArray:
        """Negative log-likelihood, in nats, of each of `targets_R` (int32): shape (R,). Nothing is recorded."""


class SoftmaxHead(Head):
    """Affine map and softmax, ``p = softmax(W h + b)``.

    Parameters
    ----------
    vocab_size, input_size : int
        V and H.
    embedding : gluon.nn.Embedding, optional
        When given, W *is* its matrix (Press & Wolf 2016, "Using the Output Embedding to Improve Language Models";
        Inan et al. 2016), so H must be its width.
    """

    def __init__(self, vocab_size: int, input_size: int, embedding: nn.Embedding | None = None, **kwargs) -> None:
        super().__init__(vocab_size, **kwargs)
        with self.name_scope():
            self.decoder = _decoder(vocab_size, input_size, embedding)

    def hybrid_forward(self, F, hidden_RH):
        return F.log_softmax(self.scores(F, hidden_RH), axis=-1)

    def scores(self, F, hidden_RH):
        return self.decoder(hidden_RH)

    def losses(self, features_RF, targets_R):
        workspace = self._workspace(len(features_RF) * self.vocab_size, features_RF.context)
        return -_target_log_probs(self.decoder, features_RF, targets_R, workspace)

    def backward(self, features_RF, targets_R, loss_scale=1.0):
        workspace = self._workspace(len(features_RF) * self.vocab_size, features_RF.context)
        probs_RV = _Softmax(self.products, self.decoder, features_RF, targets_R, workspace)
        return -probs_RV.target_log_probs(), probs_RV.backward(loss_scale)


class MixtureHead(Head):
    """Mixture of softmaxes (Yang et al. 2018, "Breaking the Softmax Bottleneck: A High-Rank RNN Language Model").

    ``p(word) = sum_k prior_k softmax(W z_k + b)[word]`` with ``prior = softmax(P h)`` and the experts' vectors
    ``z_k = tanh(L_k h + l_k)``, all equations of their section 2.4.

    The loss needs only the probabilities of the targets. With the responsibilities
    ``r_k = prior_k p_k(target) / p(target)`` its gradient with respect to the logits of expert k is
    ``r_k (p_k - onehot(target))``, and to the logarithm of its prior ``-r_k``: so each softmax of a row is treated like
    a row of the plain head.

    Parameters
    ----------
    vocab_size, input_size, embed_size, num_experts : int
        V, H, E and K.
    latent_dropout : float
        Probability of dropping an element of z, the same elements for all words of a window.
    embedding : gluon.nn.Embedding, optional
        When given, W is its matrix.
    """

    def __init__(
        self,
        vocab_size: int,
        input_size: int,
        embed_size: int,
        num_experts: int,
        latent_dropout: float = 0.0,
        embedding: nn.Embedding | None = None,
        **kwargs,
    ) -> None:
        super().__init__(vocab_size, **kwargs)
        self.softmaxes_per_row, self._embed_size = num_experts, embed_size
        with self.name_scope():
            self.prior = nn.Dense(num_experts, in_units=input_size, use_bias=False, flatten=False)
            self.latent = nn.Dense(num_experts * embed_size, in_units=input_size, activation="tanh", flatten=False)
            self.latent_dropout = Dropout(latent_dropout, axes=(0,))
            self.decoder = _decoder(vocab_size, embed_size, embedding)

    def hybrid_forward(self, F, hidden_RH):
        return self.scores(F, hidden_RH)

    def scores(self, F, hidden_RH):
        latents_SE = F.reshape(self.latent_dropout(self.latent(hidden_RH)), shape=(-1, self._embed_size))
        probs_SV = F.softmax(self.decoder(latents_SE), axis=-1)
        probs_RKV = F.reshape(probs_SV, shape=(-1, self.softmaxes_per_row, self.vocab_size))
        priors_R1K = F.reshape(F.softmax(self.prior(hidden_RH), axis=-1), shape=(-1, 1, self.softmaxes_per_row))
        probs_R1V = F.batch_dot(priors_R1K, probs_RKV)
        probs_RV = F.reshape_like(probs_R1V, hidden_RH, lhs_begin=0, lhs_end=2, rhs_begin=0, rhs_end=-1)
        return F.log(F.maximum(probs_RV, SMALLEST_FLOAT32))

    def features(self, hidden_TNH):
        """The experts' vectors, concatenated, and the logarithms of their priors: F = K E + K."""
        latents_TND = self.latent_dropout(self.latent(hidden_TNH))
        logits_TNK = self.prior(hidden_TNH)
        # Not log_softmax, which is off by up to 1e-6 here, even for a single expert.
        shifted_TNK = mx.nd.broadcast_sub(logits_TNK, logits_TNK.detach().max(axis=-1, keepdims=True))
        log_sums_TN1 = mx.nd.log(mx.nd.exp(shifted_TNK).sum(axis=-1, keepdims=True))
        return mx.nd.concat(latents_TND, mx.nd.broadcast_sub(shifted_TNK, log_sums_TN1), dim=-1)

    def losses(self, features_RF, targets_R):
        latents_SE, log_priors_RK = self._split(features_RF)
        workspace = self._workspace(len(latents_SE) * self.vocab_size, latents_SE.context)
        log_probs_S = _target_log_probs(self.decoder, latents_SE, self._of_experts(targets_R), workspace)
        log_joint_RK = log_priors_RK + log_probs_S.reshape(log_priors_RK.shape)
        return -_log_sum_exp(log_joint_RK)

    def backward(self, features_RF, targets_R, loss_scale=1.0):
        latents_SE, log_priors_RK = self._split(features_RF)
        workspace = self._workspace(len(latents_SE) * self.vocab_size, latents_SE.context)
        probs_SV = _Softmax(self.products, self.decoder, latents_SE, self._of_experts(targets_R), workspace)
        log_joint_RK = log_priors_RK + probs_SV.target_log_probs().reshape(log_priors_RK.shape)
        responsibilities_RK = mx.nd.softmax(log_joint_RK, axis=-1)
        weights_RK = responsibilities_RK * loss_scale
        grad_SE = probs_SV.backward(weights_RK.reshape((-1, 1)))
        grad_RF = mx.nd.concat(grad_SE.reshape((log_priors_RK.shape[0], -1)), -weights_RK, dim=-1)
        return -_log_sum_exp(log_joint_RK), grad_RF

    def _split(self, features_RF):
        width = self.softmaxes_per_row * self._embed_size
        latents_RD = features_RF.slice_axis(axis=1, begin=0, end=width)
        return latents_RD.reshape((-1, self._embed_size)), features_RF.slice_axis(axis=1, begin=width, end=None)

    def _of_experts(self, targets_R):
        return mx.nd.repeat(targets_R, self.softmaxes_per_row)


class SampledHead(SoftmaxHead):
    """A softmax that is trained on a sample of the vocabulary; evaluation and generation use the full softmax.

    Each window draws `num_sampled` distinct words from a log-uniform distribution over ids, which suits words in order
    of falling frequency (Zipf's law); see `SampledSoftmax`.

    Parameters
    ----------
    vocab_size, input_size, embedding
        As in `SoftmaxHead`.
    num_sampled : int
        At most V. With all V words, training equals that of `SoftmaxHead`.
    """

    def __init__(self, vocab_size: int, input_size: int, num_sampled: int, embedding=None, **kwargs) -> None:
        super().__init__(vocab_size, input_size, embedding, **kwargs)
        self._num_sampled = num_sampled
        self._probs_V = np.log1p(1 / np.arange(1.0, vocab_size + 1)) / np.log(vocab_size + 1)

    def for_window(self, rng):
        # If word w arrives at random with rate p(w), the order of first arrivals is that of first occurrences in
        # successive draws from p.
        arrivals_V = rng.standard_exponential(self.vocab_size) / self._probs_V
        if self._num_sampled == self.vocab_size:
            return SampledSoftmax(self, np.arange(self.vocab_size), np.ones(self.vocab_size))
        first = np.argpartition(arrivals_V, self._num_sampled)
        # Given the next one's arrival, each word has arrived before it with a probability of its own, independently.
        next_arrival = arrivals_V[first[self._num_sampled]]
        return SampledSoftmax(self, np.sort(first[: self._num_sampled]), -np.expm1(-next_arrival * self._probs_V))


class SampledSoftmax(TrainingHead):
    """The training loss of a `SampledHead` on one window: a softmax over each target and one sample shared by all.

    Importance sampling as in Jozefowicz et al. 2016, "Exploring the Limits of Language Modeling", section 3.1: the
    logarithm of each word's expected count in the sample is subtracted from its logit, including the target's, and a
    word of the sample that is a row's target does not count in that row a second time. The expected counts are exact:
    the sum over the sample of ``f(w) / expected(w)`` has the mean ``sum_w f(w)`` for every f (Cohen & Kaplan 2007,
    "Summarizing Data using Bottom-k Sketches", section 5).

    The loss is over some thousand words only, so it is well below the negative log-likelihood.

    Parameters
    ----------
    head : SampledHead
    ids_S : ndarray of int
        The sample, in ascending order.
    expected_V : ndarray
        For each word of the vocabulary, its probability of being in the sample.
    """

    def __init__(self, head: SampledHead, ids_S: np.ndarray, expected_V: np.ndarray) -> None:
        self._head, self.ids_S, self.expected_V = head, ids_S, expected_V
        self.products = head.products
        self.logits_width = len(ids_S) + 1  # a column for the target, and one for each word of the sample

    def gradient_rows(self, ids):
        return np.append(ids, self.ids_S)

    def backward(self, features_RF, targets_R, loss_scale=1.0):
        ids_R, device = targets_R.asnumpy(), features_RF.context  # they came from the host: this does not block
        num_rows, num_columns = len(ids_R), self.logits_width
        logits_RC = _view(self._head._workspace(num_rows * num_columns, device), num_rows, num_columns)
        ones_1F = mx.nd.ones((1, features_RF.shape[1]), ctx=device)
        features_RF.attach_grad()
        with mx.autograd.record():
            # The first column is overwritten by the targets, and its gradient is zero. All rows are looked up at once:
            # for two look-ups in one matrix, autograd would sum two gradients of the whole matrix.
            rows, biases = self._rows(np.concatenate([self.ids_S[:1], self.ids_S, ids_R]), device)
            weight_CF, weight_RF = rows[:num_columns], rows[num_columns:]
            bias_C, bias_R = biases[:num_columns], biases[num_columns:]
            logits_RC = mx.nd.FullyConnected(features_RF, weight_CF, bias_C, num_hidden=num_columns, out=logits_RC)
            products_R1 = mx.nd.FullyConnected(features_RF * weight_RF, ones_1F, no_bias=True, num_hidden=1)
            target_logits_R1 = products_R1 + bias_R.reshape((-1, 1))
        logits_RC[:, :1] = target_logits_R1.detach()
        columns_R = np.searchsorted(self.ids_S, ids_R)
        drawn = np.flatnonzero(self.ids_S[np.minimum(columns_R, len(self.ids_S) - 1)] == ids_R)
        if len(drawn):
            places_2P = mx.nd.array(np.stack([drawn, columns_R[drawn] + 1]), ctx=device, dtype="int32")
            set_elements(logits_RC, places_2P, mx.nd.full(len(drawn), _NEVER, ctx=device))
        probs_RC = mx.nd.softmax(logits_RC, axis=-1, out=logits_RC)
        target_probs_R1 = probs_RC[:, :1].copy()
        probs_RC[:, :1] = 0
        if loss_scale != 1:
            probs_RC *= loss_scale
        mx.autograd.backward([logits_RC, target_logits_R1], [probs_RC, loss_scale * (target_probs_R1 - 1)])
        target_probs_R = target_probs_R1.reshape((-1,))
        return -mx.nd.log(mx.nd.maximum(target_probs_R, SMALLEST_FLOAT32)), features_RF.grad

    def _rows(self, ids: np.ndarray, device: mx.Context) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """Rows of the matrix, and the biases with the correction; differentiable."""
        decoder = self._head.decoder
        weight_VF, bias_V = decoder.weight.data(device), decoder.bias.data(device)
        correction = mx.nd.array(np.log(self.expected_V[ids]), ctx=device, dtype="float32")
        places = mx.nd.array(ids, ctx=device, dtype="int32")
        rows = mx.nd.Embedding(places, weight_VF, input_dim=weight_VF.shape[0], output_dim=weight_VF.shape[1])
        # Not `take`: its gradient with respect to a vector is summed by a single thread of the GPU.
        biases = mx.nd.Embedding(places, bias_V.reshape((-1, 1)), input_dim=bias_V.shape[0], output_dim=1)
        return rows, biases.reshape((-1,)) - correction


class AdaptiveHead(Head):
    """Adaptive softmax (Grave et al. 2017, "Efficient softmax approximation for GPUs", section 4).

    A shortlist of the most frequent words and one entry for each group of rarer ones share a softmax over the whole
    hidden vector. Within group i, counted from 1, ``p(word) = p(group) softmax(W_i P_i h + b_i)[word]``, where P_i
    makes h ``4^i`` times narrower. Training and evaluation compute the shortlist for every row, and each group only for
    the rows whose target is in it; generation and export need all words, and so all groups.

    Parameters
    ----------
    vocab_size, input_size : int
        V and H.
    cutoffs : sequence of int
        Ascending, below V: the first id of each group. Ids are in order of falling frequency.
    """

    def __init__(self, vocab_size: int, input_size: int, cutoffs: Sequence[int], **kwargs) -> None:
        super().__init__(vocab_size, **kwargs)
        self._bounds = [*cutoffs, vocab_size]
        sizes = [stop - start for start, stop in zip(self._bounds, self._bounds[1:])]
        num_entries = self._bounds[0] + len(sizes)
        # There is room for a quarter of a chunk's rows in the widest group at a time; seldom are that many in it.
        self.logits_width = max(num_entries, -(-max(sizes, default=0) // _PARTS))
        with self.name_scope():
            self.shortlist = nn.Dense(num_entries, in_units=input_size, flatten=False)
            self.groups = nn.HybridSequential()
            for i, size in enumerate(sizes, 1):
                self.groups.add(_Group(size, input_size, input_size // TAIL_FACTOR**i))

    def hybrid_forward(self, F, hidden_RH):
        return self.scores(F, hidden_RH)

    def scores(self, F, hidden_RH):
        entries = F.log_softmax(self.shortlist(hidden_RH), axis=-1)
        parts = [F.slice_axis(entries, axis=-1, begin=0, end=self._bounds[0])]
        for i, group in enumerate(self.groups, self._bounds[0]):
            parts.append(F.broadcast_add(group(hidden_RH), F.slice_axis(entries, axis=-1, begin=i, end=i + 1)))
        return F.concat(*parts, dim=-1)

    def losses(self, features_RF, targets_R):
        entries_R, members = self._look_up(targets_R)
        workspace = self._workspace_of_chunk(features_RF)
        losses_R = -_target_log_probs(self.shortlist, features_RF, entries_R, workspace)
        for group, rows_P, targets_P in members:
            projected_PE = group.projection(mx.nd.take(features_RF, rows_P))
            for part in group.parts(len(rows_P), workspace.size):
                losses = -_target_log_probs(group.decoder, projected_PE[part], targets_P[part], workspace)
                _add_to_rows(losses_R, rows_P[part], losses)
        return losses_R

    def backward(self, features_RF, targets_R, loss_scale=1.0):
        entries_R, members = self._look_up(targets_R)
        workspace = self._workspace_of_chunk(features_RF)
        probs = _Softmax(self.products, self.shortlist, features_RF, entries_R, workspace)
        losses_R, grad_RF = -probs.target_log_probs(), probs.backward(loss_scale)
        for group, rows_P, targets_P in members:
            features_PF = mx.nd.take(features_RF, rows_P)
            features_PF.attach_grad()
            with mx.autograd.record():
                projected_PE = group.projection(features_PF)
            grad_PE = mx.nd.zeros_like(projected_PE)
            for part in group.parts(len(rows_P), workspace.size):
                inputs_PE = projected_PE.detach()[part]
                probs = _Softmax(self.products, group.decoder, inputs_PE, targets_P[part], workspace)
                _add_to_rows(losses_R, rows_P[part], -probs.target_log_probs())
                grad_PE[part] = probs.backward(loss_scale)
            projected_PE.backward(grad_PE)
            _add_to_rows(grad_RF, rows_P, features_PF.grad)
        return losses_R, grad_RF

    def _workspace_of_chunk(self, features_RF: mx.nd.NDArray) -> mx.nd.NDArray:
        """For the shortlist's logits of all rows, and for a group's of as many as fit, at least one."""
        return self._workspace(max(len(features_RF), _PARTS) * self.logits_width, features_RF.context)

    def _look_up(
        self, targets_R: mx.nd.NDArray
    ) -> tuple[mx.nd.NDArray, Iterator[tuple[_Group, mx.nd.NDArray, mx.nd.NDArray]]]:
        """Each target's entry in the shortlist; and, for each group with targets, their rows and positions in it."""
        ids_R, device = targets_R.asnumpy(), targets_R.context  # they came from the host: this does not block
        groups_R = np.searchsorted(self._bounds, ids_R, side="right")  # 0: the shortlist
        entries_R = np.where(groups_R == 0, ids_R, self._bounds[0] - 1 + groups_R)

        def on_device(numbers: np.ndarray) -> mx.nd.NDArray:
            return mx.nd.array(numbers, ctx=device, dtype="int32")

        rows = [np.flatnonzero(groups_R == i) for i in range(1, len(self._bounds))]
        return on_device(entries_R), (
            (group, on_device(rows_P), on_device(ids_R[rows_P] - start))
            for group, rows_P, start in zip(self.groups, rows, self._bounds)
            if len(rows_P)
        )


class _Group(gluon.HybridBlock):
    """The words of one group: ``hidden_..H -> log_probs_..G``."""

    def __init__(self, size: int, input_size: int, width: int, **kwargs) -> None:
        super().__init__(**kwargs)
        with self.name_scope():
            self.projection = nn.Dense(width, in_units=input_size, use_bias=False, flatten=False)
            self.decoder = nn.Dense(size, in_units=width, flatten=False)

    def hybrid_forward(self, F, hidden_RH):
        return F.log_softmax(self.decoder(self.projection(hidden_RH)), axis=-1)

    def parts(self, num_rows: int, num_elements: int) -> list[slice]:
        """Cut rows into parts whose logits have at most `num_elements` elements, as those of one row must have."""
        most = num_elements // self.decoder.weight.shape[0]
        return [slice(start, min(start + most, num_rows)) for start in range(0, num_rows, most)]


def _decoder(vocab_size: int, input_size: int, embedding: nn.Embedding | None) -> nn.Dense:
    params = None if embedding is None else embedding.params
    return nn.Dense(vocab_size, in_units=input_size, flatten=False, params=params)


class _Softmax:
    """Softmaxes of an affine map and their gradient, in the first elements of a workspace.

    The gradient of ``-log softmax(z)[y]`` is ``softmax(z) - onehot(y)``, and the affine map does not need its own
    output in the backward pass: so the array holds first the logits, then the probabilities, then the gradient.
    """

    def __init__(
        self,
        products: Products,
        layer: nn.Dense,
        inputs_SE: mx.nd.NDArray,
        targets_S: mx.nd.NDArray,
        workspace: mx.nd.NDArray,
    ) -> None:
        affine = products.affine(layer, inputs_SE, _view(workspace, len(inputs_SE), layer.weight.shape[0]))
        self._affine, self._targets_S = affine, targets_S
        self._probs_SV = mx.nd.softmax(affine.output_SV, axis=-1, out=affine.output_SV)
        self._target_probs_S = mx.nd.pick(self._probs_SV, targets_S)

    def target_log_probs(self) -> mx.nd.NDArray:
        """Log-probability of each target: shape (S,)."""
        return mx.nd.log(mx.nd.maximum(self._target_probs_S, SMALLEST_FLOAT32))

    def backward(self, weights: mx.nd.NDArray | float) -> mx.nd.NDArray:
        """Gradient of the weighted sum of losses with respect to the inputs; adds that of the decoder's parameters.

        The weights are a single number, or an array (S, 1).
        """
        grad_SV, targets_S = self._probs_SV, self._targets_S
        numbers_S = mx.nd.arange(targets_S.shape[0], ctx=targets_S.context, dtype="int32")
        set_elements(grad_SV, mx.nd.stack(numbers_S, targets_S), self._target_probs_S - 1)
        if not isinstance(weights, float):
            mx.nd.broadcast_mul(grad_SV, weights, out=grad_SV)
        elif weights != 1:
            grad_SV *= weights
        return self._affine.backward(grad_SV)


def _target_log_probs(layer, inputs_SE, targets_S, workspace):
    weight_VE, bias_V = (parameter.data(inputs_SE.context) for parameter in (layer.weight, layer.bias))
    logits_SV = _view(workspace, len(inputs_SE), weight_VE.shape[0])
    mx.nd.FullyConnected(inputs_SE, weight_VE, bias_V, num_hidden=weight_VE.shape[0], out=logits_SV)
    return mx.nd.pick(mx.nd.log_softmax(logits_SV, axis=-1, out=logits_SV), targets_S)


def _view(workspace, num_rows, width):
    """The first elements of a vector, as an array of shape (num_rows, width) in the same memory."""
    return workspace[: num_rows * width].reshape((num_rows, width))


def _add_to_rows(array, rows_P, values):
    """Add to rows of an array, all different."""
    set_rows(array, rows_P, mx.nd.take(array, rows_P) + values)


def _log_sum_exp(values_RK):
    largest_R1 = values_RK.max(axis=-1, keepdims=True)
    return mx.nd.log(mx.nd.exp(values_RK - largest_R1).sum(axis=-1)) + largest_R1.reshape((-1,))


# From the configuration, the number of words, and the embedding if the head shares its matrix.
HEADS: dict[str, Callable[[ModelConfig, int, nn.Embedding | None], Head]] = {
    "softmax": lambda config, vocab_size, tied: SoftmaxHead(vocab_size, config.layer_sizes[-1], tied),
    "mixture": lambda config, vocab_size, tied: MixtureHead(
        vocab_size, config.layer_sizes[-1], config.embed_size, config.num_experts or 1, config.latent_dropout, tied
    ),
    "sampled": lambda config, vocab_size, tied: SampledHead(
        vocab_size, config.layer_sizes[-1], config.num_sampled or vocab_size, tied
    ),
    "adaptive": lambda config, vocab_size, _: AdaptiveHead(vocab_size, config.layer_sizes[-1], config.cutoffs or ()),
}
