"""Figures of runs, from their log.jsonl.

    python -m utils.plot FOLDER                      # again, in the run's folder
    python -m utils.plot FOLDER... --output DIR      # several runs in common figures

Runs that differ in the seed alone are drawn as their mean, with a band of one standard deviation.
"""
import os

import torch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from utils import log
from utils.cli import Parser
from utils.metrics import collapse_std
from utils.plot_features import plot_confusion
from utils.published import KNN, LINEAR
from utils.run import RESULTS
from utils.runs import is_linear, read_lines, spread
from utils.style import COLORS, DASHES, FORMATS, GRAY, drawing, make_folder, plain_numbers

MANY = 3  # lines, beyond which a figure shows its first key only

LOSSES = {"cosine": "negative cosine similarity", "cross_entropy": "cross-entropy"}  # by the similarity

# The figures of a run, in the order of a report: name, what it is.
TITLES = {
    "loss-plot": "loss", "top1-acc": "top-1 accuracy", "std": "std·√d of the outputs", "learning-rate": "learning rate", "throughput": "throughput",
}


# ---------------------------------------------------------------------------------------------------
# Curves


def curve(axes, runs, key, label, color, dash, marker):
    """Draw `key` over the epochs: one run's, or the mean of several with a band and thin lines for each of them, which go on
    where others have ended."""
    epochs, means, deviations = spread(runs, key)
    axes.plot(epochs, means, label=label, color=color, linestyle=dash, marker=marker if len(epochs) <= 30 else None)
    if any(deviations):
        low, high = ([mean + sign * std for mean, std in zip(means, deviations)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=color, alpha=0.2, linewidth=0)
    for records in runs if len(runs) > 1 else ():
        points = [(record["epoch"], record[key]) for record in records if key in record]
        if points:
            axes.plot(*zip(*points), color=color, linestyle=dash, linewidth=0.6, alpha=0.6)


def curves(axes, lines, keys):
    """Draw the keys, a dict of their words, of all lines. A line by itself has a color and dashes for each key; several lines
    have a color each, and dashes for their keys, or, with one key, for themselves."""
    for i, line in enumerate(lines):
        for j, (key, words) in enumerate(keys.items()):
            alone, single = len(lines) == 1, len(keys) == 1
            parts = [line.label] * (not alone) + [words] * (not single)
            color, dash = j if alone else i, i + i // len(COLORS) if single and not alone else j  # beyond the colors, others' dashes
            curve(axes, line.runs, key, ", ".join(parts) or None, COLORS[color % len(COLORS)], DASHES[dash % len(DASHES)], "os"[j % 2])


def subtitle(lines):
    """What all lines have in common, in words, and what a band is."""
    parts = []
    for name, words in (("arch", "{}"), ("width", "width {}"), ("dataset", "{}"), ("train_size", "{:,} pictures"), ("batch_size", "batch {}"), ("epochs", "{} epochs")):
        values = {line.settings.get(name) for line in lines}
        if len(values) == 1 and None not in values:
            parts.append(words.format(*values))
    has_band = any(len(line.runs) > 1 or any("test_top1_std" in record for record in line.runs[0]) for line in lines)
    return ", ".join(parts) + "; band: ± 1 std" * has_band


def dress(axes, lines, title, ylabel):
    """Titles and axes, and a legend where there are labels."""
    title = title if len(lines) > 1 else f"{title}, {lines[0].label}"
    axes.set_title(title, loc="left", pad=16)
    axes.annotate(subtitle(lines), (0, 1), (0, 4), xycoords="axes fraction", textcoords="offset points", color=GRAY, fontsize=7.5)
    axes.set_xlabel("epoch")
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    if axes.get_legend_handles_labels()[0]:
        if len(lines) == 1:
            axes.legend()
        else:  # below: there is no free corner
            axes.figure.legend(loc="outside lower left")


# ---------------------------------------------------------------------------------------------------
# The figures


def level(axes, y, words, dash=(0, (4, 3)), below=False):
    """A horizontal line across the axes, labeled above or below."""
    axes.axhline(y, color=GRAY, linewidth=0.9, linestyle=dash, zorder=1)
    axes.annotate(
        words, (1, y), (0, -3 if below else 4), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
        va="top" if below else "baseline", color=GRAY, fontsize=7.5,
    )


def mark_collapse(axes, settings):
    """A line at the std below which runs of these settings have collapsed, if it is the same for all."""
    stds = {collapse_std(each.get("batch_size", 512), each.get("head_bn", "default")) for each in settings}
    if len(stds) == 1:
        std = stds.pop()
        level(axes, std, f"{std:.2g}: below, collapse", "-")


def apart(values, distance):
    """Heights for labels at these values, moved as little as needed to be `distance` from each other: in the values' order."""
    order = sorted(range(len(values)), key=values.__getitem__)
    blocks = []  # of labels that touch: the indices, and the middle of them
    for i in order:
        blocks.append(([i], values[i]))
        while len(blocks) > 1 and blocks[-1][1] - blocks[-2][1] < distance * (len(blocks[-1][0]) + len(blocks[-2][0])) / 2:
            (first, a), (second, b) = blocks.pop(-2), blocks.pop()
            joined = first + second
            blocks.append((joined, (a * len(first) + b * len(second)) / len(joined)))
    heights = [0.0] * len(values)
    for members, middle in blocks:
        for place, i in enumerate(members):
            heights[i] = middle + distance * (place - (len(members) - 1) / 2)
    return heights


def mark_published(axes, points, by_epochs):
    """Published end points as labeled marks at the right edge, or, by_epochs, where their epochs of pre-training are if the axis
    reaches so far."""
    low, high = axes.get_ylim()[0], 100
    axes.set_ylim(low, high)
    axes.set_xlim(*axes.get_xlim())  # the marks do not stretch it
    end = axes.get_xlim()[1]
    line = (high - low) / 20  # the height of a label
    heights = apart([point.top1 for point in points], line)
    lower = max(0, max(heights) + 2 * line - high)  # to keep clear of what is above the axes
    heights = [height - lower for height in heights]
    for point, height in zip(points, heights):
        reached = by_epochs and point.epochs <= end
        words = f"{point.source}: {point.top1:g}" + ("" if point.epochs == 800 else f", {point.epochs} ep.")
        axes.annotate(
            words, (point.epochs if reached else end, point.top1), (1.07, height), xycoords="data", textcoords=("axes fraction", "data"),
            va="center", fontsize=7, color="0.2", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GRAY, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 0, "relpos": (0, 0.5), "patchA": None},
        )
        axes.plot([point.epochs if reached else end], [point.top1], "D", color="0.2", markersize=3.5, clip_on=False, zorder=3)
    axes.text(
        1.07, max(heights) + 0.6 * line, "published: width 64,\n800 epochs", transform=axes.get_yaxis_transform(), fontsize=7, color=GRAY, va="bottom",
        linespacing=1,
    )


def plot_runs(folders, output, formats=FORMATS):
    """Draw the figures of runs of main.py or main_lincls.py into the folder `output`; returns their names. Raises
    OSError, and ValueError where a folder has no log."""
    lines = read_lines(folders)
    on_cifar10 = all(line.settings.get("dataset") == "cifar10" for line in lines)
    linear = is_linear(lines[0].runs[0])
    similarities = {line.settings.get("similarity", "cosine") for line in lines}
    similarity = similarities.pop() if len(similarities) == 1 else None
    drawn = []

    def figure_of(name, keys, ylabel, finish=lambda axes: None):
        keys = {
            key: words for key, words in keys.items()
            if any(key in record for line in lines for records in line.runs for record in records)
        }
        if not keys:
            return
        if len(lines) > MANY:
            keys = dict(list(keys.items())[:1])
        labels = len(lines) * len(keys) if len(lines) > 1 else 0
        with drawing(output, name, height=3.0 + 0.19 * labels, formats=formats) as figure:  # as much as a label below takes
            axes = figure.subplots()
            curves(axes, lines, keys)
            low, high = axes.get_xlim()
            if high - low < 1:  # a single epoch
                axes.set_xlim((low + high) / 2 - 1, (low + high) / 2 + 1)
            finish(axes)
            dress(axes, lines, TITLES[name], ylabel)
        drawn.append(name)

    def finish_loss(axes):
        if similarity == "cosine":
            axes.set_ylim(-1.1, max(0.02, axes.get_ylim()[1]))
            level(axes, -1, "−1: both views' outputs are one", "-", below=True)

    def finish_training_loss(axes):
        values = [value for drawn in axes.get_lines() for value in drawn.get_ydata()]
        if min(values) > 0 and max(values) > 100 * min(values):
            axes.set_yscale("log")
            plain_numbers(axes.yaxis)

    def finish_std(axes):
        axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
        level(axes, 1, "1: spread evenly over the sphere")
        mark_collapse(axes, [line.settings for line in lines])

    def finish_speed(axes):
        axes.set_ylim(0, None)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))

    def finish_accuracy(axes):
        if on_cifar10:
            mark_published(axes, LINEAR if linear else KNN, not linear)

    if linear:
        figure_of("loss-plot", {"train_loss": "training loss"}, "cross-entropy", finish_training_loss)
        figure_of("top1-acc", {"test_top1": "test", "train_top1": "training batches"}, "linear top-1 (%)", finish_accuracy)
    else:
        figure_of("loss-plot", {"loss": "loss"}, LOSSES.get(similarity, "loss"), finish_loss)
        figure_of("top1-acc", {"knn200": "k = 200", "knn1": "k = 1"}, "kNN top-1 (%)", finish_accuracy)
        figure_of("std", {"std": "std·√d"}, "std of l2-normalized z, × √d", finish_std)
        figure_of("throughput", {"views_per_s": "views/s"}, "views/s", finish_speed)
    figure_of("learning-rate", {"lr": "rate"}, "learning rate")
    return drawn


def plot_results(folder, output, formats=FORMATS):
    """Draw the confusion of classes of a folder's results.json, if it has one, into `output`; returns the figures' names."""
    path = os.path.join(folder, RESULTS)
    if not os.path.exists(path):
        return []
    results = log.read_json(path)
    if not isinstance(results, dict) or not {"confusion", "class_top1"} <= results.keys():
        raise ValueError(f"{path}: not the results of main_lincls.py")
    plot_confusion(output, torch.tensor(results["confusion"]), list(results["class_top1"]), formats=formats)
    return ["confusion"]


def plot_run(folder):
    """All figures of one run, in its own folder."""
    if log.read(folder, empty=True):
        plot_runs([folder], folder)
    plot_results(folder, folder)


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        if args.output is None and len(args.folders) > 1:
            raise ValueError("several runs in common figures need --output DIR")
        output = args.folders[0] if args.output is None else args.output
        make_folder(output)
        names = plot_runs(args.folders, output, args.format)
        if len(args.folders) == 1:
            names += plot_results(args.folders[0], output, args.format)
        print(f"{output}: {', '.join(f'{name}.{ending}' for name in names for ending in args.format)}")


def make_parser():
    parser = Parser(prog="python -m utils.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, with its log.jsonl")
    parser.add_argument("--output", metavar="DIR", help="where the figures go (default: the folder of the one run)")
    parser.add_argument("--format", nargs="+", choices=("png", "svg", "pdf"), default=list(FORMATS), help="of the files")
    return parser


if __name__ == "__main__":
    main()
