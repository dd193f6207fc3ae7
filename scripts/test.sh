#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k vocabulary
# Without any, the linter, the type checker and the search for dead code run first. -m "slow or gpu" runs what is left out otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu test
cd "$ROOT"

# The page of `gluon_lm.serve` is tested in a real browser, which is no Python package.
if ! command -v chromium chromium-browser google-chrome >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
    echo "installing chromium for the tests of the web page"
    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium; } \
        </dev/null >/dev/null 2>&1 || echo "chromium cannot be installed; the tests of the web page are skipped"
fi

checks=0
if [ $# -eq 0 ]; then
    python -m ruff check . </dev/null || checks=$?
    python -m mypy </dev/null || checks=$?
    python -m vulture </dev/null || checks=$?
fi
tests=0
python -m pytest -q -m "not slow and not gpu" "$@" </dev/null || tests=$?
[ "$tests" -eq 0 ] || exit "$tests"
exit "$checks"
