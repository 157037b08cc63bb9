"""The plain pipeline, the yardstick: what public SimSiam scripts do, in a process of its own.

Pictures go one by one through torchvision's transforms on PIL in DataLoader workers, the network is eager float32 (on
newer GPUs with TF32 in the convolutions, PyTorch's default) in NCHW, and every step reads its loss. The loader has
pinned memory and non-blocking copies on CUDA, and as many workers as help. The network is the same as ours, and so are
the views and the loss.
"""
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import transforms

from benchmarks.worker import LEARNING_RATE, Pipeline, host_images, serve
from simsiam import SimSiam, resnet18, simsiam_loss
from utils.augment import FLIP_P, GRAY_P, JITTER, JITTER_P, MEAN, RATIO, SCALE, SIZE, STD


class TwoViews(Dataset):
    """Two views of each picture of uint8 [N, H, W, 3], by torchvision's transforms on PIL."""

    def __init__(self, images):
        self.images = images
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO),
            transforms.RandomHorizontalFlip(FLIP_P),
            transforms.RandomApply([transforms.ColorJitter(*JITTER)], p=JITTER_P),
            transforms.RandomGrayscale(GRAY_P),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)


def make_loader(pictures, batch, count, workers, device):
    """A loader of `count` batches of TwoViews in random order."""
    sampler = RandomSampler(pictures, replacement=count * batch > len(pictures), num_samples=count * batch)
    return DataLoader(
        pictures, batch, sampler=sampler, num_workers=workers, drop_last=True, pin_memory=device.type == "cuda"
    )


def timed(pictures, batch, count, workers, device, use):
    """Seconds for use(x1, x2) on `count` batches in the steady state: after the workers have started and their
    queues filled, and with batches left for them to make until the last one has been used. use None: the views alone."""
    lead, tail = (2 * workers + 1, 2 * workers) if workers else (0, 0)
    if use is not None:
        lead = min(lead, 1)  # the queues fill during the step
    batches = iter(make_loader(pictures, batch, lead + count + tail, workers, device))

    def work(count):
        for _ in range(count):
            views = next(batches)
            if use is not None:
                use(*views)

    work(lead)
    start = time.perf_counter()
    work(count)
    return time.perf_counter() - start


class Plain(Pipeline):
    def __init__(self, settings):
        super().__init__(settings)
        self.pictures = TwoViews(host_images(settings))
        torch.manual_seed(0)
        self.model = SimSiam(resnet18(self.width)).to(self.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4)
        self.workers = {"views": 0, "end_to_end": 0}

    def train_step(self, x1, x2):
        x1 = x1.to(self.device, non_blocking=True)
        x2 = x2.to(self.device, non_blocking=True)
        loss = simsiam_loss(*self.model(x1, x2))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def choose_workers(self, what, candidates, count):
        """Keep the number of workers with which `what` is fastest; returns views a second with each candidate."""
        use = self.train_step if what == "end_to_end" else None
        seconds = [timed(self.pictures, self.batch, count, workers, self.device, use) for workers in candidates]
        self.workers[what] = candidates[seconds.index(min(seconds))]
        return [2 * self.batch * count / each for each in seconds]

    def first_step(self):
        views = next(iter(make_loader(self.pictures, self.batch, 1, 0, self.device)))
        self.train_step(*views)

    def views(self, count):
        return timed(self.pictures, self.batch, count, self.workers["views"], self.device, None)

    def end_to_end(self, count):
        return timed(self.pictures, self.batch, count, self.workers["end_to_end"], self.device, self.train_step)

    def step(self, count):
        x1, x2 = self.random_views()
        return self.seconds(lambda: [self.train_step(x1, x2) for _ in range(count)])

    def knn(self):
        """The search as the public monitors do it: one batch of queries after the other, votes through a one-hot."""
        queries, bank, labels, classes = self.knn_features()

        def search():
            columns = F.normalize(bank, dim=1).t().contiguous()
            predicted = []
            for chunk in F.normalize(queries, dim=1).split(self.batch):
                similarities, indices = (chunk @ columns).topk(200, dim=1)
                neighbors = labels.expand(len(chunk), -1).gather(1, indices)
                one_hot = torch.zeros(len(chunk) * 200, classes, device=self.device).scatter(1, neighbors.view(-1, 1), 1.0)
                weights = (similarities / 0.1).exp()
                scores = (one_hot.view(len(chunk), 200, classes) * weights[:, :, None]).sum(dim=1)
                predicted.append(scores.argsort(dim=1, descending=True)[:, 0])
            return torch.cat(predicted)

        return self.seconds(search)


if __name__ == "__main__":
    serve(Plain)
