"""Every public name of the package says what it is, or inherits that."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import gluon_lm

MODULES = [module.name for module in pkgutil.walk_packages(gluon_lm.__path__, "gluon_lm.") if "__" not in module.name]


def public_names(owner, module: str):
    """Name and value of what `owner`, a module or a class, defines itself: classes, functions, properties."""
    for name, value in vars(owner).items():
        is_ours = getattr(getattr(value, "__func__", value), "__module__", module) == module
        is_kind = inspect.isclass(value) or inspect.isroutine(value) or isinstance(value, property)
        if is_ours and is_kind and not name.startswith("_"):
            yield name, value


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_is_documented(name):
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gluon_lm"):
            raise
        pytest.skip(str(error))
    missing = []
    for own_name, value in public_names(module, name):
        if not inspect.getdoc(value):
            missing.append(own_name)
        if inspect.isclass(value):
            # By getattr a method that overrides another has the documentation of that one.
            members = [member for member, _ in public_names(value, name) if not inspect.getdoc(getattr(value, member))]
            missing += [f"{own_name}.{member}" for member in members]
    assert missing == []


def test_type_checkers_see_the_names_of_the_package_that_it_loads_on_use():
    module = ast.parse(Path(gluon_lm.__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(module) if isinstance(node, ast.ImportFrom)]
    seen = {name.asname: node.module for node in imports for name in node.names}
    loaded = {name: getattr(gluon_lm, name).__module__ for name in gluon_lm.__all__ if name != "__version__"}
    assert seen.keys() - {None} == loaded.keys()
    for name, home in loaded.items():
        assert f"{home}.".startswith(f"gluon_lm.{seen[name]}."), name
