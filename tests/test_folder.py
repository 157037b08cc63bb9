"""Folders of images as data sets, and their cache."""
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import datasets, transforms

import export
import main as pretraining
import main_lincls
import tiles
import visualize
from utils import checkpoint, log
from utils import folder as layout
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


def test_a_folder_trains_evaluates_and_resumes_to_the_bits_of_the_same_data_set(folder, no_gpu, no_figures):
    """The images of shapes, as PNG files named by their numbers."""
    sizes = "--train_size 128 --test_size 100"
    for name, options in (("own", f"--dataset shapes {sizes}"), ("folder", f"--data_root {folder}"),
                          ("resumed", f"--data_root {folder} --max_minutes 0")):
        assert pretraining.main(f"{SMALL} {options} --trial {name}".split()) == 0
    assert pretraining.main("--trial resumed --resume auto".split()) == 0
    own, *others = [[checkpoint.digest(checkpoint.load(f"experiments/{name}/backbone.pt"))] + [
        {key: record[key] for key in ("epoch", "loss", "std", "lr", "knn1", "knn200", "effective_rank")}
        for record in log.read(f"experiments/{name}")] for name in ("own", "folder", "resumed")]
    assert len(own) == 3 and others == [own, own]
    command = "--pretrained experiments/own/backbone.pt --features cached --trial"
    for options in (f"a --dataset shapes {sizes}", f"b --dataset folder {folder}"):
        assert main_lincls.main(f"{command} {options}".split()) == 0
    results = [checkpoint.read_json(f"experiments/{name}/results.json") for name in "ab"]
    assert results[0]["test_top1"] == pytest.approx(results[1]["test_top1"], abs=1.01)  # classes in another order
    assert results[0]["class_top1"].keys() == results[1]["class_top1"].keys()


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
    reference = datasets.ImageFolder("DIR/train", crop)
    place = {file: i for i, (file, _) in enumerate(reference.samples)}
    order = [place[file] for file, _ in layout.list_images("DIR/train")[0]]
    for images, labels in (loaded[:2], loaded[2:4]):
        assert torch.equal(images, torch.stack([reference[i][0] for i in order]))
        assert labels.tolist() == [reference.targets[i] for i in order]
    assert order == sorted(order, key=lambda i: (os.path.basename(reference.samples[i][0]), reference.samples[i][0]))


def test_the_cache_is_made_once_and_again_if_the_folder_changes(folder, monkeypatch):
    made, usual = [], image_files.make_cache
    monkeypatch.setattr(image_files, "make_cache", lambda *args: made.append(1) or usual(*args))
    first = load_dataset("folder", str(folder), CPU)
    assert torch.equal(load_dataset("folder", "DIR", CPU).train_images, first.train_images) and len(made) == 1
    npy = next(Path("cache").glob("*.npy"))
    assert np.array_equal(np.load(npy)[:128], first.train_images.numpy())
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "lock", None)  # a finished cache is read where nothing may be written
        assert torch.equal(load_dataset("folder", "DIR", CPU).test_images, first.test_images)
    load_dataset("folder", str(folder), CPU, image_size=16)
    assert len(made) == 2 and len(list(Path("cache").glob("*.npy"))) == 2
    file = next(folder.glob("train/*/00000.png"))
    changes = [lambda: os.utime(file, (1, 1)), lambda: file.rename(file.with_name("first.png")),
               lambda: npy.write_bytes(npy.read_bytes()[:-1]), lambda: npy.write_bytes(npy.read_bytes()[:99]),
               lambda: next(folder.glob("train/*/00001.png")).unlink(), npy.unlink, lambda: npy.write_bytes(b""),
               lambda: npy.write_bytes(b"PK" + npy.read_bytes()), lambda: np.save(npy, np.load(npy)),
               lambda: npy.write_bytes(npy.read_bytes().replace(b'"broken": []', b'"broken": [[1]]')),
               lambda: npy.write_bytes(npy.read_bytes().replace(b'"broken"', b'"Broken"'))]
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


def test_a_process_killed_while_it_makes_the_cache_leaves_none_that_is_used(folder):
    script = ("import time, torch; from utils import data, images\n"
              "def slow(file): open('begun', 'w').close(); time.sleep(60)\n"
              "images.read_image = slow; data.load_dataset('folder', 'DIR', torch.device('cpu'))")
    environment = os.environ | {"PYTHONPATH": str(Path(image_files.__file__).parents[1])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment)
    while not os.path.exists("begun"):
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert not list(Path("cache").glob("*.npy"))
    assert len(load_dataset("folder", "DIR", CPU).train_images) == 128  # the lock is gone too
    [partial] = Path("cache").glob("*.partial")  # another writer may still be writing it; an hour later it may not
    os.utime(partial, (1, 1))
    next(folder.glob("train/*/*")).unlink()
    load_dataset("folder", "DIR", CPU)
    assert sorted(file.suffix for file in Path("cache").iterdir()) == [".lock", ".npy"]


def test_images_without_classes_train_and_log_a_rank(shapes, tmp_path, monkeypatch, capsys, refused, no_gpu):
    monkeypatch.chdir(tmp_path)
    write_images("DIR", shapes.train_images[:70])
    assert pretraining.main(f"{SMALL} --data_root DIR --trial a".split()) == 0
    printed = capsys.readouterr().out
    assert "no kNN" in printed and "rank" in printed and "Next" not in printed
    record = log.read("experiments/a")[-1]
    assert "knn1" not in record and 1 < record["effective_rank"] <= 32
    files = {"effective-rank.png", "report.html", "top1-acc.png"} & {*os.listdir("experiments/a")}
    assert files == {"effective-rank.png", "report.html"}
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
    share = len(loaded.test_images) / 600
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 600)**0.5 and len(loaded.test_labels.unique()) == 10
    both = [*loaded.train_images.numpy(), *loaded.test_images.numpy()]
    assert sorted(map(bytes, both)) == sorted(map(bytes, shapes.train_images[:600].numpy()))
    held_out = set(map(bytes, loaded.test_images.numpy()))
    write_images("DIR", shapes.train_images[:650], shapes.train_labels)  # what is added changes nothing else
    more = load_dataset("folder", "DIR", CPU, test_share=0.25)
    assert held_out < set(map(bytes, more.test_images.numpy()))
    assert not held_out & set(map(bytes, more.train_images.numpy()))
    assert load_dataset("folder", "DIR", CPU, test_share=1e-9).test_labels.bincount().tolist() == [1] * 10


def test_bad_folders_are_refused(folder, refused, shapes):
    command = f"{SMALL} --data_root {folder}".split()
    refused(pretraining.main, [*command, "--batch_size", 129], "128 training images")
    refused(pretraining.main, [*command, "--train_size", 129], "128 images")
    refused(pretraining.main, [*command, "--data_root", "nowhere"], "nowhere", "No such file")
    refused(pretraining.main, [*command, "--image_size", 4], "--image_size", "at least 8")


LAYOUTS = [  # folder: images, ...; and what is said of it, or the refusal
    ("train/a:4 train/b:4 val/a:2 val/b:2 test:3", "train/ (2 classes, 8), test images val/ (4)|images in test/ (3)"),
    ("train/cats:4 train/dogs:4 validation/cats:2 validation/dogs:1 run.py:0", "images validation/ (3)|.py files (1)"),
    ("Training/a:4 Training/b:4 Testing/a:2", "Training/ (2 classes, 8), test images Testing/ (2, 1 of the classes)"),
    ("bus:4 car:4 train:4", "./ (3 classes, 9), test images held out (3)"),
    ("train/bus:4 train/train:4 test/bus:1 test/train:1", "train/ (2 classes, 8), test images test/ (2)"),
    ("train/a:4 train/test:4 test/a:1 test/test:1", "train/ (2 classes, 8), test images test/ (2)"),
    ("valid:4 invalid:4", "./ (2 classes, 6), test images held out (2)"),
    ("train/a:4 train/b:4 valid/a:2 valid/b:2 test/a:1 test/b:1 README.roboflow.txt:0",
     "images test/ (2)|.txt files (1), images in valid/ (4)"),
    ("seg_train/seg_train/a:4 seg_test/seg_test/a:4 seg_pred:2", "!call the folders of the splits train and test"),
    ("train/seg_train/a:4 train/seg_train/b:4 test/seg_test/a:2 test/seg_test/b:2", "images test/seg_test/ (4)"),
    ("train:4 test1:4", "!has test1, train: call"), ("test/a:3 val/a:3", "!has test, val: call"),
    ("train/a:3 test/a:3 masks:3", "!has masks, test, train: call"), ("train2017:3 val2017:3", "!call"),
    ("train/a:3 train/b:3 test/a:2 test/c:2", "!test: c: its classes must be those of the training images"),
    ("tiny/train/n1/images:4 tiny/train/n2/images:4 tiny/val/images:3 tiny/wnids.txt:0",
     "tiny/train/ (2 classes, 6), test images held out (2)|images in val/ (3)"),
    ("train/a:4 train/b:4 test/a:2 test/b:2 unlabeled:5", "train/ (2 classes, 8) and unlabeled ones (5), test images test/ (4)"),
    ("a:4 b:4 Unlabelled:5", "./ (2 classes, 6) and unlabeled ones (5), test images held out (2)"),
    ("lfw/a:1 lfw/b:1 lfw/c:2", "lfw/ (3 classes, 3), test images held out (1, 1 of the classes)"),
    ("a:1 b:1 c:1", "./ (3 classes, 3), no test images"), ("x:3", "x/ (no classes, 3), no test images"),
    (":3", "./ (no classes, 3), no test images"), ("train:3 val:2", "train/ (no classes, 3), no test images"),
    (":1 images/a:4 images/b:4 labels/x.txt:0", "images/ (2 classes, 6)|in no class folder (1)"),
    (":5 more:2", "./ (no classes, 7)"), ("a:3 b:3 :2", "(2 classes, 4)|images in no class folder (2)"),
    ("a:3 b:3 c:0 .DS_Store:0 a/.hidden:2 __MACOSX/a:2 @eaDir:1 $RECYCLE.BIN:1 a/Thumbs.db:0 lost+found:0 notes.txt:0",
     "./ (2 classes, 4)|$RECYCLE.BIN (1), .txt files (1), @eaDir (1), Thumbs.db (1), __MACOSX (1), empty folders (1), "
     "hidden (2), lost+found (1)"),
    ("a:3 b:3 experiments/1:2 experiments/1/log.jsonl:0 experiments/1/config.json:0 plots:2 plots/loss-plot.png:0 "
     "study:2 study/ablations.md:0 cache/c.npy:0", "(2 classes, 4)|.npy files (1), outputs of this program (3)"),
    ("train/a:3 train/b:3 train/features.json:0 val/a:1 val/b:1", "train/ (2 classes, 6), test images val/ (2)|.json files"),
    ("train/a:3 train/b:3 train/unlabeled:4 test/a:1 test/b:1", "train/ (2 classes, 6) and unlabeled ones (4)"),
    ("set/a:3 set/b:3 unlabeled:4", "set/ (2 classes, 4) and unlabeled ones (4), test images held out (2); classes a, b"),
    ("labeled/a:3 labeled/b:3 unlabeled:4", "labeled/ (2 classes, 4) and unlabeled ones (4)"),
    ("set/a:3 set/b:3 set:1 :1", "set/ (2 classes, 4), test images held out (2)|images in no class folder (2)"),
    ("train/a:3 train/b:3 test/a/more:2", "train/ (2 classes, 6), test images test/ (2, 1 of the classes)"),
    ("train/a:3 eval/a:3", "!has eval, train: call"), ("trainval/a:3 test/a:3", "!has test, trainval: call"),
    ("W/W/train/a:3 W/W/valid/a:3 test/test:3", "!call"), ("bottle/train/good:3 bottle/test/bad:3 cable/train/good:3", "!bottle"),
    ("flowers/a:3 flowers/b:3 a:3 b:3", "!flowers/a is called as a class or a split, but lies in a class"),
    ("a:3 b:3 #snapshot/GMT/a:3 FOUND.000:1", "(2 classes, 4)|#snapshot (1), FOUND.000 (1)"),
]


@pytest.mark.parametrize("content, said", LAYOUTS)
def test_a_layout_is_read_as_it_is_meant(content, said, tmp_path, monkeypatch, capsys, shapes):
    monkeypatch.chdir(tmp_path)
    for word in content.split():
        place, count = word.rsplit(":", 1)
        if "." in place[1:]:
            Path("DIR", place).parent.mkdir(parents=True, exist_ok=True)
            Path("DIR", place).touch()
        else:
            Path("DIR", place).mkdir(parents=True, exist_ok=True)
            write_images(f"DIR/{place}", shapes.train_images[:int(count)])
    if said.startswith("!"):
        with pytest.raises(ValueError, match=re.escape(said[1:])):
            load_dataset("folder", "DIR", CPU)
        return
    loaded = load_dataset("folder", "DIR", CPU)
    printed = capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.chdir("DIR")
        for root in (".", "../DIR/", f"{tmp_path}/DIR"):
            assert torch.equal(load_dataset("folder", root, CPU, cache_dir="../other").train_labels, loaded.train_labels)
    line, _, passed = said.partition("|")
    assert line in printed.out.splitlines()[0] and printed.out.startswith("DIR: training images ")
    assert (f"DIR; passed over: {passed}\n" in printed.err if passed else not printed.err) or passed in printed.err
    numbers = [int(n) for n in re.findall(r"(\d+)(?:\)|, \d+ of)", printed.out.splitlines()[0])]
    assert sum(numbers) == len(loaded.train_images) + len(loaded.test_images)
    assert {*loaded.test_labels.tolist()} <= {*loaded.train_labels.tolist()}


def test_thousands_of_people_with_few_images_each(shapes, tmp_path, monkeypatch, no_gpu, no_figures, refused):
    """400 classes of one to three images: pre-trained, evaluated and drawn, with small results."""
    monkeypatch.chdir(tmp_path)
    labels = [i % 400 for i in range(700)]
    write_images("DIR", shapes.train_images[:700], labels, [f"{i:03}" for i in range(400)])
    assert pretraining.main(f"{SMALL} --data_root DIR --trial a".split()) == 0
    assert main_lincls.main("--pretrained experiments/a/backbone.pt --features cached --trial b --dataset folder DIR".split()) == 0
    results = checkpoint.read_json("experiments/b/results.json")
    assert results["images"] == 300 and len(results["class_top1"]) == 400 and "confusion" not in results
    visualize.main("--pretrained experiments/a --quiet".split())
    write_images("ONES", shapes.train_images[:60], range(60), [f"{i:03}" for i in range(60)])
    assert pretraining.main(f"{SMALL} --data_root ONES --trial c".split()) == 0 and "knn1" not in log.read("experiments/c")[-1]
    refused(main_lincls.main, "--pretrained experiments/a/backbone.pt --dataset folder ONES".split(), "or no test images")


def test_a_subset_has_all_classes_and_is_drawn_by_the_seed(shapes, tmp_path, monkeypatch):
    """Names like Kaggle's sort by class."""
    monkeypatch.chdir(tmp_path)
    write_images("DIR/cat", shapes.train_images[:300])
    write_images("DIR/dog", shapes.train_images[300:310])
    for file in [*Path("DIR").glob("*/*")]:
        file.rename(file.with_name(f"{file.parent.name}.{file.name}"))
    whole = load_dataset("folder", "DIR", CPU, test_share=0.2)
    one, same, other = (load_dataset("folder", "DIR", CPU, test_share=0.2, train_size=40, test_size=5, seed=seed)
                        for seed in (1, 1, 2))
    assert len(one.train_images) == 40 and len(one.test_images) == 5
    assert {*one.train_labels.tolist()} == {*one.test_labels.tolist()} == {0, 1}
    assert torch.equal(one.train_images, same.train_images) and not torch.equal(one.train_images, other.train_images)
    assert torch.equal(one.test_images, other.test_images)
    assert {*map(bytes, one.train_images.numpy())} < {*map(bytes, whole.train_images.numpy())}
    held = load_dataset("folder", "DIR", CPU, test_share=0.2, validation=len(whole.train_images) - 2)
    assert held.train_labels.tolist() == [0, 1]  # each class keeps an image
    with pytest.raises(ValueError, match="each of the 2 classes keeps one"):
        load_dataset("folder", "DIR", CPU, test_share=0.2, validation=len(whole.train_images) - 1)


def test_files_that_cannot_be_read_are_named_or_skipped_and_counted(folder, refused, capsys, monkeypatch, no_figures):
    whole = load_dataset("folder", str(folder), CPU)
    files = [next(folder.glob(f"train/*/{name}.png")) for name in ("00003", "00050", "00127")]
    for file, content in zip(files, (b"no image", files[1].read_bytes()[:200])):
        file.write_bytes(content)
    files[2].unlink()
    os.mkfifo(files[2])
    command = f"{SMALL} --data_root {folder}".split()
    refused(pretraining.main, command, files[0].name, "--skip_broken")
    assert pretraining.main([*command, "--skip_broken", "--quiet", "--max_minutes", "0"]) == 0
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "3 of 228 images" in error and all(str(file) in error for file in files)
    kept = [i for i in range(128) if i not in (3, 50, 127)]
    for images in (20, 1):  # in a batch: with one, batches without any
        monkeypatch.setattr(image_files, "BATCH_BYTES", 3 * 32 * 32 * images)
        shutil.rmtree("cache")
        loaded = load_dataset("folder", str(folder), CPU, skip_broken=True)
        for i in range(4):
            assert torch.equal(loaded[i], whole[i][kept] if i < 2 else whole[i])
    refused(pretraining.main, command, files[0].name, "--skip_broken")  # from the cache now
    readable = Image.fromarray(whole.train_images[3].permute(1, 2, 0).numpy())
    unreadable = image_files.read_image
    monkeypatch.setattr(image_files, "read_image", lambda file: readable if file == str(files[0]) else unreadable(file))
    assert len(load_dataset("folder", str(folder), CPU, skip_broken=True).train_images) == 126  # it was a passing error
    refused(pretraining.main, [*command, "--resume", "experiments/1/checkpoint.pt", "--data_root",
                               folder / "test"], "not the training images of the run to resume")


def test_other_scripts_take_the_size_of_the_images_from_the_run(folder, no_gpu, no_figures, monkeypatch):
    """Pre-trained at 24 pixels, evaluated there, and on another data set at 24 pixels."""
    assert pretraining.main(f"{SMALL} --data_root {folder} --image_size 24 --view_size 16:0.5,24:0.5".split()) == 0
    seen, usual = [], torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda conv, x: seen.append(x.shape) or usual(conv, x))
    pretrained = "--pretrained experiments/1/backbone.pt"
    assert main_lincls.main(f"{pretrained} --epochs 1 --dataset folder {folder}".split()) == 0
    transfer = "--features cached --dataset shapes --train_size 60 --test_size 50"
    assert main_lincls.main(f"{pretrained} {transfer}".split()) == 0
    export.main(f"features {pretrained} --images {folder}/test --output x.npz".split())
    visualize.main("--pretrained experiments/1".split())
    assert {shape[2] for shape in seen if shape[1] == 3} == {24}
    assert checkpoint.read_json("experiments/2/config.json")["settings"]["image_size"] == 24


def test_imbalanced_classes_have_their_balanced_accuracy_beside_top_1(folder, capsys, no_figures, finished_run):
    for file in sorted(folder.glob("test/disc/*"))[1:]:
        file.unlink()
    command = f"--pretrained {finished_run}/backbone.pt --features cached --dataset folder {folder}"
    assert main_lincls.main([*command.split(), "--fraction", "0.5"]) == 0
    results = checkpoint.read_json("experiments/1/results.json")
    confusion = np.array(results["confusion"])
    assert results["balanced_accuracy"] == pytest.approx((100 * confusion.diagonal() / confusion.sum(axis=1)).mean())
    assert f"{results['balanced_accuracy']:.2f} %" in capsys.readouterr().out


def test_images_for_features_are_those_of_image_folder(tmp_path, shapes):
    write_images(tmp_path / "DIR", shapes.train_images[:3], [1, 0, 1], "ab")
    reference = datasets.ImageFolder(tmp_path / "DIR")
    found, classes = layout.list_images(str(tmp_path / "DIR"))
    assert found == sorted(reference.samples, key=lambda sample: Path(sample[0]).name) and classes == reference.classes
    images, *about = image_files.load_images(str(tmp_path / "DIR"), 32, False)
    assert torch.equal(images, shapes.train_images[:3])
    assert about[0] == tuple(file for file, _ in found) and about[1].tolist() == [1, 0, 1] and about[2] == classes
    (tmp_path / "DIR" / "b" / "deep").mkdir()
    Path(found[0][0]).rename(tmp_path / "DIR" / "b" / "deep" / "00000.png")
    assert [label for _, label in layout.list_images(str(tmp_path / "DIR"))[0]] == [1, 0, 1]
    file = found[1][0]
    assert layout.list_images(os.path.dirname(file)) == ([(file, -1)], [])  # no folders of classes
    assert layout.list_images(file) == ([(file, -1)], [])  # a folder of one
    (tmp_path / "none").mkdir()
    for content in ("notes.txt", ".hidden.png"):
        with pytest.raises(OSError, match="none.*no images"):
            layout.list_images(str(tmp_path / "none"))
        (tmp_path / "none" / content).touch()


def test_a_read_that_fails_once_is_tried_again(folder, monkeypatch, no_figures):
    """And one that fails twice spoils no cache."""
    failing, usual = {"00003.png": 1, "00050.png": 2}, image_files.decode_image

    def flaky(file):
        failing[os.path.basename(file)] = failing.get(os.path.basename(file), 0) - 1
        if failing[os.path.basename(file)] >= 0:
            raise OSError("Stale file handle")
        return usual(file)

    monkeypatch.setattr(image_files, "decode_image", flaky)
    assert len(load_dataset("folder", "DIR", CPU, skip_broken=True).train_images) == 127
    assert len(load_dataset("folder", "DIR", CPU, skip_broken=True).train_images) == 128


def test_a_cache_that_cannot_be_mapped_is_read(folder, monkeypatch):
    def no_map(*args):
        raise OSError(12, "Cannot allocate memory")

    expected = load_dataset("folder", "DIR", CPU)
    monkeypatch.setattr(np, "memmap", no_map)
    shutil.rmtree("cache")
    for _ in range(2):
        assert torch.equal(load_dataset("folder", "DIR", CPU).train_images, expected.train_images)


def test_a_cache_that_others_replace_without_locks_is_not_believed(folder, monkeypatch):
    expected, usual = load_dataset("folder", "DIR", CPU), image_files.make_cache
    other = next(Path("cache").glob("*.npy"))
    load_dataset("folder", "DIR", CPU, image_size=16)
    content = next(Path("cache").glob("*16px*.npy")).read_bytes()
    other.unlink()
    calls = []

    def beaten(path, *args):
        usual(path, *args)
        calls.append(1)
        if len(calls) == 1:
            Path(path).write_bytes(content)

    monkeypatch.setattr(image_files, "make_cache", beaten)
    monkeypatch.setattr(checkpoint, "fcntl", None)
    assert torch.equal(load_dataset("folder", "DIR", CPU).train_images, expected.train_images) and len(calls) == 2


def test_the_same_picture_in_any_mode_is_the_same_image(tmp_path, capsys):
    """16-bit gray as 8-bit gray, transparency on white, orientation tags, and what has no defined range."""
    gray = torch.randint(256, (40, 56), generator=torch.Generator().manual_seed(0)).byte().numpy()
    color = Image.fromarray(np.stack((gray, gray.T.reshape(40, 56), 255 - gray), axis=2))
    binary = Image.fromarray(np.where(gray > 127, 255, 0).astype(np.uint8))
    glass, palette = color.copy(), color.quantize(64)
    glass.putalpha(Image.fromarray(gray))
    on_white = np.asarray(color) * (gray[..., None] / 255) + 255 - gray[..., None]
    holes = np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(palette.convert("RGB")))
    turned, smooth = Image.Exif(), Image.linear_gradient("L").resize((56, 40))
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    sixteen, no_seven = Image.fromarray(gray.astype(np.uint16) * 257), np.where(gray == 7, 255, gray)
    cases = [  # name, file, options of saving, and the gray or RGB image that it is
        ("gray.png", Image.fromarray(gray), {}, gray), ("16.png", sixteen, {}, gray), ("16.tiff", sixteen, {}, gray),
        ("16.pgm", sixteen, {}, gray), ("big-endian.tif", Image.fromarray(gray.astype(">u2") * 257), {}, gray),
        ("1-bit.png", binary.convert("1"), {}, np.asarray(binary)), ("color.bmp", color, {}, np.asarray(color)),
        ("alpha.png", glass, {}, on_white), ("palette.png", palette, {}, np.asarray(palette.convert("RGB"))),
        ("holes.png", palette, {"transparency": 0}, holes), ("cmyk.tif", color.convert("CMYK"), {}, np.asarray(color)),
        ("no-7.png", Image.fromarray(gray), {"transparency": 7}, no_seven),
        ("no-7-in-16.png", sixteen, {"transparency": 7 * 257}, no_seven),
        ("turned.png", color.transpose(Image.Transpose.ROTATE_90), {"exif": turned}, np.asarray(color)),
        ("color.webp", color, {"lossless": True}, np.asarray(color)), ("SMOOTH.JPEG", smooth, {}, np.asarray(smooth)),
    ]
    glass.convert("LA").save(tmp_path / "gray-alpha.png")
    for name, image, options, expected in cases:
        image.save(tmp_path / name, **options)
        read = np.asarray(image_files.read_image(tmp_path / name)).astype(float)
        expected = expected if expected.ndim == 3 else np.stack([expected] * 3, 2)
        assert read.shape == (40, 56, 3) and np.abs(read - expected).max() <= 1, name
    (tmp_path / "notes.txt").touch()
    (tmp_path / "moving.gif").touch()
    assert len(layout.list_images(str(tmp_path))[0]) == len(cases) + 1
    assert capsys.readouterr().err == f"warning: {tmp_path}; passed over: .gif files (1), .txt files (1)\n"
    for dtype, name in ((np.int32, "32.tif"), (np.float32, "float.tiff"), (np.int16, "signed.tif")):
        Image.fromarray(gray.astype(dtype)).save(tmp_path / name)
        with pytest.raises(OSError, match=f"{name}.*range"):
            image_files.read_image(tmp_path / name)


def test_photographs_of_any_size_mode_and_format_train(tmp_path, monkeypatch, no_figures, no_gpu):
    """Tiles of the photographs that matplotlib and scikit-learn ship; each photograph is a class."""
    monkeypatch.chdir(tmp_path)
    classes = tiles.cut_tiles("DIR", 450)
    command = "--dim 64 --pred_dim 16 --batch_size 32 --width 8 --epochs 3 --learning_rate 0.05 --untrained"
    assert pretraining.main(f"--dataset folder --data_root DIR --image_size 24 {command}".split()) == 0
    assert load_dataset("folder", "DIR", CPU, image_size=24).classes == classes
    assert log.read("experiments/1")[-1]["knn200"] > 100 / len(classes) + 5


def test_links_in_a_circle_add_nothing_and_a_folder_that_cannot_be_read_is_named(folder, monkeypatch):
    files = layout.list_images("DIR/train")
    os.symlink("..", "DIR/train/disc/up")
    os.symlink(".", "DIR/train/disc/again")
    os.symlink("../ring", "DIR/train/disc/other")  # another class
    assert layout.list_images("DIR/train") == files

    def no_access(path):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", no_access)
    with pytest.raises(PermissionError):
        load_dataset("folder", "DIR", CPU)


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
