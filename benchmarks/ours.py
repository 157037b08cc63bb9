"""Our pipeline with every optimization switchable, in a process of its own.

With the switches as they are by default its step is main.py's, bit for bit; a test holds that.
"""
from utils.cpu import prepare_cpu  # before torch

import torch

from benchmarks.worker import LEARNING_RATE, Pipeline, host_images, serve, usable_cores
from simsiam import SimSiam, feature_std, resnet18, simsiam_loss
from utils.augment import apply_two_views, draw_views, epoch_generator
from utils.data import batches
from utils.device import DTYPES, autocast, memory_layout, select_precision
from utils.graph import GraphedStep
from utils.knn import knn_predict


class Ours(Pipeline):
    def __init__(self, settings):
        super().__init__(settings)
        self.on = settings["switches"]
        if self.on["cpu"]:
            prepare_cpu()
        torch.backends.cudnn.benchmark = True
        self.pictures = host_images(settings)
        images = torch.from_numpy(self.pictures).permute(0, 3, 1, 2).contiguous()
        self.images = images.to(self.device) if self.on["resident"] else images

        self.precision = "fp32"
        if self.on["low_precision"]:
            self.precision = "bf16" if self.device.type == "cpu" else select_precision("auto", self.device)
        self.layout = memory_layout(self.device, self.width, self.batch) if self.on["channels_last"] else torch.contiguous_format
        torch.manual_seed(0)
        self.model = SimSiam(resnet18(self.width)).to(self.device, memory_format=self.layout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), LEARNING_RATE, 0.9, weight_decay=5e-4, fused=self.on["fused"] or None
        )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.make_views = torch.compile(apply_two_views, dynamic=False) if self.on["compile"] else apply_two_views
        self.train_step = self.make_step(self.images_to_loss)
        self.network_step = self.make_step(self.views_to_loss)

    def views_to_loss(self, x1, x2):
        x1, x2 = (x.contiguous(memory_format=self.layout) for x in (x1, x2))
        with autocast(self.device, self.precision)():
            p1, p2, z1, z2 = self.model(x1, x2)
        return simsiam_loss(p1, p2, z1, z2), feature_std(z1)

    def images_to_loss(self, images, draws1, draws2):
        return self.views_to_loss(*apply_two_views(images, draws1, draws2))

    def make_step(self, to_loss):
        """A training step of the inputs of to_loss."""
        if self.on["compile"]:
            to_loss = torch.compile(to_loss, dynamic=False)

        def step(*inputs):
            self.optimizer.zero_grad(set_to_none=True)
            loss, std = to_loss(*inputs)
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return loss.detach(), std

        return GraphedStep(step, self.model, self.optimizer) if self.on["cuda_graph"] else step

    def epoch(self, count):
        """The beginning of an epoch: `count` batches of pictures and their draws, which come all at once before."""
        rows = count * self.batch
        generator = epoch_generator(0, 0, self.device)
        order = torch.randperm(len(self.images), generator=generator, device=self.device)
        order = order.repeat(-(-rows // len(order)))[:rows]
        draws1, draws2 = draw_views(rows, generator), draw_views(rows, generator)
        for i, images in enumerate(batches(self.images, order, self.batch, self.device)):
            part = slice(i * self.batch, (i + 1) * self.batch)
            yield images, draws1.rows(part), draws2.rows(part)

    def train(self, inputs, step):
        """The loop: all the losses stay on the device, or each is read at once."""
        sums = torch.zeros(2, device=self.device)
        for given in inputs:
            loss, std = step(*given)
            sums += torch.stack((loss, std))
            if not self.on["async"]:
                loss.item()
        return sums.tolist()

    def first_step(self):
        self.end_to_end(1)

    def views(self, count):
        def work():
            for inputs in self.epoch(count):
                self.make_views(*inputs)

        return self.seconds(work)

    def step(self, count):
        views = self.random_views()
        return self.seconds(lambda: self.train([views] * count, self.network_step))

    def end_to_end(self, count):
        if self.on["batched"]:
            return self.seconds(lambda: self.train(self.epoch(count), self.train_step))
        from benchmarks import plain  # here, as others below, so that its import is no part of the start

        pictures, workers = plain.TwoViews(self.pictures), usable_cores() - 1

        def use(*views):
            self.train([[x.to(self.device, non_blocking=True) for x in views]], self.network_step)

        return plain.timed(pictures, self.batch, count, workers, self.device, use)

    def knn(self):
        queries, bank, labels, classes = self.knn_features()
        return self.seconds(lambda: knn_predict(queries, bank, labels, 200, 0.1, classes))

    def limits(self):
        """What bounds the step: its floating-point operations a view, this device's measured peaks, and the floor."""
        from torch.utils.flop_counter import FlopCounterMode

        from benchmarks import floor

        model = SimSiam(resnet18(self.width)).to(self.device)
        with FlopCounterMode(display=False) as counter:
            simsiam_loss(*model(*(torch.zeros(2, 3, 32, 32, device=self.device),) * 2)).backward()
        dtype = DTYPES[self.precision]
        peak = floor.matmul_peak(self.device, dtype, self.seconds)
        bandwidth = floor.copy_bandwidth(self.device, self.seconds)
        return {
            "precision": self.precision, "flop_per_view": counter.get_total_flops() / 4,
            "flops": peak, "bandwidth": bandwidth,
            "floor_per_view": floor.seconds_per_view(model.backbone, peak, bandwidth, dtype.itemsize),
        }

    def profile(self, path):
        """A profile of three steps end to end, the costliest operations first."""
        from torch.profiler import ProfilerActivity, profile

        self.end_to_end(3)
        cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
        with profile(activities=activities) as profiler:
            self.end_to_end(3)
        order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
        with open(path, "w") as file:
            file.write(table)


if __name__ == "__main__":
    serve(Ours)
