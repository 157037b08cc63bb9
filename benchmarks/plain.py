"""The yardstick of speed.py: a plain SimSiam training script as public repositories have it. Prints one JSON line.

    python benchmarks/plain.py --data_root data --width 16 --batch_size 512 --steps 8 --workers 1

PIL transforms per image in DataLoader workers, eager float32 (on newer GPUs with PyTorch's default, TF32 convolutions)
in NCHW, the loss read in every step. Network, loss and the numbers of the augmentation are this repository's.
"""
import json
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # before utils, whose OpenMP setting a plain script does not have
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import CIFAR10

from simsiam import SimSiam, resnet18, simsiam_loss
from utils.augment import FLIP_P, GRAY_P, JITTER, JITTER_P, MEAN, RATIO, SCALE, SIZE, STD
from utils.cli import Parser, file_path, run_script, whole_number
from utils.shapes import draw_shapes


def load_images(data_root):
    """Training images, uint8 [N, 32, 32, 3]: CIFAR-10 if data_root has it, else the built-in shapes."""
    return CIFAR10(data_root).data if os.path.isdir(f"{data_root}/cifar-10-batches-py") else draw_shapes(10_000, 0)[0]


class TwoViews:
    """Two views of each image of uint8 [N, H, W, 3]."""

    def __init__(self, images):
        self.images = images
        self.transform = transforms.Compose([
            transforms.RandomResizedCrop(SIZE, scale=SCALE, ratio=RATIO), transforms.RandomHorizontalFlip(FLIP_P),
            transforms.RandomApply([transforms.ColorJitter(*JITTER)], JITTER_P), transforms.RandomGrayscale(GRAY_P),
            transforms.ToTensor(), transforms.Normalize(MEAN, STD),
        ])

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)


def main(argv=None):
    parser = Parser(prog="benchmarks/plain.py", description=__doc__)
    parser.add_argument("--data_root", type=file_path, default="data", metavar="DIR", help="of CIFAR-10; else shapes")
    parser.add_argument("--width", type=whole_number(1), default=64, metavar="N", help="channels of the first stage")
    parser.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="images per step")
    parser.add_argument("--steps", type=whole_number(1), default=97, metavar="N", help="steps to time")
    parser.add_argument("--workers", type=whole_number(0), default=1, metavar="N", help="loader processes")
    parser.add_argument("--gpu", type=int, metavar="N", help="index of the CUDA GPU (default: the first, else the CPU)")
    parser.add_argument("--views_only", action="store_true", help="time the loader alone")
    args = parser.parse_args(argv)
    torch.backends.cudnn.benchmark = True
    with parser.user_errors():
        cuda = args.gpu is not None or torch.cuda.is_available()
        device = torch.device("cuda", args.gpu or 0) if cuda else torch.device("cpu")
        model = SimSiam(resnet18(args.width)).to(device)
        images = load_images(args.data_root)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    sampler = RandomSampler(images, num_samples=2**40)  # endless: the workers are busy until the clock stops
    loader = DataLoader(TwoViews(images), args.batch_size, sampler=sampler, num_workers=args.workers, pin_memory=cuda)
    begin = 2 * args.workers  # the step that uses up what the queues held before the first one
    for step, (x1, x2) in enumerate(loader):
        if not args.views_only:
            x1, x2 = x1.to(device, non_blocking=True), x2.to(device, non_blocking=True)
            loss = simsiam_loss(*model(x1, x2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        if step == begin:
            start = time.perf_counter()
        if step == begin + args.steps:
            seconds = time.perf_counter() - start
            break
    print(json.dumps({"views_per_s": round(2 * args.batch_size * args.steps / seconds, 1)}))
    return 0


if __name__ == "__main__":
    run_script(main)
