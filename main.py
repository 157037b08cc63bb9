"""SimSiam pre-training (arXiv 2011.10566). The defaults are the paper's CIFAR-10 recipe:

    python main.py --data_root DIR --gpu 0

Half the width, an evening on two cores (kNN 77 %):

    python main.py --width 32 --dim 1024 --pred_dim 256 --batch_size 64 --views 4 \\
        --learning_rate 0.06 --view_size 16:0.75,24:0.25 --epochs 60

On several GPUs: torchrun --standalone --nproc_per_node 4 main.py
"""
import argparse
import contextlib
import math
import sys
import time
from typing import NamedTuple

from utils import augment, cli, device as devices, distributed, knn, log, report, run as runs
from utils.data import DATASETS, Dataset, load_dataset, options_in, take
import torch  # after utils, which sets OpenMP up

import simsiam

LR_PER_256 = 0.03  # learning rate for a batch of 256 (appendix D)
SAVE_SECONDS = 60  # at least, between checkpoints, which take time


def make_parser():
    parser = cli.Parser(prog="main.py", description=__doc__)
    count, rate, switch = cli.whole_number, cli.real_number, argparse.BooleanOptionalAction
    cli.add_data_options(parser, DATASETS, positional=False)
    add = parser.add_argument_group("model").add_argument
    add("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    add("--width", type=count(1), help="channels of the first stage (default: 64, or as --init)")
    add("--dim", type=count(2), default=2048, help="size of z and p")
    add("--pred_dim", type=count(1), default=512, help="bottleneck of the predictor")
    add("--num_proj_layers", type=int, choices=(2, 3), default=2, help="2 on CIFAR, 3 on ImageNet")
    add("--init", type=cli.file_path, metavar="PATH", help="start from this backbone")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count(1), default=800, help="epochs")
    add("--batch_size", type=count(2), help="images per step (default: 512, or all)")
    add("--learning_rate", type=rate, help="default: 0.03 * batch_size / 256")
    add("--momentum", type=rate, default=0.9, help="of SGD")
    add("--weight_decay", type=rate, default=5e-4, help="of SGD")
    add("--views", type=int, choices=range(2, 9), default=2, metavar="N", help="of an image, 2 to 8; "
        "each predicts the mean of the others")
    add("--view_size", metavar="N|N:SHARE,...", help="pixels of the views (default: the "
        "images'), or shares of the epochs: 16:0.5,24:0.25,32:0.25")
    add("--seed", type=count(0), default=0, help="random seed")
    add = parser.add_argument_group("the paper's study (Sec. 4; ablate.py)").add_argument
    add("--stop_gradient", action=switch, default=True, help="stop gradients through z (4.1)")
    add("--predictor", choices=simsiam.PREDICTORS, default="learned", help="Table 1 (4.2)")
    add("--fix_pred_lr", action="store_true", help="constant rate of the predictor (4.2)")
    add("--zero_init_residual", action="store_true", help="branches start at 0 (App. A), not of --init")
    add("--head_bn", choices=simsiam.HEAD_BN, default="default", help="batch norm of the heads (4.4)")
    add("--similarity", choices=simsiam.DISTANCES, default="cosine", help="of p and z (4.5)")
    add("--symmetry", choices=simsiam.LOSSES, default="symmetric", help="of the loss (4.6)")
    add("--warmup_epochs", type=count(0), default=0, help="of linear warm-up")
    add = cli.add_device_options(parser).add_argument
    add("--compile", action=switch, help="default: long runs on CUDA")
    add("--deterministic", action="store_true", help="bit-identical on CUDA")
    add("--sync_bn", action=switch, default=True, help="batch norm over all GPUs")
    add = cli.add_run_options(parser).add_argument
    add("--eval_freq", type=count(1), default=10, help="epochs between kNN")
    add("--untrained", action="store_true", help="evaluate the initial weights")
    return parser


class Setup(NamedTuple):
    """What is trained, how, and on what."""
    args: argparse.Namespace
    device: torch.device
    data: Dataset
    model: simsiam.SimSiam
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler


# ---- set-up


def set_up(parser, args, argv, began):
    """The Setup, the run (None but in the first process), and the Position to train from."""
    found = runs.find(args.exp_dir, args.trial, args.resume, runs.CHECKPOINT)
    _, state = found
    if state is not None:
        args = runs.resumed_args(parser, argv, state["config"])
    setup = prepare(args, state is None)
    args, device, data, model, optimizer, scaler = setup
    order, draws = draw_epoch(args, 0, data.train_images, device)
    distributed.require_same("images", args.data_digest, [order, draws])
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    run, position = runs.open_run(found, ["main.py", *argv], vars(args), device, parts, began)
    if run:
        report.begin(run, data, order, draws)
    return setup, run, position


@distributed.in_turns
def prepare(args, new=True):
    """Complete and check args, in place; make the Setup. new: the run is not resumed."""
    devices.set_determinism(args.deterministic)
    device = devices.select_device(args.gpu)
    args.precision = devices.select_precision(args.precision, device)
    if args.predictor != "learned" and args.fix_pred_lr:
        raise ValueError(f"--fix_pred_lr: with --predictor {args.predictor} no predictor is trained")
    if args.symmetry == "asymmetric" and args.views % 2:
        raise ValueError(f"--views {args.views}: --symmetry asymmetric takes pairs of views")
    if args.warmup_epochs >= args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs}: the run has {args.epochs} epochs")
    initial = None
    if new and args.init:
        initial = simsiam.load_backbone(args.init, args.arch, args.width, cli.info)
        args.width = len(initial.bn1.weight)
    args.width = args.width or 64
    data = load_dataset(args.dataset, args.data_root, device, **options_in(vars(args)))
    count, *_, args.image_size = data.train_images.shape
    args.batch_size = args.batch_size or distributed.default_batch(count)
    if args.batch_size > count:
        raise ValueError(f"--batch_size {args.batch_size}: there are {count} training images")
    if args.learning_rate is None:
        args.learning_rate = LR_PER_256 * args.batch_size / 256
    args.data_digest = data.digest()
    args.steps = count // args.batch_size  # an epoch; the last partial batch is dropped
    args.view_size = str(args.image_size) if args.view_size is None else args.view_size
    augment.view_sizes(args.view_size, args.epochs)  # raises for a bad one
    args.bn_batch = distributed.batch_norm_size(args.batch_size, args.sync_bn, device)
    model, optimizer, scaler = build(args, device)
    if initial:
        model.backbone.load_state_dict(initial.state_dict())
    return Setup(args, device, data, model, optimizer, scaler)


def build(args, device):
    """Model, optimizer and loss scaler."""
    torch.manual_seed(args.seed)
    backbone = simsiam.ARCHS[args.arch](args.width, zero_init_residual=args.zero_init_residual)
    model = simsiam.SimSiam(
        backbone, args.dim, args.pred_dim, args.num_proj_layers,
        args.head_bn, args.predictor, args.stop_gradient,
    ).to(device, memory_format=devices.memory_layout(device, args.width, args.batch_size))
    devices.with_fast_convolutions(model)
    if distributed.processes > 1 and args.bn_batch == args.batch_size:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = [[*model.parameters()]]
    if args.fix_pred_lr:
        trunk = [*model.backbone.parameters(), *model.projector.parameters()]
        groups = [trunk, [*model.predictor.parameters()]]
    optimizer = devices.sgd(groups, args.learning_rate, args.momentum, args.weight_decay)
    return model, optimizer, torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")


# ---- training


def cosine(rate, epoch, epochs, warmup=0):
    """Learning rate of an epoch, counted from 0; the first after warm-up has the full one."""
    if epoch < warmup:
        return rate * (epoch + 1) / (warmup + 1)
    return rate * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def draw_epoch(args, epoch, images, device):
    """The randomness of an epoch, of (seed, epoch): the order of the images, int64
    [steps * batch_size] on their device, and a list of Draws, one for each view of all images."""
    generator = augment.epoch_generator(args.seed, epoch, device)
    count = args.steps * args.batch_size
    order = torch.randperm(len(images), generator=generator, device=device)[:count]
    draws = [augment.draw_views(count, generator, *images.shape[2:]) for _ in range(args.views)]
    return order.to(images.device), draws


def make_forward(args, model, device):
    """The forward pass of a step: images uint8 [B, 3, H, W], size of the views, a list of Draws
    -> loss and feature_std, float32 scalars. Compiled by --compile, for each size."""
    autocast = devices.autocast(device, args.precision)
    layout = devices.memory_layout(device, args.width, args.batch_size)
    distance, loss_of = simsiam.DISTANCES[args.similarity], simsiam.LOSSES[args.symmetry]

    def forward(images, size, draws):
        views = augment.make_views(images, draws, size)  # [B, 3, size, size] each
        views = [view.contiguous(memory_format=layout) for view in views]
        with autocast():
            outputs = model(*views)  # p1, p2, z1, z2: [B, dim] each
        z1 = outputs[len(views)]
        return loss_of(*outputs, distance=distance), simsiam.feature_std(z1).detach()

    local = distributed.processes == 1 or args.bn_batch < args.batch_size  # SyncBN cuts the graph
    if local or args.compile is not None:
        forward = devices.compile_for(device, forward, args.compile, args.epochs * args.steps)
    return distributed.average_gradients(model, forward)


def pretrain(setup, run, position, stop):
    """Train from `position` to the last epoch or a requested stop. Returns the exit code."""
    args, device, data, model, optimizer, scaler = setup
    steps, sizes = args.steps, augment.view_sizes(args.view_size, args.epochs)
    forward = make_forward(args, model, device)
    with cli.progress_bar(args.epochs, position.epoch + position.step / steps) as progress:
        for epoch in range(position.epoch, args.epochs):
            rate = cosine(args.learning_rate, epoch, args.epochs, args.warmup_epochs)
            optimizer.param_groups[0]["lr"] = rate  # a second group keeps its own
            order, draws = draw_epoch(args, epoch, data.train_images, device)
            first = done = position.step
            metrics = torch.zeros(steps, 2, device=device)  # loss and std of each step
            metrics[:done] = position.metrics
            start = time.perf_counter() - position.seconds
            model.train()

            # ---- the training step
            for step in range(first, steps):
                if stop.agreed():
                    break
                rows = distributed.rows_of_step(step, args.batch_size)
                images = take(data.train_images, order[rows], device)
                loss, std = forward(images, sizes[epoch], [each.rows(rows) for each in draws])
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                metrics[step] = torch.stack((loss.detach(), std))  # stays on the device
                done = step + 1
                progress.update(1 / steps)

            # ---- once an epoch
            metrics = metrics[:done].cpu()  # the one synchronization
            seconds = time.perf_counter() - start
            distributed.average_epoch(metrics[first:], model)
            position = runs.Position(epoch, done, metrics, seconds)
            position, code = end_epoch(setup, run, position, stop, progress)
            if code is not None:
                return code
    return 0


@distributed.on_first()
def end_epoch(setup, run, position, stop, progress):
    """Checkpoint, kNN, log, plots after an epoch, or after a stop in it. Returns the position to go
    on from, and the exit code if the run ends here."""
    args, ended = setup.args, position.epoch + 1
    problem = run.not_finite(position)
    if problem:
        return position, cli.fail("main.py", problem)
    whole = position.step == args.steps
    due = whole and (ended % args.eval_freq == 0 or ended == args.epochs)
    outdated = whole and time.monotonic() - run.saved_time >= SAVE_SECONDS
    if outdated or due and not run.evaluated:  # a first kNN may run out of memory
        run.save(position)
    if whole:
        record = run.record(position, setup.optimizer, args.views * args.batch_size)
        with contextlib.suppress(cli.Stopped):  # in kNN, which a resumed run repeats
            run.log(record | (evaluate(setup, run, stop) if due else {}))
            cli.show_epoch(progress, ended, log.summary(run.records), due)
            position = runs.Position(ended)
    finished = position.epoch == args.epochs
    if stop.requested or finished:
        run.save(position)
    if stop.requested or due:
        with run.optional("plots"):
            report.draw_run(run.folder)
    return position, run.exit_code("main.py", stop, finished)


def evaluate(setup, run, stop):
    """The metrics of kNN; {} where they cannot be had: training goes on."""
    autocast, metrics = devices.autocast(setup.device, setup.args.precision), {}
    with run.optional("kNN"):
        metrics = knn.monitor(setup.model.backbone, setup.data, autocast, stop.check)
        run.evaluated = True
    return metrics


@distributed.on_first()
def evaluate_untrained(setup, run, stop):
    """Log the metrics of the initial weights as epoch 0."""
    with contextlib.suppress(cli.Stopped):
        if not run.records:
            run.log({"epoch": 0, **evaluate(setup, run, stop)})


def main(argv=None):
    began, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    with cli.memory_errors("main.py", "lower --batch_size, --views, --image_size or --width"), distributed.joined():
        with parser.user_errors():
            setup, run, position = set_up(parser, args, argv, began)
        stop = distributed.StopRequest(args.max_minutes, began)
        with run or contextlib.nullcontext(), stop:
            if setup.args.untrained and position.epoch == position.step == 0:
                evaluate_untrained(setup, run, stop)
            code = pretrain(setup, run, position, stop)
        if run and code == 0:
            report.say_end(run, setup.data)
        return code


if __name__ == "__main__":
    cli.run_script(main, torchrun=True)
