"""Output layers: from hidden vectors to the distribution of the next word.

A head works in two parts. `Head.features` maps the hidden vectors of a window to the little that the distribution
depends on; it is differentiable and has the head's dropout. What comes after is as wide as the vocabulary, and there
are three ways to it, which agree. As a HybridBlock a head gives log-probabilities, for generation and export.
`Head.losses` scores given targets, for evaluation. In training the head is the last node of the model, so
`Head.backward` takes the loss and its gradient together. The last two are called on one chunk of rows after another
(see `gluon_lm.losses`) and keep nothing that is as wide as the vocabulary for later.

Shapes: R rows (time x batch, flattened), H width of the last layer, F width of the features, E embedding width,
V vocabulary, K experts, S softmaxes (rows x experts).
"""

from __future__ import annotations

from abc import abstractmethod

import mxnet as mx
from mxnet import gluon
from mxnet.gluon import nn

from ..config import ModelConfig

SMALLEST_FLOAT32 = 1.1754944e-38  # below it a probability rounds to zero; the loss then reads 87.3, not infinite


class Head(gluon.HybridBlock):
    """Base class of output layers. Called as a block: ``hidden_..H -> log_probs_..V``.

    Attributes
    ----------
    vocab_size : int
    softmaxes_per_row : int
    """

    softmaxes_per_row: int = 1

    def __init__(self, vocab_size: int, **kwargs) -> None:
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self._room: dict[mx.Context, mx.nd.NDArray] = {}

    def room_for_logits(self, num_softmaxes: int, device: mx.Context) -> mx.nd.NDArray:
        """An array (S, V) on a device. All calls share its memory.

        It is asked of the system only once: an array of that size, freed and made anew in each step, never finds its
        old place.
        """
        room = self._room.get(device)
        if room is None or room.shape[0] < num_softmaxes:
            room = self._room[device] = mx.nd.empty((num_softmaxes, self.vocab_size), ctx=device)
        return room[:num_softmaxes]

    @abstractmethod
    def scores(self, F, hidden_RH):
        """Log-probabilities up to a constant for each row: ``hidden_..H -> scores_..V``, in a graph or outside."""

    def features(self, hidden_TNH: mx.nd.NDArray) -> mx.nd.NDArray:
        """What the distribution after each word depends on: ``features_TNF``, here the hidden vectors themselves."""
        return hidden_TNH

    @abstractmethod
    def losses(self, features_RF: mx.nd.NDArray, targets_R: mx.nd.NDArray, logits_SV: mx.nd.NDArray) -> mx.nd.NDArray:
        """Negative log-likelihood, in nats, of each of `targets_R` (int32): shape (R,). Nothing is recorded.

        `logits_SV` is room for the logits.
        """

    @abstractmethod
    def backward(
        self, features_RF: mx.nd.NDArray, targets_R: mx.nd.NDArray, logits_SV: mx.nd.NDArray
    ) -> tuple[mx.nd.NDArray, mx.nd.NDArray]:
        """The loss and its gradient, that by the parameters added to theirs.

        Parameters
        ----------
        features_RF : NDArray
            Detached.
        targets_R : NDArray of int32
        logits_SV : NDArray
            Room for the logits.

        Returns
        -------
        losses_R : NDArray
            Negative log-likelihood of each target, in nats; not finite where the features are not.
        grad_RF : NDArray
            Gradient of their sum by the features.
        """


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

    def losses(self, features_RF, targets_R, logits_SV):
        return -_target_log_probs(self.decoder, features_RF, targets_R, logits_SV)

    def backward(self, features_RF, targets_R, logits_SV):
        probs_RV = _Softmax(self.decoder, features_RF, targets_R, logits_SV)
        return -probs_RV.target_log_probs(), probs_RV.backward()


class MixtureHead(Head):
    """Mixture of softmaxes (Yang et al. 2018, "Breaking the Softmax Bottleneck: A High-Rank RNN Language Model").

    ``p(word) = sum_k prior_k softmax(W z_k + b)[word]`` with ``prior = softmax(P h)`` and the experts' vectors
    ``z_k = tanh(L_k h + l_k)``, all equations of their section 2.4.

    The loss needs the probabilities of the targets alone. With the responsibilities
    ``r_k = prior_k p_k(target) / p(target)`` its gradient by the logits of expert k is ``r_k (p_k - onehot(target))``
    and by the logarithm of its prior ``-r_k``: each softmax of a row is a row of its own in the plain head's way.

    Parameters
    ----------
    vocab_size, input_size, embed_size, num_experts : int
        V, H, E and K.
    latent_dropout : float
        Probability of dropping an element of z, the same one for all words of a window.
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
            self.latent_dropout = nn.Dropout(latent_dropout, axes=(0,))
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
        """The experts' vectors, one after the other, and the logarithms of their priors: F = K E + K."""
        latents_TND = self.latent_dropout(self.latent(hidden_TNH))
        logits_TNK = self.prior(hidden_TNH)
        # Not log_softmax, which is off by as much as 1e-6 here, and by that even for a single expert.
        shifted_TNK = mx.nd.broadcast_sub(logits_TNK, logits_TNK.detach().max(axis=-1, keepdims=True))
        log_sums_TN1 = mx.nd.log(mx.nd.exp(shifted_TNK).sum(axis=-1, keepdims=True))
        return mx.nd.concat(latents_TND, mx.nd.broadcast_sub(shifted_TNK, log_sums_TN1), dim=-1)

    def losses(self, features_RF, targets_R, logits_SV):
        latents_SE, log_priors_RK = self._split(features_RF)
        log_probs_S = _target_log_probs(self.decoder, latents_SE, self._of_experts(targets_R), logits_SV)
        log_joint_RK = log_priors_RK + log_probs_S.reshape(log_priors_RK.shape)
        return -_log_sum_exp(log_joint_RK)

    def backward(self, features_RF, targets_R, logits_SV):
        latents_SE, log_priors_RK = self._split(features_RF)
        probs_SV = _Softmax(self.decoder, latents_SE, self._of_experts(targets_R), logits_SV)
        log_joint_RK = log_priors_RK + probs_SV.target_log_probs().reshape(log_priors_RK.shape)
        responsibilities_RK = mx.nd.softmax(log_joint_RK, axis=-1)
        grad_SE = probs_SV.backward(responsibilities_RK.reshape((-1, 1)))
        grad_RF = mx.nd.concat(grad_SE.reshape((log_priors_RK.shape[0], -1)), -responsibilities_RK, dim=-1)
        return -_log_sum_exp(log_joint_RK), grad_RF

    def _split(self, features_RF):
        width = self.softmaxes_per_row * self._embed_size
        latents_RD = features_RF.slice_axis(axis=1, begin=0, end=width)
        return latents_RD.reshape((-1, self._embed_size)), features_RF.slice_axis(axis=1, begin=width, end=None)

    def _of_experts(self, targets_R):
        return mx.nd.repeat(targets_R, self.softmaxes_per_row)


def _decoder(vocab_size: int, input_size: int, embedding: nn.Embedding | None) -> nn.Dense:
    params = None if embedding is None else embedding.params
    return nn.Dense(vocab_size, in_units=input_size, flatten=False, params=params)


class _Softmax:
    """Softmaxes of an affine map on their way to the gradient, in the memory of one array of logits.

    The gradient of ``-log softmax(z)[y]`` is ``softmax(z) - onehot(y)``, and the affine map does not need its own
    output to go back: so the array holds first the logits, then the probabilities, then their gradient.
    """

    def __init__(
        self, decoder: nn.Dense, inputs_SE: mx.nd.NDArray, targets_S: mx.nd.NDArray, logits_SV: mx.nd.NDArray
    ) -> None:
        self._inputs_SE, self._targets_S = inputs_SE, targets_S
        inputs_SE.attach_grad()
        with mx.autograd.record():
            self._logits_SV = _logits(decoder, inputs_SE, logits_SV)
        self._probs_SV = mx.nd.softmax(self._logits_SV, axis=-1, out=self._logits_SV)
        self._target_probs_S = mx.nd.pick(self._probs_SV, targets_S)

    def target_log_probs(self) -> mx.nd.NDArray:
        """Log-probability of each target: shape (S,)."""
        return mx.nd.log(mx.nd.maximum(self._target_probs_S, SMALLEST_FLOAT32))

    def backward(self, weights_S1: mx.nd.NDArray | None = None) -> mx.nd.NDArray:
        """Gradient of the weighted sum of losses by the inputs; that by the decoder's parameters is added to theirs."""
        grad_SV, targets_S = self._probs_SV, self._targets_S
        numbers_S = mx.nd.arange(targets_S.shape[0], ctx=targets_S.context, dtype="int32")
        mx.nd._internal._scatter_set_nd(
            grad_SV, self._target_probs_S - 1, mx.nd.stack(numbers_S, targets_S), shape=grad_SV.shape, out=grad_SV
        )
        if weights_S1 is not None:
            mx.nd.broadcast_mul(grad_SV, weights_S1, out=grad_SV)
        self._logits_SV.backward(grad_SV)
        return self._inputs_SE.grad


def _logits(decoder, inputs_SE, logits_SV):
    """The decoder's output, in the memory of `logits_SV`."""
    device = inputs_SE.context
    weight_VE, bias_V = decoder.weight.data(device), decoder.bias.data(device)
    return mx.nd.FullyConnected(inputs_SE, weight_VE, bias_V, num_hidden=weight_VE.shape[0], out=logits_SV)


def _target_log_probs(decoder, inputs_SE, targets_S, logits_SV):
    logits_SV = _logits(decoder, inputs_SE, logits_SV)
    return mx.nd.pick(mx.nd.log_softmax(logits_SV, axis=-1, out=logits_SV), targets_S)


def _log_sum_exp(values_RK):
    largest_R1 = values_RK.max(axis=-1, keepdims=True)
    return mx.nd.log(mx.nd.exp(values_RK - largest_R1).sum(axis=-1)) + largest_R1.reshape((-1,))


def _softmax(config: ModelConfig, vocab_size: int, embedding: nn.Embedding) -> Head:
    return SoftmaxHead(vocab_size, config.layer_sizes[-1], embedding if config.tied else None)


def _mixture(config: ModelConfig, vocab_size: int, embedding: nn.Embedding) -> Head:
    return MixtureHead(
        vocab_size,
        config.layer_sizes[-1],
        config.embed_size,
        config.num_experts or 1,
        config.latent_dropout,
        embedding if config.tied else None,
    )


HEADS = {"softmax": _softmax, "mixture": _mixture}
