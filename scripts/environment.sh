#!/usr/bin/env bash
# The virtual environment of a checkout. The other scripts source this file and call `use_environment EXTRA...`;
# by itself, `bash scripts/environment.sh EXTRA...` installs extras of setup.py (cpu where none is named), and
# `bash scripts/environment.sh peers` what scripts/benchmark.py compares with.
#
#   GLUON_LM_VENV  where the environment lies (default: .venv in the checkout)
#   PYTHON         the Python that it is made with (default: the first usable one of python3.11, python3, ...)

unset CDPATH PYTHONHOME  # of which one makes cd print where it goes, and the other misleads the environment's Python
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
VENV="$(realpath -m "${GLUON_LM_VENV:-$ROOT/.venv}")"
export GLUON_LM_VENV="$VENV"           # for the scripts that another one starts in another folder
case "${PYTHON:-}" in */*) PYTHON="$(realpath -sm "$PYTHON")" && export PYTHON ;; esac
OWNED="$VENV/.gluon_lm-owned"          # written first: this folder is ours to delete
INSTALLED="$VENV/.gluon_lm-installed"  # written last: the installation is whole, and of what

fail() {
    printf '%s\n' "$*" >&2
    exit 2
}

# Names the Python $1: what an environment made with it depends on. Fails where it does not run.
describe_python() {
    "$1" -c 'import os, platform, sys; print(os.path.realpath(sys.executable), platform.python_version())' 2>/dev/null
}

is_supported() {
    "$1" -c 'import sys; sys.exit(not (3, 9) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1
}

find_python() {
    local candidate seen=""
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" && { printf '%s\n' "$PYTHON"; return; }
        fail "PYTHON=$PYTHON: $("$PYTHON" --version 2>&1 | head -n 1); Python 3.9 to 3.12 is needed"
    fi
    for candidate in python3.11 python3.12 python3.10 python3 python python3.9; do
        command -v "$candidate" >/dev/null || continue
        is_supported "$candidate" && { printf '%s\n' "$candidate"; return; }
        seen="$seen $candidate ($("$candidate" --version 2>&1 | head -n 1))"
    done
    fail "Python 3.9 to 3.12 is needed and not among${seen:- the commands here}; install one," \
        "as in 'apt-get install python3.11 python3.11-venv', or name it with PYTHON=/path/to/python"
}

# What decides whether an installation is up to date.
fingerprint() {
    printf '%s\n' "$ROOT"
    cat "$ROOT/setup.py"
    sed -n '/^\[build-system\]/,/^$/p' "$ROOT/pyproject.toml"
    grep '^__version__' "$ROOT/gluon_lm/__init__.py"
}

# Whether the environment is whole, stands where it was made, and has the Python it was made with.
is_whole() {
    local described
    [ -f "$INSTALLED" ] || return 1
    described="$(describe_python "$VENV/bin/python")" || return 1
    [ "$(sed -n 1p "$INSTALLED")" = "$VENV $described" ] || return 1
    [ -z "${PYTHON:-}" ] || [ "$(describe_python "$PYTHON")" = "$described" ]
}

# Debian packages, as root. A machine that has just booted may be installing others, which is waited for.
can_install() { command -v apt-get >/dev/null && [ "$(id -u)" -eq 0 ]; }
apt_get() { DEBIAN_FRONTEND=noninteractive apt-get -qq -y -o DPkg::Lock::Timeout=300 "$@" </dev/null >/dev/null 2>&1; }

# Debian's Python makes no environments without it.
install_venv() {
    if can_install; then
        echo "installing $1"
        apt_get update || true
        apt_get install --no-install-recommends "$1" || true
    fi
}

# With a note of the extras $1, for the case that their installation fails: of no Python, so it is made anew then.
make_environment() {
    local python version
    python="$(find_python)" || exit $?
    # An active environment's Python is a link, maybe into the folder that is about to go.
    python="$("$python" -c 'import os, sys; print(os.path.realpath(sys.executable))')"
    version="$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')"
    "$python" -c 'import ensurepip, venv' 2>/dev/null || install_venv "python$version-venv"
    "$python" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$python cannot make virtual environments: apt-get install python$version-venv, then run this again"
    if [ -e "$VENV" ]; then
        [ -f "$OWNED" ] || [ -z "$(ls -A "$VENV")" ] ||
            fail "$VENV: exists and was not made by this script; set GLUON_LM_VENV to another folder, or remove it"
        rm -f "$INSTALLED"
        find "$VENV" -mindepth 1 ! -name "${OWNED##*/}" -delete  # all but what says that it may be deleted
        [ -z "$1" ] || printf '\n\n%s\n' "$1" >"$INSTALLED.before"
    fi
    printf 'making %s with %s\n' "$VENV" "$(describe_python "$python")"
    { mkdir -p "$VENV" && touch "$OWNED"; } || fail "$VENV: cannot be made; set GLUON_LM_VENV to a folder of yours"
    "$python" -m venv "$VENV"
}

# pip for this environment, whatever other place the user's environment variables name.
pip() {
    PIP_USER=0 PIP_TARGET= PIP_PREFIX= PIP_ROOT= PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip "$@"
}

pip_install() {
    local quiet=--quiet
    [ -t 1 ] && quiet=--progress-bar=on
    pip install --no-input "$quiet" "$@" </dev/null ||
        fail "the installation failed, see above; running this again starts it anew"
}

# The extras named, each once, but of several that bring an MXNet only one: the last for GPUs, or else that for CPUs.
with_one_mxnet() {
    printf '%s\n' "$@" | awk '
        /^cu[0-9]+$/ { gpu = $0; next }
        $0 == "cpu" { cpu = $0; next }
        $0 && !seen[$0]++
        END { if (gpu) print gpu; else if (cpu) print cpu }' | sort | paste -s -d " "
}

# Makes $VENV hold gluon_lm (editable) with the extras named, those installed before included, and puts it on PATH.
# Nothing is installed where it does already.
use_environment() {
    local wanted hash extra extras file before=""
    extras="$(sed -n '/^EXTRAS = {/,/^}/s/^    "\(.*\)": .*/\1/p' "$ROOT/setup.py" | paste -s -d ' ')"
    for extra in "$@"; do
        case " $extras " in *" $extra "*) ;; *) fail "$extra: is not an extra of setup.py; name some of $extras" ;; esac
    done
    begin_alone
    hash="$(fingerprint | sha256sum | cut -d ' ' -f 1)"
    for file in "$INSTALLED" "$INSTALLED.before"; do  # the latter where an installation was killed
        [ -n "$before" ] || [ ! -f "$file" ] || before="$(sed -n 3p "$file")"
    done
    is_whole || make_environment "$before"
    wanted="$(with_one_mxnet $before "$@")"
    if [ ! -f "$INSTALLED" ] || [ "$(sed -n 2p "$INSTALLED")" != "$hash" ] || [ "$before" != "$wanted" ]; then
        printf 'installing gluon_lm with %s (the first time downloads about 100 MB)\n' "$wanted"
        [ ! -f "$INSTALLED" ] || mv "$INSTALLED" "$INSTALLED.before"
        remove_other_mxnets "$wanted"
        if ! (
            unset PYTHONPATH  # what lies there would count as installed
            cd "$ROOT"
            case " $wanted " in *" peers "*) install_gluonnlp ;; esac
            pip_install -e ".[${wanted// /,}]"
        ); then
            [ ! -f "$INSTALLED.before" ] || mv "$INSTALLED.before" "$INSTALLED"  # pip takes back what it cannot end
            exit 2
        fi
        rm -f "$INSTALLED.before"
        printf '%s\n' "$VENV $(describe_python "$VENV/bin/python")" "$hash" "$wanted" >"$INSTALLED.new"
        mv "$INSTALLED.new" "$INSTALLED"
    fi
    exec 9<&-
    export PATH="$VENV/bin:$PATH"
}

# Two scripts started at once: from here on the second waits, until the first ends or closes 9.
begin_alone() {
    # On a network file system a lock needs a file opened for writing.
    if [ -w "$ROOT/setup.py" ]; then exec 9>>"$ROOT/setup.py"; else exec 9<"$ROOT/setup.py"; fi
    if command -v flock >/dev/null; then
        flock 9 || echo "no locks here: start one script at a time" >&2
    fi
}

# All have one and the same module, which the last to be removed would take along.
remove_other_mxnets() {
    local own=mxnet extra distribution others=()
    for extra in $1; do
        case "$extra" in cu*) own="mxnet-$extra" ;; esac
    done
    for distribution in mxnet mxnet-cu112 mxnet-cu117; do
        [ "$distribution" = "$own" ] && continue
        pip show -q "$distribution" >/dev/null 2>&1 && others+=("$distribution")
    done
    [ ${#others[@]} -gt 0 ] || return 0
    [ ! -f "$INSTALLED.before" ] || sed -i '1s/.*//' "$INSTALLED.before"  # whole no more, should the new one fail
    # Its own one, too, is installed anew then: another one's files lie in the same folder.
    pip uninstall -q -y "$own" "${others[@]}"
}

# gluonnlp 0.10.0 ships C code that an old Cython wrote and that Python 3.11 and later refuse. Without it, it is written anew.
install_gluonnlp() {
    local folder
    "$VENV/bin/python" -c 'import gluon_lm, gluonnlp' 2>/dev/null && return
    folder="$(mktemp -d)" || fail "no temporary folder can be made; set TMPDIR to a folder that can be written"
    pip_install "numpy>=1.23.5,<2" "cython>=0.29.37,<3" "setuptools<70" wheel packaging
    pip download --quiet --no-deps --no-build-isolation --no-binary gluonnlp \
        --dest "$folder" gluonnlp==0.10.0 || fail "gluonnlp 0.10.0 cannot be downloaded, see above"
    { tar -xzf "$folder"/gluonnlp-0.10.0.tar.gz -C "$folder" &&
        rm "$folder"/gluonnlp-0.10.0/src/gluonnlp/data/fast_bert_tokenizer.c; } ||
        fail "gluonnlp 0.10.0 is not what this script mends, see above"
    pip_install --no-build-isolation --no-deps "$folder/gluonnlp-0.10.0"
    rm -rf "$folder"
}

if [ "${BASH_SOURCE[0]}" = "$0" ]; then
    set -euo pipefail
    [ $# -gt 0 ] || set -- cpu
    [ "$*" != peers ] || set -- cpu peers
    use_environment "$@"
    printf '%s has gluon_lm with: %s\n' "$VENV" "$(sed -n 3p "$INSTALLED")"
fi
