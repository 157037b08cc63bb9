"""main.py's own training against ten steps written out plainly."""
import json
import math
import os
import shutil
import types

import pytest
import torch

import main as pretraining
import simsiam
from simsiam.resnet import BasicBlock, conv_bn
from utils import checkpoint
from utils.augment import apply_views
from utils.device import autocast
from utils.graph import GraphedStep, set_rate

CPU = torch.device("cpu")
FOLLOWS = (0.01, 0.02, 0.04, 0.06, 0.08)  # how close bf16, compiled, stays to float32, eager, every ten steps


def plain_steps(model, images, args):
    """Two epochs of five steps: two forward passes, the loss as the paper writes it, torch's SGD, the cosine rate."""
    # The same memory layout as main.py's: batch norm amplifies rounding, and after ten steps two float32
    # layouts differ by more than any useful tolerance in the tensors that start at 0.
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=args.learning_rate, momentum=0.9, weight_decay=5e-4, foreach=False, fused=False
    )

    def distance(p, z):
        z = z.detach()
        p = p / p.norm(dim=1, keepdim=True)
        z = z / z.norm(dim=1, keepdim=True)
        return -(p * z).sum(dim=1).mean()

    losses = []
    for epoch in range(args.epochs):
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        count = len(images) // args.batch_size * args.batch_size
        order, draws1, draws2 = pretraining.draw_epoch(args.seed, epoch, len(images), count, (32, 32), CPU)
        for start in range(0, count, args.batch_size):
            rows = slice(start, start + args.batch_size)
            batch = images[order[rows]]
            x1, x2 = (
                apply_views(batch, draws.rows(rows)).to(memory_format=torch.channels_last) for draws in (draws1, draws2)
            )
            z1 = model.projector(model.backbone(x1))
            p1 = model.predictor(z1)
            z2 = model.projector(model.backbone(x2))
            p2 = model.predictor(z2)
            loss = distance(p1, z2) / 2 + distance(p2, z1) / 2
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def test_ten_steps_equal_a_plain_implementation(tmp_path, cifar_root, cifar, no_gpu):
    """On real CIFAR-10, full heads: weights and batch norm buffers within 1e-4 relative."""
    argv = (
        f"--data_root {cifar_root} --train_size 330 --test_size 10 --width 8 --batch_size 64 --epochs 2 --seed 3 "
        f"--precision fp32 --no-compile --exp_dir {tmp_path} --trial step"
    ).split()
    assert pretraining.main(argv) == 0
    ours = checkpoint.load(str(tmp_path / "step" / "checkpoint.pt"))

    torch.manual_seed(3)
    model = simsiam.SimSiam(simsiam.resnet18(8))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    settings = types.SimpleNamespace(learning_rate=0.03 * 64 / 256, epochs=2, batch_size=64, seed=3)
    losses = plain_steps(model, cifar.train_images[:330], settings)

    for name, expected in model.state_dict().items():
        got = ours["model"][name].double()
        difference = (got - expected.double()).norm() / expected.double().norm().clamp(min=1e-3)
        assert difference < 1e-4, f"{name}: {difference:.2e}"
    moved = model.state_dict()["backbone.conv1.weight"] - start["backbone.conv1.weight"]
    assert moved.norm() > 1e-3 * start["backbone.conv1.weight"].norm()

    lines = (tmp_path / "step" / "log.jsonl").read_text().splitlines()
    for epoch, line in enumerate(lines):
        assert json.loads(line)["loss"] == pytest.approx(sum(losses[5 * epoch:5 * epoch + 5]) / 5, rel=1e-4)


def test_cosine_rate_counts_epochs_from_zero():
    rates = [pretraining.cosine_rate(0.06, epoch, 800) for epoch in range(800)]
    assert rates[0] == 0.06 and rates[400] == pytest.approx(0.03) and 0 < rates[-1] < 1e-5
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.06)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


def test_an_epoch_takes_every_picture_at_most_once():
    order, draws1, draws2 = pretraining.draw_epoch(0, 0, 100, 96, (32, 32), CPU)
    assert len(set(order.tolist())) == 96 and len(draws1.top) == len(draws2.top) == 96
    assert not torch.equal(draws1.factors, draws2.factors)
    again = pretraining.draw_epoch(0, 0, 100, 96, (32, 32), CPU)
    assert torch.equal(order, again[0]) and torch.equal(draws2.factors, again[2].factors)
    for seed, epoch in ((0, 1), (1, 0)):
        assert not torch.equal(order, pretraining.draw_epoch(seed, epoch, 100, 96, (32, 32), CPU)[0])


class TwoBlocks(torch.nn.Sequential):
    """A backbone of two residual blocks, which compiles in seconds: [B, 3, 32, 32] -> [B, 32]."""

    feature_dim = 32

    def __init__(self):
        super().__init__(
            *conv_bn(3, 8, 3, stride=2), torch.nn.ReLU(), BasicBlock(8, 16, 2), BasicBlock(16, 32, 2),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )


def small_step(precision, compiled, device=CPU, graphed=False):
    """A small model and main.py's step of it."""
    torch.manual_seed(0)
    model = simsiam.SimSiam(TwoBlocks(), 256, 256).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=5e-4, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=False)
    step = pretraining.make_train_step(model, optimizer, scaler, autocast(device, precision), compiled)
    return model, GraphedStep(step, model, optimizer) if graphed else step


def losses_of(step, shapes, count, device=CPU):
    """The losses of so many steps of 120 pictures, in epochs of 8."""
    losses = []
    for i in range(count):
        if i % 8 == 0:
            order, draws1, draws2 = pretraining.draw_epoch(0, i // 8, 1000, 960, (32, 32), CPU)
        rows = slice(120 * (i % 8), 120 * (i % 8) + 120)
        images = shapes.train_images[order[rows]].to(device)
        draws = [type(views)(*(field.to(device) for field in views.rows(rows))) for views in (draws1, draws2)]
        losses.append(step(images, *draws)[0].clone())
    return torch.stack(losses).cpu()


def check_bf16_compiled_follows_fp32(shapes, device):
    """The first 50 steps, in which the loss falls by 0.2: means over ten steps within FOLLOWS. Rounding grows from step to
    step: float32 itself, on one thread and on two, differs by 0.01 in the last ten, and bf16 by up to 0.05."""
    model, step = small_step("fp32", False, device)
    expected = losses_of(step, shapes, 50, device)
    model, step = small_step("bf16", True, device)
    got = losses_of(step, shapes, 50, device)
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert not torch.equal(got, expected)  # bf16 was used
    difference = (got - expected).view(5, 10).mean(dim=1).abs()
    assert (difference < torch.tensor(FOLLOWS)).all(), difference
    assert expected[:10].mean() - expected[-10:].mean() > 0.15


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_bf16_and_compiled_follow_fp32_eager(shapes):
    check_bf16_compiled_follows_fp32(shapes, CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_bf16_and_compiled_follow_fp32_eager_on_cuda(shapes):
    check_bf16_compiled_follows_fp32(shapes, torch.device("cuda", 0))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_cuda_graph_is_the_step(shapes, compiled):
    """Replayed, ten steps are ten steps: what comes before the recording leaves no trace, and the rate can change."""
    device = torch.device("cuda", 0)
    torch.backends.cudnn.benchmark = False
    states = []
    for graphed in (False, True):
        model, step = small_step("fp32", compiled, device, graphed)
        optimizer = step.optimizer if graphed else None
        losses = losses_of(step, shapes, 10, device)
        if graphed:
            before = {name: value.clone() for name, value in model.state_dict().items()}
            set_rate(optimizer, 0.0)
            losses_of(step, shapes, 1, device)
            for name, parameter in model.named_parameters():
                assert torch.equal(parameter, before[name]), name
            states.append((losses, before))
        else:
            states.append((losses, {name: value.clone() for name, value in model.state_dict().items()}))
    (expected, plain_state), (got, graph_state) = states
    assert (expected - got).abs().max() < 1e-2
    assert torch.equal(plain_state["backbone.1.num_batches_tracked"], graph_state["backbone.1.num_batches_tracked"])


def test_a_cuda_graph_needs_cuda(run_main, no_gpu, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main("--epochs", 1, "--cuda_graph")
    assert stopped.value.code == 2 and "--cuda_graph needs a CUDA GPU" in capsys.readouterr().err


def test_set_rate():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.06)
    set_rate(optimizer, 0.02)
    assert optimizer.param_groups[0]["lr"] == 0.02
    optimizer.param_groups[0]["lr"] = torch.tensor(0.06)  # of a checkpoint that a run with a graph has written
    set_rate(optimizer, 0.02)
    assert optimizer.param_groups[0]["lr"] == 0.02 and isinstance(optimizer.param_groups[0]["lr"], float)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_trains_compiled_on_cuda(run_main, precision):
    assert run_main("--epochs", 2, "--gpu", 0, "--precision", precision, "--compile") == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("host", [False, True])
def test_trains_as_a_cuda_graph(run_main, monkeypatch, host):
    """Stopped and resumed too, with the pictures on the device or on the host."""
    if host:
        monkeypatch.setattr("utils.data.DEVICE_SHARE", 0.0)
    assert run_main("--epochs", 2, "--gpu", 0, "--cuda_graph", "--save_freq", 1, "--trial", "graph") == 0
    os.replace("experiments/graph/checkpoint-previous.pt", "experiments/graph/checkpoint.pt")
    assert run_main("--resume", "experiments/graph/checkpoint.pt") == 0
