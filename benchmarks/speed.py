"""Speed of this repository beside a plain training script (benchmarks/plain.py):

    python benchmarks/speed.py
    python benchmarks/speed.py --what end_to_end --precision bf16 --json speed.json
    python benchmarks/speed.py --profile profile.txt

end_to_end: training, main.py's second epoch against as many steps of plain.py. views: the augmentation alone. Default:
width 64, batch 512 on a GPU; width 16, batch 512 and width 64, batch 32 on a CPU, about four minutes on two idle cores.
The two programs take turns. Figures are medians, with the lowest and the highest.
"""
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
ENVIRONMENT = dict(os.environ)  # for plain.py, without what utils adds

import torch
import torchvision
from tqdm import tqdm

from benchmarks import plain
from utils.augment import apply_two_views, draw_views, epoch_generator
from utils.cli import Parser, add_device_options, file_path, run_script, whole_number
from utils.device import describe, select_device, select_precision

WHAT = ("end_to_end", "views")
SIZES = {"cuda": [(64, 512)], "cpu": [(16, 512), (64, 32)]}  # width, batch
CORES = os.cpu_count() or 1
ROW = "{:>5} {:>5}  {:10} {:>24} {:>24} {:>6}"


def run(script, options, log=None):
    """Run a script; returns the views_per_s in the last line of its log or of its output."""
    done = subprocess.run([sys.executable, ROOT / script, *options], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    if done.returncode:  # the script has said why
        sys.exit(done.returncode)
    return json.loads((Path(log).read_text() if log else done.stdout).splitlines()[-1])["views_per_s"]


def run_main(args, width, batch, steps):
    sizes = f"--width {width} --batch_size {batch} --train_size {steps * batch} --epochs 2"
    with tempfile.TemporaryDirectory() as folder:
        return run("main.py", [*args.main, *sizes.split(), "--exp_dir", folder], Path(folder, "run", "log.jsonl"))


def run_plain(args, width, batch, steps, workers, *options):
    sizes = f"--width {width} --batch_size {batch} --steps {steps} --workers {workers}"
    return run("benchmarks/plain.py", [*args.plain, *sizes.split(), *options])


def write_profile(args, device, width, batch):
    """Profile an epoch of main.py, with its kNN, in this process. Returns its exit code."""
    steps = args.steps or (24 if device.type == "cuda" else 6)
    sizes = f"--width {width} --batch_size {batch} --train_size {steps * batch} --epochs 1"
    pretrain, options = runpy.run_path(str(ROOT / "main.py"))["main"], [*args.main, *sizes.split(), "--exp_dir"]
    with open(args.profile, "w", encoding="utf-8") as file, tempfile.TemporaryDirectory() as folder:
        pretrain([*options, os.path.join(folder, "warm-up")])  # else compilation and tuning fill the profile
        with torch.profiler.profile() as profiler:
            code = pretrain([*options, os.path.join(folder, "profiled")])
        file.write(profiler.key_averages().table(f"self_{device.type}_time_total", 40, max_name_column_width=80))
    return code


def take_turns(args, **functions):
    """Call the functions in turns, args.rounds times each. Returns their results by name."""
    results = [{name: function() for name, function in functions.items()}
               for _ in tqdm(range(args.rounds), leave=False, disable=None)]
    return {name: [result[name] for result in results] for name in functions}


def measure_training(args, device, width, batch):
    steps = args.steps or (4 if device.type == "cpu" else max(1, 50_000 // batch))
    return take_turns(args, plain=lambda: run_plain(args, width, batch, steps, max(1, CORES - 1)),
                      ours=lambda: run_main(args, width, batch, steps))


def measure_views(args, device, batch):
    """Ours as main.py makes them: all draws at once, then batch by batch."""
    steps = args.steps or max(1, (8192 if device.type == "cpu" else 50_000) // batch)
    images = torch.from_numpy(plain.load_images(args.data_root)).permute(0, 3, 1, 2).contiguous().to(device)
    make_views = torch.compile(apply_two_views, dynamic=False) if args.compile else apply_two_views

    def epoch():
        start, generator = time.perf_counter(), epoch_generator(0, 0, device)
        draws = [draw_views(steps * batch, generator) for _ in range(2)]
        for step, chosen in enumerate(torch.randint(len(images), (steps, batch), device=device)):
            rows = slice(step * batch, (step + 1) * batch)
            x1, _ = make_views(images[chosen], *(view.rows(rows) for view in draws))
        x1[0].cpu()  # waits for the GPU
        return 2 * batch * steps / (time.perf_counter() - start)

    epoch()  # the first time is slower
    return take_turns(args, plain=lambda: run_plain(args, 1, batch, steps, CORES, "--views_only"),
                      ours=epoch)


def add_row(path, table, what, width, batch, results):
    """Print a row of the table and write them all to the file. width: None if it has no influence."""
    better = median(results["ours"]) / median(results["plain"])
    table["rows"].append(dict(what=what, width=width, batch=batch, unit="views/s", **results, better=better))
    Path(path).write_text(json.dumps(table, indent=1))
    cells = [f"{median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})" for values in results.values()]
    print(ROW.format(width or "", batch, what, *cells, f"{better:.2f}"), flush=True)


def main(argv=None):
    parser = Parser(prog="benchmarks/speed.py", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=list(WHAT), help="what to measure")
    parser.add_argument("--width", nargs="+", type=whole_number(1), metavar="N", help="channels of the first stage")
    parser.add_argument("--batch", nargs="+", type=whole_number(2), metavar="N", help="images per step")
    parser.add_argument("--steps", type=whole_number(1), metavar="N", help="steps per measurement (default: by device)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, metavar="N", help="measurements per figure")
    parser.add_argument("--json", type=file_path, metavar="FILE", default=os.devnull, help="write all measurements")
    parser.add_argument("--profile", type=file_path, metavar="FILE", help="only write a profile of a short epoch")
    parser.add_argument("--data_root", type=file_path, default="data", metavar="DIR", help="of CIFAR-10; else shapes")
    add_device_options(parser, compiled=True)
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = select_device(args.gpu)
        precision, sizes = select_precision(args.precision, device), SIZES[device.type]
        args.compile = device.type == "cuda" if args.compile is None else args.compile
        has_cifar = os.path.isdir(os.path.join(args.data_root, "cifar-10-batches-py"))
        args.plain = ["--data_root", args.data_root, *([] if args.gpu is None else ["--gpu", str(args.gpu)])]
        args.main = [*args.plain, "--dataset", "cifar10" if has_cifar else "shapes", "--precision", precision,
                     "--compile" if args.compile else "--no-compile",
                     *"--test_size 10 --eval_freq 100 --save_freq 100 --trial run --quiet".split()]
        if args.width or args.batch:
            sizes = [(width, batch) for width in args.width or sizes[0][:1] for batch in args.batch or sizes[0][1:]]
        if args.profile:
            return write_profile(args, device, *sizes[0])
        Path(args.json).write_text("")  # fails now if it cannot be written
        table = {"machine": f"{describe(device)}, {CORES} cores, torch {torch.__version__}, torchvision "
                            f"{torchvision.__version__}, ours in {precision}", "rows": []}
        print(table["machine"], ROW.format("width", "batch", "views/s", "plain", "ours", "better"), sep="\n")
        for size in sizes if "end_to_end" in args.what else ():
            add_row(args.json, table, "end_to_end", *size, measure_training(args, device, *size))
        for batch in dict.fromkeys(batch for _, batch in sizes) if "views" in args.what else ():
            add_row(args.json, table, "views", None, batch, measure_views(args, device, batch))
    return 0


if __name__ == "__main__":
    run_script(main)
