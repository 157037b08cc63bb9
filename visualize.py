"""Figures of what a backbone's features know, without training anything:

    python visualize.py --pretrained experiments/1 data
    python visualize.py --pretrained CHECKPOINT --output figures data

--pretrained is the folder of a run of main.py, which then gets the figures, or any checkpoint that main_lincls.py takes.
What comes out: the nearest training pictures of a dozen test pictures; maps of the test features by their principal
components, and by t-SNE where scikit-learn is installed; the confusion of classes by kNN; the spectrum of the
features' covariance; how near two views and two pictures are. The numbers are in features.json. Where the run was
started with --untrained, its untrained network is shown beside it. At width 16: 6 minutes on one slow CPU core.
"""
import os
from typing import NamedTuple

from utils.cpu import prepare_cpu  # before torch

import torch
import torch.nn.functional as F

from simsiam import ARCHS, load_backbone
from utils import checkpoint, log
from utils.augment import MEAN, STD, apply_two_views, denormalize, draw_views, epoch_generator
from utils.cli import Parser, add_normalization, run, whole_number
from utils.data import DATASETS, load_dataset
from utils.device import autocast, select_device, select_precision
from utils.features import extract_features
from utils.knn import K, TEMPERATURE, nearest, vote
from utils.metrics import alignment, confusion_matrix, effective_rank, principal_components, spectrum, uniformity
from utils.plot_features import NEIGHBORS, QUERIES, plot_confusion, plot_distances, plot_map, plot_neighbors, plot_spectrum
from utils.progress import say, set_quiet
from utils.report import FEATURES, REPORT, write_report
from utils.run import BACKBONE, CONFIG, UNTRAINED
from utils.runs import read_settings
from utils.style import make_folder

SOME_PAIRS = 100_000  # of pictures, for the distribution of their distances


def make_parser():
    parser = Parser(prog="visualize.py", description=__doc__)
    source = parser.add_argument_group("backbone")
    source.add_argument("--pretrained", required=True, metavar="FOLDER|CHECKPOINT", help="a run's folder, its backbone.pt or checkpoint.pt, or a checkpoint of other code")
    source.add_argument("--arch", choices=ARCHS, help="backbone (default: the run's, else resnet18)")
    add_normalization(source, MEAN, STD)

    data = parser.add_argument_group("data")
    data.add_argument("data_root", nargs="?", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py (default: the run's, else data)")
    data.add_argument("--dataset", choices=DATASETS, help="default: the run's, else cifar10")
    data.add_argument("--train_size", type=whole_number(1), metavar="N", help="the first N training pictures only (default: the run's, else all)")
    data.add_argument("--test_size", type=whole_number(2), metavar="N", help="the first N test pictures only (default: the run's, else all)")

    device = parser.add_argument_group("device")
    device.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    device.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the backbone's arithmetic")

    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="DIR", help="where the figures go (default: the run's folder)")
    output.add_argument("--quiet", action="store_true", help="no progress and no figures in words: warnings and errors only")
    return parser


def fill_in(args):
    """What is not typed, from the run's folder if it is one. Returns the paths of the backbones to look at, by name, the first
    the one that it is about. Raises ValueError and OSError."""
    settings, files = {}, {"backbone": args.pretrained}
    if os.path.isdir(args.pretrained):
        folder = args.pretrained
        settings, files = read_settings(folder), {"trained": os.path.join(folder, BACKBONE)}
        if not os.path.exists(files["trained"]):
            raise FileNotFoundError(f"{folder}: no {BACKBONE} in it; the folder of a run of main.py is needed, or a checkpoint")
        untrained = os.path.join(folder, UNTRAINED)
        if os.path.exists(untrained):
            files["untrained"] = untrained
        args.output = args.output or folder
    elif args.output is None:
        raise ValueError("--output DIR is needed where --pretrained is a file and not a run's folder")
    for name, usual in (("arch", "resnet18"), ("data_root", "data"), ("dataset", "cifar10"), ("train_size", None), ("test_size", None)):
        if getattr(args, name) is None:
            setattr(args, name, settings.get(name, usual))
    return files


# ---------------------------------------------------------------------------------------------------
# The features, and what is measured of them


def features_of(backbone, data, args, device, precision_context):
    """The features of the training and of the test pictures, and those of two views of each test picture, drawn as in
    pre-training: four float32 [N, feature_dim]."""
    def features(images):
        return extract_features(backbone, images, precision_context, args.mean, args.std)

    generator = epoch_generator(0, 0, device)
    size, shape = len(data.test_images), data.test_images.shape[2:]
    draws = draw_views(size, generator, *shape), draw_views(size, generator, *shape)
    views = [
        [denormalize(views) for views in apply_two_views(data.test_images[rows].to(device), *(of_view.rows(rows) for of_view in draws))]
        for rows in torch.arange(size).split(500)
    ]
    return features(data.train_images), features(data.test_images), *(features(torch.cat(of_view)) for of_view in zip(*views))


class Neighbors(NamedTuple):
    """What kNN finds for N test pictures."""

    similarities: torch.Tensor  # [N, K]: cosine similarities of the nearest training pictures
    indices: torch.Tensor       # int64 [N, K]: which they are
    nearest: torch.Tensor       # int64 [N]: the class by k = 1
    voted: torch.Tensor         # int64 [N]: the class by k = K


def find_neighbors(bank, queries, data):
    found = list(nearest(queries, bank, min(K, len(bank))))
    similarities, indices = (torch.cat(part) for part in zip(*found))
    neighbors = data.train_labels[indices]
    voted = torch.cat([
        vote(*chunk, TEMPERATURE, len(data.classes)) for chunk in zip(similarities.split(500), neighbors.split(500))
    ])
    return Neighbors(similarities, indices, neighbors[:, 0], voted)


def measure(neighbors, unit, views, eigenvalues, data):
    """The numbers of one backbone's features. unit: of the test pictures, l2-normalized."""
    return {
        "knn1": 100 * (neighbors.nearest == data.test_labels).double().mean().item(),
        "knn200": 100 * (neighbors.voted == data.test_labels).double().mean().item(),
        "alignment": alignment(*views),
        "uniformity": uniformity(unit),
        "effective_rank": effective_rank(eigenvalues),
        "feature_dim": unit.shape[1],
    }


def distances(unit, views):
    """Distances of l2-normalized features: of the two views of each picture, and of SOME_PAIRS random pairs of pictures."""
    first, second = (F.normalize(one, dim=1) for one in views)
    generator = torch.Generator().manual_seed(0)
    i = torch.randint(len(unit), (SOME_PAIRS,), generator=generator)
    j = (i + torch.randint(1, len(unit), (SOME_PAIRS,), generator=generator)) % len(unit)  # never itself
    i, j = i.to(unit.device), j.to(unit.device)
    return (first - second).norm(dim=1).cpu(), (unit[i] - unit[j]).norm(dim=1).cpu()


def dozen(labels, num_classes):
    """Indices of a dozen pictures that nobody chose: the first of each class in turn, then the second ones and so on."""
    by_class = [(labels == number).nonzero()[:, 0].tolist() for number in range(num_classes)]
    turns = [members[turn] for turn in range(QUERIES) for members in by_class if turn < len(members)]
    return sorted(turns[:QUERIES], key=lambda index: labels[index])


# ---------------------------------------------------------------------------------------------------
# The figures


def draw(args, data, neighbors, unit):
    """The figures of the first backbone alone: neighbors, confusion, maps."""
    chosen = torch.tensor(dozen(data.test_labels.cpu(), len(data.classes)))
    near = neighbors.indices.cpu()[chosen, :NEIGHBORS]
    plot_neighbors(
        args.output, data.test_images.cpu()[chosen], data.test_labels.cpu()[chosen].tolist(), data.train_images.cpu()[near],
        data.train_labels.cpu()[near], neighbors.similarities.cpu()[chosen, :NEIGHBORS], data.classes,
    )
    plot_confusion(args.output, confusion_matrix(neighbors.voted, data.test_labels, len(data.classes)), data.classes, "knn-confusion")
    points, shares = principal_components(unit)
    plot_map(
        args.output, "map-pca", points, data.test_labels.cpu(), data.classes, f"{len(points):,} test pictures, principal components",
        *(f"component {i + 1}: {100 * share:.0f} % of the variance" for i, share in enumerate(shares.tolist())),
    )
    draw_tsne(args, data, unit)


def draw_tsne(args, data, unit):
    """map-tsne, where scikit-learn is installed; a line where it is not."""
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        say("map-tsne is left out: it needs the package scikit-learn (pip install scikit-learn)")
        return
    if len(unit) < 8:
        say(f"map-tsne is left out: {len(unit)} test pictures are too few")
        return
    perplexity = min(30, (len(unit) - 1) / 3)
    say(f"t-SNE of {len(unit):,} test pictures")
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(unit.cpu().numpy())
    plot_map(args.output, "map-tsne", points, data.test_labels.cpu(), data.classes, f"{len(points):,} test pictures, t-SNE, perplexity {perplexity:g}")


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    set_quiet(args.quiet)
    with parser.user_errors():
        files = fill_in(args)
        device = select_device(args.gpu)
        precision_context = autocast(device, select_precision(args.precision, device))
        if device.type == "cpu":
            prepare_cpu()
        backbones = {
            name: load_backbone(checkpoint.load(path), args.arch, name=path, verbose=not args.quiet) for name, path in files.items()
        }
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        if len(data.test_images) < 2:
            raise ValueError(f"{len(data.test_images)} test pictures: at least 2 are needed")
        make_folder(args.output)

        numbers, spectra, of_pairs = {}, {}, {}
        for i, (name, backbone) in enumerate(backbones.items()):
            backbone.to(device, memory_format=torch.channels_last)
            bank, queries, *views = features_of(backbone, data, args, device, precision_context)
            neighbors, unit = find_neighbors(bank, queries, data), F.normalize(queries, dim=1)
            spectra[name], of_pairs[name] = spectrum(unit), distances(unit, views)
            numbers[name] = measure(neighbors, unit, views, spectra[name], data)
            say(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in numbers[name].items()))
            if i == 0:
                draw(args, data, neighbors, unit)
        plot_spectrum(args.output, spectra, {name: of_one["effective_rank"] for name, of_one in numbers.items()})
        plot_distances(args.output, of_pairs, {
            name: f"{name}: alignment {of_one['alignment']:.3f}, uniformity {of_one['uniformity']:.2f}".replace("-", "−")
            for name, of_one in numbers.items()
        })
        log.write_json(
            os.path.join(args.output, FEATURES), {"test_pictures": len(data.test_images), "bank": len(data.train_images), **numbers}
        )
        if os.path.exists(os.path.join(args.output, CONFIG)):
            write_report(args.output)
            say(f"figures and all else on one page: {os.path.join(args.output, REPORT)}")
    return 0


if __name__ == "__main__":
    run(main)
