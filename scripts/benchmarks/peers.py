"""The peers, made of installed packages: gluonnlp's models and PyTorch's layers, in the loops of their examples."""

from __future__ import annotations

import time

from .harness import SEED, Case, Measurement, Size, timed_steps, zipf_ids
from .ours import EVALUATION_STREAMS

# The allocator part of `gluon_lm.runtime.prepare_process`, in the form that any program on glibc takes.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "67108864",
}


def gluonnlp_cases(as_published: Measurement, set_alike: Measurement) -> list[Case]:
    """gluonnlp as published, with our allocator setting, and with all that our commands set."""
    return [
        Case("gluonnlp, as published", as_published, package="gluonnlp"),
        Case("gluonnlp, our allocator setting", as_published, ALLOCATOR, package="gluonnlp"),
        Case("gluonnlp, our allocator and thread settings", set_alike, package="gluonnlp"),
    ]


def torch_cases(as_published: Measurement) -> list[Case]:
    """PyTorch as published and with our allocator setting; it uses every core by itself."""
    return [
        Case("PyTorch, as published", as_published, package="torch"),
        Case("PyTorch, our allocator setting", as_published, ALLOCATOR, package="torch"),
    ]


# ---------------------------------------------------------------- gluonnlp: the loop of its word_language_model.py


def gluonnlp_model(size: Size, train: bool):
    """The model, initialised and compiled as gluonnlp's script does it."""
    import gluonnlp as nlp
    import mxnet as mx

    mx.random.seed(SEED)
    models, config = nlp.model.train if train else nlp.model, size.model
    shape = (config.cell, size.vocab_size, config.embed_size, config.hidden_size, config.num_layers)
    if config.weight_drop:
        inner = (config.weight_drop, config.dropout_hidden, config.dropout_input, config.dropout_embed)
        model = models.AWDRNN(*shape, config.tied, config.dropout, *inner)
    else:
        model = models.StandardRNN(*shape, config.dropout, config.tied)
    model.initialize(mx.init.Xavier(), ctx=mx.cpu())
    if train:
        model.hybridize(static_alloc=True)
    return model


def gluonnlp_batches(size: Size, batch_size: int, windows: int):
    """Word ids as gluonnlp's batchify gives them: an NDArray of shape (rows, batch_size)."""
    import mxnet as mx

    rows = windows * size.bptt + 1
    return mx.nd.array(zipf_ids(rows * batch_size, size.vocab_size).reshape(batch_size, rows).T)


def detached(states):
    """gluonnlp's recurrent state, arrays in lists in lists, cut from what it was computed from."""
    return [detached(state) for state in states] if isinstance(states, (list, tuple)) else states.detach()


def train_gluonnlp(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import gluonnlp as nlp
    import mxnet as mx
    from mxnet import autograd, gluon

    model, optim = gluonnlp_model(size, train=True), size.optim
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    activation = nlp.loss.ActivationRegularizationLoss(optim.alpha)
    change = nlp.loss.TemporalActivationRegularizationLoss(optim.beta)
    settings = {"learning_rate": optim.lr, "momentum": 0, "wd": optim.weight_decay}
    trainer = gluon.Trainer(model.collect_params(), "sgd", settings)
    parameters = model.collect_params().values()
    ids = gluonnlp_batches(size, size.batch_size, warmup + steps)
    hidden = model.begin_state(batch_size=size.batch_size, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            tokens, targets = ids[i : i + size.bptt], ids[i + 1 : i + 1 + size.bptt]
            hidden = detached(hidden)
            with autograd.record():
                output, hidden, raw, dropped = model(tokens, hidden)
                losses = loss(output.reshape(-3, -1), targets.reshape(-1))
                if optim.alpha:
                    losses = losses + activation(*dropped)
                if optim.beta:
                    losses = losses + change(*raw)
                mean_loss = losses / tokens.size
            mean_loss.backward()
            gluon.utils.clip_global_norm([parameter.grad(mx.cpu()) for parameter in parameters], optim.clip_norm)
            trainer.step(1)
            mx.nd.sum(mean_loss).asscalar()

    return timed_steps(size, warmup, steps, take)


def evaluate_gluonnlp(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import mxnet as mx
    from mxnet import gluon

    model = gluonnlp_model(size, train=False)
    loss = gluon.loss.SoftmaxCrossEntropyLoss()
    ids = gluonnlp_batches(size, EVALUATION_STREAMS, warmup + steps)
    hidden = model.begin_state(batch_size=EVALUATION_STREAMS, func=mx.nd.zeros, ctx=mx.cpu())

    def take(start: int, stop: int) -> None:
        nonlocal hidden
        for i in range(start * size.bptt, stop * size.bptt, size.bptt):
            output, hidden = model(ids[i : i + size.bptt], hidden)
            hidden = detached(hidden)
            losses = loss(output.reshape(-3, -1), ids[i + 1 : i + 1 + size.bptt].reshape(-1))
            mx.nd.sum(losses).asscalar()

    take(0, warmup)
    started = time.perf_counter()
    take(warmup, warmup + steps)
    return {"tokens_per_second": steps * EVALUATION_STREAMS * size.bptt / (time.perf_counter() - started)}


def train_gluonnlp_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return train_gluonnlp(size, warmup, steps)


def evaluate_gluonnlp_set_alike(size: Size, warmup: int, steps: int) -> dict[str, float]:
    from gluon_lm.runtime import prepare_process

    prepare_process()
    return evaluate_gluonnlp(size, warmup, steps)


# ---------------------------------------------------------------- PyTorch: the loop of its word_language_model example


class TorchModel:
    """Embedding, recurrent layers and output layer, as the example puts them together."""

    def __init__(self, size: Size) -> None:
        import torch
        from torch import nn

        torch.manual_seed(SEED)
        config = size.model
        layer = {"lstm": nn.LSTM, "gru": nn.GRU}[config.cell]
        embedding = nn.Embedding(size.vocab_size, config.embed_size)
        output = nn.Linear(config.hidden_size, size.vocab_size)
        for matrix in (embedding.weight, output.weight):
            nn.init.uniform_(matrix, -0.1, 0.1)
        if config.tied:
            output.weight = embedding.weight
        recurrent = layer(config.embed_size, config.hidden_size, config.num_layers, dropout=config.dropout)
        dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleDict(
            {"embedding": embedding, "dropout": dropout, "recurrent": recurrent, "output": output}
        )

    def loss(self, tokens_TN, targets_TN, states):
        """Mean loss of a window, and the states after it."""
        from torch.nn import functional

        layers = self.layers
        hidden_TNH, states = layers["recurrent"](layers["dropout"](layers["embedding"](tokens_TN)), states)
        logits_RV = layers["output"](layers["dropout"](hidden_TNH)).flatten(0, 1)
        return functional.nll_loss(functional.log_softmax(logits_RV, dim=1), targets_TN.flatten()), states


def torch_windows(size: Size, batch_size: int, windows: int):
    import torch

    rows = windows * size.bptt + 1
    ids = torch.tensor(zipf_ids(rows * batch_size, size.vocab_size).reshape(batch_size, rows).T.copy()).long()
    starts = range(0, windows * size.bptt, size.bptt)
    return [(ids[i : i + size.bptt], ids[i + 1 : i + 1 + size.bptt]) for i in starts]


def train_torch(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import torch

    model, optim = TorchModel(size), size.optim
    parameters = list(model.layers.parameters())
    windows = torch_windows(size, size.batch_size, warmup + steps)
    states, started = None, 0.0
    model.layers.train()
    for i, (tokens_TN, targets_TN) in enumerate(windows):
        if i == warmup:
            started = time.perf_counter()
        model.layers.zero_grad()
        loss, states = model.loss(tokens_TN, targets_TN, states)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, optim.clip_norm)
        with torch.no_grad():
            for parameter in parameters:
                parameter.add_(parameter.grad, alpha=-optim.lr)
        states = tuple(state.detach() for state in states)
        loss.item()
    return {"tokens_per_second": steps * size.batch_size * size.bptt / (time.perf_counter() - started)}


def evaluate_torch(size: Size, warmup: int, steps: int) -> dict[str, float]:
    import torch

    model = TorchModel(size)
    windows = torch_windows(size, EVALUATION_STREAMS, warmup + steps)
    states, started = None, 0.0
    model.layers.eval()
    with torch.no_grad():
        for i, (tokens_TN, targets_TN) in enumerate(windows):
            if i == warmup:
                started = time.perf_counter()
            loss, states = model.loss(tokens_TN, targets_TN, states)
            loss.item()
    return {"tokens_per_second": steps * EVALUATION_STREAMS * size.bptt / (time.perf_counter() - started)}
