#!/usr/bin/env bash
# Builds Horovod against the MXNet of the environment, for `horovodrun ... python -m gluon_lm.train --horovod`. Where it
# is built already, nothing happens. Needs cmake, make and g++, for a CUDA MXNet the CUDA toolkit too (nvcc), and takes
# a minute or two.
#
# Three things in its sources are mended.
# Over gloo it opens a second set of connections for which it forgets the network interface that it was told
# (horovodrun --network-interfaces) or found, and takes the address of the host's own name. On a host whose name means
# 127.0.1.1, as on Debian, the other hosts then cannot reach it.
# And for its log it reads the names of an operation's arrays after it has handed the operation over, when that may be
# over and the names be freed: on a busy machine a process crashed now and then.
# At Ctrl-C horovodrun gave its processes five seconds, and none at all where /bin/sh is bash, which leaves its place to
# the program that it is told to run. They have HOROVOD_TERMINATION_SECONDS now (30), time for a checkpoint.
#
#   MAKEFLAGS               how many compilers run at once, as in MAKEFLAGS=-j1 (default: one a core)
#   HOROVOD_WITH_MPI        1: for mpirun as well, which needs an MPI with its compiler (default: gloo alone, which needs
#                           nothing but the network; horovodrun starts the workers by itself, or over ssh)
#   HOROVOD_GPU_OPERATIONS  NCCL: GPUs add up their gradients by NCCL (default: by way of the host's memory)
#   HOROVOD_NCCL_HOME       where NCCL is, with include and lib (default: the wheel that MXNet uses, if it is there)
set -euo pipefail
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

VERSION=0.28.1
MENDED=mended.4  # behind its version, so that another build is known from this one

is_built() {
    "$VENV/bin/python" - "$VERSION+$MENDED" >/dev/null 2>&1 <<'PYTHON'
import os
import sys
from importlib.metadata import version

import gluon_lm  # first: MXNet on newer numpy
import horovod.mxnet as hvd
import mxnet

has_all = version("horovod") == sys.argv[1] and hvd.gloo_built()
has_all = has_all and (not os.environ.get("HOROVOD_WITH_MPI") or hvd.mpi_built())
has_all = has_all and (hvd.cuda_built() or not mxnet.runtime.Features().is_enabled("CUDA"))
has_all = has_all and (os.environ.get("HOROVOD_GPU_OPERATIONS") != "NCCL" or hvd.nccl_built())
sys.exit(not has_all)
PYTHON
}

export OMP_NUM_THREADS=1  # MXNet cannot be imported where it is a list, and nothing is computed here
use_environment cpu
begin_alone

if is_built; then
    printf '%s has Horovod %s\n' "$VENV" "$VERSION"
    exit
fi
for tool in cmake make g++; do
    command -v "$tool" >/dev/null ||
        fail "$tool: is needed to build Horovod and is not here; apt-get install cmake make g++, then run this again"
done

if "$VENV/bin/python" -c 'import sys, gluon_lm, mxnet; sys.exit(not mxnet.runtime.Features().is_enabled("CUDA"))'; then
    command -v nvcc >/dev/null || export HOROVOD_CUDA_HOME="${HOROVOD_CUDA_HOME:-${CUDA_HOME:-/usr/local/cuda}}"
    PATH="$PATH:${HOROVOD_CUDA_HOME:-}/bin" command -v nvcc >/dev/null ||
        fail "nvcc: is needed to build Horovod for a CUDA MXNet and is not here; install the CUDA toolkit, or name it" \
            "with HOROVOD_CUDA_HOME"
fi

printf 'building Horovod %s, which takes a minute or two\n' "$VERSION"
pip_install "setuptools<70" wheel packaging psutil cloudpickle "PyYAML>=6.0.1,<7"
export MAKEFLAGS="${MAKEFLAGS:--j$(nproc)}"
export CXXFLAGS="-include cstdint ${CXXFLAGS:-}"  # its sources use these types, which g++ 13 no longer lends them
export CMAKE_POLICY_VERSION_MINIMUM=3.5           # its gloo asks for rules that cmake 4 has given up
export HOROVOD_WITH_MXNET=1 HOROVOD_WITH_GLOO=1 HOROVOD_WITHOUT_PYTORCH=1 HOROVOD_WITHOUT_TENSORFLOW=1
[ -n "${HOROVOD_WITH_MPI:-}" ] || export HOROVOD_WITHOUT_MPI=1
sources="$(mktemp -d)"
trap 'rm -rf "$sources"' EXIT
pip download --quiet --no-deps --no-build-isolation \
    --no-binary horovod --dest "$sources" "horovod==$VERSION" || fail "Horovod cannot be downloaded, see above"
tar -xzf "$sources/horovod-$VERSION.tar.gz" -C "$sources"
connections="$sources/horovod-$VERSION/horovod/common/gloo/gloo_context.cc"
sed -i '/^void GlooContext::InitializeForProcessSet/,/^}/ s/iface = gloo_iface_;/iface = global_context.gloo_iface_;/' \
    "$connections"
grep -q "iface = global_context.gloo_iface_;" "$connections" ||
    fail "the sources of Horovod $VERSION are not those that this script mends; remove what it does to $connections"
operations="$sources/horovod-$VERSION/horovod/mxnet/mpi_ops.cc"
sed -i -e 's/ops_param->op_names/op_names/' \
    -e 's/^  auto process_set_id = ops_param->process_set_id;/&\n  auto op_names = ops_param->op_names;/' "$operations"
[ "$(grep -c "auto op_names = ops_param->op_names;" "$operations")" -eq 2 ] ||
    fail "the sources of Horovod $VERSION are not those that this script mends; remove what it does to $operations"
stopping="$sources/horovod-$VERSION/horovod/runner/common/util/safe_shell_exec.py"
termination='float(os.environ.get("HOROVOD_TERMINATION_SECONDS", "30"))'
sed -i -e 's/p\.children()/(p.children() or [p])/' \
    -e "s/^GRACEFUL_TERMINATION_TIME_S = 5\$/GRACEFUL_TERMINATION_TIME_S = $termination/" "$stopping"
[ "$(grep -c -e "(p.children() or \[p\])" -e "HOROVOD_TERMINATION_SECONDS" "$stopping")" -eq 3 ] ||
    fail "the sources of Horovod $VERSION are not those that this script mends; remove what it does to $stopping"
# Optimised as for a release, and without what a debugger reads, which takes long to write.
sed -i "s/'RelWithDebInfo'/'Release'/" "$sources/horovod-$VERSION/setup.py"
# horovodrun imports this to learn how it was built, and MXNet finds what newer numpy has not only after gluon_lm.
sed -i '0,/^from /s//import gluon_lm\n&/' "$sources/horovod-$VERSION/horovod/mxnet/__init__.py"
# The CUDA toolkit has no NCCL. That of MXNet's wheels has no link by the name that a linker looks for.
if [ "${HOROVOD_GPU_OPERATIONS:-}" = NCCL ] && [ -z "${HOROVOD_NCCL_HOME:-}${HOROVOD_NCCL_INCLUDE:-}" ]; then
    nccl="$("$VENV/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/nccl"
    if [ -f "$nccl/lib/libnccl.so.2" ]; then
        mkdir "$sources/nccl"
        ln -s "$nccl/lib/libnccl.so.2" "$sources/nccl/libnccl.so"
        export HOROVOD_NCCL_INCLUDE="$nccl/include" HOROVOD_NCCL_LIB="$sources/nccl" HOROVOD_NCCL_LINK=SHARED
    fi
fi
mkdir "$sources/hook"  # the build asks a Python of its own about MXNet, which imports on newer numpy only after gluon_lm
echo "import gluon_lm" >"$sources/hook/sitecustomize.py"
HOROVOD_LOCAL_VERSION="$MENDED" PYTHONPATH="$sources/hook" \
    pip_install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "$sources/horovod-$VERSION"
is_built ||
    fail "Horovod was installed into $VENV and does not work; see what $VENV/bin/python -c 'import horovod.mxnet' says"
printf '%s has Horovod %s\n' "$VENV" "$VERSION"
