#!/usr/bin/env bash
# Runs the tests and reports which lines of gluon_lm/ none of them reaches, processes that they start included; at least
# 90 % must be reached. One process runs them all, so it takes twice as long as scripts/test.sh. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/test_environment.sh"

install_debian_packages
install_horovod
export COVERAGE_FILE="$ROOT/.coverage" COVERAGE_RCFILE="$ROOT/pyproject.toml"
python -m coverage erase
tests=0
python -m coverage run -m pytest -q -m "not slow and not gpu" "$@" </dev/null || tests=$?
python -m coverage combine --quiet
python -m coverage report || tests=$?
exit "$tests"
