"""What comes after training: features for other tools, a backbone for other programs, weights for other people.

    python export.py features --pretrained experiments/1/backbone.pt --output features.npz data
    python export.py features --pretrained experiments/1/backbone.pt --output features.npz --images FOLDER
    python export.py backbone --pretrained experiments/1/backbone.pt --format export --output backbone.pt2
    python export.py release experiments/1 --linear experiments/2 --name simsiam_resnet18_cifar10
    python export.py check simsiam_resnet18_w16_cifar10

features: an .npz with the features, float32, and labels of a data set, or of a folder of pictures. backbone: a
state dict or a torch.export archive, read back and compared. release: weights/NAME.pt in fp16 with a .json
of what they are, measured before and after the rounding, and the classifier; torch.hub loads them (hubconf.py). check: whether
they have the accuracies that they are said to have.
"""
import datetime
import io
import os

from utils.cpu import prepare_cpu  # before torch

import numpy
import torch

import hubconf
from simsiam import ARCHS, is_plain, load_backbone
from utils import checkpoint, log
from utils.augment import MEAN, SIZE, STD
from utils.cli import Parser, add_normalization, complain, real_number, run, warn, whole_number
from utils.data import DATASETS, load_dataset, load_folder
from utils.device import autocast, describe, select_device, select_precision
from utils.features import extract_features
from utils.knn import knn_accuracy
from utils.metrics import top_k
from utils.run import BACKBONE, CONFIG, RESULTS, read_config

LARGEST = 23_000_000  # bytes of a released file
MOVED = 0.05          # percentage points that fp16 may move an accuracy by without a warning
HERE = os.path.dirname(os.path.abspath(__file__))


def make_parser():
    parser = Parser(prog="export.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="features|backbone|release|check")

    features = commands.add_parser("features", help="features and labels to .npz", description="Features and labels to .npz.")
    add_source(features)
    features.add_argument("data_root", nargs="?", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    features.add_argument("--dataset", choices=DATASETS, default="cifar10", help="shapes is built in and needs no files")
    features.add_argument("--train_size", type=whole_number(1), metavar="N", help="the first N training pictures only (default: all)")
    features.add_argument("--test_size", type=whole_number(1), metavar="N", help="the first N test pictures only (default: all)")
    features.add_argument("--images", metavar="FOLDER", help="pictures instead of a data set, in subfolders by class or without")
    features.add_argument("--size", type=whole_number(8), default=SIZE, metavar="PIXELS", help="height and width that --images get")
    add_normalization(features, MEAN, STD)
    add_device(features)

    backbone = commands.add_parser("backbone", help="the backbone as a file for other programs", description="The backbone as a file for other programs.")
    add_source(backbone)
    backbone.add_argument("--format", choices=("state_dict", "export"), default="state_dict", help="export: an archive of torch.export, which needs no code of this project")
    backbone.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of a state dict")

    release = commands.add_parser("release", help="weights/NAME.pt and .json", description="Weights for other people, in fp16, with a .json of what they are.")
    release.add_argument("run", metavar="RUN", help="folder of a finished run of main.py")
    release.add_argument("--linear", metavar="FOLDER", help="folder of its linear evaluation")
    release.add_argument("--name", required=True, help="of the files")
    release.add_argument("--weights", default="weights", metavar="DIR", help="where they go")
    release.add_argument("--data_root", metavar="DIR", help="folder with the data (default: the run's)")
    add_device(release)

    check = commands.add_parser("check", help="whether released weights have the accuracies of their .json", description="Measure released weights, loaded by torch.hub, and compare with their .json.")
    check.add_argument("name", metavar="NAME", help="of the files")
    check.add_argument("--data_root", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    check.add_argument("--weights", default="weights", metavar="DIR", help="where they are")
    check.add_argument("--within", type=real_number, default=MOVED, metavar="POINTS", help="percentage points that an accuracy may differ by; another device or precision may take more")
    check.add_argument("--evaluation", metavar="FOLDER", help="of main_lincls.py with --evaluate on these weights and their classifier: to be compared too")
    add_device(check)
    return parser


def add_source(parser):
    parser.add_argument("--pretrained", required=True, metavar="CHECKPOINT", help="backbone.pt or checkpoint.pt of a run of main.py, or a checkpoint of other code")
    parser.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    parser.add_argument("--output", required=True, metavar="FILE", help="a new file")


def add_device(parser):
    parser.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the backbone's arithmetic")


def refuse_existing(*paths):
    for path in paths:
        if os.path.lexists(path):
            raise ValueError(f"{path} exists; take another name or remove it")


def read_backbone(args):
    return load_backbone(checkpoint.load(args.pretrained), args.arch, name=args.pretrained)


# ---------------------------------------------------------------------------------------------------
# Features


def export_features(args):
    refuse_existing(args.output)
    backbone, device, _, precision_context = on_device(args, read_backbone(args))
    if args.images is not None:
        images, labels, classes, files = load_folder(args.images, args.size)
        splits, more = {"": (images, labels)}, {"files": files}
    else:
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        splits = {"train_": (data.train_images, data.train_labels), "test_": (data.test_images, data.test_labels)}
        classes, more = data.classes, {}
    arrays = {"classes": numpy.array(classes, dtype=str), **{name: numpy.array(values, dtype=str) for name, values in more.items()}}
    for prefix, (images, labels) in splits.items():
        arrays[f"{prefix}features"] = extract_features(backbone, images, precision_context, args.mean, args.std).cpu().numpy()
        arrays[f"{prefix}labels"] = labels.cpu().numpy()
    content = io.BytesIO()
    numpy.savez(content, **arrays)
    checkpoint.write(args.output, content.getbuffer())
    print(f"{args.output}: {', '.join(f'{name} {list(array.shape)}' for name, array in arrays.items())}")


def on_device(args, backbone):
    device = select_device(args.gpu)
    if device.type == "cpu":
        prepare_cpu()
    precision = select_precision(args.precision, device)
    return backbone.to(device, memory_format=torch.channels_last), device, precision, autocast(device, precision)


# ---------------------------------------------------------------------------------------------------
# The backbone for other programs


def export_backbone(args):
    refuse_existing(args.output)
    backbone = read_backbone(args).requires_grad_(False)
    pictures = torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    expected = backbone(pictures)
    if args.format == "export":
        if args.dtype != "fp32":
            raise ValueError(f"--dtype {args.dtype} is for --format state_dict; an archive of torch.export is float32")
        program = torch.export.export(backbone, (pictures,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        content = io.BytesIO()
        torch.export.save(program, content)
        read_back = torch.export.load(io.BytesIO(content.getvalue())).module()
        allowed = 1e-5
    else:
        if not is_plain(backbone):
            raise ValueError(f"{args.pretrained}: its stem is another one than here, which a state dict does not show; take --format export")
        content = io.BytesIO(checkpoint.with_digest(rounded(backbone) if args.dtype == "fp16" else backbone.state_dict()))
        read_back = load_backbone(torch.load(content, weights_only=True), args.arch, verbose=False)
        allowed = 1e-5 if args.dtype == "fp32" else 1e-2
    difference = ((read_back(pictures) - expected).abs().max() / expected.abs().max()).item()
    if difference > allowed:
        raise RuntimeError(f"read back, its features differ by {difference:.1g} of the largest; nothing is written")
    checkpoint.write(args.output, content.getbuffer())
    print(f"{args.output}: {args.format}, {len(content.getbuffer()):,} bytes; read back, features differ by {difference:.1g} of the largest at most")


def rounded(backbone):
    """The state dict in fp16, contiguous, on the CPU. Raises ValueError for what is too large for it."""
    tensors = {
        name: (value.half() if value.is_floating_point() else value).cpu().contiguous() for name, value in backbone.state_dict().items()
    }
    beyond = [name for name, value in tensors.items() if not value.isfinite().all()]
    if beyond:
        raise ValueError(f"{beyond[0]} has numbers too large for fp16 (65,504)")
    return tensors


# ---------------------------------------------------------------------------------------------------
# Weights for other people


def release(args):
    """Write weights/NAME.pt and weights/NAME.json, with the accuracies in float32 and after the rounding to fp16, and
    weights/NAME-linear.pt, the classifier, where there is one. What is there already has to be of the same weights."""
    if os.path.basename(args.name) != args.name or args.name.startswith("."):
        raise ValueError(f"--name {args.name!r}: a plain name is needed, without slashes")
    path, about, classifier_path = (os.path.join(args.weights, f"{args.name}{ending}") for ending in (".pt", ".json", "-linear.pt"))
    config, last = read_config(args.run), log.read(args.run)[-1]
    settings = config["settings"]
    if last["epoch"] != settings["epochs"]:
        raise ValueError(f"{args.run}: not finished, epoch {last['epoch']} of {settings['epochs']}")
    backbone = load_backbone(checkpoint.load(os.path.join(args.run, BACKBONE)), settings["arch"], verbose=False)
    if hasattr(hubconf, args.name):
        with torch.device("meta"):
            expected = getattr(hubconf, args.name)(pretrained=False).feature_dim
        if settings["arch"] != "resnet18" or backbone.feature_dim != expected:
            raise ValueError(f"--name {args.name}: torch.hub's name of a ResNet-18 with {expected} features; this is a {settings['arch']} with {backbone.feature_dim}")
    classifier, linear = read_linear(args.linear, backbone, settings)
    content = checkpoint.with_digest(rounded(backbone))
    if len(content) > LARGEST:
        raise ValueError(f"{path}: {len(content):,} bytes, more than {LARGEST:,}")
    files = {path: content}
    if classifier is not None:
        files[classifier_path] = checkpoint.with_digest({name: value.contiguous() for name, value in classifier.items()})
    refuse_others(files)
    if os.path.lexists(about):
        if not set(files) == {file for file in (path, classifier_path) if os.path.exists(file)} or log.read_json(about).get("sha256") != checkpoint.sha256(content):
            raise ValueError(f"{about} exists and is of another release; take another name, or remove the files of that name")
        print(f"{path}: released before")
        return 0
    small = load_backbone(torch.load(io.BytesIO(content), weights_only=True), settings["arch"], verbose=False)

    backbone, device, precision, precision_context = on_device(args, backbone)
    small = small.to(device, memory_format=torch.channels_last)
    data = load_dataset(settings["dataset"], args.data_root or settings["data_root"], device, settings["train_size"], settings["test_size"])
    float32, fp16 = (accuracies(one, classifier, linear, data, precision_context) for one in (backbone, small))
    for name, value in fp16.items():
        if abs(value - float32[name]) > MOVED:
            warn(f"{name}: {float32[name]:.2f} % in float32, {value:.2f} % after the rounding to fp16")

    os.makedirs(args.weights, exist_ok=True)
    for file, file_content in files.items():
        checkpoint.write(file, file_content)
    log.write_json(about, {  # last: with it they are released
        "file": os.path.basename(path), "sha256": checkpoint.sha256(content), "bytes": len(content), "dtype": "fp16",
        "arch": settings["arch"], "width": settings["width"], "feature_dim": backbone.feature_dim, "mean": MEAN, "std": STD,
        "test_pictures": len(data.test_images), "accuracies": fp16, "accuracies_float32": float32, "linear_evaluation": linear,
        "classifier": None if classifier is None else {"file": os.path.basename(classifier_path), "sha256": checkpoint.sha256(files[classifier_path])},
        "measured_with": {"device": describe(device), "precision": precision},
        "recipe": {name: value for name, value in settings.items() if name not in ("data_root", "exp_dir", "resume", "trial", "gpu", "max_minutes")},
        "commit": config["commit"], "device": config["device"], "versions": config["versions"], "date": datetime.date.today().isoformat(),
    })
    print(f"{path}: {len(content):,} bytes; {', '.join(f'{name} {value:.2f} % (float32 {float32[name]:.2f})' for name, value in fp16.items())}")
    return 0


def refuse_others(files):
    """Raises ValueError if there is a file of another content at one of these paths."""
    for path, content in files.items():
        if os.path.lexists(path):
            with open(path, "rb") as file:
                if file.read() != content:
                    raise ValueError(f"{path} exists and has other weights; take another name, or remove the files of that name")


def read_linear(folder, backbone, run):
    """The first classifier of a linear evaluation of this very backbone on the data of its run, and the evaluation's results
    and protocol; None and None without one."""
    if folder is None:
        return None, None
    results, settings = log.read_json(os.path.join(folder, RESULTS)), log.read_json(os.path.join(folder, CONFIG))["settings"]
    if results["backbone"] != checkpoint.tensors_digest(backbone.state_dict()):
        raise ValueError(f"--linear {folder}: an evaluation of another backbone ({settings['pretrained']})")
    for name in ("dataset", "test_size"):
        if settings[name] != run[name]:
            raise ValueError(f"--linear {folder}: its {name} is {settings[name]}, the run's {run[name]}")
    name = "classifier.pt" if len(results["seeds"]) == 1 else f"classifier-seed{results['seeds'][0]}.pt"
    protocol = ("dataset", "features", "epochs", "optimizer", "schedule", "batch_size", "lr", "momentum", "weight_decay", "crop_scale", "fraction", "train_size", "mean", "std")
    kept = ("test_top1", "test_top1_std", log.OF_SEEDS, "test_top5", "best_top1", "best_epoch", "seeds")
    return checkpoint.load(os.path.join(folder, name)), {
        **{key: results[key] for key in kept if key in results}, **{key: settings[key] for key in protocol},
    }


def accuracies(backbone, classifier, linear, data, precision_context):
    """kNN accuracies, and with a classifier its top-1 under the seed that it has in its evaluation, in percent."""
    figures = dict(zip(("knn1", "knn200"), knn_accuracy(backbone, data, precision_context)))
    if classifier is not None:
        features = extract_features(backbone, data.test_images, precision_context, linear["mean"], linear["std"])
        logits = torch.nn.functional.linear(features, classifier["weight"].to(features.device), classifier["bias"].to(features.device))
        figures[f"linear_seed{linear['seeds'][0]}"] = top_k(logits, data.test_labels, 1)
    return figures


# ---------------------------------------------------------------------------------------------------
# Whether they are what they are said to be


def check(args):
    """Measure released weights, as torch.hub loads them, and compare with what their .json says. Returns the exit code."""
    path, about = (os.path.join(args.weights, f"{args.name}.{ending}") for ending in ("pt", "json"))
    said = log.read_json(about)
    if not (isinstance(said, dict) and {"sha256", "accuracies", "linear_evaluation", "recipe"} <= said.keys()):
        raise ValueError(f"{about}: not what a release wrote")
    with open(path, "rb") as file:
        check_sha256(path, file.read(), said["sha256"])
    if hasattr(hubconf, args.name):
        backbone, way = torch.hub.load(HERE, args.name, source="local", pretrained=True, folder=args.weights), "torch.hub"
    else:
        backbone, way = load_backbone(path, said["arch"], verbose=False), "load_backbone"
    classifier, linear = None, said["linear_evaluation"]
    if said.get("classifier") is not None:
        classifier_path = os.path.join(args.weights, said["classifier"]["file"])
        with open(classifier_path, "rb") as file:
            check_sha256(classifier_path, file.read(), said["classifier"]["sha256"])
        classifier = checkpoint.load(classifier_path)
    recipe = said["recipe"]
    backbone, device, precision, precision_context = on_device(args, backbone)
    data = load_dataset(recipe["dataset"], args.data_root, device, recipe["train_size"], recipe["test_size"])
    measured = accuracies(backbone, classifier, linear, data, precision_context)
    rows = [(name, said["accuracies"][name], value) for name, value in measured.items()]
    if args.evaluation is not None:
        results = log.read_json(os.path.join(args.evaluation, RESULTS))
        name = f"linear_seed{linear['seeds'][0]}"
        if results["backbone"] != checkpoint.tensors_digest(backbone.state_dict()):
            raise ValueError(f"--evaluation {args.evaluation}: of another backbone")
        rows.append((f"{name}, main_lincls.py", said["accuracies"][name], results["test_top1"]))
    print(f"{path}, by {way}, {describe(device)}, {precision}, {len(data.test_images):,} test pictures")
    for name, value, found in rows:
        print(f"{name:28}  said {value:6.2f} %  measured {found:6.2f} %")
    worst = max(abs(found - value) for _, value, found in rows)
    if worst > args.within + 1e-9:
        complain(f"export.py: error: {path}: {worst:.2f} points from what it is said to have")
        return 1
    return 0


def check_sha256(path, content, said):
    if checkpoint.sha256(content) != said:
        raise ValueError(f"{path}: its SHA-256 is {checkpoint.sha256(content)}, the released file's {said}")


COMMANDS = {"features": export_features, "backbone": export_backbone, "release": release, "check": check}


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        return COMMANDS[args.command](args) or 0


if __name__ == "__main__":
    run(main)
