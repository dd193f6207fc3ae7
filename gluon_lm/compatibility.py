"""What MXNet 1.9.1 expects of Python, of numpy and of the dynamic loader, supplied just before it is imported.

MXNet was written for numpy 1.19 and Python 3.8. `supply_when_imported` is called when gluon_lm is imported, so that
MXNet works whichever module imports it after that; until then nothing is loaded and nothing changed. gluonnlp, where
it is used, needs nothing more.
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
    """Prepare this process for importing MXNet.

    Parameters
    ----------
    package : str
        The file ``mxnet/__init__.py``.

    Raises
    ------
    MissingDependency
        If a shared library or a Python package is missing.
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
    _restore_numpy()
    libraries.preload(Path(package).parent)


def _restore_numpy() -> None:
    """Restore what MXNet uses of numpy and newer versions removed or changed."""
    from functools import partial

    import numpy as np

    names: dict[str, object] = {"bool": bool}  # removed in 1.24; 2.0 has the name again, for another type
    if np.lib.NumpyVersion(np.__version__) >= "2.0.0":
        names = {
            **dict.fromkeys(("NaN", "NAN"), np.nan),
            **dict.fromkeys(("Inf", "PINF"), np.inf),
            **{"NINF": -np.inf, "PZERO": 0.0, "NZERO": -0.0},
            **{"alltrue": np.all, "sometrue": np.any, "product": np.prod, "round_": np.round},
            **{
                "in1d": np.isin,
                "row_stack": np.vstack,
                "msort": partial(np.sort, axis=0),
                "trapz": vars(np)["trapezoid"],
            },
            # Since 1.20 these raised when they were called.
            **dict.fromkeys(("mirr", "npv", "pmt", "ppmt", "pv", "rate")),
        }
        # MXNet passes shapes to its library as text, which cannot parse "(np.int64(2), 3)".
        np.set_printoptions(legacy="1.25")  # type: ignore[arg-type]
    for name, value in names.items():
        if name not in vars(np):  # hasattr would make numpy warn of names that it is about to remove
            setattr(np, name, value)
