"""What a process is told before MXNet is loaded."""

from __future__ import annotations

import os
import subprocess
import sys

import mxnet as mx
import pytest

from gluon_lm import runtime
from gluon_lm.config import Config, DeviceConfig, Setting, TrainingConfig, recipe_names, resolve
from gluon_lm.distributed.devices import memory_in_use
from gluon_lm.errors import ConfigError


@pytest.fixture
def environment(monkeypatch):
    """The variables that are set, and the allocator's limit; nothing of this process changes."""
    limits = []
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.delitem(sys.modules, "mxnet", raising=False)
    monkeypatch.setattr(runtime, "keep_freed_memory", limits.append)
    return os.environ, limits


def test_only_models_whose_recurrent_layers_take_gigabytes_are_trained_lean(environment):
    _, limits = environment
    lean = set()
    for recipe in recipe_names():
        os.environ.clear()
        config = resolve(recipe=recipe).config
        runtime.prepare_training(config)
        if "MXNET_USE_MKLDNN_RNN" in os.environ:
            lean.add(recipe)
        gives_back = recipe in lean or config.optim.max_seq_len_delta is not None
        assert limits.pop() == (4 << 20 if gives_back else None)
    assert {"awd", "awd-wikitext-2"} <= lean and lean.isdisjoint({"lm", "mxnet", "demo", "lm-regularised"})


def test_recurrent_layers_stay_what_they_are_once_mxnet_is_loaded(environment, monkeypatch):
    """Their forward pass may have run, and their backward pass not yet."""
    variables, _ = environment
    monkeypatch.setitem(sys.modules, "mxnet", mx)
    runtime.prepare_process(own_layers=True)
    assert "MXNET_USE_MKLDNN_RNN" not in variables


def test_what_the_user_has_set_stays(environment):
    variables, limits = environment
    runtime.prepare_process(own_layers=True)
    assert (variables.pop("MXNET_CPU_TEMP_COPY"), variables.pop("MXNET_GPU_PARALLEL_RAND_COPY")) == ("1", "1")
    assert (variables.pop("MXNET_USE_FUSION"), variables.pop("MXNET_CUDNN_LIB_CHECKING")) == ("0", "0")
    chosen = {
        "MXNET_USE_MKLDNN_RNN": "1",
        "OMP_NUM_THREADS": "7",
        "MXNET_CPU_TEMP_COPY": "2",
        "MXNET_GPU_PARALLEL_RAND_COPY": "3",
        "MXNET_USE_FUSION": "1",
        "MXNET_CUDNN_LIB_CHECKING": "1",
    }
    variables.update(chosen)
    runtime.prepare_process(own_layers=True)
    assert {name: variables[name] for name in chosen} == chosen
    assert limits == [None, None]


@pytest.mark.parametrize(
    ("started_by", "processes"),
    [
        ({}, 1),
        ({"HOROVOD_LOCAL_SIZE": "2", "SLURM_NTASKS_PER_NODE": "8"}, 2),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, 4),
        ({"MPI_LOCALNRANKS": "3"}, 3),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "1"}, 4),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"}, 1),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "3", "SLURM_NODEID": "2"}, 3),
        ({"SLURM_NTASKS_PER_NODE": "none"}, 1),
    ],
)
def test_processes_of_horovod_share_the_cores(environment, monkeypatch, started_by, processes):
    variables, _ = environment
    monkeypatch.setattr(runtime, "usable_cores", lambda: 24)
    variables.update(started_by)
    runtime.prepare_training(Config(devices=DeviceConfig(horovod=True)))
    assert int(variables["OMP_NUM_THREADS"]) == 24 // processes
    assert ("OMP_WAIT_POLICY" in variables) == (processes == 1)


@pytest.mark.parametrize("threads", ["1,1", "abc", "0", "-1"])
def test_a_number_of_threads_that_would_end_mxnet_is_refused(environment, threads):
    variables, _ = environment
    variables["OMP_NUM_THREADS"] = threads
    with pytest.raises(ConfigError, match=f"^OMP_NUM_THREADS={threads}: MXNet needs"):
        runtime.prepare_process()


def test_workers_of_the_launcher_share_the_cores_with_their_contexts(environment, monkeypatch):
    variables, _ = environment
    monkeypatch.setattr(runtime, "usable_cores", lambda: 24)
    variables["GLUON_LM_LOCAL_WORKERS"] = "3"
    runtime.prepare_training(Config(devices=DeviceConfig(kvstore="dist_sync", cpus=2)))
    assert int(variables["OMP_NUM_THREADS"]) == 4


def test_gpus_are_told_of_tf32_and_of_windows_that_vary_before_their_libraries_are_loaded(environment):
    variables, _ = environment
    runtime.prepare_training(resolve(recipe="lm").config)
    assert not {"NVIDIA_TF32_OVERRIDE", "MXNET_GPU_MEM_POOL_TYPE"} & set(variables)
    runtime.prepare_training(resolve({"tf32": Setting(False, "test")}, recipe="awd").config)
    assert (variables["NVIDIA_TF32_OVERRIDE"], variables["MXNET_GPU_MEM_POOL_TYPE"]) == ("0", "Round")


def test_the_matrix_unit_is_used_for_bfloat16_alone_and_where_it_may_be(environment, monkeypatch):
    variables, _ = environment
    in_bfloat16, allowed, asked = Config(training=TrainingConfig(amp="bfloat16")), [True], []
    monkeypatch.setattr(runtime, "may_multiply_tiles", lambda: asked.append(1) or allowed[0])
    runtime.prepare_training(Config())
    assert "DNNL_MAX_CPU_ISA" not in variables and not asked
    runtime.prepare_training(in_bfloat16)
    assert variables["DNNL_MAX_CPU_ISA"] == "AVX512_CORE_AMX"
    variables["DNNL_MAX_CPU_ISA"] = "AVX512_CORE"  # a user's choice
    runtime.prepare_training(in_bfloat16)
    assert variables.pop("DNNL_MAX_CPU_ISA") == "AVX512_CORE"
    allowed[0] = False
    runtime.prepare_training(in_bfloat16)
    allowed[0] = True
    monkeypatch.setitem(sys.modules, "mxnet", mx)  # which may have multiplied without it
    asked.clear()
    runtime.prepare_training(in_bfloat16)
    assert "DNNL_MAX_CPU_ISA" not in variables
    assert asked  # for MXNet may have been told by the process that started this one


def test_the_matrix_unit_may_be_used_where_the_kernel_says_so():
    code = """
import ctypes
from gluon_lm.processors import may_multiply_tiles
may, permitted = may_multiply_tiles(), ctypes.c_uint64()
ctypes.CDLL(None).syscall(158, 0x1022, ctypes.byref(permitted))  # ARCH_GET_XCOMP_PERM
raise SystemExit(may != bool(permitted.value >> 18 & 1))
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


@pytest.mark.parametrize("limit", ["None", "4 << 20"])
def test_the_c_library_takes_the_setting(limit):
    code = f"from gluon_lm.runtime import keep_freed_memory; raise SystemExit(not keep_freed_memory({limit}))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_peak_of_memory_is_what_was_held_at_most():
    code = """
from gluon_lm.memory import peak_memory
before, size = peak_memory(), 200 << 20
held = bytearray(size)
held[:: 1 << 12] = b"x" * len(held[:: 1 << 12])  # a page is only taken when it is written to
del held
assert size < peak_memory() < before + size + (8 << 20), (before, peak_memory())
"""
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_memory_of_gpus_is_that_of_the_fullest(monkeypatch):
    free = {0: 6 << 30, 3: 2 << 30}
    monkeypatch.setattr(mx.context, "gpu_memory_info", lambda number: (free[number], 8 << 30))
    assert memory_in_use([mx.gpu(0), mx.gpu(3)]) == 6 << 30
    assert memory_in_use([mx.cpu(0)]) is None
