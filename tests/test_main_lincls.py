"""main_lincls.py end to end, and its two protocols against references."""
import os
import shlex
import signal

import pytest
import torch

import main_lincls
import simsiam
from conftest import before_calls
from utils import checkpoint, log
from utils.augment import crop_flip, draw_views, epoch_generator, normalize
from utils.data import balanced_subset
from utils.linear import fit_lbfgs
from utils.report import evaluation_command


def results(trial):
    found = checkpoint.read_json(f"experiments/{trial}/results.json")
    return {name: value for name, value in found.items() if name != "seconds"}


@pytest.mark.parametrize("features, options", [
    ("augmented", ("--epochs", 5, "--batch_size", 128)), ("cached", ()),
])
def test_evaluates_what_main_wrote(run_lincls, finished_run, no_gpu, shapes, capsys, features, options):
    """The result is that of the saved classifier, here and with --evaluate."""
    options += ("--precision", "fp32", "--pretrained", os.path.join(finished_run, "checkpoint.pt"))
    assert run_lincls("--features", features, *options, "--trial", "eval") == 0
    output, records, found = capsys.readouterr().out, log.read("experiments/eval"), results("eval")
    assert f"linear top-1: {records[-1]['test_top1']:.2f} %" in output and "100 test images" in output
    assert found["test_top1"] == records[-1]["test_top1"] and found["images"] == 100
    assert len(found["class_top1"]) == 10 and sum(map(sum, found["confusion"])) == 100
    assert {"classifier.pt", "config.json", "log.jsonl", "results.json"} <= set(os.listdir("experiments/eval"))
    if features == "augmented":
        best = max(record["test_top1"] for record in records)
        assert [record["epoch"] for record in records] == [1, 2, 3, 4, 5] and found["best_top1"] == best
        assert f"{best:.2f} %, selected on the test set" in output
        rates = [record["lr"] for record in records]  # 30 for a batch of 256, a tenth after 60 and after 80 %
        assert rates == pytest.approx([15, 15, 15, 1.5, 0.15])
    backbone = simsiam.load_backbone(os.path.join(finished_run, "backbone.pt"), verbose=False)
    weights = checkpoint.load("experiments/eval/classifier.pt")
    with torch.no_grad():
        logits = backbone(normalize(shapes.test_images[:100])) @ weights["weight"].T + weights["bias"]
    correct = (logits.argmax(dim=1) == shapes.test_labels[:100]).double().mean().item()
    assert found["test_top1"] == pytest.approx(100 * correct, abs=1.01)  # one image at a tie
    assert run_lincls("--evaluate", "experiments/eval/classifier.pt", "--precision", "fp32", "--trial", "again") == 0
    for name in ("test_top1", "test_top5", "class_top1", "confusion"):
        assert results("again")[name] == found[name]
    assert "trained with another" not in capsys.readouterr().err


def test_sgd_matches_the_protocol_written_out(run_lincls, finished_run, no_gpu, shapes, monkeypatch):
    """Two epochs: frozen features of random crops and flips, torch's SGD, no image dropped. The last batch is filled
    up, so that all have one shape and features are compiled once."""
    seen = []

    def recorded(device, function, *args):
        return lambda images, draws: seen.append((images.shape, draws.flip.shape)) or function(images, draws)

    monkeypatch.setattr("utils.device.compile_for", recorded)
    options = "--epochs 2 --batch_size 50 --lr 2.0 --seed 4 --precision fp32 --trial eval".split()
    assert run_lincls(*options) == 0
    assert seen == 6 * [((50, 3, 32, 32), (50,))]
    images, labels = shapes.train_images[:128], shapes.train_labels[:128]
    backbone = simsiam.load_backbone(os.path.join(finished_run, "backbone.pt"), verbose=False)
    torch.manual_seed(4)
    classifier = torch.nn.Linear(32, 10)
    torch.nn.init.normal_(classifier.weight, std=0.01)
    torch.nn.init.zeros_(classifier.bias)
    optimizer = torch.optim.SGD(classifier.parameters(), 2.0, momentum=0.9)
    for epoch in range(2):
        optimizer.param_groups[0]["lr"] = (2.0, 0.2)[epoch]  # after 60 and 80 % of two epochs: 1.2 and 1.6
        generator = epoch_generator(4, epoch, torch.device("cpu"))
        order = torch.randperm(128, generator=generator)
        views = normalize(crop_flip(images[order], draw_views(128, generator, scale=(0.08, 1.0))))
        with torch.no_grad():
            features = backbone(views)
        for rows in torch.arange(128).split(50):
            loss = torch.nn.functional.cross_entropy(classifier(features[rows]), labels[order[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    ours = checkpoint.load("experiments/eval/classifier.pt")
    torch.testing.assert_close(ours, dict(classifier.state_dict()), rtol=1e-3, atol=1e-3)


def test_lbfgs_finds_the_minimum():
    """The same as Newton's method, on features of very different scales and one that is constant."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (200,), generator=generator)
    features = torch.randn(200, 6, generator=generator) + labels[:, None] * torch.tensor([1.0, 0, 0.5, 0, 0, 0])
    features = features * 10.0 ** torch.arange(-3, 3) + 1
    features[:, 3] = 5.0
    classifier, decay = torch.nn.Linear(6, 3), 0.02
    loss, iterations = fit_lbfgs(classifier, features, labels, decay)

    standard = (features.double() - features.double().mean(dim=0)) / features.double().std(dim=0).clamp(min=1e-6)
    standard = torch.cat((standard, torch.ones(200, 1)), dim=1)  # the bias is one more weight

    def objective(flat):
        entropy = torch.nn.functional.cross_entropy(standard @ flat.view(3, 7).T, labels)
        return entropy + decay / 2 * flat.square().sum()

    flat = torch.zeros(21, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(objective, flat)
        flat = flat - torch.linalg.solve(torch.autograd.functional.hessian(objective, flat), gradient)
    assert gradient.abs().max() < 1e-9 and iterations < 200
    with torch.no_grad():
        logits = classifier(features).double()
    torch.testing.assert_close(logits, standard @ flat.view(3, 7).T, rtol=1e-3, atol=1e-3)
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=1e-4)


def test_a_backbone_that_moves_is_noticed(run_lincls, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "eval", lambda module: module)  # batch norm statistics drift
    with pytest.raises(AssertionError, match="the frozen backbone changed"):
        run_lincls("--epochs", 1)


@pytest.mark.parametrize("updates", [1, 6, 8])  # in the first epoch, in the second, in its last step
def test_an_interrupted_evaluation_resumes_to_the_same_result(run_lincls, no_gpu, capsys, updates):
    settings = ("--epochs", 4, "--batch_size", 32, "--fraction", 0.8)
    assert run_lincls(*settings, "--trial", "whole") == 0
    with before_calls([updates], torch.optim.SGD, "step", lambda: signal.raise_signal(signal.SIGTERM)):
        assert run_lincls(*settings, "--trial", "stopped") == 128 + signal.SIGTERM
    command = capsys.readouterr().out.split("main_lincls.py ")[-1].split()
    assert command == ["--resume", "experiments/stopped/evaluation.pt"]
    assert run_lincls(*command) == 0
    whole, stopped = (checkpoint.load(f"experiments/{trial}/classifier.pt") for trial in ("whole", "stopped"))
    assert torch.equal(whole["weight"], stopped["weight"]) and results("whole") == results("stopped")
    logs = [[{**record, "seconds": 0} for record in log.read(f"experiments/{trial}")] for trial in ("whole", "stopped")]
    assert logs[0] == logs[1]
    assert run_lincls("--resume", "auto", "--trial", "stopped") == 0
    assert "already finished" in capsys.readouterr().out


def test_a_time_limit_stops_either_kind_before_there_is_a_result(run_lincls, no_gpu):
    for features in ("augmented", "cached"):
        assert run_lincls("--features", features, "--max_minutes", 0, "--trial", features) == 0
        assert not os.path.exists(f"experiments/{features}/results.json")
        for _ in range(2):  # the second time it is finished, and stays as it is
            assert run_lincls("--resume", "auto", "--trial", features) == 0 and results(features)["test_top1"] >= 0
            assert log.read(f"experiments/{features}")[-1]["test_top1"] == results(features)["test_top1"]


def test_another_backbone_is_not_resumed_and_warned_of(run_lincls, finished_run, refused, no_gpu, capsys):
    assert run_lincls("--features", "cached", "--trial", "a") == 0
    weights = checkpoint.load(os.path.join(finished_run, "backbone.pt"))
    checkpoint.save("other.pt", {**weights, "bn1.bias": weights["bn1.bias"] + 1})
    refused(main_lincls.main, ["--resume", "auto", "--pretrained", "other.pt"], "not the backbone")
    assert run_lincls("--pretrained", "other.pt", "--evaluate", "experiments/a/classifier.pt") == 0
    assert "a/classifier.pt was trained with another backbone" in capsys.readouterr().err
    assert run_lincls("--image_size", 16, "--validation", 20, "--evaluate", "experiments/a/classifier.pt") == 0
    errors = capsys.readouterr().err
    assert "another image_size" in errors and "may have been trained on images of --validation 20" in errors
    checkpoint.save("empty.pt", {})
    refused(main_lincls.main, ["--dataset", "shapes", "--pretrained", "other.pt", "--evaluate", "empty.pt"], "no classifier")


def test_numbers_that_are_not_finite_are_no_result(run_lincls, capsys):
    assert run_lincls("--lr", 1e38, "--epochs", 3, "--trial", "a") == 1
    captured = capsys.readouterr()
    assert "not finite; lower the learning rate" in captured.err and "linear top-1" not in captured.out
    assert not os.path.exists("experiments/a/classifier.pt")


def test_validation_images_are_classified_instead_of_test_images(run_lincls, capsys):
    """A class without any has no accuracy."""
    assert run_lincls("--epochs", 1, "--validation", 3, "--trial", "a") == 0
    output = capsys.readouterr().out
    assert "3 validation images)" in output and "selected on the validation set" in output
    assert results("a")["images"] == 3 and list(results("a")["class_top1"].values()).count(None) >= 7


def test_the_next_command_has_the_images_of_the_run():
    settings = {"arch": "resnet18", "dataset": "cifar10", "data_root": "data", "train_size": 500, "validation": 50}
    words = shlex.split(evaluation_command(settings, "run", on_cpu=True))
    args = main_lincls.make_parser().parse_args(words[2:])
    assert (args.train_size, args.validation, args.data_root) == (500, 50, "data")


def test_a_fraction_of_the_labels_is_the_balanced_subset(finished_run, no_gpu, shapes):
    words = "--dataset shapes --train_size 128 --test_size 100 --fraction 0.3 --seed 2 --pretrained".split()
    args = main_lincls.make_parser().parse_args([*words, os.path.join(finished_run, "backbone.pt")])
    data, rows = main_lincls.prepare(args).data, balanced_subset(shapes.train_labels[:128], 0.3, 2)
    assert torch.equal(data.train_images, shapes.train_images[rows]) and len(rows) < 50
    assert torch.equal(data.train_labels, shapes.train_labels[rows])
