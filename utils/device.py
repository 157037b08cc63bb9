"""Where a run computes: device, precision, memory format, torchrun's processes, the C library's memory."""
import contextlib
import ctypes
import datetime
import functools
import os
import sys
import warnings

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from utils.cli import USER_ERRORS, another_died, fail, processes, rank, warn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}
COMPILE_STEPS = 5000  # a run of fewer does not earn back the minute or two of compilation (an estimate)
CPU_QUOTA = "/sys/fs/cgroup/cpu.max"
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # as in malloc.h
PATIENCE = datetime.timedelta(hours=2)  # of processes that wait for another; torchrun ends them if that one dies


def select_device(gpu):
    """The CUDA GPU with index `gpu`, made the current device; for None the first GPU, else the CPU, prepared by
    `prepare_cpu`. Of several processes each takes the GPU of its LOCAL_RANK. Raises ValueError if there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if processes > 1:
        if gpu is not None:
            raise ValueError("omit --gpu: torchrun gives each process a GPU of its own")
        gpu = int(os.environ["LOCAL_RANK"]) if count else None
    if gpu is None and not count:
        prepare_cpu()
        return torch.device("cpu")
    gpu = gpu or 0
    if not 0 <= gpu < count:
        seen = f"CUDA sees GPUs 0 to {count - 1}" if count else "CUDA sees no GPU here; omit --gpu to use the CPU"
        raise ValueError(f"{'LOCAL_RANK' if processes > 1 else '--gpu'} {gpu}: {seen}")
    device = torch.device("cuda", gpu)
    torch.cuda.set_device(device)  # else a context is created on GPU 0 too
    return device


def set_determinism(deterministic):
    """Make CUDA's results reproducible, or let it choose the fastest algorithms."""
    torch.backends.cudnn.benchmark = not deterministic
    torch.use_deterministic_algorithms(deterministic)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


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
    with AVX2 (any batch), 16 with AVX-512 (odd batches on several threads). batch_size: of all processes."""
    crashes = device.type == "cpu" and (width < 8 or width < 16 and batch_size // processes % 2 == 1)
    return torch.contiguous_format if crashes else torch.channels_last


def compile_for(device, function, choice, steps):
    """The function compiled by Inductor, or as it is. choice: True, False, or None for CUDA and at least COMPILE_STEPS
    steps. Where a trial shows that nothing can be compiled, it stays as it is, with a warning."""
    if not (device.type == "cuda" and steps >= COMPILE_STEPS if choice is None else choice):
        return function
    torch.compiler.reset()  # torch limits the compilations of a function, also over the runs in one process
    try:
        torch.compile(torch.neg)(torch.zeros(8, device=device))
    except Exception as error:  # of any type: no compiler, no Python.h, no Triton, an older GPU
        warn(f"not compiled, which is slower: {(str(error) or repr(error)).splitlines()[0][:100]}")
        return function
    return torch.compile(function, dynamic=False)


def describe(device):
    """The device in words: the GPU's name, or the CPU with its number of threads; the number of processes."""
    threads = torch.get_num_threads()
    name = (torch.cuda.get_device_name(device) if device.type == "cuda" else
            f"CPU, {threads} thread{'s' * (threads > 1)}")
    return name + f", {processes} processes" * (processes > 1)


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


# ---------------------------------------------------------------------------------------------------
# Several processes, started by torchrun. With one, each of these functions does nothing, or calls another.


@contextlib.contextmanager
def joined():
    """In the context the processes are a group: gloo exchanges what is on the host, NCCL what is on GPUs. Exits with 1
    where the connection breaks."""
    if processes == 1:
        yield
        return
    store = next(rendezvous("env://", timeout=PATIENCE))[0]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # the store keeps the keys before a restart (pytorch issue 135712)
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
        yield
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not another_died(error):
            raise
        why = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without file names and advice
        sys.exit(fail(os.path.basename(sys.argv[0]), f"lost another process: {why}"))


def gather(value):
    """The values of all processes, a list by rank."""
    values = processes * [value]
    distributed.all_gather_object(values, value)
    return values


def on_first(function, *args, share=True):
    """function(*args) of the first process, for which the others wait. Its result is that of all, unless share=False:
    then the others get None. Its USER_ERRORS are raised in all."""
    if processes == 1:
        return function(*args)
    result = failure = None
    if rank == 0:
        try:
            result = function(*args)
        except USER_ERRORS as error:
            failure = error
    sent = [result if share else None, failure]
    distributed.broadcast_object_list(sent)
    if sent[1]:
        raise sent[1]
    return sent[0] if share else result


def in_turns(function, *args):
    """function(*args) of every process: first of rank 0, then of one process on each node, then of the others, so that
    later ones find what earlier ones downloaded or cached. USER_ERRORS of any are raised in all."""
    if processes == 1:
        return function(*args)
    turn, result = 0 if rank == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2, None
    for now in range(3):
        failure = None
        if now == turn:
            try:
                result = function(*args)
            except USER_ERRORS as error:
                failure = f"process {rank}: " * (rank > 0) + str(error)
        for failure in filter(None, gather(failure)):
            raise ValueError(failure)
    return result


def require_same(what, value):
    """Raise ValueError, in all processes, unless the value is the same in all."""
    for other, theirs in enumerate(values := gather(value)):
        if theirs != values[0]:
            raise ValueError(f"process {other} has {what} than process 0")


def average(values):
    """Replace a float32 tensor on the CPU by its mean over the processes."""
    if processes > 1:
        total = values.double()  # in which sums of float32 are, but for rare cases, exact in any order
        distributed.all_reduce(total)
        values.copy_(total / processes)


class Step(torch.nn.Module):
    """A model and a function that computes with it, as one module, which DistributedDataParallel requires."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(*args) if args else sum(each.square().sum() for each in self.model.parameters())


def average_gradients(model, function):
    """The function, which computes with the model, as one whose backward pass gives the mean gradients over all
    processes. The parameters become those of the first one."""
    if processes == 1:
        return function
    warnings.filterwarnings("ignore", "Grad strides do not match")  # 1x1 convolutions in channels_last: same memory
    step = torch.nn.parallel.DistributedDataParallel(Step(model, function))
    step.broadcast_buffers = False  # in each step; share_buffers does it when they are used
    step().backward()  # DDP orders its buckets by the first backward pass; a fixed one keeps it when a run is resumed
    return step


def share_buffers(model):
    """Give all processes the buffers of the first one, the running statistics of its batches."""
    for buffer in model.buffers() if processes > 1 else ():
        distributed.broadcast(buffer, 0)


class Agreement:
    """Makes a StopRequest of one process that of all, in the same step of each: one step late, so that none waits."""

    def __init__(self, stop):
        self.stop, self.sent, self.code = stop, None, torch.zeros(1)

    def reached(self):
        """Whether to stop; to be called in each step by every process."""
        if processes == 1:
            return self.stop.requested
        if self.sent:
            self.sent.wait()
        if self.code:  # 1 + exit code
            self.stop.signaled, self.stop.exit_code = True, self.code.item() - 1
            return True
        self.code = torch.tensor([self.stop.requested * (1 + self.stop.exit_code)])
        self.sent = distributed.all_reduce(self.code, distributed.ReduceOp.MAX, async_op=True)
        return False
