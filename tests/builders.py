"""Small models, texts for them, and what tests do with them."""

from __future__ import annotations

import mxnet as mx
import numpy as np

from gluon_lm.config import Config, DataConfig, ModelConfig, OptimConfig
from gluon_lm.data import Vocabulary
from gluon_lm.data.windows import Window
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.distributed.kvstore import KVStoreCommunicator
from gluon_lm.losses import backward_through_model
from gluon_lm.models import LanguageModel
from gluon_lm.training.checkpoint import Checkpoint, TrainingState, save_checkpoint
from gluon_lm.training.run_folder import RunFolder
from gluon_lm.training.step import TrainingStep

VOCAB_SIZE = 13
VOCABULARY = Vocabulary(("<unk>", "<eos>", *(f"w{i}" for i in range(VOCAB_SIZE - 2))))


def build_model(devices=None, vocab_size=VOCAB_SIZE, seed=1, hybridize=True, wide=True, **config) -> LanguageModel:
    """An initialised model without dropout; `wide` draws large parameters, so that no unit is near linear."""
    settings = {"model": "lstm", "embed_size": 6, "hidden_size": 5, "num_layers": 2, "dropout": 0.0, **config}
    devices = devices or [mx.cpu(0)]
    model = LanguageModel(ModelConfig(**settings), vocab_size)
    model.initialize_parameters(seed, devices)
    if wide:
        rng = np.random.RandomState(seed)
        for parameter in model.named_parameters().values():
            parameter.set_data(mx.nd.array(rng.uniform(-0.7, 0.7, parameter.shape)))
    if hybridize:
        model.hybridize_for_use()
    return model


def save_run(path, averaged=False, evaluated=True, loss=2.5, **model):
    """A run folder with one checkpoint, of a model with large random weights."""
    architecture = {"embed_size": 4, "hidden_size": 5, "num_layers": 3, **model}
    config = Config(data=DataConfig(tokenizer="words"), model=ModelConfig(**{"dropout": 0.2, **architecture}))
    parameters = {name: p.data() for name, p in build_model(**architecture).named_parameters().items()}
    checkpoint = Checkpoint(
        parameters=parameters,
        unaveraged={name: array + 1 for name, array in parameters.items()} if averaged else {},
        optimizer={},
        carried=[],
        training=TrainingState(step=70, epoch=3, best_loss=loss, best_step=70 if evaluated else 60),
        text={"name": "tales", "licence": "CC-BY-4.0"},
    )
    run = RunFolder(path)
    with run.created(config.to_yaml(), VOCABULARY):
        save_checkpoint(run, checkpoint, config.to_yaml(), VOCABULARY, keep=1, is_best=evaluated)
    return path


def random_ids(num_tokens, seed=8, vocab_size=VOCAB_SIZE) -> np.ndarray:
    """A text of words drawn evenly."""
    return np.random.RandomState(seed).randint(0, vocab_size, num_tokens).astype(np.int32)


def communicator_on(num_devices, kvstore="device", threshold=None):
    devices = [mx.cpu(i) for i in range(num_devices)]
    return SingleDevice(devices) if num_devices == 1 else KVStoreCommunicator(devices, kvstore, threshold)


def build_step(
    communicator,
    clip_norm=None,
    optimizer="sgd",
    lr=0.5,
    weight_decay=0.0,
    alpha=0.0,
    beta=0.0,
    small_batch_size=None,
    loss_scale=None,
    **config,
) -> tuple[LanguageModel, TrainingStep]:
    """A model, as `build_model` makes it, and its training step."""
    model = build_model(communicator.devices, **config)
    optim = OptimConfig(
        optimizer=optimizer,
        lr=lr,
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        alpha=alpha,
        beta=beta,
        small_batch_size=small_batch_size,
    )
    return model, TrainingStep(model, communicator, optim, loss_scale)


def take_steps(step, windows, numbers, seed=3) -> list:
    """Take the steps of these numbers, over as many epochs as that takes, as the trainer does; what each returned."""
    windows, results = list(windows), []
    for k in numbers:
        if k % len(windows) == 0:
            step.states = None
        results.append(step(windows[k % len(windows)], seed, k))
    return results


def values_of(model, device=None) -> dict[str, np.ndarray]:
    """Parameters by name, in float64."""
    return {
        name: p.data(device or p.list_ctx()[0]).asnumpy().astype(np.float64)
        for name, p in model.named_parameters().items()
    }


def gradients_of(model) -> dict[str, np.ndarray]:
    return {name: p.list_grad()[0].asnumpy() for name, p in model.named_parameters().items()}


def relative_error(actual, expected) -> float:
    """Norm of the difference over the norm of what is expected."""
    difference, size = np.linalg.norm(np.asarray(actual) - expected), np.linalg.norm(expected)
    return difference / size if size else difference


def int32(array, device=None):
    return mx.nd.array(array, dtype="int32", ctx=device or mx.cpu(0))


def forward_backward(model, tokens_TN, targets_TN, states):
    """Summed loss and new states; the parameters' gradients are those of this window alone."""
    for parameter in model.named_parameters().values():
        parameter.zero_grad()
    loss, new_states = backward_through_model(
        model, Window(tokens_TN, targets_TN, targets_TN.size), states, states[0].context
    )
    return float(loss.asscalar()), new_states


def drawn_masks(model, tokens_TN, seed) -> list[np.ndarray]:
    """What dropout multiplies with under that seed, for `reference.encode`: each layer's input, and the output.

    The model must not be hybridized: the blocks of a graph are not called one by one. An element that is zero already
    counts as dropped.
    """
    found, blocks = [], [model.encoder.embedding, *model.encoder.dropouts, model.output_dropout]

    def note(block, inputs, output):
        before = inputs[0].asnumpy() if block is not blocks[0] else block.weight.data().asnumpy()[tokens_TN]
        after = output.asnumpy().astype(np.float64)
        found.append(np.divide(after, before, out=np.zeros_like(after), where=before != 0))

    hooks = [block.register_forward_hook(note) for block in blocks]
    mx.random.seed(seed)
    with mx.autograd.record():
        raw_TNH, *_ = model.encoder(int32(tokens_TN), *model.begin_state(tokens_TN.shape[1], mx.cpu(0)))
        model.output_dropout(raw_TNH)
    for hook in hooks:
        hook.detach()
    by_embedding, by_input, *others = found
    return [by_embedding * by_input, *others]


def assert_drops(mask, rate) -> None:
    """Of independent elements, a share `rate` is zero, within five standard deviations; the rest is 1 / (1 - rate)."""
    kept = mask != 0
    np.testing.assert_allclose(mask[kept], 1 / (1 - rate), rtol=1e-5)
    assert abs(1 - kept.mean() - rate) < 5 * (rate * (1 - rate) / mask.size) ** 0.5
