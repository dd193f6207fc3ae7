#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k vocabulary
# Without any, Horovod is built where it is missing, two processes share the tests, and the linter, the type checker and
# the search for dead code run beside them and have the last word. -m "slow or gpu" runs what is left out otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/test_environment.sh"

check_sources() {
    local failed=0
    python -m ruff check . || failed=$?
    python -m mypy || failed=$?
    python -m vulture || failed=$?
    return "$failed"
}

processes=()
if [ $# -eq 0 ]; then
    install_debian_packages
    install_horovod
    processes=(--numprocesses 2 --dist loadfile --no-loadscope-reorder) # in the order of tests/conftest.py
    said="$(mktemp)"
    trap 'rm -f "$said"' EXIT
    check_sources </dev/null >"$said" 2>&1 &
fi
tests=0 checks=0
python -m pytest -q -m "not slow and not gpu" "${processes[@]}" "$@" </dev/null || tests=$?
if [ $# -eq 0 ]; then
    wait $! || checks=$?
    cat "$said"
fi
[ "$tests" -eq 0 ] || exit "$tests"
exit "$checks"
