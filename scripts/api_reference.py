"""Writes the API reference from the docstrings, a page for each module: ``python scripts/api_reference.py [FOLDER]``.

Begin reading at docs/api/index.html, or FOLDER/index.html. Needs some extras: bash scripts/environment.sh cpu docs
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import pkgutil
import sys
import typing
import warnings
from pathlib import Path
from types import ModuleType

import pdoc
import pdoc.render

import gluon_lm
from gluon_lm.config.sections import Section

ROOT = Path(__file__).resolve().parents[1]


def package_modules() -> dict[str, ModuleType]:
    """Every module of the package by its full name; not ``__main__``, which has nothing to call."""
    found = pkgutil.walk_packages(gluon_lm.__path__, f"{gluon_lm.__name__}.")
    names = [gluon_lm.__name__, *(info.name for info in found if not info.name.endswith(".__main__"))]
    return {name: importlib.import_module(name) for name in names}


def write_pages(folder: Path) -> list[str]:
    """Write the reference into a folder.

    Returns
    -------
    list of str
        What was warned of: a docstring or an annotation that cannot be rendered as it is meant.
    """
    modules = package_modules()
    for module in modules.values():
        _make_plain(module)
    pdoc.render.configure(docformat="numpy", footer_text=f"gluon_lm {gluon_lm.__version__}", show_source=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        # Of a package that lists its names, pdoc takes these; of any other, its modules.
        pdoc.pdoc(*(name for name in modules if _is_listed(name, modules)), output_directory=folder)
    return [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]


def _is_listed(name: str, modules: dict[str, ModuleType]) -> bool:
    parent = modules.get(name.rpartition(".")[0])
    return parent is None or hasattr(parent, "__all__")


def _make_plain(module: ModuleType) -> None:
    """Put into a module what pdoc would not find: names that are loaded at first use, types of named tuples, knobs."""
    for name in getattr(module, "__all__", []):
        vars(module).setdefault(name, getattr(module, name))
    for value in vars(module).values():
        if isinstance(value, type) and value.__module__ == module.__name__ and hasattr(value, "_fields"):
            value.__new__.__annotations__ = typing.get_type_hints(value)
        if isinstance(value, type) and value.__module__ == module.__name__ and issubclass(value, Section):
            value.__doc__ = f"{inspect.cleandoc(value.__doc__ or '')}\n\n{_knobs_of(value)}"


def _knobs_of(section: type[Section]) -> str:
    """The fields of a section as a docstring has them: what their flags' help says."""
    lines = ["Attributes", "----------"]
    for declared in dataclasses.fields(section):
        lines += [f"{declared.name} : {declared.type}", f"    {declared.metadata['help']}"]
    return "\n".join(lines) if len(lines) > 2 else ""


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit code, 1 where something was warned of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "api", metavar="FOLDER")
    folder = parser.parse_args(argv).folder
    problems = write_pages(folder)
    for problem in problems:
        print(f"warning: {problem}", file=sys.stderr)
    print(folder / "index.html")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
