"""Plots of runs, from their logs.

    python -m utils.plot FOLDER...                   # a table of their last metrics
    python -m utils.plot FOLDER... --output DIR      # and their curves in common plots

Runs whose folders' names differ only in a final seedN are a mean with a band of one standard deviation.
"""
import contextlib
import os
import re
import warnings

import numpy
from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from utils import log
from utils.augment import HUE, denormalize
from utils.cli import Parser, file_path, run_script, say
from utils.run import CONFIG, read_config

# Okabe and Ito's palette, for any color vision; neighbors differ in lightness too.
COLORS = ("#0072b2", "#d55e00", "#56b4e9", "#000000", "#009e73", "#e69f00", "#cc79a7")
GRAY = "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "legend.fontsize": 8, "savefig.dpi": 200,
    "xtick.labelsize": 8, "ytick.labelsize": 8, "legend.frameon": False, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": "0.9", "axes.axisbelow": True, "lines.linewidth": 1.6,
}
PAPER = {"knn200": 90.0, "test_top1": 91.8}  # CIFAR-10, width 64, 800 epochs; kNN read off Fig. D.1
PLOTS = {  # the metrics in each plot, with their words, and the label of the y axis
    "loss-plot": ({"loss": "loss", "train_loss": "training loss"}, "loss"),
    "top1-acc": ({"knn200": "kNN, k = 200", "knn1": "kNN, k = 1", "test_top1": "linear, test",
                  "train_top1": "linear, training batches"}, "top-1 accuracy (%)"),
    "std": ({"std": "std"}, "std of l2-normalized z, × √d"),
    "effective-rank": ({"effective_rank": "effective rank"}, "effective rank of the features"),
}


@contextlib.contextmanager
def figure(folder, name, width=4.2, height=3.0, layout="constrained"):
    """A figure (inches) to draw into, saved as folder/name.png at the end. Raises OSError."""
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a folder's name may be in any script
        drawing = Figure(figsize=(width, height), layout=layout)
        yield drawing
        drawing.savefig(os.path.join(folder, f"{name}.png"))


def printable(name):
    """Any name for matplotlib, which refuses bytes that are no text and reads formulas between $."""
    name = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def group_seeds(runs):
    """{folder: records} -> {label: list of records}: runs whose names differ in a final seedN together."""
    groups = {}
    for folder, records in runs.items():
        name = os.path.basename(os.path.abspath(folder))
        name = re.sub(r"[-_]?seed\d+(?=-linear$|$)", "", name).lstrip("-") or "seeds"
        label = printable(name[:40])
        if label.startswith("_"):
            label = f" {label}"  # matplotlib hides labels with _
        groups.setdefault(label, []).append(records)
    return groups


def curve(axes, runs, key, **look):
    """Draw a metric over the epochs: the mean of several runs with a band of one standard deviation."""
    values = [{each["epoch"]: each[key] for each in records if key in each} for records in runs]
    epochs = sorted(set.intersection(*map(set, values)))
    columns = numpy.array([[of_run[epoch] for epoch in epochs] for of_run in values])  # [runs, epochs]
    mean = columns.mean(axis=0)
    axes.grid(True)
    axes.plot(epochs, mean, marker="o" if len(epochs) <= 30 else None, markersize=3, **look)
    if len(runs) > 1:
        std = columns.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=look["color"], alpha=0.2, linewidth=0)


def level(axes, y, words):
    """A labeled horizontal line."""
    axes.axhline(y, color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(words, (1, y), (0, 3), xycoords=("axes fraction", "data"), ha="right", color=GRAY,
                  textcoords="offset points", fontsize=7.5)


def mark_levels(axes, name, keys, settings):
    """Mark what to compare the values in a plot with; settings: of the runs in it."""
    if name == "std":
        axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
        level(axes, 1, "1: spread over the whole sphere")
        limits = {log.collapse_std(each.get("bn_batch", each.get("batch_size", 512)),
                                   each.get("head_bn", "default")) for each in settings}
        if len(limits) == 1:
            level(axes, *limits, f"{min(limits):.2g}: collapsed below")
    if name == "top1-acc" and {each["dataset"] for each in settings} == {"cifar10"}:
        key = "knn200" if "knn200" in keys else "test_top1"
        axes.set_ylim(0, 102)
        level(axes, PAPER[key], f"paper, width 64, 800 epochs: {PAPER[key]:g}")


def plot_runs(folders, output):
    """Draw the plots of runs as PNG files in `output`. Raises OSError and ValueError without their logs."""
    runs = {folder: log.read(folder) for folder in folders}
    settings = [read_config(folder)["settings"] for folder in folders
                if os.path.exists(os.path.join(folder, CONFIG))]
    groups, measured = group_seeds(runs), set().union(*(each for run in runs.values() for each in run))
    for name, (words, ylabel) in PLOTS.items():
        keys = [key for key in words if key in measured]
        if not keys or name == "top1-acc" and not measured & PAPER.keys():
            continue
        several = len(groups) > 1  # one metric of several groups, or all metrics of one
        keys = keys[:1] if several else keys
        with figure(output, name, height=3.0 + 0.19 * len(groups) if several else 3.0) as drawing:
            axes = drawing.subplots()
            for i, (label, group) in enumerate(groups.items()):
                for j, key in enumerate(keys):
                    curve(axes, group, key, label=label if several else words[key],
                          color=COLORS[(i + j) % len(COLORS)], linestyle=("-", "--")[j % 2])
            mark_levels(axes, name, keys, settings)
            axes.set(xlabel="epoch", ylabel=ylabel, title=words[keys[0]] if several else label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if several:
                drawing.legend(loc="outside lower left")
            elif len(keys) > 1:
                axes.legend()


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


def words_of(draws, i):
    """What was drawn for image i in words, one line for each operation."""
    top, left, height, width = (int(field[i]) for field in draws[:4])
    words = [f"{height}×{width} at ({top}, {left})"]
    if draws.flip[i]:
        words.append("flip")
    if draws.jitter[i]:
        names = [f"{name} ×{float(factor):.2f}" for name, factor in
                 zip(("brightness", "contrast", "saturation"), draws.factors[i])]
        names.append(f"hue {360 * float(draws.factors[i, HUE]):+.0f}°")
        words += [names[number] for number in draws.order[i].tolist()]
    if draws.gray[i]:
        words.append("gray")
    return "\n".join(words)


def plot_views(folder, images, views, draws, columns=6):
    """Draw views.png: images uint8 [B, 3, H, W] with the outlines of their crops, and below them a row
    for each of the normalized `views`, float [B, 3, h, w], with its Draws, of the list `draws`, in words."""
    rows = 1 + len(views)
    with figure(folder, "views", 1.4 * columns, 2.0 * rows) as drawing:
        grid = drawing.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
        for i in range(min(columns, len(images))):
            grid[0, i].imshow(images[i].permute(1, 2, 0).cpu().numpy())
            for row, (view, drawn) in enumerate(zip(views, draws)):
                color, axes = COLORS[row % len(COLORS)], grid[row + 1, i]
                top, left, height, width = (int(field[i]) for field in drawn[:4])
                grid[0, i].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False,
                                               linewidth=2, edgecolor=color, clip_on=False))
                axes.imshow(denormalize(view[i:i + 1])[0].permute(1, 2, 0).cpu().numpy())
                axes.spines[:].set(visible=True, color=color, linewidth=2)
                axes.set_xlabel(words_of(drawn, i), loc="left", fontsize=7)


def main(argv=None):
    parser = Parser(prog="python -m utils.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", type=file_path, metavar="FOLDER", help="run's folder")
    parser.add_argument("--output", type=file_path, metavar="DIR", help="folder for the plots")
    args = parser.parse_args(argv)
    with parser.user_errors():
        say(log.table(args.folders))
        if args.output is not None:
            os.makedirs(args.output, exist_ok=True)
            plot_runs(args.folders, args.output)


if __name__ == "__main__":
    run_script(main)
