"""The script that makes the environment of a checkout, with a Python that only notes what it is asked for."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "environment.sh"
STUB = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in
    "-c import os"*) echo stub 3.11 ;;
    *"pip show -q {mxnet}") ;;
    *"pip show"*) exit 1 ;;
esac
"""


@pytest.mark.parametrize(
    "there, mxnet, asked, installed, removed",
    [
        ("cu112", "mxnet-cu112", "cpu test", "cu112,test", None),
        ("cpu test", "mxnet", "cu112", "cu112,test", "mxnet-cu112 mxnet"),
        ("cu112", "mxnet-cu112", "cu117", "cu117", "mxnet-cu117 mxnet-cu112"),
        ("cpu", "mxnet", "cpu docs", "cpu,docs", None),
    ],
)
def test_an_environment_has_one_mxnet(tmp_path, there, mxnet, asked, installed, removed):
    venv, log = tmp_path / "an environment", tmp_path / "log"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(log=log, mxnet=mxnet))
    python.chmod(0o755)
    (venv / ".gluon_lm-installed").write_text(f"{venv} stub 3.11\nof another setup.py\n{there}\n")
    environment = {**os.environ, "GLUON_LM_VENV": str(venv)}
    environment.pop("PYTHON", None)
    subprocess.run(["bash", SCRIPT, *asked.split()], env=environment, check=True, timeout=60, capture_output=True)
    calls = log.read_text().splitlines()
    (call,) = [call for call in calls if " -e " in call]
    assert call.endswith(f" -e .[{installed}]")
    assert [call.split(" -y ")[1] for call in calls if "pip uninstall" in call] == ([removed] if removed else [])
    assert (venv / ".gluon_lm-installed").read_text().splitlines()[2] == installed.replace(",", " ")
