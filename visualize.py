"""What a backbone's features know, without training anything:

    python visualize.py --pretrained experiments/1 data
    python visualize.py --pretrained CHECKPOINT --output figures data

Writes neighbors.png, map.png (test features by t-SNE if scikit-learn is installed, else by principal components),
knn-confusion.png, spectrum.png and features.json (kNN, alignment, uniformity, effective rank). Minutes on a CPU.
"""
import os

import utils  # noqa: F401 (before torch)
import numpy
import torch
import torch.nn.functional as F
from matplotlib import colormaps

import simsiam
from utils import checkpoint
from utils.augment import MEAN, STD, apply_two_views, denormalize, draw_views, epoch_generator
from utils.cli import (
    Parser, add_data_options, add_device_options, add_normalization, data_options, file_path, info, run_script,
)
from utils.data import DATASETS, load_dataset
from utils.device import autocast, select_device, select_precision
from utils.knn import (
    K, TEMPERATURE, accuracy, alignment, confusion_matrix, effective_rank, extract_features, nearest, spectrum,
    uniformity, vote,
)
from utils.plot import COLORS, figure, plot_confusion, printable
from utils.report import write_report
from utils.run import BACKBONE, CONFIG, UNTRAINED, inherit_data_options, read_config

QUERIES, NEIGHBORS = 12, 6  # of neighbors.png
FILES = {"trained": BACKBONE, "untrained": UNTRAINED}


def make_parser():
    parser = Parser(prog="visualize.py", description=__doc__)
    parser.add_argument("--pretrained", required=True, type=file_path, metavar="PATH", help="run or checkpoint")
    parser.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    parser.add_argument("--output", type=file_path, metavar="DIR", help="folder for the figures (default: the run's)")
    add_normalization(parser, MEAN, STD)
    add_data_options(parser, DATASETS)
    add_device_options(parser)
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def find_files(parser, args, argv):
    """The settings, with the run's as defaults if --pretrained is its folder, and the checkpoints by name."""
    if os.path.isdir(args.pretrained):
        settings = read_config(args.pretrained)["settings"]
        same = {name: settings[name] for name in ("arch", "dataset", "data_root")}
        parser.set_defaults(output=args.pretrained, **same, **data_options(settings))
        files = {name: os.path.join(args.pretrained, file) for name, file in FILES.items()}
        if not os.path.exists(files["untrained"]):
            del files["untrained"]
        return parser.parse_args(argv), files
    if args.output is None:
        raise ValueError("--output DIR is required if --pretrained is a file")
    return args, {"trained": args.pretrained}


def measure(backbone, data, args, device):
    """Of the features of one backbone: the numbers for features.json, the spectrum, l2-normalized test features [N, D],
    and what kNN finds: similarities and bank indices [N, k], predicted classes [N]."""
    def features(images):
        return extract_features(backbone, images, autocast(device, args.precision), args.mean, args.std)
    generator, size, views_size = epoch_generator(0, 0, device), len(data.test_images), data.test_images.shape[2]
    draws = [draw_views(size, generator, *data.test_images.shape[2:]) for _ in range(2)]
    views = [apply_two_views(data.test_images[rows].to(device), *(view.rows(rows) for view in draws), views_size)
             for rows in torch.arange(size).split(500)]
    views = [features(denormalize(torch.cat(of_all))) for of_all in zip(*views)]
    bank, queries = features(data.train_images), features(data.test_images)
    similarities, indices = (torch.cat(part) for part in zip(*nearest(queries, bank, min(K, len(bank)))))
    neighbors = data.train_labels[indices]
    predicted = vote(similarities, neighbors, TEMPERATURE, len(data.classes))
    unit = F.normalize(queries, dim=1)
    eigenvalues = spectrum(unit)
    numbers = {"knn1": accuracy(neighbors[:, 0], data.test_labels), "knn200": accuracy(predicted, data.test_labels),
               "alignment": alignment(*views), "uniformity": uniformity(unit),
               "effective_rank": effective_rank(queries), "feature_dim": unit.shape[1]}
    return numbers, eigenvalues, unit, similarities, indices, predicted


def plot_neighbors(folder, data, similarities, indices):
    """Draw neighbors.png: QUERIES test images, the first of each class, and their nearest training images with the
    similarity, or dashed and with its name if the class is another."""
    by_class = [(data.test_labels == label).nonzero()[:, 0].tolist() for label in range(len(data.classes))]
    chosen = [members[turn] for turn in range(QUERIES) for members in by_class if turn < len(members)][:QUERIES]
    with figure(folder, "neighbors", 8.2, 4.2, layout="tight") as drawing:
        grid = drawing.subplots(-(-len(chosen) // 2), 2 * (NEIGHBORS + 1), squeeze=False,
                                subplot_kw={"xticks": [], "yticks": []})
        for axes in grid.flat:
            axes.set_axis_off()
        chosen.sort(key=data.test_labels.tolist().__getitem__)
        for query, row in zip(chosen, grid.reshape(-1, NEIGHBORS + 1)):
            images = [(data.test_images[query], int(data.test_labels[query]), None)]
            images += [(data.train_images[j], int(data.train_labels[j]), similarity) for j, similarity in
                       zip(indices[query, :NEIGHBORS].tolist(), similarities[query].tolist())]
            for axes, (image, label, similarity) in zip(row, images):
                same = label == images[0][1]
                axes.set_axis_on()
                axes.imshow(image.permute(1, 2, 0).cpu().numpy())
                axes.spines[:].set(visible=similarity is not None, linewidth=1.8, color=COLORS[0 if same else 1],
                                   linestyle="-" if same else "--")
                name = printable(data.classes[label][:10])
                axes.set_xlabel(f"{similarity:.2f}" if same and similarity else name, fontsize=6)


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
        info("map.png shows principal components; for t-SNE install scikit-learn")
    colors = colormaps["tab10" if len(classes) <= 10 else "turbo"](numpy.linspace(0, 1, len(classes)))
    with figure(folder, "map", 4.2, 3.6) as drawing:
        axes = drawing.subplots()
        axes.scatter(*points.T, s=min(12, max(1.5, 2e4 / len(points))), c=colors[labels], linewidths=0, alpha=0.7)
        for label in labels.unique().tolist() if len(classes) <= 20 else ():
            center = numpy.median(points[labels.numpy() == label], axis=0)
            axes.annotate(printable(classes[label]), center, ha="center", va="center", fontsize=7,
                          bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": colors[label]})
        axes.set(title=f"{len(points):,} test images, {method}", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def plot_spectrum(folder, spectra, numbers):
    """Draw spectrum.png: eigenvalues [D] of each network, divided by their sum."""
    with figure(folder, "spectrum") as drawing:
        axes = drawing.subplots()
        for color, (name, values) in zip(COLORS, spectra.items()):
            shares = (values / values.sum()).numpy()
            axes.plot(numpy.arange(1, len(shares) + 1)[shares > 1e-12], shares[shares > 1e-12], color=color,
                      label=f"{name}: {numbers[name]['effective_rank']:.1f} of {len(shares)}")
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
        inherit_data_options(args, args.pretrained)
        data = load_dataset(args.dataset, args.data_root, device, **data_options(vars(args)), unlabeled=False)
        if not data.has_classes:
            raise ValueError(f"--dataset {args.dataset}: no labels of several classes to draw")
        os.makedirs(args.output, exist_ok=True)
        numbers, spectra = {}, {}
        for name, file in files.items():
            backbone = simsiam.load_backbone(file, args.arch, verbose=info)
            backbone.to(device, memory_format=torch.channels_last)
            numbers[name], spectra[name], unit, similarities, indices, predicted = measure(backbone, data, args, device)
            info(f"{name}: {numbers[name]}")
            if name == "trained":
                plot_neighbors(args.output, data, similarities, indices)
                plot_map(args.output, unit.cpu(), data.test_labels.cpu(), data.classes)
                confusion = confusion_matrix(predicted, data.test_labels, len(data.classes))
                plot_confusion(args.output, confusion, data.classes, "knn-confusion")
        plot_spectrum(args.output, spectra, numbers)
        checkpoint.write_json(os.path.join(args.output, "features.json"), numbers)
        if os.path.exists(os.path.join(args.output, CONFIG)):
            write_report(args.output)


if __name__ == "__main__":
    run_script(main)
