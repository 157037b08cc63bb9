"""Linear evaluation of a pre-trained backbone, frozen, or fine-tuning with a linear classifier.

    python main_lincls.py --arch resnet18 --num_cls 10 --batch_size 256 --lr 30.0 \\
        --weight_decay 0.0 --pretrained CHECKPOINT DIR
    python main_lincls.py --features cached --pretrained experiments/1/backbone.pt data

CHECKPOINT: backbone.pt or checkpoint.pt of main.py, or a checkpoint of other SimSiam code for CIFAR.
The first command is MoCo's protocol: SGD at a rate of 30 on random crops and flips; the result is
the last epoch's top-1 accuracy on all test images. --features cached fits the L2-regularized softmax
regression with L-BFGS to features without augmentation: half a minute at width 16.
--weights finetune goes on from that fit and trains the backbone too (docs/data.md, "Few labels").
"""
import argparse
import math
import os
import sys
import time
from typing import NamedTuple

from utils import augment, checkpoint, cli, device as devices, knn, linear, report, run as runs
from utils.data import DATASETS, Dataset, balanced_subset, load_dataset, options_in, take
import torch  # after utils, which sets OpenMP up
import torch.nn.functional as F

import simsiam

MILESTONES = (0.6, 0.8)  # shares of the epochs after which MoCo divides the rate by 10
CROP_SCALE = {"freeze": (0.08, 1.0),   # torchvision's default for RandomResizedCrop
              "finetune": (0.5, 1.0)}  # gentler: what is trained adapts to the size of objects in its crops
PENALTY = 5.0  # weight decay of L-BFGS times the images: 1e-4 for 50,000
FROZEN = {"lr": 30.0, "weight_decay": 0.0}  # defaults of SGD at a batch of 256, as the next two
FINETUNE = {"lr": 4.0, "lr_backbone": 0.4, "weight_decay": 0.0}  # times the mean square of each tensor
SCRATCH = {"lr": 0.1, "lr_backbone": 0.1, "weight_decay": 5e-4}


def make_parser():
    parser = cli.Parser(prog="main_lincls.py", description=__doc__)
    add = cli.add_data_options(parser, DATASETS).add_argument
    add("--num_cls", type=cli.whole_number(2), help="classes (default: the data set's)")
    add("--fraction", type=cli.fraction, default=1.0, help="share of the labels, drawn by --seed")
    backbone = parser.add_argument_group("backbone")
    backbone.add_argument("--pretrained", type=cli.file_path, metavar="CHECKPOINT|none",
                          help="required, but for model.pt; none: random weights, of --arch and --width")
    backbone.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    backbone.add_argument("--width", type=cli.whole_number(1), help="default: the checkpoint's, or 64")
    backbone.add_argument("--weights", choices=("freeze", "finetune"), default="freeze",
                          help="of the backbone: train the classifier alone, or both")
    backbone.add_argument("--lr_backbone", type=cli.real_number,
                          help="of --weights finetune (default, times batch_size / 256: 0.4, times the mean square of "
                          "each tensor; from none 0.1)")
    cli.add_normalization(backbone, augment.MEAN, augment.STD)
    add = parser.add_argument_group("classifier", "SGD only: --epochs to --momentum.").add_argument
    add("--features", choices=("augmented", "cached"), default="augmented", help="SGD or L-BFGS")
    add("--weight_decay", type=cli.real_number,
        help="default: 5 / images for L-BFGS, 0 for SGD, 5e-4 for a network trained from none")
    add("--seed", type=cli.whole_number(0), default=0, help="random seed")
    add("--evaluate", type=cli.file_path, metavar="CLASSIFIER", help="only test this classifier.pt or model.pt")
    add("--epochs", type=cli.whole_number(1), default=100, help="number of epochs")
    add("--batch_size", type=cli.whole_number(1), help="images per step (default: 256; fine-tuning 64)")
    add("--lr", type=cli.real_number, help="of the classifier (default, times batch_size / 256: 30; "
        "fine-tuning 4, from none 0.1)")
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
    scaler: torch.amp.GradScaler
    layout: torch.memory_format  # of the backbone and the views
    batch: int  # images per step


def prepare(args):
    """Complete and check the settings, and make what they say."""
    trained = read_trained(args)
    about, finetune = trained.get("about", {}), args.weights == "finetune"
    check_options(args, finetune)
    device = devices.select_device(args.gpu)
    args.precision = devices.select_precision(args.precision, device)
    backbone, inherited = make_backbone(args)
    args.backbone, args.width = checkpoint.digest(backbone.state_dict()), len(backbone.bn1.weight)
    options = options_in(vars(args), about.get("data", inherited))
    data = load_dataset(args.dataset, args.data_root, device, unlabeled=False, **options)
    if not data.has_classes:
        raise ValueError(f"--dataset {args.dataset}: no labels of several classes, or no test images")
    args.image_size, args.test_share = data.train_images.shape[2], options["test_share"]
    args.data_digest, classes = data.digest(), len(data.classes)
    if args.num_cls not in (None, classes):
        raise ValueError(f"--num_cls {args.num_cls}: {args.dataset} has {classes} classes")
    args.num_cls = classes
    if about and about["classes"] != data.classes:
        raise ValueError(f"{args.evaluate}: trained on {len(about['classes'])} other classes, as {about['classes'][0]}")
    if args.fraction < 1:
        rows = balanced_subset(data.train_labels, args.fraction, args.seed)
        images = data.train_images[rows.to(data.train_images.device)]
        data = data._replace(train_images=images, train_labels=data.train_labels[rows.to(device)])
    count = len(data.train_images)
    set_defaults(args, finetune, count)
    classifier = make_classifier(args, backbone.feature_dim, trained).to(device)
    layout, batch, groups = torch.channels_last, min(args.batch_size, count), [[*classifier.parameters()]]
    if finetune:
        batch = count // math.ceil(count / batch)  # equal batches: a small last one has other statistics
        if batch < 2:
            raise ValueError("--weights finetune: a batch norm takes batches of at least 2 images")
        layout = devices.memory_layout(device, args.width, batch)
        groups = [[each] for each in (*classifier.parameters(), *backbone.parameters())]
    backbone = backbone.requires_grad_(finetune).to(device, memory_format=layout)
    optimizer = devices.sgd(groups, args.lr, args.momentum, args.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=finetune and args.precision == "fp16")
    devices.with_fast_convolutions(backbone)
    return Setup(args, device, data, backbone, classifier, optimizer, scaler, layout, batch)


def check_options(args, finetune):
    """Check what can be without the data."""
    if args.pretrained is None:
        raise ValueError("--pretrained CHECKPOINT is required: the backbone to evaluate")
    if finetune and (args.features == "cached" or args.evaluate):
        raise ValueError("--weights finetune: trains on augmented images; omit --features cached, --evaluate")
    if args.lr_backbone is not None and not finetune:
        raise ValueError("--lr_backbone: the backbone is trained only by --weights finetune")
    if args.features == "cached" and args.weight_decay == 0:
        raise ValueError("--weight_decay 0: without a penalty L-BFGS does not converge")


def set_defaults(args, finetune, images):
    """Set batch size, rates and weight decay that are not given. images: how many are trained on."""
    args.batch_size = args.batch_size or (64 if finetune else 256)
    defaults = FROZEN
    if args.features == "cached":
        defaults = FROZEN | {"weight_decay": PENALTY / images}
    elif finetune:
        defaults = SCRATCH if args.pretrained == "none" else FINETUNE
    for name, value in defaults.items():
        if getattr(args, name) is None:
            setattr(args, name, value if name == "weight_decay" else value * args.batch_size / 256)


def make_backbone(args):
    """The backbone of --pretrained, and what its run says about the data."""
    if args.pretrained == "none":
        torch.manual_seed(args.seed)
        return simsiam.ARCHS[args.arch](args.width or 64), {}
    backbone = simsiam.load_backbone(args.pretrained, args.arch, args.width, cli.info)
    if args.weights == "finetune":  # this project's network, also for weights of code with another stem
        state = backbone.state_dict()
        backbone = simsiam.ARCHS[args.arch](len(backbone.bn1.weight))
        backbone.load_state_dict(state)
    return backbone, runs.inherited_options(args.pretrained)


def read_trained(args):
    """The content of --evaluate, a classifier.pt or model.pt, whose settings are taken; {} without."""
    if args.evaluate is None:
        return {}
    try:
        content = dict(simsiam.read_file(args.evaluate))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{args.evaluate} is no classifier: {error}") from error
    if {"arch", "backbone", "classifier", "about"} <= set(content):  # model.pt
        about = {"arch": content["arch"], "mean": content["about"]["mean"], "std": content["about"]["std"],
                 "image_size": content["about"]["data"]["image_size"], "pretrained": args.evaluate}
        usual = {"arch": "resnet18", "mean": [*augment.MEAN], "std": [*augment.STD]}
        for name, value in about.items():
            if getattr(args, name) not in (value, usual.get(name)):
                raise ValueError(f"--{name} {getattr(args, name)}: {args.evaluate} takes {value}")
            setattr(args, name, value)
    return content


def make_classifier(args, feature_dim, content):
    """The classifier, new or, with --evaluate, of its content. Warns if it was trained on something else."""
    torch.manual_seed(args.seed)
    classifier = torch.nn.Linear(feature_dim, args.num_cls)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    if args.evaluate is None:
        return classifier
    try:
        classifier.load_state_dict(content.get("classifier", content))  # of model.pt, or classifier.pt
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{args.evaluate} is no classifier of these features: {reason}") from error
    trained = content.get("about") or runs.settings_beside(args.evaluate)
    for name in ("backbone", "image_size", "mean", "std"):
        if trained.get(name, getattr(args, name)) != getattr(args, name):
            cli.warn(f"{args.evaluate} was trained with another {name}")
    if trained and args.validation is not None and trained.get("validation") != args.validation:
        cli.warn(f"{args.evaluate} may have been trained on images of --validation {args.validation}")
    return classifier


def set_rates(optimizer, args, epoch):
    """Set the rates of an epoch: MoCo's steps, or a cosine in fine-tuning, where the first two groups are the
    classifier's. Returns the classifier's rate, without its scale."""
    factor = 0.1 ** sum(epoch >= round(milestone * args.epochs) for milestone in MILESTONES)
    if args.weights == "finetune":
        factor = 0.5 * (1 + math.cos(math.pi * epoch / args.epochs))
    for i, group in enumerate(optimizer.param_groups):
        rate = args.lr if i < 2 else args.lr_backbone
        group["lr"] = rate * factor * group.get("scale", 1.0)
    return args.lr * factor


def summary(record):
    """The metrics of an epoch in words, to stand beside a bar."""
    words = "loss {train_loss:.3f}, training top-1 {train_top1:.2f} %".format(**record)
    return words + (", test top-1 {test_top1:.2f} %".format(**record) if "test_top1" in record else "")


def make_forward(setup, steps):
    """The backbone on random crops: images uint8 [B, 3, H, W] and their Draws -> float32 [B, feature_dim]."""
    args, autocast = setup.args, devices.autocast(setup.device, setup.args.precision)

    def forward(images, draws):
        views = augment.crop_flip(images, draws, args.image_size)
        views = augment.normalize(views, args.mean, args.std)
        with torch.set_grad_enabled(args.weights == "finetune"), autocast():
            return setup.backbone(views.contiguous(memory_format=setup.layout)).float()

    return devices.compile_for(setup.device, forward, None, steps)


def recalibrate(setup):
    """Compute the statistics of batch norms anew: of whole images, about 10,000 at most. Those that training
    leaves are of crops, which show objects larger (arXiv 1906.06423)."""
    args, device, images, batch = setup.args, setup.device, setup.data.train_images, setup.batch
    generator = augment.epoch_generator(args.seed, args.epochs, device)
    order = torch.randperm(len(images), generator=generator, device=device).to(images.device)
    rows = order[:max(batch, min(len(order), 10_000) // batch * batch)].split(batch)
    views = (augment.normalize(take(images, each, device), args.mean, args.std) for each in rows)
    with devices.autocast(device, args.precision)():
        torch.optim.swa_utils.update_bn(views, setup.backbone)


def train_sgd(setup, run, position, test_features, stop):
    """--features augmented: train the classifier by MoCo's protocol, or the backbone too, from `position`
    on. Returns the test features, which change with the backbone. Raises Stopped if asked to stop."""
    args, device, data, backbone, classifier, optimizer, scaler, *_ = setup
    finetune, size, batch = args.weights == "finetune", len(data.train_images), setup.batch
    if finetune:
        size -= size % batch
    forward = make_forward(setup, args.epochs * math.ceil(size / batch))
    with cli.progress_bar(args.epochs, position.epoch) as progress:
        for epoch in range(position.epoch, args.epochs):
            rate = set_rates(optimizer, args, epoch)
            backbone.train(finetune)
            start = time.perf_counter()
            generator = augment.epoch_generator(args.seed, epoch, device)
            order = torch.randperm(len(data.train_images), generator=generator, device=device)[:size]
            draws = augment.draw_views(size, generator, *data.train_images.shape[2:], CROP_SCALE[args.weights])
            padded = F.pad(torch.arange(size, device=device), (0, -size % batch))  # one shape, one compilation
            draws, beside = draws.rows(padded), order[padded].to(data.train_images.device)
            sums = torch.zeros(2, device=device)                # loss and correct predictions
            for first in range(0, size, batch):
                stop.check()
                rows = slice(first, first + batch)
                images = take(data.train_images, beside[rows], device)
                features = forward(images, draws.rows(rows))
                labels = data.train_labels[order[rows]]
                logits = classifier(features[:len(labels)])     # [B, num_cls]
                loss = F.cross_entropy(logits, labels)
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                correct = (logits.argmax(dim=1) == labels).sum()
                sums += torch.stack((loss.detach() * len(labels), correct))
                progress.update(len(labels) / size)
            loss, correct = (sums / size).tolist()
            record = {"epoch": epoch + 1, "train_loss": loss, "train_top1": 100 * correct,
                      "lr": rate, "seconds": round(time.perf_counter() - start, 3)}
            if finetune and epoch + 1 == args.epochs:
                recalibrate(setup)
                test_features = features_of(setup, data.test_images, stop)
            if not finetune or epoch + 1 == args.epochs:
                record |= linear.test(classifier, test_features, data.test_labels)
            run.log(record)
            if not math.isfinite(loss):
                break
            cli.show_epoch(progress, epoch + 1, summary(record), epoch + 1 == args.epochs)
            run.save(runs.Position(epoch + 1))
    return test_features


def fit(setup, run, test_features, stop):
    """Fit the classifier to the features of the training images by L-BFGS, and log its accuracies. The epoch in
    the log is the number of iterations, or 0 in fine-tuning: there the rate of each tensor gets its mean square
    as a factor, for steps relative to weights that weight decay and the fit leave on any scale."""
    args, data, classifier = setup.args, setup.data, setup.classifier
    finetune, labels = args.weights == "finetune", data.train_labels
    weight_decay = PENALTY / len(labels) if finetune else args.weight_decay
    features = features_of(setup, data.train_images, stop)
    loss, iterations = linear.fit_lbfgs(classifier, features, labels, weight_decay, stop.check)
    train_top1 = linear.test(classifier, features, labels)["test_top1"]
    record = {"epoch": iterations, "train_loss": loss, "train_top1": train_top1}
    record |= linear.test(classifier, test_features, data.test_labels)
    if finetune:
        cli.info(f"linear classifier before fine-tuning: {summary(record)}")
        record = {"epoch": 0, "linear_loss": loss, "linear_top1": record["test_top1"]}
        for group in setup.optimizer.param_groups:
            scale = group["params"][0].detach().square().mean().item()
            group["scale"] = scale or 1.0  # of the untrained network's biases, which are 0
    run.log(record)
    run.save(runs.Position())


def features_of(setup, images, stop):
    """The backbone's features of images as they are, float32 [N, feature_dim]."""
    args, autocast = setup.args, devices.autocast(setup.device, setup.args.precision)
    return knn.extract_features(setup.backbone, images, autocast, args.mean, args.std, check=stop.check)


def evaluate(setup, run, position, stop):
    """Train and test the classifier, on frozen features or with the backbone. Returns the exit code."""
    args, backbone, classifier = setup.args, setup.backbone, setup.classifier
    fits = args.features == "cached" or args.weights == "finetune" and args.pretrained != "none"
    try:
        test_features = features_of(setup, setup.data.test_images, stop)
        if args.evaluate is None and fits and not run.records:
            fit(setup, run, test_features, stop)
        if args.evaluate is None and args.features == "augmented":
            test_features = train_sgd(setup, run, position, test_features, stop)
    except cli.Stopped:
        return run.exit_code("main_lincls.py", stop, finished=False)
    finite = [math.isfinite(value) for record in run.records for value in record.values()]
    weights = [*classifier.parameters(), *backbone.state_dict().values()]
    if not all(finite) or not all(value.isfinite().all() for value in weights):
        return cli.fail("main_lincls.py", "the loss or the weights are not finite; lower the learning rate")
    finish(setup, run, test_features)
    return run.exit_code("main_lincls.py", stop, finished=True)


def finish(setup, run, test_features):
    """Print the result; write results.json, the classifier or the whole network, and the plots."""
    args, data, classifier, backbone = setup.args, setup.data, setup.classifier, setup.backbone
    digest = checkpoint.digest(backbone.state_dict())
    assert args.weights == "finetune" or digest == args.backbone, "the frozen backbone changed"
    results = {"images": len(data.test_images), **linear.test(classifier, test_features, data.test_labels)}
    how, split = "", "test" if args.validation is None else "validation"
    finetuned = args.weights == "finetune" or args.evaluate == args.pretrained
    if args.evaluate is None:
        results |= run.records[0] | run.records[-1]  # the first has the linear accuracy before fine-tuning
        how = "L-BFGS, " if args.features == "cached" else f"epoch {args.epochs}, "
        name, content = "classifier.pt", {key: value.cpu() for key, value in classifier.state_dict().items()}
        if args.weights == "finetune":
            network = {key: value.cpu().contiguous() for key, value in backbone.state_dict().items()}
            about = {"classes": data.classes, "mean": args.mean, "std": args.std, "validation": args.validation,
                     "data": {"image_size": args.image_size, "test_share": args.test_share}}
            content = {"arch": args.arch, "backbone": network, "classifier": content, "about": about}
            name = "model.pt"
        with run.attempt():
            checkpoint.save(run.path(name), content)
    what = "fine-tuned" if finetuned else "linear"
    cli.say(f"{what} top-1: {results['test_top1']:.2f} % ({how}{results['images']:,} {split} images)")
    if args.evaluate is None and args.features == "augmented" and args.weights == "freeze":
        best = max(run.records, key=lambda record: record["test_top1"])
        results |= {"best_epoch": best["epoch"], "best_top1": best["test_top1"]}
        cli.say(f"best epoch ({best['epoch']}): {best['test_top1']:.2f} %, selected on the {split} "
                "set: not the result")
    with torch.no_grad():
        predicted = classifier(test_features).argmax(dim=1)
    results |= {"backbone": digest, **knn.of_classes(predicted, data.test_labels, data.classes)}
    if len({*data.test_labels.bincount(minlength=args.num_cls).tolist()}) > 1:
        cli.say(f"balanced accuracy, the mean over classes: {results['balanced_accuracy']:.2f} %")
    if run.unsaved is None:
        with run.attempt():
            checkpoint.write_json(run.path(runs.RESULTS), results)  # now the evaluation is finished


def main(argv=None):
    began, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    with cli.memory_errors("main_lincls.py", "lower --batch_size, --train_size or --fraction"):
        with parser.user_errors():
            found = runs.find(args.exp_dir, args.trial, args.resume, runs.EVALUATION)
            if found[1] is not None:
                args = runs.resumed_args(parser, argv, found[1]["config"])
            setup, command = prepare(args), ["main_lincls.py", *argv]
            parts = {"classifier": setup.classifier, "optimizer": setup.optimizer}
            if args.weights == "finetune":
                parts |= {"network": setup.backbone, "scaler": setup.scaler}
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
