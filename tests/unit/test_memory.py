"""What training is said to take, before any of it is taken."""

from __future__ import annotations

import mxnet as mx
import pytest

from gluon_lm.config import Config, ModelConfig, TrainingConfig
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.errors import OutOfMemory
from gluon_lm.memory import Need, check_need
from gluon_lm.models import LanguageModel
from gluon_lm.training import session

VOCAB_SIZE, WIDTH = 1000, 8


@pytest.mark.parametrize(
    ("device", "amp", "model", "kept"),
    [
        (mx.cpu(0), "none", {}, 1),  # a second gradient
        (mx.cpu(0), "bfloat16", {}, 1),  # a cast and its gradient
        (mx.gpu(0), "none", {}, 0),
        (mx.gpu(0), "float16", {}, 1),
        (mx.gpu(0), "float16", {"num_sampled": 20}, 0),
    ],
    ids=["cpu", "bfloat16", "gpu", "float16", "float16-sampled"],
)
def test_what_is_kept_beside_the_output_layer_counts(device, amp, model, kept):
    config = Config(model=ModelConfig(embed_size=WIDTH, hidden_size=WIDTH, **model), training=TrainingConfig(amp=amp))
    model = LanguageModel(config.model, VOCAB_SIZE)
    need = session._need(config, model, SingleDevice([device]))
    recurrent = config.model.num_layers * 4 * WIDTH * (WIDTH + WIDTH + 2)
    parameters = VOCAB_SIZE * WIDTH + recurrent + VOCAB_SIZE * (WIDTH + 1)
    assert need.parameters == 4 * (2 * parameters + kept * VOCAB_SIZE * WIDTH)


@pytest.mark.parametrize("window", [0, 2 * 10**9], ids=["parameters", "window"])
def test_what_a_run_must_keep_is_advised_for_a_new_one(window):
    with pytest.raises(OutOfMemory) as caught:
        check_need(Need(parameters=10**9, logits=0, window=window), 10**6)
    _, *advice = str(caught.value).split("; ")
    assert len(advice) == 2 and all(part.endswith(" in a new run") for part in advice)
    first = "lower --max-vocab" if window == 0 else "use --small-batch-size, or lower --batch-size"
    assert advice[0].startswith(first)
