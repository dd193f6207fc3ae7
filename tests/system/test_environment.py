"""The script that makes the environment of a checkout, with a Python that only notes what it is asked for."""

from __future__ import annotations

import os
import subprocess

import pytest
from processes import ROOT

STUB = """#!/bin/sh
echo "$*" >>"{log}"
case "$*" in
    *" -e "*) [ -z "$PYTHONPATH$PIP_TARGET$PIP_PREFIX" ] && [ "$PIP_USER" = 0 ] || exit 1 ;;
    "-c import os"*) [ -z "$PYTHONHOME" ] && echo stub 3.11 ;;
    *"pip show -q {mxnet}") ;;
    *"pip show"*) exit 1 ;;
esac
"""


def environment_with(folder, extras, mxnet):
    """An environment that has these extras, and the file in which its Python notes what it is asked for."""
    venv, log = folder / "an environment", folder / "log"
    python = venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(STUB.format(log=log, mxnet=mxnet))
    python.chmod(0o755)
    (venv / ".gluon_lm-installed").write_text(f"{venv} stub 3.11\nof another setup.py\n{extras}\n")
    return venv, log


def install(venv, *extras, **settings):
    environment = {**os.environ, "GLUON_LM_VENV": str(venv), **settings}
    environment.pop("PYTHON", None)
    words = ["bash", "scripts/environment.sh", *extras]
    return subprocess.run(words, cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True)


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
    venv, log = environment_with(tmp_path, there, mxnet)
    done = install(venv, *asked.split(), PYTHONPATH="/theirs", PIP_TARGET="/theirs", PIP_USER="1")
    assert done.returncode == 0, done.stderr
    calls = log.read_text().splitlines()
    (call,) = [call for call in calls if " -e " in call]
    assert call.endswith(f" -e .[{installed}]")
    assert [call.split(" -y ")[1] for call in calls if "pip uninstall" in call] == ([removed] if removed else [])
    assert (venv / ".gluon_lm-installed").read_text().splitlines()[2] == installed.replace(",", " ")


def test_an_installation_that_fails_leaves_the_environment_as_it_was(tmp_path):
    venv, log = environment_with(tmp_path, "cpu test", "mxnet")
    before = (venv / ".gluon_lm-installed").read_text()
    (venv / "bin" / "python").write_text(STUB.format(log=log, mxnet="mxnet").replace('*" -e "*)', '*" -e "*) exit 1;'))
    done = install(venv, "docs")
    assert done.returncode == 2 and "the installation failed, see above" in done.stderr
    assert (venv / ".gluon_lm-installed").read_text() == before
    assert {path.name for path in venv.iterdir()} == {"bin", ".gluon_lm-installed"}


def test_nothing_is_installed_a_second_time(tmp_path):
    venv, log = environment_with(tmp_path, "cpu", "mxnet")
    assert install(venv, "cpu").returncode == 0
    log.unlink()
    assert install(venv, "cpu").stdout == f"{venv} has gluon_lm with: cpu\n"
    assert " -e " not in log.read_text()


def test_an_environment_that_is_made_anew_has_the_extras_that_were_there(tmp_path):
    """As after an upgrade of Python, or an installation that was killed."""
    venv, log = environment_with(tmp_path, "cu112 docs", "mxnet-cu112")
    python = tmp_path / "python"
    stub = STUB.format(log=log, mxnet="mxnet-cu112").replace("stub 3.11", "other 3.11.9")
    making = (
        f'"-c import os, sys;"*) echo {python}; exit ;; *"-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;'
    )
    python.write_text(stub.replace('case "$*" in', f'case "$*" in {making}'))
    python.chmod(0o755)
    (venv / ".gluon_lm-installed").rename(venv / ".gluon_lm-installed.before")
    (venv / ".gluon_lm-owned").touch()
    environment = {**os.environ, "GLUON_LM_VENV": str(venv), "PYTHON": str(python)}
    words = ["bash", "scripts/environment.sh", "cpu", "test"]
    done = subprocess.run(words, cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{venv} has gluon_lm with: cu112 docs test"

    (venv / ".gluon_lm-installed").write_text("of another Python\n\ncu112 docs\n")
    works = python.read_text()
    python.write_text(works.replace('*" -e "*)', '*" -e "*) exit 1;'))
    assert subprocess.run(words, cwd=ROOT, env=environment, timeout=60, capture_output=True).returncode == 2
    python.write_text(works)
    done = subprocess.run(words, cwd=ROOT, env=environment, timeout=60, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == f"{venv} has gluon_lm with: cu112 docs test"


def test_a_folder_that_is_no_environment_of_ours_is_left_alone(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    done = install(tmp_path / "work", "cpu")
    assert done.returncode == 2 and "exists and was not made by this script" in done.stderr
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("extra", ["cu118", "doc", "--help"])
def test_an_extra_that_is_none_changes_nothing(tmp_path, extra):
    venv, log = environment_with(tmp_path, "cpu test", "mxnet")
    done = install(venv, "cpu", extra)
    assert done.returncode == 2 and not log.exists()
    assert done.stderr.startswith(f"{extra}: is not an extra of setup.py; name some of cpu cu112 cu117 ")


def test_it_finds_its_checkout_whatever_the_shell_is_told(tmp_path):
    venv, _ = environment_with(tmp_path, "cpu", "mxnet")
    done = install(venv, "cpu", CDPATH=f".:{tmp_path}", PYTHONHOME="/nowhere")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f"{venv} has gluon_lm with: cpu\n")
