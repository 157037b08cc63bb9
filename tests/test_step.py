"""main.py's training step against the same arithmetic written out, and everything random in an epoch."""
import math
import os
import shutil

import pytest
import torch

import main as pretraining
import simsiam
from conftest import SMALL
from simsiam.resnet import Block, conv_bn
from utils import checkpoint, log
from utils.augment import apply_views
from utils.device import compile_for, memory_layout, select_precision

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def settings(**changes):
    """main.py's settings of a small run, completed."""
    args = pretraining.make_parser().parse_args([*SMALL, "--precision", "fp32", "--learning_rate", "0.05"])
    vars(args).update(changes)
    args.steps, args.bn_batch = args.train_size // args.batch_size, args.batch_size
    return args


def plain_steps(model, images, args):
    """Epochs of two forward passes a step, the loss as the paper writes it, and torch's SGD with a cosine rate."""
    model.to(memory_format=torch.channels_last)  # the layout of main.py: rounding differs between layouts
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, 0.9, weight_decay=5e-4, foreach=False)

    def distance(p, z):
        z = z.detach()
        return -((p / p.norm(dim=1, keepdim=True)) * (z / z.norm(dim=1, keepdim=True))).sum(dim=1).mean()

    losses = []
    for epoch in range(args.epochs):
        optimizer.param_groups[0]["lr"] = args.learning_rate * (1 + math.cos(math.pi * epoch / args.epochs)) / 2
        order, (draws1, draws2) = pretraining.draw_epoch(args, epoch, images, CPU)
        for rows in torch.arange(len(order)).split(args.batch_size):
            x1, x2 = (apply_views(images[order[rows]], draws.rows(rows)).to(memory_format=torch.channels_last)
                      for draws in (draws1, draws2))
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


def test_ten_steps_match_a_plain_implementation(tmp_path, cifar_root, cifar, no_gpu):
    """On CIFAR-10 with the full heads: weights and buffers within 1e-4, relative."""
    argv = (f"--data_root {cifar_root} --train_size 330 --test_size 10 --width 8 --batch_size 64 --epochs 2 --seed 3 "
            f"--precision fp32 --no-compile --exp_dir {tmp_path} --trial step").split()
    assert pretraining.main(argv) == 0
    ours = checkpoint.load(str(tmp_path / "step" / "checkpoint.pt"))["model"]
    torch.manual_seed(3)
    model = simsiam.SimSiam(simsiam.resnet18(8))
    start = model.backbone.conv1.weight.clone()
    args = settings(learning_rate=0.03 * 64 / 256, epochs=2, train_size=330, batch_size=64, seed=3)
    losses = plain_steps(model, cifar.train_images[:330], args)
    for name, expected in model.state_dict().items():
        difference = (ours[name].double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-3)
        assert difference < 1e-4, f"{name}: {difference:.2e}"
    assert (model.backbone.conv1.weight - start).norm() > 1e-3 * start.norm()
    for epoch, record in enumerate(log.read(str(tmp_path / "step"))):
        assert record["loss"] == pytest.approx(sum(losses[5 * epoch:5 * epoch + 5]) / 5, rel=1e-4)


def test_the_cosine_counts_epochs_from_zero_and_covers_what_the_linear_warm_up_leaves():
    rates = [pretraining.cosine(0.06, epoch, 800) for epoch in range(800)]
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.06)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for rate in rates:
        assert rate == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()
    assert rates[0] == 0.06 and rates[400] == pytest.approx(0.03) and 0 < rates[-1] < 1e-5
    rates = [pretraining.cosine(0.5, epoch, 100, 10) for epoch in range(100)]
    assert rates[:11] == pytest.approx([0.5 * (epoch + 1) / 11 for epoch in range(11)])
    assert rates[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])


def test_an_epoch_is_a_function_of_seed_and_epoch():
    images, args = torch.zeros(100, 3, 32, 32), settings(train_size=100)
    order, (draws1, draws2) = pretraining.draw_epoch(args, 0, images, CPU)
    assert len(set(order.tolist())) == len(order) == len(draws1.top) == 96  # each image at most once
    assert not torch.equal(draws1.factors, draws2.factors)
    again = pretraining.draw_epoch(args, 0, images, CPU)
    assert torch.equal(order, again[0]) and all(torch.equal(a, b) for a, b in zip(draws2, again[1][1]))
    for seed, epoch in ((0, 1), (1, 0)):
        other = pretraining.draw_epoch(settings(train_size=100, seed=seed), epoch, images, CPU)
        assert not torch.equal(order, other[0]) and not torch.equal(draws1.factors, other[1][0].factors)


def test_asymmetric_2x_is_the_mean_over_two_pairs_of_views(shapes):
    """Without stop-gradient, so that z has one: the std is no part of it, else the metrics of an epoch hold the
    activations of all its steps."""
    order, draws = pretraining.draw_epoch(settings(symmetry="asymmetric", views=4), 0, shapes.train_images, CPU)
    images, draws = shapes.train_images[order[:32]], [view.rows(slice(32)) for view in draws]
    assert len(draws) == 4 and not torch.equal(draws[1].top, draws[3].top)

    def forward(views):
        args = settings(symmetry="asymmetric", stop_gradient=False)
        model = pretraining.build(args, CPU)[0]
        loss, std = pretraining.make_forward(args, model, CPU)(images, 32, views)
        assert loss.requires_grad and not std.requires_grad
        loss.backward()
        return loss, *(parameter.grad for parameter in model.parameters())

    both = forward(draws)
    pairs = zip(forward(draws[:2]), forward(draws[2:]))
    for value, (first, second) in zip(both, pairs, strict=True):
        torch.testing.assert_close(value, (first + second) / 2, rtol=1e-3, atol=1e-6)


def test_a_first_step_that_the_scaler_skips_changes_nothing():
    """fp16: five steps of which the first has infinite gradients are the last four, bit for bit."""
    results = []
    for skipped in (0, 1):
        model, optimizer, _ = pretraining.build(settings(), CPU)
        generator, scaler = torch.Generator().manual_seed(0), torch.amp.GradScaler("cpu", init_scale=8.0)
        for step in range(skipped + 4):
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, math.inf)
                if step >= skipped:
                    parameter.grad = torch.randn(parameter.shape, generator=generator) * scaler.get_scale()
            scaler.scale(torch.zeros(()))
            scaler.step(optimizer)
            scaler.update()
            momenta = [state["momentum_buffer"] for state in optimizer.state.values()]
            assert all((momentum == 0).all() for momentum in momenta) == (step < skipped)
        results.append([*model.parameters(), *momenta])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("avx512, amx, used, expected", [
    (True, False, True, "bf16"), (False, True, True, "bf16"), (False, False, True, "fp32"), (True, True, False, "fp32"),
])
def test_the_precision_follows_the_device(monkeypatch, avx512, amx, used, expected):
    """bf16 where it is computed in, as torch says; an instruction set that torch may not use does not count."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: used)
    assert [select_precision(name, CPU) for name in ("auto", "bf16", "fp32")] == [expected, "bf16", "fp32"]
    cuda = torch.device("cuda")
    for capability, model, precision in (
            ((9, 0), "H100", "bf16"), ((8, 0), "A100", "bf16"), ((7, 5), "Tesla T4", "fp16"), ((7, 0), "V100", "fp16"),
            ((7, 5), "NVIDIA GeForce GTX 1660 Ti", "fp32"), ((6, 1), "GTX 1080", "fp32")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: model)
        assert select_precision("auto", cuda) == precision and select_precision("bf16", cuda) == "bf16"
        layout = torch.contiguous_format if precision == "fp32" else torch.channels_last
        assert memory_layout(cuda, 64, 512) == layout


def test_what_is_compiled(monkeypatch, capsys):
    """By default long runs on CUDA; where compiling fails, nothing, with a warning."""
    def broken(function, **options):
        raise RuntimeError("no Python.h\nand more")

    cuda = torch.device("cuda")
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: None)  # there is no GPU to make them on
    monkeypatch.setattr(torch, "compile", lambda function, **options: lambda *args: function)
    for device, choice, steps, compiled in (
        (cuda, None, 5000, True), (cuda, None, 4999, False), (CPU, None, 10**6, False),
        (cuda, True, 1, True), (CPU, True, 1, True), (cuda, False, 10**6, False),
    ):
        function = compile_for(device, abs, choice, steps)
        assert function() is abs if compiled else function is abs
        assert torch._dynamo.config.recompile_limit >= 50 or not compiled  # sizes of views
    monkeypatch.setattr(torch, "compile", broken)
    assert compile_for(cuda, abs, True, 1) is abs
    assert capsys.readouterr().err == "warning: torch.compile failed; running eager (slower): no Python.h\n"


def test_fix_pred_lr_keeps_the_predictors_rate(run_main, monkeypatch, no_gpu):
    seen, usual = [], torch.optim.SGD.step

    def step(optimizer, *args, **kwargs):
        seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])
        return usual(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert run_main("--epochs", 2, "--learning_rate", 0.5, "--fix_pred_lr", "--trial", "run") == 0
    assert [rates for _, rates in seen[0]] == [0.5, 0.5] and seen[0][1][0] == 5  # the predictor's tensors
    assert [rates for _, rates in seen[-1]] == [pytest.approx(0.25), 0.5]


def test_outputs_collapse_without_stop_gradient_and_without_predictor(run_main):
    """Sec. 4.1 and 4.2, against a control that differs in nothing else. Without the batch norm at the end of the
    projector nothing keeps std from 0. A third of the control's std is over ten times its spread over seeds away
    from both."""
    std, options = {}, ("--epochs", 10, "--learning_rate", 0.1, "--eval_freq", 100, "--head_bn", "hidden")
    for name, variant in {"control": (), "no-sg": ("--no-stop_gradient",), "no-pred": ("--predictor", "none")}.items():
        for seed in range(2):
            assert run_main(*options, *variant, "--seed", seed, "--trial", f"{name}-{seed}") == 0
        std[name] = [log.read(f"experiments/{name}-{seed}")[-1]["std"] for seed in range(2)]
    assert max(std["no-sg"] + std["no-pred"]) < min(std["control"]) / 3, std


@pytest.mark.parametrize("device", [
    pytest.param(CPU, marks=[
        pytest.mark.slow, pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
        pytest.mark.skipif("ATEN_CPU_CAPABILITY" in os.environ, reason="Inductor compiles for the real processor")]),
    pytest.param(torch.device("cuda", 0), marks=needs_cuda),
])
def test_inductor_computes_the_same_step(shapes, monkeypatch, device):
    """Loss and gradients of the compiled step against the eager one, in float32, with a backbone of two blocks: a
    ResNet takes minutes to compile on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    images, results = shapes.train_images.to(device), []
    for compiled in (False, True):
        args = settings(compile=compiled, width=8)
        torch.manual_seed(0)
        backbone = torch.nn.Sequential(*conv_bn(3, 8, 3, stride=2), torch.nn.ReLU(), Block(8, 16, 2),
                                       Block(16, 32, 2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
        backbone.feature_dim = 32
        model = simsiam.SimSiam(backbone, 64, 32).to(device, memory_format=torch.channels_last)
        order, draws = pretraining.draw_epoch(args, 0, images, device)
        forward = pretraining.make_forward(args, model, device)
        loss, std = forward(images[order[:32]], 32, [view.rows(slice(32)) for view in draws])
        loss.backward()
        results.append([loss, std, *(parameter.grad for parameter in model.parameters())])
    for eager, compiled in zip(*results, strict=True):
        assert (eager - compiled).norm() <= 1e-2 * eager.norm() + 1e-5


@needs_cuda
@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
def test_trains_compiled_on_cuda(run_main, precision):
    assert run_main("--epochs", 2, "--gpu", 0, "--precision", precision, "--compile") == 0
