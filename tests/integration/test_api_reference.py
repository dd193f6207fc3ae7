"""The API reference: every public name has its place, and nothing in it is warned of."""

from __future__ import annotations

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
from processes import ROOT

SCRIPT = ROOT / "scripts" / "api_reference.py"


def test_every_public_name_has_its_place_and_nothing_is_warned_of(tmp_path, capsys):
    pytest.importorskip("pdoc", reason="bash scripts/environment.sh test")
    spec = importlib.util.spec_from_file_location("api_reference", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    code = script.main([str(tmp_path)])
    printed = capsys.readouterr()
    assert (code, printed.err) == (0, "")
    assert Path(printed.out.strip()).is_file()
    modules = script.package_modules()
    assert {"gluon_lm", "gluon_lm.config", "gluon_lm.training.trainer"} < modules.keys()
    missing = []
    for name, module in modules.items():
        page = (tmp_path / f"{name.replace('.', '/')}.html").read_text(encoding="utf-8")
        places = set(re.findall(r'id="([^"]+)"', page))
        missing += [f"{name}.{public}" for public in public_names(module) if public not in places]
    assert missing == []
    knobs = (tmp_path / "gluon_lm/config/sections.html").read_text(encoding="utf-8")
    assert "threshold of the 2-bit compression" in knobs


def public_names(module):
    """What a module lists, or else the classes and functions that it defines, with their methods."""
    if hasattr(module, "__all__"):
        yield from (name for name in module.__all__ if not name.startswith("__"))
        return
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(value) or inspect.isclass(value):
            yield name
        if inspect.isclass(value):
            yield from (
                f"{name}.{member}"
                for member, of in vars(value).items()
                if inspect.isfunction(of) and not member.startswith("_") and of.__doc__
            )
