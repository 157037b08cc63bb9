"""Linear evaluation of a pre-trained backbone: frozen features, one linear classifier.

    python main_lincls.py --arch resnet18 --num_cls 10 --batch_size 256 --lr 30.0 --weight_decay 0.0 --pretrained CHECKPOINT DIR

CHECKPOINT is the backbone.pt or checkpoint.pt of a run of main.py, DIR the folder that has, or gets, cifar-10-batches-py.
On a CPU, --features cached computes the features once, without augmentation, and takes minutes at small width:

    python main_lincls.py --features cached --pretrained experiments/1/backbone.pt data

The result is the last epoch's top-1 accuracy on all test images. The best epoch is shown beside it; it is
chosen on the test images and so is not a result.
"""
import sys
import time

from utils.cpu import prepare_cpu  # before torch

import torch
import torch.nn.functional as F
from tqdm import tqdm

from simsiam import ARCHS
from utils import checkpoint, plot
from utils.augment import crop_flip, draw_views, epoch_generator, normalize
from utils.cli import Parser, real_number, run, whole_number
from utils.data import DATASETS, batches, load_dataset
from utils.device import autocast, describe, select_device, select_precision
from utils.features import extract_features
from utils.run import RunWriter, new_run_folder, write_config

LR_PER_256 = 30.0            # the rate for a batch of 256; it scales linearly
MILESTONES = (0.6, 0.8)      # shares of the epochs after which the rate falls to a tenth: 60 and 80 of 100
CROP_SCALE = (0.08, 1.0)     # torchvision's default for RandomResizedCrop


def make_parser():
    parser = Parser(prog="main_lincls.py", description=__doc__)
    parser.add_argument("data_root", nargs="?", default="data", metavar="DIR", help="folder that has, or gets, cifar-10-batches-py")
    parser.add_argument("--pretrained", required=True, metavar="CHECKPOINT", help="backbone.pt or checkpoint.pt of a run of main.py")
    parser.add_argument("--arch", choices=ARCHS, default="resnet18", help="backbone")
    parser.add_argument("--width", type=whole_number(1), help="channels of the first stage; the default is the checkpoint's")
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="shapes is built in and needs no files")
    parser.add_argument("--num_cls", type=whole_number(2), metavar="N", help="number of classes (default: the data set's)")
    parser.add_argument("--train_size", type=whole_number(1), metavar="N", help="the first N training pictures only")
    parser.add_argument("--test_size", type=whole_number(1), metavar="N", help="the first N test pictures only")
    parser.add_argument("--features", choices=("augmented", "cached"), default="augmented", help="augmented: random crop and flip in every epoch; cached: computed once, without")
    parser.add_argument("--epochs", type=whole_number(1), default=100, help="the rate falls to a tenth after 60 %% and 80 %% of them")
    parser.add_argument("--batch_size", type=whole_number(1), default=256, help="pictures a step")
    parser.add_argument("--lr", type=real_number, help=f"initial rate (default: {LR_PER_256} * batch_size / 256)")
    parser.add_argument("--momentum", type=real_number, default=0.9, help="of SGD")
    parser.add_argument("--weight_decay", type=real_number, default=0.0, help="of SGD")
    parser.add_argument("--seed", type=whole_number(0), default=0, help="of the classifier, the order and the crops")
    parser.add_argument("--gpu", type=int, metavar="N", help="number of the CUDA GPU (default: the first one, else the CPU)")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="of the backbone; the classifier is float32")
    parser.add_argument("--exp_dir", default="experiments", metavar="DIR", help="where the evaluation's folder is made")
    parser.add_argument("--trial", metavar="NAME", help="the folder's name (default: the next free number)")
    return parser


def build_backbone(arch, width, path):
    """The backbone with the weights of a file, frozen and in evaluation mode. width None: the file's.
    Raises ValueError and OSError for a file that is missing, damaged or does not fit."""
    state = checkpoint.backbone_state(path)
    backbone = ARCHS[arch](len(state["conv1.weight"]) if width is None else width)
    checkpoint.load_module(backbone, state, path)
    return backbone.requires_grad_(False).eval()


def stepped_rate(rate, epoch, epochs):
    """The learning rate of an epoch, counted from 0: a tenth after each milestone."""
    return rate * 0.1 ** sum(epoch >= round(share * epochs) for share in MILESTONES)


def augmented_features(backbone, images, draws, precision_context):
    """Backbone features of randomly cropped and flipped pictures: uint8 [B, 3, H, W] -> float32 [B, feature_dim]."""
    views = normalize(crop_flip(images, draws)).contiguous(memory_format=torch.channels_last)
    with torch.no_grad(), precision_context():
        return backbone(views).float()


def top1(classifier, features, labels):
    """Top-1 accuracy in percent over all rows."""
    with torch.no_grad():
        return 100 * (classifier(features).argmax(dim=1) == labels).double().mean().item()


def evaluate(args, device, data, backbone, writer):
    """Train the classifier; returns the log's records, one an epoch, or None if the loss ran away."""
    precision_context = autocast(device, args.precision)
    backbone.to(device, memory_format=torch.channels_last)
    frozen = {name: value.clone() for name, value in backbone.state_dict().items()}

    test_features = extract_features(backbone, data.test_images, precision_context)
    if args.features == "cached":
        train_features = extract_features(backbone, data.train_images, precision_context)

    torch.manual_seed(args.seed)
    classifier = torch.nn.Linear(backbone.feature_dim, args.num_cls)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    classifier.to(device)
    optimizer = torch.optim.SGD(classifier.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay, fused=True)

    size, image_shape = len(data.train_images), data.train_images.shape[2:]
    records = []
    bar = tqdm(range(args.epochs), unit="epoch", mininterval=0.1 if sys.stderr.isatty() else 30)
    for epoch in bar:
        start = time.perf_counter()
        rate = stepped_rate(args.lr, epoch, args.epochs)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = epoch_generator(args.seed, epoch, device)
        order = torch.randperm(size, generator=generator, device=device)
        if args.features == "augmented":
            draws = draw_views(size, generator, *image_shape, scale=CROP_SCALE)
            images = batches(data.train_images, order, args.batch_size, device)
        splits = torch.arange(size, device=device).split(args.batch_size)
        metrics = torch.zeros(len(splits), 2, device=device)  # of each step: the loss, and the right answers

        for step, rows in enumerate(splits):
            chosen = order[rows]
            if args.features == "cached":
                features = train_features[chosen]
            else:
                features = augmented_features(backbone, next(images), draws.rows(rows), precision_context)
            logits, labels = classifier(features), data.train_labels[chosen]
            loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            metrics[step] = torch.stack((loss.detach(), (logits.argmax(dim=1) == labels).sum()))

        losses, right = metrics.double().cpu().unbind(dim=1)  # the epoch's one synchronization
        if not losses.isfinite().all():
            step = losses.isfinite().tolist().index(False)
            print(
                f"main_lincls.py: error: epoch {epoch + 1}, step {step + 1} of {len(splits)}: the loss is {losses[step]}; "
                f"lower --lr ({args.lr:g})", file=sys.stderr,
            )
            return None
        sizes = torch.tensor([len(rows) for rows in splits])
        records.append({
            "epoch": epoch + 1, "train_loss": ((losses * sizes).sum() / size).item(), "train_top1": 100 * right.sum().item() / size,
            "test_top1": top1(classifier, test_features, data.test_labels), "lr": rate,
            "seconds": round(time.perf_counter() - start, 3),
        })
        writer.log(records[-1])
        bar.set_postfix_str(f"training loss {records[-1]['train_loss']:.3f}, test top-1 {records[-1]['test_top1']:.2f} %")

    moved = [name for name, value in backbone.state_dict().items() if not torch.equal(value, frozen[name])]
    if moved:
        raise AssertionError(f"the frozen backbone moved during linear evaluation: {', '.join(moved)}")
    weights = {name: value.cpu() for name, value in classifier.state_dict().items()}
    writer.attempt(checkpoint.save, writer.path("classifier.pt"), weights)
    writer.draw(plot.plot_run)
    return records


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    with parser.user_errors():
        device = select_device(args.gpu)
        args.precision = select_precision(args.precision, device)
        if device.type == "cpu":
            prepare_cpu()
        backbone = build_backbone(args.arch, args.width, args.pretrained)
        data = load_dataset(args.dataset, args.data_root, device, args.train_size, args.test_size)
        if args.num_cls is None:
            args.num_cls = len(data.classes)
        if args.num_cls != len(data.classes):
            raise ValueError(f"--num_cls {args.num_cls}: {args.dataset} has {len(data.classes)} classes")
        if args.lr is None:
            args.lr = LR_PER_256 * args.batch_size / 256
        folder = new_run_folder(args.exp_dir, args.trial)
        writer = RunWriter(folder)
        write_config(folder, vars(args), device)

    print(f"{folder}: {args.pretrained}, {args.dataset}, {len(data.train_images)} pictures, {args.features} features, {describe(device)}, {args.precision}")
    records = evaluate(args, device, data, backbone, writer)
    if records is None:
        return 1
    last = records[-1]
    count = f"{'all' if args.test_size is None else 'the first'} {len(data.test_images)} test pictures"
    best = max(records, key=lambda record: record["test_top1"])
    print(f"linear top-1: {last['test_top1']:.2f} %, last epoch ({last['epoch']}), {count}")
    print(f"best epoch ({best['epoch']}): {best['test_top1']:.2f} %, chosen on the test pictures and so not the result")
    if writer.unsaved is not None:
        print(f"main_lincls.py: error: {writer.unsaved}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    run(main)
