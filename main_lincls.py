"""Linear evaluation of a pre-trained backbone: frozen features, one linear classifier.

    python main_lincls.py --arch resnet18 --num_cls 10 --batch_size 256 --lr 30.0 --weight_decay 0.0 \\
        --pretrained CHECKPOINT DIR
    python main_lincls.py --features cached --pretrained experiments/1/backbone.pt data

CHECKPOINT: backbone.pt or checkpoint.pt of main.py, or a checkpoint of other SimSiam code for CIFAR. The first command
is the paper's protocol: SGD on random crops and flips; the result is the top-1 accuracy of the last epoch on all test
images. --features cached computes the features once, without augmentation, and fits the L2-regularized softmax
regression by L-BFGS until it converges: no learning rate to choose, and a minute on a CPU at width 16.
"""
import contextlib
import math
import os
import shlex
import statistics
import sys
import time

import utils  # noqa: F401 (before torch)
import torch
import torch.nn.functional as F

import simsiam
from utils import checkpoint
from utils.augment import MEAN, STD, crop_flip, draw_views, epoch_generator, normalize
from utils.cli import (
    Parser, Progress, Stopped, StopRequest, add_data_options, add_device_options, add_normalization, add_run_options,
    bar, data_options, fail, file_path, fraction, info, real_number, run_script, say, warn, whole_number,
)
from utils.data import DATASETS, balanced_subset, load_dataset
from utils.device import autocast, compile_for, describe, select_device, select_precision
from utils.knn import class_accuracies, confusion_matrix, extract_features, top_k
from utils.report import draw_run
from utils.run import EVALUATION, FORMAT, RESULTS, Run, find_run, inherit_data_options, machine, restore, start_run

LR_PER_256 = 30.0           # learning rate for a batch of 256; it scales linearly
MILESTONES = (0.6, 0.8)     # shares of the epochs after which it is divided by 10
LBFGS_WEIGHT_DECAY = 1e-4   # without any, L-BFGS does not converge
MAY_CHANGE = ("data_root", "cache_dir", "pretrained", "exp_dir", "trial", "tensorboard", "compile")  # when resuming


def make_parser():
    parser = Parser(prog="main_lincls.py", description=__doc__)
    data = add_data_options(parser, DATASETS)
    data.add_argument("--num_cls", type=whole_number(2), metavar="N", help="classes (default: the data set's)")
    data.add_argument("--fraction", type=fraction, default=1.0, metavar="F", help="share of the labels, by --seed")
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--pretrained", type=file_path, metavar="CHECKPOINT", help="backbone to evaluate (required)")
    backbone.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    backbone.add_argument("--width", type=whole_number(1), metavar="N", help="default: the checkpoint's")
    add_normalization(backbone, MEAN, STD)
    training = parser.add_argument_group("classifier", "L-BFGS does not use --epochs to --crop_scale.")
    training.add_argument("--features", choices=("augmented", "cached"), default="augmented", help="SGD, or L-BFGS")
    training.add_argument("--weight_decay", type=real_number, metavar="WD", help="default: 0 for SGD, 1e-4 for L-BFGS")
    training.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="random seed")
    training.add_argument("--evaluate", type=file_path, metavar="CLASSIFIER", help="only test this classifier.pt")
    training.add_argument("--epochs", type=whole_number(1), default=100, metavar="N", help="number of epochs")
    training.add_argument("--batch_size", type=whole_number(1), default=256, metavar="N", help="images per step")
    training.add_argument("--lr", type=real_number, metavar="LR", help="learning rate (default: 30 * batch_size / 256)")
    training.add_argument("--momentum", type=real_number, default=0.9, metavar="M", help="momentum of SGD")
    training.add_argument("--crop_scale", type=fraction, default=0.08, metavar="MIN", help="smallest area of a crop")
    add_device_options(parser, compiled=True)
    add_run_options(parser)
    return parser


def train_sgd(args, device, data, backbone, classifier, optimizer, test_features, run, state, stop):
    """--features augmented, the paper's protocol: train the classifier from `state` to the last epoch, with a record in
    run.records for each. Raises Stopped if a stop is requested: a resumed run repeats the unfinished epoch."""
    precision, size = autocast(device, args.precision), len(data.train_images)

    def features(images, draws):  # uint8 [B, 3, H, W] and their Draws -> float32 [B, feature_dim]
        views = normalize(crop_flip(images, draws, args.image_size), args.mean, args.std)
        with torch.no_grad(), precision():
            return backbone(views.contiguous(memory_format=torch.channels_last)).float()

    batch = min(args.batch_size, size)
    features = compile_for(device, features, args.compile, args.epochs * math.ceil(size / batch))
    with Progress(args.epochs, state["epoch"]) as progress:
        for epoch in range(state["epoch"], args.epochs):
            rate = args.lr * 0.1 ** sum(epoch >= round(milestone * args.epochs) for milestone in MILESTONES)
            optimizer.param_groups[0]["lr"] = rate
            start = time.perf_counter()
            generator = epoch_generator(args.seed, epoch, device)
            order = torch.randperm(size, generator=generator, device=device)
            draws = draw_views(size, generator, *data.train_images.shape[2:], scale=(args.crop_scale, 1.0))
            sums = torch.zeros(2, device=device)                       # loss and correct predictions
            for step, rows in enumerate(torch.arange(size, device=device).split(batch), 1):  # none is dropped
                stop.check()
                full = F.pad(rows, (0, batch - len(rows)))                         # one shape, so one compilation
                images = data.train_images[order[full].to(data.train_images.device)].to(device, non_blocking=True)
                labels = data.train_labels[order[rows]]
                logits = classifier(features(images, draws.rows(full))[:len(rows)])    # [B, num_cls]
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                sums += torch.stack((loss.detach() * len(labels), (logits.argmax(dim=1) == labels).sum()))
                progress.advance(epoch + min(step * batch / size, 1))
            loss, correct = (sums / size).tolist()
            run.log({"epoch": epoch + 1, "train_loss": loss, "train_top1": 100 * correct,
                     **test(classifier, test_features, data.test_labels), "lr": rate,
                     "seconds": round(time.perf_counter() - start, 3)})
            if not math.isfinite(loss):
                return
            figures = f"loss {loss:.3f}, test top-1 {run.records[-1]['test_top1']:.2f} %"
            progress.advance(epoch + 1, figures, keep=epoch + 1 == args.epochs)
            run.attempt(run.write, evaluation_files(args, device, run.records, classifier, optimizer), epoch + 1)


def evaluation_files(args, device, records, classifier, optimizer):
    """evaluation.pt, which a resumed evaluation needs."""
    return {EVALUATION: {
        "epoch": len(records), "format": FORMAT, "config": vars(args), "machine": machine(device),
        "backbone": args.backbone, "classifier": classifier.state_dict(), "optimizer": optimizer.state_dict(),
    }}


def fit_lbfgs(classifier, features, labels, weight_decay, check=lambda: None):
    """--features cached: minimize cross-entropy + weight_decay / 2 * |W|^2 by L-BFGS in float64, until no entry of the
    gradient exceeds 1e-6; W are the weights and biases on standardized features. Returns the cross-entropy and the
    number of iterations. check: called every 20 iterations; may raise to end the work."""
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features = (features - mean) / std
    weight, bias = (value.detach().double().zero_().requires_grad_() for value in classifier.parameters())
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=20, history_size=20, tolerance_grad=0, tolerance_change=0,
                                  line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    for iterations in bar(range(20, 2001, 20), desc="L-BFGS", leave=False):
        check()
        optimizer.step(objective)
        if max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6:
            break
    else:
        warn(f"L-BFGS has not converged after {iterations} iterations; raise --weight_decay ({weight_decay:g})")
    with torch.no_grad():
        loss = F.cross_entropy(F.linear(features, weight, bias), labels).item()
        classifier.weight.copy_(weight / std)  # for features that are not standardized
        classifier.bias.copy_(bias - weight @ (mean / std))
    return loss, iterations


@torch.no_grad()
def test(classifier, features, labels):
    """Test accuracies for the log: top-1, and top-5 if there are more than 5 classes, in percent."""
    logits = classifier(features)
    return {f"test_top{k}": top_k(logits, labels, k) for k in (1, 5) if k < logits.shape[1]}


def evaluate(args, device, data, backbone, classifier, optimizer, run, state, stop):
    """Train and test the classifier on the features of the frozen backbone. Returns the exit code."""
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}
    def features_of(images):
        precision = autocast(device, args.precision)
        return extract_features(backbone, images, precision, args.mean, args.std, check=stop.check)
    try:
        test_features, record = features_of(data.test_images), None
        if args.evaluate is not None:
            record = test(classifier, test_features, data.test_labels)
        elif args.features == "cached":
            train_features = features_of(data.train_images)
            loss, iterations = fit_lbfgs(classifier, train_features, data.train_labels, args.weight_decay, stop.check)
            run.log({"epoch": iterations, "train_loss": loss,
                     "train_top1": test(classifier, train_features, data.train_labels)["test_top1"],
                     **test(classifier, test_features, data.test_labels)})
        else:
            train_sgd(args, device, data, backbone, classifier, optimizer, test_features, run, state, stop)
    except Stopped:
        run.draw(draw_run)
        say("Interrupted." if args.evaluate else
            f"Interrupted. Resume with: python main_lincls.py --resume {shlex.quote(run.path(EVALUATION))}")
        return stop.exit_code
    finite = [math.isfinite(record["train_loss"]) for record in run.records]
    if not all(finite + [bool(value.isfinite().all()) for value in classifier.state_dict().values()]):
        return fail("main_lincls.py", "the loss or the weights are not finite; lower --lr")
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, frozen[name])]
    if moved:
        raise AssertionError(f"the frozen backbone moved: {', '.join(moved)}")
    with torch.no_grad():
        predicted = classifier(test_features).argmax(dim=1)
    return report(args, data, classifier, record, confusion_matrix(predicted, data.test_labels, args.num_cls), run)


def report(args, data, classifier, record, confusion, run):
    """Print the result and write results.json, the classifier and the figures. Returns the exit code."""
    record = record or run.records[-1]
    results = {"images": len(data.test_images), **record}
    which = "" if args.evaluate else f"epoch {record['epoch']}, " if args.features == "augmented" else "L-BFGS, "
    split = "test" if args.validation is None else "validation"
    say(f"linear top-1: {record['test_top1']:.2f} % ({which}{len(data.test_images):,} {split} images)")
    if args.evaluate is None:
        if args.features == "augmented":
            best = max(run.records, key=lambda each: each["test_top1"])
            say(f"best epoch ({best['epoch']}): {best['test_top1']:.2f} %, chosen on {split} images: not the result")
            results |= {"best_epoch": best["epoch"], "best_top1": best["test_top1"]}
        weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
        run.attempt(checkpoint.save, run.path("classifier.pt"), weights)
    of_classes = dict(zip(data.classes, class_accuracies(confusion)))
    balanced = statistics.fmean(value for value in of_classes.values() if value is not None)
    if len(set(confusion.sum(dim=1).tolist())) > 1:
        say(f"balanced accuracy, the mean over classes: {balanced:.2f} %")
    results |= {"backbone": args.backbone, "balanced_accuracy": balanced, "class_top1": of_classes,
                "confusion": confusion.tolist()}
    if run.unsaved is None:
        run.attempt(checkpoint.write_json, run.path(RESULTS), results)  # now the evaluation is finished
    run.draw(draw_run)
    return fail("main_lincls.py", run.unsaved) if run.unsaved else 0


def make_classifier(args, backbone, device):
    """The classifier, new or of --evaluate, and its optimizer for --features augmented."""
    torch.manual_seed(args.seed)
    classifier = torch.nn.Linear(backbone.feature_dim, args.num_cls)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    if args.evaluate is not None:
        try:
            simsiam.load_tensors(classifier, simsiam.read_file(args.evaluate))
        except ValueError as error:
            raise ValueError(f"{args.evaluate} is no classifier of these features: {error}") from error
        beside = os.path.join(os.path.dirname(args.evaluate), RESULTS)
        if os.path.exists(beside) and checkpoint.read_json(beside).get("backbone") != args.backbone:
            warn(f"{args.evaluate} was trained on the features of another backbone than {args.pretrained}")
    optimizer = torch.optim.SGD(classifier.to(device).parameters(), args.lr, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    return classifier, optimizer


def set_up(parser, args, argv):
    """Everything that can fail because of the user's input: settings, device, data, backbone, folder, state."""
    if args.resume is not None and args.evaluate is not None:
        raise ValueError("--evaluate trains nothing that could be resumed")
    args, folder, state = find_run(parser, args, argv, EVALUATION, MAY_CHANGE)
    if args.pretrained is None:
        raise ValueError("--pretrained CHECKPOINT is required: the backbone to evaluate")
    device = select_device(args.gpu)
    args.precision = select_precision(args.precision, device)
    backbone = simsiam.load_backbone(args.pretrained, args.arch, args.width, info).requires_grad_(False)
    args.backbone = checkpoint.digest(backbone.state_dict())
    if state is not None and state.get("backbone") != args.backbone:
        raise ValueError(f"--pretrained {args.pretrained}: not the backbone that {folder} evaluates")
    inherit_data_options(args, args.pretrained)
    data = load_dataset(args.dataset, args.data_root, device, **data_options(vars(args)), unlabeled=False)
    if not data.has_classes:
        raise ValueError(f"--dataset {args.dataset}: no labels of several classes to evaluate with")
    args.image_size = data.train_images.shape[2]
    args.num_cls = args.num_cls or len(data.classes)
    if args.num_cls != len(data.classes):
        raise ValueError(f"--num_cls {args.num_cls}: {args.dataset} has {len(data.classes)} classes")
    args.lr = LR_PER_256 * args.batch_size / 256 if args.lr is None else args.lr
    if args.weight_decay is None:
        args.weight_decay = LBFGS_WEIGHT_DECAY if args.features == "cached" else 0.0
    if args.features == "cached" and args.weight_decay == 0:
        raise ValueError("--weight_decay 0: without a penalty L-BFGS does not converge")
    if args.fraction < 1:
        chosen = balanced_subset(data.train_labels, args.fraction, args.seed)
        data = data._replace(train_images=data.train_images[chosen.to(data.train_images.device)],
                             train_labels=data.train_labels[chosen.to(device)])
    classifier, optimizer = make_classifier(args, backbone, device)
    if state is None:
        state = {"epoch": 0}
        files = evaluation_files(args, device, [], classifier, optimizer)
        run = start_run(["main_lincls.py", *argv], folder, args, device, files)
    else:
        restore(state, device, classifier=classifier.load_state_dict, optimizer=optimizer.load_state_dict)
        run = Run(folder, state["epoch"], args.tensorboard)
    backbone.to(device, memory_format=torch.channels_last)
    return args, device, data, backbone, classifier, optimizer, run, state


def main(argv=None):
    begin, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        args, device, data, *parts, run, state = set_up(parser, args, argv)
    if args.resume and os.path.exists(run.path(RESULTS)):
        say(f"{run.folder}: already finished, see {RESULTS}")
        return 0
    try:
        with contextlib.closing(run), StopRequest(args.max_minutes, begin) as stop:
            info(f"{run.folder}: {args.dataset}, {len(data.train_images)} images of {args.image_size} pixels, "
                 f"{describe(device)}, {args.precision}")
            return evaluate(args, device, data, *parts, run, state, stop)
    except (MemoryError, torch.OutOfMemoryError) as error:
        return fail("main_lincls.py", f"out of memory ({str(error).split('. ')[0]}); lower --batch_size")


if __name__ == "__main__":
    run_script(main)
