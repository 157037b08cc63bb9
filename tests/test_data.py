"""The data sets: CIFAR-10 against torchvision, the shapes' promises, and what is refused."""
import shutil
import time

import numpy as np
import pytest
import torch
import torchvision

from utils.augment import MEAN, STD
from utils.data import SLICE, batches, load_dataset
from utils.shapes import draw_shapes

CPU = torch.device("cpu")


def test_cifar10_is_torchvisions(cifar, cifar_root):
    assert cifar.train_images.shape == (50_000, 3, 32, 32) and cifar.test_images.shape == (10_000, 3, 32, 32)
    assert cifar.train_images.dtype == torch.uint8 and cifar.train_labels.dtype == torch.int64
    for train, images, labels in ((True, cifar.train_images, cifar.train_labels), (False, cifar.test_images, cifar.test_labels)):
        reference = torchvision.datasets.CIFAR10(cifar_root, train=train)
        assert reference.targets == labels.tolist()
        for i in (0, 1, len(reference) // 2, len(reference) - 1):
            assert np.array_equal(np.asarray(reference[i][0]), images[i].permute(1, 2, 0).numpy())
    assert cifar.classes[0] == "airplane" and cifar.classes[9] == "truck"


def test_mean_and_std_are_the_training_pixels(cifar):
    values = torch.arange(256) / 255
    for channel in range(3):
        share = torch.bincount(cifar.train_images[:, channel].flatten(), minlength=256) / (50_000 * 32 * 32)
        mean = (share * values).sum()
        std = (share * (values - mean) ** 2).sum().sqrt()
        assert mean.item() == pytest.approx(MEAN[channel], abs=1e-4)
        assert std.item() == pytest.approx(STD[channel], abs=1e-4)


def test_sizes_take_the_first_pictures(cifar, cifar_root):
    part = load_dataset("cifar10", cifar_root, CPU, train_size=100, test_size=7)
    assert torch.equal(part.train_images, cifar.train_images[:100]) and torch.equal(part.train_labels, cifar.train_labels[:100])
    assert torch.equal(part.test_images, cifar.test_images[:7]) and len(part.test_labels) == 7


def test_damaged_and_missing_files_are_named(cifar_root, tmp_path):
    shutil.copytree(f"{cifar_root}/cifar-10-batches-py", tmp_path / "cifar-10-batches-py")
    damaged = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "cifar-10-batches-py" / "test_batch").unlink()
    with pytest.raises(ValueError, match="missing or damaged: data_batch_3, test_batch"):
        load_dataset("cifar10", str(tmp_path), CPU)


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(OSError, match="no route to host.*--data_root.*--dataset shapes"):
        load_dataset("cifar10", str(tmp_path / "empty"), CPU)


def test_unknown_names_and_sizes_are_refused(cifar_root):
    with pytest.raises(ValueError, match="cifar10, cifar100, shapes"):
        load_dataset("mnist", cifar_root, CPU)
    with pytest.raises(ValueError, match="--train_size 50001.*50000"):
        load_dataset("cifar10", cifar_root, CPU, train_size=50_001)


def test_shapes_are_a_function_of_the_seed():
    images, labels = draw_shapes(2500, 0)
    assert images.shape == (2500, 32, 32, 3) and images.dtype == np.uint8 and labels.dtype == np.int64
    fewer, fewer_labels = draw_shapes(1300, 0)
    assert np.array_equal(fewer, images[:1300]) and np.array_equal(fewer_labels, labels[:1300])
    assert not np.array_equal(draw_shapes(1300, 1)[0], fewer)
    assert np.bincount(labels, minlength=10).min() > 200


def test_shapes_are_drawn_in_time():
    start = time.perf_counter()
    draw_shapes(2000, 0)
    assert time.perf_counter() - start < 10 / 5  # 10 s for 10,000


def test_shapes_as_a_data_set(shapes):
    assert shapes.train_images.shape == (1000, 3, 32, 32) and shapes.train_images.dtype == torch.uint8
    assert len(shapes.classes) == 10 and shapes.test_labels.dtype == torch.int64
    again = load_dataset("shapes", None, CPU, 20, 10)
    assert torch.equal(again.train_images, shapes.train_images[:20])


def feed(images, order, device):
    return list(batches(images, order, 8, device))


def test_batches_are_the_pictures_in_order(shapes):
    order = torch.randperm(1000)[:100]
    parts = feed(shapes.train_images, order, CPU)
    assert [len(part) for part in parts] == [8] * 12 + [4]
    assert torch.equal(torch.cat(parts), shapes.train_images[order])


def test_pictures_on_the_host_come_in_slices(shapes, monkeypatch):
    """The way of a data set too large for the device, with the CPU in the device's part: a torch.device that does not
    compare equal, as the GPU's does not."""
    sent = []
    usual = torch.Tensor.to
    monkeypatch.setattr(torch.Tensor, "to", lambda self, *args, **options: sent.append(len(self)) or usual(self, *args, **options))
    order = torch.randperm(1000)[:SLICE * 8 + 20]
    parts = feed(shapes.train_images, order, torch.device("cpu", 0))
    assert sent == [SLICE * 8, 20]
    assert [len(part) for part in parts] == [8] * SLICE + [8, 8, 4]
    assert torch.equal(torch.cat(parts), shapes.train_images[order])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_pictures_beyond_the_devices_memory_stay_on_the_host(monkeypatch):
    device = torch.device("cuda", 0)
    small = load_dataset("shapes", None, device, 300, 10)
    assert small.train_images.device == device
    monkeypatch.setattr("utils.data.DEVICE_SHARE", 0.0)
    large = load_dataset("shapes", None, device, 300, 10)
    assert large.train_images.device == CPU and large.train_labels.device == device
    order = torch.randperm(300, device=device)
    assert torch.equal(torch.cat(feed(large.train_images, order, device)), small.train_images[order])


def test_shapes_are_laid_out_as_the_network_reads_them():
    """So a large set is not held twice: the tensors of load_dataset are draw_shapes' own memory."""
    images, _ = draw_shapes(30, 0)
    assert images.shape == (30, 32, 32, 3) and torch.from_numpy(images).permute(0, 3, 1, 2).is_contiguous()
