"""main_lincls.py end to end, and its parts against closed forms."""
import json
import os

import pytest
import torch

import main_lincls
import simsiam
from utils import checkpoint, log


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
    assert sorted(os.listdir("experiments/eval")) == [
        "classifier.pt", "config.json", "confusion.png", "evaluation.pt", "log.jsonl", "loss-plot.png", "results.json", "top1-acc.png",
    ]


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
    build = main_lincls.build_backbone

    def in_training_mode(*args):
        backbone = build(*args)
        backbone.eval = lambda: None
        return backbone.train()  # the batch norm statistics would drift

    monkeypatch.setattr(main_lincls, "build_backbone", in_training_mode)
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
