"""Features for other tools, and weights to publish.

    python export.py features --pretrained experiments/1/backbone.pt --output features.npz data
    python export.py release experiments/1 --linear experiments/2 --name simsiam_resnet18_cifar10
    python export.py check simsiam_resnet18_w16_cifar10
"""
import datetime
import hashlib
import io
import os

import utils  # noqa: F401 (before torch)
import numpy
import torch

import hubconf
import simsiam
from utils import augment, checkpoint, cli, data, device as devices, knn, log, run
from utils.folder import load_folder

TOLERANCE = 0.05  # percentage points between accuracies that count as equal
HERE = os.path.dirname(os.path.abspath(__file__))
HUB = [name for name in vars(hubconf) if name.startswith("simsiam_")]


def make_parser():
    parser = cli.Parser(prog="export.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    features = commands.add_parser("features", help="float32 features and labels, to .npz")
    release = commands.add_parser("release", help="weights/NAME.pt in fp16, classifier, NAME.json")
    check = commands.add_parser("check", help="measure the accuracies in NAME.json again")
    path = {"type": cli.file_path, "metavar": "PATH"}
    features.add_argument("--pretrained", **path, required=True, help="checkpoint of the backbone")
    features.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    features.add_argument("--output", **path, required=True, help="new .npz file")
    cli.add_data_options(features, data.DATASETS)
    features.add_argument("--images", **path, help="folder of images, in class folders or not")
    cli.add_normalization(features, augment.MEAN, augment.STD)
    release.add_argument("run", **path, help="folder of a finished run of main.py")
    release.add_argument("--linear", **path, required=True, help="folder of its linear evaluation")
    release.add_argument("--name", required=True, choices=HUB, metavar="NAME", help="hub entry")
    check.add_argument("name", choices=HUB, metavar="NAME", help="torch.hub entry")
    for command in (release, check):
        command.add_argument("--weights", **path, default="weights", help="folder of weights")
        command.add_argument("--data_root", **path, default="data", help="folder of the data")
    for command in (features, release, check):
        cli.add_device_options(command)
        command.set_defaults(precision="fp32")  # comparable on any device
    return parser


def export_features(args):
    """Features and labels of the splits of a data set, or of the images of a folder, as .npz."""
    if os.path.lexists(args.output):
        raise ValueError(f"{args.output} exists")
    device = devices.select_device(args.gpu)
    backbone = simsiam.load_backbone(args.pretrained, args.arch, verbose=cli.say).to(device)
    options = data.options_in(vars(args), run.inherited_options(args.pretrained))
    if args.images is not None:
        size = options["image_size"] or augment.SIZE
        images, labels, classes, files = load_folder(args.images, size)
        splits, arrays = {"": (images, labels)}, {"files": numpy.array(files, dtype=str)}
    else:
        *pairs, classes = data.load_dataset(args.dataset, args.data_root, device, **options)
        splits, arrays = {"train_": pairs[:2], "test_": pairs[2:]}, {}  # images and labels of each
    autocast = devices.autocast(device, devices.select_precision(args.precision, device))
    for prefix, (images, labels) in splits.items():
        if len(images) > 0:
            features = knn.extract_features(backbone, images, autocast, args.mean, args.std)
            arrays[f"{prefix}features"] = features.cpu().numpy()
            arrays[f"{prefix}labels"] = labels.cpu().numpy()
    content = io.BytesIO()
    numpy.savez(content, classes=numpy.array(classes, dtype=str), **arrays)
    checkpoint.write(args.output, content.getbuffer())
    cli.say(f"{args.output}: {', '.join(f'{name} {[*array.shape]}' for name, array in arrays.items())}")


def release(args):
    """Round the backbone of a finished run to fp16, measure it, write it with its classifier."""
    config, evaluation = run.read_config(args.run), run.read_config(args.linear)["settings"]
    settings, tensors = config["settings"], checkpoint.load(os.path.join(args.run, run.BACKBONE))
    before = accuracies_before(args, settings, evaluation, tensors)
    half = {name: each.half() if each.is_floating_point() else each for name, each in tensors.items()}
    content, path = checkpoint.to_bytes(half), os.path.join(args.weights, args.name)
    existing = checkpoint.load(f"{path}.pt") if os.path.lexists(f"{path}.pt") else half
    if checkpoint.digest(existing) != checkpoint.digest(half):
        raise ValueError(f"{path}.pt exists and has other weights")
    backbone = simsiam.load_backbone(half, settings["arch"], verbose=False)
    entry = getattr(hubconf, args.name)(pretrained=False)
    if (settings["arch"], backbone.feature_dim) != ("resnet18", entry.feature_dim):
        raise ValueError(f"--name {args.name}: another network than that of {args.run}")
    classifier = checkpoint.load(os.path.join(args.linear, "classifier.pt"))
    accuracies, device = measure(backbone, classifier, evaluation, settings, args)
    for name, value in accuracies.items():
        if abs(value - before[name]) > TOLERANCE:
            cli.warn(f"{name}: {before[name]:.2f} % before rounding to fp16, {value:.2f} % after")
    os.makedirs(args.weights, exist_ok=True)
    checkpoint.write(f"{path}.pt", content)
    checkpoint.save(f"{path}-linear.pt", classifier)
    checkpoint.write_json(f"{path}.json", {
        "file": f"{args.name}.pt", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "arch": settings["arch"], "width": settings["width"], "feature_dim": backbone.feature_dim,
        "mean": augment.MEAN, "std": augment.STD, "accuracies": accuracies, "measured_with": device,
        "accuracies_before_rounding": before, "linear_evaluation": evaluation, "recipe": settings,
        "date": datetime.date.today().isoformat(), "commit": config["commit"],
        "device": config["device"], "versions": config["versions"],
    })
    cli.say(f"{path}.pt: {', '.join(f'{name} {value:.2f} %' for name, value in accuracies.items())}")


def accuracies_before(args, settings, evaluation, tensors):
    """Accuracies of a run and its linear evaluation. Raises ValueError if the run is not finished
    or the evaluation is not of its backbone on its test images."""
    results = checkpoint.read_json(os.path.join(args.linear, run.RESULTS))
    last = log.read(args.run)[-1]
    if last["epoch"] != settings["epochs"]:
        raise ValueError(f"{args.run}: not finished, epoch {last['epoch']} of {settings['epochs']}")
    if results["backbone"] != checkpoint.digest(tensors):
        raise ValueError(f"--linear {args.linear}: the evaluation of another backbone")
    if any(settings.get(key) != evaluation.get(key) for key in ("dataset", "test_size", "validation")):
        raise ValueError(f"--linear {args.linear}: not on the test images of {args.run}")
    return {"knn1": last["knn1"], "knn200": last["knn200"], "linear": results["test_top1"]}


def check(args):
    """Measure released weights and compare with their .json. Returns the exit code."""
    path = os.path.join(args.weights, args.name)
    about = checkpoint.read_json(f"{path}.json", "accuracies", "linear_evaluation", "recipe")
    backbone = torch.hub.load(HERE, args.name, source="local", folder=args.weights)
    classifier, published = checkpoint.load(f"{path}-linear.pt"), about["accuracies"]
    measured, device = measure(backbone, classifier, about["linear_evaluation"], about["recipe"], args)
    cli.say(f"{args.name}: {device}")
    for name, value in measured.items():
        cli.say(f"{name:7} published {published[name]:6.2f} %  measured {value:6.2f} %")
    differences = [abs(value - published[name]) for name, value in measured.items()]
    return int(max(differences) > TOLERANCE + 1e-9)


def measure(backbone, classifier, linear, recipe, args):
    """kNN and linear accuracies of a released backbone in percent, and the device and precision."""
    device = devices.select_device(args.gpu)
    precision = devices.select_precision(args.precision, device)
    autocast = devices.autocast(device, precision)
    dataset = data.load_dataset(recipe["dataset"], args.data_root, device, **data.options_in(recipe))
    backbone.to(device, memory_format=torch.channels_last)
    metrics = knn.monitor(backbone, dataset, autocast)
    mean, std = linear["mean"], linear["std"]
    features = knn.extract_features(backbone, dataset.test_images, autocast, mean, std)
    logits = features.cpu() @ classifier["weight"].T + classifier["bias"]
    metrics["linear"] = knn.top_k(logits, dataset.test_labels.cpu(), 1)
    accuracies = {name: metrics[name] for name in ("knn1", "knn200", "linear")}
    return accuracies, f"{devices.describe(device)}, {precision}"


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        return {"features": export_features, "release": release, "check": check}[args.command](args)


if __name__ == "__main__":
    cli.run_script(main)
