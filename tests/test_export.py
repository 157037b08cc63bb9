"""export.py and hubconf.py: features, backbones and releases, against the data set, the network and its accuracies."""
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
import torchvision

import export
import hubconf
import layouts
import main_lincls
import simsiam
from conftest import REPO
from utils import checkpoint, log
from utils.augment import normalize

CPU_ONLY = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def in_tmp(tmp_path, monkeypatch, no_gpu):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def backbone_pt(finished_run):
    return os.path.join(finished_run, "backbone.pt")


def features_of(path, images):
    with torch.no_grad():
        return simsiam.load_backbone(path, verbose=False)(normalize(images)).numpy()


def test_features_of_a_data_set(in_tmp, backbone_pt, shapes):
    export.main(["features", "--pretrained", backbone_pt, "--dataset", "shapes", "--train_size", "60", "--test_size", "40", "--output", "f.npz"])
    with numpy.load("f.npz") as arrays:  # without pickles
        assert arrays["train_features"].dtype == numpy.float32
        numpy.testing.assert_allclose(arrays["train_features"], features_of(backbone_pt, shapes.train_images[:60]), rtol=1e-4, atol=1e-5)
        numpy.testing.assert_allclose(arrays["test_features"], features_of(backbone_pt, shapes.test_images[:40]), rtol=1e-4, atol=1e-5)
        assert arrays["train_labels"].tolist() == shapes.train_labels[:60].tolist()
        assert arrays["test_labels"].tolist() == shapes.test_labels[:40].tolist()
        assert arrays["classes"].tolist() == shapes.classes


def test_features_of_a_folder(in_tmp, backbone_pt, shapes, capsys):
    """Pictures of 32 pixels are taken as they are; larger ones are resized as torchvision does it on the picture."""
    names = ["b", "a", "b"]
    for i, name in enumerate(names):
        os.makedirs(f"pictures/{name}", exist_ok=True)
        torchvision.utils.save_image(shapes.train_images[i] / 255, f"pictures/{name}/{i}.png")
    export.main(["features", "--pretrained", backbone_pt, "--images", "pictures", "--output", "f.npz"])
    with numpy.load("f.npz") as arrays:
        assert arrays["classes"].tolist() == ["a", "b"] and arrays["labels"].tolist() == [0, 1, 1]
        assert arrays["files"].tolist() == ["pictures/a/1.png", "pictures/b/0.png", "pictures/b/2.png"]
        numpy.testing.assert_allclose(arrays["features"], features_of(backbone_pt, shapes.train_images[[1, 0, 2]]), rtol=1e-4, atol=1e-5)

    os.mkdir("pictures/.hidden")
    shutil.copy("pictures/a/1.png", "pictures/loose.png")
    export.main(["features", "--pretrained", backbone_pt, "--images", "pictures", "--output", "h.npz"])
    assert "1 pictures beside the classes' folders are left out" in capsys.readouterr().err
    with numpy.load("h.npz") as arrays:
        assert arrays["labels"].tolist() == [0, 1, 1]

    large = torch.randint(256, (3, 80, 50), dtype=torch.uint8)
    os.mkdir("flat")
    torchvision.utils.save_image(large / 255, "flat/large.PNG", format="png")
    export.main(["features", "--pretrained", backbone_pt, "--images", "flat", "--size", "40", "--output", "g.npz"])
    transform = torchvision.transforms.Compose([
        torchvision.transforms.Resize(40), torchvision.transforms.CenterCrop(40), torchvision.transforms.PILToTensor(),
    ])
    resized = transform(torchvision.transforms.functional.to_pil_image(large))
    assert (resized.float() - large[:, 15:65, 5:45].float().mean()).abs().max() > 20  # it is no constant
    with numpy.load("g.npz") as arrays:
        assert arrays["labels"].tolist() == [-1] and arrays["classes"].tolist() == []
        numpy.testing.assert_allclose(arrays["features"], features_of(backbone_pt, resized[None]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_a_state_dict_loads_by_torch_alone(in_tmp, backbone_pt, dtype):
    export.main(["backbone", "--pretrained", backbone_pt, "--dtype", dtype, "--output", "b.pt"])
    tensors = torch.load("b.pt", weights_only=True)
    own = checkpoint.load(backbone_pt)
    assert list(tensors) == list(own)
    for name, value in tensors.items():
        if value.is_floating_point():
            assert value.dtype == {"fp32": torch.float32, "fp16": torch.float16}[dtype]
        torch.testing.assert_close(value.to(own[name].dtype), own[name], rtol=0 if dtype == "fp32" else 5e-4, atol=0 if dtype == "fp32" else 1e-7)


def test_an_archive_runs_without_this_projects_code(in_tmp, backbone_pt, shapes):
    export.main(["backbone", "--pretrained", backbone_pt, "--format", "export", "--output", "b.pt2"])
    images = normalize(shapes.test_images[:5])
    torch.save(images, "images.pt")
    code = "import torch; torch.save(torch.export.load('b.pt2').module()(torch.load('images.pt')), 'features.pt')"
    subprocess.run([sys.executable, "-c", code], check=True, env=CPU_ONLY)
    numpy.testing.assert_allclose(torch.load("features.pt").detach().numpy(), features_of(backbone_pt, shapes.test_images[:5]), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="session")
def released(finished_run, tmp_path_factory):
    """A folder with a release of the finished run and of its linear evaluation."""
    folder = tmp_path_factory.mktemp("released")
    base = ["--dataset", "shapes", "--train_size", "256", "--test_size", "100", "--features", "cached", "--epochs", "5", "--exp_dir", str(folder)]
    assert main_lincls.main([*base, "--pretrained", os.path.join(finished_run, "backbone.pt"), "--trial", "linear", "--seeds", "2"]) == 0
    command = ["release", finished_run, "--linear", str(folder / "linear"), "--name", "small", "--weights", str(folder / "weights")]
    assert export.main(command) == 0
    return folder


def test_a_release_says_what_it_is(released, finished_run):
    path = released / "weights" / "small.pt"
    about = json.loads((released / "weights" / "small.json").read_text())
    assert about["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest() and about["bytes"] == path.stat().st_size
    last = log.read(finished_run)[-1]
    assert about["accuracies_float32"]["knn1"] == pytest.approx(last["knn1"]) and about["accuracies_float32"]["knn200"] == pytest.approx(last["knn200"])
    linear = json.loads((released / "linear" / "results.json").read_text())
    assert about["linear_evaluation"]["test_top1"] == linear["test_top1"]
    assert about["accuracies_float32"]["linear_seed0"] == pytest.approx(linear["test_top1_of_seeds"][0])  # of the first seed's classifier
    assert about["recipe"]["epochs"] == 2 and about["recipe"]["seed"] == 0 and about["width"] == 4
    for name in ("commit", "device", "versions", "date", "mean", "std"):
        assert name in about
    own, half = checkpoint.load(os.path.join(finished_run, "backbone.pt")), checkpoint.load(str(path))
    assert half["conv1.weight"].dtype == torch.float16
    assert all(torch.equal(value.half() if value.is_floating_point() else value, half[name]) for name, value in own.items())


def test_a_release_needs_a_finished_run_and_its_own_evaluation(released, finished_run, in_tmp, capsys):
    shutil.copytree(finished_run, "half")
    with open("half/config.json") as file:
        config = json.load(file)
    config["settings"]["epochs"] = 3
    with open("half/config.json", "w") as file:
        json.dump(config, file)
    shutil.copytree(released / "linear", "linear")
    with open("linear/results.json") as file:
        other = json.load(file)
    with open("linear/results.json", "w") as file:
        json.dump({**other, "backbone": "0"}, file)
    os.mkdir("others")
    shutil.copy(os.path.join(finished_run, "backbone.pt"), "others/other.pt")
    shutil.copytree(released / "linear", "cifar")
    with open("cifar/config.json") as file:
        config = json.load(file)
    config["settings"]["dataset"] = "cifar10"
    with open("cifar/config.json", "w") as file:
        json.dump(config, file)
    for args, words in (
        (["half", "--name", "a"], "not finished, epoch 2 of 3"),
        ([finished_run, "--name", "a", "--linear", "linear"], "an evaluation of another backbone"),
        ([finished_run, "--name", "a", "--linear", "cifar"], "its dataset is cifar10, the run's shapes"),
        ([finished_run, "--name", "../a"], "a plain name"),
        ([finished_run, "--name", "simsiam_resnet18_w16_cifar10"], "a ResNet-18 with 128 features; this is a resnet18 with 32"),
        ([finished_run, "--name", "small", "--weights", str(released / "weights")], "exists and is of another release"),  # without a classifier
        ([finished_run, "--name", "other", "--weights", "others"], "others/other.pt exists and has other weights"),
        (["none", "--name", "a"], "none"),
    ):
        with pytest.raises(SystemExit) as stop:
            export.main(["release", *args])
        assert stop.value.code == 2 and words in (said := capsys.readouterr().err) and said.count("\n") == 1
    assert not os.path.exists("weights")


def test_a_release_that_was_killed_is_finished_and_one_that_is_done_is_left(released, finished_run, capsys):
    command = ["release", finished_run, "--linear", str(released / "linear"), "--name", "small", "--weights", str(released / "again")]
    shutil.copytree(released / "weights", released / "again")
    for missing in ((), ("small.json",), ("small.json", "small-linear.pt")):
        for name in missing:
            os.remove(released / "again" / name)
        assert export.main(command) == 0
        assert ("released before" in capsys.readouterr().out) == (not missing)
        for name in ("small.pt", "small-linear.pt", "small.json"):
            assert (released / "again" / name).read_bytes() == (released / "weights" / name).read_bytes()


def test_released_weights_are_checked(released, in_tmp, capsys):
    """By their accuracies, those of main_lincls.py on them, and their SHA-256."""
    weights = str(released / "weights")
    base = ["--dataset", "shapes", "--train_size", "256", "--test_size", "100", "--pretrained", f"{weights}/small.pt", "--trial", "evaluated"]
    assert main_lincls.main([*base, "--evaluate", f"{weights}/small-linear.pt"]) == 0
    with open("experiments/evaluated/results.json") as file:
        top1 = json.load(file)["test_top1"]
    capsys.readouterr()
    command = ["check", "small", "--weights", "weights", "--evaluation", "experiments/evaluated"]
    shutil.copytree(weights, "weights")
    assert export.main(command) == 0
    said = capsys.readouterr().out
    assert said.count(f"said {top1:6.2f} %  measured {top1:6.2f} %") >= 2 and "by load_backbone" in said and said.count("measured") == 4

    about = json.loads((in_tmp / "weights" / "small.json").read_text())
    about["accuracies"]["knn1"] += 0.2
    (in_tmp / "weights" / "small.json").write_text(json.dumps(about))
    assert export.main(command) == 1 and "0.20 points from what it is said to have" in capsys.readouterr().err
    assert export.main([*command, "--within", "0.2"]) == 0

    with open("experiments/evaluated/results.json") as file:
        results = json.load(file)
    capsys.readouterr()
    for break_it, words in (
        (lambda: log.write_json("experiments/evaluated/results.json", {**results, "backbone": "0"}), "of another backbone"),
        (lambda: checkpoint.save("weights/small-linear.pt", {}), "weights/small-linear.pt: its SHA-256 is"),
        (lambda: checkpoint.save("weights/small.pt", {}), "weights/small.pt: its SHA-256 is"),
        (lambda: log.write_json("weights/small.json", []), "not what a release wrote"),
        (lambda: os.remove("weights/small.json"), "weights/small.json"),
    ):
        break_it()
        with pytest.raises(SystemExit) as stop:
            export.main(command)
        said = capsys.readouterr().err
        assert stop.value.code == 2 and words in said and said.count("\n") == 1


@pytest.mark.parametrize("args, words", [
    ("features --pretrained {b} --output f.npz --images none", "none"),
    ("features --pretrained {b} --output f.npz --images empty", "no pictures"),
    ("features --pretrained {b} --output f.npz --images broken", "broken/a.png"),
    ("features --pretrained {b} --output no/f.npz --dataset shapes --train_size 2 --test_size 2", "no/f.npz"),
    ("features --pretrained {b} --output f.npz --std 0 1 1", "more than 0"),
    ("features --pretrained none.pt --output f.npz", "none.pt"),
    ("backbone --pretrained {b} --output empty", "exists"),
    ("backbone --pretrained {b} --output b.pt --format export --dtype fp16", "fp16"),
    ("backbone --pretrained {b} --output b.pt --arch resnet34", "resnet18 of width 4"),
    ("backbone --pretrained {b} --output b.pt --format onnx", "onnx"),
    ("", "features|backbone|release|check"),
])
def test_export_refuses(in_tmp, backbone_pt, capsys, args, words):
    os.mkdir("empty")
    os.mkdir("broken")
    with open("broken/a.png", "wb") as file:
        file.write(b"no picture")
    with pytest.raises(SystemExit) as stop:
        export.main(args.format(b=backbone_pt).split())
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and said.count("\n") == 1
    assert sorted(os.listdir()) == ["broken", "empty"]


def test_a_stem_that_a_state_dict_does_not_show_is_not_exported_as_one(in_tmp, capsys):
    model, content = layouts.solo_learn()
    torch.save(content, "solo.ckpt")
    with pytest.raises(SystemExit):
        export.main(["backbone", "--pretrained", "solo.ckpt", "--output", "b.pt"])
    assert "its stem is another one" in capsys.readouterr().err
    export.main(["backbone", "--pretrained", "solo.ckpt", "--format", "export", "--output", "b.pt2"])
    pictures = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load("b.pt2").module()(pictures), model(pictures), rtol=1e-4, atol=1e-5)


# torch.hub, in a process of its own, from a folder where the caller has a package named utils

CALLER = """
import torch, utils
assert utils.MINE

def load(clone, name, **options):
    return torch.hub.load(clone, name, source="local", **options)

def error(clone, name):
    try:
        load(clone, name)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

for name, width in (("simsiam_resnet18_cifar10", 64), ("simsiam_resnet18_w16_cifar10", 16)):
    assert load("none", name, pretrained=False)(torch.zeros(1, 3, 32, 32)).shape == (1, 8 * width)
    assert "FileNotFoundError" in error("none", name) and "not been released yet" in error("none", name), error("none", name)
    backbone, weights = load("good", name), torch.load(f"good/weights/{name}.pt")
    assert not backbone.training and torch.equal(backbone.conv1.weight, weights["conv1.weight"].float())
    assert torch.equal(load("none", name, folder="good/weights").conv1.weight, backbone.conv1.weight)
    assert "ValueError" in error("wrong", name) and "SHA-256" in error("wrong", name), error("wrong", name)

import utils.own
assert utils.own.MINE
"""


def test_hub(tmp_path):
    """Copies of what it needs: without weights, with them, and with others than their .json says."""
    (tmp_path / "utils").mkdir()
    for name in ("__init__", "own"):
        (tmp_path / "utils" / f"{name}.py").write_text("MINE = True\n")
    for clone in ("none", "good", "wrong"):
        shutil.copytree(REPO / "simsiam", tmp_path / clone / "simsiam")
        shutil.copytree(REPO / "utils", tmp_path / clone / "utils")
        shutil.copy(REPO / "hubconf.py", tmp_path / clone)
    for name, width in (("simsiam_resnet18_cifar10", 64), ("simsiam_resnet18_w16_cifar10", 16)):
        for clone in ("good", "wrong"):
            path = tmp_path / clone / "weights" / f"{name}.pt"
            path.parent.mkdir(exist_ok=True)
            checkpoint.save(str(path), export.rounded(simsiam.resnet18(width)))
            assert path.stat().st_size < 23_000_000
            digest = hashlib.sha256(path.read_bytes()).hexdigest() if clone == "good" else "0"
            path.with_suffix(".json").write_text(json.dumps({"sha256": digest}))
    done = subprocess.run([sys.executable, "-c", CALLER], cwd=tmp_path, env=CPU_ONLY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_hub_lists_its_entries_only():
    entries = [name for name, value in vars(hubconf).items() if callable(value) and not name.startswith("_")]
    assert entries == ["simsiam_resnet18_cifar10", "simsiam_resnet18_w16_cifar10"]


def test_the_input_check_in_the_docstring_runs():
    code = "\n".join(re.findall(r">>> (.*)", hubconf.simsiam_resnet18_cifar10.__doc__))
    assert code.count("assert") == 2
    scope = {}
    exec(code, scope)
    torch.testing.assert_close(scope["x"], normalize(scope["pictures"]))


def test_released_weights_are_what_their_json_says():
    """The files in weights/ of this checkout, if there are any."""
    for about in (REPO / "weights").glob("*.json"):
        path, said = about.with_suffix(".pt"), json.loads(about.read_text())
        assert hashlib.sha256(path.read_bytes()).hexdigest() == said["sha256"] and path.stat().st_size == said["bytes"] <= 23_000_000
        assert simsiam.load_backbone(path, said["arch"], verbose=False).feature_dim == said["feature_dim"]
        assert hashlib.sha256((REPO / "weights" / said["classifier"]["file"]).read_bytes()).hexdigest() == said["classifier"]["sha256"]
