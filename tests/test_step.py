"""main.py's own training against ten steps written out plainly."""
import json
import math
import types

import pytest
import torch

import main as pretraining
import simsiam
from utils import checkpoint
from utils.augment import apply_views
from utils.device import autocast

CPU = torch.device("cpu")


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


def small_step(precision, compiled):
    torch.manual_seed(0)
    model = simsiam.SimSiam(simsiam.resnet18(8), 64, 16).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.03, 0.9, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return model, pretraining.make_train_step(model, optimizer, scaler, autocast(CPU, precision), compiled)


def test_bf16_follows_fp32(shapes):
    """The mean loss of 20 steps in bf16 is within 0.02 of float32's; the weights stay float32."""
    order, draws1, draws2 = pretraining.draw_epoch(0, 0, 1000, 960, (32, 32), CPU)
    means = []
    for precision in ("fp32", "bf16"):
        model, step = small_step(precision, False)
        losses = [
            step(shapes.train_images[order[rows]], draws1.rows(rows), draws2.rows(rows))[0]
            for rows in (slice(48 * i, 48 * i + 48) for i in range(20))
        ]
        means.append(torch.stack(losses).mean().item())
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert means[0] < -0.02
    assert means[0] != means[1] and abs(means[0] - means[1]) < 0.02, means


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_trains_compiled_on_cuda(run_main, precision):
    assert run_main("--epochs", 2, "--gpu", 0, "--precision", precision, "--compile") == 0
