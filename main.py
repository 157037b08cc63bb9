"""SimSiam pre-training (arXiv 2011.10566). The defaults are the paper's CIFAR-10 recipe, for a CUDA GPU:

    python main.py --data_root DIR --gpu 0

On a CPU: CIFAR-10 at half the width (a night on two cores, kNN 74 %), or the built-in shapes (minutes):

    python main.py --data_root data --width 32 --dim 1024 --pred_dim 256 --batch_size 64 --learning_rate 0.04 \\
        --view_size 16:0.75,24:0.25 --epochs 300
    python main.py --dataset shapes --width 8 --batch_size 64 --learning_rate 0.03 --dim 512 --pred_dim 128 --epochs 8

On several GPUs: torchrun --standalone --nproc_per_node 4 main.py --data_root DIR (docs/distributed.md).
"""
import argparse
import contextlib
import math
import shlex
import shutil
import sys
import time
from functools import partial

import utils  # noqa: F401 (before torch)
import torch

import simsiam
from utils import log
from utils.augment import SCALE, apply_two_views, draw_views, epoch_generator, view_sizes
from utils.cli import (
    Parser, Progress, Stopped, StopRequest, add_data_options, add_device_options, add_run_options, data_options, fail,
    fraction, info, processes, rank, real_number, run_script, say, warn, whole_number,
)
from utils.data import DATASETS, load_dataset
from utils.device import (
    Agreement, autocast, average, average_gradients, compile_for, describe, describe_precision, in_turns, joined,
    memory_layout, on_first, require_same, select_device, select_precision, set_determinism, share_buffers,
)
from utils.knn import monitor
from utils.plot import plot_views
from utils.report import REPORT, draw_run, evaluation_command
from utils.run import BACKBONE, CHECKPOINT, UNTRAINED, Run, find_run, new_epoch, restore, run_files, start_run

DISTANCES = {"cosine": simsiam.negative_cosine, "cross_entropy": simsiam.cross_entropy}
LOSSES = dict(symmetric=simsiam.simsiam_loss, asymmetric=simsiam.asymmetric_loss, asymmetric_2x=simsiam.asymmetric_loss)
LR_PER_256 = 0.03  # learning rate for a batch of 256; it scales linearly (appendix D)
SAVE_SECONDS = 60  # at least, between checkpoints: writing is not to slow down runs with short epochs
MAY_CHANGE = ("data_root cache_dir exp_dir trial eval_freq save_freq tensorboard compile deterministic "
              "untrained").split()  # in a resumed run; any other setting makes another run


def make_parser():
    parser = Parser(prog="main.py", description=__doc__)
    add_data_options(parser, DATASETS, positional=False)
    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=simsiam.ARCHS, default="resnet18", help="backbone")
    model.add_argument("--width", type=whole_number(1), default=64, metavar="N", help="channels of the first stage")
    model.add_argument("--dim", type=whole_number(2), default=2048, metavar="N", help="size of the outputs z and p")
    model.add_argument("--pred_dim", type=whole_number(1), default=512, metavar="N", help="bottleneck of the predictor")
    model.add_argument("--num_proj_layers", type=int, choices=(2, 3), default=2, help="2 on CIFAR, 3 on ImageNet")
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=whole_number(1), default=800, metavar="N", help="number of epochs")
    training.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="images per step")
    training.add_argument("--learning_rate", type=real_number, metavar="LR", help="default: 0.03 * batch_size / 256")
    training.add_argument("--momentum", type=real_number, default=0.9, metavar="M", help="momentum of SGD")
    training.add_argument("--weight_decay", type=real_number, default=5e-4, metavar="WD", help="weight decay of SGD")
    training.add_argument("--view_size", metavar="N|N:SHARE,...", help="pixels (default: --image_size); or sizes "
                          "with their shares of the epochs, as 16:0.5,24:0.25,32:0.25")
    training.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="random seed")
    study = parser.add_argument_group("the paper's study", "Variants of the method (Sec. 4); ablate.py runs them.")
    study.add_argument("--stop_gradient", action=argparse.BooleanOptionalAction, default=True, help="Sec. 4.1")
    study.add_argument("--predictor", choices=simsiam.PREDICTORS, default="learned", help="Sec. 4.2")
    study.add_argument("--fix_pred_lr", action="store_true", help="keep the predictor's rate constant (Sec. 4.2)")
    study.add_argument("--head_bn", choices=simsiam.HEAD_BN, default="default", help="batch norm in heads (Sec. 4.4)")
    study.add_argument("--similarity", choices=DISTANCES, default="cosine", help="similarity of p and z (Sec. 4.5)")
    study.add_argument("--symmetry", choices=LOSSES, default="symmetric", help="symmetry of the loss (Sec. 4.6)")
    study.add_argument("--warmup_epochs", type=whole_number(0), default=0, metavar="N", help="epochs of linear warm-up")
    study.add_argument("--crop_scale", type=fraction, default=SCALE[0], metavar="MIN", help="smallest area of a crop")
    device = add_device_options(parser, compiled=True)
    device.add_argument("--deterministic", action="store_true", help="bit-reproducible on CUDA too, slower")
    device.add_argument("--sync_bn", action=argparse.BooleanOptionalAction, default=True, help="with torchrun, on GPUs")
    run = add_run_options(parser)
    run.add_argument("--eval_freq", type=whole_number(1), default=10, metavar="N", help="epochs between kNN monitors")
    run.add_argument("--save_freq", type=whole_number(1), default=10, metavar="N", help="epochs between checkpoints")
    run.add_argument("--untrained", action="store_true", help="evaluate the initial weights too, as epoch 0")
    return parser


def build(args, device):
    """Model, optimizer, and the loss scaler, which does nothing unless the precision is fp16: a dict by name."""
    torch.manual_seed(args.seed)
    model = simsiam.SimSiam(
        simsiam.ARCHS[args.arch](args.width), args.dim, args.pred_dim, args.num_proj_layers, args.head_bn,
        args.predictor, args.stop_gradient,
    ).to(device, memory_format=memory_layout(device, args.width, args.batch_size))
    if processes > 1 and args.bn_batch == args.batch_size:
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    groups = [model.parameters()]
    if args.fix_pred_lr:
        groups = [(*model.backbone.parameters(), *model.projector.parameters()), model.predictor.parameters()]
    optimizer = torch.optim.SGD([{"params": group} for group in groups], args.learning_rate, args.momentum,
                                weight_decay=args.weight_decay, fused=True)
    for parameter in model.parameters():  # a first step that fp16's scaler skips would leave them allocated, not filled
        if parameter.requires_grad:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    return {"model": model, "optimizer": optimizer, "scaler": scaler}


def make_forward(args, model, device, steps):
    """The forward pass of a step: images uint8 [B, 3, H, W], the size of the views and the Draws of both -> loss and
    feature_std, float32 scalars. Compiled as one function on CUDA, once for each size, if the run is long enough."""
    precision, layout = autocast(device, args.precision), memory_layout(device, args.width, args.batch_size)
    loss_function = partial(LOSSES[args.symmetry], distance=DISTANCES[args.similarity])

    def forward(images, size, draws1, draws2, *second_pair):
        x1, x2 = apply_two_views(images, draws1, draws2, size)                      # [B, 3, size, size] each
        x1, x2 = x1.contiguous(memory_format=layout), x2.contiguous(memory_format=layout)
        with precision():
            p1, p2, z1, z2 = model(x1, x2)                                          # [B, dim] each
        loss, std = loss_function(p1, p2, z1, z2), simsiam.feature_std(z1).detach()
        if second_pair:  # asymmetric_2x: the mean over two pairs of views
            loss2, std2 = forward(images, size, *second_pair)
            loss, std = (loss + loss2) / 2, (std + std2) / 2
        return loss, std

    if processes > 1 and args.bn_batch == args.batch_size and args.compile is None:
        return average_gradients(model, forward)  # a graph would end at each synchronized batch norm
    return average_gradients(model, compile_for(device, forward, args.compile, steps))


def pretrain(args, device, data, parts, run, state, stop, begin):
    """Train from `state` to the last epoch, or until a stop is requested. Returns the exit code."""
    steps = len(data.train_images) // args.batch_size             # the last partial batch is dropped
    batch, share = args.batch_size, args.batch_size // processes  # images of a step, and of this process in it
    model, optimizer, scaler = parts.values()
    forward, agreement = make_forward(args, model, device, args.epochs * steps), Agreement(stop)
    with Progress(args.epochs, state["epoch"] + state["step"] / steps) as progress:
        for epoch in range(state["epoch"], args.epochs):
            rate = cosine(args.learning_rate, epoch, args.epochs, args.warmup_epochs)
            optimizer.param_groups[0]["lr"] = rate  # the second group of --fix_pred_lr keeps its rate
            order, *draws = draw_epoch(args, epoch, data.train_images, device)
            size = view_sizes(args.view_size, args.epochs)[epoch]
            first = done = state["step"]
            metrics = torch.zeros(steps, 2, device=device)                          # loss and std of each step
            metrics[:done] = state["metrics"]
            start = time.perf_counter() - state["seconds"]
            model.train()

            # ---- the training step
            for step in range(first, steps):
                if agreement.reached():
                    break
                rows = slice(step * batch + rank * share, step * batch + (rank + 1) * share)
                images = data.train_images[order[rows]].to(device, non_blocking=True)
                loss, std = forward(images, size, *(view.rows(rows) for view in draws))
                optimizer.zero_grad(set_to_none=True)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                metrics[step] = torch.stack((loss.detach(), std))                   # stays on the device
                done = step + 1
                progress.advance(epoch + done / steps)

            # ---- once an epoch, by the first process
            state = {"epoch": epoch, "step": done, "metrics": metrics[:done].cpu(),  # the one synchronization
                     "seconds": time.perf_counter() - start}
            average(state["metrics"][first:])                                       # over the processes
            share_buffers(model)
            state, code = on_first(end_epoch, args, device, data, parts, run, state, rate, stop, begin, progress)
            if code is not None:
                return code
    return 0


def end_epoch(args, device, data, parts, run, state, rate, stop, begin, progress):
    """After the last step of an epoch, or a stop: kNN, the log's line, checkpoint, figures. Returns the state to go on
    from, the same one if a stop interrupts the kNN, and the exit code if the run ends here, else None."""
    model, _, scaler = parts.values()
    epoch, steps, seen = state["epoch"] + 1, len(data.train_images) // args.batch_size, None
    bad = (~state["metrics"][:, 0].isfinite()).nonzero().flatten().tolist()
    if bad or not all(value.isfinite().all() for value in model.state_dict().values()):
        what = f"step {bad[0] + 1} of {steps}: the loss" if bad else f"step {state['step']} of {steps}: a weight"
        return state, fail("main.py", f"epoch {epoch}, {what} is not finite; the checkpoint of epoch {run.saved_epoch} "
                           f"is kept; start a new run with a lower --learning_rate ({args.learning_rate:g})")
    evaluate = epoch % args.eval_freq == 0 or epoch == args.epochs
    if state["step"] == steps:
        with contextlib.suppress(Stopped):
            seen = monitor(model.backbone, data, autocast(device, args.precision), stop.check) if evaluate else {}
    if seen is not None:
        loss, std = state["metrics"].double().mean(dim=0).tolist()
        views = (4 if args.symmetry == "asymmetric_2x" else 2) * steps * args.batch_size
        record = {"epoch": epoch, "loss": loss, "std": std, "lr": rate, "seconds": round(state["seconds"], 3),
                  "views_per_s": round(views / state["seconds"], 1), "time": round(time.monotonic() - begin, 3)}
        run.log(record | ({"loss_scale": scaler.get_scale()} if scaler.is_enabled() else {}) | seen)
        if warning := log.collapse_warning(run.records, args.bn_batch, args.head_bn):
            warn(warning)
        progress.advance(epoch, log.figures(run.records), keep=evaluate)
        state = new_epoch(epoch)
    stopping, finished = stop.requested, state["epoch"] == args.epochs
    due = state["step"] == 0 and state["epoch"] % args.save_freq == 0
    if stopping or finished or due and time.monotonic() - run.saved_time >= SAVE_SECONDS:
        state["time"] = time.monotonic() - begin
        run.attempt(run.write, run_files(vars(args), device, state, **parts), state["epoch"])
    if stopping or evaluate:
        run.draw(draw_run)
    if run.unsaved and (stopping or finished):
        return state, fail("main.py", f"{run.unsaved}; everything after epoch {run.saved_epoch} is lost")
    if stopping and not finished:
        command = "python main.py" if processes == 1 else "torchrun ... main.py"
        say(f"Interrupted in epoch {epoch}. Resume with: {command} --resume {shlex.quote(run.path(CHECKPOINT))}")
        return state, stop.exit_code
    return state, None


def cosine(rate, epoch, epochs, warmup=0):
    """Learning rate of an epoch, counted from 0; the first one after a linear warm-up gets the full rate."""
    if epoch < warmup:
        return rate * (epoch + 1) / (warmup + 1)
    return rate * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def draw_epoch(args, epoch, images, device):
    """Everything random in an epoch, a function of (seed, epoch): the order of the images, int64 [steps * batch_size]
    on their device, and the Draws of each view of each image, on the device of the run."""
    generator = epoch_generator(args.seed, epoch, device)
    count = len(images) // args.batch_size * args.batch_size
    views = 4 if args.symmetry == "asymmetric_2x" else 2
    order = torch.randperm(len(images), generator=generator, device=device)[:count].to(images.device)
    draws = [draw_views(count, generator, *images.shape[2:], (args.crop_scale, SCALE[1])) for _ in range(views)]
    return order, *draws


def prepare(args):
    """What each process has for itself: device, data, model and optimizer, by the settings, which it completes."""
    device = select_device(args.gpu)
    set_determinism(args.deterministic)
    args.precision = select_precision(args.precision, device)
    if args.predictor != "learned" and args.fix_pred_lr:
        raise ValueError(f"--fix_pred_lr: with --predictor {args.predictor} no predictor is trained")
    if args.warmup_epochs >= args.epochs:
        raise ValueError(f"--warmup_epochs {args.warmup_epochs}: the run has {args.epochs} epochs")
    args.learning_rate = LR_PER_256 * args.batch_size / 256 if args.learning_rate is None else args.learning_rate
    data = load_dataset(args.dataset, args.data_root, device, **data_options(vars(args)))
    args.image_size = data.train_images.shape[2]
    args.view_size = str(args.image_size) if args.view_size is None else args.view_size
    view_sizes(args.view_size, args.epochs)  # raises for a bad schedule
    args.data = data.digest()
    if args.batch_size > len(data.train_images):
        raise ValueError(f"--batch_size {args.batch_size}: there are {len(data.train_images)} training images")
    if args.batch_size % processes or args.batch_size < 2 * processes:
        raise ValueError(f"--batch_size {args.batch_size}: not a multiple of {processes} from {2 * processes} on")
    together = processes == 1 or args.sync_bn and device.type == "cuda"  # PyTorch has no SyncBatchNorm for CPUs
    args.bn_batch = args.batch_size if together else args.batch_size // processes
    return device, data, build(args, device)


def set_up(parser, args, argv):
    """Everything that can fail because of the user's input: settings, device, data, model, folder, state. The run's
    folder belongs to the first process: in the others, run is None."""
    args, folder, state = on_first(find_run, parser, args, argv, CHECKPOINT, MAY_CHANGE)
    device, data, parts = in_turns(prepare, args)
    if state is not None and state["config"]["data"] != args.data:
        raise ValueError(f"--data_root {args.data_root}: not the training images of the run to resume")
    if processes > 1:
        order, *_ = draw_epoch(args, state["epoch"] if state else 0, data.train_images, device)
        require_same("other training images", args.data)
        require_same("another order of the images (another kind of GPU?)", order.tolist())
    if state is None:
        state = new_epoch(0) | {"time": 0.0}
        files = run_files(vars(args), device, state, **parts)
        run = on_first(start_run, ["main.py", *argv], folder, args, device, files, share=False)
    else:
        restore(state, device, model=partial(simsiam.load_tensors, parts["model"]),
                optimizer=parts["optimizer"].load_state_dict,
                scaler=lambda saved: saved and parts["scaler"].load_state_dict(saved))  # empty unless fp16
        run = on_first(Run, folder, state["epoch"], args.tensorboard, share=False)
    return args, device, data, parts, run, state


def start(args, device, data, model, run, state, stop):
    """Say what is trained. Of a new run, draw views.png, and with --untrained log kNN with the initial weights."""
    if state["epoch"] == args.epochs:
        return info(f"{run.folder}: already finished, epoch {args.epochs} of {args.epochs}")
    held_out = f" (and {args.validation} held out)" if args.validation else ""
    info(f"{run.folder}: {args.arch}, width {args.width}, {args.dataset}, {len(data.train_images)} images{held_out} of "
         f"{args.image_size} pixels, {describe(device)}, {describe_precision(args.precision, device)}")
    if device.type == "cpu" and args.width > 32:
        info("No GPU in use. Two CPU cores train 50 to 190 views/s at width 64; see --help for a smaller network.")
    if args.bn_batch < args.batch_size:
        info(f"Batch norm: statistics of the {args.bn_batch} images of each process, not synchronized.")
    if not data.has_classes:
        info("No labels of several classes: no kNN; effective_rank is logged instead (docs/data.md).")
    if args.image_size > 128:
        info(f"The stem for small images keeps {args.image_size} pixels: {(args.image_size / 32)**2:.0f} times the "
             "arithmetic of 32.")
    if state["epoch"] or state["step"]:
        return
    order, *draws = draw_epoch(args, 0, data.train_images, device)
    images, pair = data.train_images[order[:8]].to(device), [view.rows(slice(8)) for view in draws[:2]]
    run.draw(plot_views, images, *apply_two_views(images, *pair, args.image_size), *pair)
    if args.untrained and not run.records:
        shutil.copyfile(run.path(BACKBONE), run.path(UNTRAINED))
        with contextlib.suppress(Stopped):
            run.log({"epoch": 0, **monitor(model.backbone, data, autocast(device, args.precision), stop.check)})


def main(argv=None):
    begin, argv = time.monotonic(), sys.argv[1:] if argv is None else argv
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        with joined(), contextlib.ExitStack() as stack:
            with parser.user_errors():
                args, device, data, parts, run, state = set_up(parser, args, argv)
            if run:
                stack.enter_context(contextlib.closing(run))
            stop = stack.enter_context(StopRequest(args.max_minutes, begin))
            on_first(start, args, device, data, parts["model"], run, state, stop)
            code = pretrain(args, device, data, parts, run, state, stop, begin - state["time"])
    except (MemoryError, torch.OutOfMemoryError) as error:
        return fail("main.py", f"out of memory ({str(error).split('. ')[0]}); lower --batch_size or --width")
    if code == 0 and run and run.saved_epoch == args.epochs:
        say(f"{run.folder}: {log.figures(run.records)}")
        info(f"Figures: {run.path(REPORT)}")
        if data.has_classes:
            info(f"Next: {evaluation_command(vars(args), run.folder, device.type == 'cpu')}")
    return code


if __name__ == "__main__":
    run_script(main, torchrun=True)
