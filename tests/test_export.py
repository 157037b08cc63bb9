"""export.py and hubconf.py against the network and accuracies computed here."""
import shutil
import subprocess
import sys

import numpy
import pytest
import torch
from torchvision.transforms.functional import to_pil_image

import export
import main as pretraining
import main_lincls
import simsiam
from conftest import REPO, SMALL
from utils import checkpoint, log
from utils.augment import normalize

NAME = "simsiam_resnet18_w16_cifar10"
pytestmark = pytest.mark.usefixtures("no_gpu")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run of width 16, its linear evaluation, and their release in weights."""
    folder = tmp_path_factory.mktemp("runs")
    data = "--dataset shapes --train_size 256 --test_size 100 --features cached".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: False)
        pretraining.main([*SMALL, *f"--width 16 --epochs 1 --exp_dir {folder} --trial run".split()])
        main_lincls.main([*data, *f"--pretrained {folder}/run/backbone.pt --exp_dir {folder} --trial linear".split()])
        export.main(release(folder / "run", folder / "linear", folder / "weights"))
    return folder


def release(run, linear, weights="weights", name=NAME):
    return f"release {run} --linear {linear} --name {name} --weights {weights}".split()


def copy_with_changes(source, path, **changes):
    shutil.copytree(source, path.parent)
    checkpoint.write_json(path, checkpoint.read_json(path) | changes)


def features_of(path, images):
    return simsiam.load_backbone(path, verbose=False)(normalize(images)).detach()


def test_features_of_a_data_set_are_the_backbones(tmp_path, finished_run, shapes, refused, monkeypatch):
    data = f"--dataset shapes --train_size 60 --test_size 60 --output {tmp_path}/new.npz"
    seen, usual = [], export.knn.extract_features
    monkeypatch.setattr(export.knn, "extract_features", lambda *args: seen.append(
        torch.backends.cudnn.allow_tf32) or usual(*args))
    export.main(f"features --pretrained {finished_run}/backbone.pt {data}".split())
    assert seen == [False, False] and torch.backends.cudnn.allow_tf32  # fp32 is fp32 on newer GPUs too
    with numpy.load(tmp_path / "new.npz") as arrays:  # without pickles
        for split, images, labels in (("train", *shapes[:2]), ("test", *shapes[2:4])):
            expected = features_of(f"{finished_run}/backbone.pt", images[:60])
            assert arrays[f"{split}_features"] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-5)
            assert arrays[f"{split}_labels"].tolist() == labels[:60].tolist()
    refused(export.main, f"features --pretrained x {data}".split(), "new.npz exists")


def test_features_of_a_folder(tmp_path, finished_run, shapes, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [str(tmp_path / name) for name in ("b/0.png", "a/1.png", "b/2.png")]
    for name, image in zip(names, shapes.train_images):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        to_pil_image(image).save(name)
    export.main(f"features --pretrained {finished_run}/backbone.pt --images {tmp_path} --output new.npz".split())
    with numpy.load("new.npz") as arrays:
        expected = features_of(f"{finished_run}/backbone.pt", shapes.train_images[:3])
        assert arrays["features"] == pytest.approx(expected.numpy(), rel=1e-3, abs=1e-5)
        assert [arrays[name].tolist() for name in ("classes", "labels", "files")] == [["a", "b"], [1, 0, 1], names]


def test_a_release_is_the_rounded_backbone_with_its_accuracies(runs, shapes):
    path, about = runs / "weights" / f"{NAME}.pt", checkpoint.read_json(runs / "weights" / f"{NAME}.json")
    half, own = (checkpoint.load(file)["conv1.weight"] for file in (path, runs / "run" / "backbone.pt"))
    assert torch.equal(half, own.half())
    last, linear = log.read(runs / "run")[-1], checkpoint.read_json(runs / "linear" / "results.json")["test_top1"]
    assert about["accuracies_before_rounding"] == {"knn1": last["knn1"], "knn200": last["knn200"], "linear": linear}
    bank, queries = features_of(path, shapes.train_images[:128]), features_of(path, shapes.test_images[:100])
    weight, bias = torch.load(runs / "weights" / f"{NAME}-linear.pt", weights_only=True).values()
    nearest = torch.cosine_similarity(queries[:, None], bank, dim=2).argmax(dim=1)
    for name, predicted in (("linear", (queries @ weight.T + bias).argmax(dim=1)), ("knn1", shapes[1][nearest])):
        correct = (predicted == shapes.test_labels[:100]).sum().item()
        assert about["accuracies"][name] == pytest.approx(correct, abs=2.001)  # two images of 100, at a tie


def test_a_check_fails_at_another_accuracy_and_refuses_changed_weights(runs, tmp_path, refused):
    right = checkpoint.read_json(runs / "weights" / f"{NAME}.json")["accuracies"]
    for name in ("none", *right):
        copy_with_changes(runs / "weights", tmp_path / name / f"{NAME}.json", accuracies=right | {name: 0.0})
        assert export.main(["check", NAME, "--weights", f"{tmp_path}/{name}"]) == (name != "none")
    (tmp_path / name / f"{NAME}.pt").write_bytes((tmp_path / name / f"{NAME}.pt").read_bytes() + b"more")
    refused(export.main, ["check", NAME, "--weights", name], f"{NAME}.pt: its SHA-256 is not the published one")
    (tmp_path / name / f"{NAME}.pt").unlink()
    refused(export.main, ["check", NAME, "--weights", name], f"{NAME}.pt: not released yet")


def test_a_release_of_what_does_not_belong_together_is_refused(runs, tmp_path, refused):
    run, linear, settings = runs / "run", runs / "linear", checkpoint.read_json(runs / "run/config.json")["settings"]
    copy_with_changes(run, tmp_path / "run" / "config.json", settings=settings | {"epochs": 3})
    copy_with_changes(linear, tmp_path / "linear" / "results.json", backbone="0")
    other = checkpoint.read_json(linear / "config.json")["settings"] | {"test_size": 20}
    copy_with_changes(linear, tmp_path / "other" / "config.json", settings=other)
    refused(export.main, release("run", linear), "run: not finished, epoch 1 of 3")
    refused(export.main, release(run, "linear"), "the evaluation of another backbone")
    refused(export.main, release(run, "other"), "not on the test images")
    refused(export.main, release(run, linear, name="simsiam_resnet18_cifar10"), "another network")
    checkpoint.save(tmp_path / f"{NAME}.pt", {"conv1.weight": torch.zeros(1)})
    refused(export.main, release(run, linear, "."), f"{NAME}.pt exists and has other weights")
    assert checkpoint.load(tmp_path / f"{NAME}.pt")["conv1.weight"] == 0


def test_torch_hub_loads_from_a_clone_beside_the_callers_own_utils(tmp_path):
    (tmp_path / "utils.py").write_text(f"""import torch
for name, dim in (("simsiam_resnet18_cifar10", 512), ("simsiam_resnet18_w32_cifar10", 256), ("{NAME}", 128)):
    backbone = torch.hub.load("{REPO}", name, source="local", pretrained=False)
    assert backbone(torch.zeros(1, 3, 32, 32)).shape == (1, dim)
backbone, weights = torch.hub.load("{REPO}", name, source="local"), torch.load("{REPO}/weights/{NAME}.pt")
assert not backbone.training and torch.equal(backbone.conv1.weight, weights["conv1.weight"].float())
""")
    subprocess.run([sys.executable, "-c", "import utils"], cwd=tmp_path, check=True)
