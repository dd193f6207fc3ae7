"""What holds for all tests."""

from __future__ import annotations

import logging
import os
import signal

import pytest
from hypothesis import HealthCheck, settings

import gluon_lm  # noqa: F401  # before any test imports MXNet
from gluon_lm.logs import LOGGER

# Several processes share the test files, and what is begun last should be short, or one waits for the other in the end.
LONGEST_FIRST = (
    *("cluster", "horovod", "train", "faults", "network", "launch", "documentation", "regularised", "serve"),
    *("parameter_server", "reproduce", "generation", "kills", "terminal", "use", "training_step"),
)

# Before MXNet is used: on GPUs, masks as the commands draw them, and products that are those of a CPU.
os.environ.setdefault("MXNET_GPU_PARALLEL_RAND_COPY", "1")
os.environ.setdefault("MXNET_USE_FUSION", "0")
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

# What nohup, or a shell that starts the tests in the background, has them ignore, all that they start would ignore too.
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

_OF_LIBRARIES = ("MXNET_", "OMP_", "GOMP_", "NVIDIA_", "DNNL_")
_ENVIRONMENT = {name: value for name, value in os.environ.items() if name.startswith(_OF_LIBRARIES)}

# No test is timed, and each run of the tests is like the last. To look for more: --hypothesis-profile search
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow], max_examples=1000)
settings.register_profile("gluon_lm", settings.get_profile("search"), max_examples=50, derandomize=True)
settings.load_profile("gluon_lm")


def pytest_runtest_setup():
    """Forget what a command that an earlier test ran in this process set for it: where the log goes, and what MXNet
    reads each time it is used, such as whose recurrent layers are taken."""
    for name in [name for name in os.environ if name.startswith(_OF_LIBRARIES)]:
        del os.environ[name]
    os.environ.update(_ENVIRONMENT)
    LOGGER.handlers.clear()
    LOGGER.setLevel(logging.NOTSET)
    LOGGER.propagate = True


@pytest.fixture
def bfloat16(monkeypatch):
    """Have --amp bfloat16 accepted where the processor lacks its instructions: oneDNN then takes others of AVX-512."""
    from gluon_lm.models import precision

    flags = precision.cpu_flags()
    if "avx512bw" not in flags:
        pytest.skip("this processor lacks AVX-512")
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags | {"avx512_bf16"})


def pytest_collection_modifyitems(items):
    """Begin with the longest files, and skip the tests marked ``gpu`` where MXNet sees none."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import mxnet as mx

    if not mx.context.num_gpus():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="MXNet sees no GPU here"))
