"""Speed and memory of this project's training beside the plain torchvision pipeline, measured in one run:

    python benchmarks/speed.py
    python benchmarks/speed.py --what memory --width 64 --batch 128 256 512 1024 --json FILE
    python benchmarks/speed.py --switches compile fused

On a CUDA GPU it measures the full size (width 64, batch 512), on a CPU a small one, in less than 5 minutes on two cores.
Each pipeline lives in a process of its own; the measurements take turns. The figures are medians, with the smallest and
the largest; on CUDA it also says what the step reaches of the GPU's peak. With --switches it measures, instead of the plain
pipeline, ours with each optimization turned the other way next to ours as it is.

views         views a second, nothing else done                   step    views a second of the network's step alone
end_to_end    views a second of training                          knn     seconds of a search, 10,000 in 60,000 features
start         seconds from nothing to the end of the first step   memory  MiB at the peak of a training step
"""
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
import torchvision
from tqdm import tqdm

from benchmarks.measure import RATES, UNITS, Benchmark
from benchmarks.switches import CPU_ONLY, CUDA_ONLY, SWITCHES, default_switches
from benchmarks.worker import usable_cores
from utils.cli import Parser, real_number, run, whole_number
from utils.device import describe, select_device

# What is measured by default: width, batch, what.
FULL = [(64, 512, tuple(UNITS))]
SMALL = [(16, 512, tuple(UNITS)), (64, 32, ("step", "end_to_end"))]


def make_parser():
    parser = Parser(prog="benchmarks/speed.py", description=__doc__)
    parser.add_argument("--what", nargs="+", choices=UNITS, help="default: all")
    parser.add_argument("--width", nargs="+", type=whole_number(1), help="channels of the first stage (default: by the device)")
    parser.add_argument("--batch", nargs="+", type=whole_number(2), help="pictures a step (default: by the device)")
    parser.add_argument("--rounds", type=whole_number(1), default=3, help="measurements of each figure")
    parser.add_argument("--seconds", type=real_number, default=2.0, help="what a measurement of views, step or end_to_end should last")
    parser.add_argument(
        "--switches", nargs="*", choices=SWITCHES, metavar="NAME",
        help="measure ours with these optimizations turned, one at a time (default: all that the device has), and for compile "
        "the start: " + "; ".join(f"{name}: {text}" for name, text in SWITCHES.items()),
    )
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    parser.add_argument("--profile", metavar="FILE", help="write a profile of our step")
    parser.add_argument("--data_root", default="data", metavar="DIR", help="folder that has cifar-10-batches-py; else the built-in shapes are used")
    parser.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    return parser


def print_table(rows):
    print(f"{'width':>5} {'batch':>5}  {'':10} {'':7} {'plain':>24} {'ours':>24}  {'better':>7}")
    plain = [row for row in rows if row["pipeline"] == "plain"]
    for row in plain:
        key = ("what", "width", "batch")
        ours = next(r for r in rows if r["pipeline"] == "ours" and all(r[k] == row[k] for k in key))
        better = ours["median"] / row["median"] if row["what"] in RATES else row["median"] / ours["median"]

        def cell(row):
            digits = 0 if row["median"] >= 100 else 2
            text = f"{row['median']:,.{digits}f}"
            return text if row["runs"] == 1 else f"{text} ({row['low']:,.{digits}f}-{row['high']:,.{digits}f})"

        print(
            f"{row['width']:>5} {row['batch']:>5}  {row['what']:10} {row['unit']:7} {cell(row):>24} {cell(ours):>24}  {better:>6.2f}x"
        )


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = select_device(args.gpu)
        if args.json and not os.path.isdir(os.path.dirname(args.json) or "."):
            raise ValueError(f"--json {args.json}: there is no such folder")
        absent = CUDA_ONLY if device.type == "cpu" else CPU_ONLY
        if absent.intersection(args.switches or ()):
            raise ValueError(f"--switches {' '.join(sorted(absent.intersection(args.switches)))}: not on this device")
        if args.switches is not None and args.what:
            raise ValueError("--switches measures step and end_to_end; leave --what out")
    plan = FULL if device.type == "cuda" else SMALL
    if args.what or args.width or args.batch or args.switches is not None:
        widths, batch_sizes = args.width or [plan[0][0]], args.batch or [plan[0][1]]
        plan = [(width, batch, args.what or tuple(UNITS)) for width in widths for batch in batch_sizes]
    cores = usable_cores()
    size = "full size" if device.type == "cuda" else "small size"
    print(f"{size}: {describe(device)}, {cores} cores, torch {torch.__version__}, torchvision {torchvision.__version__}")

    rows = []

    def keep(row):
        rows.append(row)
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)

    with parser.user_errors(), tqdm(unit="", bar_format="{n} [{elapsed}] {desc}", disable=None, leave=False) as bar:
        for width, batch, whats in plan:
            settings = {
                "device": str(device), "width": width, "batch": batch, "data_root": os.path.abspath(args.data_root),
                "switches": default_switches(device.type),
            }
            benchmark = Benchmark(settings, args.rounds, args.seconds, bar, keep)
            if args.switches is None:
                benchmark.compare(whats, cores)
            else:
                benchmark.turn_switches(args.switches or [name for name in SWITCHES if name not in absent])
            if args.profile:
                worker = benchmark.launch("ours")
                worker.call("profile", os.path.abspath(args.profile))
                worker.close()
    if args.switches is None:
        print_table(rows)
    return 0


if __name__ == "__main__":
    run(main)
