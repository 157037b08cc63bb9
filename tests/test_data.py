"""The data sets against torchvision's, and what the built-in shapes guarantee."""
import hashlib
import mmap
import os
import pickle
import sys

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from torchvision.datasets import CIFAR10, STL10, SVHN
from torchvision.transforms import functional

import main as pretraining
import main_lincls
from utils import checkpoint, data, log
from utils.augment import MEAN, STD
from utils.data import balanced_subset, hold_out, load_dataset
from utils.shapes import draw_shapes

CPU = torch.device("cpu")


def test_cifar10_matches_torchvision(cifar, cifar_root):
    assert cifar.train_images.dtype == torch.uint8 and cifar.train_labels.dtype == torch.int64
    for train, images, labels in ((True, *cifar[:2]), (False, *cifar[2:4])):
        reference = torchvision.datasets.CIFAR10(cifar_root, train=train)
        assert reference.targets == labels.tolist() and reference.classes == list(cifar.classes)
        assert np.array_equal(reference.data, images.permute(0, 2, 3, 1).numpy())
    part = load_dataset("cifar10", cifar_root, CPU, train_size=100, test_size=7)  # the first images of the files
    for tensor, whole, size in zip(part, cifar, (100, 100, 7, 7)):
        assert torch.equal(tensor, whole[:size])
    with pytest.raises(ValueError, match="50001"):
        load_dataset("cifar10", cifar_root, CPU, train_size=50_001)


def test_mean_and_std_are_those_of_the_training_pixels(cifar):
    values = torch.arange(256) / 255
    for channel in range(3):
        share = torch.bincount(cifar.train_images[:, channel].flatten(), minlength=256).double() / (50_000 * 1024)
        mean = (share * values).sum()
        assert mean.item() == pytest.approx(MEAN[channel], abs=1e-4)
        assert (share * (values - mean) ** 2).sum().sqrt().item() == pytest.approx(STD[channel], abs=1e-4)


def test_validation_holds_out_the_same_random_training_images_in_place_of_the_test_images():
    whole = load_dataset("shapes", "", CPU, train_size=1000, test_size=10)
    part, again = (load_dataset("shapes", "", CPU, train_size=1000, validation=200) for _ in range(2))
    assert [len(part.train_images), len(part.test_images)] == [800, 200] and part.digest() == again.digest()
    rows = [{image.numpy().tobytes(): label for image, label in zip(images, labels.tolist())}
            for images, labels in (part[:2], part[2:4], whole[:2])]
    assert rows[0] | rows[1] == rows[2] and len(rows[0]) + len(rows[1]) == len(rows[2]) == 1000
    assert part.test_labels.bincount(minlength=10).min() > 0
    assert not torch.equal(part.test_images, whole.train_images[-200:])
    with pytest.raises(ValueError, match="--validation 1000: 1000 training images have labels"):
        load_dataset("shapes", "", CPU, train_size=1000, validation=1000)


def test_images_without_labels_stay_in_the_training_split():
    images, labels = torch.arange(100).view(-1, 1), torch.cat((torch.arange(40) % 4, torch.full((60,), -1)))
    rest, rest_labels, held, held_labels = hold_out(images, labels, 30)
    assert rest.flatten().tolist()[10:] == list(range(40, 100)) and (rest_labels[10:] == -1).all()
    assert sorted(rest[:10, 0].tolist() + held[:, 0].tolist()) == list(range(40))
    assert torch.equal(held_labels, held[:, 0] % 4) and torch.equal(rest_labels[:10], rest[:10, 0] % 4)


def test_rows_of_a_mapped_file_are_read_together_and_pinned_for_a_gpu(tmp_path, monkeypatch):
    """The advice covers each row from the beginning of its first page."""
    pictures, advice, moved = np.arange(50 * 3 * 40 * 40, dtype=np.uint8).reshape(50, 3, 40, 40), [], []
    pictures.tofile(tmp_path / "file")
    images = torch.from_numpy(np.memmap(tmp_path / "file", np.uint8, "r+", 0, pictures.shape))
    rows = torch.tensor([7, 49, 0, 7])

    class Library:
        def madvise(self, start, length, kind):
            advice.append((start.value, start.value + length.value, kind))

    assert torch.equal(data.take(images, rows, torch.device("cpu")), torch.from_numpy(pictures)[rows])
    monkeypatch.setattr(data.ctypes, "CDLL", lambda name: Library())
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: moved.append("pinned") or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: moved.append(str(device)) or tensor)
    assert torch.equal(data.take(images, rows, torch.device("cuda")), torch.from_numpy(pictures)[rows])
    assert moved == ["pinned", "cuda"] and len(advice) == 4
    for row, (start, end, kind) in zip(rows.tolist(), advice):
        first = images[row].data_ptr()
        assert start % mmap.PAGESIZE == 0 and first - mmap.PAGESIZE < start <= first and kind == mmap.MADV_WILLNEED
        assert end == first + 3 * 40 * 40
    monkeypatch.delattr(mmap, "MADV_WILLNEED")  # Windows
    assert torch.equal(data.take(images, rows, torch.device("cuda")), torch.from_numpy(pictures)[rows]) and len(advice) == 4


@pytest.mark.parametrize("whole, kept", [(8e9, [True, False]), (80e9, [True, True])])
def test_a_small_gpu_keeps_more_of_its_memory_for_training(monkeypatch, whole, kept):
    """180 images of 3,072 bytes, with a little more than four, and than two, times their size free."""
    moved = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **options: moved.append((tensor.dim(), device)) or tensor)
    for times in (4.1, 2.1):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (times * 180 * 3072, whole))
        data.load_dataset("shapes", "", torch.device("cuda"), train_size=100, test_size=80)
    homes = [device.type for dims, device in moved if dims == 4]
    assert homes == [home for fits in kept for home in 2 * ["cuda" if fits else "cpu"]]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "stl10", "svhn"])
def test_a_failed_download_names_the_alternatives(name, tmp_path, no_network):
    with pytest.raises(OSError, match="no route to host.*--data_root.*--dataset shapes"):
        load_dataset(name, str(tmp_path / "empty"), CPU)
    assert not os.listdir(tmp_path)


def test_shapes_are_a_function_of_the_seed(shapes):
    images, labels = draw_shapes(2500, 0)
    assert images.shape == (2500, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    fewer, fewer_labels = draw_shapes(1300, 0)
    assert np.array_equal(fewer, images[:1300]) and np.array_equal(fewer_labels, labels[:1300])
    assert not np.array_equal(draw_shapes(1300, 1)[0], fewer)
    assert np.array_equal(shapes.train_images.permute(0, 2, 3, 1).numpy(), images[:1000])
    assert shapes.train_labels.tolist() == labels[:1000].tolist() and len(shapes.classes) == 10
    # Logs and weights rely on these very images. A few pixels differ by 1 between processors.
    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    checksum = (images.ravel() * (np.arange(images.size) % 251)).sum()
    assert digest.startswith("3e9a8bd23563") and abs(checksum - 122_366_906_452) < 20_000


def test_balanced_subset_takes_the_same_share_of_each_class():
    labels = torch.randint(10, (3000,), generator=torch.Generator().manual_seed(0))
    chosen = balanced_subset(labels, 0.1, 0)
    assert labels[chosen].bincount().tolist() == [round(count / 10) for count in labels.bincount().tolist()]
    assert torch.equal(chosen, chosen.unique()) and torch.equal(chosen, balanced_subset(labels, 0.1, 0))
    assert not torch.equal(chosen, balanced_subset(labels, 0.1, 1))
    assert torch.equal(balanced_subset(labels, 1.0, 0), torch.arange(3000))
    assert balanced_subset(labels, 1e-9, 0).numel() == 10


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
    (place / "class_names.txt").write_text("\n".join("abcdefghij"))
    loaded = load_dataset("stl10", "data", CPU)
    assert np.array_equal(loaded.train_images, np.concatenate((images["train"], images["unlabeled"])))
    assert loaded.train_labels.tolist() == [*labels["train"], *[-1] * 30] and loaded.classes == [*"abcdefghij"]
    assert np.array_equal(loaded.labeled()[0], images["train"]) and loaded.has_classes
    assert np.array_equal(loaded.test_images, images["test"]) and loaded.test_labels.tolist() == labels["test"].tolist()
    assert len(load_dataset("stl10", "data", CPU, unlabeled=False).train_images) == 40
    small = load_dataset("stl10", "data", CPU, image_size=48).train_images
    expected = functional.resize(loaded.train_images[:5], [48, 48], antialias=True)
    assert small.shape == (70, 3, 48, 48) and (small[:5].int() - expected.int()).abs().max() <= 1
    small = "--width 4 --dim 32 --pred_dim 16 --batch_size 32 --epochs 2 --eval_freq 1 --precision fp32"
    assert pretraining.main(f"{small} --dataset stl10 --image_size 32 --data_root data".split()) == 0
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
    with pytest.raises(OSError, match="requires a scipy that works"):
        load_dataset("svhn", str(tmp_path), CPU)


@pytest.mark.parametrize("root", ["{}", "{}/cifar-10-batches-py", "{}/cifar-10-batches-py/"])
def test_a_root_that_is_the_folder_of_the_files_is_understood(root, tmp_path, monkeypatch):
    """With files of CIFAR's format that are too small to pass its checksums."""
    folder = tmp_path / "my data é" / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda dataset: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda dataset: setattr(dataset, "classes", list("0123456789")))
    data = load_dataset("cifar10", root.format(folder.parent), CPU)
    assert data.train_images.shape == (10, 3, 32, 32) and data.test_labels.tolist() == [0, 9]
    with pytest.raises(OSError, match="missing or damaged"):
        load_dataset("cifar10", str(folder / "test_batch"), CPU)
