"""What several workers check of each other."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import mxnet as mx
import numpy as np
import pytest

from gluon_lm import logs, memory
from gluon_lm.config import Config, DeviceConfig, OptimConfig, TrainingConfig
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.distributed.control import CONTROL_VARIABLE, LOCAL_WORKER_VARIABLE, Control
from gluon_lm.distributed.devices import free_memory
from gluon_lm.errors import DistributedError
from gluon_lm.training import session
from gluon_lm.training.agreement import check_alike, worker_facts
from gluon_lm.training.command import TrainCommand
from gluon_lm.training.signals import StopRequest
from gluon_lm.training.step import step_seed
from gluon_lm.training.trainer import Trainer


class TwoWorkers(SingleDevice):
    """Worker 0 of two, whose other one answers as `change` says."""

    size = 2

    def __init__(self, change):
        super().__init__([mx.cpu()])
        self._change = change

    def allgather_object(self, value):
        return [value, self._change(value)]


DIGEST = "0123456789abcdef"


def test_workers_that_are_alike_start():
    communicator = TwoWorkers(dict)
    check_alike(worker_facts(Config(), DIGEST, communicator), communicator)


@pytest.mark.parametrize(
    "what",
    ["gluon_lm", "mxnet", "configuration", "text and vocabulary", "number of devices", "how gradients travel"],
)
def test_workers_that_differ_do_not(what):
    communicator = TwoWorkers(lambda facts: {**facts, what: "another"})
    with pytest.raises(DistributedError) as caught:
        check_alike(worker_facts(Config(), DIGEST, communicator), communicator)
    message = str(caught.value)
    assert f"the workers differ in {what}: worker 0 has " in message and "worker 1 another" in message
    assert "\n" not in message


def test_another_setting_another_text_another_way_of_the_gradients_and_another_kind_of_device_are_other_facts():
    own = worker_facts(Config(), DIGEST, SingleDevice([mx.cpu()]))
    for what, config, digest in (
        ("configuration", Config(optim=OptimConfig(clip_norm=3.0)), DIGEST),
        ("how gradients travel", Config(devices=DeviceConfig(gctype="2bit")), DIGEST),
        ("text and vocabulary", Config(), "fedcba9876543210"),
    ):
        other = worker_facts(config, digest, SingleDevice([mx.cpu()]))
        assert [name for name, value in own.items() if other[name] != value] == [what]
    on_gpu = worker_facts(Config(), DIGEST, SingleDevice([mx.gpu()]))
    assert [name for name, value in own.items() if on_gpu[name] != value] == ["kind of device"]


def test_a_worker_that_begins_does_not_start_beside_one_that_goes_on():
    for own, other, said in (
        ({"checkpoint": "step-6"}, {"gluon_lm": "1.0"}, "checkpoint: worker 0 has step-6, worker 1 none"),
        ({"gluon_lm": "1.0"}, {"checkpoint": "step-6"}, "gluon_lm: worker 0 has 1.0, worker 1 none"),
    ):
        with pytest.raises(DistributedError, match=f"the workers differ in {said}"):
            check_alike(own, TwoWorkers(lambda facts, other=other: other))


def test_workers_on_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "_free_on_machine", lambda: 9000)
    monkeypatch.setattr(memory.control_groups, "free_memory", lambda: None)
    monkeypatch.setattr(memory, "_free_below_limit", lambda: 5000)  # each has its own
    monkeypatch.setenv("GLUON_LM_LOCAL_WORKERS", "3")
    assert free_memory(TwoWorkers(dict)) == 3000
    assert free_memory(SingleDevice([mx.cpu()])) == 5000


def test_training_without_tf32_on_a_gpu_wants_it_said_before_the_libraries_are_loaded(monkeypatch):
    config = Config(training=TrainingConfig(tf32=False))
    monkeypatch.setattr(session, "create_communicator", lambda *how, **more: SingleDevice([mx.gpu(0)]))
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    with pytest.raises(DistributedError, match="tf32=False: .* call gluon_lm.runtime.prepare_training"):
        session._join(TrainCommand(config))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    assert session._join(TrainCommand(config)).devices == [mx.gpu(0)]


def test_arrays_travel_as_they_are():
    arrays = [np.arange(6, dtype=np.float32).reshape(1, 2, 3), np.array([[1e-30, np.inf]], dtype=np.float64)]
    found = TwoWorkers(lambda own: own).gather_arrays(arrays)
    for worker in found:
        for array, expected in zip(worker, arrays):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


def test_every_worker_draws_masks_of_its_own():
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}
    assert len(seeds) == 27
    assert step_seed(1, 2, 0) == step_seed(1, 2)


def test_a_worker_that_stops_by_the_signal_of_another_one_outlives_its_reader(monkeypatch):
    monkeypatch.setattr(logs, "_tolerates_closed_pipes", False)
    reading, writing = os.pipe()
    os.close(reading)
    trainer = object.__new__(Trainer)
    trainer._communicator, trainer._agreed_signal = TwoWorkers(dict), signal.SIGTERM
    with os.fdopen(writing, "w") as pipe:
        assert not logs.detach_if_unread(BrokenPipeError(), pipe)
        stop = StopRequest()
        assert trainer._must_stop(stop) and stop.exit_code == 143
        assert logs.detach_if_unread(BrokenPipeError(), pipe)


@pytest.mark.parametrize(("agreed", "is_whole"), [(0, True), (signal.SIGTERM, False)])
def test_a_signal_to_one_worker_alone_at_the_very_end_does_not_make_a_finished_run_a_stopped_one(agreed, is_whole):
    trainer = object.__new__(Trainer)
    trainer._communicator, trainer._agreed_signal = TwoWorkers(lambda own: own), agreed
    trainer._communicator.rank = 1
    trainer._windows, trainer._bar = SimpleNamespace(longest=lambda: None), SimpleNamespace(close=lambda: None)
    trainer._train = lambda stop: None
    stop = StopRequest()
    stop.signal = signal.SIGTERM
    assert trainer._train_and_test(stop) is is_whole
    trainer._communicator.rank, stop.signal, tested = 0, signal.SIGINT, []
    trainer._test_best = lambda stop, heeded: tested.append(heeded) or True
    assert trainer._train_and_test(stop) is False and tested == [signal.SIGINT]  # Ctrl-C, heard by all just then


def test_a_signal_that_comes_twice_interrupts_no_worker_of_a_launcher(monkeypatch):
    monkeypatch.setattr(logs, "_tolerates_closed_pipes", False)
    reading, writing = os.pipe()
    monkeypatch.setenv(CONTROL_VARIABLE, f"{reading},{writing}")
    monkeypatch.setenv(LOCAL_WORKER_VARIABLE, "0")
    assert Control.from_environment() is not None  # which takes one of them away, before training begins
    with StopRequest() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            os.kill(os.getpid(), number)
            assert stop.signal is number
    monkeypatch.delenv(LOCAL_WORKER_VARIABLE)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        stop.take_over(signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what its own terminal says of the same Ctrl-C
        assert stop.signal is signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
