"""Promises of machine.py: how much memory a training may still take, whoever limits it."""

import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from training.machine import available_memory, container_limits, is_out_of_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[1]


def write(root: Path, files: dict[str, str]):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_without_limits_it_is_what_is_free():
    free = psutil.virtual_memory().available
    assert 0.5 * free < available_memory(CPU) <= 1.5 * free


def test_the_limits_of_cgroups_count_and_what_could_be_given_back_does_not(tmp_path):
    write(tmp_path, {
        "proc/self/cgroup": "0::/user.slice/of/mine\n",
        "sys/fs/cgroup/user.slice/of/mine/memory.max": "max\n", "sys/fs/cgroup/user.slice/of/mine/memory.current": "50\n",
        "sys/fs/cgroup/user.slice/of/memory.max": "1000\n", "sys/fs/cgroup/user.slice/of/memory.current": "300\n",
        "sys/fs/cgroup/user.slice/of/memory.stat": "anon 100\ninactive_file 120\n",
        "sys/fs/cgroup/user.slice/memory.max": "2000\n", "sys/fs/cgroup/user.slice/memory.current": "400\n",
    })  # fmt: skip
    assert list(container_limits(tmp_path)) == [(1000, 180), (2000, 400)]


def test_so_do_those_of_the_first_version_also_at_the_top_of_a_container(tmp_path):
    write(tmp_path, {
        "proc/self/cgroup": "3:cpu:/docker/abc\n2:memory,hugetlb:/docker/abc\n0::/\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "800\n", "sys/fs/cgroup/memory/memory.usage_in_bytes": "300\n",
        "sys/fs/cgroup/memory/memory.stat": "cache 9\ntotal_inactive_file 30\n",
    })  # fmt: skip
    assert list(container_limits(tmp_path)) == [(800, 270)]


def test_where_there_are_no_cgroups_there_is_no_limit(tmp_path):
    assert list(container_limits(tmp_path)) == []


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits")
def test_so_does_the_limit_of_the_process():
    code = (
        "import psutil, resource, torch; from training.machine import available_memory;"
        "used = psutil.Process().memory_info().vms;"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2); print(available_memory(torch.device('cpu')) / 2**20)"
    )
    free = float(subprocess.check_output([sys.executable, "-c", code], cwd=ROOT))
    assert 200 < free <= 300


def test_what_torch_and_python_say_where_memory_ends():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60)
    assert is_out_of_memory(error.value) and is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("shapes do not fit"))
