"""Where a run computes: device, precision, memory format, compilation, the C library's memory."""
import contextlib
import ctypes
import functools
import itertools
import os
import platform
import sys

import torch
import torch.nn.functional as F

from utils.cli import out_of_memory, processes, warn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
COMPILE_STEPS = 5000  # fewer do not earn back the minute or two of compilation (an estimate)
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h


def select_device(gpu):
    """The CUDA GPU with index `gpu`, made the current device; for None the first that computes, else,
    and for "none", the CPU, prepared. Of several processes each takes that of its LOCAL_RANK. Raises
    ValueError for a GPU that is not there, is full or, unless another device may take over, cannot compute."""
    option, count = "--gpu", 0
    if gpu != "none" and torch.cuda.is_available():
        count = torch.cuda.device_count()
    if processes > 1 and gpu not in (None, "none"):
        raise ValueError("omit --gpu: torchrun gives each process a GPU of its own")
    if processes > 1 and count:
        option, gpu = "LOCAL_RANK", int(os.environ["LOCAL_RANK"])
    for index in range(count) if gpu in (None, "none") else [gpu]:
        if index >= count:
            seen = f"GPUs 0 to {count - 1}" if count else "no GPU; omit --gpu to use the CPU"
            raise ValueError(f"{option} {index}: CUDA sees {seen}")
        name = f"GPU {index}"
        try:
            torch.cuda.set_device(index)  # else a context is created on GPU 0 too
            name = torch.cuda.get_device_name(index)
            ones = torch.ones(1, 1, 3, 3, device="cuda")
            F.conv2d(ones, ones).item()
            return torch.device("cuda", index)
        except Exception as error:  # of any type: no kernels for it, a driver that does not fit
            problem = f"{name} cannot compute ({(str(error) or repr(error)).splitlines()[0]})"
            if gpu is not None or out_of_memory(error):
                raise ValueError(f"{option} {index}: {problem}; free its memory, install a PyTorch that has "
                                 "kernels for it, or use --gpu none") from error
            warn(f"{problem}; the next GPU, or the CPU, takes over")
    prepare_cpu()
    return torch.device("cpu")


def cores():
    """How many CPU cores this process may use: those of its affinity, of a container's quota, and, unless
    torchrun has set it, of OMP_NUM_THREADS."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError), open(CPU_QUOTA) as file:  # no such file, or no quota: "max"
        quota, period = map(int, file.read().split())
        count = min(count, max(1, quota // period))
    return count if processes > 1 else min(count, torch.get_num_threads())


def prepare_cpu():
    """Limit threads to `cores`, and make glibc keep freed memory, unless a MALLOC_ variable is set: else
    the pages of all activations are returned in each step, and come back zeroed. Up to a fifth faster,
    with more holes in the heap."""
    if processes == 1:
        torch.set_num_threads(cores())
    if sys.platform == "linux" and not any(name.startswith("MALLOC_") for name in os.environ):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)
            mallopt(M_TRIM_THRESHOLD, -1)


def set_determinism(deterministic):
    """Make CUDA's results reproducible, or let it choose the fastest algorithms."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)


def select_precision(name, device):
    """Resolve 'auto': bf16 on GPUs from compute capability 8.0 and CPUs that compute in it, else fp16
    on GPUs with tensor cores, else fp32. Raises ValueError for fp16 on the CPU."""
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 requires a CUDA GPU; on the CPU use fp32 or bf16")
    if name == "auto" and device.type == "cpu":
        return "bf16" if cpu_has_bf16() else "fp32"
    if name == "auto" and torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16"
    if name == "auto":
        return "fp16" if has_tensor_cores(device) else "fp32"
    return name


def has_tensor_cores(device):
    """Whether a GPU is faster in fp16 and channels_last: from compute capability 7.0, but for a GTX 16xx, on
    which fp16 has given values that are not finite (other cards of that age without them are not known)."""
    return torch.cuda.get_device_capability(device) >= (7, 0) and "GTX 16" not in torch.cuda.get_device_name(device)


def cpu_has_bf16():
    """Whether the CPU multiplies in bf16 (AVX-512 BF16 or AMX), and torch uses that."""
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def autocast(device, precision):
    """A function that makes the autocast context of a precision; for fp32 autocast is off."""
    return functools.partial(torch.autocast, device.type, DTYPES[precision], enabled=precision != "fp32")


def memory_layout(device, width, batch_size):
    """The memory format for training, given the batch of all processes: channels_last, except on GPUs
    without tensor cores, and where torch's CPU kernels corrupt memory with it: in 2.14 and 2.15 the
    weight gradient of a 1x1 convolution with stride 2 and fewer channels than a vector register holds,
    8 with AVX2 (any batch), 16 with AVX-512 (odd batches on several threads)."""
    if device.type == "cuda":
        return torch.channels_last if has_tensor_cores(device) else torch.contiguous_format
    least = 16 if batch_size // processes % 2 == 1 else 8
    return torch.contiguous_format if width < least else torch.channels_last


def conv_as_matmul(x, weight, stride):
    """A 3x3 convolution padded by 1 as a product of shifted slices: x [B, C, H, W], weight [O, C, 3, 3]."""
    h, w = x.shape[2:]
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))                   # [B, H + 2, W + 2, C]
    slices = [x[:, i:i + h:stride, j:j + w:stride] for i in range(3) for j in range(3)]
    matrix = weight.permute(0, 2, 3, 1).flatten(1)                         # [O, 9 * C]
    return F.linear(torch.cat(slices, dim=3), matrix).permute(0, 3, 1, 2)


class FastConv2d(torch.nn.Conv2d):
    """Of 3x3: on the CPU in bf16 a matrix product where the maps are so small that oneDNN is slow."""

    def forward(self, x):
        size = x.shape[2] // self.stride[0]
        eager = type(x) is torch.Tensor  # not what a compiler traces, which may be for another device
        if eager and x.device.type == "cpu" and x.dtype == torch.bfloat16:
            if size <= 2 or size <= 4 and self.out_channels >= 512:
                return conv_as_matmul(x, self.weight, self.stride[0])
        return super().forward(x)


def with_fast_convolutions(model):
    """The model, changed in place to FastConv2d, for training; the network that others trace has no branch."""
    for module in model.modules():
        if type(module) is torch.nn.Conv2d and module.kernel_size == (3, 3):
            module.__class__ = FastConv2d
    return model


def compile_for(device, function, choice, steps):
    """The function compiled by Inductor if `choice` is true, or None on CUDA for at least COMPILE_STEPS
    steps. Where nothing can be compiled it stays as it is, with a warning."""
    if not (device.type == "cuda" and steps >= COMPILE_STEPS if choice is None else choice):
        return function
    torch.compiler.reset()  # torch limits a function's compilations, over all runs in a process
    torch._dynamo.config.recompile_limit = 100  # sizes of views; 8 if not set
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:  # of any type: no compiler, no Python.h, no Triton, an older GPU
        reason = (str(error) or repr(error)).splitlines()[0][:100]
        warn(f"torch.compile failed; running eager (slower): {reason}")
        return function
    return torch.compile(function, dynamic=False)


def sgd(groups, learning_rate, momentum, weight_decay):
    """Fused SGD for groups, lists of parameters. Its momentum buffers are there from the start: a
    first step that the loss scaler of fp16 skips would leave them allocated, and not filled."""
    optimizer = torch.optim.SGD([{"params": group} for group in groups], learning_rate, momentum,
                                weight_decay=weight_decay, fused=True)
    for parameter in itertools.chain(*groups):
        if parameter.requires_grad:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def describe(device):
    """The device in words: the GPU's name, or the CPU with its threads; the number of processes."""
    threads = torch.get_num_threads()
    words = "CPU, 1 thread" if threads == 1 else f"CPU, {threads} threads"
    if device.type == "cuda":
        words = torch.cuda.get_device_name(device)
    return words if processes == 1 else f"{words}, {processes} processes"


def processor():
    """The processor's model, with the instruction set that torch uses."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # Linux
        model = dict(line.strip().split("\t: ") for line in file if "\t: " in line).get("model name", model)
    return f"{model} ({torch.backends.cpu.get_cpu_capability()}, {'' if cpu_has_bf16() else 'no '}bf16)"


def machine(device):
    """What must be the same for a resumed run to be bit-identical."""
    return {"device": describe(device), "processor": processor(), "torch": str(torch.__version__)}
