"""Output layers: from hidden vectors to the distribution of the next word.

A head does three things, by ways that agree. As a HybridBlock it maps hidden vectors to log-probabilities, for
generation and export. `Head.losses` scores given targets, for evaluation. In training it is the last node of the model,
so `Head.backward` takes the loss and its gradient together. The last two are called on one chunk of rows after another
(see `gluon_lm.losses`) and keep nothing of size rows x vocabulary for later.

Shapes: R rows (time x batch, flattened), H width of the last layer, E embedding width, V vocabulary.
"""

from __future__ import annotations

from abc import abstractmethod

import mxnet as mx
from mxnet import gluon
from mxnet.gluon import nn

_SMALLEST_FLOAT32 = 1.1754944e-38  # below it a probability rounds to zero; the loss then reads 87.3, not infinite


class Head(gluon.HybridBlock):
    """Base class of output layers. Called as a block: ``hidden_..H -> log_probs_..V``."""

    @abstractmethod
    def losses(self, hidden_RH: mx.nd.NDArray, targets_R: mx.nd.NDArray) -> mx.nd.NDArray:
        """Negative log-likelihood, in nats, of each of `targets_R` (int32): shape (R,). Nothing is recorded."""

    @abstractmethod
    def backward(self, hidden_RH: mx.nd.NDArray, targets_R: mx.nd.NDArray) -> mx.nd.NDArray:
        """Add the gradient of the summed loss to the parameters' and write that of `hidden_RH`.

        Parameters
        ----------
        hidden_RH : NDArray, shape (R, H)
            A variable of autograd (marked, with a gradient array).
        targets_R : NDArray of int32, shape (R,)

        Returns
        -------
        NDArray, shape (R,)
            Negative log-likelihood of each target, in nats; not finite where `hidden_RH` is not.
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
        super().__init__(**kwargs)
        with self.name_scope():
            self.decoder = nn.Dense(
                vocab_size,
                in_units=input_size,
                flatten=False,
                params=None if embedding is None else embedding.params,
            )

    def hybrid_forward(self, F, hidden_RH):
        return F.log_softmax(self.decoder(hidden_RH), axis=-1)

    def losses(self, hidden_RH, targets_R):
        logits_RV = self.decoder(hidden_RH)
        return -mx.nd.pick(mx.nd.log_softmax(logits_RV, axis=-1, out=logits_RV), targets_R)

    def backward(self, hidden_RH, targets_R):
        with mx.autograd.record():
            logits_RV = self.decoder(hidden_RH)
        # The gradient of -log softmax(z)[y] is softmax(z) - onehot(y). The affine map does not need its own output
        # to go back, so the logits' memory takes first the probabilities and then the gradient.
        grad_RV = mx.nd.softmax(logits_RV, axis=-1, out=logits_RV)
        target_probs_R = mx.nd.pick(grad_RV, targets_R)
        rows_R = mx.nd.arange(targets_R.shape[0], ctx=targets_R.context, dtype="int32")
        mx.nd._internal._scatter_set_nd(
            grad_RV, target_probs_R - 1, mx.nd.stack(rows_R, targets_R), shape=grad_RV.shape, out=grad_RV
        )
        logits_RV.backward(grad_RV)
        return -mx.nd.log(mx.nd.maximum(target_probs_R, _SMALLEST_FLOAT32))


def _softmax(vocab_size, input_size, embedding):
    return SoftmaxHead(vocab_size, input_size)


def _tied_softmax(vocab_size, input_size, embedding):
    return SoftmaxHead(vocab_size, input_size, embedding)


HEADS = {"softmax": _softmax, "tied_softmax": _tied_softmax}
