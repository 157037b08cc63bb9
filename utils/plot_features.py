"""Figures of what features know: neighbors, maps, confusion, spectrum, distances."""
import numpy
from matplotlib import colormaps
from matplotlib.colors import to_rgba_array
from matplotlib.lines import Line2D

from utils.style import COLORS, DASHES, FORMATS, GRAY, drawing, plain_numbers

QUERIES, NEIGHBORS = 12, 6          # of the gallery
MOST_NAMED = 20                     # with more classes there is no room for their names
DISTANCE_BINS = numpy.linspace(0, 2, 101)
CLASS_COLORS = (  # Paul Tol's muted scheme, for any color vision
    "#332288", "#cc6677", "#ddcc77", "#117733", "#88ccee", "#882255", "#44aa99", "#999933", "#aa4499", "#555555",
)


def plot_neighbors(folder, queries, query_labels, neighbors, neighbor_labels, similarities, classes):
    """Make neighbors.png and .svg: a row for each query picture, uint8 [Q, 3, H, W], then its nearest training pictures,
    uint8 [Q, K, 3, H, W], their cosine similarities [Q, K] and, where they are of another class, its name."""
    count, k = len(queries), neighbors.shape[1]
    rows = (count + 1) // 2  # in two halves, side by side
    side, words, gap, left = 0.42, 0.17, 0.08, 0.68
    half = left + (k + 1) * (side + gap) + 0.17
    width, height = 2 * half, rows * (side + words) + 0.1
    with drawing(folder, "neighbors", width, height, layout=None, dpi=150) as figure:
        for i in range(count):
            x0, y0 = (i // rows) * half + left, height - 0.05 - (i % rows) * (side + words) - side
            figure.text((x0 - 0.05) / width, (y0 + side / 2) / height, short(classes[query_labels[i]]), ha="right", va="center", fontsize=7)
            for j in range(k + 1):
                x = x0 + j * (side + gap) + (0.12 if j else 0)
                axes = figure.add_axes((x / width, y0 / height, side / width, side / height), xticks=[], yticks=[])
                axes.imshow((queries[i] if j == 0 else neighbors[i, j - 1]).permute(1, 2, 0).cpu().numpy())
                if j == 0:
                    axes.spines[:].set_visible(False)
                    continue
                same = query_labels[i] == neighbor_labels[i, j - 1]
                axes.spines[:].set(visible=True, linewidth=1.8, color=COLORS[0] if same else COLORS[1], linestyle=DASHES[0 if same else 1])
                words_under = f"{similarities[i, j - 1]:.2f}" if same else short(classes[neighbor_labels[i, j - 1]])
                axes.annotate(
                    words_under, (0.5, 0), (0, -2), xycoords="axes fraction", textcoords="offset points", ha="center", va="top",
                    fontsize=6.5, color="0.2" if same else COLORS[1],
                )


def short(name):
    """A class's name in the room of a small picture."""
    return name if len(name) <= 10 else f"{name[:9]}…"


def plot_map(folder, name, points, labels, classes, title, xlabel="", ylabel=""):
    """Make NAME.png and .svg: points [N, 2] in the colors of their labels [N]; with many classes without their names."""
    points, labels = numpy.asarray(points), numpy.asarray(labels)
    named = len(classes) <= len(CLASS_COLORS)
    with drawing(folder, name, 4.2, 3.3) as figure:
        axes = figure.subplots()
        # In random order: no class lies on top.
        order = numpy.random.default_rng(0).permutation(len(points))
        colors = palette(len(classes))
        size = min(12, max(1.5, 20_000 / max(1, len(points))))
        axes.scatter(*points[order].T, s=size, c=colors[labels[order]], linewidths=0, alpha=0.7, rasterized=True)
        shown = [number for number in range(len(classes)) if (labels == number).any()]
        if named and shown:  # names at the medians
            centers = [numpy.median(points[labels == number], axis=0) for number in shown]
            for number, place in zip(shown, unstacked(centers, numpy.ptp(points, axis=0) * (0.16, 0.06))):
                axes.annotate(
                    classes[number], place, ha="center", va="center", fontsize=7,
                    bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colors[number], "linewidth": 1.4, "alpha": 0.9},
                )
        axes.set_title(title, loc="left")
        axes.set(xlabel=xlabel, ylabel=ylabel, xticks=[], yticks=[])
        axes.grid(False)
        axes.spines[:].set_visible(False)


def palette(count):
    """Colors [count, 4] for classes."""
    return to_rgba_array(CLASS_COLORS[:count]) if count <= len(CLASS_COLORS) else colormaps["turbo"](numpy.linspace(0, 1, count))


def unstacked(centers, size):
    """Places for labels of a size (width, height) at centers [C, 2], moved up or down until none covers another."""
    places = numpy.array(centers, dtype=float)
    for _ in range(200):
        moved = False
        for i in range(len(places)):
            for j in range(i):
                across, up = places[i] - places[j]
                if abs(across) < size[0] and abs(up) < size[1]:
                    push = (size[1] - abs(up)) / 2 + 1e-3 * size[1]
                    sign = 1 if up >= 0 else -1
                    places[i, 1] += sign * push
                    places[j, 1] -= sign * push
                    moved = True
        if not moved:
            break
    return places


def plot_confusion(folder, confusion, classes, name="confusion", formats=FORMATS):
    """Make NAME.png and so on: which classes are taken for which.

    confusion: counts int64 [C, C], true classes in rows; classes: their names.
    """
    shares = (100 * confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)).numpy()
    count = len(classes)
    named = count <= MOST_NAMED
    with drawing(folder, name, *((4.6, 4.2) if named else (6.0, 5.4)), formats=formats) as figure:
        axes = figure.subplots()
        picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100 if named else max(1, shares.max()))
        axes.grid(False)
        if named:
            axes.set_xticks(range(count), classes, rotation=45, ha="right", rotation_mode="anchor")
            axes.set_yticks(range(count), classes)
            for row in range(count):
                for column in range(count):
                    color = "white" if shares[row, column] > 55 else "black"
                    axes.text(column, row, f"{shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=7.5)
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        figure.colorbar(picture, label="% of the true class", shrink=0.8)


def plot_spectrum(folder, spectra, ranks):
    """Make spectrum.png and .svg: eigenvalues of feature covariances, a dict of [D] by their names, each divided by its sum,
    with their effective ranks, a dict."""
    with drawing(folder, "spectrum") as figure:
        axes = figure.subplots()
        for i, (name, values) in enumerate(spectra.items()):
            shares = (values / values.sum().clamp(min=1e-300)).numpy()
            positive = shares > 1e-12  # the rest is rounding
            axes.plot(
                numpy.arange(1, len(shares) + 1)[positive], shares[positive], color=COLORS[i], linestyle=DASHES[i],
                label=f"{name}: {ranks[name]:.1f} of {len(shares)}",
            )
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_title("spectrum of the features' covariance", loc="left")
        axes.set_xlabel("dimension, by its eigenvalue")
        axes.set_ylabel("share of the variance")
        axes.legend(title="effective rank", alignment="left")


def plot_distances(folder, distances, words):
    """Make distances.png and .svg: distributions of the distance of l2-normalized features, float [N] each, in a dict of
    (pairs of views, pairs of pictures) by the network's name; words: what to say of each in the legend."""
    with drawing(folder, "distances") as figure:
        axes = figure.subplots()
        handles = []
        for i, (name, (views, pictures)) in enumerate(distances.items()):
            for values, fill in ((views, True), (pictures, False)):
                shares = numpy.histogram(numpy.asarray(values), DISTANCE_BINS)[0] / max(1, len(values)) * 100
                axes.stairs(shares, DISTANCE_BINS, color=COLORS[i], fill=fill, alpha=0.35 if fill else 1, linestyle=DASHES[i], linewidth=1.4)
            handles.append(Line2D([], [], color=COLORS[i], linestyle=DASHES[i], label=words[name]))
        axes.set_title("distances: two views (filled), two pictures (line)", loc="left")
        axes.set_xlabel("distance of l2-normalized features")
        axes.set_ylabel("% of the pairs")
        farthest = max(float(values.max()) for pair in distances.values() for values in pair)
        axes.set_xlim(0, max(1.5, farthest))  # after a ReLU, as here, √2 is the farthest
        axes.annotate("√2: orthogonal", (2**0.5, 1), (3, -3), xycoords=("data", "axes fraction"), textcoords="offset points", va="top", rotation=90, fontsize=7, color=GRAY)
        axes.axvline(2**0.5, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
        figure.legend(handles=handles, loc="outside lower left")
