"""A training step as one CUDA graph: recorded at the first call, replayed with a single launch ever after."""
import torch

WARMUP = 3  # calls before the recording: compilation, cuDNN's choice of algorithms and first allocations happen in them


def set_rate(optimizer, rate):
    """Set the learning rate of the first group of parameters, also where a recorded graph reads it from the device. A second
    group keeps its rate."""
    group = optimizer.param_groups[0]
    if torch.is_tensor(group["lr"]) and group["lr"].is_cuda:
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def clone(value):
    """A copy of a tensor, or of a NamedTuple of tensors."""
    return value.clone() if torch.is_tensor(value) else type(value)(*map(clone, value))


def tensors(values):
    """The tensors among the values and in their NamedTuples, in order."""
    for value in values:
        if torch.is_tensor(value):
            yield value
        else:
            yield from tensors(value)


class GraphedStep:
    """train_step(*inputs) -> results on CUDA, as a graph. Inputs are tensors or NamedTuples of tensors, results tensors.

    train_step zeroes the gradients to None first and steps the fused SGD `optimizer` over all parameters of
    `model`; it does not synchronize. All calls have the shapes of the first. The results are overwritten by
    the next call. The calls that precede the recording leave no trace: weights, buffers and momentum are put
    back. The learning rate becomes a tensor on the device, for set_rate to change.
    """

    def __init__(self, train_step, model, optimizer):
        self.train_step, self.model, self.optimizer = train_step, model, optimizer
        self.graph = None

    def __call__(self, *inputs):
        if self.graph is None:
            self.record(inputs)
        for place, tensor in zip(tensors(self.inputs), tensors(inputs), strict=True):
            place.copy_(tensor)
        self.graph.replay()
        return self.results

    def record(self, inputs):
        self.inputs = [clone(value) for value in inputs]
        device = next(tensors(inputs)).device
        for group in self.optimizer.param_groups:
            if not (torch.is_tensor(group["lr"]) and group["lr"].is_cuda):
                group["lr"] = torch.tensor(float(group["lr"]), device=device)
        weights = [tensor.clone() for tensor in self.model.state_dict().values()]
        momentum = {parameter: buffer.clone() for parameter, buffer in self.momentum_buffers()}

        # All on one stream: what the warm-up leaves in autograd and in the allocator belongs to a stream.
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP):
                    self.train_step(*self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                self.results = self.train_step(*self.inputs)
        self.graph = graph

        for tensor, saved in zip(self.model.state_dict().values(), weights):
            tensor.copy_(saved)
        for parameter, buffer in self.momentum_buffers():
            # A new optimizer has none; from zero the first step is the same: 0.9 * 0 + gradient.
            buffer.copy_(momentum[parameter]) if parameter in momentum else buffer.zero_()

    def momentum_buffers(self):
        """Pairs of a parameter and its buffer, of those that have one."""
        for parameter, state in self.optimizer.state.items():
            if state.get("momentum_buffer") is not None:
                yield parameter, state["momentum_buffer"]
