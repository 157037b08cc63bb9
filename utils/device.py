"""Which device, which precision."""
import functools

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def select_device(gpu):
    """The CUDA GPU numbered `gpu`; for None the first one, else the CPU. Raises ValueError if there is no such GPU."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is None:
        return torch.device("cuda", 0) if count else torch.device("cpu")
    if not 0 <= gpu < count:
        there = f"CUDA sees GPUs 0 to {count - 1}" if count else "CUDA sees no GPU here; leave --gpu out to use the CPU"
        raise ValueError(f"--gpu {gpu}: {there}")
    return torch.device("cuda", gpu)


def select_precision(name, device):
    """'auto' becomes bf16 on GPUs that compute in it (compute capability 8.0), fp16 on older ones and fp32
    on the CPU. Raises ValueError for fp16 on the CPU."""
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a CUDA GPU; on the CPU take fp32 or bf16")
    if name != "auto":
        return name
    if device.type == "cpu":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"


def memory_layout(device, width, batch_size):
    """The memory format to train in: channels_last, but for what corrupts memory in it on CPUs: torch 2.14's and 2.15's
    gradient of the shortcuts' weights with fewer channels than a vector register holds: 8 with AVX2 (any batch), 16 with
    AVX-512 (odd batches on several threads)."""
    crashes = device.type == "cpu" and (width < 8 or width < 16 and batch_size % 2 == 1)
    return torch.contiguous_format if crashes else torch.channels_last


def autocast(device, precision):
    """A function that makes the autocast context of a precision ('bf16', 'fp16' or 'fp32', which switches it off)."""
    return functools.partial(
        torch.autocast, device.type, dtype=DTYPES[precision] if precision != "fp32" else None,
        enabled=precision != "fp32",
    )


def describe(device):
    """The device in words: the GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def free_memory(device):
    """Bytes that are free on the GPU, or available to processes on the host (Linux; elsewhere infinite)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return float("inf")


def require_memory(count, device, what):
    """Raises ValueError, which begins with `what`, if the device has less than so many bytes free: asking for them
    all the same would end in the system killing the process."""
    free = free_memory(device)
    if count > free:
        raise ValueError(f"{what}: takes {count / 2**30:,.1f} GiB of memory, {free / 2**30:,.1f} GiB are free")
