#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k vocabulary
# Without any, Horovod is built where it is missing, and the linter, the type checker and the search for dead code run
# first, and two processes share the tests. -m "slow or gpu" runs what is left out otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/test_environment.sh"

checks=0
processes=()
if [ $# -eq 0 ]; then
    install_horovod
    processes=(--numprocesses 2 --dist loadfile)
    python -m ruff check . </dev/null || checks=$?
    python -m mypy </dev/null || checks=$?
    python -m vulture </dev/null || checks=$?
fi
tests=0
python -m pytest -q -m "not slow and not gpu" "${processes[@]}" "$@" </dev/null || tests=$?
[ "$tests" -eq 0 ] || exit "$tests"
exit "$checks"
