"""main_lincls.py --weights finetune against a written-out form, and what is done with the network: model.pt."""
import csv
import math
import os
import signal

import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import export
import main_lincls
import simsiam
from conftest import before_calls
from test_main_lincls import results
from utils import log
from utils.augment import crop_flip, draw_views, epoch_generator, normalize
from utils.linear import fit_lbfgs

OPTIONS = ("--weights", "finetune", "--epochs", 4, "--batch_size", 50, "--lr", 0.5, "--lr_backbone", 0.001,
           "--precision", "fp32", "--seed", 3)


@pytest.fixture
def model(run_lincls, no_gpu, capsys):
    """The path of a fine-tuned network."""
    assert run_lincls(*OPTIONS, "--trial", "fine") == 0
    assert f"fine-tuned top-1: {results('fine')['test_top1']:.2f} % (epoch 4, 100 test images)" in capsys.readouterr().out
    return "experiments/fine/model.pt"


def parameters(path):
    return dict(simsiam.load_model(path).state_dict())


def test_it_is_the_written_out_training(model, finished_run, shapes):
    """The fit of L-BFGS; twelve steps of the classifier and the backbone, in train mode, each with its rate along a
    cosine; then the statistics of batch norms, of three batches of whole images."""
    images, labels = shapes.train_images[:128], shapes.train_labels[:128]
    backbone = simsiam.load_backbone(os.path.join(finished_run, "backbone.pt"), verbose=False)
    classifier = torch.nn.Linear(32, 10)
    fit_lbfgs(classifier, backbone(normalize(images)).detach(), labels, 5 / 128)
    with torch.no_grad():
        predicted = classifier(backbone(normalize(shapes.test_images[:100]))).argmax(dim=1)
        correct = (predicted == shapes.test_labels[:100]).sum().item()
    rates = [(tensor, rate * tensor.detach().square().mean().item())  # relative to the pre-trained weights
             for module, rate in ((classifier, 0.5), (backbone.train(), 0.001)) for tensor in module.parameters()]
    optimizer = torch.optim.SGD([{"params": tensor} for tensor, _ in rates], 1.0, 0.9, foreach=False)
    for epoch in range(4):
        for group, (_, rate) in zip(optimizer.param_groups, rates):
            group["lr"] = rate * (1 + math.cos(math.pi * epoch / 4)) / 2
        generator = epoch_generator(3, epoch, torch.device("cpu"))
        order = torch.randperm(128, generator=generator)[:126]
        views = normalize(crop_flip(images[order], draw_views(126, generator, scale=(0.5, 1.0))))
        for rows in torch.arange(126).split(42):
            loss = torch.nn.functional.cross_entropy(classifier(backbone(views[rows])), labels[order[rows]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    order = torch.randperm(128, generator=epoch_generator(3, 4, torch.device("cpu")))[:126]
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over batches
    with torch.no_grad():
        for rows in order.split(42):
            backbone(normalize(images[rows]))
    expected, found = torch.nn.Sequential(backbone, classifier).state_dict(), parameters(model)
    torch.testing.assert_close(found, dict(expected), rtol=1e-2, atol=1e-3)
    of_stem = torch.nn.functional.conv2d(normalize(images[order]), found["0.conv1.weight"], padding=1)
    torch.testing.assert_close(found["0.bn1.running_mean"], of_stem.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-5)
    fit, *records = log.read("experiments/fine")
    assert fit["epoch"] == 0 and fit["linear_top1"] == results("fine")["linear_top1"] == correct
    assert [record["lr"] for record in records] == pytest.approx([0.5, 0.4268, 0.25, 0.0732], abs=1e-4)
    assert ["test_top1" in record for record in records] == [False, False, False, True]
    assert "best_top1" not in results("fine") and not os.path.exists("experiments/fine/classifier.pt")


def test_an_interrupted_one_resumes_exactly(model, run_lincls):
    with before_calls([5], torch.optim.SGD, "step", lambda: signal.raise_signal(signal.SIGTERM)):
        assert run_lincls(*OPTIONS, "--trial", "stopped") == 128 + signal.SIGTERM
    assert run_lincls(*OPTIONS, "--trial", "stopped", "--resume", "auto") == 0
    whole, stopped = parameters(model), parameters("experiments/stopped/model.pt")
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert results("fine") == results("stopped")


def test_the_network_is_tested_and_predicts_as_it_was_evaluated(model, run_lincls, shapes, capsys):
    network, found = simsiam.load_model(model), results("fine")
    assert main_lincls.main("--dataset shapes --train_size 128 --test_size 100 --precision fp32 --trial again --evaluate "
                            f"{model}".split()) == 0
    assert all(results("again")[name] == found[name] for name in ("test_top1", "class_top1", "confusion", "backbone"))
    assert "trained" not in capsys.readouterr().err
    os.makedirs("pictures/of things")
    for i, image in enumerate(shapes.test_images[:100]):
        to_pil_image(image).save(f"pictures/of things/{i:03}.png")
    export.main(f"predict --model {model} --images pictures --output found.csv".split())
    with open("found.csv", newline="") as file:
        header, *rows = csv.reader(file)
    with torch.no_grad():
        probabilities, predicted = network(normalize(shapes.test_images[:100])).softmax(dim=1).max(dim=1)
    assert header == ["file", "class", "probability"] and rows[7][0] == "pictures/of things/007.png"
    assert [name for _, name, _ in rows] == [network.about["classes"][number] for number in predicted]
    assert [float(value) for *_, value in rows] == pytest.approx(probabilities.tolist(), abs=1e-3)
    right = [name == shapes.classes[label] for (_, name, _), label in zip(rows, shapes.test_labels)]
    assert sum(right) == found["test_top1"]
    backbone, images = simsiam.load_backbone(model, verbose=False), normalize(shapes.test_images[:2])
    assert torch.equal(backbone(images), network[0](images)) and network.about["data"] == {"image_size": 32, "test_share": None}
    export.main(["predict", "--model", model, "--images", "pictures/of things/007.png", "--output", "one.csv"])
    with open("one.csv") as file:
        assert file.read().splitlines()[1].split(",")[1] == rows[7][1]


def test_a_foreign_stem_and_the_held_out_images_are_kept_in_mind(run_lincls, shapes, no_gpu, tmp_path):
    """A backbone without a ReLU after its stem is trained, and read again, with one; images that were trained on are
    not tested later."""
    state = simsiam.resnet18(4).state_dict()
    names = {"conv1": "0", "bn1": "1", **{f"layer{i}": str(i + 1) for i in range(1, 5)}}
    foreign = {name.replace(name.split(".")[0], f"backbone.{names[name.split('.')[0]]}", 1): state[name] for name in state}
    torch.save(foreign, "foreign.pt")
    assert not simsiam.load_backbone("foreign.pt", verbose=False).stem_relu
    for i, image in enumerate(shapes.train_images[:40]):
        os.makedirs(f"DIR/{'ab'[i % 2]}", exist_ok=True)
        to_pil_image(image).save(f"DIR/{'ab'[i % 2]}/{i}.png")
    folder = ["--dataset", "folder", "--precision", "fp32", "DIR"]
    options = ["--pretrained", "foreign.pt", "--weights", "finetune", "--epochs", "2", "--test_share", "0.3"]
    assert main_lincls.main([*options, "--trial", "fine", *folder]) == 0
    os.rename("experiments/fine/model.pt", "model.pt")
    assert main_lincls.main(["--evaluate", "model.pt", "--trial", "again", *folder]) == 0
    assert results("again")["images"] == results("fine")["images"] >= 10
    assert all(results("again")[name] == results("fine")[name] for name in ("test_top1", "confusion"))


def test_from_scratch_is_the_same_network_from_random_weights(run_lincls, no_gpu):
    for trial, seed in (("a", 0), ("b", 0), ("c", 1)):
        options = ("--pretrained", "none", "--width", 8, "--seed", seed, "--epochs", 1, "--precision", "fp32")
        assert run_lincls(*options, "--weights", "finetune", "--trial", trial) == 0
    a, b, c = (parameters(f"experiments/{trial}/model.pt") for trial in "abc")
    assert a["0.conv1.weight"].shape[0] == 8 and not torch.equal(a["0.conv1.weight"], c["0.conv1.weight"])
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert run_lincls("--pretrained", "none", "--width", 8, "--features", "cached", "--trial", "probe") == 0


def test_what_does_not_fit_is_one_line(model, finished_run, refused, shapes):
    data = "--dataset shapes --train_size 128 --test_size 100 --precision fp32"
    for option in ("--image_size 16", "--mean 0 0 0", "--arch resnet50", f"--pretrained {finished_run}/backbone.pt"):
        refused(main_lincls.main, f"{data} --evaluate {model} {option}".split(), option.split()[0], "takes")
    refused(main_lincls.main, f"{data} --evaluate {finished_run}/backbone.pt".split(), "--pretrained CHECKPOINT is required")
    refused(main_lincls.main, f"{data} --pretrained none --width 8 --weights finetune --batch_size 1".split(), "batches of at")
    refused(main_lincls.main, f"{data} --pretrained none --weights finetune --features cached".split(), "--features cached")
    refused(main_lincls.main, f"{data} --pretrained none --lr_backbone 1".split(), "--lr_backbone", "finetune")
    refused(main_lincls.main, f"{data} --evaluate {model} --weights finetune".split(), "--evaluate")
    os.makedirs("empty")
    refused(export.main, f"predict --model {model} --images empty --output x.csv".split(), "empty")
    refused(export.main, f"predict --model {finished_run}/backbone.pt --images empty --output x.csv".split(), "model.pt")
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            os.makedirs(f"DIR/{split}/{name}")
            to_pil_image(shapes.test_images[0]).save(f"DIR/{split}/{name}/0.png")
    refused(main_lincls.main, f"--dataset folder --evaluate {model} DIR".split(), model, "10 other classes")
