"""What a CPU run asks of OpenMP and of the C library, each seen in a process of its own."""
import os
import subprocess
import sys

import pytest
import torch

from conftest import REPO
from utils import cpu

FAULTS = """
import sys
sys.path.insert(0, {repo!r})
from utils.cpu import prepare_cpu
import resource, torch
if {prepared}:
    prepare_cpu()

def use():
    tensors = [torch.ones(12 << 20) for _ in range(3)]

for _ in range(20):  # until the heap has found its shape: 3 to 5 times here
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run_python(code, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_", "MALLOC_"))}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, env={**kept, **environment}, capture_output=True, text=True, check=True
    )


def is_glibc():
    return sys.platform == "linux" and "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")


@pytest.mark.skipif(not is_glibc(), reason="needs glibc")
def test_freed_memory_is_kept():
    """Tensors of 48 MB, freed and allocated again, are new pages from the system; at most a fifth of them once kept."""
    usual, kept = (int(run_python(FAULTS.format(repo=str(REPO), prepared=on)).stdout) for on in (False, True))
    assert usual > 4 * 3 * 10_000 and kept < usual / 5, (usual, kept)


@pytest.mark.parametrize("script, given, expected", [("main", {}, "10000"), ("main_lincls", {"GOMP_SPINCOUNT": "77"}, "77")])
def test_openmp_reads_the_spin_count(script, given, expected):
    """The scripts set it before torch loads OpenMP, and a number that the user has set stays."""
    shown = run_python(f"import {script}", OMP_DISPLAY_ENV="verbose", **given).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("needs torch with GNU OpenMP")
    assert f"GOMP_SPINCOUNT = '{expected}'" in shown


@pytest.mark.parametrize("text, cores", [("200000 100000\n", 2), ("50000 100000\n", 1), ("max 100000\n", None), ("", None)])
def test_quota(tmp_path, text, cores):
    (tmp_path / "cpu.max").write_text(text)
    assert cpu.quota_cores(str(tmp_path / "cpu.max")) == cores
    assert cpu.quota_cores(str(tmp_path / "missing")) is None


def test_threads_keep_to_the_quota(monkeypatch):
    threads = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(cpu, "quota_cores", lambda: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cpu.prepare_cpu()
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    cpu.prepare_cpu()
    assert threads == [3]
