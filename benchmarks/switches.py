"""The optimizations of our pipeline, each of which can be turned off or on."""

# name: what it is, off and on
SWITCHES = {
    "resident": "the data set in the device's memory; off: in the host's, sent in slices of several batches",
    "batched": "views of whole batches on the device; off: the plain pipeline's loader",
    "channels_last": "the network and its inputs in NHWC; off: NCHW",
    "low_precision": "bf16, or fp16 with loss scaling on GPUs without it; off: float32",
    "compile": "torch.compile of the views, the network and the loss; off: eager",
    "fused": "the fused optimizer; off: torch's default for the device",
    "cuda_graph": "the whole step as one CUDA graph",
    "async": "the losses stay on the device; off: read in every step",
    "cpu": "utils.cpu.prepare_cpu: freed memory is kept, no more threads than the quota's cores",
}
CPU_ONLY, CUDA_ONLY = {"cpu"}, {"resident", "cuda_graph"}


def default_switches(device_type):
    """main.py's own choices."""
    on = {"batched", "channels_last", "fused", "async"}
    on |= {"cpu"} if device_type == "cpu" else {"resident", "low_precision", "compile"}
    return {name: name in on for name in SWITCHES}
