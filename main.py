"""SimSiam pre-training (arXiv 2011.10566) on one GPU or CPU. The defaults are the paper's CIFAR-10 recipe:

    python main.py --data_root DIR --arch resnet18 --learning_rate 0.06 --epochs 800 --weight_decay 5e-4 --momentum 0.9 --batch_size 512 --gpu 0

Without a GPU, on real CIFAR-10 (92 minutes on one CPU core; kNN 62 %) and on the built-in shapes (2 minutes on two; 69 to 74 %):

    python main.py --data_root data --width 16 --batch_size 128 --learning_rate 0.06 --epochs 24
    python main.py --dataset shapes --width 8 --batch_size 64 --learning_rate 0.05 --dim 512 --pred_dim 128 --epochs 8
"""
import argparse
import math
import os
import shlex
import sys
import time

from utils.cpu import prepare_cpu  # before torch

import torch
from tqdm import tqdm

from simsiam import ARCHS, SimSiam, feature_std, simsiam_loss
from utils import checkpoint, log, plot
from utils.augment import apply_two_views, draw_views, epoch_generator
from utils.cli import Parser, real_number, run, whole_number
from utils.data import DATASETS, batches, load_dataset
from utils.device import autocast, describe, memory_layout, select_device, select_precision
from utils.graph import GraphedStep, set_rate
from utils.knn import knn_accuracy
from utils.run import CHECKPOINT, find_resumed, new_run_folder, resumed_settings, write_config
from utils.stop import StopRequest

LR_PER_256 = 0.03    # the paper's rate for a batch of 256; it scales linearly (appendix D)
COLLAPSE_STD = 0.1   # below this, feature_std (healthy: about 1) means that the outputs are all but equal


def make_parser():
    parser = Parser(prog="main.py", description=__doc__)
    data = parser.add_argument_group("data")
    data.add_argument("--data_root", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    data.add_argument("--dataset", choices=DATASETS, default="cifar10", help="shapes is built in and needs no files")
    data.add_argument("--train_size", type=whole_number(2), metavar="N", help="the first N training pictures only")
    data.add_argument("--test_size", type=whole_number(1), metavar="N", help="the first N test pictures only")

    model = parser.add_argument_group("model")
    model.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    model.add_argument("--width", type=whole_number(1), default=64, help="channels of the first stage; 16 has 1/16 of the arithmetic")
    model.add_argument("--dim", type=whole_number(2), default=2048, help="width of the projector and of the outputs z, p")
    model.add_argument("--pred_dim", type=whole_number(1), default=512, help="width of the predictor's bottleneck")
    model.add_argument("--num_proj_layers", type=int, choices=(2, 3), default=2, help="2: CIFAR, 3: ImageNet")

    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=whole_number(1), default=800, help="length of the run and of the cosine schedule")
    training.add_argument("--batch_size", type=whole_number(2), default=512, help="pictures a step")
    training.add_argument("--learning_rate", type=real_number, help=f"initial rate (default: {LR_PER_256} * batch_size / 256)")
    training.add_argument("--momentum", type=real_number, default=0.9, help="of SGD")
    training.add_argument("--weight_decay", type=real_number, default=5e-4, help="of SGD, on all parameters")
    training.add_argument("--seed", type=whole_number(0), default=0, help="of the weights, the order and the views")

    device = parser.add_argument_group("device")
    device.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    device.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: bf16 or fp16 by the GPU, fp32 on the CPU (on newer GPUs fp32 has PyTorch's default, TF32 in the convolutions)")
    device.add_argument("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the views and the forward pass (default: on with CUDA, off on the CPU)")
    device.add_argument("--cuda_graph", action=argparse.BooleanOptionalAction, default=False, help="replay each step as one CUDA graph")
    device.add_argument("--deterministic", action="store_true", help="bit-reproducible on CUDA too, slower")

    folder = parser.add_argument_group("run")
    folder.add_argument("--eval_freq", type=whole_number(1), default=10, metavar="EPOCHS", help="epochs from one kNN evaluation to the next")
    folder.add_argument("--save_freq", type=whole_number(1), default=10, metavar="EPOCHS", help="epochs from one checkpoint to the next")
    folder.add_argument("--exp_dir", default="experiments", metavar="DIR", help="where the run's folder is made")
    folder.add_argument("--trial", metavar="NAME", help="the run folder's name (default: the next free number)")
    folder.add_argument("--resume", metavar="auto|PATH", help="go on with a checkpoint; auto: of --trial, else of the newest run, else start")
    folder.add_argument("--untrained", action="store_true", help="measure the untrained network too: its kNN as epoch 0, its weights as untrained.pt")
    return parser


# ---------------------------------------------------------------------------------------------------
# One training step


def make_train_step(model, optimizer, scaler, precision_context, compiled, layout=torch.channels_last):
    """The step as a function: images uint8 [B, 3, H, W] and the Draws of both views -> loss and std, on the device.

    precision_context makes the autocast context; scaler is a GradScaler, enabled for fp16 only; layout is the
    memory format of the views and the model.
    """

    def views_to_loss(images, draws1, draws2):
        views = apply_two_views(images, draws1, draws2)
        x1, x2 = (x.contiguous(memory_format=layout) for x in views)  # [B, 3, 32, 32] each
        with precision_context():
            p1, p2, z1, z2 = model(x1, x2)                            # [B, dim] each
        return simsiam_loss(p1, p2, z1, z2), feature_std(z1)

    if compiled:
        views_to_loss = torch.compile(views_to_loss, dynamic=False)

    def train_step(images, draws1, draws2):
        optimizer.zero_grad(set_to_none=True)  # before the forward pass: its peak memory is without gradients
        loss, std = views_to_loss(images, draws1, draws2)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return loss.detach(), std

    return train_step


# ---------------------------------------------------------------------------------------------------
# What an epoch needs


def cosine_rate(rate, epoch, epochs):
    """The learning rate of an epoch, counted from 0: the first has the full rate, the last more than 0."""
    return rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def draw_epoch(seed, epoch, size, count, image_shape, device):
    """Everything random in an epoch, a function of (seed, epoch): `count` of `size` picture numbers in
    random order, int64 [count], and the Draws of both views of each."""
    generator = epoch_generator(seed, epoch, device)
    order = torch.randperm(size, generator=generator, device=device)[:count]
    return order, draw_views(count, generator, *image_shape), draw_views(count, generator, *image_shape)


def save_state(folder, state, model, optimizer, scaler, args):
    """Write checkpoint.pt (all that a resumed run needs) and backbone.pt (all that evaluation needs)."""
    state = {
        **state,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "config": vars(args),
    }
    checkpoint.save(os.path.join(folder, CHECKPOINT), state, keep_previous=True)
    save_backbone(os.path.join(folder, "backbone.pt"), model)


def save_backbone(path, model):
    checkpoint.save(path, {name: value.cpu().contiguous() for name, value in model.backbone.state_dict().items()})


# ---------------------------------------------------------------------------------------------------
# The run


def pretrain(args, device, data, model, folder, state, stop):
    """Train from `state` (a checkpoint; None: from the start) to the last epoch, or until `stop`, a
    StopRequest, has a signal. Returns the exit code."""
    precision_context = autocast(device, args.precision)
    layout = memory_layout(device, args.width, args.batch_size)
    model.to(device, memory_format=layout)
    optimizer = torch.optim.SGD(
        model.parameters(), args.learning_rate, args.momentum, weight_decay=args.weight_decay, fused=True
    )
    scaler = torch.amp.GradScaler(device.type, enabled=args.precision == "fp16")
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    train_step = make_train_step(
        model, optimizer, scaler, precision_context,
        device.type == "cuda" if args.compile is None else args.compile, layout,
    )
    if args.cuda_graph:
        train_step = GraphedStep(train_step, model, optimizer)

    size, batch = len(data.train_images), args.batch_size
    steps = size // batch  # the last partial batch of an epoch is dropped
    image_shape = data.train_images.shape[2:]

    if state is None:
        state = {"epoch": 0, "step": 0, "sums": torch.zeros(2), "seconds": 0.0}
        save_state(folder, state, model, optimizer, scaler, args)
    if state["epoch"] == state["step"] == 0:
        order, *draws = draw_epoch(args.seed, 0, size, steps * batch, image_shape, device)
        shown = slice(0, 8)
        pictures = next(batches(data.train_images, order[shown], len(order[shown]), device))
        plot.plot_views(folder, pictures, *apply_two_views(pictures, *(views.rows(shown) for views in draws)))
        if args.untrained:
            save_backbone(os.path.join(folder, "untrained.pt"), model)
            knn1, knn200 = knn_accuracy(model.backbone, data, precision_context)
            log.append(folder, {"epoch": 0, "knn1": knn1, "knn200": knn200})
            print(f"untrained: kNN k=1 {knn1:.2f} %, k=200 {knn200:.2f} %")

    bar = tqdm(
        total=args.epochs, initial=state["epoch"] + state["step"] / steps,
        bar_format="{percentage:3.0f}%|{bar}| {n:.2f}/{total} epochs [{elapsed}<{remaining}{postfix}]",
        mininterval=0.1 if sys.stderr.isatty() else 30,
    )
    with bar:
        for epoch in range(state["epoch"], args.epochs):
            rate = cosine_rate(args.learning_rate, epoch, args.epochs)
            set_rate(optimizer, rate)
            order, draws1, draws2 = draw_epoch(args.seed, epoch, size, steps * batch, image_shape, device)
            sums, step = state["sums"].to(device), state["step"]  # the sums are of loss and std
            start = time.perf_counter()
            images = batches(data.train_images, order[step * batch:], batch, device)
            model.train()

            # ---- the step: slice, augment, forward, loss, backward, update
            while step < steps and stop.signal is None:
                rows = slice(step * batch, (step + 1) * batch)
                loss, std = train_step(next(images), draws1.rows(rows), draws2.rows(rows))
                sums += torch.stack((loss, std))
                step += 1
                bar.update(epoch + step / steps - bar.n)
            # ----

            mean_loss, mean_std = (sums / max(step, 1)).tolist()  # the epoch's one synchronization
            seconds = state["seconds"] + time.perf_counter() - start
            if not math.isfinite(mean_loss):
                where = f"epoch {epoch + 1}: the loss is {mean_loss}; {os.path.join(folder, CHECKPOINT)} is from before"
                print(f"main.py: error: {where}; start a new run with a lower --learning_rate", file=sys.stderr)
                return 1

            if step < steps:  # stopped inside the epoch
                state = {"epoch": epoch, "step": step, "sums": sums.cpu(), "seconds": seconds}
            else:
                state = {"epoch": epoch + 1, "step": 0, "sums": torch.zeros(2), "seconds": 0.0}
                speed = 2 * steps * batch / seconds
                record = {
                    "epoch": epoch + 1, "loss": mean_loss, "std": mean_std, "lr": rate,
                    "seconds": round(seconds, 3), "views_per_s": round(speed, 1),
                }
                bar.set_postfix_str(f"loss {mean_loss:.4f}, std {mean_std:.3f}, {speed:,.0f} views/s")
                if mean_std < COLLAPSE_STD:
                    tqdm.write(
                        f"warning: epoch {epoch + 1}: std {mean_std:.4f}: the outputs have all but collapsed "
                        "(healthy: about 1); see --learning_rate and --batch_size", file=sys.stderr,
                    )
                if (epoch + 1) % args.eval_freq == 0 or epoch + 1 == args.epochs:
                    record["knn1"], record["knn200"] = knn_accuracy(model.backbone, data, precision_context)
                    tqdm.write(
                        f"epoch {epoch + 1}: loss {mean_loss:.4f}, std {mean_std:.3f}, "
                        f"kNN k=1 {record['knn1']:.2f} %, k=200 {record['knn200']:.2f} %"
                    )
                log.append(folder, record)

            finished, stopped = state["epoch"] == args.epochs, stop.signal
            if stopped is not None or finished or state["epoch"] % args.save_freq == 0:
                save_state(folder, state, model, optimizer, scaler, args)
                if state["epoch"] > 0:
                    plot.plot_run(folder)
            if stopped is not None and not finished:
                path = shlex.quote(os.path.join(folder, CHECKPOINT))
                tqdm.write(f"stopped in epoch {epoch + 1}; to go on: python main.py --resume {path}")
                return 128 + stopped
    return 0


# ---------------------------------------------------------------------------------------------------
# From the command line to the run


def evaluation_command(args, device, folder):
    """What to type to evaluate the run linearly."""
    words = ["python", "main_lincls.py", "--arch", args.arch, "--pretrained", os.path.join(folder, "backbone.pt")]
    if device.type == "cpu":
        words += ["--features", "cached"]
    words += [args.data_root] if args.dataset == "cifar10" else ["--dataset", args.dataset, args.data_root]
    return shlex.join(words)


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        folder, state = None, None
        if args.resume is not None:
            folder, state = find_resumed(args.resume, args.exp_dir, args.trial)
        if state is not None:
            args = resumed_settings(parser, argv, state["config"])
            if state["epoch"] >= args.epochs:
                print(f"{folder}: already done, epoch {state['epoch']} of {args.epochs}")
                return 0
        elif args.resume is not None:
            print(f"nothing to resume in {args.exp_dir}: a new run")
        device = select_device(args.gpu)
        args.precision = select_precision(args.precision, device)
        if args.cuda_graph and (device.type != "cuda" or args.precision == "fp16"):
            raise ValueError("--cuda_graph needs a CUDA GPU and --precision bf16 or fp32")
        if device.type == "cpu":
            prepare_cpu()
        if args.learning_rate is None:
            args.learning_rate = LR_PER_256 * args.batch_size / 256
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        if args.batch_size > len(data.train_images):
            raise ValueError(f"--batch_size {args.batch_size}: there are {len(data.train_images)} training pictures")

        torch.manual_seed(args.seed)
        model = SimSiam(ARCHS[args.arch](args.width), args.dim, args.pred_dim, args.num_proj_layers)

    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not args.deterministic
    if state is None:
        with parser.user_errors():
            folder = new_run_folder(args.exp_dir, args.trial)
            write_config(folder, vars(args), device)
    print(f"{folder}: {args.arch}, width {args.width}, {args.dataset}, {len(data.train_images)} pictures, {describe(device)}, {args.precision}")
    if device.type == "cpu":
        print(
            "No GPU in use. Two CPU cores train 50 to 115 views/s at width 64 and 600 to 1,000 at width 16; an epoch "
            f"is {2 * len(data.train_images):,} views. --width 16 and --train_size 5000 make it small."
        )
    with StopRequest() as stop:
        code = pretrain(args, device, data, model, folder, state, stop)
    if code == 0:
        print(f"done; next: {evaluation_command(args, device, folder)}")
    return code


if __name__ == "__main__":
    run(main)
