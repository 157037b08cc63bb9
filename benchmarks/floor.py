"""What no implementation of the network's training step can beat on a device whose peaks have been measured."""
import math

import torch
from torch import nn

BN_PASSES = 8   # over a batch norm's output, ReLU fused: forward 3 (statistics; read, write), backward 5 (sums of two; read two, write)
ADD_PASSES = 3  # over a residual sum's output, fused with the batch norm before it: forward 1 (read), backward 2 (read, write)


def matmul_peak(device, dtype, seconds, size=None):
    """Floating-point operations a second of a large square matrix product, the best of five."""
    size = size or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    count = 10 if device.type == "cuda" else 1
    best = min(seconds(lambda: [a @ b for _ in range(count)]) for _ in range(6))
    return 2 * size**3 * count / best


def copy_bandwidth(device, seconds):
    """Bytes a second of a copy larger than the caches, read and written bytes both counted, the best of five."""
    count = 2**31 if device.type == "cuda" else 2**29
    source = torch.ones(count, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * count / min(seconds(lambda: target.copy_(source)) for _ in range(6))


def seconds_per_view(backbone, flops, bandwidth, itemsize):
    """The least time of forward and backward of one 32x32 view: every convolution pass bound by arithmetic or by memory
    alone, whichever takes longer, then the traffic of batch norms, ReLUs and residual sums.

    The heads and the optimizer, one or two percent, are left out. flops: operations a second; bandwidth: bytes a
    second; itemsize: bytes of an activation.
    """
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: seen.append((module, inputs[0], output)))
        for module in backbone.modules() if isinstance(module, (nn.Conv2d, nn.BatchNorm2d))
    ]
    device = next(backbone.parameters()).device
    with torch.no_grad():
        backbone(torch.zeros(1, 3, 32, 32, device=device))
    for hook in hooks:
        hook.remove()

    seconds = 0.0
    for module, x, y in seen:
        if isinstance(module, nn.Conv2d):
            operations = 2 * y.numel() * math.prod(module.weight.shape[1:])
            passes = 3 if x.shape[1] > 3 else 2  # the first needs no gradient of its input
            seconds += passes * max(operations / flops, (x.numel() + y.numel()) * itemsize / bandwidth)
        else:
            seconds += BN_PASSES * y.numel() * itemsize / bandwidth
    blocks = [module for module in backbone.modules() if hasattr(module, "downsample")]
    outputs = {id(getattr(block, "bn3", block.bn2)) for block in blocks}
    seconds += sum(ADD_PASSES * y.numel() * itemsize / bandwidth for module, _, y in seen if id(module) in outputs)
    return seconds
