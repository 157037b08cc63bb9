"""Features for other tools, weights to publish, and predictions of a fine-tuned network.

    python export.py features --pretrained experiments/1/backbone.pt --output features.npz data
    python export.py release experiments/1 --linear experiments/2 --name simsiam_resnet18_cifar10
    python export.py check simsiam_resnet18_w16_cifar10
    python export.py predict --model experiments/2/model.pt --images DIR --output predictions.csv
"""
import csv
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
from utils.images import load_images

HUB = [name for name in vars(hubconf) if name.startswith("simsiam_")]


def make_parser():
    path, parser = {"type": cli.file_path, "metavar": "PATH"}, cli.Parser(prog="export.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    features = commands.add_parser("features", help="float32 features and labels, to .npz")
    release = commands.add_parser("release", help="weights/NAME.pt in fp16, classifier, NAME.json")
    check = commands.add_parser("check", help="measure the accuracies in NAME.json again")
    predict = commands.add_parser("predict", help="classes of images by model.pt, to .csv")
    predict.add_argument("--model", **path, required=True, help="of main_lincls.py --weights finetune")
    predict.add_argument("--images", **path, required=True, help="folder of images, or one file")
    predict.add_argument("--output", **path, required=True, help="new .csv file")
    predict.add_argument("--skip_broken", action="store_true", help="skip images that cannot be read")
    features.add_argument("--pretrained", **path, required=True, help="checkpoint of the backbone")
    features.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    features.add_argument("--output", **path, required=True, help="new .npz file")
    cli.add_data_options(features, data.DATASETS)
    features.add_argument("--images", **path, help="folder of images, in class folders or not")
    cli.add_normalization(features, augment.MEAN, augment.STD)
    release.add_argument("run", **path, help="folder of a finished run of main.py")
    release.add_argument("--linear", **path, required=True, help="folder of its linear evaluation")
    release.add_argument("--name", required=True, choices=HUB, metavar="NAME", help="torch.hub entry")
    check.add_argument("name", choices=HUB, metavar="NAME", help="torch.hub entry")
    for command in (release, check):
        command.add_argument("--weights", **path, default="weights", help="folder of weights")
        command.add_argument("--data_root", **path, default="data", help="folder of the data")
    for command in (features, release, check, predict):
        cli.add_device_options(command)
        command.set_defaults(precision="fp32")  # comparable on any device
    return parser


def export_features(args, autocast):
    """Features and labels of the splits of a data set, or of the images of a folder, as .npz."""
    backbone = simsiam.load_backbone(args.pretrained, args.arch, verbose=cli.say).to(args.device)
    options = data.options_in(vars(args), run.inherited_options(args.pretrained))
    if args.images is not None:
        size = options["image_size"] or augment.SIZE
        images, files, labels, classes = load_images(args.images, size, args.skip_broken)
        splits, arrays = {"": (images, labels)}, {"files": numpy.array(files, dtype=str)}
    else:
        *pairs, classes = data.load_dataset(args.dataset, args.data_root, args.device, **options)
        splits, arrays = {"train_": pairs[:2], "test_": pairs[2:]}, {}  # images and labels of each
    for prefix, (images, labels) in splits.items():
        if len(images) > 0:
            features = knn.extract_features(backbone, images, autocast, args.mean, args.std)
            arrays[f"{prefix}features"] = features.cpu().numpy()
            arrays[f"{prefix}labels"] = labels.cpu().numpy()
    content = io.BytesIO()
    numpy.savez(content, classes=numpy.array(classes, dtype=str), **arrays)
    checkpoint.write(args.output, content.getbuffer())
    cli.say(f"{args.output}: {', '.join(f'{name} {[*array.shape]}' for name, array in arrays.items())}")


def predict(args, autocast):
    """The class of each image, and its probability, by a fine-tuned network, as CSV."""
    model = simsiam.load_model(args.model).to(args.device)
    images, files, *_ = load_images(args.images, model.about["data"]["image_size"], args.skip_broken)
    features = knn.extract_features(model[0], images, autocast, model.about["mean"], model.about["std"])
    with torch.no_grad():
        probabilities, predicted = model[1](features).softmax(dim=1).max(dim=1)
    names = [model.about["classes"][number] for number in predicted.tolist()]
    content = io.StringIO()
    table = csv.writer(content, lineterminator="\n")
    table.writerow(("file", "class", "probability"))
    table.writerows(zip(files, names, (f"{value:.4f}" for value in probabilities.tolist())))
    checkpoint.write(args.output, content.getvalue().encode(errors="surrogateescape"))
    cli.say(f"{args.output}: {len(files):,} images")


def release(args, autocast):
    """Round the backbone of a finished run to fp16, measure it, write it with its classifier."""
    config = run.read_config(args.run)
    results = checkpoint.read_json(f"{args.linear}/{run.RESULTS}", "backbone", "test_top1")
    recipe, linear = config["settings"], run.read_config(args.linear)["settings"]
    tensors, last = checkpoint.load(os.path.join(args.run, run.BACKBONE)), log.read(args.run)[-1]
    if last["epoch"] != recipe["epochs"]:
        raise ValueError(f"{args.run}: not finished, epoch {last['epoch']} of {recipe['epochs']}")
    if "knn200" not in last:
        raise ValueError(f"{args.run}: no kNN after its last epoch")
    if results["backbone"] != checkpoint.digest(tensors):
        raise ValueError(f"--linear {args.linear}: the evaluation of another backbone")
    if any(recipe.get(key) != linear.get(key) for key in ("dataset", "test_size", "validation")):
        raise ValueError(f"--linear {args.linear}: not on the test images of {args.run}")
    half = {name: each.half() if each.is_floating_point() else each for name, each in tensors.items()}
    content, path = checkpoint.to_bytes(half), os.path.join(args.weights, args.name)
    existing = checkpoint.load(f"{path}.pt") if os.path.lexists(f"{path}.pt") else half
    if checkpoint.digest(existing) != checkpoint.digest(half):
        raise ValueError(f"{path}.pt exists and has other weights")
    backbone = simsiam.load_backbone(half, recipe["arch"], verbose=False)
    entry = getattr(hubconf, args.name)(pretrained=False)
    if recipe["arch"] != "resnet18" or backbone.feature_dim != entry.feature_dim:
        raise ValueError(f"--name {args.name}: another network than that of {args.run}")
    classifier = checkpoint.load(os.path.join(args.linear, "classifier.pt"))
    before = {"knn1": last["knn1"], "knn200": last["knn200"], "linear": results["test_top1"]}
    accuracies = measure(args, autocast, backbone, classifier, linear, recipe)
    for name, value in accuracies.items():
        cli.say(f"{name:7} in fp32 {before[name]:6.2f} %  rounded to fp16 {value:6.2f} %")
    os.makedirs(args.weights, exist_ok=True)
    checkpoint.write(f"{path}.pt", content)
    checkpoint.save(f"{path}-linear.pt", classifier)
    checkpoint.write_json(f"{path}.json", {
        "file": f"{args.name}.pt", "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content),
        "arch": recipe["arch"], "width": recipe["width"], "feature_dim": backbone.feature_dim,
        "mean": augment.MEAN, "std": augment.STD, "accuracies": accuracies, "measured_with": measured_with(args),
        "accuracies_before_rounding": before, "linear_evaluation": linear, "recipe": recipe,
        "date": datetime.date.today().isoformat(), "commit": config["commit"],
        "device": config["device"], "versions": config["versions"]})


def check(args, autocast):
    """Measure released weights again. Returns 1 if an accuracy is off by more than 0.05 points, else 0."""
    path = os.path.join(args.weights, args.name)
    about = checkpoint.read_json(f"{path}.json", "accuracies", "linear_evaluation", "recipe")
    backbone = getattr(hubconf, args.name)(folder=args.weights)
    classifier, published = checkpoint.load(f"{path}-linear.pt"), about["accuracies"]
    measured = measure(args, autocast, backbone, classifier, about["linear_evaluation"], about["recipe"])
    for name, value in measured.items():
        cli.say(f"{name:7} published {published[name]:6.2f} %  measured {value:6.2f} %, {measured_with(args)}")
    return int(any(abs(measured[name] - published[name]) > 0.05 + 1e-9 for name in measured))


def measured_with(args):
    """Device and precision in words."""
    return f"{devices.describe(args.device)}, {args.precision}"


def measure(args, autocast, backbone, classifier, linear, recipe):
    """kNN and linear accuracies of a released backbone in percent."""
    dataset = data.load_dataset(recipe["dataset"], args.data_root, args.device, **data.options_in(recipe))
    backbone.to(args.device, memory_format=torch.channels_last)
    metrics, images = knn.monitor(backbone, dataset, autocast), dataset.test_images
    features = knn.extract_features(backbone, images, autocast, linear["mean"], linear["std"])
    logits = features.cpu() @ classifier["weight"].T + classifier["bias"]
    linear = knn.top_k(logits, dataset.test_labels.cpu(), 1)
    return {"knn1": metrics["knn1"], "knn200": metrics["knn200"], "linear": linear}


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    full = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # fp32 is the same on any device
    with full, parser.user_errors(), cli.memory_errors("export.py", "use fewer or smaller images"):
        if os.path.lexists(getattr(args, "output", "")):
            raise ValueError(f"{args.output} exists")
        args.device = devices.select_device(args.gpu)
        args.precision = devices.select_precision(args.precision, args.device)
        autocast = devices.autocast(args.device, args.precision)
        commands = {"features": export_features, "release": release, "check": check, "predict": predict}
        return commands[args.command](args, autocast)


if __name__ == "__main__":
    cli.run_script(main)
