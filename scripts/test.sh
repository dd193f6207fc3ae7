#!/usr/bin/env bash
# Sets up what is missing and runs the tests. Arguments go to pytest: bash scripts/test.sh tests/unit -k vocabulary
# Without any, Horovod is built where it is missing, and the linter, the type checker and the search for dead code run
# first, and two processes share the tests. -m "slow or gpu" runs what is left out otherwise.
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

use_environment cpu test
cd "$ROOT"

# What some tests need and is no Python package. Where it cannot be had, they are skipped and say so.
missing=()
needs() {  # PACKAGE COMMAND...: of which one is enough
    PATH="$PATH:/usr/sbin:/sbin" command -v "${@:2}" >/dev/null || missing+=("$1")
}
needs chromium chromium chromium-browser google-chrome  # the page of gluon_lm.serve
needs iproute2 ip                                       # networks between namespaces
needs openssh-client ssh                                # hosts that are reached by ssh
[ -d /run/systemd/system ] || needs openssh-server sshd # not where it would be started for all the world
needs cmake cmake                                       # Horovod
needs make make
needs g++ g++
if [ ${#missing[@]} -gt 0 ] && command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null >/dev/null 2>&1 || true
    for package in "${missing[@]}"; do
        echo "installing $package for the tests"
        apt-get install -qq -y --no-install-recommends "$package" </dev/null >/dev/null 2>&1 ||
            echo "$package cannot be installed; the tests that need it are skipped"
    done
fi

# It takes one or two minutes to build, once for each environment.
if [ $# -eq 0 ]; then
    bash scripts/install_horovod.sh </dev/null || echo "Horovod cannot be built; the tests that need it are skipped"
fi

# The models of the tests are small, and threads that wait actively would keep each other from the processors.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

checks=0
processes=()
if [ $# -eq 0 ]; then
    processes=(--numprocesses 2 --dist loadfile)
    python -m ruff check . </dev/null || checks=$?
    python -m mypy </dev/null || checks=$?
    python -m vulture </dev/null || checks=$?
fi
tests=0
python -m pytest -q -m "not slow and not gpu" "${processes[@]}" "$@" </dev/null || tests=$?
[ "$tests" -eq 0 ] || exit "$tests"
exit "$checks"
