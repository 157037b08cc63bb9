"""Several processes, started by torchrun. With one, each function does nothing, or calls another."""
import contextlib
import datetime
import functools
import os
import sys
import warnings

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from simsiam.weights import flatten
from utils import checkpoint, cli
from utils.cli import USER_ERRORS, processes, rank

PATIENCE = datetime.timedelta(hours=2)  # of those that wait; torchrun ends them if another one dies


@contextlib.contextmanager
def joined():
    """In the context the processes are a group (gloo; NCCL on GPUs). Exits with 1 where it breaks."""
    if processes == 1:
        yield
        return
    store = next(rendezvous("env://", timeout=PATIENCE))[0]
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # a restart finds old keys (pytorch issue 135712)
        store = distributed.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    problem = "the processes cannot connect"
    try:
        distributed.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=PATIENCE)
        problem = "lost another process"
        try:
            yield
        except SystemExit:  # of all processes alike, after an error that they share
            distributed.destroy_process_group()
            raise
        distributed.destroy_process_group()
    except RuntimeError as error:
        if not cli.another_died(error):
            raise
        reason = str(error).splitlines()[0].split("] ", 1)[-1].split(". ")[0]  # without file names
        sys.exit(cli.fail(os.path.basename(sys.argv[0]), f"{problem}: {reason}"))


def gather(value):
    """The values of all processes, a list by rank."""
    values = processes * [value]
    distributed.all_gather_object(values, value)
    return values


def on_first(share=True):
    """Decorator: the first process calls the function, and the others wait. Its USER_ERRORS are
    those of all, and so is its result, unless share=False: then the others get None."""
    def decorate(function):
        def call(*args):
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
        return functools.wraps(function)(call)
    return decorate


def in_turns(function):
    """Decorator: every process calls the function, first rank 0, then one on each node, then the
    others, which find what earlier ones have downloaded. USER_ERRORS of any are raised in all."""
    @functools.wraps(function)
    def call(*args):
        if processes == 1:
            return function(*args)
        turn = 2 if os.environ["LOCAL_RANK"] != "0" else min(rank, 1)
        for now in range(3):
            failure = None
            if now == turn:
                try:
                    result = function(*args)
                except USER_ERRORS as error:
                    failure = f"process {rank}: {error}" if rank else str(error)
            for failure in filter(None, gather(failure)):
                raise ValueError(failure)
        return result
    return call


def require_same(what, words, tensors):
    """Raise ValueError, in all processes, unless words and tensors, in nested lists, are the same in all."""
    if processes > 1:
        mine = [words, checkpoint.digest(dict(flatten(tensors)))]
        if any(theirs != mine for theirs in gather(mine)):
            raise ValueError(f"the processes have different {what}: other files, or another kind of GPU?")


def default_batch(count):
    """The paper's 512 images, or all of `count` that the processes can share, at least two each."""
    return max(2, min(512, count) // processes) * processes


def batch_norm_size(batch_size, sync_bn, device):
    """Over how many images a batch norm takes its statistics: the batch of all processes, if they
    are synchronized, else that of one. Raises ValueError for a batch that cannot be shared."""
    if batch_size % processes or batch_size < 2 * processes:
        raise ValueError(f"--batch_size {batch_size}: must be a multiple of {processes} and at least "
                         f"{2 * processes}")
    together = sync_bn and device.type == "cuda"  # PyTorch has no SyncBatchNorm for CPUs
    return batch_size if processes == 1 or together else batch_size // processes


def rows_of_step(step, batch_size):
    """The rows of a step's batch that this process takes, in the order of an epoch."""
    share = batch_size // processes
    first = step * batch_size + rank * share
    return slice(first, first + share)


class Step(torch.nn.Module):
    """A model and a function that computes with it, as the one module that DDP requires."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        if args:
            return self.function(*args)
        return sum(parameter.square().sum() for parameter in self.model.parameters())


def average_gradients(model, function):
    """The function, which computes with the model, as one whose backward pass gives the mean
    gradients over all processes. The parameters become those of the first one."""
    if processes == 1:
        return function
    warnings.filterwarnings("ignore", "Grad strides do not match")  # of 1x1 convolutions: same memory
    torch._dynamo.config.optimize_ddp = False  # it would cut the compiled step into pieces
    step = torch.nn.parallel.DistributedDataParallel(Step(model, function))
    step.broadcast_buffers = False  # in each step; average_epoch does it when they are used
    step().backward()  # DDP orders its buckets by the first backward pass: the same when resumed
    return step


def average_epoch(metrics, model):
    """Replace the metrics of steps, float32 on the CPU, by their mean over the processes, and the
    model's buffers by those of the first one, the running statistics of its batches."""
    if processes > 1:
        total = metrics.double()  # sums of float32 are exact in it, but for rare cases, in any order
        distributed.all_reduce(total)
        metrics.copy_(total / processes)
        for buffer in model.buffers():
            distributed.broadcast(buffer, 0)


class StopRequest(cli.StopRequest):
    """A request that reaches all processes."""

    sent, code = None, torch.zeros(1)  # 1 + exit code, 0 for none

    def agreed(self):
        """Whether to stop before this step, asked by all in each step; one step after a request of any."""
        if processes == 1:
            return self.requested
        if self.sent:
            self.sent.wait()
        if self.code:
            self.signaled, self.exit_code = True, int(self.code) - 1
            return True
        self.code = torch.tensor([float(self.requested * (1 + self.exit_code))])
        self.sent = distributed.all_reduce(self.code, distributed.ReduceOp.MAX, async_op=True)
        return False
