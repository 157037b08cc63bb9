"""Linear evaluation of a pre-trained backbone: frozen features, one linear classifier.

    python main_lincls.py --arch resnet18 --num_cls 10 --batch_size 256 --lr 30.0 --weight_decay 0.0 --pretrained CHECKPOINT DIR

CHECKPOINT is the backbone.pt or checkpoint.pt of a run of main.py, or a SimSiam checkpoint of other code for CIFAR
(simsiam/weights.py has the list); DIR is the folder that has, or gets, cifar-10-batches-py. On a CPU, --features cached
computes the features once, without augmentation, and takes minutes at small width:

    python main_lincls.py --features cached --pretrained experiments/1/backbone.pt data

The result is the last epoch's top-1 accuracy on all test images. The best epoch is shown beside it; it is
chosen on the test images and so is not a result.
"""
import argparse
import math
import os
import shlex
import shutil
import statistics
import time
from typing import NamedTuple

from utils.cpu import prepare_cpu  # before torch

import torch
import torch.nn.functional as F

from simsiam import ARCHS, load_backbone
from utils import checkpoint, log
from utils.augment import MEAN, STD
from utils.board import require_tensorboard
from utils.cli import Parser, add_normalization, complain, real_number, run, share, warn, whole_number
from utils.data import DATASETS, balanced_subset, load_dataset
from utils.device import autocast, describe, select_device, select_precision
from utils.features import extract_features, feature_batches, make_augmented_features
from utils.metrics import class_accuracies, confusion_matrix, top_k
from utils.progress import Progress, say, set_quiet, tell
from utils.report import REPORT, draw_run, write_report
from utils.resume import EVALUATION, FORMAT, check_unchanged, find_resumed, machine, restore, resumed_settings, warn_if_elsewhere
from utils.run import EVALUATION_CHECKPOINT, RESULTS, RunWriter, new_run_folder, write_config
from utils.stop import StopRequest

LR_PER_256 = 30.0            # the rate for a batch of 256; it scales linearly
MILESTONES = (0.6, 0.8)      # shares of the epochs after which the rate falls to a tenth: 60 and 80 of 100
CROP_SCALE = (0.08, 1.0)     # torchvision's default for RandomResizedCrop
LINE_SEARCH = 25             # points of lbfgs's line search, at most
SAVE_SECONDS = 10            # from one checkpoint to the next, at least


def make_parser():
    parser = Parser(prog="main_lincls.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("data_root", nargs="?", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="shapes is built in and needs no files")
    data.add_argument("--num_cls", type=whole_number(2), metavar="N", help="number of classes (default: the data set's)")
    data.add_argument("--train_size", type=whole_number(1), metavar="N", help="the first N training pictures only (default: all)")
    data.add_argument("--test_size", type=whole_number(1), metavar="N", help="the first N test pictures only (default: all)")
    data.add_argument("--fraction", type=share, default=1.0, metavar="F", help="train on this share of each class, drawn by --seed: 0.01 and 0.1 are usual")

    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--pretrained", metavar="CHECKPOINT", help="backbone.pt or checkpoint.pt of a run of main.py, or a checkpoint of other code (needed)")
    backbone.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    backbone.add_argument("--width", type=whole_number(1), metavar="CHANNELS", help="of the first stage (default: the checkpoint's)")
    add_normalization(backbone, MEAN, STD)

    training = parser.add_argument_group("classifier")
    training.add_argument("--features", choices=("augmented", "cached"), default="augmented", help="augmented: random crop and flip in every epoch; cached: computed once, without")
    training.add_argument("--crop_scale", type=share, nargs=2, default=list(CROP_SCALE), metavar=("MIN", "MAX"), help="the random crop's share of the picture's area")
    training.add_argument("--epochs", type=whole_number(1), default=100, metavar="N", help="passes over the training pictures; for lbfgs iterations")
    training.add_argument("--optimizer", choices=("sgd", "lbfgs"), default="sgd", help="lbfgs: all cached features in each step, rate by line search")
    training.add_argument("--schedule", choices=("step", "cosine", "constant"), default="step", help="of sgd's rate; step: a tenth after 60 %% and 80 %% of the epochs")
    training.add_argument("--batch_size", type=whole_number(1), default=256, metavar="N", help="pictures a step of sgd")
    training.add_argument("--lr", type=real_number, metavar="LR", help=f"initial rate of sgd (default: {LR_PER_256} * batch_size / 256)")
    training.add_argument("--momentum", type=real_number, default=0.9, metavar="M", help="of sgd")
    training.add_argument("--weight_decay", type=real_number, default=0.0, metavar="WD", help="on weights and biases")
    training.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the classifier, the order, the crops and the --fraction")
    training.add_argument("--seeds", type=whole_number(1), default=1, metavar="N", help="train N classifiers, with seeds from --seed on: mean and std")
    training.add_argument("--evaluate", metavar="CLASSIFIER", help="train nothing: test the classifier.pt of an evaluation")

    device = parser.add_argument_group("device")
    device.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    device.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the backbone; the classifier is float32")
    device.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile crops and backbone (default: on with CUDA, off on the CPU)")

    folder = parser.add_argument_group("run")
    folder.add_argument("--max_minutes", type=real_number, metavar="M", help="stop after M minutes as Ctrl-C does, with exit code 0 (default: no limit)")
    folder.add_argument("--exp_dir", default="experiments", metavar="DIR", help="where the evaluation's folder is made")
    folder.add_argument("--trial", metavar="NAME", help="the folder's name (default: the next free number)")
    folder.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="scalars and figures for TensorBoard too, in the folder (needs the package; default: off)")
    folder.add_argument("--quiet", action="store_true", help="print the result, warnings and errors only")
    folder.add_argument("--resume", metavar="auto|PATH", help=f"go on with an evaluation; auto: of --trial, else the newest, else start; PATH: its {EVALUATION_CHECKPOINT} (default: a new one)")
    return parser


# ---------------------------------------------------------------------------------------------------
# One training step


class Head(NamedTuple):
    """A linear classifier in training."""

    seed: int
    classifier: torch.nn.Linear
    optimizer: torch.optim.Optimizer


def is_finite(head):
    """Whether all weights of the classifier are finite numbers."""
    return all(bool(value.isfinite().all()) for value in head.classifier.state_dict().values())


def make_head(seed, feature_dim, args, device):
    """A new classifier: weights from N(0, 0.01), bias 0."""
    torch.manual_seed(seed)
    classifier = torch.nn.Linear(feature_dim, args.num_cls)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    classifier.to(device)
    if args.optimizer == "lbfgs":
        optimizer = torch.optim.LBFGS(
            classifier.parameters(), max_iter=1, max_eval=LINE_SEARCH + 1, history_size=10, line_search_fn="strong_wolfe"
        )
    else:
        optimizer = torch.optim.SGD(classifier.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)
    return Head(seed, classifier, optimizer)


def train_step(head, features, labels, penalty):
    """One step on features [B, feature_dim] and labels int64 [B]: float32 [2], the cross-entropy and how many answers were
    right, both before it. penalty: the factor of half the squared weights in the loss, for optimizers without weight decay."""
    metrics = []

    def loss():
        head.optimizer.zero_grad(set_to_none=True)
        logits = head.classifier(features)
        cross_entropy = F.cross_entropy(logits, labels)
        metrics.append(torch.stack((cross_entropy.detach(), (logits.argmax(dim=1) == labels).sum())))
        objective = cross_entropy
        if penalty:
            objective = objective + penalty / 2 * sum(value.square().sum() for value in head.classifier.parameters())
        objective.backward()
        return objective

    head.optimizer.step(loss)  # lbfgs calls it for each point of its line search
    return metrics[0]


def scheduled_rate(schedule, rate, epoch, epochs):
    """The learning rate of an epoch, counted from 0."""
    if schedule == "step":
        return rate * 0.1 ** sum(epoch >= round(milestone * epochs) for milestone in MILESTONES)
    if schedule == "cosine":
        return rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return rate


def tested(heads, features, labels):
    """The accuracies of the heads on the test features: a dict for the log, of means over the heads if there are several."""
    with torch.no_grad():
        logits = [head.classifier(features) for head in heads]
    top1 = [top_k(one, labels, 1) for one in logits]
    record = {"test_top1": statistics.fmean(top1)}
    if logits[0].shape[1] > 5:
        record["test_top5"] = statistics.fmean(top_k(one, labels, 5) for one in logits)
    if len(heads) > 1:
        record |= {"test_top1_std": statistics.stdev(top1), log.OF_SEEDS: top1}
    return record


# ---------------------------------------------------------------------------------------------------
# The evaluation


def train(args, device, data, heads, features_of, test_features, writer, state, stop):
    """Train the heads from `state` on to the last epoch, or until `stop`, a StopRequest, has a signal. Returns the log's
    records, one an epoch, or the exit code of an evaluation that did not come to its end."""
    size = len(data.train_images)
    steps = math.ceil(size / args.batch_size)
    sizes = torch.tensor([min(args.batch_size, size - args.batch_size * step) for step in range(steps)])  # none is dropped
    penalty = args.weight_decay if args.optimizer == "lbfgs" else 0.0
    records, saved = state["records"], time.monotonic()
    with Progress(args.epochs, state["epoch"] + state["step"] / steps) as progress:
        for epoch in range(state["epoch"], args.epochs):
            start, step = time.perf_counter(), state["step"]
            feeds = [
                feature_batches(features_of, data, head.seed, epoch, step, args.batch_size, args.crop_scale, device) for head in heads
            ]
            metrics = torch.zeros(steps, len(heads), 2, device=device)  # of each step and head: the loss, and the right answers
            metrics[:step] = state["metrics"]
            if args.optimizer == "sgd":
                rate = scheduled_rate(args.schedule, args.lr, epoch, args.epochs)
                for head in heads:
                    head.optimizer.param_groups[0]["lr"] = rate

            # ---- the step, of each head: features of its own batch, loss, backward, update
            while step < steps and stop.signal is None:
                for i, head in enumerate(heads):
                    metrics[step, i] = train_step(head, *next(feeds[i]), penalty)
                step += 1
                progress.update(epoch + step / steps)
            # ----

            metrics = metrics[:step].cpu()  # the epoch's one synchronization
            losses, right = metrics.double().mean(dim=1).unbind(dim=1)
            if not losses.isfinite().all():
                bad = losses.isfinite().tolist().index(False)
                return give_up(f"epoch {epoch + 1}, step {bad + 1} of {steps}: the loss is {losses[bad]}{lower_rate(args)}", writer)
            state = {
                "epoch": epoch, "step": step, "metrics": metrics, "seconds": state["seconds"] + time.perf_counter() - start, "records": records,
            }
            if step == steps:
                record = {
                    "epoch": epoch + 1, "train_loss": ((losses * sizes).sum() / size).item(), "train_top1": 100 * right.sum().item() / size,
                    **tested(heads, test_features, data.test_labels), "seconds": round(state["seconds"], 3),
                }
                if args.optimizer == "sgd":
                    record["lr"] = rate
                records.append(record)
                writer.log(record)
                line = f"training loss {record['train_loss']:.3f}, test top-1 {record['test_top1']:.2f} %"
                progress.epoch(epoch + 1, line, epoch + 1 == args.epochs, line)
                state = new_epoch(epoch + 1, records)
            finished, stopped = state["epoch"] == args.epochs, stop.signal is not None
            if finished or stopped or time.monotonic() - saved > SAVE_SECONDS:
                writer.save({EVALUATION_CHECKPOINT: evaluation_state(args, device, state, heads)}, state["epoch"])
                saved = time.monotonic()
            if not (finished or stopped):
                writer.show_progress(draw_run, write_report)
            if stopped and not finished:
                return stopped_early(args, writer, stop)
    return records


def evaluate(args, device, data, backbone, heads, writer, state, stop):
    """Train the heads on the backbone's features, or, with --evaluate, take them as they are; test them and write what
    came out. Returns the exit code."""
    precision_context = autocast(device, args.precision)
    backbone.to(device, memory_format=torch.channels_last)
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}

    features_of, test_features = None, None
    if stop.signal is not None:
        return stopped_early(args, writer, stop)
    with stop.at_once():
        if args.evaluate is None and args.features == "augmented":
            compiled = device.type == "cuda" if args.compile is None else args.compile
            features_of = make_augmented_features(backbone, precision_context, args.mean, args.std, compiled)
        elif args.evaluate is None:
            features_of = extract_features(backbone, data.train_images, precision_context, args.mean, args.std)
        test_features = extract_features(backbone, data.test_images, precision_context, args.mean, args.std)
    if test_features is None:
        return stopped_early(args, writer, stop)

    records = [tested(heads, test_features, data.test_labels)]
    if args.evaluate is None:
        records = train(args, device, data, heads, features_of, test_features, writer, state, stop)
        if isinstance(records, int):
            return records
    if not all(map(is_finite, heads)):
        return give_up(f"weights that are not finite numbers after the last step{lower_rate(args)}", writer)
    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, frozen[name])]
    if moved:
        raise AssertionError(f"the frozen backbone moved during linear evaluation: {', '.join(moved)}")
    with torch.no_grad():
        confusion = sum(
            confusion_matrix(head.classifier(test_features).argmax(dim=1), data.test_labels, args.num_cls) for head in heads
        )
    return report(args, data, heads, records, confusion, writer)


def report(args, data, heads, records, confusion, writer):
    """Print the result, and write it with the classifiers and figures. Returns the exit code."""
    last = records[-1]
    accuracy = f"{last['test_top1']:.2f}"
    if len(heads) > 1:
        accuracy += f" ± {last['test_top1_std']:.2f} % (mean and std of {len(heads)} classifiers, seeds {heads[0].seed} to {heads[-1].seed})"
    else:
        accuracy += " %"
    when = f", last epoch ({last['epoch']})" if "epoch" in last else ""
    count = f"{'all' if args.test_size is None else 'the first'} {len(data.test_images)} test pictures"
    print(f"linear top-1: {accuracy}{when}, {count}")
    if "test_top5" in last:
        print(f"top-5: {last['test_top5']:.2f} %")
    results = {"pictures": len(data.test_images), **last}
    if args.evaluate is None:
        results["seeds"] = [head.seed for head in heads]
        best = max(records, key=lambda record: record["test_top1"])
        print(f"best epoch ({best['epoch']}): {best['test_top1']:.2f} %, chosen on the test pictures and so not the result")
        results |= {"best_epoch": best["epoch"], "best_top1": best["test_top1"]}
    by_class = {  # None for a class without test pictures
        name: None if math.isnan(value) else value for name, value in zip(data.classes, class_accuracies(confusion).tolist())
    }
    shown = sorted((name for name in by_class if by_class[name] is not None), key=by_class.get)
    shown = [*shown[:3], "...", *shown[-3:]] if len(shown) > 10 else shown
    print(f"by class (%): {', '.join(f'{name} {by_class[name]:.1f}' if name in by_class else name for name in shown)}")

    results |= {"backbone": args.backbone, "class_top1": by_class, "confusion": confusion.tolist()}
    unsaved = [writer.unsaved]
    if args.evaluate is None:
        for head in heads:
            name = "classifier.pt" if len(heads) == 1 else f"classifier-seed{head.seed}.pt"
            weights = {key: value.cpu() for key, value in head.classifier.state_dict().items()}
            writer.attempt(checkpoint.save, writer.path(name), weights)
            unsaved.append(writer.unsaved)
    writer.attempt(log.write_json, writer.path(RESULTS), results)  # last: with it the evaluation is done
    writer.draw(draw_run)
    say(f"figures and all else on one page: {writer.path(REPORT)}")
    unsaved = [reason for reason in (*unsaved, writer.unsaved) if reason is not None]
    return give_up(unsaved[0]) if unsaved else 0


def new_epoch(epoch, records):
    """Where an evaluation stands before the first step of an epoch, counted from 0, with the records of those before."""
    return {"epoch": epoch, "step": 0, "metrics": torch.zeros(0, 1, 2), "seconds": 0.0, "records": records}


def evaluation_state(args, device, state, heads):
    """All that a resumed evaluation needs."""
    return {
        **state, "format": FORMAT, "config": vars(args), "machine": machine(device), "backbone": args.backbone,
        "heads": [head.classifier.state_dict() for head in heads], "optimizers": [head.optimizer.state_dict() for head in heads],
    }


def stopped_early(args, writer, stop):
    """Say how to go on. Returns the exit code."""
    writer.draw(draw_run)
    if writer.unsaved is not None:
        return give_up(writer.unsaved)
    if args.evaluate is not None:
        tell("stopped before there was a result")
    else:
        tell(f"stopped; to go on: python main_lincls.py --resume {shlex.quote(writer.path(EVALUATION_CHECKPOINT))}")
    return stop.exit_code


def lower_rate(args):
    """What to do about numbers that ran away."""
    return f"; lower --lr ({args.lr:g})" if args.optimizer == "sgd" and args.evaluate is None else ""


def give_up(what, writer=None):
    """Say why there is no result, on the page too where a writer is given. Returns the exit code."""
    complain(f"main_lincls.py: error: {what}")
    if writer is not None:
        writer.draw(draw_run, f"Ended: {what}.")
    return 1


# ---------------------------------------------------------------------------------------------------
# From the command line to the evaluation


def build_heads(args, backbone, device, state):
    """The classifiers: new, those of a checkpoint's state, or the one of --evaluate."""
    if args.evaluate is not None:
        head = Head(args.seed, torch.nn.Linear(backbone.feature_dim, args.num_cls), None)
        weights = checkpoint.load(args.evaluate)
        own = {name: tuple(value.shape) for name, value in head.classifier.state_dict().items()}
        is_dict = isinstance(weights, dict) and all(map(torch.is_tensor, weights.values()))
        if not is_dict or {name: tuple(value.shape) for name, value in weights.items()} != own:
            raise ValueError(f"{args.evaluate}: not a classifier of {backbone.feature_dim} features and {args.num_cls} classes; that has {own}")
        head.classifier.load_state_dict(weights)
        if not is_finite(head):
            raise ValueError(f"{args.evaluate}: it has weights that are not finite numbers")
        beside = os.path.join(os.path.dirname(args.evaluate), RESULTS)
        if os.path.exists(beside) and log.read_json(beside).get("backbone") != args.backbone:
            warn(f"{args.evaluate} was trained on the features of another backbone than {args.pretrained}, or of another precision of it")
        head.classifier.to(device)
        return [head]
    heads = [make_head(args.seed + i, backbone.feature_dim, args, device) for i in range(args.seeds)]
    if state is not None:
        def load_heads(states):
            for head, one in zip(heads, states, strict=True):
                head.classifier.load_state_dict(one)

        def load_optimizers(states):
            for head, one in zip(heads, states, strict=True):
                head.optimizer.load_state_dict(one)

        restore(state, heads=load_heads, optimizers=load_optimizers)
    return heads


def check_backbone(state, path, backbone):
    """Raises ValueError unless it is the one that the checkpoint with this state was trained on."""
    if state["backbone"] != checkpoint.tensors_digest(backbone.state_dict()):
        raise ValueError(f"--pretrained {path}: not the backbone that {state['origin'][0]} was trained on")


def check(args, data):
    """Fill in what depends on the data. Raises ValueError for settings that do not go together."""
    if args.num_cls is None:
        args.num_cls = len(data.classes)
    if args.num_cls != len(data.classes):
        raise ValueError(f"--num_cls {args.num_cls}: {args.dataset} has {len(data.classes)} classes")
    if args.crop_scale[0] > args.crop_scale[1]:
        raise ValueError(f"--crop_scale {args.crop_scale[0]:g} {args.crop_scale[1]:g}: the smaller share comes first")
    if args.optimizer == "lbfgs":
        if args.features != "cached":
            raise ValueError("--optimizer lbfgs needs --features cached: it takes the same features in each step")
        if args.lr is not None:
            raise ValueError(f"--lr {args.lr:g}: lbfgs searches for its rate; leave --lr out")
        args.batch_size = len(data.train_images)
    elif args.lr is None:
        args.lr = LR_PER_256 * args.batch_size / 256


def start(args, device, heads, folder):
    """Write what a new evaluation's folder has before the first step; folder None: a new one. Returns its RunWriter."""
    made = folder is None
    if made:
        folder = new_run_folder(args.exp_dir, args.trial)
    writer = RunWriter(folder, board=args.tensorboard)
    try:
        write_config(folder, vars(args), device)
        if args.evaluate is None:
            writer.write({EVALUATION_CHECKPOINT: evaluation_state(args, device, new_epoch(0, []), heads)}, 0)
    except OSError:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return writer


def main(argv=None):
    begin = time.monotonic()
    parser = make_parser()
    args = parser.parse_args(argv)
    set_quiet(args.quiet)
    with parser.user_errors():
        folder, state, typed = None, None, args.pretrained
        if args.resume is not None:
            if args.evaluate is not None:
                raise ValueError("--evaluate trains nothing; there is nothing to --resume")
            folder, state = find_resumed(EVALUATION, args.resume, args.exp_dir, args.trial)
        if state is not None:
            args = resumed_settings(EVALUATION, parser, argv, state["config"])
            if state["epoch"] >= args.epochs and os.path.exists(os.path.join(folder, RESULTS)):
                if typed is not None:
                    check_backbone(state, typed, load_backbone(checkpoint.load(typed), args.arch, args.width, verbose=False, name=typed))
                tell(f"{folder}: already done, epoch {state['epoch']} of {args.epochs}; the figures are in {RESULTS}")
                return 0
        elif args.resume is not None:
            tell(f"nothing to resume in {args.exp_dir}: a new evaluation")
        if args.pretrained is None:
            raise ValueError("--pretrained CHECKPOINT is needed: the backbone to evaluate")
        device = select_device(args.gpu)
        args.precision = select_precision(args.precision, device)
        if args.tensorboard:
            require_tensorboard()
        if device.type == "cpu":
            prepare_cpu()
        backbone = load_backbone(checkpoint.load(args.pretrained), args.arch, args.width, verbose=not args.quiet, name=args.pretrained).requires_grad_(False)
        args.backbone = checkpoint.tensors_digest(backbone.state_dict())
        if state is not None:
            check_backbone(state, args.pretrained, backbone)
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        check(args, data)
        labeled = len(data.train_images)
        if args.fraction < 1:
            chosen = balanced_subset(data.train_labels, args.fraction, args.seed)
            data = data._replace(
                train_images=data.train_images[chosen.to(data.train_images.device)], train_labels=data.train_labels[chosen.to(device)]
            )
        heads = build_heads(args, backbone, device, state)
        if state is None:
            writer, state = start(args, device, heads, folder), new_epoch(0, [])
        else:
            writer = RunWriter(folder, state["epoch"], args.tensorboard)
            check_unchanged(state)

    work = f"classifier {args.evaluate}"
    if args.evaluate is None:
        work = f"{len(data.train_images)}{'' if args.fraction == 1 else f' of {labeled}'} pictures, {args.features} features"
    say(f"{writer.folder}: {args.dataset}, {work}, {describe(device)}, {args.precision}")
    warn_if_elsewhere(state, device)
    try:
        with StopRequest(args.max_minutes, begin) as stop:
            return evaluate(args, device, data, backbone, heads, writer, state, stop)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).split(". ")[0]
        return give_up(f"out of memory ({reason}); lower --batch_size", writer)


if __name__ == "__main__":
    run(main)
