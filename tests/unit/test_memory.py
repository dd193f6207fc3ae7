"""What training is said to take, before any of it is taken."""

from __future__ import annotations

from types import SimpleNamespace

import mxnet as mx
import pytest

from gluon_lm.config import Config, ModelConfig, TrainingConfig
from gluon_lm.memory import free_in_groups
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
    need = session._need(config, model, SimpleNamespace(devices=[device], size=1))
    recurrent = config.model.num_layers * 4 * WIDTH * (WIDTH + WIDTH + 2)
    parameters = VOCAB_SIZE * WIDTH + recurrent + VOCAB_SIZE * (WIDTH + 1)
    assert need.parameters == 4 * (2 * parameters + kept * VOCAB_SIZE * WIDTH)


# ---------------------------------------------------------------- control groups

VERSIONS = {
    1: ("7:cpu:/\n4:memory:{}\n0::/other\n", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    2: ("0::{}\n", "", "memory.max", "memory.current", ""),
}


@pytest.fixture(params=VERSIONS)
def groups(request, tmp_path):
    """Makes groups, as ``{path: (limit, used, bytes of files)}``; gives what is free for a process of one of them."""
    membership, controller, limit_name, used_name, prefix = VERSIONS[request.param]
    no_limit = {1: 0x7FFFFFFFFFFFF000, 2: "max"}[request.param]

    def free(path, **sizes):
        for name, (limit, used, of_files) in sizes.items():
            folder = tmp_path / "groups" / controller / name.replace("_", "/").strip("/")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / limit_name).write_text(f"{no_limit if limit is None else limit}\n")
            (folder / used_name).write_text(f"{used}\n")
            own = f"inactive_file {of_files}\nactive_file 0\n" if prefix == "" else "inactive_file 7\nactive_file 7\n"
            below = f"{prefix}inactive_file {of_files - 1}\n{prefix}active_file 1\n" if prefix else ""
            (folder / "memory.stat").write_text(f"anon 5\n{own}{below}")
        (tmp_path / "membership").write_text(membership.format(path))
        return free_in_groups(tmp_path / "groups", tmp_path / "membership")

    return free


def test_the_tightest_group_around_a_process_decides(groups):
    sizes = {"_": (None, 900, 1), "_job": (1000, 700, 1), "_job_step": (500, 100, 1), "_other": (10, 9, 1)}
    assert groups("/job/step", **sizes) == 301
    assert groups("/job", **sizes) == 301
    assert groups("/job/step", _job_step=(120, 100, 1)) == 21


def test_pages_of_files_are_free_memory(groups):
    assert groups("/job", _job=(1000, 990, 600)) == 610
    assert groups("/job", _job=(1000, 1020, 5)) == 0  # it cannot have less than nothing


def test_a_container_sees_its_own_group_at_the_top(groups):
    assert groups("/docker/0123", _=(1000, 400, 1)) == 601


def test_without_groups_nothing_is_known(tmp_path):
    assert free_in_groups(tmp_path, tmp_path / "membership") is None
    (tmp_path / "membership").write_text("0::/job\n")
    assert free_in_groups(tmp_path, tmp_path / "membership") is None
