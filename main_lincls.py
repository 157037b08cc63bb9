"""Linear evaluation of a pre-trained backbone: frozen features, one linear classifier.

    python main_lincls.py --arch resnet18 --num_cls 10 --batch_size 256 --lr 30.0 \\
        --weight_decay 0.0 --pretrained CHECKPOINT DIR
    python main_lincls.py --features cached --pretrained experiments/1/backbone.pt data

CHECKPOINT: backbone.pt or checkpoint.pt of main.py, or a checkpoint of other SimSiam code for CIFAR.
The first command is MoCo's protocol: SGD at a rate of 30 on random crops and flips; the result is
the last epoch's top-1 accuracy on all test images. --features cached fits the L2-regularized softmax
regression with L-BFGS to features without augmentation: half a minute at width 16.
"""
import argparse
import math
import os
import statistics
import sys
import time
from typing import NamedTuple

from utils import augment, checkpoint, cli, device as devices, knn, report, run as runs
from utils.data import DATASETS, Dataset, balanced_subset, load_dataset, options_in, take
import torch  # after utils, which sets OpenMP up
import torch.nn.functional as F

import simsiam

LR_PER_256 = 30.0           # learning rate for a batch of 256; it scales linearly
MILESTONES = (0.6, 0.8)     # shares of the epochs after which it is divided by 10
CROP_SCALE = (0.08, 1.0)    # torchvision's default for RandomResizedCrop
LBFGS_WEIGHT_DECAY = 1e-4   # without any, L-BFGS does not converge


def make_parser():
    parser = cli.Parser(prog="main_lincls.py", description=__doc__)
    add = cli.add_data_options(parser, DATASETS).add_argument
    add("--num_cls", type=cli.whole_number(2), help="classes (default: the data set's)")
    add("--fraction", type=cli.fraction, default=1.0, help="share of the labels, drawn by --seed")
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--pretrained", type=cli.file_path, metavar="CHECKPOINT", help="required")
    backbone.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    cli.add_normalization(backbone, augment.MEAN, augment.STD)
    add = parser.add_argument_group("classifier", "SGD only: --epochs to --momentum.").add_argument
    add("--features", choices=("augmented", "cached"), default="augmented", help="SGD or L-BFGS")
    add("--weight_decay", type=cli.real_number, help="default: 0 for SGD, 1e-4 for L-BFGS")
    add("--seed", type=cli.whole_number(0), default=0, help="random seed")
    add("--evaluate", type=cli.file_path, metavar="CLASSIFIER", help="only test this classifier.pt")
    add("--epochs", type=cli.whole_number(1), default=100, help="number of epochs")
    add("--batch_size", type=cli.whole_number(1), default=256, help="images per step")
    add("--lr", type=cli.real_number, help="learning rate (default: 30 * batch_size / 256)")
    add("--momentum", type=cli.real_number, default=0.9, help="momentum of SGD")
    cli.add_device_options(parser)
    cli.add_run_options(parser)
    return parser


class Setup(NamedTuple):
    """What is trained, how, and on what; all training images have labels."""
    args: argparse.Namespace
    device: torch.device
    data: Dataset
    backbone: torch.nn.Module
    classifier: torch.nn.Linear
    optimizer: torch.optim.SGD  # for --features augmented


def prepare(args):
    """Complete and check the settings, and make what they say."""
    if args.pretrained is None:
        raise ValueError("--pretrained CHECKPOINT is required: the backbone to evaluate")
    device = devices.select_device(args.gpu)
    args.precision = devices.select_precision(args.precision, device)
    backbone = simsiam.load_backbone(args.pretrained, args.arch, verbose=cli.info)
    args.backbone = checkpoint.digest(backbone.state_dict())
    options = options_in(vars(args), runs.inherited_options(args.pretrained))
    data = load_dataset(args.dataset, args.data_root, device, unlabeled=False, **options)
    if not data.has_classes:
        raise ValueError(f"--dataset {args.dataset}: no labels of several classes, or no test images")
    args.image_size, classes = data.train_images.shape[2], len(data.classes)
    if args.num_cls not in (None, classes):
        raise ValueError(f"--num_cls {args.num_cls}: {args.dataset} has {classes} classes")
    args.num_cls = classes
    if args.lr is None:
        args.lr = LR_PER_256 * args.batch_size / 256
    if args.weight_decay is None:
        args.weight_decay = LBFGS_WEIGHT_DECAY if args.features == "cached" else 0.0
    if args.features == "cached" and args.weight_decay == 0:
        raise ValueError("--weight_decay 0: without a penalty L-BFGS does not converge")
    if args.fraction < 1:
        rows = balanced_subset(data.train_labels, args.fraction, args.seed)
        images = data.train_images[rows.to(data.train_images.device)]
        data = data._replace(train_images=images, train_labels=data.train_labels[rows.to(device)])
    classifier = make_classifier(args, backbone.feature_dim).to(device)
    optimizer = devices.sgd([[*classifier.parameters()]], args.lr, args.momentum, args.weight_decay)
    backbone = backbone.requires_grad_(False).to(device, memory_format=torch.channels_last)
    return Setup(args, device, data, devices.with_fast_convolutions(backbone), classifier, optimizer)


def make_classifier(args, feature_dim):
    """The classifier, new or of --evaluate."""
    torch.manual_seed(args.seed)
    classifier = torch.nn.Linear(feature_dim, args.num_cls)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    if args.evaluate is None:
        return classifier
    try:
        classifier.load_state_dict(simsiam.read_file(args.evaluate))
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{args.evaluate} is no classifier of these features: {reason}") from error
    results = os.path.join(os.path.dirname(args.evaluate), runs.RESULTS)
    if os.path.exists(results) and checkpoint.read_json(results).get("backbone") != args.backbone:
        cli.warn(f"{args.evaluate} was trained on other features than those of {args.pretrained}")
    return classifier


def train_sgd(setup, run, position, test_features, stop):
    """--features augmented, MoCo's protocol: train the classifier from `position` to the last epoch.
    Raises Stopped if a stop is requested: a resumed run repeats the unfinished epoch."""
    args, device, data, backbone, classifier, optimizer = setup
    autocast, size = devices.autocast(device, args.precision), len(data.train_images)

    def features_of(images, draws):  # uint8 [B, 3, H, W] and their Draws -> float32 [B, feature_dim]
        views = augment.crop_flip(images, draws, args.image_size)
        views = augment.normalize(views, args.mean, args.std)
        with torch.no_grad(), autocast():
            return backbone(views.contiguous(memory_format=torch.channels_last)).float()

    batch = min(args.batch_size, size)
    features_of = devices.compile_for(device, features_of, None, args.epochs * math.ceil(size / batch))
    with cli.progress_bar(args.epochs, position.epoch) as progress:
        for epoch in range(position.epoch, args.epochs):
            decays = sum(epoch >= round(milestone * args.epochs) for milestone in MILESTONES)
            optimizer.param_groups[0]["lr"] = args.lr * 0.1 ** decays
            start = time.perf_counter()
            generator = augment.epoch_generator(args.seed, epoch, device)
            order = torch.randperm(size, generator=generator, device=device)
            draws = augment.draw_views(size, generator, *data.train_images.shape[2:], CROP_SCALE)
            padded = F.pad(torch.arange(size, device=device), (0, -size % batch))  # one shape, one compilation
            draws, beside = draws.rows(padded), order[padded].to(data.train_images.device)
            sums = torch.zeros(2, device=device)                # loss and correct predictions
            for first in range(0, size, batch):
                stop.check()
                rows = slice(first, first + batch)
                images = take(data.train_images, beside[rows], device)
                features = features_of(images, draws.rows(rows))
                labels = data.train_labels[order[rows]]
                logits = classifier(features[:len(labels)])     # [B, num_cls]
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                correct = (logits.argmax(dim=1) == labels).sum()
                sums += torch.stack((loss.detach() * len(labels), correct))
                progress.update(len(labels) / size)
            loss, correct = (sums / size).tolist()
            tested = test(classifier, test_features, data.test_labels)
            run.log({"epoch": epoch + 1, "train_loss": loss, "train_top1": 100 * correct, **tested,
                     "lr": optimizer.param_groups[0]["lr"],
                     "seconds": round(time.perf_counter() - start, 3)})
            if not math.isfinite(loss):
                return
            summary = f"loss {loss:.3f}, test top-1 {tested['test_top1']:.2f} %"
            cli.show_epoch(progress, epoch + 1, summary, epoch + 1 == args.epochs)
            run.save(runs.Position(epoch + 1))


def fit_lbfgs(classifier, features, labels, weight_decay, check=lambda: None):
    """--features cached: minimize cross-entropy + weight_decay / 2 * |W|^2 with L-BFGS in float64
    until no entry of the gradient exceeds 1e-6; W are weights and biases on standardized features.
    Returns the cross-entropy and the iterations, in steps of 20; check is called before each step."""
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features = (features - mean) / std
    weight, bias = (torch.zeros_like(each, dtype=torch.float64, requires_grad=True)
                    for each in (classifier.weight, classifier.bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=20, history_size=20, tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    for iterations in cli.bar(range(20, 2001, 20), desc="L-BFGS", leave=False):
        check()
        optimizer.step(objective)
        if max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6:
            break
    else:
        cli.warn(f"L-BFGS has not converged after {iterations} iterations; raise --weight_decay "
                 f"({weight_decay:g})")
    with torch.no_grad():
        loss = F.cross_entropy(F.linear(features, weight, bias), labels).item()
        classifier.weight.copy_(weight / std)  # for features that are not standardized
        classifier.bias.copy_(bias - weight @ (mean / std))
    return loss, iterations


@torch.no_grad()
def test(classifier, features, labels):
    """Test accuracies for the log: top-1, and top-5 for more than 5 classes, in percent."""
    logits = classifier(features)
    return {f"test_top{k}": knn.top_k(logits, labels, k) for k in (1, 5) if k < logits.shape[1]}


def evaluate(setup, run, position, stop):
    """Train and test the classifier on the frozen backbone's features. Returns the exit code."""
    args, device, data, backbone, classifier, _ = setup
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}

    def features_of(images):
        autocast = devices.autocast(device, args.precision)
        return knn.extract_features(backbone, images, autocast, args.mean, args.std, check=stop.check)

    try:
        test_features = features_of(data.test_images)
        if args.evaluate is None and args.features == "cached":
            features, labels = features_of(data.train_images), data.train_labels
            loss, iterations = fit_lbfgs(classifier, features, labels, args.weight_decay, stop.check)
            run.log({"epoch": iterations, "train_loss": loss,
                     "train_top1": test(classifier, features, labels)["test_top1"],
                     **test(classifier, test_features, data.test_labels)})
        elif args.evaluate is None:
            train_sgd(setup, run, position, test_features, stop)
    except cli.Stopped:
        return run.exit_code("main_lincls.py", stop, finished=False)
    finite = [math.isfinite(record["train_loss"]) for record in run.records]
    if not all(finite) or not all(value.isfinite().all() for value in classifier.parameters()):
        return cli.fail("main_lincls.py", "the loss or the weights are not finite; lower --lr")
    for name, value in backbone.state_dict().items():
        assert torch.equal(value, frozen[name]), f"the frozen backbone changed: {name}"
    finish(setup, run, test_features)
    return run.exit_code("main_lincls.py", stop, finished=True)


def finish(setup, run, test_features):
    """Print the result; write results.json, the classifier and the plots."""
    args, data, classifier = setup.args, setup.data, setup.classifier
    results = {"images": len(data.test_images), **test(classifier, test_features, data.test_labels)}
    how, split = "", "test" if args.validation is None else "validation"
    if args.evaluate is None:
        results |= run.records[-1]
        how = "L-BFGS, " if args.features == "cached" else f"epoch {args.epochs}, "
        with run.attempt():
            weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
            checkpoint.save(run.path("classifier.pt"), weights)
    cli.say(f"linear top-1: {results['test_top1']:.2f} % ({how}{results['images']:,} {split} images)")
    if args.evaluate is None and args.features == "augmented":
        best = max(run.records, key=lambda record: record["test_top1"])
        results |= {"best_epoch": best["epoch"], "best_top1": best["test_top1"]}
        cli.say(f"best epoch ({best['epoch']}): {best['test_top1']:.2f} %, selected on the {split} "
                "set: not the result")
    with torch.no_grad():
        predicted = classifier(test_features).argmax(dim=1)
    labels = data.test_labels
    of_classes = dict(zip(data.classes, knn.class_accuracies(predicted, labels, args.num_cls)))
    balanced = statistics.fmean(value for value in of_classes.values() if value is not None)
    if len({*labels.bincount(minlength=args.num_cls).tolist()}) > 1:
        cli.say(f"balanced accuracy, the mean over classes: {balanced:.2f} %")
    results |= {"backbone": args.backbone, "balanced_accuracy": balanced, "class_top1": of_classes}
    if args.num_cls <= knn.CONFUSION_CLASSES:
        results["confusion"] = knn.confusion_matrix(predicted, labels, args.num_cls).tolist()
    if run.unsaved is None:
        with run.attempt():
            checkpoint.write_json(run.path(runs.RESULTS), results)  # now the evaluation is finished


def main(argv=None):
    began, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    advice = "lower --batch_size" if args.features == "augmented" else "lower --train_size or --fraction"
    with cli.memory_errors("main_lincls.py", advice):
        with parser.user_errors():
            found = runs.find(args.exp_dir, args.trial, args.resume, runs.EVALUATION)
            if found[1] is not None:
                args = runs.resumed_args(parser, argv, found[1]["config"])
            setup, command = prepare(args), ["main_lincls.py", *argv]
            parts = {"classifier": setup.classifier, "optimizer": setup.optimizer}
            run, position = runs.open_run(found, command, vars(args), setup.device, parts, began)
        with run, cli.StopRequest(args.max_minutes, began) as stop:
            if found[1] is not None and os.path.exists(run.path(runs.RESULTS)):
                cli.say(f"{run.folder}: already finished, see {runs.RESULTS}")
                return 0
            cli.info(f"{run.folder}: {args.dataset}, {len(setup.data.train_images)} images of {args.image_size} "
                     f"pixels, {devices.describe(setup.device)}, {args.precision}")
            code = evaluate(setup, run, position, stop)
            with run.optional("plots"):
                report.draw_run(run.folder)
            return code


if __name__ == "__main__":
    cli.run_script(main)
