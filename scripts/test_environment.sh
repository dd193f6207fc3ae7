# Sourced by scripts/test.sh and scripts/coverage.sh: sets up what the tests need and is missing.
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# What some tests need and is no Python package. Where it cannot be had, they are skipped and say so.
install_debian_packages() {
    local missing=() package
    needs() {  # PACKAGE COMMAND...: of which one is enough
        PATH="$PATH:/usr/sbin:/sbin" command -v "${@:2}" >/dev/null || missing+=("$1")
    }
    needs chromium chromium chromium-browser google-chrome  # the page of gluon_lm.serve
    needs curl curl                                         # the commands of the documentation
    needs iproute2 ip                                       # networks between namespaces
    needs openssh-client ssh                                # hosts that are reached by ssh
    [ -d /run/systemd/system ] || needs openssh-server sshd # not where it would be started for all the world
    needs cmake cmake                                       # Horovod
    needs make make
    needs g++ g++
    if [ ${#missing[@]} -gt 0 ] && can_install; then
        apt_get update || true
        for package in "${missing[@]}"; do
            echo "installing $package for the tests"
            apt_get install --no-install-recommends "$package" ||
                echo "$package cannot be installed; the tests that need it are skipped"
        done
    fi
}

# It takes one or two minutes to build, once for each environment.
install_horovod() {
    bash "$ROOT/scripts/install_horovod.sh" </dev/null ||
        echo "Horovod cannot be built; the tests that need it are skipped"
}

use_environment cpu test
cd "$ROOT"

# The models of the tests are small, and threads that wait actively would keep each other from the processors. MXNet
# cannot be imported where this is a list.
case "${OMP_NUM_THREADS:-}" in "" | *[!0-9]*) export OMP_NUM_THREADS=1 ;; esac
