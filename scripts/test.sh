#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k vocabulary
# Without any, the linter and the type checker run first. -m "slow or gpu" runs what is left out otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu test
cd "$ROOT"

checks=0
if [ $# -eq 0 ]; then
    python -m ruff check . </dev/null || checks=$?
    python -m mypy </dev/null || checks=$?
fi
tests=0
python -m pytest -q -m "not slow and not gpu" "$@" </dev/null || tests=$?
[ "$tests" -eq 0 ] || exit "$tests"
exit "$checks"
