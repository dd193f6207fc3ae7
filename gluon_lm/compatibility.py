"""What MXNet 1.9.1 expects of Python, of numpy and of the dynamic loader, supplied just before it is imported.

MXNet was written for numpy 1.19 and Python 3.8. `supply_when_imported` is called when gluon_lm is imported, so that
whoever imports MXNet after that, by whatever module, finds a world in which it works; until then nothing is loaded
and nothing changed. gluonnlp, where it is used, needs nothing more.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType


def supply_when_imported() -> None:
    """Have `supply` called when MXNet is imported for the first time."""
    if "mxnet" not in sys.modules and _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


class _Finder:
    """Finds the package ``mxnet`` as Python does, but has it loaded by `_Loader`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "mxnet":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        supply(self.path)
        super().exec_module(module)


def supply(package: str) -> None:
    """Make this process one in which MXNet can be imported.

    Parameters
    ----------
    package : str
        The file ``mxnet/__init__.py``.

    Raises
    ------
    MissingDependency
        For a shared library or a Python package that is not there.
    """
    from importlib.util import find_spec
    from pathlib import Path

    from . import libraries
    from .errors import MissingDependency

    if find_spec("distutils") is None:  # gone from Python 3.12; setuptools brings it when it is imported
        try:
            import setuptools  # noqa: F401
        except ImportError as error:
            raise MissingDependency(
                "MXNet needs distutils, which Python no longer has: pip install setuptools"
            ) from error
    _supply_numpy_names()
    libraries.preload(Path(package).parent)


def _supply_numpy_names() -> None:
    """Give numpy back the names that MXNet uses and newer versions removed."""
    import numpy as np

    if not hasattr(np, "bool"):  # removed in 1.24, and another thing again in 2.0
        np.bool = bool
