"""Device, precision, memory format, and what a CPU run asks of the C library."""
import ctypes
import functools
import os
import sys

import torch

from utils.cli import warn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
COMPILE_STEPS = 5000  # a run of fewer does not earn back the minute or two of compilation (an estimate)
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h


def select_device(gpu):
    """The CUDA GPU with index `gpu`, made the current device; for None the first GPU, else the CPU, prepared by
    `prepare_cpu`. Raises ValueError if there is no such GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None and not count:
        prepare_cpu()
        return torch.device("cpu")
    if not 0 <= (gpu or 0) < count:
        seen = f"CUDA sees GPUs 0 to {count - 1}" if count else "CUDA sees no GPU here; omit --gpu to use the CPU"
        raise ValueError(f"--gpu {gpu}: {seen}")
    device = torch.device("cuda", gpu or 0)
    torch.cuda.set_device(device)  # else a context is created on GPU 0 too
    return device


def select_precision(name, device):
    """Resolve 'auto': bf16 on GPUs from compute capability 8.0 and CPUs that compute in it, fp16 on older GPUs, fp32 on
    other CPUs. Raises ValueError for fp16 on the CPU."""
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 requires a CUDA GPU; on the CPU use fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def cpu_has_bf16():
    """Whether the CPU multiplies in bf16 (AVX-512 BF16 or AMX), and torch uses these instructions."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def describe_precision(precision, device):
    """The precision in words, on a CPU with what speaks for or against bf16."""
    return f"{precision} (a CPU with{'' if cpu_has_bf16() else 'out'} bf16)" if device.type == "cpu" else precision


def autocast(device, precision):
    """A function that makes the autocast context of a precision; for fp32 autocast is off."""
    return functools.partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != "fp32")


def memory_layout(device, width, batch_size):
    """The memory format for training: channels_last, except where it makes torch's CPU kernels corrupt memory: in 2.14
    and 2.15 the weight gradient of a 1x1 convolution with stride 2 and fewer channels than a vector register holds, 8
    with AVX2 (any batch), 16 with AVX-512 (odd batches on several threads)."""
    crashes = device.type == "cpu" and (width < 8 or width < 16 and batch_size % 2 == 1)
    return torch.contiguous_format if crashes else torch.channels_last


def compile_for(device, function, choice, steps):
    """The function compiled by Inductor, or as it is. choice: True, False, or None for CUDA and at least COMPILE_STEPS
    steps. Where a trial shows that nothing can be compiled, it stays as it is, with a warning."""
    if not (choice or choice is None and device.type == "cuda" and steps >= COMPILE_STEPS):
        return function
    torch.compiler.reset()  # torch limits the compilations of a function, also over the runs in one process
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:  # of any type: no compiler, no Python.h, no Triton, an older GPU
        warn(f"not compiled, which is slower: {(str(error) or repr(error)).splitlines()[0][:100]}")
        return function
    return torch.compile(function, dynamic=False)


def describe(device):
    """The device in words: the GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"


def prepare_cpu():
    """Limit threads to a container's CPU quota, unless OMP_NUM_THREADS is set, and make glibc keep freed memory, unless
    a MALLOC_ variable is set: else the pages of all activations go back to the system in each step and return zeroed.
    Keeping them is up to a fifth faster and leaves more holes in the heap."""
    try:
        with open(CPU_QUOTA) as file:
            quota, period = map(int, file.read().split())
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(min(torch.get_num_threads(), max(1, quota // period)))
    except (OSError, ValueError):  # no such file, or no quota: "max"
        pass
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)
