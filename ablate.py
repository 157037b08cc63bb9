"""The paper's study (Sec. 4) on CIFAR-10: runs of main.py, a table beside the paper's, and the curves of Figure 2.

    python ablate.py all --data_root data --epochs 200 --gpu 0
    python ablate.py stop_gradient --seeds 2 --data_root data --epochs 30 --width 16 --train_size 5000 \\
        --batch_size 64 --learning_rate 0.03

The second takes about two hours on one CPU core: with stop-gradient kNN ends at 30 %, without at 20 %. Options that are
not listed here go to main.py. Finished runs are skipped, interrupted ones resumed. Of several GPUs that CUDA sees, each
runs one variant at a time.
"""
import contextlib
import glob
import itertools
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time

import utils  # noqa: F401 (before torch)
import torch

from utils import checkpoint, log
from utils.cli import Parser, file_path, handle_signals, info, real_number, run_script, say, warn, whole_number
from utils.plot import COLORS, curve, figure, mark_levels
from utils.run import read_config

# Study: {variant: (main.py options, the paper's linear top-1 on ImageNet in percent)}. Where the default has 68.1, the
# paper keeps the predictor's learning rate constant. WARMUP: a tenth of the epochs, as there.
WARMUP = "WARMUP"
BATCH_SIZES = {64: "66.1", 128: "67.3", 256: "68.1", 512: "68.1", 1024: "68.0", 2048: "67.9", 4096: "64.0"}
STUDIES = {
    "stop_gradient": {"default": ([], "67.7"), "no-stop-gradient": (["--no-stop_gradient"], "0.1")},  # Figure 2
    "predictor": {  # Table 1
        "default": ([], "67.7"), "no-predictor": (["--predictor", "none"], "0.1"),
        "fixed-predictor": (["--predictor", "fixed"], "1.5"), "constant-predictor-rate": (["--fix_pred_lr"], "68.1"),
    },
    "batch_size": {f"batch-{size}": (["--batch_size", str(size)] + ["--warmup_epochs", WARMUP] * (size >= 1024), top1)
                   for size, top1 in BATCH_SIZES.items()},  # Table 2
    "batch_norm": {  # Table 3
        "head-bn-none": (["--head_bn", "none", "--warmup_epochs", WARMUP], "34.6"),
        "head-bn-hidden": (["--head_bn", "hidden"], "67.4"), "default": ([], "68.1"),
        "head-bn-all": (["--head_bn", "all"], "unstable"),
    },
    "similarity": {"default": ([], "68.1"), "cross-entropy": (["--similarity", "cross_entropy"], "63.2")},  # Sec. 4.5
    "symmetry": {  # Sec. 4.6
        "default": ([], "68.1"), "asymmetric": (["--symmetry", "asymmetric"], "64.8"),
        "asymmetric-2x": (["--symmetry", "asymmetric_2x"], "67.3"),
    },
}


def make_parser():
    parser = Parser(prog="ablate.py", description=__doc__, usage="ablate.py NAME... [options] [options of main.py]")
    names = ["all", *STUDIES, *dict.fromkeys(name for variants in STUDIES.values() for name in variants)]
    parser.add_argument("names", nargs="+", choices=names, metavar="NAME", help=f"study or variant: {', '.join(names)}")
    parser.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="runs of each variant")
    parser.add_argument("--epochs", type=whole_number(1), default=200, metavar="N", help="epochs of each run")
    parser.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="except in batch_size")
    parser.add_argument("--learning_rate", type=real_number, metavar="LR", help="for --batch_size; scaled for others")
    parser.add_argument("--exp_dir", type=file_path, default="experiments/ablations", metavar="DIR", help="of the runs")
    parser.add_argument("--table", action="store_true", help="run nothing: table and figures of the runs in --exp_dir")
    return parser


def complete(options, args):
    """The options of a variant's run, with the settings that all runs share."""
    batch = int(dict(zip(options, options[1:])).get("--batch_size", args.batch_size))
    shared = ["--epochs", str(args.epochs), "--batch_size", str(batch)]
    if args.learning_rate is not None:
        shared += ["--learning_rate", f"{args.learning_rate * batch / args.batch_size:g}"]
    return shared + [str(args.epochs // 10) if word == WARMUP else word for word in options]


def start_main(options):
    """main.py as a process in a session of its own: Ctrl-C reaches it once, passed on."""
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "main.py")
    return subprocess.Popen([sys.executable, script, *options], start_new_session=True)


@contextlib.contextmanager
def passed_on(processes):
    """Inside the context, signals go to the processes, so that they can save their checkpoints. Gives their numbers."""
    numbers = []

    def pass_on(number, frame):
        numbers.append(number)
        for process in list(processes):
            with contextlib.suppress(ValueError):  # Windows can send few signals, and Ctrl-C reaches all there
                process.send_signal(number)

    usual = handle_signals(pass_on)
    try:
        yield numbers
    finally:
        for number in usual:
            signal.signal(number, usual[number])
        for process in processes:  # after an error
            process.terminate()


def run_variants(args, variants, rest):
    """Run all variants, seed by seed, one at a time on each GPU, or on that of --gpu. Returns the exit code: 1 if a run
    failed, main.py's if it refused or stopped, after the runs beside it have ended."""
    count = 1 if any(word.split("=")[0] == "--gpu" for word in rest) else torch.cuda.device_count()
    free = [["--gpu", str(index)] for index in range(count)] if count > 1 else [[]]
    waiting, running, result, stopped = [*itertools.product(range(args.seeds), variants)], {}, 0, False
    with passed_on(running) as signals:
        while running or waiting and not (stopped or signals):
            while free and waiting and not (stopped or signals):
                if any(not os.path.exists(os.path.join(run, "config.json")) for run, _ in running.values()):
                    break  # it may be downloading the data
                (seed, name), gpu = waiting.pop(0), free.pop(0)
                trial = f"{name}-seed{seed}"
                info(" ".join([f"{trial}:", *variants[name], *gpu]))
                options = complete(variants[name], args) + ["--untrained"] * (name == "default")
                process = start_main([*rest, *options, *gpu, "--seed", str(seed), "--exp_dir", args.exp_dir,
                                      "--trial", trial, "--resume", "auto", "--quiet"])
                running[process] = os.path.join(args.exp_dir, trial), gpu
                for number in signals:  # that came before the line above
                    process.send_signal(number)
            time.sleep(0.1)
            for process in [each for each in running if each.poll() is not None]:
                run, gpu = running.pop(process)
                free.append(gpu)
                code = process.returncode if process.returncode >= 0 else 128 - process.returncode  # as in a shell
                result = max(result, code)  # 2 and more: refused or interrupted
                stopped |= code > 1 or code == 0 and not read_run(run)[0]  # by --max_minutes
    return max([result, *(128 + number for number in signals)])


def read_run(path):
    """The log of a run, empty if it is not finished, and its settings."""
    settings, records = read_config(path)["settings"], log.read(path, empty=True)
    return records if records and records[-1]["epoch"] == settings["epochs"] else [], settings


def read_variant(folder, name):
    """The logs of a variant's finished runs by seed, and the settings of one of them."""
    runs, settings = {}, {}
    for path in sorted(glob.glob(os.path.join(glob.escape(folder), f"{name}-seed*[0-9]"))):
        records, settings = read_run(path)
        if records:
            runs[int(path.rpartition("-seed")[2])] = records
        else:
            warn(f"{path}: not finished")
    return runs, settings


def table(results):
    """A study as a Markdown table. results: {variant: (runs by seed, settings, the paper's number)}."""
    def mean_and_std(values, form):
        std = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):{form}}{std}" if values else "–"

    lines = [["variant", "paper: linear, ImageNet (%)", "kNN, k = 200 (%)", "minus default", "std", "loss", "seeds"],
             ["---"] * 7]
    reference = results.get("default", ({},))[0]
    for name, (runs, settings, paper) in results.items():
        knn, std, loss = ({seed: log.last(records, key) for seed, records in runs.items()
                           if log.last(records, key) is not None}
                          for key in ("knn200", "std", "loss"))  # without labels there is no kNN
        difference = [knn[seed] - log.last(reference[seed], "knn200") for seed in knn if seed in reference]
        least = log.collapse_std(settings.get("bn_batch", settings["batch_size"]), settings.get("head_bn", "default"))
        lines.append([name, paper, mean_and_std(knn.values(), ".2f"),
                      mean_and_std(difference if name != "default" else (), ".2f"),
                      mean_and_std(std.values(), ".3f") + " (collapsed)" * (statistics.fmean(std.values()) < least),
                      mean_and_std(loss.values(), ".3f"), str(len(runs))])
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plot_study(study, results, output):
    """Draw loss, std and kNN over the epochs, as in the paper's Figure 2."""
    with figure(output, study, 9, 2.9) as drawing:
        for axes, key in zip(drawing.subplots(1, 3), ("loss", "std", "knn200")):
            for color, (name, (runs, *_)) in zip(2 * COLORS, results.items()):
                curve(axes, list(runs.values()), key, color=color, label=name if key == "loss" else None)
            mark_levels(axes, key, (), [settings for _, settings, _ in results.values()])
            axes.set(title={"knn200": "kNN top-1, k = 200 (%)"}.get(key, key), xlabel="epoch")
        drawing.legend(loc="outside lower center", ncols=4)


def write_tables(folder):
    """Write ablations.md and STUDY.png of the studies that have finished runs besides the default; print the tables."""
    lines = []
    for study, variants in STUDIES.items():
        results = {name: (*read_variant(folder, name), paper) for name, (_, paper) in variants.items()}
        results = {name: result for name, result in results.items() if result[0]}
        if results.keys() - {"default"}:
            lines += [f"**{study}**", "", table(results), ""]
            plot_study(study, results, folder)
    checkpoint.write(os.path.join(folder, "ablations.md"), "\n".join(lines).encode())
    say("\n".join(lines))


def main(argv=None):
    parser = make_parser()
    args, rest = parser.parse_known_args(argv)
    variants = {name: options for study, variants in STUDIES.items() for name, (options, _) in variants.items()
                if {"all", study, name} & set(args.names)}
    with parser.user_errors():
        code = 0 if args.table else run_variants(args, variants, rest)
        if code > 128:
            say(f"Resume with: {shlex.join(['python', 'ablate.py', *(sys.argv[1:] if argv is None else argv)])}")
        if code > 1:
            return code
        write_tables(args.exp_dir)
    return code


if __name__ == "__main__":
    run_script(main)
