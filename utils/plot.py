"""Figures of runs, from their logs.

    python -m utils.plot FOLDER...                   # a table of their last figures
    python -m utils.plot FOLDER... --output DIR      # and their curves in common figures

Runs whose folder names differ only in a final seedN are drawn as their mean with a band of one standard deviation.
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
from utils.augment import denormalize
from utils.cli import Parser, file_path, run_script, say
from utils.run import read_config

# Okabe and Ito's palette, for any color vision, in an order whose neighbors differ in lightness too.
COLORS = ("#0072b2", "#d55e00", "#56b4e9", "#000000", "#009e73", "#e69f00", "#cc79a7")
GRAY = "0.45"
STYLE = {
    "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8,
    "legend.fontsize": 8, "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
    "grid.color": "0.9", "axes.axisbelow": True, "lines.linewidth": 1.6, "savefig.dpi": 200,
}
PAPER = {"knn200": 90.0, "test_top1": 91.8}  # CIFAR-10, width 64, 800 epochs; kNN read off Fig. D.1

# The figures: the log keys in each, with their words, and the label of the y axis.
FIGURES = {
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
        drawn = Figure(figsize=(width, height), layout=layout)
        yield drawn
        drawn.savefig(os.path.join(folder, f"{name}.png"))


def printable(name):
    """A name of any characters for matplotlib, which refuses bytes that are no text, and reads formulas between $."""
    name = name.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def group_seeds(runs):
    """{folder: records} -> {label: list of records}: runs whose names differ only in a final seedN together."""
    groups = {}
    for folder, records in runs.items():
        name = os.path.basename(os.path.abspath(folder))
        name = re.sub(r"[-_]?seed\d+(?=-linear$|$)", "", name).lstrip("-") or "seeds"
        label = printable(name[:40])
        groups.setdefault(" " * label.startswith("_") + label, []).append(records)  # matplotlib hides names with _
    return groups


def curve(axes, runs, key, **look):
    """Draw `key` over the epochs: the mean of several runs with a band of one standard deviation."""
    values = [{record["epoch"]: record[key] for record in records if key in record} for records in runs]
    epochs = sorted(set.intersection(*map(set, values)))
    columns = numpy.array([[of_run[epoch] for epoch in epochs] for of_run in values])   # [runs, epochs]
    mean = columns.mean(axis=0)
    axes.grid(True)
    axes.plot(epochs, mean, marker="o" if len(epochs) <= 30 else None, markersize=3, **look)
    if len(runs) > 1:
        std = columns.std(axis=0, ddof=1)
        axes.fill_between(epochs, mean - std, mean + std, color=look["color"], alpha=0.2, linewidth=0)


def level(axes, y, words):
    """A labeled horizontal line."""
    axes.axhline(y, color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(words, (1, y), (0, 3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  color=GRAY, fontsize=7.5)


def mark_levels(axes, name, keys, settings):
    """What to compare a figure's values with; settings: of the runs in it."""
    if name == "std":
        axes.set_ylim(0, max(1.15, axes.get_ylim()[1]))
        level(axes, 1, "1: spread over the whole sphere")
        limits = {log.collapse_std(each.get("bn_batch", each.get("batch_size", 512)), each.get("head_bn", "default"))
                  for each in settings}
        if len(limits) == 1:
            level(axes, *limits, f"{min(limits):.2g}: collapsed below")
    if name == "top1-acc" and {each["dataset"] for each in settings} == {"cifar10"}:
        key = next(key for key in PAPER if key in keys)
        axes.set_ylim(0, 102)
        level(axes, PAPER[key], f"paper, width 64, 800 epochs: {PAPER[key]:g}")


def plot_runs(folders, output):
    """Draw the figures of runs as PNG files in `output`. Raises OSError and ValueError for a folder without a log."""
    runs = {folder: log.read(folder) for folder in folders}
    settings = [read_config(folder)["settings"] for folder in folders if os.path.exists(f"{folder}/config.json")]
    groups = group_seeds(runs)
    for name, (words, ylabel) in FIGURES.items():
        keys = [key for key in words if any(key in record for records in runs.values() for record in records)]
        if not keys or name == "top1-acc" and not {"knn200", "test_top1"} & set(keys):
            continue
        keys = keys[:1] if len(groups) > 1 else keys
        with figure(output, name, height=3.0 + 0.19 * (len(groups) > 1) * len(groups)) as drawing:
            axes = drawing.subplots()
            for i, (label, group) in enumerate(groups.items()):
                for j, key in enumerate(keys):
                    curve(axes, group, key, color=COLORS[(i + j) % len(COLORS)], linestyle=("-", "--")[j % 2],
                          label=words[key] if len(groups) == 1 else label)
            mark_levels(axes, name, keys, settings)
            axes.set(xlabel="epoch", ylabel=ylabel, title=words[keys[0]] if len(groups) > 1 else next(iter(groups)))
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if len(groups) > 1:
                drawing.legend(loc="outside lower left")
            elif len(keys) > 1:
                axes.legend()


def plot_confusion(folder, confusion, classes, name="confusion"):
    """Draw which classes are taken for which. confusion: counts int64 [C, C], true classes in rows."""
    classes = list(map(printable, classes))
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    with figure(folder, name, 4.6, 4.2) as drawing:
        axes = drawing.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0)
        if len(classes) <= 20:  # more have no room for their names
            axes.set_xticks(range(len(classes)), classes, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(len(classes)), classes)
            for (row, column), share in numpy.ndenumerate(shares):
                axes.text(column, row, f"{share:.0f}", ha="center", va="center", fontsize=7.5,
                          color="white" if share > shares.max() / 2 else "black")
        axes.set(xlabel="predicted class", ylabel="true class")
        drawing.colorbar(image, label="% of the true class", shrink=0.8)


def plot_views(folder, images, views1, views2, draws1, draws2, columns=6):
    """Draw views.png: images uint8 [B, 3, H, W] with the outlines of both crops, and the two normalized views of each,
    with their Draws in words."""
    names, views = ("brightness", "contrast", "saturation", "hue"), (views1, views2)
    with figure(folder, "views", 1.4 * columns, 6.0) as drawing:
        grid = drawing.subplots(3, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
        for column in range(min(columns, len(images))):
            grid[0, column].imshow(images[column].permute(1, 2, 0).cpu().numpy())
            for row, draws in enumerate((draws1, draws2)):
                top, left, height, width = (int(field[column]) for field in draws[:4])
                grid[0, column].add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, linewidth=2,
                                                    edgecolor=COLORS[row], clip_on=False))
                words = [f"{height}×{width} at ({top}, {left})", "flip" * bool(draws.flip[column])]
                for number in draws.order[column].tolist() if draws.jitter[column] else ():
                    factor = float(draws.factors[column, number])
                    words.append(f"hue {360 * factor:+.0f}°" if number == 3 else f"{names[number]} ×{factor:.2f}")
                words.append("gray" * bool(draws.gray[column]))
                axes = grid[row + 1, column]
                axes.imshow(denormalize(views[row][column:column + 1])[0].permute(1, 2, 0).cpu().numpy())
                axes.spines[:].set(visible=True, color=COLORS[row], linewidth=2)
                axes.set_xlabel("\n".join(filter(None, words)), loc="left", fontsize=7)


def main(argv=None):
    parser = Parser(prog="python -m utils.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", type=file_path, metavar="FOLDER", help="run's folder with log.jsonl")
    parser.add_argument("--output", type=file_path, metavar="DIR", help="folder for the figures")
    args = parser.parse_args(argv)
    with parser.user_errors():
        say(log.table(args.folders))
        if args.output is not None:
            os.makedirs(args.output, exist_ok=True)
            plot_runs(args.folders, args.output)


if __name__ == "__main__":
    run_script(main)
