"""What the two pipelines share: each runs in a process of its own and answers the calls of speed.py, so that no
setting, cache or memory of one helps or hurts the other, and only one computes at a time."""
import json
import os
import resource
import sys
import time

import torch
from torchvision.datasets import CIFAR10

from utils.shapes import draw_shapes

LEARNING_RATE = 0.03
KNN_BANK, KNN_QUERIES, KNN_CLASSES = 60_000, 10_000, 10
SHAPES = 10_000  # pictures where there is no CIFAR-10


def usable_cores():
    """The cores that this process may use: by its affinity where the system has one, else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def host_images(settings):
    """The pictures to train on, uint8 [N, 32, 32, 3]: CIFAR-10 where data_root has it, else the built-in shapes."""
    root = settings["data_root"]
    if os.path.isdir(os.path.join(root, CIFAR10.base_folder)):
        return CIFAR10(root).data
    return draw_shapes(SHAPES, 0)[0]


class Pipeline:
    """The settings, and what is measured alike. `seconds` and what calls it return seconds."""

    def __init__(self, settings):
        self.device = torch.device(settings["device"])
        self.width, self.batch = settings["width"], settings["batch"]

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, work):
        self.synchronize()
        start = time.perf_counter()
        work()
        self.synchronize()
        return time.perf_counter() - start

    def random_views(self):
        generator = torch.Generator(self.device).manual_seed(0)
        return tuple(torch.randn(self.batch, 3, 32, 32, generator=generator, device=self.device) for _ in range(2))

    def knn_features(self):
        """Queries, bank, labels and the number of classes: clusters, cut at 0 as the backbone's features are."""
        generator = torch.Generator(self.device).manual_seed(0)
        dim = self.model.backbone.feature_dim

        def normal(*shape):
            return torch.randn(shape, generator=generator, device=self.device)

        centers = normal(KNN_CLASSES, dim)
        labels = torch.randint(KNN_CLASSES, (KNN_BANK,), generator=generator, device=self.device)
        bank = (centers[labels] + 3 * normal(KNN_BANK, dim)).relu()
        queries = (centers[labels[:KNN_QUERIES]] + 3 * normal(KNN_QUERIES, dim)).relu()
        return queries, bank, labels, KNN_CLASSES

    def memory(self):
        """The peak of a training step in MiB: of the process since its start on the CPU, of the allocator on CUDA."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)
        self.end_to_end(1)
        if self.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.device) / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def serve(pipeline):
    """Make the pipeline from the settings in argv, run its first step, then answer calls, lines of JSON, until the end
    of stdin. What is printed meanwhile goes to stderr."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    worker = pipeline(json.loads(sys.argv[1]))
    worker.first_step()
    worker.synchronize()
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(getattr(worker, name)(*arguments)), file=answers, flush=True)
