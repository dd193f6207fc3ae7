#!/usr/bin/env bash
# Runs the tests and reports which lines of gluon_lm/ none of them reaches, processes that they start included; at least
# 90 % must be reached. One process runs them all, so it takes longer than scripts/test.sh. Arguments go to pytest.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu test
cd "$ROOT"
export COVERAGE_FILE="$ROOT/.coverage" COVERAGE_RCFILE="$ROOT/pyproject.toml"
python -m coverage erase
tests=0
python -m coverage run -m pytest -q -m "not slow and not gpu" "$@" </dev/null || tests=$?
python -m coverage combine --quiet
python -m coverage report || tests=$?
exit "$tests"
