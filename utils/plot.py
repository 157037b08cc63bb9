"""Figures of a run.

    python -m utils.plot FOLDER...       makes loss-plot.png and top1-acc.png again from each folder's log.jsonl
"""
import os

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils import log
from utils.augment import MEAN, STD
from utils.cli import Parser

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "0.5"  # told apart with any color vision


def curve(axes, records, key, label, color, **style):
    """Draw records' values of `key` over the epochs, where they have it; returns whether there were any."""
    points = [(record["epoch"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points), label=label, color=color, marker="o" if len(points) < 30 else None, markersize=3, **style)
    return bool(points)


def finish(figure, axes, folder, name, ylabel, **legend):
    """Dress the axes and write the figure; legend: options of its place."""
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel(ylabel)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **legend)
    figure.savefig(os.path.join(folder, name), dpi=150)


def plot_run(folder):
    """Make loss-plot.png and top1-acc.png in the folder of a run of main.py or main_lincls.py."""
    records = log.read(folder)
    # A folder's name may hold bytes that are no text, and dollar signs that are no formula.
    title = os.path.basename(os.path.abspath(folder)).encode(errors="backslashreplace").decode()

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium", parse_math=False)
    curve(axes, records, "loss", "loss", BLUE)
    curve(axes, records, "train_loss", "training loss", BLUE)
    legend = {}
    if curve(axes, records, "std", "std·√d of z (0: collapsed)", ORANGE, linestyle="--"):
        axes.set_ylim(-1.05, 1.25)
        axes.axhline(0, color=GRAY, linewidth=0.8)
        legend = {"loc": "center right", "bbox_to_anchor": (1, 0.36)}  # below 0 and above a healthy run's loss
    finish(figure, axes, folder, "loss-plot.png", "", **legend)

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium", parse_math=False)
    curve(axes, records, "knn200", "kNN, k = 200", BLUE)
    curve(axes, records, "knn1", "kNN, k = 1", ORANGE, linestyle="--")
    curve(axes, records, "test_top1", "linear, test", BLUE)
    curve(axes, records, "train_top1", "linear, training batches", GRAY, linestyle="--")
    finish(figure, axes, folder, "top1-acc.png", "top-1 accuracy (%)")


def plot_confusion(folder, confusion, classes):
    """Make confusion.png: which classes are taken for which.

    confusion: counts [C, C], true classes in rows; classes: their names.
    """
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    count = len(classes)
    figure = Figure(figsize=(5.5, 5) if count <= 20 else (8, 7.5), layout="constrained")
    axes = figure.subplots()
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    if count <= 20:
        axes.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(count), classes)
        for row in range(count):
            for column in range(count):
                color = "white" if shares[row, column] > 55 else "black"
                axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize="small")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    figure.colorbar(picture, label="% of the true class", shrink=0.8)
    figure.savefig(os.path.join(folder, "confusion.png"), dpi=150)


def plot_views(folder, images, views1, views2):
    """Make views.png: a column for each picture, its two views below it.

    images: uint8 [B, 3, H, W]; views1, views2: normalized views float [B, 3, 32, 32] of them.
    """
    def to_pixels(views):
        mean, std = views.new_tensor(MEAN).view(3, 1, 1), views.new_tensor(STD).view(3, 1, 1)
        return (views * std + mean).clamp(0, 1)

    figure = Figure(figsize=(len(images), 3.2), layout="constrained")
    grid = figure.subplots(3, len(images), squeeze=False)
    for row, (name, batch) in enumerate((("picture", images / 255), ("view 1", to_pixels(views1)), ("view 2", to_pixels(views2)))):
        for column, pixels in enumerate(batch.permute(0, 2, 3, 1).cpu().numpy()):
            axes = grid[row, column]
            axes.imshow(pixels)
            axes.set(xticks=[], yticks=[])
        grid[row, 0].set_ylabel(name)
    figure.savefig(os.path.join(folder, "views.png"), dpi=120)


def main(argv=None):
    parser = Parser(prog="python -m utils.plot", description=__doc__)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="a run's folder, with its log.jsonl")
    folders = parser.parse_args(argv).folders
    for folder in folders:
        with parser.user_errors():
            plot_run(folder)


if __name__ == "__main__":
    main()
