"""The parameter servers' communicator in real processes on this machine, against numpy.

This file is also the script that the workers run; what they found lies in files afterwards, which the tests look at.
MXNet cuts one array, the large one, up among the servers.
"""

from __future__ import annotations

import subprocess
import sys

import mxnet as mx
import numpy as np
import pytest
from mxnet import gluon
from processes import ROOT, Found, Notes, as_script, environment
from reference import TwoBitCompression

from gluon_lm.distributed.compression import CALIBRATION_STEPS
from gluon_lm.distributed.parameter_server import ParameterServer
from gluon_lm.heartbeat import beat

pytestmark = pytest.mark.timeout(300)
SHAPES = [(6, 4), (26, 65), (5,)]
LARGE = 1000  # as many elements are cut up, or more
SIZES = (3.0, 1e-2, 2e-4)
THRESHOLD = 0.5
NUM_STEPS = CALIBRATION_STEPS + 4

# Starts so many workers and servers; the workers run the rest of the line.
CLUSTER = """
import sys
from gluon_lm.cli import run_command
from gluon_lm.distributed.cluster import Host, parameter_server
from gluon_lm.distributed.supervisor import Supervisor

workers, servers, *command = sys.argv[1:]
processes = parameter_server([Host()], int(workers), int(servers), [sys.executable, *command])
sys.exit(run_command(lambda _: Supervisor(processes, 60).run(), []))
"""
THIS_FILE = as_script(__file__)


def draw(step, rank, device=0):
    """One device's gradients at one step, of the given sizes, in float32."""
    rng = np.random.RandomState(1000 * step + 10 * rank + device)
    return [(size * rng.standard_normal(shape)).astype(np.float32) for size, shape in zip(SIZES, SHAPES)]


def reduce(communicator, parameters, gradients):
    """Set the gradients by device, reduce them in place, and return them by device."""
    for device, arrays in zip(communicator.devices, gradients):
        for parameter, array in zip(parameters, arrays):
            parameter.grad(device)[:] = mx.nd.array(array, ctx=device)
    communicator.reduce_gradients(parameters)
    return [[parameter.grad(device).asnumpy() for parameter in parameters] for device in communicator.devices]


# ---------------------------------------------------------------- what each worker does


def run_worker(folder, kvstore, num_devices, threshold):
    devices = [mx.cpu(i) for i in range(int(num_devices))]
    communicator = ParameterServer(devices, kvstore, float(threshold) or None)
    rank, notes = communicator.rank, Notes(folder, communicator.rank)
    notes.keep("rank", [rank, communicator.size, communicator.is_primary])
    notes.keep("description", communicator.description)
    parameters = [gluon.Parameter(f"p{i}", shape=shape) for i, shape in enumerate(SHAPES)]
    for parameter in parameters:
        parameter.initialize(mx.init.Constant(rank + 5), ctx=devices)
    communicator.broadcast_parameters(parameters)
    values = [np.unique(array.asnumpy()) for parameter in parameters for array in parameter.list_data()]
    notes.keep("parameters", values)
    notes.keep("gathered", communicator.allgather_object({"rank": rank, "text": "né\n" * rank, "none": None}))
    notes.keep("broadcast", communicator.broadcast_object([rank, 0.1]))
    notes.keep("exchanged", [communicator.allgather([rank + 0.1, np.nan, 1e300])])
    for step in range(NUM_STEPS):
        found = reduce(communicator, parameters, [draw(step, rank, i) for i in range(len(devices))])
        for arrays in found[1:]:
            for array, first in zip(arrays, found[0]):
                np.testing.assert_array_equal(array, first)
        notes.keep(f"sum{step}", found[0])
        beat(step)
        if step + 1 == CALIBRATION_STEPS:
            notes.keep("measured", communicator.compression_state())
    notes.keep("compressed", communicator.compression_state())
    gradients = [draw(NUM_STEPS, rank, i) for i in range(len(devices))]
    if rank == communicator.size - 1:
        gradients[-1][0][0, 0] = np.nan
    notes.keep("not finite", reduce(communicator, parameters, gradients)[0])
    notes.write()
    communicator.allgather_object("end")
    communicator.close()


if __name__ == "__main__":
    run_worker(*sys.argv[1:])
    sys.exit()


# ---------------------------------------------------------------- what they found


def run_cluster(folder, kvstore, num_devices, threshold, workers=2, servers=2):
    variables = {"OMP_NUM_THREADS": "1", "MXNET_KVSTORE_BIGARRAY_BOUND": str(LARGE)}
    arguments = [workers, servers, *THIS_FILE, folder, kvstore, num_devices, threshold]
    ended = subprocess.run(
        [sys.executable, "-c", CLUSTER, *map(str, arguments)],
        env=environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", **variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout
    return Found(folder, workers)


def sums(found):
    """By step, what all ranks had alike."""
    by_step = []
    for step in range(NUM_STEPS):
        first, *others = found.arrays(f"sum{step}")
        for name, array in first.items():
            for other in others:
                np.testing.assert_array_equal(other[name], array)
        by_step.append(first)
    return by_step


def test_workers_of_several_devices_have_the_sum_of_all(tmp_path):
    found = run_cluster(tmp_path, "dist_device_sync", 2, 0)
    size = len(found.ranks)
    assert found.values("rank") == [[rank, size, rank == 0] for rank in found.ranks]
    for description in found.values("description"):
        assert "\n" not in description and f"{size} workers, 2 devices each" in description
    for values in found.arrays("parameters"):
        assert len(values) == 2 * len(SHAPES) and all(np.array_equal(value, [5]) for value in values.values())
    objects = [{"rank": rank, "text": "né\n" * rank, "none": None} for rank in found.ranks]
    assert found.values("gathered") == [objects] * size
    assert found.values("broadcast") == [[0, 0.1]] * size
    for exchanged in found.arrays("exchanged"):
        np.testing.assert_array_equal(exchanged["0"], [[rank + 0.1, np.nan, 1e300] for rank in found.ranks])
    for step, arrays in enumerate(sums(found)):
        for k, gradients in enumerate(zip(*(draw(step, rank, i) for rank in found.ranks for i in range(2)))):
            expected = np.sum(gradients, axis=0, dtype=np.float64)
            np.testing.assert_allclose(arrays[str(k)], expected, rtol=1e-5, atol=1e-6 * SIZES[k])


@pytest.mark.parametrize("num_devices", [1, 2])
def test_two_bits_through_several_servers_agree_with_numpy_to_the_bit(tmp_path, num_devices):
    found = run_cluster(tmp_path, "dist_sync", num_devices, THRESHOLD)

    def pushed(step, rank):
        """What a worker's devices have together, which is compressed."""
        return [sum(arrays) for arrays in zip(*(draw(step, rank, i) for i in range(num_devices)))]

    compression = TwoBitCompression(THRESHOLD, CALIBRATION_STEPS)
    for step, arrays in enumerate(sums(found)):
        for k, expected in enumerate(compression.reduce([pushed(step, rank) for rank in found.ranks])):
            if step < CALIBRATION_STEPS:
                np.testing.assert_allclose(arrays[str(k)], expected, rtol=1e-5, atol=1e-6 * SIZES[k])
            else:
                np.testing.assert_array_equal(arrays[str(k)], expected)
    for when, unsent in (("measured", False), ("compressed", True)):
        for state, residuals in found.values(when):
            assert (state["factors"], state["unsent"], residuals) == (compression.factors, unsent, {})
            assert state["num_devices"] == num_devices * len(found.ranks)
    # Two bits have no code for what is not finite: the worker that has it says so to the others.
    assert not all(np.isfinite(array).all() for array in found.arrays("not finite")[-1].values())
