"""Plots of runs, from their logs.

    python -m utils.plot FOLDER...                   # a table of their last metrics
    python -m utils.plot FOLDER... --output DIR      # and their curves in common plots, by epochs
    python -m utils.plot FOLDER... --output DIR --minutes                     # by minutes of training

Runs whose folders' names differ only in a final seedN are a mean with a band of one standard deviation.
"""
import contextlib
import itertools
import os
import re
import warnings

import numpy
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from utils import log
from utils.augment import denormalize
from utils.cli import Parser, file_path, run_script, say
from utils.run import CONFIG, read_config

# Okabe and Ito's palette, for any color vision; neighbors differ in lightness too.
COLORS = ("#0072b2", "#d55e00", "#56b4e9", "#000000", "#009e73", "#e69f00", "#cc79a7")
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.spines.top": False, "axes.spines.right": False,
    "axes.axisbelow": True, "grid.color": "0.9", "legend.frameon": False, "savefig.dpi": 200,
}
PAPER = {"knn200": 90.0, "test_top1": 91.8}  # CIFAR-10, width 64, 800 epochs; kNN read off Fig. D.1
PLOTS = {  # the metrics in each plot, with their words, and the label of the y axis
    "loss-plot": ({"loss": "loss", "train_loss": "training loss"}, "loss"),
    "top1-acc": ({"knn200": "kNN, k = 200", "knn1": "kNN, k = 1", "test_top1": "test",
                  "train_top1": "training batches"}, "top-1 accuracy (%)"),
    "std": ({"std": "std"}, "std of l2-normalized z, × √d"),
    "effective-rank": ({"effective_rank": "effective rank"}, "effective rank of the features")}


@contextlib.contextmanager
def figure(folder, name, width=4.2, height=3.0):
    """A figure (inches) to draw into, saved as folder/name.png at the end. Raises OSError."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing|constrained_layout")  # names in any script, of any length
        drawing = Figure(figsize=(width, height), layout="constrained")
        yield drawing
        drawing.savefig(os.path.join(folder, f"{name}.png"))


def printable(name):
    """Any file's name for matplotlib, which takes text only and reads formulas between $."""
    return name.encode(errors="backslashreplace").decode().replace("$", r"\$")


def curve(axes, runs, key, minutes=False, **look):
    """Draw a metric over epochs, or minutes: the mean of several runs with a band of one standard deviation."""
    values = [{each["epoch"]: each[key] for each in records if key in each} for records in runs]
    epochs = x = sorted(set.intersection(*map(set, values)))
    if minutes:
        spent = [{each["epoch"]: each.get("seconds", 0) for each in records} for records in runs]
        x = [sum(of_run[one] for of_run in spent for one in of_run if one <= epoch) / 60 / len(runs)
             for epoch in epochs]
    columns = numpy.array([[of_run[epoch] for epoch in epochs] for of_run in values])  # [runs, epochs]
    mean = columns.mean(axis=0)
    axes.grid(True)
    axes.plot(x, mean, marker="o" if len(epochs) <= 30 else None, markersize=3, **look)
    if len(runs) > 1:
        std = columns.std(axis=0, ddof=1)
        axes.fill_between(x, mean - std, mean + std, color=look["color"], alpha=0.2, linewidth=0)


def mark_levels(axes, name, keys, settings):
    """Mark the std of a collapse, or the paper's accuracy; settings: of the runs in the plot."""
    levels, words = set(), "{:.2g}: collapsed below"
    kinds = {(each["dataset"], each.get("weights", "freeze"), each.get("validation")) for each in settings}
    if name == "std":
        levels = {log.collapse_std(each) for each in settings}
    elif name == "top1-acc" and kinds == {("cifar10", "freeze", None)}:
        levels = {PAPER["knn200" if "knn200" in keys else "test_top1"]}
        words = "paper, width 64, 800 epochs: {:g}"
    if len(levels) == 1:
        y = levels.pop()
        axes.axhline(y, color="0.45", linewidth=0.9, linestyle="--", zorder=1)
        axes.annotate(words.format(y), (1, y), (0, 3), xycoords=("axes fraction", "data"),
                      textcoords="offset points", ha="right", color="0.45", fontsize=7.5)
        axes.set_ylim(bottom=0)


def plot_runs(folders, output, minutes=False):
    """Draw the plots of runs as PNG files in `output`. Raises OSError and ValueError without logs."""
    groups, measured, settings = {}, set(), []
    for folder in folders:
        records, name = log.read(folder), printable(os.path.basename(os.path.abspath(folder)))
        name = re.sub(r"[-_]?seed\d+(?=-linear$|$)", "", name)
        name = name.lstrip("-_")[:40] or "seeds"  # matplotlib hides labels that begin with _
        groups.setdefault(name, []).append(records)
        measured.update(*records)
        if os.path.exists(os.path.join(folder, CONFIG)):
            settings.append(read_config(folder)["settings"])
    for plot, (words, ylabel) in PLOTS.items():
        keys = [key for key in words if key in measured]
        if not keys:
            continue
        if len(groups) > 1:  # one metric of all, or all metrics of one
            keys = keys[:1]
        curves = list(itertools.product(groups, keys))
        with figure(output, plot, height=2.8 + 0.19 * len(curves)) as drawing:
            axes = drawing.subplots()
            for color, (name, key) in zip(itertools.cycle(COLORS), curves):
                curve(axes, groups[name], key, minutes, color=color, label=f"{name}: {words[key]}")
            mark_levels(axes, plot, keys, settings)
            axes.set(xlabel="minutes of training" if minutes else "epoch", ylabel=ylabel)
            axes.locator_params(axis="x", integer=True)
            drawing.legend(loc="outside lower left")


def plot_confusion(folder, confusion, classes, name="confusion"):
    """Draw which classes are taken for which. confusion: counts int64 [C, C], true classes in rows."""
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    with figure(folder, name, 4.6, 4.2) as drawing:
        axes = drawing.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0)
        if len(classes) <= 20:  # more have no room for their names
            names, ticks = [printable(name) for name in classes], range(len(classes))
            axes.set_xticks(ticks, names, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(ticks, names)
            for (row, column), share in numpy.ndenumerate(shares):
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5,
                          color="white" if share > shares.max() / 2 else "black")
        axes.set(xlabel="predicted class", ylabel="true class")
        drawing.colorbar(image, label="% of the true class", shrink=0.8)


def show_image(axes, image, color="none", words=""):
    """Draw an image, uint8 or float in [0, 1], [3, H, W], with a frame, and words below it."""
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(words, fontsize=6)
    axes.spines[:].set(visible=True, color=color, linewidth=2)


def plot_views(folder, images, views, draws):
    """Draw views.png: images uint8 [B, 3, H, W] with the outlines of their crops, and below them a
    row for each of the normalized `views`, float [B, 3, h, w], with its Draws, of the list `draws`."""
    rows, columns = 1 + len(views), len(images)
    with figure(folder, "views", 1.4 * columns, 1.4 * rows) as drawing:
        grid = drawing.subplots(rows, columns, squeeze=False)
        for column, image in enumerate(images):
            show_image(grid[0, column], image)
        for axes, view, drawn, color in zip(grid[1:], views, draws, itertools.cycle(COLORS)):
            for i, image in enumerate(denormalize(view)):
                show_image(axes[i], image, color)
                top, left, height, width = (int(field[i]) for field in drawn[:4])
                grid[0, i].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False,
                                               linewidth=2, edgecolor=color, clip_on=False))


def main(argv=None):
    parser = Parser(prog="python -m utils.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", type=file_path, metavar="FOLDER", help="run's folder")
    parser.add_argument("--output", type=file_path, metavar="DIR", help="folder for the plots")
    parser.add_argument("--minutes", action="store_true", help="in --output, draw over minutes")
    args = parser.parse_args(argv)
    with parser.user_errors():
        say(log.table(args.folders))
        if args.output is not None:
            os.makedirs(args.output, exist_ok=True)
            plot_runs(args.folders, args.output, args.minutes)


if __name__ == "__main__":
    run_script(main)
