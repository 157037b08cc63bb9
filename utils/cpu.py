"""What a CPU run asks of OpenMP and of the C library. Import it before torch: OpenMP reads its setting when it is loaded."""
import ctypes
import os
import sys

# A thread that waits for another spins this often, then sleeps. GNU OpenMP's own number keeps it spinning on a core
# that another process needs, and both wait: with two threads and one busy core, four times the time a step.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h


def quota_cores(path=CPU_QUOTA):
    """The cores that a container may use by its CPU quota (Linux, cgroup 2), at least 1; None without a quota."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def keep_freed_memory():
    """Have glibc keep what is freed instead of returning it to the system, which hands it out again page by page,
    each page zeroed. A training step frees and allocates all of its activations: it gets faster, and the heap has more
    holes. No effect on other C libraries, nor where glibc's own variables (MALLOC_...) say something."""
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def prepare_cpu():
    """To be called by a process that computes on the CPU: no more threads than the quota's cores, unless
    OMP_NUM_THREADS says a number, and keep_freed_memory."""
    import torch  # not above: this module comes before torch

    quota = quota_cores()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), quota))
    keep_freed_memory()
