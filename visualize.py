"""What a backbone's features know, without training anything:

    python visualize.py --pretrained experiments/1 data
    python visualize.py --pretrained CHECKPOINT --output plots data

Writes neighbors.png, map.png (test features by t-SNE, or by principal components without scikit-learn),
knn-confusion.png, spectrum.png, features.json (kNN, alignment, uniformity, effective rank). Minutes on a CPU.
"""
import math
import os
from typing import NamedTuple

import utils  # noqa: F401 (before torch)
import numpy
import torch
import torch.nn.functional as F
from matplotlib import colormaps

import simsiam
from utils import augment, checkpoint, cli, knn, plot, report
from utils.data import DATASETS, load_dataset, options_in
from utils.device import autocast, select_device, select_precision
from utils.run import BACKBONE, CONFIG, UNTRAINED, inherited_options, read_config

QUERIES, NEIGHBORS = 12, 6  # of neighbors.png


class Features(NamedTuple):
    """The test features of a backbone, and what is found by them."""
    unit: torch.Tensor          # float32 [N, D], l2-normalized
    spectrum: torch.Tensor      # float64 [D]: eigenvalues of their covariance
    similarities: torch.Tensor  # [N, k]: to the nearest training images, most similar first
    indices: torch.Tensor       # int64 [N, k]: of these images
    predicted: torch.Tensor     # int64 [N]: classes by kNN
    metrics: dict               # for features.json


def make_parser():
    parser = cli.Parser(prog="visualize.py", description=__doc__)
    parser.add_argument("--pretrained", required=True, type=cli.file_path, metavar="PATH", help="run or checkpoint")
    parser.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    parser.add_argument("--output", type=cli.file_path, metavar="DIR",
                        help="folder for the plots (default: the run's)")
    cli.add_normalization(parser, augment.MEAN, augment.STD)
    cli.add_data_options(parser, DATASETS)
    cli.add_device_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def find_files(parser, args, argv):
    """The settings, with the run's as defaults if --pretrained is its folder, and the checkpoints by name."""
    if not os.path.isdir(args.pretrained):
        if args.output is None:
            raise ValueError("--output DIR is required if --pretrained is a file")
        return args, {"trained": args.pretrained}
    settings = read_config(args.pretrained)["settings"]
    same = {name: settings[name] for name in ("arch", "dataset", "data_root")}
    parser.set_defaults(output=args.pretrained, **same, **options_in(settings))
    files = {"trained": BACKBONE, "untrained": UNTRAINED}
    files = {name: os.path.join(args.pretrained, file) for name, file in files.items()}
    if not os.path.exists(files["untrained"]):
        del files["untrained"]
    return parser.parse_args(argv), files


def measure(backbone, data, args, device):
    """The Features of one backbone."""
    precision = autocast(device, args.precision)
    def extract(images):
        return knn.extract_features(backbone, images, precision, args.mean, args.std)
    generator, size = augment.epoch_generator(0, 0, device), data.test_images.shape[2]
    draws = [augment.draw_views(len(data.test_images), generator, size, size) for _ in range(2)]
    pairs = []  # of features, made batch by batch: all views may exceed memory
    for rows in torch.arange(len(data.test_images)).split(knn.batch_size(backbone, data.test_images)):
        views = augment.make_views(data.test_images[rows].to(device), [view.rows(rows) for view in draws], size)
        pairs.append([extract(augment.denormalize(view)) for view in views])
    views = [torch.cat(parts) for parts in zip(*pairs)]
    bank, queries = extract(data.train_images), extract(data.test_images)
    similarities, indices = knn.nearest(queries, bank, min(knn.K, len(bank)))
    neighbors = data.train_labels[indices]
    predicted = knn.vote(similarities, neighbors, knn.TEMPERATURE, len(data.classes))
    unit = F.normalize(queries, dim=1)
    knn1, knn200 = (knn.accuracy(classes, data.test_labels) for classes in (neighbors[:, 0], predicted))
    metrics = {"knn1": knn1, "knn200": knn200, "alignment": knn.alignment(*views), "uniformity": knn.uniformity(unit),
               "effective_rank": knn.effective_rank(queries), "feature_dim": unit.shape[1]}
    return Features(unit, knn.spectrum(unit), similarities, indices, predicted, metrics)


def plot_neighbors(folder, data, features):
    """Draw neighbors.png: QUERIES test images, the first of each class, and their nearest training images
    with the similarity, or dashed and with its name if the class is another."""
    labels, names = data.test_labels.tolist(), [plot.printable(name[:10]) for name in data.classes]
    by_class = [[i for i, label in enumerate(labels) if label == each] for each in range(len(names))]
    chosen = [members[turn] for turn in range(QUERIES) for members in by_class if turn < len(members)]
    chosen = sorted(chosen[:QUERIES], key=lambda i: labels[i])
    with plot.figure(folder, "neighbors", 8.2, 4.2, layout="tight") as drawing:
        grid = drawing.subplots(math.ceil(len(chosen) / 2), 2 * (NEIGHBORS + 1), squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for query, row in zip(chosen, grid.reshape(-1, NEIGHBORS + 1)):
            show(row[0], data.test_images[query], names[labels[query]])
            found = features.indices[query].tolist(), features.similarities[query].tolist()
            for axes, index, similarity in zip(row[1:], *found):
                label = int(data.train_labels[index])
                if label == labels[query]:
                    show(axes, data.train_images[index], f"{similarity:.2f}", "-", plot.COLORS[0])
                else:
                    show(axes, data.train_images[index], names[label], "--", plot.COLORS[1])


def show(axes, image, words, linestyle="none", color="none"):
    """Draw an image uint8 [3, H, W] with words below it and an outline."""
    axes.set_axis_on()
    axes.set(xticks=[], yticks=[])
    axes.imshow(image.permute(1, 2, 0).cpu().numpy())
    axes.spines[:].set(visible=linestyle != "none", linewidth=1.8, color=color, linestyle=linestyle)
    axes.set_xlabel(words, fontsize=6)


def plot_map(folder, unit, labels, classes):
    """Draw map.png: the test features [N, D] in two dimensions, colored by class."""
    try:
        from sklearn.manifold import TSNE
        points = TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", random_state=0).fit_transform(unit.numpy())
        method = "t-SNE"
    except ImportError:
        centered = unit.double() - unit.double().mean(dim=0)
        points = (centered @ torch.linalg.eigh(centered.T @ centered)[1][:, -2:]).numpy()
        method = "principal components"
        cli.info("map.png shows principal components; for t-SNE install scikit-learn")
    colors = colormaps["tab10" if len(classes) <= 10 else "turbo"](numpy.linspace(0, 1, len(classes)))
    with plot.figure(folder, "map", 4.2, 3.6) as drawing:
        axes = drawing.subplots()
        axes.scatter(*points.T, s=min(12, max(1.5, 2e4 / len(points))), c=colors[labels], linewidths=0, alpha=0.7)
        named = labels.unique().tolist() if len(classes) <= 20 else []  # more have no room for their names
        for label in named:
            center = numpy.median(points[labels.numpy() == label], axis=0)
            box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colors[label]}
            axes.annotate(plot.printable(classes[label]), center, ha="center", va="center", fontsize=7, bbox=box)
        axes.set(title=f"{len(points):,} test images, {method}", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def plot_spectrum(folder, measured):
    """Draw spectrum.png: eigenvalues of the Features of each network by its name, divided by their sum."""
    with plot.figure(folder, "spectrum") as drawing:
        axes = drawing.subplots()
        for color, (name, features) in zip(plot.COLORS, measured.items()):
            shares = (features.spectrum / features.spectrum.sum()).numpy()
            shown = shares > 1e-12
            axes.plot(numpy.arange(1, len(shares) + 1)[shown], shares[shown], color=color,
                      label=f"{name}: {features.metrics['effective_rank']:.1f} of {len(shares)}")
        axes.set(yscale="log", xlabel="dimension", ylabel="share of the variance",
                 title="spectrum of the features' covariance")
        axes.legend(title="effective rank")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        args, files = find_files(parser, args, argv)
        device = select_device(args.gpu)
        args.precision = select_precision(args.precision, device)
        options = options_in(vars(args), inherited_options(args.pretrained))
        data = load_dataset(args.dataset, args.data_root, device, **options, unlabeled=False)
        if not data.has_classes:
            raise ValueError(f"--dataset {args.dataset}: no labels of several classes to draw")
        os.makedirs(args.output, exist_ok=True)
        measured = {}
        for name, file in files.items():
            backbone = simsiam.load_backbone(file, args.arch, verbose=cli.info)
            backbone.to(device, memory_format=torch.channels_last)
            measured[name] = measure(backbone, data, args, device)
            cli.info(f"{name}: {measured[name].metrics}")
        features = measured["trained"]
        plot_neighbors(args.output, data, features)
        plot_map(args.output, features.unit.cpu(), data.test_labels.cpu(), data.classes)
        confusion = knn.confusion_matrix(features.predicted, data.test_labels, len(data.classes))
        plot.plot_confusion(args.output, confusion, data.classes, "knn-confusion")
        plot_spectrum(args.output, measured)
        metrics = {name: features.metrics for name, features in measured.items()}
        checkpoint.write_json(os.path.join(args.output, "features.json"), metrics)
        if os.path.exists(os.path.join(args.output, CONFIG)):
            report.write_report(args.output)


if __name__ == "__main__":
    cli.run_script(main)
