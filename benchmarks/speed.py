"""Speed of this repository beside a plain training script, in two minutes on two idle CPU cores:

    python benchmarks/speed.py
    python benchmarks/speed.py --width 64 --batch_size 32 --json speed.json

The second epoch of main.py against as many steps of the plain script, in turns; the ratio is that of
medians. The plain script is what public repositories have: PIL transforms in DataLoader workers, eager
float32 in NCHW (TF32 convolutions on GPUs), a loss read in each step.
"""
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
from PIL import Image
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms

from simsiam import SimSiam, resnet18, simsiam_loss
from utils import augment, cli, data, device as devices, log

STEPS = {"cuda": 97, "cpu": 4}  # per measurement
TRANSFORM = transforms.Compose([
    transforms.RandomResizedCrop(augment.SIZE, augment.SCALE, augment.RATIO),
    transforms.RandomHorizontalFlip(augment.FLIP_P),
    transforms.RandomApply([transforms.ColorJitter(*augment.JITTER)], augment.JITTER_P),
    transforms.RandomGrayscale(augment.GRAY_P), transforms.ToTensor(),
    transforms.Normalize(augment.MEAN, augment.STD)])


def two_views(batch):
    """Two batches of views, float32 [B, 3, 32, 32], of a list of images, uint8 [32, 32, 3]."""
    images = [Image.fromarray(image) for image in batch]
    return [torch.stack([TRANSFORM(image) for image in images]) for _ in range(2)]


def time_plain(device, images, width, batch_size):
    """Views per second of the plain script. images: uint8 [N, 3, H, W]."""
    torch.backends.cudnn.benchmark = True
    model = SimSiam(resnet18(width)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, momentum=0.9, weight_decay=5e-4)
    images, workers = images.permute(0, 2, 3, 1).cpu().contiguous().numpy(), max(1, devices.cores() - 1)
    endless = RandomSampler(images, num_samples=2**40)  # workers are busy until the clock stops
    loader = DataLoader(images, batch_size, sampler=endless, num_workers=workers,
                        collate_fn=two_views, pin_memory=device.type == "cuda")
    steps = STEPS[device.type]
    first = 2 * workers  # the step that uses up what the queues held before the first one
    for step, (x1, x2) in enumerate(loader):
        x1, x2 = x1.to(device, non_blocking=True), x2.to(device, non_blocking=True)
        loss = simsiam_loss(*model(x1, x2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        if step == first:
            start = time.perf_counter()
        if step == first + steps:
            return 2 * batch_size * steps / (time.perf_counter() - start)


def run(*command):
    """The output of a script, in a process of its own."""
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # the script has said why
        sys.exit(done.returncode)
    return done.stdout


def main(argv=None):
    parser = cli.Parser(prog="benchmarks/speed.py", description=__doc__)
    add, whole = parser.add_argument, cli.whole_number
    add("--width", type=whole(1), help="channels of the first stage (GPU: 64, CPU: 16)")
    add("--batch_size", type=whole(2), default=512, help="images per step")
    add("--rounds", type=whole(1), default=3, help="measurements of each")
    add("--json", type=cli.file_path, default=os.devnull, metavar="FILE", help="for the measurements")
    add("--plain", metavar="DEVICE", help="only time the plain script, on cpu or cuda:N")
    cli.add_device_options(parser)
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = torch.device(args.plain) if args.plain else devices.select_device(args.gpu)
        width, batch = args.width or (64 if device.type == "cuda" else 16), args.batch_size
        if args.plain:
            images = data.load_dataset("shapes", None, device).train_images
            print(time_plain(device, images, width, batch))
            return
        precision = devices.select_precision(args.precision, device)
        file = open(args.json, "w", encoding="utf-8")
    sizes = ["--width", width, "--batch_size", batch]
    ours = ["main.py", "--dataset", "shapes", "--test_size", 10, "--precision", precision, "--epochs", 2]
    ours += ["--train_size", STEPS[device.type] * batch, "--eval_freq", 100, "--quiet", "--trial", "run"]
    ours += ["--compile", "--gpu", device.index] if device.type == "cuda" else ["--no-compile", "--gpu", "none"]
    machine = f"{devices.describe(device)}, {devices.cores()} cores, torch {torch.__version__}"
    row = {"machine": f"{machine}, ours in {precision}", "unit": "views/s", "width": width, "batch": batch,
           "plain": [], "ours": []}
    for _ in cli.bar(range(args.rounds), leave=False):
        row["plain"].append(round(float(run("benchmarks/speed.py", "--plain", device, *sizes)), 1))
        with tempfile.TemporaryDirectory() as folder:
            run(*ours, *sizes, "--exp_dir", folder)
            row["ours"].append(log.read(os.path.join(folder, "run"))[-1]["views_per_s"])
    row["better"] = median(row["ours"]) / median(row["plain"])
    print("\n".join(f"{name:8} {value}" for name, value in row.items()))
    with file:
        json.dump(row, file, indent=1)


if __name__ == "__main__":
    cli.run_script(main)
