"""What a backbone's features know, without training anything:

    python visualize.py --pretrained experiments/1
    python visualize.py --pretrained CHECKPOINT --output plots data

Writes neighbors.png, knn-confusion.png, spectrum.png, features.json (kNN, effective rank) and, with
scikit-learn, map.png (test features by t-SNE). Minutes on a CPU.
"""
import os

import utils  # noqa: F401 (before torch)
import torch
import torch.nn.functional as F

import simsiam
from utils import augment, checkpoint, cli, device as devices, knn, plot, report, run as runs
from utils.data import DATASETS, load_dataset, options_in

QUERIES, NEIGHBORS = 12, 6  # of neighbors.png


def make_parser():
    parser = cli.Parser(prog="visualize.py", description=__doc__)
    add = parser.add_argument
    add("--pretrained", required=True, type=cli.file_path, metavar="PATH", help="run or checkpoint")
    add("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    add("--output", type=cli.file_path, metavar="DIR", help="folder for the plots (default: the run's)")
    cli.add_normalization(parser, augment.MEAN, augment.STD)
    cli.add_data_options(parser, DATASETS)
    cli.add_device_options(parser)
    add("--quiet", action="store_true", help="print warnings and errors only")
    return parser


def measure(backbone, data, args, device):
    """The metrics of features.json, the l2-normalized test features, float32 [N, D], the indices of
    their nearest training images, int64 [N, k], and their classes by kNN, int64 [N]."""
    bank, queries = (
        knn.extract_features(backbone, images, devices.autocast(device, args.precision), args.mean, args.std)
        for images in (data.train_images, data.test_images))
    similarities, indices = knn.nearest(queries, bank, min(knn.K, len(bank)))
    neighbors, labels = data.train_labels[indices], data.test_labels
    predicted = knn.vote(similarities, neighbors, knn.TEMPERATURE, len(data.classes))
    metrics = {
        "knn1": knn.accuracy(neighbors[:, 0], labels), "knn200": knn.accuracy(predicted, labels),
        "effective_rank": knn.effective_rank(queries), "feature_dim": queries.shape[1]}
    return metrics, F.normalize(queries, dim=1), indices, predicted


def plot_neighbors(folder, data, indices):
    """Draw neighbors.png: the first test images of each class and their nearest training images."""
    labels, names = data.test_labels.cpu(), [plot.printable(name[:10]) for name in data.classes]
    turns = F.one_hot(labels).cumsum(dim=0).gather(1, labels[:, None])[:, 0]  # 1: first of its class
    chosen = sorted(turns.argsort(stable=True)[:QUERIES].tolist(), key=lambda i: labels[i])
    with plot.figure(folder, "neighbors", 8.2, 4.2) as drawing:
        for i, query in enumerate(chosen):
            row = [drawing.add_subplot(QUERIES // 2, 2 * (NEIGHBORS + 1), i * (NEIGHBORS + 1) + j)
                   for j in range(1, NEIGHBORS + 2)]
            plot.show_image(row[0], data.test_images[query], words=names[labels[query]])
            for axes, index in zip(row[1:], indices[query]):
                label = data.train_labels[index]
                color = plot.COLORS[int(label != labels[query])]
                plot.show_image(axes, data.train_images[index], color, names[label])


def plot_map(folder, unit, labels, classes):
    """Draw map.png: the test features [N, D] in two dimensions, colored by class."""
    try:
        from sklearn.manifold import TSNE
        tsne = TSNE(perplexity=min(30, (len(unit) - 1) / 3), init="pca", random_state=0)
        points = tsne.fit_transform(unit.numpy())
    except Exception as error:  # of any type: missing, broken, or too few images
        return cli.warn(f"no map.png, which scikit-learn makes ({error})")
    with plot.figure(folder, "map", 5.2, 3.8) as drawing:
        axes = drawing.subplots()
        colors = "tab10" if len(classes) <= 10 else "turbo"
        shown = axes.scatter(*points.T, s=4, c=labels, cmap=colors, linewidths=0, alpha=0.7)
        if len(classes) <= 20:  # more have no room for their names
            names = [plot.printable(classes[label]) for label in labels.unique()]
            drawing.legend(shown.legend_elements(num=None)[0], names, loc="outside right upper")
        axes.set(title=f"{len(points):,} test images, t-SNE", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)


def plot_spectrum(folder, spectra, metrics):
    """Draw spectrum.png: eigenvalues of the features' covariance; spectra, metrics: by network."""
    with plot.figure(folder, "spectrum") as drawing:
        axes = drawing.subplots()
        for color, (name, spectrum) in zip(plot.COLORS, spectra.items()):
            shares = (spectrum / spectrum.sum()).clamp(min=1e-12)
            label = f"{name}: {metrics[name]['effective_rank']:.1f} of {len(shares)}"
            axes.plot(range(1, len(shares) + 1), shares, color=color, label=label)
        axes.set(yscale="log", xlabel="dimension", ylabel="share of the variance")
        axes.legend(title="effective rank")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    folder, files = args.pretrained, {"trained": args.pretrained}
    with parser.user_errors(), cli.memory_errors("visualize.py", "lower --train_size or --test_size"):
        if os.path.isdir(folder):
            settings = runs.read_config(folder)["settings"]
            same = {name: settings[name] for name in ("arch", "dataset", "data_root")}
            parser.set_defaults(output=folder, **same, **options_in(settings))
            args = parser.parse_args(argv)
            names = {"untrained": runs.UNTRAINED, "trained": runs.BACKBONE}
            files = {name: os.path.join(folder, file) for name, file in names.items()}
            if not os.path.exists(files["untrained"]):
                del files["untrained"]
        elif args.output is None:
            raise ValueError("--output DIR is required if --pretrained is a file")
        device = devices.select_device(args.gpu)
        args.precision = devices.select_precision(args.precision, device)
        options = options_in(vars(args), runs.inherited_options(args.pretrained))
        data = load_dataset(args.dataset, args.data_root, device, unlabeled=False, **options)
        if not data.has_classes or len(data.test_labels) < 2:
            raise ValueError(f"--dataset {args.dataset}: no labels of several classes, or too few test images")
        os.makedirs(args.output, exist_ok=True)
        metrics, spectra = {}, {}
        for name, file in files.items():  # the trained network comes last, and is drawn
            backbone = simsiam.load_backbone(file, args.arch, verbose=cli.info)
            backbone.to(device, memory_format=torch.channels_last)
            metrics[name], unit, indices, predicted = measure(backbone, data, args, device)
            spectra[name] = knn.spectrum(unit)
            cli.info(f"{name}: {metrics[name]}")
        plot_neighbors(args.output, data, indices)
        plot_map(args.output, unit.cpu(), data.test_labels.cpu(), data.classes)
        if len(data.classes) <= knn.CONFUSION_CLASSES:
            confusion = knn.confusion_matrix(predicted, data.test_labels, len(data.classes))
            plot.plot_confusion(args.output, confusion, data.classes, "knn-confusion")
        plot_spectrum(args.output, spectra, metrics)
        checkpoint.write_json(os.path.join(args.output, "features.json"), metrics)
        if os.path.exists(os.path.join(args.output, runs.CONFIG)):
            report.draw_run(args.output)


if __name__ == "__main__":
    cli.run_script(main)
