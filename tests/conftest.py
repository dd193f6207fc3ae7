"""What holds for all tests."""

from __future__ import annotations

import pytest
from hypothesis import settings

import gluon_lm  # noqa: F401  # before any test imports MXNet

settings.register_profile("gluon_lm", deadline=None)  # no test is timed
settings.load_profile("gluon_lm")


def pytest_collection_modifyitems(items):
    """Skip the tests marked ``gpu`` where MXNet sees none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import mxnet as mx

    if not mx.context.num_gpus():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="MXNet sees no GPU here"))
