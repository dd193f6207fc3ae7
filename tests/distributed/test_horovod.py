"""Horovod's communicator in real processes on this machine, against numpy and against one process.

`horovodrun` starts this file as a script, once for each rank; what the ranks found lies in files afterwards, which the
tests look at. Those without the mark `with_horovod` need no Horovod.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import mxnet as mx
import numpy as np
import pytest
from builders import build_step, random_ids, relative_error, take_steps, values_of
from machine import compile_driver
from mxnet import gluon
from processes import (
    ROOT,
    Found,
    Notes,
    Process,
    as_script,
    environment,
    events,
    running,
    wait_until,
    with_horovod,
)
from reference import TwoBitCompression

from gluon_lm import gpus
from gluon_lm.data.windows import Streams
from gluon_lm.distributed import horovod
from gluon_lm.distributed.communicator import SingleDevice
from gluon_lm.distributed.compression import CALIBRATION_STEPS, Compression
from gluon_lm.distributed.horovod import HorovodCommunicator, local_rank
from gluon_lm.errors import DistributedError
from gluon_lm.heartbeat import beat
from gluon_lm.progress import counted
from gluon_lm.train import main as train_alone

CPU = mx.cpu(0)
THIS_FILE = as_script(__file__)
SHAPES = [(6, 4), (5,), (1,), (300, 7)]
SIZES = (3.0, 1e-2, 1.0, 2e-4)
THRESHOLD = 0.5
LONG_S = 7  # beyond the 4 s after which, in some tests, processes end that do not get on
STOP, END = CALIBRATION_STEPS + 6, CALIBRATION_STEPS + 14

MODELS = {
    "plain": {"model": "lstm", "tied": True},
    "weight-dropped": {"model": "awd-lstm", "alpha": 2.0, "beta": 1.0, "weight_decay": 0.01},
    "mixture": {"model": "lstm", "num_experts": 3, "tied": True},
}
BATCH, BPTT, NUM_STEPS = 6, 5, 10  # two and three processes share a batch of six


# ---------------------------------------------------------------- what processes and tests both do


def draw(step, rank, sizes=SIZES):
    """One rank's gradients at one step, of about the given sizes, in float32."""
    rng = np.random.RandomState(1000 * rank + step)
    return [(size * rng.standard_normal(shape)).astype(np.float32) for shape, size in zip(SHAPES, sizes)]


def draw_whole_numbers(step, rank):
    """They add up exactly in any order, and in half precision."""
    return [np.round(3 * array) for array in draw(step, rank, (1.0,) * len(SHAPES))]


def make_parameters():
    parameters = [gluon.Parameter(f"p{i}", shape=shape) for i, shape in enumerate(SHAPES)]
    for parameter in parameters:
        parameter.initialize(mx.init.Zero(), ctx=[CPU])
    return parameters


def reduce(communicator, parameters, gradients):
    """Set the gradients, reduce them in place, and return them."""
    before = [parameter.grad() for parameter in parameters]
    for grad, array in zip(before, gradients):
        grad[:] = array
    communicator.reduce_gradients(parameters)
    assert all(parameter.grad() is grad for parameter, grad in zip(parameters, before))
    return [grad.asnumpy() for grad in before]


def train(communicator, name, spoil=False):
    """Ten steps; what each returned, and the parameters after them."""
    model, step = build_step(communicator, clip_norm=0.3, **MODELS[name])
    if spoil:
        for parameter in model.named_parameters().values():
            parameter.set_data(parameter.data() + communicator.rank)
    communicator.broadcast_parameters(list(model.named_parameters().values()))
    # Three windows of 30 targets, and one whose last row is short: the last ranks have fewer targets in it.
    windows = Streams(random_ids(3 * BPTT * BATCH + 8, seed=4), BATCH, 0).windows(BPTT)
    results = take_steps(step, windows, range(NUM_STEPS))
    return [[result.loss_sum, result.grad_norm] for result in results], values_of(model)


# ---------------------------------------------------------------- what each process does


def run_first(folder):
    """Everything but resuming."""
    for compression in ("none", "fp16", "2bit"):
        communicator = HorovodCommunicator([CPU], compression, THRESHOLD)
        if compression == "none":
            notes, rank = Notes(folder, communicator.rank), communicator.rank
        notes.keep(f"{compression}/description", communicator.description)
        notes.keep(f"{compression}/rank", [communicator.rank, communicator.size, communicator.is_primary, local_rank()])
        parameters = make_parameters()
        for parameter in parameters:
            parameter.set_data(mx.nd.full(parameter.shape, rank + 5))
        communicator.broadcast_parameters(parameters)
        for step in range(3):
            notes.keep(f"{compression}/sum{step}", reduce(communicator, parameters, draw_whole_numbers(step, rank)))
            state, residuals = communicator.compression_state()
            communicator.restore_compression(json.loads(json.dumps(state)), residuals)
            notes.keep(f"{compression}/waiting", [state.get("unsent"), list(residuals)])
            beat(step)
        notes.keep(f"{compression}/parameters", [parameter.data().asnumpy() for parameter in parameters])

    communicator = HorovodCommunicator([CPU])
    notes.keep("gathered", communicator.allgather_object({"rank": rank, "text": "né\n" * rank, "none": None}))
    notes.keep("broadcast", communicator.broadcast_object([rank, 0.1]))
    notes.keep("exchanged", [communicator.allgather([rank + 0.1, np.nan, 1e300])])
    arrays = [np.full((rank + 1, 2), rank + 0.1), np.arange(3, dtype=np.float32) + rank]
    for worker, found in enumerate(communicator.gather_arrays(arrays)):
        if communicator.is_primary:
            notes.keep(f"arrays{worker}", found)
    for name in MODELS:
        results, values = train(communicator, name, spoil=True)
        notes.keep(f"{name}/results", results)
        notes.keep(f"{name}/parameters", values)
    take_compressed_steps(notes, folder, 0, STOP)
    communicator.close()
    notes.write()


def run_left(folder):
    """The last process leaves while the others train."""
    communicator = HorovodCommunicator([CPU])
    notes, rank = Notes(folder, communicator.rank), communicator.rank
    if rank < communicator.size - 1:
        try:
            reduce(communicator, make_parameters(), draw(0, rank))
        except DistributedError as error:
            notes.keep("left alone", str(error))
    else:
        time.sleep(2)  # Horovod's operator may crash where it is asked for something once Horovod has been shut down
    communicator.close()
    notes.write()
    os._exit(0)  # or else the first of those that fail has all others ended


def run_resumed(folder):
    communicator = HorovodCommunicator([CPU])
    notes = Notes(folder, communicator.rank)
    take_compressed_steps(notes, folder, STOP, END)
    communicator.close()
    notes.write()


def take_compressed_steps(notes, folder, start, end):
    """Go on from the state in the folder, where there is one, and leave there that of the end."""
    horovod.GROUP_ELEMENTS = 20  # so that there are several groups of parameters
    communicator, parameters = HorovodCommunicator([CPU], "2bit", THRESHOLD), make_parameters()
    state, residuals = Path(folder) / "state.json", Path(folder) / "residuals.npz"
    if start:
        with np.load(residuals) as arrays:
            kept = {name: mx.nd.array(arrays[name]) for name in arrays}
        communicator.restore_compression(json.loads(state.read_text()), kept)
        # A checkpoint before the first step, of which the one in the folder must be an equal.
        again, unchanged = communicator.compression_state()
        assert again == json.loads(state.read_text())
        notes.keep("unchanged", {name: array.asnumpy() for name, array in unchanged.items()})
    for step in range(start, end):
        gradients = draw(step, communicator.rank)
        notes.keep(f"2bit/step{step}", reduce(communicator, parameters, gradients))
    compression, kept = communicator.compression_state()
    notes.keep("residuals", {name: array.asnumpy() for name, array in kept.items()})
    if communicator.is_primary:
        state.write_text(json.dumps(compression))
        np.savez(residuals, **{name: array.asnumpy() for name, array in kept.items()})
    notes.keep("state", compression)
    communicator.broadcast_object(None)
    gradients = draw(end, communicator.rank)
    if communicator.rank == communicator.size - 1:
        gradients[1][3] = np.nan
    notes.keep("not finite", reduce(communicator, parameters, gradients))


def run_killed(folder):
    """The last rank dies in the middle of the work."""
    communicator, parameters = HorovodCommunicator([CPU]), make_parameters()
    reduce(communicator, parameters, draw(0, communicator.rank))
    if communicator.rank == communicator.size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    reduce(communicator, parameters, draw(1, communicator.rank))
    (Path(folder) / "survived").touch()


def run_slow(folder):
    """The first rank works for long while the others wait: it computes, and then gets on piece by piece."""
    horovod._BUSY_SHARE = 0.25  # of a core, which other tests want as well; Horovod alone takes a tenth or two
    communicator = HorovodCommunicator([CPU])
    if communicator.is_primary:
        end = time.monotonic() + LONG_S
        while time.monotonic() < end:
            mx.nd.dot(mx.nd.ones((300, 300)), mx.nd.ones((300, 300))).wait_to_read()
        for _ in counted(range(LONG_S), None, None, "piece"):
            time.sleep(1)
    communicator.broadcast_object("worked for long")
    communicator.close()
    (Path(folder) / f"done{communicator.rank}").touch()


def run_different(folder):
    """Each rank exchanges something else, as where they were started with other flags."""
    communicator = HorovodCommunicator([CPU])
    communicator.allgather([0.0] * (communicator.rank + 1))


def run_asleep(folder):
    """The last rank does nothing any more."""
    communicator = HorovodCommunicator([CPU])
    if communicator.rank == communicator.size - 1:
        time.sleep(100_000)
    communicator.broadcast_object("never arrives")


SCENARIOS = {
    "first": run_first,
    "resumed": run_resumed,
    "left": run_left,
    "killed": run_killed,
    "slow": run_slow,
    "different": run_different,
    "asleep": run_asleep,
}

if __name__ == "__main__":
    SCENARIOS[sys.argv[1]](sys.argv[2])
    sys.exit()


# ---------------------------------------------------------------- starting them

TIMEOUT_S = 240


def horovodrun(num_processes, folder, *arguments, meanwhile=lambda process: None):
    """Run Python in so many processes in the folder; the exit code, and all that was printed.

    `meanwhile` is called with horovodrun's process once that has been started.
    """
    command = [Path(sys.executable).with_name("horovodrun"), "-np", num_processes]
    command += ["--gloo"]  # or else it imports MXNet once more, to see whether there is MPI
    command += ["--network-interfaces", "lo", sys.executable, *arguments]
    variables = {
        "HOROVOD_TERMINATION_SECONDS": "5",  # a process that has been stopped hears no signal
        **environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}", OMP_NUM_THREADS="1"),
        "GLUON_LM_CACHE": str(folder / "cache"),
    }
    process = Process(*command, cwd=folder, env=variables, start_new_session=True)
    try:
        meanwhile(process)
        printed, _ = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        for pid in running(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        raise
    wait_until(lambda: not running(folder), 20)
    return process.returncode, printed


def pid_of_rank(rank, folder):
    """Id of the process that trains as this one."""
    (found,) = running(folder, f"{sys.executable}\0-m\0gluon_lm.train\0", f"HOROVOD_RANK={rank}")
    return found


@pytest.fixture(scope="module", params=[2, 3])
def runs(request, tmp_path_factory):
    """All there is to find out with so many processes: a first run, and one that goes on from it."""
    found = []
    folder = tmp_path_factory.mktemp("horovod")
    for scenario in ("first", "resumed"):
        code, printed = horovodrun(request.param, folder, *THIS_FILE, scenario, folder)
        assert code == 0, printed
        found.append(Found(folder, request.param))
    return found


@pytest.fixture
def first(runs):
    return runs[0]


@pytest.fixture
def resumed(runs):
    return runs[1]


# ---------------------------------------------------------------- conformance

COMPRESSIONS = pytest.mark.parametrize("compression", ["none", "fp16", "2bit"])


@with_horovod
@COMPRESSIONS
def test_each_process_knows_its_rank_and_says_so_in_one_line(first, compression):
    size = len(first.ranks)
    assert first.values(f"{compression}/rank") == [[rank, size, rank == 0, rank] for rank in first.ranks]
    for description in first.values(f"{compression}/description"):
        assert "\n" not in description and "Horovod" in description
        assert f"{size} processes" in description and "cpu(0)" in description
        assert ("2-bit" in description) == (compression == "2bit")
        assert ("half precision" in description) == (compression == "fp16")


@with_horovod
@COMPRESSIONS
def test_broadcast_gives_all_the_first_ones_values_and_reducing_leaves_them(first, compression):
    for arrays in first.arrays(f"{compression}/parameters"):
        assert len(arrays) == len(SHAPES)
        for i, shape in enumerate(SHAPES):
            np.testing.assert_array_equal(arrays[str(i)], np.full(shape, 5.0))


@with_horovod
@COMPRESSIONS
def test_reduce_leaves_the_sum_on_every_rank_with_checkpoints_between(first, compression):
    for step in range(3):
        expected = [sum(arrays) for arrays in zip(*(draw_whole_numbers(step, rank) for rank in first.ranks))]
        for arrays in first.arrays(f"{compression}/sum{step}"):
            for i, array in enumerate(expected):
                np.testing.assert_array_equal(arrays[str(i)], array)


@with_horovod
def test_objects_numbers_and_arrays_reach_all_by_rank(first):
    size = len(first.ranks)
    objects = [{"rank": rank, "text": "né\n" * rank, "none": None} for rank in first.ranks]
    assert first.values("gathered") == [objects] * size
    assert first.values("broadcast") == [[0, 0.1]] * size
    for found in first.arrays("exchanged"):
        np.testing.assert_array_equal(found["0"], [[rank + 0.1, np.nan, 1e300] for rank in first.ranks])
    for rank in first.ranks:
        found = first.arrays(f"arrays{rank}")[0]
        np.testing.assert_array_equal(found["0"], np.full((rank + 1, 2), rank + 0.1))
        np.testing.assert_array_equal(found["1"], np.arange(3) + rank)
        assert [array.dtype for array in found.values()] == [np.float64, np.float32]


# ---------------------------------------------------------------- training


@with_horovod
@pytest.mark.parametrize("name", sorted(MODELS))
def test_ten_steps_give_the_parameters_of_one_process(first, name):
    results, expected = train(SingleDevice([CPU]), name)
    on_ranks = first.arrays(f"{name}/parameters")
    for found, values in zip(first.values(f"{name}/results"), on_ranks):
        np.testing.assert_allclose(found, results, rtol=1e-5)
        assert values.keys() == expected.keys()
        for key, value in values.items():
            assert relative_error(value, expected[key]) < 1e-5, key
            np.testing.assert_array_equal(value, on_ranks[0][key])


# ---------------------------------------------------------------- 2-bit compression


@pytest.fixture(scope="module")
def simulated(runs):
    """Sums by step, and the compression after STOP and after all."""
    num_ranks = len(runs[0].ranks)
    compression, sums, waiting = TwoBitCompression(THRESHOLD, CALIBRATION_STEPS), [], {}
    for step in range(END):
        sums.append(compression.reduce([draw(step, rank) for rank in range(num_ranks)]))
        if step + 1 in (STOP, END):
            waiting[step + 1] = [  # in thresholds
                np.concatenate([np.append(array, np.zeros(-array.size % 4, np.float32)) for array in residuals])
                / compression.threshold
                for residuals in compression.residuals
            ]
    return compression, sums, waiting


@with_horovod
def test_two_bits_agree_with_numpy_to_the_bit_in_a_run_that_was_stopped_and_resumed(runs, simulated):
    _, sums, _ = simulated
    for step, expected in enumerate(sums):
        for arrays in runs[step >= STOP].arrays(f"2bit/step{step}"):
            for i, array in enumerate(expected):
                if step < CALIBRATION_STEPS:
                    np.testing.assert_allclose(arrays[str(i)], array, rtol=1e-5, atol=1e-6 * np.abs(array).max())
                else:
                    np.testing.assert_array_equal(arrays[str(i)], array)


@with_horovod
def test_every_rank_has_the_thresholds_of_all_gradients(first, resumed, simulated):
    compression, _, _ = simulated
    assert len(set(compression.factors)) == len(SHAPES)
    for state in (*first.values("state"), *resumed.values("state")):
        assert state["factors"] == compression.factors
        assert state["unsent"]


@with_horovod
def test_the_residuals_of_all_ranks_reach_the_first_and_come_back(first, resumed, simulated):
    _, _, waiting = simulated
    for found, expected in (
        (first.arrays("residuals"), waiting[STOP]),
        (resumed.arrays("unchanged"), waiting[STOP]),
        (resumed.arrays("residuals"), waiting[END]),
    ):
        assert list(found[0]) == [str(rank) for rank in first.ranks]
        assert not any(found[1:])
        for rank, array in enumerate(expected):
            assert np.abs(array).max() > 0.5
            np.testing.assert_array_equal(found[0][str(rank)], array)


@with_horovod
@COMPRESSIONS
def test_while_the_thresholds_are_measured_nothing_waits(first, compression):
    unsent = False if compression == "2bit" else None
    assert first.values(f"{compression}/waiting") == [[unsent, []]] * len(first.ranks)


@pytest.mark.parametrize(
    ("residuals", "threshold", "waiting", "said"),
    [
        ({"0": [1.0, -0.5], "1": [0.25, 0.75]}, 0.5, [0.25, 0.75], []),
        ({"0": [1.0, -0.5], "1": [0.25, 0.75]}, 0.125, [1.0, 3.0], []),  # in units of the threshold
        ({}, 0.5, None, ["the residuals of 2-bit compression could not be kept: what had not been sent is lost"]),
    ],
    ids=["as before", "another threshold", "of another communicator"],
)
def test_a_process_takes_its_own_residuals_or_says_that_they_are_lost(residuals, threshold, waiting, said, caplog):
    communicator = object.__new__(HorovodCommunicator)  # there are no other processes here
    communicator.devices, communicator.rank, communicator.size = [CPU], 1, 2
    communicator._compression, communicator._codecs = Compression(2, threshold), []
    communicator._restored_residual = None
    communicator.gather_arrays = lambda own: [own]
    state = Compression(2, THRESHOLD, unsent=True, factors=[0.25], steps=CALIBRATION_STEPS, square_sums=[9.0])
    with caplog.at_level("INFO", "gluon_lm"):
        communicator.restore_compression(
            state.state_dict(), {rank: mx.nd.array(array) for rank, array in residuals.items()}
        )
    assert caplog.messages == said
    found, own = communicator.compression_state()
    assert found == {**state.state_dict(), "threshold": threshold, "unsent": waiting is not None}
    assert [array.asnumpy().tolist() for array in own.values()] == [waiting] * (waiting is not None)


@with_horovod
def test_a_gradient_that_is_not_finite_on_one_rank_is_seen_on_all(first):
    for arrays in first.arrays("not finite"):
        assert not all(np.isfinite(array).all() for array in arrays.values())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of two processes and 60 steps, compressed from the 20th on: its command, without --save, and its folder."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    rng = np.random.RandomState(1)
    for name, num_lines in (("train", 400), ("valid", 40), ("test", 40)):
        lines = [" ".join(rng.choice(list("abcdefgh"), 8)) for _ in range(num_lines)]
        (folder / f"{name}.txt").write_text("\n".join(lines))
    command = ["-m", "gluon_lm.train", "--horovod", "--cpus", "1", "--gctype", "2bit", "--data", folder]
    command += ["--emsize", "8", "--nhid", "8", "--nlayers", "1", "--batch-size", "4", "--bptt", "5"]
    command += ["--dropout", "0.2", "--checkpoint-every", "30", "--keep-checkpoints", "100000"]
    code, printed = horovodrun(2, folder, *command, "--save", folder / "run", "--max-steps", "60")
    assert code == 0, printed
    lines = [line for line in printed.splitlines() if "<stdout>:" in line]
    assert lines and all(line.startswith("[0]") for line in lines)  # which logs for all
    return command, folder / "run"


def assert_alike(run, other, step):
    """Two runs have the same arrays in their checkpoints of this step, to the bit, and the same thresholds."""
    checkpoints = [folder / "checkpoints" / f"step-{step}" for folder in (other, run)]
    expected, found = (json.loads((path / "state.json").read_text())["compression"] for path in checkpoints)
    assert found == expected and found["factors"]
    for name in ("parameters.npz", "residuals.npz", "carried.npz"):
        expected, found = (dict(np.load(path / name)) for path in checkpoints)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            np.testing.assert_array_equal(found[key], array)
            assert array.any()


@with_horovod
def test_a_run_that_is_resumed_is_the_run_that_was_not_stopped(tmp_path, monkeypatch, uninterrupted):
    """To the bit, with compression on: the last ten of the first 30 steps and all that follow are compressed."""
    monkeypatch.setenv("HOROVOD_TERMINATION_SECONDS", "60")
    new, whole = uninterrupted
    run = tmp_path / "run"

    def interrupt(process):
        wait_until((run / "checkpoints" / "step-30").exists, 200, process)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal's Ctrl-C does

    _, printed = horovodrun(2, tmp_path, *new, "--save", run, "--max-steps", "100000", meanwhile=interrupt)
    (stopped_at,) = re.findall(rf"stopped at step (\d+); continue with --resume {run}", printed)
    assert os.readlink(run / "latest") == f"checkpoints/step-{stopped_at}"
    checkpoint = run / "checkpoints" / "step-30"
    code, printed = horovodrun(2, tmp_path, "-m", "gluon_lm.train", "--resume", checkpoint, "--max-steps", "60")
    assert code == 0, printed
    assert_alike(run, whole, 60)


@with_horovod
def test_ctrl_c_gives_a_process_its_time_where_the_shell_leaves_its_place_to_it(tmp_path, monkeypatch):
    monkeypatch.setenv("HOROVOD_TERMINATION_SECONDS", "60")
    worker, launcher, done = (tmp_path / name for name in ("worker.py", "launcher.py", "done"))
    worker.write_text(
        f"""import pathlib, signal, sys, time
def stop(*_):
    time.sleep(2)
    pathlib.Path({str(done)!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
time.sleep(100)
"""
    )
    launcher.write_text(
        f"""from horovod.runner.common.util.safe_shell_exec import execute
if __name__ == "__main__":
    execute("exec {sys.executable} {worker}")
"""
    )
    process = Process(sys.executable, launcher, start_new_session=True)
    process.wait_for("ready")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert done.exists()


@with_horovod
def test_averaging_and_an_early_end_are_decided_for_all(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("GLUON_LM_CACHE", str(tmp_path / "cache"))
    new, _ = uninterrupted
    flags = [*new, "--gctype", "none", "--dropout", "0", "--lr", "5", "--clip", "0.5", "--eval-every", "3"]
    flags += ["--ntasgd", "--nonmono", "1", "--patience", "3"]
    code, printed = horovodrun(2, tmp_path, *flags, "--save", tmp_path / "together")
    assert code == 0, printed
    alone = [str(word) for word in flags[2:] if word != "--horovod"]
    assert train_alone([*alone, "--save", str(tmp_path / "alone")]) == 0
    together, alone = (events(tmp_path / run) for run in ("together", "alone"))
    assert [event["step"] for event in together] == [event["step"] for event in alone]
    losses = [[event["loss"] for event in run] for run in (together, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert (tmp_path / "together/latest/unaveraged.npz").exists()
    assert "--patience 3 is reached" in printed and "averaging the weights from step" in printed


# ---------------------------------------------------------------- when it goes wrong


@with_horovod
def test_workers_that_are_left_alone_say_so_in_one_line(tmp_path):
    code, printed = horovodrun(3, tmp_path, *THIS_FILE, "left", tmp_path)
    assert code == 0, printed
    *others, _ = range(3)
    told = Found(tmp_path, 3).values("left alone")
    assert [told[rank] for rank in others] == [
        f"worker {rank} of 3: could not exchange data with the others (Horovod has been shut down); "
        "see what they said last, fix that, and continue with --resume"
        for rank in others
    ]


@with_horovod
def test_when_a_process_is_killed_all_end(tmp_path):
    code, _ = horovodrun(2, tmp_path, *THIS_FILE, "killed", tmp_path)
    assert code != 0
    assert not (tmp_path / "survived").exists()


@with_horovod
@pytest.mark.parametrize(
    "variable, seconds, line",
    [
        ("HOROVOD_GLOO_TIMEOUT_SECONDS", "10", "worker 0 of 2: could not exchange data with the others"),
        (
            "GLUON_LM_TIMEOUT",
            "5",
            "worker 0 of 2: one of the others has not been heard from for 5 s (GLUON_LM_TIMEOUT)",
        ),
    ],
)
def test_a_process_that_hangs_ends_all_in_time_and_leaves_the_checkpoint_of_one_that_does_not(
    tmp_path, monkeypatch, uninterrupted, variable, seconds, line
):
    """By gloo's time-out, and by our own, without which MPI would wait for ever."""
    monkeypatch.setenv(variable, seconds)
    new, whole = uninterrupted
    hung, stopped_at = tmp_path / "run", []

    def stop_one(process):
        wait_until((hung / "checkpoints" / "step-30").exists, 200, process)
        os.kill(pid_of_rank(1, tmp_path), signal.SIGSTOP)
        stopped_at.append(time.monotonic())

    code, printed = horovodrun(2, tmp_path, *new, "--save", hung, "--max-steps", "100000", meanwhile=stop_one)
    assert code != 0
    assert time.monotonic() - stopped_at[0] < 40
    assert line in printed
    assert_alike(hung, whole, 30)


@with_horovod
def test_long_work_of_one_process_ends_nobody(tmp_path, monkeypatch):
    monkeypatch.setenv("GLUON_LM_TIMEOUT", "4")
    code, printed = horovodrun(2, tmp_path, *THIS_FILE, "slow", tmp_path)
    assert code == 0, printed
    assert all((tmp_path / f"done{rank}").exists() for rank in range(2))


@with_horovod
@pytest.mark.parametrize(
    "scenario, reason",
    [
        ("asleep", "worker 2 does nothing, and the others wait for it"),
        ("different", "each waits for the others, in vain"),
    ],
)
def test_processes_of_which_none_gets_on_end(tmp_path, monkeypatch, scenario, reason):
    monkeypatch.setenv("GLUON_LM_TIMEOUT", "4")
    code, printed = horovodrun(3, tmp_path, *THIS_FILE, scenario, tmp_path)
    assert code != 0
    what = "no process has made progress for 4 s (GLUON_LM_TIMEOUT)"
    assert f"of 3: {what}: {reason}; fix that, and continue with --resume\n" in printed


def refused(*arguments):
    with pytest.raises(DistributedError) as caught:
        HorovodCommunicator(*arguments)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("--") and "horovodrun -np 2 python -m gluon_lm.train" in message
    return message


def test_several_devices_in_a_process_are_refused():
    assert "each process has one device, not 2 (cpu(0) to cpu(1))" in refused([mx.cpu(0), mx.cpu(1)])


def test_without_horovod_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod", None)
    monkeypatch.setitem(sys.modules, "horovod.mxnet", None)
    message = refused([CPU])
    assert "bash scripts/install_horovod.sh" in message and message.endswith("or go on without: --no-horovod")


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf"])
def test_a_timeout_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("GLUON_LM_TIMEOUT", value)
    with pytest.raises(DistributedError, match=f"^GLUON_LM_TIMEOUT={value}: must be a number of seconds above 0"):
        HorovodCommunicator([CPU])


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc here")
def test_nccl_is_refused_for_processes_on_one_gpu_and_not_for_those_that_see_their_own_as_the_first(
    monkeypatch, tmp_path
):
    def join(driver, *others):
        """What a process on GPU 0 of this driver tells the others, having heard of them."""
        monkeypatch.setattr(gpus, "DRIVER", str(driver))
        communicator, told = object.__new__(HorovodCommunicator), []
        communicator.devices, communicator.rank = [mx.gpu(0)], 0
        communicator.allgather_object = lambda own: told.append(own) or [own, *others]
        communicator._refuse_shared_gpus()
        return told[0]

    first, second = (compile_driver(tmp_path / name, [(name, 7, 0)], soname=name)[0] for name in ("first", "second"))
    assert join(second, join(first))
    for driver in (first, "there is none"):
        with pytest.raises(DistributedError, match=r"workers 0, 1 share gpu\(0\)"):
            join(driver, join(driver))


@with_horovod
def test_a_process_that_nothing_has_started_as_one_of_several_is_refused(monkeypatch):
    for variable in ("HOROVOD_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK"):
        monkeypatch.delenv(variable, raising=False)
    message = refused([CPU])
    assert "this process was not started as one of several" in message
    assert message.endswith("or go on without: --no-horovod --gctype none")
