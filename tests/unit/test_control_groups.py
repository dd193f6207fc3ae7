"""What containers and batch systems let a process have: made-up trees of both versions, and real groups."""

from __future__ import annotations

import subprocess
import sys

import pytest
from control_groups import control_group, memory_group

from gluon_lm.control_groups import free_memory, processor_share


@pytest.fixture(params=[1, 2])
def machine(request, tmp_path):
    """A machine whose groups are of one version. It is called with the group of the process, and gives its root."""
    groups = tmp_path / "sys/fs/cgroup"

    def root(path):
        lines = {1: f"7:cpu,cpuacct:{path}\n4:memory:{path}\n0::/other\n", 2: f"0::{path}\n"}
        (tmp_path / "proc/self").mkdir(parents=True, exist_ok=True)
        (tmp_path / "proc/self/cgroup").write_text(lines[request.param])
        return tmp_path

    def write(group, controller, **files):
        folder = groups / (controller if request.param == 1 else "") / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(f"{content}\n")

    def memory(group, limit, used, of_files):
        """Bytes; `of_files` of those used are pages of files."""
        if request.param == 2:
            counts = f"anon 5\ninactive_file {of_files}\nactive_file 0"
            write(group, "memory", memory__max=limit or "max", memory__current=used, memory__stat=counts)
        else:
            counts = f"inactive_file 7\nactive_file 7\ntotal_inactive_file 1\ntotal_active_file {of_files - 1}"
            files = {"memory__limit_in_bytes": limit or 0x7FFFFFFFFFFFF000, "memory__usage_in_bytes": used}
            write(group, "memory", memory__stat=counts, **files)

    def cpu(group, quota, period=100_000):
        """Microseconds of processor time in a period; a quota of None is no limit."""
        if request.param == 2:
            write(group, "cpu", cpu__max=f"{quota or 'max'} {period}")
        else:
            write(group, "cpu", cpu__cfs_quota_us=quota or -1, cpu__cfs_period_us=period)

    root.memory, root.cpu = memory, cpu
    return root


def test_the_tightest_group_around_a_process_decides(machine):
    machine.memory("", None, 900, 1)
    machine.memory("job", 1000, 700, 1)
    machine.memory("job/step", 500, 100, 1)
    machine.memory("other", 10, 9, 1)
    assert free_memory(machine("/job/step")) == free_memory(machine("/job")) == 301
    machine.memory("job/step", 120, 100, 1)
    assert free_memory(machine("/job/step")) == 21
    machine.cpu("", None)
    machine.cpu("job", 250_000)
    machine.cpu("job/step", 400_000)
    machine.cpu("other", 1000)
    assert processor_share(machine("/job/step")) == processor_share(machine("/job")) == 2.5
    machine.cpu("job/step", 30_000, period=20_000)
    assert processor_share(machine("/job/step")) == 1.5


def test_pages_of_files_are_free_memory(machine):
    machine.memory("job", 1000, 990, 600)
    assert free_memory(machine("/job")) == 610
    machine.memory("job", 1000, 1020, 5)
    assert free_memory(machine("/job")) == 0  # and not less


def test_a_container_sees_its_own_group_at_the_top(machine):
    machine.memory("", 1000, 400, 1)
    machine.cpu("", 50_000)
    assert free_memory(machine("/docker/0123")) == 601
    assert processor_share(machine("/docker/0123")) == 0.5


def test_without_a_limit_nothing_is_known(machine, tmp_path):
    assert free_memory(tmp_path) is None and processor_share(tmp_path) is None
    assert free_memory(machine("/job")) is None
    machine.cpu("job", None)
    assert processor_share(machine("/job")) is None


def run(code, group):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, preexec_fn=group)
    assert done.returncode == 0, done.stderr
    return list(map(float, done.stdout.split()))


def test_a_real_group_does_not_count_the_files_that_the_kernel_keeps():
    code = (
        "import tempfile\n"
        "from gluon_lm.memory import free_host_memory\n"
        "before = free_host_memory()\n"
        "with tempfile.TemporaryFile(dir='/var/tmp') as file:\n"  # /tmp may itself be memory
        "    for _ in range(128):\n"
        "        file.write(bytes(1 << 20))\n"
        "    print(before / (1 << 20), free_host_memory() / (1 << 20))\n"
    )
    with memory_group(256 << 20) as group:
        before, after = run(code, group)
    assert 128 < before < 256 and abs(before - after) < 32


def test_a_real_group_bounds_the_threads():
    quota, period = "100000", "100000"
    version_1 = {"cpu.cfs_period_us": period, "cpu.cfs_quota_us": quota}
    with control_group("cpu", version_1, {"cpu.max": f"{quota} {period}"}) as group:
        code = (
            "import os\n"
            "from gluon_lm.processors import usable_cores\n"
            "from gluon_lm.runtime import prepare_process\n"
            "os.environ.pop('OMP_NUM_THREADS', None)\n"
            "prepare_process()\n"
            "print(usable_cores(), os.environ['OMP_NUM_THREADS'])\n"
        )
        assert run(code, group) == [1, 1]
