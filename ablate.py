"""The paper's study (Sec. 4) on CIFAR-10: runs of main.py, a table beside the paper's, and curves.

    python ablate.py all --data_root data --epochs 200 --gpu 0
    python ablate.py stop_gradient --seeds 2 --data_root data --epochs 30 --width 16 \\
        --train_size 5000 --batch_size 64 --learning_rate 0.03 --precision fp32

The second takes about two hours on one CPU core: kNN ends at 30 % with stop-gradient, at 20 %
without. Other options go to main.py. Finished runs are skipped, interrupted ones resumed.
"""
import itertools
import os
import shlex
import sys
import traceback
from pathlib import Path
from statistics import fmean, stdev

import main as pretraining
from utils import checkpoint, cli, log, plot
from utils.run import read_config

# Study: {variant: (main.py options, the paper's linear top-1 on ImageNet in percent)}, of Figure 2,
# Tables 1 to 3, Sec. 4.5 and 4.6. Where the default has 68.1, the paper keeps the predictor's rate
# constant. WARMUP: a tenth of the epochs. Four views are FastSiam's, not in the paper.
STUDIES = {
    "stop_gradient": {"default": ("", "67.7"), "no-stop-gradient": ("--no-stop_gradient", "0.1")},
    "predictor": {"default": ("", "67.7"), "no-predictor": ("--predictor none", "0.1"),
                  "fixed-predictor": ("--predictor fixed", "1.5"),
                  "constant-predictor-rate": ("--fix_pred_lr", "68.1")},
    "batch_size": {"batch-64": ("--batch_size 64", "66.1"), "batch-128": ("--batch_size 128", "67.3"),
                   "batch-256": ("--batch_size 256", "68.1"), "batch-512": ("--batch_size 512", "68.1"),
                   "batch-1024": ("--batch_size 1024 --warmup_epochs WARMUP", "68.0"),
                   "batch-2048": ("--batch_size 2048 --warmup_epochs WARMUP", "67.9"),
                   "batch-4096": ("--batch_size 4096 --warmup_epochs WARMUP", "64.0")},
    "batch_norm": {"head-bn-none": ("--head_bn none --warmup_epochs WARMUP", "34.6"),
                   "head-bn-hidden": ("--head_bn hidden", "67.4"), "default": ("", "68.1"),
                   "head-bn-all": ("--head_bn all", "unstable")},
    "similarity": {"default": ("", "68.1"), "cross-entropy": ("--similarity cross_entropy", "63.2")},
    "symmetry": {"default": ("", "68.1"), "asymmetric": ("--symmetry asymmetric", "64.8"),
                 "asymmetric-2x": ("--symmetry asymmetric --views 4", "67.3")},
    "views": {"default": ("", "68.1"), "four-views": ("--views 4", "–")}}
VARIANTS = {name: options for study in STUDIES.values() for name, (options, _) in study.items()}
VARIANTS["default"] = "--untrained"


def make_parser():
    parser = cli.Parser(prog="ablate.py", description=__doc__, usage="ablate.py NAME... [options]")
    names, add = ["all", *STUDIES, *VARIANTS], parser.add_argument
    add("names", nargs="+", choices=names, metavar="NAME", help=f"study or variant: {', '.join(names)}")
    add("--seeds", type=cli.whole_number(1), default=1, help="runs of each variant")
    add("--epochs", type=cli.whole_number(1), default=200, help="epochs of each run")
    add("--batch_size", type=cli.whole_number(2), default=512, help="except in batch_size")
    add("--learning_rate", type=cli.real_number, help="for --batch_size; scaled for others")
    add("--exp_dir", type=cli.file_path, default="experiments/ablations", metavar="DIR", help="runs")
    add("--table", action="store_true", help="only write tables and figures of finished runs")
    return parser


def train(args, names, rest):
    """Train the variants, seed by seed, until a signal or --max_minutes stops a run. Returns the
    exit code: 128 + the signal's number, else 1 if a run failed."""
    result = 0
    for seed, name in itertools.product(range(args.seeds), names):
        trial = f"{name}-seed{seed}"
        options = VARIANTS[name].replace("WARMUP", str(args.epochs // 10)).split()
        cli.say(" ".join([f"{trial}:", *options]))
        batch = int(options[1]) if "--batch_size" in options else args.batch_size
        options += ["--epochs", str(args.epochs), "--batch_size", str(batch), "--seed", str(seed)]
        options += ["--exp_dir", args.exp_dir, "--trial", trial, "--resume", "auto", "--quiet"]
        if args.learning_rate is not None:
            options += ["--learning_rate", f"{args.learning_rate * batch / args.batch_size:g}"]
        try:
            code = pretraining.main([*rest, *options])
        except SystemExit as stop:
            if stop.code != 1:  # bad input, which is that of all runs; 1: this one's memory is used up
                raise
            code = 1
        except Exception:  # of any type: the study goes on without this run
            traceback.print_exc()
            code = 1
        result, folder = max(result, code), os.path.join(args.exp_dir, trial)
        if code > 1 or code == 0 and log.last(log.read(folder, empty=True), "epoch") != args.epochs:
            break  # by a signal, or --max_minutes
    return result


def table(results):
    """A study as Markdown. results: {variant: ({seed: records}, settings, the paper's number)}."""
    def last(runs, key):  # by seed; without classes there is no kNN
        return {seed: log.last(runs[seed], key) for seed in runs if log.last(runs[seed], key) is not None}

    def cell(values, digits):
        std = f" ± {stdev(values.values()):.{digits}f}" if len(values) > 1 else ""
        return f"{fmean(values.values()):.{digits}f}{std}" if values else "–"

    lines = ["| variant | paper: linear, ImageNet (%) | kNN, k = 200 (%) | minus default | std | loss | seeds |",
             "| --- | --- | --- | --- | --- | --- | --- |"]
    default = last(results["default"][0], "knn200") if "default" in results else {}
    for name, (runs, settings, paper) in results.items():
        knn, std, loss = (last(runs, key) for key in ("knn200", "std", "loss"))
        minus = {seed: knn[seed] - default[seed] for seed in knn if seed in default and name != "default"}
        low = fmean(std.values()) < log.collapse_std(settings)
        lines.append(f"| {name} | {paper} | {cell(knn, 2)} | {cell(minus, 2)} | {cell(std, 3)}"
                     f"{' (collapsed)' if low else ''} | {cell(loss, 3)} | {len(runs)} |")
    return "\n".join(lines)


def write_tables(folder):
    """Write ablations.md and curves as in Figure 2, of studies with finished runs; print the tables."""
    lines, titles = [], {"loss": "loss", "std": "std", "knn200": "kNN top-1, k = 200 (%)"}
    for study, variants in STUDIES.items():
        results = {}
        for name, (_, paper) in variants.items():
            for path in sorted(Path(folder).glob(f"{name}-seed*[0-9]")):
                settings, records = read_config(path)["settings"], log.read(path, empty=True)
                if log.last(records, "epoch") == settings["epochs"]:
                    runs, *_ = results.setdefault(name, ({}, settings, paper))
                    runs[int(path.name.rpartition("-seed")[2])] = records
                else:
                    cli.warn(f"{path}: not finished")
        if not results.keys() - {"default"}:
            continue
        lines += [f"**{study}**", "", table(results), ""]
        with plot.figure(folder, study, 9, 2.9) as drawing:
            for axes, (key, title) in zip(drawing.subplots(1, 3), titles.items()):
                for color, (name, (runs, *_)) in zip(2 * plot.COLORS, results.items()):
                    plot.curve(axes, list(runs.values()), key, color=color, label=name)
                plot.mark_levels(axes, key, (), [settings for _, settings, _ in results.values()])
                axes.set(title=title, xlabel="epoch")
            drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    checkpoint.write(os.path.join(folder, "ablations.md"), "\n".join(lines).encode())
    cli.say("\n".join(lines))


def main(argv=None):
    parser, argv = make_parser(), sys.argv[1:] if argv is None else argv
    args, rest = parser.parse_known_args(argv)
    names = dict.fromkeys(name for study, variants in STUDIES.items() for name in variants
                          if {"all", study, name} & set(args.names))
    code = 0 if args.table else train(args, names, rest)
    if code > 1:
        cli.say(f"Resume with: {shlex.join(['python', 'ablate.py', *argv])}")
        return code
    with parser.user_errors():
        write_tables(args.exp_dir)
    return code


if __name__ == "__main__":
    cli.run_script(main)
