"""Folders of images as data sets, their cache, and torchvision's sets besides CIFAR, in files of their formats."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from torchvision import transforms
from torchvision.datasets import STL10, SVHN

import export
import main as pretraining
import main_lincls
import tiles
import visualize
from utils import checkpoint, log
from utils import images as image_files
from utils.data import load_dataset
from utils.shapes import CLASSES

CPU = torch.device("cpu")
SMALL = "--dataset folder --width 4 --dim 32 --pred_dim 16 --batch_size 32 --epochs 2 --eval_freq 1 --precision fp32"


def write_images(folder, images, labels=None, classes=CLASSES):
    """images uint8 [N, 3, H, W] as folder/CLASS/NUMBER.png, or folder/NUMBER.png without labels."""
    for i, image in enumerate(images):
        place = Path(folder, "" if labels is None else classes[labels[i]])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{i:05}.png", compress_level=1)


@pytest.fixture
def folder(shapes, tmp_path, monkeypatch):
    """DIR/train/CLASS and DIR/test/CLASS with 128 and 100 of the built-in images, and an empty working directory."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "DIR" / "train", shapes.train_images[:128], shapes.train_labels)
    write_images(tmp_path / "DIR" / "test", shapes.test_images[:100], shapes.test_labels)
    return tmp_path / "DIR"


def of_epochs(folder):
    return [{key: value for key, value in record.items() if key not in ("seconds", "views_per_s", "time")}
            for record in log.read(folder)]


def test_a_folder_trains_evaluates_and_resumes_to_the_bits_of_the_same_data_set(folder, no_gpu, no_figures):
    """The images of shapes, as PNG files named by their numbers."""
    sizes = "--train_size 128 --test_size 100"
    for name, options in (("own", f"--dataset shapes {sizes}"), ("folder", f"--data_root {folder}"),
                          ("resumed", f"--data_root {folder} --max_minutes 0")):
        assert pretraining.main(f"{SMALL} {options} --trial {name}".split()) == 0
    assert pretraining.main("--trial resumed --resume auto".split()) == 0
    for name in ("folder", "resumed"):
        assert of_epochs(f"experiments/{name}") == of_epochs("experiments/own")
        assert checkpoint.digest(checkpoint.load(f"experiments/{name}/backbone.pt")) == checkpoint.digest(
            checkpoint.load("experiments/own/backbone.pt"))
    for name, options in (("a", f"--dataset shapes {sizes}"), ("b", f"--dataset folder {folder}")):
        assert main_lincls.main(f"--pretrained experiments/own/backbone.pt --features cached --trial {name} "
                                f"{options}".split()) == 0
    results = [checkpoint.read_json(f"experiments/{name}/results.json") for name in "ab"]
    assert results[0]["test_top1"] == pytest.approx(results[1]["test_top1"], abs=1.01)  # classes in another order
    assert results[0]["class_top1"].keys() == results[1]["class_top1"].keys()


def test_cifar10_as_a_folder_is_the_same_data_set(cifar, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images("DIR/train", cifar.train_images[:600], cifar.train_labels, cifar.classes)
    write_images("DIR/test", cifar.test_images[:300], cifar.test_labels, cifar.classes)
    loaded = load_dataset("folder", "DIR", CPU)
    for tensor, whole, size in zip(loaded, cifar, (600, 600, 300, 300)):
        assert torch.equal(tensor, whole[:size])
    assert loaded.classes == cifar.classes


@pytest.mark.parametrize("size", [24, 48, 150])
def test_images_of_any_size_are_those_of_torchvision(size, tmp_path, monkeypatch):
    """ImageFolder with Resize and CenterCrop, apart from the order; more than a batch, so in several processes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(image_files, "BATCH_BYTES", 3 * 3 * size**2)
    generator = torch.Generator().manual_seed(0)
    for i, shape in enumerate([(40, 60), (151, 33), (64, 64), (24, 25), (200, 170)] * 4):
        image = torch.randint(256, (1, 3, *shape), generator=generator).byte()
        write_images(f"DIR/train/{'ab'[i % 2]}/{i}", image)
    shutil.copytree("DIR/train", "DIR/val")
    loaded = load_dataset("folder", "DIR", CPU, image_size=size)
    crop = transforms.Compose([transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()])
    reference = torchvision.datasets.ImageFolder("DIR/train", crop)
    place = {file: i for i, (file, _) in enumerate(reference.samples)}
    order = [place[os.path.relpath(file)] for file in image_files.list_images("DIR/train")[0]]
    for images, labels in (loaded[:2], loaded[2:4]):
        assert torch.equal(images, torch.stack([reference[i][0] for i in order]))
        assert labels.tolist() == [reference.targets[i] for i in order]
    assert order == sorted(order, key=lambda i: (os.path.basename(reference.samples[i][0]), reference.samples[i][0]))


def test_the_cache_is_made_once_and_again_if_the_folder_changes(folder, monkeypatch):
    made = []
    usual = image_files.make_cache
    monkeypatch.setattr(image_files, "make_cache", lambda *args: made.append(1) or usual(*args))
    first = load_dataset("folder", str(folder), CPU)
    assert torch.equal(load_dataset("folder", "DIR", CPU).train_images, first.train_images) and len(made) == 1
    npy, about = (next(Path("cache").glob(f"*.{end}")) for end in ("npy", "json"))
    assert np.array_equal(np.load(npy)[:128], first.train_images.numpy()) and json.loads(about.read_text())["source"]
    load_dataset("folder", str(folder), CPU, image_size=16)
    assert len(made) == 2 and len(list(Path("cache").glob("*.npy"))) == 2
    file = next(folder.glob("train/*/00000.png"))
    changes = [lambda: os.utime(file, (1, 1)), lambda: file.rename(file.with_name("first.png")),
               lambda: npy.write_bytes(npy.read_bytes()[:-1]), lambda: about.write_text("{"),
               lambda: next(folder.glob("train/*/00001.png")).unlink(), npy.unlink, lambda: npy.write_bytes(b""),
               lambda: npy.write_bytes(b"PK" + npy.read_bytes()),
               lambda: np.save(npy, np.zeros((3, 3, 32, 32), np.uint8)),
               lambda: np.save(npy, np.load(npy).astype(np.float32)), lambda: about.write_text("[]"),
               lambda: about.write_text(about.read_text().replace('"broken": []', '"broken": [[1]]'))]
    for count, change in enumerate(changes, 3):
        change()
        loaded = load_dataset("folder", str(folder), CPU)
        assert len(made) == count and len(loaded.test_images) == 100
        assert torch.equal(loaded.train_images, load_dataset("folder", str(folder), CPU).train_images)
        assert len(made) == count
    with open(npy, "r+b") as file:  # the images are mapped from it, not copied
        file.seek(128)
        file.write(bytes([7, 8, 9]))
    assert loaded.train_images[0, 0, 0, :3].tolist() == [7, 8, 9]
    assert len(loaded.train_images) == 127 and torch.equal(loaded.train_images[-1], first.train_images[0])


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_leaves_no_cache_and_one_line(folder, tmp_path, refused):
    (tmp_path / "cache").mkdir()
    name = re.sub("npy$", "", next(iter(make_and_drop_cache(folder))))
    (tmp_path / "cache" / f"{name}npy.partial").symlink_to("/dev/full")
    with pytest.raises(SystemExit):
        pretraining.main(f"{SMALL} --data_root {folder}".split())
    assert not list(Path("cache").glob("*.npy")) + list(Path("cache").glob("*.json")) + list(Path("cache").glob("*.p*"))
    assert pretraining.main(f"{SMALL} --data_root {folder} --max_minutes 0".split()) == 0


def make_and_drop_cache(folder):
    load_dataset("folder", str(folder), CPU)
    names = [file.name for file in Path("cache").glob("*.npy")]
    shutil.rmtree("cache")
    Path("cache").mkdir()
    return names


def test_a_process_killed_while_it_makes_the_cache_leaves_none_that_is_used(folder):
    script = ("import os, time, torch; from utils import data, images\n"
              "def slow(file): open('begun', 'w').close(); time.sleep(60)\n"
              "images.read_image = slow; data.load_dataset('folder', 'DIR', torch.device('cpu'))")
    environment = os.environ | {"PYTHONPATH": str(Path(image_files.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while not os.path.exists("begun"):
        time.sleep(0.1)
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list(Path("cache").glob("*.npy"))
    assert len(load_dataset("folder", "DIR", CPU).train_images) == 128  # the lock is gone too
    assert sorted(file.suffix for file in Path("cache").iterdir()) == [".json", ".lock", ".npy"]


def test_images_without_classes_train_and_log_their_effective_rank(shapes, tmp_path, monkeypatch, capsys, refused,
                                                                   no_gpu):
    monkeypatch.chdir(tmp_path)
    write_images("DIR", shapes.train_images[:70])
    assert pretraining.main(f"{SMALL} --data_root DIR --trial a".split()) == 0
    printed = capsys.readouterr().out
    assert "no kNN" in printed and "rank" in printed and "Next" not in printed
    record = log.read("experiments/a")[-1]
    assert "knn1" not in record and 1 < record["effective_rank"] <= 32
    assert {"effective-rank.png", "report.html"} <= {*os.listdir("experiments/a")}
    assert not os.path.exists("experiments/a/top1-acc.png")
    refused(main_lincls.main, "--pretrained experiments/a/backbone.pt --dataset folder DIR".split(), "no labels")
    refused(visualize.main, "--pretrained experiments/a".split(), "no labels")
    export.main("features --pretrained experiments/a/backbone.pt --dataset folder --output x.npz DIR".split())
    with np.load("x.npz") as arrays:
        assert arrays["train_features"].shape == (70, 32) and (arrays["train_labels"] == -1).all()
    write_images("ONE/thing", shapes.train_images[:40])  # a single class: nothing to tell apart
    assert pretraining.main(f"{SMALL} --data_root ONE --trial b --quiet".split()) == 0
    assert "knn1" not in log.read("experiments/b")[-1]


def test_held_out_images_are_about_a_share_of_each_class_and_stay_so(shapes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_images("DIR", shapes.train_images[:600], shapes.train_labels)
    loaded = load_dataset("folder", "DIR", CPU, test_share=0.25)
    count = len(loaded.test_images)
    assert abs(count / 600 - 0.25) < 4 * (0.25 * 0.75 / 600)**0.5 and len(loaded.test_labels.unique()) == 10
    both = torch.cat((loaded.train_images, loaded.test_images))
    assert sorted(map(bytes, both.numpy())) == sorted(map(bytes, shapes.train_images[:600].numpy()))
    held_out = set(map(bytes, loaded.test_images.numpy()))
    write_images("DIR", shapes.train_images[:650], shapes.train_labels)  # what is added changes nothing else
    more = load_dataset("folder", "DIR", CPU, test_share=0.25)
    assert held_out < set(map(bytes, more.test_images.numpy()))
    assert not held_out & set(map(bytes, more.train_images.numpy()))
    alone = load_dataset("folder", "DIR", CPU, test_share=1e-9)
    assert alone.test_labels.bincount().tolist() == [1] * 10


def test_bad_folders_are_refused(folder, refused, shapes):
    command = f"{SMALL} --data_root {folder}".split()
    write_images(folder / "test", shapes.test_images[:2], [0, 0], ["unknown"])
    refused(pretraining.main, command, "unknown", "not a class")
    shutil.rmtree(folder / "test" / "unknown")
    refused(pretraining.main, [*command, "--batch_size", 129], "128 training images")
    refused(pretraining.main, [*command, "--train_size", 129], "128 images")
    refused(pretraining.main, [*command, "--data_root", "nowhere"], "nowhere", "no such folder")
    refused(pretraining.main, [*command, "--image_size", 4], "--image_size", "at least 8")
    (folder / "none").mkdir()
    refused(pretraining.main, [*command, "--data_root", folder / "none"], "no images")
    write_images("FEW/a", shapes.train_images[:9])
    write_images("FEW/b", shapes.train_images[:1])
    refused(pretraining.main, [*command, "--data_root", "FEW"], "FEW: b: test images, but no training images")
    refused(pretraining.main, [*command, "--cache_dir", folder / "cache"], "--cache_dir", "among the images")
    for names in (("Train", "Test"), ("test", "val")):
        for name in names:
            write_images(f"{names}/{name}/a", shapes.train_images[:3])
        refused(pretraining.main, [*command, "--data_root", str(names)], "splits are called train and test")
    write_images(folder / "test", shapes.test_images[:1])
    shutil.move(folder / "test", "aside")
    write_images(folder / "test", shapes.test_images[:2])
    refused(pretraining.main, command, "test: no class folders")


def test_files_that_cannot_be_read_are_named_or_skipped_and_counted(folder, refused, capsys, monkeypatch, no_figures):
    monkeypatch.setattr(image_files, "BATCH_BYTES", 3 * 32 * 32 * 20)
    whole = load_dataset("folder", str(folder), CPU)
    files = [next(folder.glob(f"train/*/{name}.png")) for name in ("00003", "00050", "00127")]
    files[0].write_bytes(b"no image")
    files[1].write_bytes(files[1].read_bytes()[:200])
    files[2].unlink()
    os.mkfifo(files[2])
    command = f"{SMALL} --data_root {folder}".split()
    with pytest.raises(ValueError, match=f"{files[0]}.*--skip_broken"):
        load_dataset("folder", str(folder), CPU)
    capsys.readouterr()
    assert pretraining.main([*command, "--skip_broken", "--quiet", "--max_minutes", "0"]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 228 images" in error and all(str(file) in error for file in files)
    loaded = load_dataset("folder", str(folder), CPU, skip_broken=True)
    kept = [i for i in range(128) if i not in (3, 50, 127)]
    assert torch.equal(loaded.train_images, whole.train_images[kept])
    assert torch.equal(loaded.train_labels, whole.train_labels[kept])
    assert torch.equal(loaded.test_images, whole.test_images)
    refused(pretraining.main, command, files[0].name, "--skip_broken")
    readable = Image.fromarray(whole.train_images[3].permute(1, 2, 0).numpy())
    unreadable = image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda file: readable if file == str(files[0]) else unreadable(file))
    assert len(load_dataset("folder", str(folder), CPU, skip_broken=True).train_images) == 126  # it was a passing error
    refused(pretraining.main, [*command, "--resume", "experiments/1/checkpoint.pt", "--data_root",
                               folder / "test"], "not the training images of the run to resume")


def test_other_scripts_take_the_size_of_the_images_from_the_run(folder, no_gpu, no_figures, monkeypatch):
    """Pre-trained at 24 pixels, evaluated there, and on another data set at 24 pixels."""
    command = f"{SMALL} --data_root {folder} --image_size 24 --view_size 16:0.5,24:0.5 --trial a"
    assert pretraining.main(command.split()) == 0
    seen = []
    usual = torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda conv, x: seen.append(x.shape) or usual(conv, x))
    pretrained = "--pretrained experiments/a/backbone.pt"
    assert main_lincls.main(f"{pretrained} --epochs 1 --dataset folder {folder}".split()) == 0
    transfer = "--features cached --dataset shapes --train_size 60 --test_size 50"
    assert main_lincls.main(f"{pretrained} {transfer}".split()) == 0
    export.main(f"features {pretrained} --images {folder}/test --output x.npz".split())
    visualize.main("--pretrained experiments/a".split())
    assert {shape[2] for shape in seen if shape[1] == 3} == {24}
    settings = checkpoint.read_json("experiments/1/config.json")["settings"]
    assert settings["image_size"] == 24 and settings["dataset"] == "folder"


def test_imbalanced_classes_have_their_balanced_accuracy_beside_top_1(folder, capsys, no_figures, finished_run):
    for file in sorted(folder.glob("test/disc/*"))[1:]:
        file.unlink()
    command = f"--pretrained {finished_run}/backbone.pt --features cached --dataset folder {folder}"
    assert main_lincls.main([*command.split(), "--fraction", "0.5"]) == 0
    results = checkpoint.read_json("experiments/1/results.json")
    confusion = np.array(results["confusion"])
    assert results["balanced_accuracy"] == pytest.approx((100 * confusion.diagonal() / confusion.sum(axis=1)).mean())
    assert f"{results['balanced_accuracy']:.2f} %" in capsys.readouterr().out


def test_stl10_trains_on_all_and_classifies_what_has_labels(tmp_path, monkeypatch, no_figures, no_gpu):
    """Files of its format: images [3, 96, 96] with columns before rows, labels from 1."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(STL10, "_check_integrity", lambda dataset: True)
    place = tmp_path / "data" / "stl10_binary"
    place.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = {name: rng.integers(256, size=(n, 3, 96, 96), dtype=np.uint8)
              for name, n in (("train", 40), ("test", 20), ("unlabeled", 30))}
    labels = {name: rng.integers(10, size=len(images[name])) for name in ("train", "test")}
    for name in images:
        images[name].transpose(0, 1, 3, 2).tofile(place / f"{name}_X.bin")
        if name in labels:
            (labels[name] + 1).astype(np.uint8).tofile(place / f"{name}_y.bin")
    classes = "airplane bird car cat deer dog horse monkey ship truck".split()
    (place / "class_names.txt").write_text("\n".join(classes))
    loaded = load_dataset("stl10", "data", CPU)
    assert np.array_equal(loaded.train_images, np.concatenate((images["train"], images["unlabeled"])))
    assert loaded.train_labels.tolist() == [*labels["train"], *[-1] * 30] and loaded.classes == classes
    assert np.array_equal(loaded.labeled()[0], images["train"]) and loaded.has_classes
    assert np.array_equal(loaded.test_images, images["test"]) and loaded.test_labels.tolist() == labels["test"].tolist()
    assert len(load_dataset("stl10", "data", CPU, unlabeled=False).train_images) == 40
    small = load_dataset("stl10", "data", CPU, image_size=48).train_images
    expected = transforms.functional.resize(loaded.train_images[:5], [48, 48], antialias=True)
    assert small.shape == (70, 3, 48, 48) and (small[:5].int() - expected.int()).abs().max() <= 1
    assert pretraining.main(f"{SMALL} --dataset stl10 --image_size 32 --data_root data".split()) == 0
    assert "knn1" in log.read("experiments/1")[-1]
    command = "--pretrained experiments/1/backbone.pt --features cached --dataset stl10 data"
    assert main_lincls.main(command.split()) == 0
    assert checkpoint.read_json("experiments/2/config.json")["settings"]["image_size"] == 32


def test_svhn_is_read_from_its_files(tmp_path, monkeypatch):
    """Files of its format: images [32, 32, 3, N], and 10 as the label of zeros."""
    monkeypatch.setattr(SVHN, "_check_integrity", lambda dataset: True)
    monkeypatch.setattr(SVHN, "download", lambda dataset: None)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(256, size=(32, 32, 3, 12), dtype=np.uint8), rng.integers(1, 11, size=(12, 1))
    for split, rows in (("train", slice(0, 8)), ("test", slice(8, 12))):
        scipy.io.savemat(tmp_path / f"{split}_32x32.mat", {"X": images[..., rows], "y": labels[rows].astype(np.uint8)})
    loaded = load_dataset("svhn", str(tmp_path), CPU)
    assert np.array_equal(loaded.train_images, images[..., :8].transpose(3, 2, 0, 1))
    assert torch.cat((loaded.train_labels, loaded.test_labels)).tolist() == (labels[:, 0] % 10).tolist()
    assert loaded.classes == list("0123456789")
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(OSError, match="requires the package scipy"):
        load_dataset("svhn", str(tmp_path), CPU)


@pytest.mark.parametrize("name", ["stl10", "svhn", "cifar100"])
def test_a_failed_download_of_any_set_names_the_alternatives(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    for module in ("cifar.download_and_extract_archive", "stl10.download_and_extract_archive", "svhn.download_url"):
        monkeypatch.setattr(f"torchvision.datasets.{module}", no_network)
    with pytest.raises(OSError, match="no route to host.*--data_root.*--dataset shapes"):
        load_dataset(name, str(tmp_path / "empty"), CPU)


def test_photographs_of_any_size_mode_and_format_train(tmp_path, monkeypatch, no_figures, no_gpu):
    """Tiles of the photographs that matplotlib and scikit-learn ship; each photograph is a class."""
    monkeypatch.chdir(tmp_path)
    classes = tiles.cut_tiles("DIR", 450)
    command = "--dim 64 --pred_dim 16 --batch_size 32 --width 8 --epochs 3 --learning_rate 0.05 --untrained"
    assert pretraining.main(f"--dataset folder --data_root DIR --image_size 24 {command}".split()) == 0
    assert load_dataset("folder", "DIR", CPU, image_size=24).classes == classes
    assert log.read("experiments/1")[-1]["knn200"] > 100 / len(classes) + 5


def test_links_in_a_circle_add_nothing_and_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    files = image_files.list_images("DIR/train")
    os.symlink("..", "DIR/train/disc/up")
    os.symlink(".", "DIR/train/disc/again")
    assert image_files.list_images("DIR/train") == files

    def walk(folder, onerror, **options):
        onerror(PermissionError(13, "Permission denied", folder))

    monkeypatch.setattr(os, "walk", walk)
    with pytest.raises(PermissionError):
        load_dataset("folder", "DIR", CPU)


def test_a_finished_cache_is_read_where_nothing_may_be_written(folder, monkeypatch):
    whole = load_dataset("folder", "DIR", CPU)
    monkeypatch.setattr(checkpoint, "lock", None)
    assert torch.equal(load_dataset("folder", "DIR", CPU).train_images, whole.train_images)


@pytest.mark.filterwarnings("error")
def test_classes_may_have_any_names(shapes, tmp_path, monkeypatch, no_gpu):
    monkeypatch.chdir(tmp_path)
    classes = ["a $x^$", os.fsdecode(b"\xff\xfe"), "日本"]
    for split in ("train", "test"):
        write_images(f"DIR/{split}", shapes.train_images[:60], [i % 3 for i in range(60)], classes)
    assert pretraining.main(f"{SMALL} --data_root DIR --quiet".split()) == 0
    command = "--pretrained experiments/1/backbone.pt --features cached --dataset folder DIR"
    assert main_lincls.main(command.split()) == 0
    visualize.main("--pretrained experiments/1 --quiet".split())
    assert {"neighbors.png", "map.png"} <= {*os.listdir("experiments/1")}
    assert os.path.exists("experiments/2/confusion.png")
