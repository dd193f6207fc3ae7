"""The mixture of softmaxes, beside the plain way to compute it."""

from __future__ import annotations

import argparse

from .harness import Case, Size, Table, benchmark, run_rounds, timed_steps, zipf_ids
from .ours import ours_step, train_ours

PLAIN_MIXTURE_STREAMS = 5  # that the mixture's authors work on at once, for the sake of memory


def train_plain_mixture(size: Size, warmup: int, steps: int) -> dict[str, float]:
    """The mixture as its authors' code has it: all experts of a part of the batch at once, in plain operators."""
    import mxnet as mx

    step = ours_step(size)
    from gluon_lm.data.windows import Streams

    model, trainer = step._model, step._trainer
    head, parameters = model.head, list(model.named_parameters().values())
    ids = zipf_ids((warmup + steps) * size.batch_size * size.bptt, size.vocab_size)
    streams = Streams(ids, size.batch_size, eos=0)
    starts = range(0, size.batch_size, PLAIN_MIXTURE_STREAMS)
    states = {start: model.begin_state(PLAIN_MIXTURE_STREAMS, mx.cpu()) for start in starts}

    def take(start: int, stop: int) -> None:
        for i in range(start, stop):
            window = streams.window(i * size.bptt, size.bptt)
            for parameter in parameters:
                parameter.zero_grad()
            for first in states:
                part = window.columns(first, first + PLAIN_MIXTURE_STREAMS)
                with mx.autograd.record():
                    raw, *new = model.encoder(mx.nd.array(part.tokens_TN, dtype="int32"), *states[first])
                    hidden = model.output_dropout(raw)
                    latents = head.latent_dropout(head.latent(hidden)).reshape((-1, size.model.embed_size))
                    probs = mx.nd.softmax(head.decoder(latents)).reshape((-1, size.model.num_experts, size.vocab_size))
                    priors = mx.nd.softmax(head.prior(hidden)).reshape((-1, size.model.num_experts, 1))
                    mixed = mx.nd.log(mx.nd.broadcast_mul(probs, priors).sum(axis=1) + 1e-8)
                    loss = -mx.nd.pick(mixed, mx.nd.array(part.targets_TN.reshape(-1))).sum()
                loss.backward()
                states[first] = [state.detach() for state in new]
            loss.asscalar()
            trainer.update(window.num_targets)

    return timed_steps(size, warmup, steps, take)


@benchmark("mixture", "D")
def run_mixture(options: argparse.Namespace) -> list[Table]:
    """Training speed of a mixture of softmaxes, beside that of the same computed in plain operators."""
    cases = [Case("gluon_lm", train_ours), Case("all experts at once, in plain operators", train_plain_mixture)]
    return [run_rounds("Training a mixture", cases, options, name) for name in options.sizes]
