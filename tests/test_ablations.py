"""The variants of the paper's study against what its Sec. 4 says of them, written out."""
import copy
import math
import shutil

import pytest
import torch
from torch import nn
from torchvision.transforms import functional

import main as pretraining
import simsiam
from conftest import DRAWING, SMALL
from utils import augment, checkpoint, log, metrics
from utils.device import autocast
from utils.graph import set_rate
from utils.resume import PRETRAINING, STUDY, load_state, resumed_settings
from utils.runs import read_lines
from utils.studies import make_studies

CPU = torch.device("cpu")


def variant(**options):
    torch.manual_seed(0)
    return simsiam.make_simsiam(simsiam.resnet18(4), 32, 16, **options)


@pytest.fixture
def views():
    return torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def gradients(model, views, loss=simsiam.simsiam_loss):
    model.zero_grad()
    loss(*model(*views)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6, msg=name)


# ---------------------------------------------------------------------------------------------------
# The model


def test_the_default_is_simsiam_itself():
    torch.manual_seed(0)
    plain = simsiam.SimSiam(simsiam.resnet18(4), 32, 16)
    made = variant()
    assert type(made) is simsiam.SimSiam
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), made.state_dict().values(), strict=True))


def test_without_a_predictor_the_stop_gradient_only_halves_the_gradient(views):
    """Sec. 4.2: 'in this case, using stop-gradient is equivalent to removing stop-gradient and scaling the loss by 1/2'."""
    stopped, free = (gradients(variant(predictor="none", stop_gradient=stop), views) for stop in (True, False))
    assert_close({name: 2 * gradient for name, gradient in stopped.items()}, free)
    assert max(gradient.abs().max() for gradient in free.values()) > 1e-3


def test_without_stop_gradient_the_targets_learn(views):
    model = variant(stop_gradient=False)
    whole = gradients(model, views)
    stopped = gradients(variant(), views)
    # What comes through the targets alone: the predictor's outputs are constants.
    model.zero_grad()
    p1, p2, z1, z2 = model(*views)
    simsiam.simsiam_loss(p1.detach(), p2.detach(), z1, z2).backward()
    through_targets = {name: torch.zeros_like(gradient) for name, gradient in whole.items()}
    through_targets |= {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert_close(whole, {name: stopped[name] + through_targets[name] for name in whole})
    assert max(gradient.abs().max() for gradient in through_targets.values()) > 1e-3


def test_a_predictor_that_is_fixed_or_none(views):
    fixed = variant(predictor="fixed")
    assert all(name.startswith(("backbone", "projector")) for name in gradients(fixed, views))
    before = copy.deepcopy(fixed.predictor.state_dict())
    optimizer = torch.optim.SGD(fixed.parameters(), 0.1, 0.9, weight_decay=0.1)
    optimizer.step()
    after = fixed.predictor.state_dict()
    assert all(torch.equal(before[name], after[name]) for name, _ in fixed.predictor.named_parameters())
    none = variant(predictor="none")
    p1, p2, z1, z2 = none(*views)
    assert torch.equal(p1, z1) and torch.equal(p2, z2) and p1.requires_grad and not z1.requires_grad


@pytest.mark.parametrize("head_bn, layout", [
    ("none", ("linear+bias relu linear+bias", "linear+bias relu linear+bias")),
    ("hidden", ("linear bn relu linear+bias", "linear bn relu linear+bias")),
    ("default", ("linear bn relu linear bn-plain", "linear bn relu linear+bias")),
    ("all", ("linear bn relu linear bn-plain", "linear bn relu linear bn-plain")),
])
def test_batch_norms_of_the_heads(head_bn, layout):
    """The rows of Table 3."""
    def words(module):
        if isinstance(module, nn.Linear):
            return "linear" if module.bias is None else "linear+bias"
        if isinstance(module, nn.BatchNorm1d):
            return "bn" if module.affine else "bn-plain"
        return type(module).__name__.lower()

    model = variant(head_bn=head_bn)
    assert tuple(" ".join(map(words, head)) for head in (model.projector, model.predictor)) == layout


@pytest.mark.parametrize("arch", simsiam.ARCHS)
def test_zero_initialized_blocks_are_their_shortcuts(arch):
    torch.manual_seed(0)
    backbone = simsiam.ARCHS[arch](4)
    simsiam.make_simsiam(backbone, 32, 16, zero_init_residual=True)
    block = backbone.layer2[0]
    x = torch.randn(4, backbone.layer1[-1].bn2.num_features * block.expansion, 8, 8)
    torch.testing.assert_close(block(x), block.downsample(x).relu(), rtol=0, atol=1e-6)
    x = torch.randn(4, block.expansion * 8, 8, 8)
    torch.testing.assert_close(backbone.layer2[1](x), x.relu(), rtol=0, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# The loss


def test_losses_are_the_papers_formulas():
    p1, p2, z1, z2 = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0)).double()

    def softmax(row):
        return row.exp() / row.exp().sum()

    def cross_entropy(p, z):  # Sec. 4.5, row by row
        return torch.stack([-(softmax(b) * softmax(a).log()).sum() for a, b in zip(p, z)]).mean().float()

    def check(value, expected):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, expected)

    check(simsiam.cross_entropy(p1, z2), cross_entropy(p1, z2))
    check(simsiam.simsiam_loss(p1, p2, z1, z2, simsiam.cross_entropy), (cross_entropy(p1, z2) + cross_entropy(p2, z1)) / 2)
    check(simsiam.asymmetric_loss(p1, p2, z1, z2), simsiam.negative_cosine(p1, z2))
    check(simsiam.asymmetric_loss(p1, p2, z1, z2, simsiam.cross_entropy), cross_entropy(p1, z2))


def make_step(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), 0.0, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return pretraining.make_train_step(model, optimizer, scaler, autocast(CPU, "fp32"), False, torch.contiguous_format, **options)


def test_two_pairs_are_the_mean_of_both(shapes):
    order, *draws = pretraining.draw_epoch(0, 0, 64, 32, (32, 32), CPU, views=4)
    assert len(draws) == 4 and not torch.equal(draws[1].top, draws[3].top)
    images = shapes.train_images[order]

    def alone(pair):
        model = variant()
        loss, std, _ = make_step(model, loss_function=simsiam.asymmetric_loss)(images, *pair)
        return loss, std, [parameter.grad for parameter in model.parameters()]

    model = variant()
    loss, std, _ = make_step(model, loss_function=simsiam.asymmetric_loss, pairs=2)(images, *draws)
    first, second = alone(draws[:2]), alone(draws[2:])
    torch.testing.assert_close(loss, (first[0] + second[0]) / 2)
    torch.testing.assert_close(std, (first[1] + second[1]) / 2)
    for parameter, a, b in zip(model.parameters(), first[2], second[2], strict=True):
        torch.testing.assert_close(parameter.grad, (a + b) / 2, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------------------------------------------
# Collapse


@pytest.mark.parametrize("batch", [32, 64, 512])
def test_the_std_of_a_collapse_behind_a_batch_norm(batch):
    """All outputs but one in one direction: 2 / sqrt(B); all but two: sqrt(2) times that, nearly. Both count as a collapse."""
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0)).sign()
    sizes = torch.ones(batch, 1)
    sizes[3] = 1 - batch
    one = simsiam.feature_std(sizes * direction).item()
    sizes[3] = sizes[4] = 1 - batch / 2
    two = simsiam.feature_std(sizes * direction).item()
    assert one == pytest.approx(2 / math.sqrt(batch), rel=1e-3)
    assert two == pytest.approx(2 * math.sqrt(2 / batch), rel=2 / batch)
    assert one < two < metrics.collapse_std(batch) < 0.8
    assert metrics.collapse_std(batch, "none") == metrics.collapse_std(batch, "hidden") == 0.1


def test_no_batch_of_mean_zero_is_nearer_to_one_output():
    """The root mean square over channels of the std, which feature_std averages plainly, is at least 2 / sqrt(B) for any of them:
    tried on batches that were made to have little."""
    generator = torch.Generator().manual_seed(0)
    for batch in (8, 16, 64):
        for _ in range(3):
            z = torch.randn(batch, 8, generator=generator, requires_grad=True)
            optimizer = torch.optim.Adam([z], 0.1)
            for _ in range(300):
                centered = torch.nn.functional.normalize(z - z.mean(dim=0), dim=1)
                spread = (centered.var(dim=0).mean() * z.shape[1]).sqrt()
                optimizer.zero_grad()
                spread.backward()
                optimizer.step()
            assert 0.999 * 2 / math.sqrt(batch) < spread.item() < 0.95


def test_outputs_collapse_without_stop_gradient_or_predictor_and_not_with(run_main):
    found = {}
    for name, options in {"with": (), "without": ("--no-stop_gradient",), "no predictor": ("--predictor", "none")}.items():
        run_main("--epochs", 10, "--learning_rate", 0.1, "--eval_freq", 100, "--trial", name, *options)
        found[name] = log.read(f"experiments/{name}")[-1]
    assert found["with"]["loss"] > -0.4 and found["with"]["std"] > 0.9
    for name in ("without", "no predictor"):
        assert found[name]["loss"] < -0.6 and found[name]["std"] < 0.75


def test_a_collapse_has_its_cause(run_main, monkeypatch, capsys):
    monkeypatch.setattr("main.feature_std", lambda z: 0.4 + 0 * z.std())
    for options in (("--no-stop_gradient",), ("--predictor", "none")):
        run_main("--epochs", 3, *options)
        error = capsys.readouterr().err
        assert "std 0.4000, for 3 epochs below 0.53" in error and "Without stop-gradient or predictor" in error and "rate too high" not in error


# ---------------------------------------------------------------------------------------------------
# Rates


def test_warm_up():
    """Linear growth to the full rate, then the cosine over what is left."""
    rates = [pretraining.cosine_rate(0.5, epoch, 100, 10) for epoch in range(100)]
    assert rates[:11] == pytest.approx([0.5 * (epoch + 1) / 11 for epoch in range(11)])
    assert rates[10:] == pytest.approx([0.25 * (1 + math.cos(math.pi * i / 90)) for i in range(90)])


def test_the_predictors_rate_is_kept(run_main, monkeypatch):
    """Table 1c, as the rates with which SGD steps in each epoch."""
    seen, usual = [], torch.optim.SGD.step

    def step(optimizer, *args):
        seen.append([(len(group["params"]), group["lr"]) for group in optimizer.param_groups])
        return usual(optimizer, *args)

    monkeypatch.setattr(torch.optim.SGD, "step", step)
    assert run_main("--epochs", 2, "--learning_rate", 0.5, "--fix_pred_lr", "--trial", "run") == 0
    predictor = len(list(variant().predictor.parameters()))
    rest = len(list(variant().parameters())) - predictor
    assert seen[0] == [(rest, 0.5), (predictor, 0.5)] and seen[-1] == [(rest, pytest.approx(0.25)), (predictor, 0.5)]
    # A resumed run keeps it too.
    assert run_main("--epochs", 2, "--learning_rate", 0.5, "--fix_pred_lr", "--trial", "stopped", "--max_minutes", 1e-5) == 0
    seen.clear()
    assert run_main("--resume", "auto", "--trial", "stopped") == 0
    assert seen[-1][1] == (predictor, 0.5)
    first, second = (checkpoint.load(f"experiments/{name}/checkpoint.pt")["model"] for name in ("run", "stopped"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_set_rate_leaves_a_second_group():
    weights = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": [weight]} for weight in weights], 0.5)
    set_rate(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5]


# ---------------------------------------------------------------------------------------------------
# Blur and crops


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur_is_torchvisions(shapes, sigma):
    pictures = shapes.train_images[:8] / 255
    sigmas = torch.full((8,), sigma)
    sigmas[3] = 0
    blurred = augment.blur(pictures, sigmas)
    expected = functional.gaussian_blur(pictures, [3, 3], [sigma, sigma])
    assert torch.equal(blurred[3], pictures[3])
    torch.testing.assert_close(blurred[[0, 1, 2, 4, 5, 6, 7]], expected[[0, 1, 2, 4, 5, 6, 7]], rtol=0, atol=1e-6)


def test_blurred_views_are_normalized_blurred_pictures(shapes):
    generator = torch.Generator().manual_seed(0)
    draws = augment.draw_blur(augment.draw_views(64, generator), generator, 0.5)
    plain, blurred = augment.apply_views(shapes.train_images[:64], draws), augment.blurred_views(shapes.train_images[:64], draws)
    torch.testing.assert_close(blurred, augment.normalize(augment.blur(augment.denormalize(plain), draws.sigma)), rtol=0, atol=1e-4)
    sharp = draws.sigma == 0
    assert torch.equal(blurred[sharp], plain[sharp]) and not torch.equal(blurred[~sharp], plain[~sharp])


def test_blur_is_drawn_with_its_probability_and_changes_no_other_draw():
    plain, blurred = (pretraining.draw_epoch(0, 3, 20_000, 20_000, (32, 32), CPU, blur_p=p) for p in (0.0, 0.3))
    assert torch.equal(plain[0], blurred[0])
    for sharp, of_view in zip(plain[1:], blurred[1:], strict=True):
        assert not sharp.sigma.any()
        assert all(torch.equal(a, b) for a, b in zip(sharp[:-1], of_view[:-1], strict=True))
        drawn = of_view.sigma[of_view.sigma > 0]
        assert len(drawn) / 20_000 == pytest.approx(0.3, abs=0.02)
        assert 0.1 <= drawn.min() < 0.11 and 1.99 < drawn.max() <= 2 and drawn.mean() == pytest.approx(1.05, abs=0.03)
    assert not torch.equal(blurred[1].sigma, blurred[2].sigma)


def test_main_uses_blur_and_crops(run_main, monkeypatch):
    scales, blurred = [], []
    draw, blur = pretraining.draw_views, augment.blur
    monkeypatch.setattr(pretraining, "draw_views", lambda *args: scales.append(args[-1]) or draw(*args))
    monkeypatch.setattr(augment, "blur", lambda x, sigma: blurred.append(sigma) or blur(x, sigma))
    assert run_main("--epochs", 1, "--crop_scale", 0.08, "--blur", 0.5) == 0
    assert set(scales) == {(0.08, 1.0)} and 0.3 < (torch.cat(blurred) > 0).float().mean() < 0.7
    blurred.clear()
    assert run_main("--epochs", 1) == 0
    assert scales[-1] == (0.2, 1.0) and not blurred


# ---------------------------------------------------------------------------------------------------
# Runs


OTHER = {
    "stop_gradient": False, "predictor": "fixed", "fix_pred_lr": True, "head_bn": "all", "similarity": "cross_entropy", "symmetry": "asymmetric_2x",
    "warmup_epochs": 1, "crop_scale": 0.3, "blur": 0.4, "zero_init_residual": True,
}


def option_of(name):
    value = OTHER[name]
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("default") / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in DRAWING:
            patch.setattr(pretraining, name, lambda *args: None)
        assert pretraining.main([*SMALL, "--epochs", "2", "--exp_dir", str(folder.parent), "--trial", "run"]) == 0
    return str(folder)


@pytest.mark.parametrize("name", STUDY)
def test_each_switch_makes_another_run(run_main, default_run, name):
    """It changes what is trained, is kept in the checkpoint, and the run stands by itself in figures."""
    assert run_main("--epochs", 2, "--trial", "other", *option_of(name)) == 0
    states = [checkpoint.load(f"{folder}/checkpoint.pt") for folder in (default_run, "experiments/other")]
    assert [state["config"][name] for state in states] == [STUDY[name], OTHER[name]]
    assert not torch.equal(*(state["model"]["backbone.layer1.0.conv1.weight"] for state in states))
    assert len(read_lines([default_run, "experiments/other"])) == 2


@pytest.mark.parametrize("name", STUDY)
def test_a_resumed_run_cannot_change_a_switch(default_run, name):
    config = checkpoint.load(f"{default_run}/checkpoint.pt")["config"]
    argv = [*SMALL, "--epochs", "2"]
    assert resumed_settings(PRETRAINING, pretraining.make_parser(), argv, config).seed == 0
    with pytest.raises(ValueError, match=f"--{name} {OTHER[name]}: the run to resume has {STUDY[name]}"):
        resumed_settings(PRETRAINING, pretraining.make_parser(), [*argv, *option_of(name)], config)


def test_the_defaults_are_the_same_everywhere():
    parser = pretraining.make_parser()
    assert {name: parser.get_default(name) for name in STUDY} == STUDY
    assert {*STUDY} <= {*PRETRAINING.recipe}


def test_runs_from_before_there_were_switches(default_run, tmp_path):
    """Their checkpoints and settings do not have them: such a run goes on, and counts as the default."""
    old = str(tmp_path / "old")
    shutil.copytree(default_run, old)
    state = checkpoint.load(f"{old}/checkpoint.pt")
    whole = dict(state["config"])
    state["config"] = {name: value for name, value in whole.items() if name not in STUDY}
    checkpoint.save(f"{old}/checkpoint.pt", state)
    config = log.read_json(f"{old}/config.json")
    config["settings"] = {name: value for name, value in config["settings"].items() if name not in STUDY}
    log.write_json(f"{old}/config.json", config)
    assert load_state(PRETRAINING, f"{old}/checkpoint.pt")["config"] == whole
    assert len(read_lines([default_run, old])) == 1


@pytest.mark.parametrize("options, words", [
    (["--fix_pred_lr", "--predictor", "none"], ["--fix_pred_lr", "no predictor that learns"]),
    (["--fix_pred_lr", "--predictor", "fixed"], ["--fix_pred_lr", "--predictor fixed"]),
    (["--warmup_epochs", "2"], ["--warmup_epochs 2", "2 epochs"]),
    (["--blur", "1.5"], ["--blur", "0 to 1"]),
    (["--crop_scale", "0"], ["--crop_scale", "more than 0"]),
    (["--head_bn", "hiden"], ["--head_bn", "did you mean hidden?"]),
    (["--symmetry", "asymmetric2x"], ["did you mean asymmetric_2x?"]),
])
def test_what_does_not_go_together_is_refused(run_main, capsys, options, words):
    with pytest.raises(SystemExit) as stop:
        run_main("--epochs", 2, *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and all(word in error for word in words)


def test_all_variants_are_options_of_main():
    """Each changes something, the default nothing, and no two are the same."""
    parser = pretraining.make_parser()
    default, seen = vars(parser.parse_args([])), {}
    for study in make_studies(100, 512, 0.06).values():
        for each in study.variants:
            settings = vars(parser.parse_args(list(each.options)))
            changed = tuple((name, settings[name]) for name in default if settings[name] != default[name])
            assert bool(changed) == (each.name != "default"), each
            assert seen.setdefault(changed, each.name) == each.name
    assert ("batch_size", 4096) in next(changed for changed, name in seen.items() if name == "batch-4096")
    for epochs in (2, 9, 10, 200):  # a warm-up is one in short runs too
        options = {each.name: each.options for each in make_studies(epochs, 512, 0.06)["practice"].variants}
        assert options["warm-up"] == ("--warmup_epochs", str(max(1, epochs // 10)))


def test_other_batches_have_rates_in_proportion():
    variants = {each.name: each.options for each in make_studies(100, 64, 0.03)["batch_size"].variants}
    assert variants["default"] == () and "batch-64" not in variants
    assert variants["batch-512"] == ("--batch_size", "512", "--learning_rate", "0.24")
    assert variants["batch-1024"][-2:] == ("--warmup_epochs", "10") and "--learning_rate 0.48" in " ".join(variants["batch-1024"])
