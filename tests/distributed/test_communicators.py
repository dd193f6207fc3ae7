"""Device flags, and every communicator back-end: the conformance tests run for each; 2-bit against numpy."""

from __future__ import annotations

import json

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from reference import TwoBitCompression

from gluon_lm.config import DeviceConfig
from gluon_lm.distributed import devices as device_flags
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.distributed.compression import CALIBRATION_STEPS, power_of_two_near
from gluon_lm.distributed.devices import COMMUNICATORS, create_communicator, resolve_devices, resolve_single_device
from gluon_lm.distributed.kvstore import KVStoreCommunicator
from gluon_lm.distributed.parameter_server import ParameterServer
from gluon_lm.errors import CheckpointError, DistributedError
from gluon_lm.gpus import Driver, Gpu

SHAPES = [(6, 4), (5,), (3, 2)]


def cpus(count):
    return [mx.cpu(i) for i in range(count)]


def gpus(count):
    if mx.context.num_gpus() < count:
        pytest.skip(f"there are not {count} GPUs here")
    return [mx.gpu(i) for i in range(count)]


def make_parameters(devices):
    parameters = [gluon.Parameter(f"p{i}", shape=shape) for i, shape in enumerate(SHAPES)]
    for parameter in parameters:
        parameter.initialize(mx.init.Zero(), ctx=devices)
    return parameters


def draw(step, num_devices, sizes=(1.0, 1.0, 1.0)):
    """One step's gradients, ``[parameter][device]``, of about the given sizes, in float32."""
    rng = np.random.RandomState(1000 + step)
    return [
        [(size * rng.randn(*shape)).astype(np.float32) for _ in range(num_devices)]
        for shape, size in zip(SHAPES, sizes)
    ]


def reduce(communicator, parameters, gradients):
    """Set the gradients, reduce them, and return what is then on each device: ``[parameter][device]``."""
    for parameter, arrays in zip(parameters, gradients):
        for grad, array in zip(parameter.list_grad(), arrays):
            grad[:] = array
    before = [parameter.list_grad() for parameter in parameters]
    communicator.reduce_gradients(parameters)
    assert all(now is then for p, grads in zip(parameters, before) for now, then in zip(p.list_grad(), grads))
    return [[grad.asnumpy() for grad in parameter.list_grad()] for parameter in parameters]


def assert_all_equal(found, expected):
    """Every device has exactly the expected array of each parameter."""
    for arrays, array in zip(found, expected):
        for on_device in arrays:
            np.testing.assert_array_equal(on_device, array)


# ---------------------------------------------------------------- conformance

BACK_ENDS = {
    "single": lambda: SingleDevice(cpus(1)),
    **{
        f"{kind}-{n}": lambda kind=kind, n=n: COMMUNICATORS[kind](cpus(n), DeviceConfig(cpus=n, kvstore=kind))
        for kind in ("device", "local")
        for n in (2, 3)
    },
    "device-2bit": lambda: KVStoreCommunicator(cpus(2), "device", threshold=0.5),
}
GPU_BACK_ENDS = {
    **{
        f"{kind}-gpus": lambda kind=kind: COMMUNICATORS[kind](gpus(2), DeviceConfig(gpus=(0, 1), kvstore=kind))
        for kind in ("device", "local", "nccl")
    },
    "device-2bit-gpus": lambda: KVStoreCommunicator(gpus(2), "device", threshold=0.5),
}


@pytest.fixture(params=[*sorted(BACK_ENDS), *(pytest.param(name, marks=pytest.mark.gpu) for name in GPU_BACK_ENDS)])
def communicator(request):
    communicator = (BACK_ENDS | GPU_BACK_ENDS)[request.param]()
    yield communicator
    communicator.close()


def test_one_process_is_rank_0_of_1(communicator):
    assert (communicator.rank, communicator.size, communicator.is_primary) == (0, 1, True)
    assert communicator.broadcast_object({"lr": 5.0, "best": None}) == {"lr": 5.0, "best": None}
    assert communicator.allgather_object({"a": 1}) == [{"a": 1}]


def test_description_is_one_line_that_names_the_devices(communicator):
    assert "\n" not in communicator.description
    assert str(communicator.devices[-1]) in communicator.description


def test_broadcast_gives_every_device_the_first_ones_values(communicator):
    parameters = make_parameters(communicator.devices)
    for parameter in parameters:
        for i, data in enumerate(parameter.list_data()):
            data[:] = i + 1
    communicator.broadcast_parameters(parameters)
    for parameter in parameters:
        for data in parameter.list_data():
            np.testing.assert_array_equal(data.asnumpy(), np.ones(parameter.shape))


def test_reduce_leaves_the_sum_on_every_device_in_place(communicator):
    parameters = make_parameters(communicator.devices)
    for step in range(3):
        # Small whole numbers add up exactly in any order.
        gradients = [[np.round(3 * array) for array in arrays] for arrays in draw(step, len(communicator.devices))]
        assert_all_equal(reduce(communicator, parameters, gradients), [sum(arrays) for arrays in gradients])


def test_reduce_changes_no_parameter(communicator):
    parameters = make_parameters(communicator.devices)
    for parameter in parameters:
        parameter.set_data(mx.nd.full(parameter.shape, 7))
    reduce(communicator, parameters, draw(0, len(communicator.devices)))
    for parameter in parameters:
        for data in parameter.list_data():
            assert np.all(data.asnumpy() == 7)


def test_state_goes_through_json_and_checkpoints_between_steps_change_no_sum(communicator):
    parameters = make_parameters(communicator.devices)
    count = len(communicator.devices)
    first = reduce(communicator, parameters, draw(0, count))
    state, residuals = communicator.compression_state()
    communicator.restore_compression(json.loads(json.dumps(state)), residuals)
    for arrays, again in zip(first, reduce(communicator, parameters, draw(0, count))):
        np.testing.assert_array_equal(arrays[0], again[0])


# ---------------------------------------------------------------- 2-bit compression

SIZES = (3.0, 1e-2, 2e-4)


@pytest.mark.parametrize("num_devices", [2, 4])
@pytest.mark.parametrize("threshold", [0.5, 0.125])
def test_two_bits_agree_with_numpy_with_residuals(num_devices, threshold):
    communicator = KVStoreCommunicator(cpus(num_devices), "device", threshold)
    parameters = make_parameters(communicator.devices)
    expected = TwoBitCompression(threshold, CALIBRATION_STEPS)
    for step in range(CALIBRATION_STEPS):
        gradients = draw(step, num_devices, SIZES)
        sums = expected.reduce([*zip(*gradients)])
        for arrays, array in zip(reduce(communicator, parameters, gradients), sums):
            for on_device in arrays:
                np.testing.assert_allclose(on_device, array, rtol=1e-5, atol=1e-6 * np.abs(array).max())
    assert factors_of(communicator) == expected.factors
    assert len(set(expected.factors)) == len(SIZES)
    for step in range(CALIBRATION_STEPS, CALIBRATION_STEPS + 12):
        if step == CALIBRATION_STEPS + 7:
            communicator.compression_state()
            expected.reset()
        gradients = draw(step, num_devices, SIZES)
        assert_all_equal(reduce(communicator, parameters, gradients), expected.reduce([*zip(*gradients)]))


def factors_of(communicator):
    return communicator.compression_state()[0]["factors"]


def calibrated(num_devices=2, steps=CALIBRATION_STEPS, sizes=SIZES):
    communicator = KVStoreCommunicator(cpus(num_devices), "device", 0.5)
    parameters = make_parameters(communicator.devices)
    for step in range(steps):
        reduce(communicator, parameters, draw(step, num_devices, sizes))
    return communicator, parameters


@pytest.mark.parametrize("steps", [7, CALIBRATION_STEPS, CALIBRATION_STEPS + 5])
def test_two_bits_resume_exactly_where_both_start_without_residuals(steps):
    first, parameters = calibrated(steps=steps)
    state = json.loads(json.dumps(first.compression_state()[0]))
    second = KVStoreCommunicator(cpus(2), "device", 0.5)
    second.restore_compression(state, {})
    others = make_parameters(second.devices)
    for step in range(steps, steps + 20):
        expected = reduce(first, parameters, draw(step, 2, SIZES))
        assert_all_equal(reduce(second, others, draw(step, 2, SIZES)), [arrays[0] for arrays in expected])


def notices_on_resuming(communicator, state, residuals, caplog):
    caplog.clear()
    with caplog.at_level("INFO", "gluon_lm"):
        communicator.restore_compression(json.loads(json.dumps(state)), residuals)
    return caplog.messages


@pytest.mark.parametrize(
    ("make", "cause"),
    [
        (lambda: SingleDevice(cpus(1)), "the gradients are no longer compressed"),
        (lambda: KVStoreCommunicator(cpus(2)), "the gradients are no longer compressed"),
        (
            lambda: KVStoreCommunicator(cpus(4), threshold=0.5),
            "the gradients of 2 devices were compressed, and there are 4 now",
        ),
        (lambda: KVStoreCommunicator(cpus(2), threshold=0.5), "the residuals of 2-bit compression could not be kept"),
    ],
    ids=["one device", "not compressed", "more devices", "as before"],
)
def test_what_had_not_been_sent_is_said_to_be_lost_and_only_then(make, cause, caplog):
    # Nothing waits as long as nothing has been compressed, nor where the run itself forgets it at each checkpoint.
    for steps in (0, 3, CALIBRATION_STEPS, CALIBRATION_STEPS + 5):
        state, residuals = calibrated(steps=steps)[0].compression_state()
        assert notices_on_resuming(make(), state, residuals, caplog) == []
    of_another_communicator = {**state, "unsent": True}
    for residuals in ({}, {"0": mx.nd.ones((4,))}):
        communicator = make()
        notices = notices_on_resuming(communicator, of_another_communicator, residuals, caplog)
        assert notices == [f"{cause}: what had not been sent is lost"]
        assert not communicator.compression_state()[0].get("unsent")


def test_other_devices_measure_their_own_scales():
    state, _ = calibrated()[0].compression_state()
    communicator = KVStoreCommunicator(cpus(4), threshold=0.5)
    communicator.restore_compression(state, {})
    assert communicator.compression_state() == KVStoreCommunicator(cpus(4), threshold=0.5).compression_state()


def test_another_threshold_holds_for_the_scales_of_before():
    state, _ = calibrated()[0].compression_state()
    communicator = KVStoreCommunicator(cpus(2), threshold=0.25)
    communicator.restore_compression(state, {})
    assert communicator.compression_state()[0] == {**state, "threshold": 0.25}


@pytest.mark.parametrize("state", [{"num_devices": 2}, {"num_devices": 2, "threshold": 0.5, "kvstore": "device"}])
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_state_that_is_none_is_refused(state, threshold):
    with pytest.raises(CheckpointError, match="state of 2-bit compression is damaged .*; use another checkpoint"):
        KVStoreCommunicator(cpus(2), threshold=threshold).restore_compression(state, {})


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_checkpoint_forgets_the_residuals(checkpoint):
    communicator, parameters = calibrated(sizes=(1.0, 1.0, 1.0))
    assert factors_of(communicator) == [0.25] * 3
    # A quarter of 0.3 crosses the threshold of 0.5 at the seventh step.
    gradients = [[np.full(shape, 0.3, np.float32)] * 2 for shape in SHAPES]
    for _ in range(5):
        assert not reduce(communicator, parameters, gradients)[0][0].any()
    if checkpoint:
        communicator.compression_state()
    sent = [bool(reduce(communicator, parameters, gradients)[0][0].any()) for _ in range(2)]
    assert sent == [False, not checkpoint]


@pytest.mark.parametrize("size", [1e2, 1.0, 1e-2, 1e-3, 1e-4])
def test_at_its_defaults_something_arrives_and_nothing_is_lost(size):
    defaults = DeviceConfig(cpus=2, gctype="2bit")
    communicator = create_communicator(defaults)
    parameters = make_parameters(communicator.devices)
    steps, sizes = 30, (size, size / 3, size / 10)
    for step in range(CALIBRATION_STEPS):
        reduce(communicator, parameters, draw(step, 2, sizes))
    sent = [np.zeros(shape) for shape in SHAPES]
    true = [np.zeros(shape) for shape in SHAPES]
    for step in range(CALIBRATION_STEPS, CALIBRATION_STEPS + steps):
        gradients = draw(step, 2, sizes)
        found = reduce(communicator, parameters, gradients)
        for k in range(len(SHAPES)):
            assert len(np.unique(found[k][0])) <= 5  # two devices send -1, 0 or 1 each
            sent[k] += found[k][0]
            true[k] += sum(gradients[k])
    for k in range(len(SHAPES)):
        assert np.count_nonzero(sent[k]) > 0.8 * sent[k].size
        # What is not sent waits in the residuals, so the sums stay close over many steps.
        assert np.corrcoef(sent[k].ravel(), true[k].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("device", [0, 1])
def test_two_bits_do_not_hide_a_gradient_that_is_not_finite(what, device):
    communicator, parameters = calibrated()
    gradients = draw(50, 2, SIZES)
    gradients[0][device].flat[0] = what
    found = reduce(communicator, parameters, gradients)
    for i in range(2):
        assert not all(np.isfinite(arrays[i]).all() for arrays in found)


def test_a_parameter_without_gradients_in_calibration_keeps_its_size():
    communicator, parameters = calibrated(sizes=(1.0, 0.0, 1.0))
    assert factors_of(communicator)[1] == 1.0
    assert_all_equal(
        reduce(communicator, parameters, [[np.full(shape, 0.75, np.float32)] * 2 for shape in SHAPES])[1:2],
        [np.full(SHAPES[1], 1.0)],
    )


@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (1.3, 1.0), (1.5, 2.0), (0.3, 0.25), (3e-5, 2.0**-15)])
def test_power_of_two_near(value, expected):
    assert power_of_two_near(value) == expected


# ---------------------------------------------------------------- device flags

without_gpu = pytest.mark.skipif(mx.context.num_gpus() > 0, reason="this machine has a GPU")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_cpus(count):
    assert resolve_devices(DeviceConfig(cpus=count)) == cpus(count)
    communicator = create_communicator(DeviceConfig(cpus=count))
    assert communicator.devices == cpus(count)
    assert isinstance(communicator, SingleDevice if count == 1 else KVStoreCommunicator)


def test_no_cuda_means_the_cpu():
    assert resolve_devices(DeviceConfig(cuda=False)) == [mx.cpu(0)]


@without_gpu
def test_nothing_given_without_a_gpu_means_one_cpu_context():
    assert resolve_devices(DeviceConfig()) == [mx.cpu(0)]
    assert isinstance(create_communicator(DeviceConfig()), SingleDevice)


@pytest.mark.gpu
def test_nothing_given_with_a_gpu_means_the_first():
    assert resolve_devices(DeviceConfig()) == [mx.gpu(0)]


@pytest.mark.parametrize(
    ("config", "device"),
    [
        (DeviceConfig(kvstore="dist_sync"), mx.gpu(1)),
        (DeviceConfig(kvstore="dist_sync", cuda=True), mx.gpu(1)),
        (DeviceConfig(kvstore="dist_sync", gpus=(0,)), mx.gpu(0)),
        (DeviceConfig(kvstore="dist_sync", cuda=False), mx.cpu(0)),
        (DeviceConfig(kvstore="dist_sync", cpus=1), mx.cpu(0)),
    ],
)
@pytest.mark.parametrize("number", [1, 3])
def test_workers_of_one_machine_take_its_gpus_in_turn(monkeypatch, config, device, number):
    """A machine with two GPUs, as far as MXNet says."""
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 2)
    monkeypatch.setattr(device_flags, "reasons_against_gpus", dict)
    monkeypatch.setattr(device_flags, "_is_usable", lambda gpu, reasons: True)
    monkeypatch.setitem(COMMUNICATORS, "dist_sync", lambda devices, config: SingleDevice(devices))
    monkeypatch.setenv("GLUON_LM_LOCAL_WORKER", str(number))
    assert create_communicator(config).devices == [device]


def test_workers_share_out_the_gpus_that_are_good(monkeypatch):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 3)
    monkeypatch.setattr(device_flags, "reasons_against_gpus", lambda: {0: "is too old"})
    monkeypatch.setattr(device_flags, "_is_usable", lambda gpu, reasons: gpu.device_id not in reasons)
    for flags in ({}, {"cuda": True}):
        taken = [device_flags.resolve_devices(DeviceConfig(**flags), number=number) for number in range(4)]
        assert taken == [[mx.gpu(1)], [mx.gpu(2)], [mx.gpu(1)], [mx.gpu(2)]]
    assert device_flags.resolve_devices(DeviceConfig(), streams=4) == [mx.gpu(1), mx.gpu(2)]


@pytest.mark.parametrize("flags", [{}, {"cuda": True}])
def test_a_gpu_that_cannot_compute_is_done_without_and_named(monkeypatch, caplog, flags):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 3)
    monkeypatch.setattr(device_flags, "reasons_against_gpus", lambda: {})
    monkeypatch.setattr(device_flags, "_is_usable", lambda gpu, reasons: gpu.device_id != 1)
    for number, streams, taken, tried in ((0, None, [0], 0), (1, None, [2], 1), (0, 4, [0, 2], 1)):
        caplog.clear()
        assert device_flags.resolve_devices(DeviceConfig(**flags), streams, number) == [mx.gpu(i) for i in taken]
        said = [record.getMessage() for record in caplog.records]
        assert ["sees gpu(1) but cannot compute on it" in line for line in said] == [True] * tried


def test_as_many_gpus_are_taken_as_share_the_streams_evenly(monkeypatch, caplog):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 8)
    monkeypatch.setattr(device_flags, "reasons_against_gpus", dict)
    monkeypatch.setattr(device_flags, "_is_usable", lambda gpu, reasons: True)
    for cuda in (None, True):
        for streams, taken in ((16, 8), (12, 6), (15, 5), (7, 7), (11, 1)):
            caplog.clear()
            assert len(device_flags.resolve_devices(DeviceConfig(cuda=cuda), streams=streams)) == taken
            said = f"{taken} of 8 GPUs are used, the most that share {streams} streams evenly"
            assert [said in record.getMessage() for record in caplog.records] == [True] * (taken < 8)
        one = DeviceConfig(cuda=cuda, single_gpu=True)
        assert device_flags.resolve_devices(one, streams=16, number=9) == [mx.gpu(1)]


@pytest.mark.parametrize("streams", [None, 4])
@pytest.mark.parametrize(("flags", "flag"), [({"cuda": True}, "--cuda"), ({"single_gpu": True}, "--single-gpu")])
def test_a_gpu_that_is_asked_for_is_never_the_cpu(monkeypatch, caplog, flags, flag, streams):
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 2)
    monkeypatch.setattr(device_flags, "_is_usable", lambda gpu, reasons: False)
    for reasons, said in (({0: "is too old", 1: "is too old"}, "is too old"), ({}, r"MXNet .* cannot compute on it")):
        monkeypatch.setattr(device_flags, "reasons_against_gpus", lambda reasons=reasons: dict(reasons))
        with pytest.raises(DistributedError, match=f"^{flag}: {said}"):
            device_flags.resolve_devices(DeviceConfig(**flags), streams=streams)
    assert not caplog.records  # the error says it


@without_gpu
def test_a_driver_that_does_not_work_or_is_too_old_is_named(monkeypatch, caplog):
    def fail():
        raise mx.MXNetError(
            "Traceback:\n  Check failed: e == cudaSuccess (803 vs. 0) : CUDA: system has unsupported mix"
        )

    monkeypatch.setattr(mx.context, "num_gpus", fail)
    with pytest.raises(
        DistributedError, match=r"does not work \(CUDA: system has unsupported mix\): see what nvidia-smi"
    ):
        resolve_devices(DeviceConfig())
    monkeypatch.setattr(mx.context, "num_gpus", lambda: 0)
    monkeypatch.setattr(mx.runtime.Features, "is_enabled", lambda self, name: name == "CUDA")
    old = Driver("10.2", [Gpu(0, "Tesla V100", (7, 0), 16 << 30)])
    monkeypatch.setattr(device_flags, "query_driver", lambda: old)
    assert resolve_devices(DeviceConfig()) == [mx.cpu(0)]
    assert (
        "driver runs CUDA 10.2, older than the CUDA that this MXNet" in caplog.text
        and "Going on with cpu(0)" in caplog.text
    )
    with pytest.raises(
        DistributedError,
        match="--gpus 0: MXNet sees no GPU here; .* update the driver .*, or use the CPU instead, with --cpus N",
    ):
        resolve_devices(DeviceConfig(gpus=(0,)))


@without_gpu
def test_workers_of_a_machine_without_gpus_take_its_cpu(monkeypatch):
    monkeypatch.setitem(COMMUNICATORS, "dist_sync", lambda devices, config: SingleDevice(devices))
    monkeypatch.setenv("GLUON_LM_LOCAL_WORKER", "1")
    assert create_communicator(DeviceConfig(kvstore="dist_sync")).devices == [mx.cpu(0)]


@without_gpu
@pytest.mark.parametrize(
    ("config", "flag"),
    [
        (DeviceConfig(gpus=(0, 1)), "--gpus 0,1"),
        (DeviceConfig(cuda=True), "--cuda"),
        (DeviceConfig(single_gpu=True), "--single-gpu"),
        (DeviceConfig(gpus=(3,)), "--gpus 3"),
    ],
)
@pytest.mark.parametrize("resolve", [resolve_devices, create_communicator])
def test_a_gpu_that_is_not_there_is_refused_in_one_line(config, flag, resolve):
    with pytest.raises(DistributedError) as caught:
        resolve(config)
    message = str(caught.value)
    assert message.startswith(f"{flag}: MXNet sees no GPU here") and "--cpus N" in message and "\n" not in message


@pytest.mark.gpu
def test_a_gpu_beyond_the_last_is_refused():
    with pytest.raises(DistributedError, match=r"--gpus 99: MXNet sees .*GPU"):
        resolve_devices(DeviceConfig(gpus=(99,)))


def test_a_kvstore_for_one_device_and_nccl_without_gpus_are_refused():
    with pytest.raises(DistributedError, match=r"--kvstore local: there is one device \(cpu\(0\)\)"):
        create_communicator(DeviceConfig(cpus=1, kvstore="local"))
    with pytest.raises(DistributedError, match=r"--kvstore nccl: joins GPUs only, and there is cpu\(0\)"):
        COMMUNICATORS["nccl"](cpus(2), DeviceConfig(kvstore="nccl"))


def test_compression_on_one_device_is_refused():
    with pytest.raises(DistributedError, match=r"--gctype 2bit: there is one device .*nothing to compress") as caught:
        create_communicator(DeviceConfig(cpus=1, gctype="2bit"))
    assert "\n" not in str(caught.value)


def test_a_command_for_one_device_refuses_several():
    assert resolve_single_device(DeviceConfig(cpus=1)) == mx.cpu(0)
    with pytest.raises(DistributedError, match="2 devices are named"):
        resolve_single_device(DeviceConfig(cpus=2))


@pytest.mark.parametrize(
    ("kind", "threshold", "elements"),
    [("device", None, 4 * 50), ("device", 0.5, 5 * 50 + 60), ("nccl", None, 50), ("local", None, 0)],
)
def test_what_a_store_holds_on_a_gpu(kind, threshold, elements):
    for device, held in ((mx.gpu, elements), (mx.cpu, 0)):
        communicator = KVStoreCommunicator([device(i) for i in range(4)], kind, threshold)
        assert communicator.merged_elements([10, 50]) == held


@pytest.mark.parametrize(
    ("kind", "num_gpus", "elements"),
    [("dist_device_sync", 4, 4 * 50), ("dist_device_sync", 1, 0), ("dist_sync", 4, 0)],
)
def test_what_a_store_of_a_worker_holds_on_a_gpu(kind, num_gpus, elements):
    communicator = object.__new__(ParameterServer)  # there is no cluster here
    communicator.devices, communicator._kind = [mx.gpu(i) for i in range(num_gpus)], kind
    assert communicator.merged_elements([10, 50]) == elements


def test_one_gpu_holds_nothing_besides_its_gradients():
    assert SingleDevice([mx.gpu(0)]).merged_elements([10, 50]) == 0
