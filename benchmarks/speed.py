"""Speed of this repository beside a plain training script, in two minutes on two idle CPU cores:

    python benchmarks/speed.py
    python benchmarks/speed.py --what end_to_end --width 64 --batch_size 32 --json speed.json

end_to_end: the second epoch of main.py against as many steps of the plain script. views: the augmentation alone. They
take turns; figures are medians, with the lowest and the highest. The plain script is what public repositories have: PIL
transforms per image in DataLoader workers, eager float32 in NCHW (on GPUs with TF32 convolutions, PyTorch's default),
the loss read in every step.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from statistics import median

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
ENVIRONMENT = dict(os.environ)  # for the scripts, without what utils adds

import torch  # before utils, whose OpenMP setting a plain script does not have
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms

from simsiam import SimSiam, resnet18, simsiam_loss
from utils import augment, cli, data, device as devices, log
from utils.augment import FLIP_P, GRAY_P, JITTER, JITTER_P, MEAN, RATIO, SCALE, SIZE, STD

CORES = os.cpu_count() or 1
STEPS = {"end_to_end": {"cuda": 97, "cpu": 4}, "views": {"cuda": 97, "cpu": 16}}
ROW = "{:10} {:>5} {:>5} {:>24} {:>24} {:>6}"


class TwoViews:
    """Two views of each image of uint8 [N, H, W, 3], with torchvision's transforms."""
    transform = transforms.Compose([
        transforms.RandomResizedCrop(SIZE, SCALE, RATIO), transforms.RandomHorizontalFlip(FLIP_P),
        transforms.RandomApply([transforms.ColorJitter(*JITTER)], JITTER_P),
        transforms.RandomGrayscale(GRAY_P), transforms.ToTensor(), transforms.Normalize(MEAN, STD),
    ])

    def __init__(self, images):
        self.images = images

    def __getitem__(self, i):
        image = Image.fromarray(self.images[i])
        return self.transform(image), self.transform(image)


def time_plain(args, device, images, what):
    """Views per second of the plain script, or of its loader. images: uint8 [N, 3, H, W]."""
    torch.backends.cudnn.benchmark = True
    model = SimSiam(resnet18(args.width)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    training, cuda = what == "end_to_end", device.type == "cuda"
    workers = max(1, CORES - 1) if training else CORES
    views = TwoViews(images.permute(0, 2, 3, 1).cpu().contiguous().numpy())
    sampler = RandomSampler(images, num_samples=2**40)  # endless: workers are busy until the clock stops
    loader = DataLoader(views, args.batch_size, sampler=sampler, num_workers=workers, pin_memory=cuda)
    steps = args.steps or STEPS[what][device.type]
    first = 2 * workers  # the step that uses up what the queues held before the first one
    for step, (x1, x2) in enumerate(loader):
        if training:
            x1, x2 = x1.to(device, non_blocking=True), x2.to(device, non_blocking=True)
            loss = simsiam_loss(*model(x1, x2))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()
        if step == first:
            start = time.perf_counter()
        if step == first + steps:
            return 2 * args.batch_size * steps / (time.perf_counter() - start)


def time_views(args, device, images, steps):
    """Views per second as main.py makes them: all draws at once, then batch by batch."""
    batch = args.batch_size
    make = devices.compile_for(device, augment.make_views, args.compile, steps)
    for _ in range(2):  # the first time is slower
        start, generator = time.perf_counter(), augment.epoch_generator(0, 0, device)
        draws = [augment.draw_views(steps * batch, generator) for _ in range(2)]
        for step, chosen in enumerate(torch.randint(len(images), (steps, batch), device=device)):
            rows = slice(step * batch, (step + 1) * batch)
            x1, _ = make(images[chosen], [view.rows(rows) for view in draws])
        x1[0].cpu()  # waits for the GPU
        seconds = time.perf_counter() - start
    return 2 * batch * steps / seconds


def run(script, *options):
    """Run a script in a process of its own; returns its output."""
    command = [sys.executable, os.path.join(ROOT, script), *map(str, options)]
    done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # the script has said why
        sys.exit(done.returncode)
    return done.stdout


def measure(args, device, images, what):
    """The two in turns: a row of the table, with their views per second."""
    steps = args.steps or STEPS[what][device.type]
    sizes = ["--data_root", args.data_root, "--width", args.width, "--batch_size", args.batch_size]
    plain = ["benchmarks/speed.py", "--plain", device, "--what", what, "--steps", steps]
    ours = ["main.py", "--dataset", args.dataset, "--train_size", steps * args.batch_size,
            "--precision", args.precision, "--compile" if args.compile else "--no-compile"]
    ours += [] if args.gpu is None else ["--gpu", args.gpu]
    ours += "--epochs 2 --test_size 10 --eval_freq 100 --quiet --trial run --exp_dir".split()
    row = {"what": what, "width": args.width, "batch": args.batch_size, "plain": [], "ours": []}
    for _ in cli.bar(range(args.rounds), leave=False):
        row["plain"].append(float(run(*plain, *sizes)))
        if what == "views":
            row["ours"].append(time_views(args, device, images, steps))
            continue
        with tempfile.TemporaryDirectory() as folder:
            run(*ours, folder, *sizes)
            row["ours"].append(log.read(os.path.join(folder, "run"))[-1]["views_per_s"])
    return row | {"better": median(row["ours"]) / median(row["plain"])}


def main(argv=None):
    parser = cli.Parser(prog="benchmarks/speed.py", description=__doc__)
    add, whole = parser.add_argument, cli.whole_number
    add("--what", choices=STEPS, help="measure only this (default: both)")
    add("--width", type=whole(1), help="channels of the first stage (GPU: 64, CPU: 16)")
    add("--batch_size", type=whole(2), default=512, help="images per step")
    add("--steps", type=whole(1), help="steps per measurement (default: by device)")
    add("--rounds", type=whole(1), default=3, help="measurements per figure")
    add("--json", type=cli.file_path, default=os.devnull, metavar="FILE", help="write all measurements")
    add("--data_root", type=cli.file_path, default="data", metavar="DIR", help="of CIFAR-10; else shapes")
    add("--plain", metavar="DEVICE", help="only time the plain script, on cpu or cuda:N")
    add("--compile", action=argparse.BooleanOptionalAction, help="default: on with CUDA only")
    cli.add_device_options(parser)
    args = parser.parse_args(argv)
    args.dataset = "cifar10" if os.path.isdir(f"{args.data_root}/cifar-10-batches-py") else "shapes"
    with parser.user_errors():
        device = torch.device(args.plain) if args.plain else devices.select_device(args.gpu)
        args.width = args.width or (64 if device.type == "cuda" else 16)
        images = data.load_dataset(args.dataset, args.data_root, device).train_images
        if args.plain:
            print(time_plain(args, device, images, args.what or "end_to_end"))
            return
        args.precision = devices.select_precision(args.precision, device)
        args.compile = device.type == "cuda" if args.compile is None else args.compile
        machine = (f"{devices.describe(device)}, {CORES} cores, torch {torch.__version__}, "
                   f"torchvision {torchvision.__version__}, ours in {args.precision}")
        file, rows = open(args.json, "w", encoding="utf-8"), []
        print(machine, ROW.format("views/s", "width", "batch", "plain", "ours", "better"), sep="\n")
        for what in [args.what] if args.what else STEPS:
            rows.append(measure(args, device, images, what))
            *row, plain, ours, better = rows[-1].values()
            cells = [f"{median(each):,.0f} ({min(each):,.0f}-{max(each):,.0f})" for each in (plain, ours)]
            print(ROW.format(*row, *cells, f"{better:.2f}"), flush=True)
        with file:
            json.dump({"machine": machine, "unit": "views/s", "rows": rows}, file, indent=1)


if __name__ == "__main__":
    cli.run_script(main)
