"""Features for other tools, and weights to publish.

    python export.py features --pretrained experiments/1/backbone.pt --output features.npz data
    python export.py features --pretrained experiments/1/backbone.pt --output features.npz --images FOLDER
    python export.py release experiments/1 --linear experiments/2 --name simsiam_resnet18_cifar10
    python export.py check simsiam_resnet18_w16_cifar10

features: float32 features and labels of a data set or a folder of images. release: weights/NAME.pt in fp16, its linear
classifier, and weights/NAME.json with the accuracies after rounding. check: measure them again, loaded by torch.hub.
"""
import contextlib
import datetime
import hashlib
import io
import os

import utils  # noqa: F401 (before torch)
import numpy
import torch

import hubconf
import simsiam
from utils import checkpoint, log
from utils.augment import MEAN, SIZE, STD
from utils.cli import (
    Parser, add_data_options, add_device_options, add_normalization, data_options, file_path, run_script, say, warn,
)
from utils.data import DATASETS, load_dataset
from utils.device import autocast, describe, select_device, select_precision
from utils.images import load_folder
from utils.knn import extract_features, monitor, top_k
from utils.run import BACKBONE, RESULTS, inherit_data_options, read_config

TOLERANCE = 0.05  # percentage points between accuracies that count as equal
HERE = os.path.dirname(os.path.abspath(__file__))
HUB = [name for name in vars(hubconf) if name.startswith("simsiam_")]


def make_parser():
    parser = Parser(prog="export.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="features|release|check")
    features = commands.add_parser("features", help="features and labels to .npz")
    features.add_argument("--pretrained", required=True, type=file_path, metavar="CHECKPOINT", help="backbone")
    features.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    features.add_argument("--output", required=True, type=file_path, metavar="FILE", help="new .npz file")
    add_data_options(features, DATASETS)
    features.add_argument("--images", type=file_path, metavar="FOLDER", help="images, in class folders or not")
    add_normalization(features, MEAN, STD)
    release = commands.add_parser("release", help="weights/NAME.pt, .safetensors, its classifier and NAME.json")
    release.add_argument("run", type=file_path, metavar="RUN", help="folder of a finished run of main.py")
    release.add_argument("--linear", required=True, type=file_path, metavar="FOLDER", help="its linear evaluation")
    release.add_argument("--name", required=True, choices=HUB, metavar="NAME", help="torch.hub entry to release it as")
    check = commands.add_parser("check", help="measure released weights again")
    check.add_argument("name", choices=HUB, metavar="NAME", help="torch.hub entry")
    for command in (release, check):
        command.add_argument("--weights", type=file_path, default="weights", metavar="DIR", help="folder of weights")
        command.add_argument("--data_root", type=file_path, default="data", metavar="DIR", help="folder of the data")
    for command in (features, release, check):
        add_device_options(command)
        command.set_defaults(precision="fp32")  # what others compare should not depend on the device
    return parser


def export_features(args):
    if os.path.lexists(args.output):
        raise ValueError(f"{args.output} exists")
    device = select_device(args.gpu)
    backbone = simsiam.load_backbone(args.pretrained, args.arch, verbose=say).to(device)
    inherit_data_options(args, args.pretrained)
    if args.images is not None:
        images, labels, classes, files = load_folder(args.images, args.image_size or SIZE)
        splits, arrays = {"": (images, labels)}, {"files": numpy.array(files, dtype=str)}
    else:
        data = load_dataset(args.dataset, args.data_root, device, **data_options(vars(args)))
        splits = {"train_": (data.train_images, data.train_labels), "test_": (data.test_images, data.test_labels)}
        classes, arrays = data.classes, {}
    precision = autocast(device, select_precision(args.precision, device))
    for prefix, (images, labels) in ((name, split) for name, split in splits.items() if len(split[0])):
        features = extract_features(backbone, images, precision, args.mean, args.std)
        arrays |= {f"{prefix}features": features.cpu().numpy(), f"{prefix}labels": labels.cpu().numpy()}
    content = io.BytesIO()
    numpy.savez(content, classes=numpy.array(classes, dtype=str), **arrays)
    checkpoint.write(args.output, content.getbuffer())
    say(f"{args.output}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


def measure(backbone, classifier, linear, settings, args):
    """kNN and linear accuracies of a released backbone in percent, and the device and precision."""
    device = select_device(args.gpu)
    precision = select_precision(args.precision, device)
    data = load_dataset(settings["dataset"], args.data_root, device, **data_options(settings))
    backbone.to(device, memory_format=torch.channels_last)
    figures = monitor(backbone, data, autocast(device, precision))
    features = extract_features(backbone, data.test_images, autocast(device, precision), linear["mean"], linear["std"])
    logits = torch.nn.functional.linear(features, *(classifier[name].to(device) for name in ("weight", "bias")))
    figures |= {"linear": top_k(logits, data.test_labels, 1)}
    return {name: figures[name] for name in ("knn1", "knn200", "linear")}, f"{describe(device)}, {precision}"


def release(args):
    """Round the backbone of a finished run to fp16, measure it, and write NAME.pt, NAME-linear.pt and NAME.json."""
    config, last = read_config(args.run), log.read(args.run)[-1]
    settings, evaluation = config["settings"], read_config(args.linear)["settings"]
    results = checkpoint.read_json(os.path.join(args.linear, RESULTS))
    path = os.path.join(args.weights, f"{args.name}.pt")
    if last["epoch"] != settings["epochs"]:
        raise ValueError(f"{args.run}: not finished, epoch {last['epoch']} of {settings['epochs']}")
    tensors = checkpoint.load(os.path.join(args.run, BACKBONE))
    if results["backbone"] != checkpoint.digest(tensors):
        raise ValueError(f"--linear {args.linear}: the evaluation of another backbone")
    half = {name: value.half() if value.is_floating_point() else value for name, value in tensors.items()}
    content = checkpoint.to_bytes(half)
    if os.path.lexists(path) and checkpoint.digest(checkpoint.load(path)) != checkpoint.digest(half):
        raise ValueError(f"{path} exists and has other weights")
    backbone = simsiam.load_backbone(half, settings["arch"], verbose=False)
    if (settings["arch"], backbone.feature_dim) != ("resnet18", getattr(hubconf, args.name)(False).feature_dim):
        raise ValueError(f"--name {args.name}: another network than that of {args.run}")
    if any(settings.get(name) != evaluation.get(name) for name in ("dataset", "test_size", "validation")):
        raise ValueError(f"--linear {args.linear}: not on the test images of {args.run}")
    classifier = checkpoint.load(os.path.join(args.linear, "classifier.pt"))
    accuracies, measured_with = measure(backbone, classifier, evaluation, settings, args)
    before = {"knn1": last["knn1"], "knn200": last["knn200"], "linear": results["test_top1"]}
    for name, value in accuracies.items():
        if abs(value - before[name]) > TOLERANCE:
            warn(f"{name}: {before[name]:.2f} % before rounding to fp16, {value:.2f} % after")
    os.makedirs(args.weights, exist_ok=True)
    checkpoint.write(path, content)
    checkpoint.save(os.path.join(args.weights, f"{args.name}-linear.pt"), classifier)
    with contextlib.suppress(ImportError):  # an optional package
        import safetensors.torch
        checkpoint.write(os.path.join(args.weights, f"{args.name}.safetensors"), safetensors.torch.save(half))
    checkpoint.write_json(os.path.join(args.weights, f"{args.name}.json"), {
        "file": f"{args.name}.pt", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "arch": settings["arch"], "width": settings["width"], "feature_dim": backbone.feature_dim, "mean": MEAN,
        "std": STD, "accuracies": accuracies, "accuracies_before_rounding": before, "measured_with": measured_with,
        "linear_evaluation": evaluation, "recipe": settings, "date": datetime.date.today().isoformat(),
        **{name: config[name] for name in ("commit", "device", "versions")},
    })
    say(f"{path}: {', '.join(f'{name} {value:.2f} %' for name, value in accuracies.items())}")


def check(args):
    """Measure released weights and compare with their .json. Returns the exit code."""
    path = os.path.join(args.weights, f"{args.name}.json")
    about = checkpoint.read_json(path, "accuracies", "linear_evaluation", "recipe")
    backbone = torch.hub.load(HERE, args.name, source="local", folder=args.weights)
    classifier = checkpoint.load(os.path.join(args.weights, f"{args.name}-linear.pt"))
    accuracies, measured_with = measure(backbone, classifier, about["linear_evaluation"], about["recipe"], args)
    say(f"{args.name}: {measured_with}")
    for name, value in accuracies.items():
        say(f"{name:7} published {about['accuracies'][name]:6.2f} %  measured {value:6.2f} %")
    return int(any(abs(value - about["accuracies"][name]) > TOLERANCE + 1e-9 for name, value in accuracies.items()))


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        return {"features": export_features, "release": release, "check": check}[args.command](args)


if __name__ == "__main__":
    run_script(main)
