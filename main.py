"""SimSiam pre-training (arXiv 2011.10566) on one GPU or CPU. The defaults are the paper's CIFAR-10 recipe:

    python main.py --data_root DIR --arch resnet18 --learning_rate 0.06 --epochs 800 --weight_decay 5e-4 --momentum 0.9 --batch_size 512 --gpu 0

Without a GPU, on real CIFAR-10 (92 minutes on one CPU core; kNN 62 %) and on the built-in shapes (2 to 4 minutes on two; 69 to 75 %):

    python main.py --data_root data --width 16 --batch_size 128 --learning_rate 0.06 --epochs 24
    python main.py --dataset shapes --width 8 --batch_size 64 --learning_rate 0.05 --dim 512 --pred_dim 128 --epochs 8
"""
import argparse
import math
import os
import shlex
import shutil
import time
from functools import partial

from utils.cpu import prepare_cpu  # before torch

import torch

from simsiam import (
    ARCHS, HEAD_BN, PREDICTORS, asymmetric_loss, cross_entropy, feature_std, load_tensors, make_simsiam, negative_cosine, simsiam_loss,
)
from utils import checkpoint, log
from utils.augment import SCALE, apply_two_views, apply_views, blurred_views, draw_blur, draw_views, epoch_generator
from utils.board import require_tensorboard
from utils.cli import Parser, complain, probability, real_number, run, share, warn, whole_number
from utils.data import DATASETS, batches, load_dataset
from utils.device import autocast, describe, memory_layout, require_memory, select_device, select_precision
from utils.graph import GraphedStep, set_rate
from utils.knn import knn_accuracy
from utils.metrics import collapse_std
from utils.plot_views import plot_views
from utils.progress import Progress, say, set_quiet, tell
from utils.report import REPORT, draw_run, evaluation_command, write_report
from utils.resume import FORMAT, PRETRAINING, check_unchanged, find_resumed, machine, restore, resumed_settings, warn_if_elsewhere
from utils.run import BACKBONE, CHECKPOINT, UNTRAINED, RunWriter, new_run_folder, write_config
from utils.stop import StopRequest

DISTANCES = {"cosine": negative_cosine, "cross_entropy": cross_entropy}
LOSSES = {"symmetric": simsiam_loss, "asymmetric": asymmetric_loss, "asymmetric_2x": asymmetric_loss}
LR_PER_256 = 0.03    # the paper's rate for a batch of 256; it scales linearly (appendix D)
COLLAPSE_EPOCHS = 3  # in a row with std below collapse_std, after which it is said


def make_parser():
    parser = Parser(prog="main.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="shapes is built in and needs no files")
    data.add_argument("--train_size", type=whole_number(2), metavar="N", help="the first N training pictures only (default: all)")
    data.add_argument("--test_size", type=whole_number(1), metavar="N", help="the first N test pictures only (default: all)")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    model.add_argument("--width", type=whole_number(1), default=64, metavar="CHANNELS", help="of the first stage; 16 has 1/16 of the arithmetic")
    model.add_argument("--dim", type=whole_number(2), default=2048, metavar="D", help="width, in numbers, of the projector and of the outputs z, p")
    model.add_argument("--pred_dim", type=whole_number(1), default=512, metavar="D", help="width, in numbers, of the predictor's bottleneck")
    model.add_argument("--num_proj_layers", type=int, choices=(2, 3), default=2, help="layers of the projector; 2: CIFAR, 3: ImageNet")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=whole_number(1), default=800, metavar="N", help="length of the run and of the cosine schedule")
    training.add_argument("--batch_size", type=whole_number(2), default=512, metavar="N", help="pictures a step")
    training.add_argument("--learning_rate", type=real_number, metavar="LR", help=f"initial rate (default: {LR_PER_256} * batch_size / 256)")
    training.add_argument("--momentum", type=real_number, default=0.9, metavar="M", help="of SGD")
    training.add_argument("--weight_decay", type=real_number, default=5e-4, metavar="WD", help="of SGD, on all parameters")
    training.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the weights, the order and the views")

    study = parser.add_argument_group("the paper's study", "Parts of the method to change, one at a time; ablate.py runs them. Sections and tables are the paper's.")
    study.add_argument("--stop_gradient", action=argparse.BooleanOptionalAction, default=True, help="of the targets z (Sec. 4.1, Figure 2; default: on)")
    study.add_argument("--predictor", choices=PREDICTORS, default="learned", help="fixed: at its random beginning; none: p is z (Sec. 4.2, Table 1)")
    study.add_argument("--fix_pred_lr", action="store_true", help="keep the predictor's rate, without decay (Sec. 4.2, Table 1c)")
    study.add_argument("--head_bn", choices=HEAD_BN, default="default", help="batch norms in the heads; hidden: of their hidden layers; default: and of the projector's output; all: and of the predictor's (Sec. 4.4, Table 3)")
    study.add_argument("--similarity", choices=DISTANCES, default="cosine", help="of p and z (Sec. 4.5)")
    study.add_argument("--symmetry", choices=LOSSES, default="symmetric", help="of the loss; asymmetric: view 1 predicts view 2; asymmetric_2x: of two pairs a picture (Sec. 4.6)")
    study.add_argument("--warmup_epochs", type=whole_number(0), default=0, metavar="N", help="of the rate, linearly; the paper has 10 of 100 for batches of 1,024 and more (Sec. 4.3)")
    study.add_argument("--crop_scale", type=share, default=SCALE[0], metavar="MIN", help="smallest share of the picture's area in a view (appendix A)")
    study.add_argument("--blur", type=probability, default=0.0, metavar="P", help="probability of Gaussian blur in a view; on ImageNet 0.5 (appendix A)")
    study.add_argument("--zero_init_residual", action="store_true", help="begin each residual block as its shortcut")

    device = parser.add_argument_group("device")
    device.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    device.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 or fp16 by the GPU, fp32 on the CPU (on newer GPUs fp32 has PyTorch's default, TF32 in the convolutions)")
    device.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the views and the forward pass (default: on with CUDA, off on the CPU)")
    device.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=False, help="replay each step as one CUDA graph (default: off)")
    device.add_argument("--deterministic", action="store_true", help="bit-reproducible on CUDA too, slower")

    folder = parser.add_argument_group("run")
    folder.add_argument("--eval_freq", type=whole_number(1), default=10, metavar="EPOCHS", help="epochs from one kNN evaluation to the next")
    folder.add_argument("--save_freq", type=whole_number(1), default=10, metavar="EPOCHS", help="epochs from one checkpoint to the next")
    folder.add_argument("--max_minutes", type=real_number, metavar="M", help="stop after M minutes as Ctrl-C does, with exit code 0 (default: no limit)")
    folder.add_argument("--exp_dir", default="experiments", metavar="DIR", help="where the run's folder is made")
    folder.add_argument("--trial", metavar="NAME", help="the run folder's name (default: the next free number)")
    folder.add_argument("--resume", metavar="auto|PATH", help="go on with a checkpoint; auto: of --trial, else of the newest run, else start (default: a new run)")
    folder.add_argument("--tensorboard", action=argparse.BooleanOptionalAction, default=False, help="scalars and figures for TensorBoard too, in the run's folder (needs the package; default: off)")
    folder.add_argument("--quiet", action="store_true", help="print the result, warnings and errors only")
    folder.add_argument("--untrained", action="store_true", help="measure the untrained network too: its kNN as epoch 0, its weights as untrained.pt")
    return parser


# ---------------------------------------------------------------------------------------------------
# One training step


def make_train_step(
    model, optimizer, scaler, precision_context, compiled, layout=torch.channels_last, loss_function=simsiam_loss, make_views=apply_views, pairs=1,
):
    """The step as a function: images uint8 [B, 3, H, W] and the Draws of both views -> float32 [3], on the device: the
    loss, the std, and 1 where fp16's loss scaler skipped the update.

    precision_context makes the autocast context; scaler is a GradScaler, enabled for fp16 only; layout is the
    memory format of the views and the model. For the paper's study: loss_function(p1, p2, z1, z2), make_views, and pairs,
    2 for a step that takes the Draws of two pairs of views.
    """

    def views_to_loss(images, draws1, draws2):
        views = apply_two_views(images, draws1, draws2, make_views)
        x1, x2 = (x.contiguous(memory_format=layout) for x in views)  # [B, 3, 32, 32] each
        with precision_context():
            p1, p2, z1, z2 = model(x1, x2)                            # [B, dim] each
        return loss_function(p1, p2, z1, z2), feature_std(z1)

    if pairs == 2:
        views_to_loss = mean_of_two_pairs(views_to_loss)
    if compiled:
        views_to_loss = torch.compile(views_to_loss, dynamic=False)

    def train_step(images, *draws):
        optimizer.zero_grad(set_to_none=True)  # before the forward pass: its peak memory is without gradients
        loss, std = views_to_loss(images, *draws)
        scale = scaler.scale(torch.ones_like(std))
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        skipped = scaler.scale(torch.ones_like(std)) < scale  # it lowers its scale when it skips
        return torch.stack((loss.detach(), std, skipped.float()))

    return train_step


def mean_of_two_pairs(views_to_loss):
    """The function of images and the Draws of one pair of views as one of those of two pairs: the mean of what it gives."""
    def pairs_to_loss(images, draws1, draws2, draws3, draws4):
        first, second = views_to_loss(images, draws1, draws2), views_to_loss(images, draws3, draws4)
        return [(a + b) / 2 for a, b in zip(first, second)]

    return pairs_to_loss


# ---------------------------------------------------------------------------------------------------
# What an epoch needs


def cosine_rate(rate, epoch, epochs, warmup=0):
    """The learning rate of an epoch, counted from 0: the first after `warmup` epochs of linear growth has the full rate, the
    last more than 0."""
    if epoch < warmup:
        return rate * (epoch + 1) / (warmup + 1)
    return rate * 0.5 * (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup)))


def draw_epoch(seed, epoch, size, count, image_shape, device, views=2, scale=SCALE, blur_p=0.0):
    """Everything random in an epoch, a function of (seed, epoch): `count` of `size` picture numbers in
    random order, int64 [count], and the Draws of the views of each. Blur comes last: all else is drawn as without."""
    generator = epoch_generator(seed, epoch, device)
    order = torch.randperm(size, generator=generator, device=device)[:count]
    draws = [draw_views(count, generator, *image_shape, scale) for _ in range(views)]
    if blur_p:
        draws = [draw_blur(of_view, generator, blur_p) for of_view in draws]
    return order, *draws


def is_finite(model):
    """Whether all weights and buffers are finite numbers."""
    return bool(torch.stack([value.isfinite().all() for value in model.state_dict().values()]).all())


def backbone_state(model):
    return {name: value.cpu().contiguous() for name, value in model.backbone.state_dict().items()}


# ---------------------------------------------------------------------------------------------------
# The run


def build(args, device, state):
    """The model, its optimizer and fp16's loss scaler on the device; from a checkpoint's state, or new for None."""
    def make_model():
        return make_simsiam(
            ARCHS[args.arch](args.width), args.dim, args.pred_dim, args.num_proj_layers,
            args.head_bn, args.predictor, args.stop_gradient, args.zero_init_residual,
        )

    sizes = f"--width {args.width} --dim {args.dim} --pred_dim {args.pred_dim}"
    try:
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in make_model().parameters())
    except RuntimeError as error:  # more than 2^63 bytes
        raise ValueError(f"{sizes}: no machine has the memory for it") from error
    require_memory(3 * 4 * count, device, f"{sizes}: weights, gradients and momenta")

    torch.manual_seed(args.seed)
    model = make_model()
    model.to(device, memory_format=memory_layout(device, args.width, args.batch_size))
    groups = [model.parameters()]
    if args.fix_pred_lr:
        groups = [(*model.backbone.parameters(), *model.projector.parameters()), model.predictor.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": group} for group in groups], args.learning_rate, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state is not None:
        restore(
            state, model=partial(load_tensors, model), optimizer=optimizer.load_state_dict, scaler=scaler.load_state_dict
        )
    return model, optimizer, scaler


def pretrain(args, device, data, model, optimizer, scaler, writer, state, stop, begin):
    """Train from `state`, where a checkpoint is or new ones begin, to the last epoch, or until `stop`, a StopRequest,
    has a signal. begin: when the script did, as time.monotonic(). Returns the exit code."""
    precision_context = autocast(device, args.precision)
    make_views = blurred_views if args.blur else apply_views
    pairs = 2 if args.symmetry == "asymmetric_2x" else 1
    train_step = make_train_step(
        model, optimizer, scaler, precision_context,
        device.type == "cuda" if args.compile is None else args.compile,
        memory_layout(device, args.width, args.batch_size),
        partial(LOSSES[args.symmetry], distance=DISTANCES[args.similarity]), make_views, pairs,
    )
    if args.cuda_graph:
        train_step = GraphedStep(train_step, model, optimizer)

    size, batch = len(data.train_images), args.batch_size
    steps = size // batch  # the last partial batch of an epoch is dropped
    draw = partial(
        draw_epoch, args.seed, size=size, count=steps * batch, image_shape=data.train_images.shape[2:], device=device,
        views=2 * pairs, scale=(args.crop_scale, SCALE[1]), blur_p=args.blur,
    )

    if state["epoch"] == state["step"] == 0:
        order, *draws = draw(0)
        shown = slice(0, 8)
        pictures, pair = next(batches(data.train_images, order[shown], len(order[shown]), device)), [of_view.rows(shown) for of_view in draws[:2]]
        writer.draw(plot_views, pictures, *apply_two_views(pictures, *pair, make_views), *pair)
        writer.show_progress(write_report, write_report)
        if args.untrained:
            writer.attempt(checkpoint.save, writer.path(UNTRAINED), backbone_state(model))
            with stop.at_once():
                knn1, knn200 = knn_accuracy(model.backbone, data, precision_context)
                writer.log({"epoch": 0, "knn1": knn1, "knn200": knn200})
                say(f"untrained: kNN k=1 {knn1:.2f} %, k=200 {knn200:.2f} %")

    collapsed, least_std = 0, collapse_std(batch, args.head_bn)  # epochs in a row
    value, _ = log.last(writer.read_log(), "knn200")
    knn = "" if value is None else f"kNN {value:.1f} %, "  # the newest
    with Progress(args.epochs, state["epoch"] + state["step"] / steps) as progress:
        for epoch in range(state["epoch"], args.epochs):
            rate = cosine_rate(args.learning_rate, epoch, args.epochs, args.warmup_epochs)
            set_rate(optimizer, rate)
            order, *draws = draw(epoch)
            step = state["step"]
            metrics = torch.zeros(steps, 3, device=device)  # of each step: loss, std, skipped
            metrics[:step] = state["metrics"]
            start = time.perf_counter()
            images = batches(data.train_images, order[step * batch:], batch, device)
            model.train()

            # ---- the step: slice, augment, forward, loss, backward, update
            while step < steps and stop.signal is None:
                rows = slice(step * batch, (step + 1) * batch)
                metrics[step] = train_step(next(images), *(of_view.rows(rows) for of_view in draws))
                step += 1
                progress.update(epoch + step / steps)
            # ----

            metrics = metrics[:step].cpu()  # the epoch's one synchronization
            seconds = state["seconds"] + time.perf_counter() - start
            if not metrics[:, 0].isfinite().all():
                bad = metrics[:, 0].isfinite().tolist().index(False)
                return give_up(args, writer, epoch, bad, steps, f"the loss is {metrics[bad, 0]:g}")

            state = {"epoch": epoch, "step": step, "metrics": metrics, "seconds": seconds, "wall_seconds": state["wall_seconds"]}
            if step == steps:
                mean_loss, mean_std, _ = metrics.double().mean(dim=0).tolist()
                speed = len(draws) * steps * batch / seconds
                record = {
                    "epoch": epoch + 1, "loss": mean_loss, "std": mean_std, "lr": rate,
                    "seconds": round(seconds, 3), "views_per_s": round(speed, 1),
                }
                if scaler.is_enabled():
                    record["skipped_steps"] = int(metrics[:, 2].sum())
                line = f"loss {mean_loss:.4f}, std {mean_std:.3f}, {speed:,.0f} views/s"
                collapsed = collapsed + 1 if mean_std < least_std else 0
                if collapsed == COLLAPSE_EPOCHS:
                    warn(
                        f"epoch {epoch + 1}: std {mean_std:.4f}, for {collapsed} epochs below {least_std:.2g} (healthy: about 1): "
                        "the outputs have all but collapsed to one, whatever the loss says. " + cause_of_collapse(args)
                    )
                measured = (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs
                if measured and stop.signal is None:
                    with stop.at_once():
                        record["knn1"], record["knn200"] = knn_accuracy(model.backbone, data, precision_context)
                        line += f", kNN k=1 {record['knn1']:.2f} %, k=200 {record['knn200']:.2f} %"
                        knn = f"kNN {record['knn200']:.1f} %, "
                if not measured or "knn200" in record:  # else stopped in the kNN, which the resumed run makes
                    now = time.monotonic()
                    record["wall_seconds"], begin = round(state["wall_seconds"] + now - begin, 3), now
                    progress.epoch(epoch + 1, line, measured, f"loss {mean_loss:.3f}, std {mean_std:.2f}, {knn}{speed:,.0f} views/s")
                    writer.log(record)
                    state = new_epoch(epoch + 1)

            finished, stopped = state["epoch"] == args.epochs, stop.signal is not None
            if stopped or finished or (state["step"] == 0 and state["epoch"] % args.save_freq == 0):
                if not is_finite(model):
                    return give_up(args, writer, epoch, step - 1, steps, "after it a weight is not a finite number")
                so_far = {**state, "wall_seconds": state["wall_seconds"] + time.monotonic() - begin}
                writer.save(run_files(args, device, so_far, model, optimizer, scaler), state["epoch"])
            if stopped or finished:
                writer.draw(draw_run)
            else:
                writer.show_progress(draw_run, write_report)
            if (stopped or finished) and writer.unsaved is not None:
                complain(f"main.py: error: {writer.unsaved}; what came after epoch {writer.saved_epoch} is lost")
                return 1
            if stopped and not finished:
                tell(f"stopped in epoch {epoch + 1}; to go on: python main.py --resume {shlex.quote(writer.path(CHECKPOINT))}")
                return stop.exit_code
    return 0


def new_epoch(epoch):
    """Where a run stands before the first step of an epoch, counted from 0."""
    return {"epoch": epoch, "step": 0, "metrics": torch.zeros(0, 3), "seconds": 0.0, "wall_seconds": 0.0}


def run_files(args, device, state, model, optimizer, scaler):
    """backbone.pt, all that evaluation needs, and checkpoint.pt, all that a resumed run needs."""
    return {
        BACKBONE: backbone_state(model),
        CHECKPOINT: {
            **state, "format": FORMAT, "config": vars(args), "machine": machine(device),
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
        },
    }


def cause_of_collapse(args):
    """Why a run's outputs may have collapsed, in words."""
    if not args.stop_gradient or args.predictor == "none":
        return "Without stop-gradient or predictor that is what happens (paper, Sec. 4.1 and 4.2)"
    return (
        f"The usual cause is a rate too high for the batch: lower --learning_rate ({args.learning_rate:g}) or raise --batch_size ({args.batch_size})"
    )


def give_up(args, writer, epoch, step, steps, what):
    """Say that training has diverged in a step, counted from 0. Returns the exit code."""
    what = f"epoch {epoch + 1}, step {step + 1} of {steps}: {what}"
    lower = f"--learning_rate ({args.learning_rate:g})"
    if args.precision != "fp32":
        lower += f", or take more than --precision {args.precision}"
    complain(
        f"main.py: error: {what}; {writer.path(CHECKPOINT)} is kept as of epoch {writer.saved_epoch}; start a new run with a lower {lower}"
    )
    writer.draw(draw_run, f"Ended in {what}. Start a new run with a lower {lower}.")
    return 1


# ---------------------------------------------------------------------------------------------------
# From the command line to the run


def outcome(folder):
    """What a finished run has come to, in words."""
    try:
        return log.summarize(folder)
    except (OSError, ValueError) as error:  # somebody removed the log
        return f"done, but {error}"


def start(args, device, model, optimizer, scaler, folder):
    """Write what a new run's folder has before the first step, None: into a new folder; returns its RunWriter and state."""
    made = folder is None
    if made:
        folder = new_run_folder(args.exp_dir, args.trial)
    writer, state = RunWriter(folder, board=args.tensorboard), new_epoch(0)
    try:
        write_config(folder, vars(args), device)
        writer.write(run_files(args, device, state, model, optimizer, scaler), state["epoch"])
    except OSError:
        if made:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    return writer, state


def main(argv=None):
    begin = time.monotonic()
    parser = make_parser()
    args = parser.parse_args(argv)
    set_quiet(args.quiet)
    with parser.user_errors():
        folder, state = None, None
        if args.resume is not None:
            folder, state = find_resumed(PRETRAINING, args.resume, args.exp_dir, args.trial)
        if state is not None:
            args = resumed_settings(PRETRAINING, parser, argv, state["config"])
            if state["epoch"] >= args.epochs:
                tell(f"{folder}: already done, epoch {state['epoch']} of {args.epochs}")
                return 0
        elif args.resume is not None:
            tell(f"nothing to resume in {args.exp_dir}: a new run")
        device = select_device(args.gpu)
        args.precision = select_precision(args.precision, device)
        if args.cuda_graph and (device.type != "cuda" or args.precision == "fp16"):
            raise ValueError("--cuda_graph needs a CUDA GPU and --precision bf16 or fp32")
        if args.tensorboard:
            require_tensorboard()
        if device.type == "cpu":
            prepare_cpu()
        if args.predictor != "learned" and args.fix_pred_lr:
            raise ValueError(f"--fix_pred_lr with --predictor {args.predictor}: there is no predictor that learns")
        if args.warmup_epochs >= args.epochs:
            raise ValueError(f"--warmup_epochs {args.warmup_epochs}: there are {args.epochs} epochs")
        if args.learning_rate is None:
            args.learning_rate = LR_PER_256 * args.batch_size / 256
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        if args.batch_size > len(data.train_images):
            raise ValueError(f"--batch_size {args.batch_size}: there are {len(data.train_images)} training pictures")

        if args.deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
        torch.backends.cudnn.benchmark = not args.deterministic
        model, optimizer, scaler = build(args, device, state)
        if state is None:
            writer, state = start(args, device, model, optimizer, scaler, folder)
        else:
            writer = RunWriter(folder, state["epoch"], args.tensorboard)
            check_unchanged(state)

    say(f"{writer.folder}: {args.arch}, width {args.width}, {args.dataset}, {len(data.train_images)} pictures, {describe(device)}, {args.precision}")
    warn_if_elsewhere(state, device)
    if device.type == "cpu":
        say(
            "No GPU in use. Two CPU cores train 50 to 115 views/s at width 64 and 600 to 1,000 at width 16; an epoch "
            f"is {2 * len(data.train_images):,} views. --width 16 and --train_size 5000 make it small."
        )
    try:
        with StopRequest(args.max_minutes, begin) as stop:
            code = pretrain(args, device, data, model, optimizer, scaler, writer, state, stop, begin)
    except (MemoryError, torch.OutOfMemoryError) as error:
        reason = str(error).split(". ")[0]
        complain(f"main.py: error: out of memory ({reason}); lower --batch_size or --width")
        writer.draw(draw_run, f"Ended out of memory ({reason}).")
        return 1
    if code == 0 and stop.signal is None:
        tell(f"{writer.folder}: {outcome(writer.folder)}")
        say(f"figures and all else on one page: {writer.path(REPORT)}")
        say(f"done; next: {evaluation_command(vars(args), writer.folder, device.type == 'cpu')}")
    return code


if __name__ == "__main__":
    run(main)
