"""main_lincls.py end to end, and its parts against closed forms."""
import json
import os
import shutil
import signal
import statistics

import pytest
import torch

import main_lincls
import simsiam
from utils import checkpoint, log
from utils.augment import MEAN, STD, Draws, draw_views, epoch_generator, normalize
from utils.data import balanced_subset
from utils.device import autocast
from utils.features import make_augmented_features
from utils.metrics import class_accuracies, confusion_matrix, top_k


@pytest.mark.parametrize("features", ["augmented", "cached"])
@pytest.mark.parametrize("file", ["backbone.pt", "checkpoint.pt"])
def test_evaluates_what_main_wrote(finished_run, run_lincls, capsys, features, file):
    path = os.path.join(finished_run, file)
    assert run_lincls("--pretrained", path, "--features", features, "--epochs", 5, "--trial", "eval") == 0
    output = capsys.readouterr().out
    records = log.read("experiments/eval")
    assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5]
    best = max(record["test_top1"] for record in records)
    assert f"linear top-1: {records[-1]['test_top1']:.2f} %, last epoch (5), the first 100 test pictures" in output
    assert f"{best:.2f} %, chosen on the test pictures" in output
    assert sorted(os.listdir("experiments/eval")) == ["classifier.pt", "config.json", "evaluation.pt", "log.jsonl", "results.json"]


def test_the_saved_classifier_gives_the_headline(finished_run, run_lincls, no_gpu, shapes):
    path = os.path.join(finished_run, "backbone.pt")
    assert run_lincls("--pretrained", path, "--features", "cached", "--epochs", 3, "--trial", "eval") == 0
    backbone = simsiam.resnet18(4).eval()
    backbone.load_state_dict(checkpoint.load(path))
    classifier = torch.nn.Linear(32, 10)
    classifier.load_state_dict(torch.load("experiments/eval/classifier.pt", weights_only=True))
    images = shapes.test_images[:100] / 255
    mean, std = torch.tensor((0.4914, 0.4822, 0.4465)), torch.tensor((0.2470, 0.2435, 0.2616))
    with torch.no_grad():
        predicted = classifier(backbone((images - mean.view(3, 1, 1)) / std.view(3, 1, 1))).argmax(dim=1)
    accuracy = 100 * (predicted == shapes.test_labels[:100]).double().mean().item()
    assert log.read("experiments/eval")[-1]["test_top1"] == pytest.approx(accuracy)


def test_the_backbone_is_frozen_and_a_moving_one_is_noticed(finished_run, run_lincls, monkeypatch):
    path = os.path.join(finished_run, "backbone.pt")
    def in_training_mode(*args, **options):
        backbone = simsiam.load_backbone(*args, **options)
        backbone.eval = lambda: None
        return backbone.train()  # the batch norm statistics would drift

    monkeypatch.setattr(main_lincls, "load_backbone", in_training_mode)
    with pytest.raises(AssertionError, match="moved.*bn1.running_mean"):
        run_lincls("--pretrained", path, "--epochs", 1)


def test_same_seed_same_result(finished_run, run_lincls, no_gpu):
    path = os.path.join(finished_run, "backbone.pt")
    for trial in ("a", "b"):
        assert run_lincls("--pretrained", path, "--epochs", 2, "--trial", trial) == 0
    a, b = (torch.load(f"experiments/{trial}/classifier.pt", weights_only=True) for trial in "ab")
    assert torch.equal(a["weight"], b["weight"])


def test_rate_falls_after_60_and_80_of_100_epochs():
    check_schedule("step", lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [60, 80]))


def test_the_cosine_schedule_is_torchs():
    check_schedule("cosine", lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100))


def check_schedule(name, make):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=30.0)
    schedule = make(optimizer)
    for epoch in range(100):
        assert main_lincls.scheduled_rate(name, 30.0, epoch, 100) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_a_classifier_learns_separable_features(monkeypatch, tmp_path, run_lincls, no_gpu, shapes):
    """With features that are the classes themselves, the protocol reaches 100 %."""
    backbone = simsiam.resnet18(4)
    torch.save(backbone.state_dict(), tmp_path / "backbone.pt")

    def one_hot(backbone, images, *args):
        labels = shapes.train_labels[:256] if len(images) == 256 else shapes.test_labels[:100]
        return torch.nn.functional.one_hot(labels, 32).float()

    monkeypatch.setattr(main_lincls, "extract_features", one_hot)
    run_lincls("--pretrained", tmp_path / "backbone.pt", "--features", "cached", "--epochs", 10, "--trial", "eval")
    assert log.read("experiments/eval")[-1]["test_top1"] == 100


def test_the_config_has_every_setting(finished_run, run_lincls):
    path = os.path.join(finished_run, "backbone.pt")
    run_lincls("--pretrained", path, "--features", "cached", "--epochs", 1, "--batch_size", 128, "--trial", "eval")
    with open("experiments/eval/config.json") as file:
        settings = json.load(file)["settings"]
    assert settings["pretrained"] == path and settings["num_cls"] == 10
    assert settings["lr"] == 15.0  # the rate follows the batch


def test_a_loss_that_is_not_finite_is_no_result(finished_run, run_lincls, capsys):
    assert run_lincls("--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--lr", 1e38) == 1
    captured = capsys.readouterr()
    assert "lower --lr" in captured.err and "linear top-1" not in captured.out


def results(trial):
    with open(f"experiments/{trial}/results.json") as file:
        return json.load(file)


def stop_at(count, monkeypatch):
    """Have SIGTERM come in the count-th step."""
    usual, calls = main_lincls.train_step, 0

    def train_step(*args):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return usual(*args)

    monkeypatch.setattr(main_lincls, "train_step", train_step)


@pytest.mark.parametrize("args, stops", [
    ("--epochs 3 --batch_size 64 --seeds 2 --fraction 0.8", (1, 7, 8)),  # four steps an epoch, of two classifiers each
    ("--features cached --epochs 3 --batch_size 64", (6,)),
    ("--features cached --epochs 12 --optimizer lbfgs --weight_decay 0.01", (5,)),
])
def test_a_stopped_evaluation_goes_on_exactly(finished_run, run_lincls, no_gpu, monkeypatch, capsys, args, stops):
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), *args.split()]
    assert run_lincls(*base, "--trial", "whole") == 0
    go_on = [*base, "--trial", "stopped"]
    for count in stops:
        with monkeypatch.context() as patch:
            stop_at(count, patch)
            assert run_lincls(*go_on) == 128 + signal.SIGTERM
        go_on = capsys.readouterr().out.split("main_lincls.py ")[-1].split()
        assert go_on == ["--resume", "experiments/stopped/evaluation.pt"]
    assert main_lincls.main(go_on) == 0
    names = [name for name in os.listdir("experiments/whole") if name.startswith("classifier")]
    assert len(names) == (2 if "--seeds" in args else 1)
    for name in names:
        whole, stopped = (checkpoint.load(f"experiments/{trial}/{name}") for trial in ("whole", "stopped"))
        assert torch.equal(whole["weight"], stopped["weight"]) and torch.equal(whole["bias"], stopped["bias"])
    without_time = [[{**record, "seconds": 0} for record in log.read(f"experiments/{trial}")] for trial in ("whole", "stopped")]
    assert without_time[0] == without_time[1] and {**results("whole"), "seconds": 0} == {**results("stopped"), "seconds": 0}


def test_a_time_limit_ends_with_zero_and_auto_goes_on(finished_run, run_lincls, no_gpu, capsys):
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached"]
    assert run_lincls(*base, "--max_minutes", 1e-6, "--trial", "a") == 0
    assert "stopped; to go on" in capsys.readouterr().out
    assert run_lincls("--resume", "auto") == 0
    assert log.read("experiments/a")[-1]["epoch"] == 100
    capsys.readouterr()
    for again in ((), base):
        assert run_lincls(*again, "--resume", "auto") == 0
        assert "already done, epoch 100 of 100" in capsys.readouterr().out


def test_a_finished_evaluation_is_not_taken_for_one_of_another_backbone(finished_run, run_lincls, no_gpu, capsys):
    """As where a run was made again under its old name."""
    shutil.copy(os.path.join(finished_run, "backbone.pt"), "backbone.pt")
    base = ["--pretrained", "backbone.pt", "--features", "cached", "--epochs", 1]
    assert run_lincls(*base, "--trial", "a") == 0
    state = checkpoint.load("backbone.pt")
    checkpoint.save("backbone.pt", {**state, "bn1.bias": state["bn1.bias"] + 1})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_lincls(*base, "--trial", "a", "--resume", "auto")
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "not the backbone that" in said and said.count("\n") == 1


def test_an_evaluation_goes_on_without_its_log(finished_run, run_lincls, no_gpu, monkeypatch):
    """And the best epoch is still one of all epochs."""
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--epochs", 4, "--batch_size", 64]
    assert run_lincls(*base, "--trial", "whole") == 0
    with monkeypatch.context() as patch:
        stop_at(14, patch)
        assert run_lincls(*base, "--trial", "stopped") == 128 + signal.SIGTERM
    os.remove("experiments/stopped/log.jsonl")
    assert run_lincls("--resume", "auto", "--trial", "stopped") == 0
    assert {**results("whole"), "seconds": 0} == {**results("stopped"), "seconds": 0}


def test_weights_that_are_not_finite_are_no_result(finished_run, run_lincls, capsys):
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--trial", "a"]
    assert run_lincls(*base, "--epochs", 1, "--batch_size", 256, "--lr", 1e39) == 1  # the only loss comes before the step
    captured = capsys.readouterr()
    assert "not finite numbers after the last step; lower --lr (1e+39)" in captured.err and "linear top-1" not in captured.out
    assert not os.path.exists("experiments/a/classifier.pt")


def test_a_class_without_test_pictures_has_no_accuracy(finished_run, run_lincls, no_gpu):
    run_lincls("--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--epochs", 1, "--test_size", 3, "--trial", "a")
    assert list(results("a")["class_top1"].values()).count(None) >= 7


def test_a_file_that_cannot_be_written_is_an_error(finished_run, run_lincls, no_gpu, monkeypatch, capsys):
    usual = checkpoint.save

    def save(path, *args, **options):
        if path.endswith("classifier-seed0.pt"):
            raise OSError("no room for classifier-seed0.pt")
        usual(path, *args, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--epochs", 1, "--seeds", 2]
    assert run_lincls(*base, "--trial", "a") == 1
    assert "error: no room for classifier-seed0.pt" in capsys.readouterr().err
    assert os.path.exists("experiments/a/classifier-seed1.pt") and os.path.exists("experiments/a/results.json")


def test_a_classifier_of_another_backbone_is_warned_of(finished_run, run_lincls, no_gpu, capsys):
    path = os.path.join(finished_run, "backbone.pt")
    run_lincls("--pretrained", path, "--features", "cached", "--epochs", 1, "--trial", "a")
    checkpoint.save("other.pt", {name: 2 * value for name, value in checkpoint.load(path).items()})
    assert "another backbone" not in capsys.readouterr().err
    assert run_lincls("--pretrained", "other.pt", "--evaluate", "experiments/a/classifier.pt") == 0
    assert "another backbone" in capsys.readouterr().err


def test_several_seeds_are_several_evaluations(finished_run, run_lincls, no_gpu, capsys):
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt"), "--epochs", 2]
    for seed in (3, 4, 5):
        run_lincls(*base, "--seed", seed, "--trial", f"alone{seed}")
    capsys.readouterr()
    assert run_lincls(*base, "--seed", 3, "--seeds", 3, "--trial", "together") == 0
    output = capsys.readouterr().out
    alone = [results(f"alone{seed}")["test_top1"] for seed in (3, 4, 5)]
    for seed in (3, 4, 5):
        one, other = (checkpoint.load(f"experiments/{path}") for path in (f"alone{seed}/classifier.pt", f"together/classifier-seed{seed}.pt"))
        assert torch.equal(one["weight"], other["weight"])
    together = results("together")
    assert together["test_top1_of_seeds"] == alone and together["seeds"] == [3, 4, 5]
    assert together["test_top1"] == pytest.approx(statistics.mean(alone)) and together["test_top1_std"] == pytest.approx(statistics.stdev(alone))
    assert f"linear top-1: {statistics.mean(alone):.2f} ± {statistics.stdev(alone):.2f} % (mean and std of 3 classifiers, seeds 3 to 5)" in output


def test_evaluate_tests_a_saved_classifier(finished_run, run_lincls, no_gpu, capsys):
    base = ["--pretrained", os.path.join(finished_run, "backbone.pt")]
    run_lincls(*base, "--features", "cached", "--epochs", 3, "--trial", "trained")
    capsys.readouterr()
    assert run_lincls(*base, "--evaluate", "experiments/trained/classifier.pt", "--trial", "tested") == 0
    first, second = results("trained"), results("tested")
    assert f"linear top-1: {first['test_top1']:.2f} %, the first 100 test pictures" in capsys.readouterr().out
    for name in ("test_top1", "test_top5", "class_top1", "confusion"):
        assert first[name] == second[name]
    assert sorted(os.listdir("experiments/tested")) == ["config.json", "log.jsonl", "results.json"]


def test_lbfgs_finds_the_minimum(finished_run, run_lincls, no_gpu, shapes):
    """The same as Newton's method in float64: the loss is strictly convex."""
    decay = 0.02
    path = os.path.join(finished_run, "backbone.pt")
    assert run_lincls("--pretrained", path, "--features", "cached", "--optimizer", "lbfgs", "--weight_decay", decay, "--trial", "eval") == 0
    with torch.no_grad():
        features = simsiam.load_backbone(path)(normalize(shapes.train_images[:256])).double()
    features = torch.cat((features, torch.ones(256, 1)), dim=1)  # the bias is one more weight
    weights = torch.zeros(10, 33, dtype=torch.float64)

    def objective(flat):
        return torch.nn.functional.cross_entropy(features @ flat.view(10, 33).T, shapes.train_labels[:256]) + decay / 2 * flat.square().sum()

    for _ in range(20):
        flat = weights.flatten().requires_grad_()
        gradient = torch.autograd.grad(objective(flat), flat)[0]
        weights = (flat - torch.linalg.solve(torch.autograd.functional.hessian(objective, flat), gradient)).detach()
    assert gradient.abs().max() < 1e-9
    ours = checkpoint.load("experiments/eval/classifier.pt")
    ours = torch.cat((ours["weight"], ours["bias"][:, None]), dim=1).double()
    assert objective(ours.flatten()).item() == pytest.approx(objective(weights.flatten()).item(), abs=1e-5)
    torch.testing.assert_close(ours, weights.view(10, 33), rtol=0, atol=0.01)


def test_a_fraction_has_the_same_share_of_each_class():
    labels = torch.randint(10, (3000,), generator=torch.Generator().manual_seed(0))
    chosen = balanced_subset(labels, 0.1, seed=0)
    for label, count in enumerate(labels.bincount().tolist()):
        assert (labels[chosen] == label).sum().item() == round(count / 10)
    assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, balanced_subset(labels, 0.1, seed=0))
    assert not torch.equal(chosen, balanced_subset(labels, 0.1, seed=1))
    assert torch.equal(balanced_subset(labels, 1.0, seed=0), torch.arange(3000))
    assert balanced_subset(labels, 1e-9, seed=0).numel() == 10


def test_a_fraction_of_the_labels_is_what_is_trained_on(finished_run, run_lincls, no_gpu, capsys):
    path = os.path.join(finished_run, "backbone.pt")
    assert run_lincls("--pretrained", path, "--features", "cached", "--fraction", 0.1, "--epochs", 1, "--batch_size", 1, "--trial", "eval") == 0
    assert " of 256 pictures" in capsys.readouterr().out
    assert log.read("experiments/eval")[-1]["lr"] == 30 / 256


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_augmented_features_on_a_gpu(shapes):
    """Compiled they are the eager ones, but for rounding, and those of the CPU from the same draws."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    backbone = simsiam.resnet18(8).eval()
    draws = draw_views(50, epoch_generator(0, 0, cpu), 32, 32, scale=(0.08, 1.0))
    expected = make_augmented_features(backbone, autocast(cpu, "fp32"), MEAN, STD, False)(shapes.train_images[:50], draws)
    backbone = backbone.to(gpu, memory_format=torch.channels_last)
    images, draws = shapes.train_images[:50].to(gpu), Draws(*(field.to(gpu) for field in draws))
    for precision, tolerance in (("fp32", 0.01), ("bf16", 0.1)):
        for compiled in (False, True):
            found = make_augmented_features(backbone, autocast(gpu, precision), MEAN, STD, compiled)(images, draws).cpu()
            assert (found - expected).norm() < tolerance * expected.norm()


def test_accuracies_by_hand():
    logits = torch.randn(500, 7, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(500) % 7
    predicted = logits.argmax(dim=1)
    ranks = [(row > row[label]).sum().item() for row, label in zip(logits, labels)]
    for k in (1, 5):
        assert top_k(logits, labels, k) == pytest.approx(100 * sum(rank < k for rank in ranks) / 500)
    confusion = confusion_matrix(predicted, labels, 7)
    for true in range(7):
        for taken in range(7):
            assert confusion[true, taken] == sum(a == true and b == taken for a, b in zip(labels.tolist(), predicted.tolist()))
    expected = [100 * (predicted[labels == label] == label).double().mean().item() for label in range(7)]
    assert class_accuracies(confusion).tolist() == pytest.approx(expected, rel=1e-5)


def test_results_say_what_each_class_has(finished_run, run_lincls, no_gpu, shapes):
    run_lincls("--pretrained", os.path.join(finished_run, "backbone.pt"), "--features", "cached", "--epochs", 3, "--trial", "eval")
    found = results("eval")
    assert list(found["class_top1"]) == shapes.classes and found["pictures"] == 100
    assert [sum(row) for row in found["confusion"]] == shapes.test_labels[:100].bincount(minlength=10).tolist()
    assert sum(found["confusion"][i][i] for i in range(10)) == pytest.approx(found["test_top1"])
