"""The data sets against torchvision's, and what the built-in shapes guarantee."""
import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision import transforms

from utils.augment import MEAN, STD
from utils.data import balanced_subset, hold_out, load_dataset
from utils.images import load_folder, read_image
from utils.shapes import draw_shapes

CPU = torch.device("cpu")


def test_cifar10_matches_torchvision(cifar, cifar_root):
    assert cifar.train_images.dtype == torch.uint8 and cifar.train_labels.dtype == torch.int64
    for train, images, labels in ((True, *cifar[:2]), (False, *cifar[2:4])):
        reference = torchvision.datasets.CIFAR10(cifar_root, train=train)
        assert reference.targets == labels.tolist() and reference.classes == list(cifar.classes)
        assert np.array_equal(reference.data, images.permute(0, 2, 3, 1).numpy())


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
    for count in (1000, 1001):
        with pytest.raises(ValueError, match=f"--validation {count}: 1000 training images have labels"):
            load_dataset("shapes", "", CPU, train_size=1000, validation=count)


def test_images_without_labels_stay_in_the_training_split():
    images, labels = torch.arange(100).view(-1, 1), torch.cat((torch.arange(40) % 4, torch.full((60,), -1)))
    rest, rest_labels, held, held_labels = hold_out(images, labels, 30)
    assert rest.flatten().tolist()[10:] == list(range(40, 100)) and (rest_labels[10:] == -1).all()
    assert sorted(rest[:10, 0].tolist() + held[:, 0].tolist()) == list(range(40))
    assert torch.equal(held_labels, held[:, 0] % 4) and torch.equal(rest_labels[:10], rest[:10, 0] % 4)


def test_sizes_take_the_first_images_of_the_files(cifar, cifar_root):
    part = load_dataset("cifar10", cifar_root, CPU, train_size=100, test_size=7)
    for tensor, whole, size in zip(part, cifar, (100, 100, 7, 7)):
        assert torch.equal(tensor, whole[:size])
    with pytest.raises(ValueError, match="50001"):
        load_dataset("cifar10", cifar_root, CPU, train_size=50_001)


def test_damaged_files_are_not_used(cifar_root, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    source, copy = Path(cifar_root, "cifar-10-batches-py").resolve(), tmp_path / "cifar-10-batches-py"
    copy.mkdir()
    for file in source.iterdir():
        if file.name != "data_batch_3":
            (copy / file.name).symlink_to(file)
    (copy / "data_batch_3").write_bytes((source / "data_batch_3").read_bytes()[:-1])
    with pytest.raises(OSError, match="no intact cifar-10-batches-py"):
        load_dataset("cifar10", str(tmp_path), CPU)


def test_a_failed_download_names_the_alternatives(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", no_network)
    with pytest.raises(OSError, match="no route to host.*--data_root.*--dataset shapes"):
        load_dataset("cifar10", str(tmp_path / "empty"), CPU)
    with pytest.raises(ValueError, match="cifar10, .*shapes"):
        load_dataset("mnist", str(tmp_path), CPU)


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


def test_load_folder_matches_image_folder(tmp_path, capsys):
    images = torch.randint(256, (3, 3, 80, 50), generator=torch.Generator().manual_seed(0)).byte()
    paths = [tmp_path / "b" / "0.png", tmp_path / "a" / "1.png", tmp_path / "b" / "2.PNG"]
    for path, image in zip(paths, images):
        path.parent.mkdir(exist_ok=True)
        torchvision.utils.save_image(image / 255, path, format="png")
    transform = transforms.Compose([transforms.Resize(40), transforms.CenterCrop(40), transforms.PILToTensor()])
    reference = torchvision.datasets.ImageFolder(tmp_path, transform)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "loose.png").write_bytes(paths[0].read_bytes())
    loaded, labels, classes, files = load_folder(str(tmp_path), 40)
    order = sorted(range(3), key=lambda i: os.path.basename(reference.samples[i][0]))
    assert list(classes) == reference.classes
    assert list(zip(files, labels.tolist())) == [reference.samples[i] for i in order]
    assert torch.equal(loaded, torch.stack([reference[i][0] for i in order]))
    assert "1 image" in capsys.readouterr().err
    loaded, labels, classes, files = load_folder(str(tmp_path / "b"), 40)  # no folders of classes
    assert labels.tolist() == [-1, -1] and not classes and loaded.shape == (2, 3, 40, 40)
    paths[0].write_bytes(b"no image")
    with pytest.raises(OSError, match="0.png"):
        load_folder(str(tmp_path), 40)
    with pytest.raises(OSError, match="images"):
        load_folder(str(tmp_path / ".hidden"), 40)
    (tmp_path / "b" / "none").mkdir()
    for content in ("notes.txt", ".hidden.png"):
        with pytest.raises(OSError, match="none.*no images"):
            load_folder(str(tmp_path / "b"), 40)
        (tmp_path / "b" / "none" / content).touch()


def test_the_same_picture_in_any_mode_is_the_same_image(tmp_path, capsys):
    """16-bit gray as 8-bit gray, transparency on white, orientation tags, and what has no defined range."""
    gray = torch.randint(256, (40, 56), generator=torch.Generator().manual_seed(0)).byte().numpy()
    color = Image.fromarray(np.stack((gray, gray.T.reshape(40, 56), 255 - gray), axis=2))
    binary = Image.fromarray(np.where(gray > 127, 255, 0).astype(np.uint8))
    glass = color.copy()
    glass.putalpha(Image.fromarray(gray))
    on_white = np.asarray(color) * (gray[..., None] / 255) + 255 - gray[..., None]
    palette = color.quantize(64)
    transparent = palette.copy()
    transparent.info["transparency"] = 0
    holes = np.where(np.asarray(palette)[..., None] == 0, 255, np.asarray(palette.convert("RGB")))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be shown turned by 90 degrees clockwise
    sixteen = Image.fromarray(gray.astype(np.uint16) * 257)
    cases = [  # name, file, and the RGB image that it is
        ("gray.png", Image.fromarray(gray), np.stack([gray] * 3, 2)), ("16.png", sixteen, np.stack([gray] * 3, 2)),
        ("16.tiff", sixteen, np.stack([gray] * 3, 2)), ("16.pgm", sixteen, np.stack([gray] * 3, 2)),
        ("big-endian.tif", Image.fromarray((gray.astype(">u2") * 257).astype(">u2")), np.stack([gray] * 3, 2)),
        ("1-bit.png", binary.convert("1"), np.asarray(binary.convert("RGB"))), ("color.bmp", color, np.asarray(color)),
        ("alpha.png", glass, on_white), ("palette.png", palette, np.asarray(palette.convert("RGB"))),
        ("transparent.png", transparent, holes), ("gray-alpha.png", glass.convert("LA"), None),
        ("cmyk.tif", color.convert("CMYK"), np.asarray(color)),
        ("turned.png", color.transpose(Image.Transpose.ROTATE_90), np.asarray(color)),
    ]
    for name, image, expected in cases:
        image.save(tmp_path / name, **({"exif": turned} if name == "turned.png" else {}))
        if expected is not None:
            read = np.asarray(read_image(tmp_path / name)).astype(float)
            assert read.shape == (40, 56, 3) and np.abs(read - expected).max() <= 1, name
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "moving.gif").write_bytes(b"GIF")
    (tmp_path / "._gray.png").write_bytes(b"not data")
    capsys.readouterr()
    assert len(load_folder(str(tmp_path), 16)[0]) == len(cases)
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "2 files skipped: 1 .gif, 1 .txt" in warning
    for dtype, name in ((np.int32, "32.tif"), (np.float32, "float.tiff"), (np.int16, "signed.tif")):
        Image.fromarray(gray.astype(dtype)).save(tmp_path / name)
        with pytest.raises(OSError, match=f"{name}.*range"):
            load_folder(str(tmp_path), 16)
        (tmp_path / name).unlink()


def test_a_transparent_level_of_gray_is_white_with_16_bits_too(tmp_path):
    gray = np.arange(0, 240, dtype=np.uint8).reshape(15, 16)
    Image.fromarray(gray).save(tmp_path / "8.png", transparency=7)
    Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / "16.png", transparency=7 * 257)
    eight, sixteen = (np.asarray(read_image(tmp_path / name)) for name in ("8.png", "16.png"))
    assert (eight == np.where(gray == 7, 255, gray)[..., None]).all() and (eight == sixteen).all()


def test_hidden_files_and_folders_are_no_data_at_any_depth(tmp_path):
    image = Image.new("RGB", (8, 8))
    for name in ("a/1.png", "a/deep/2.png", "a/.cache/3.png", "a/deep/._2.png", ".ipynb_checkpoints/4.png", "b/5.png",
                 "__MACOSX/a/6.png", "b/__MACOSX/7.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / name)
    _, labels, classes, files = load_folder(str(tmp_path), 8)
    assert classes == ["a", "b"] and labels.tolist() == [0, 0, 1]
    assert [os.path.relpath(file, tmp_path) for file in files] == ["a/1.png", "a/deep/2.png", "b/5.png"]


@pytest.mark.parametrize("root", ["{}", "{}/..", "{}/cifar-10-batches-py", "{}/cifar-10-batches-py/", "renamed/files"])
def test_a_root_one_level_too_high_or_too_deep_is_understood(root, tmp_path, monkeypatch, capsys):
    """With files of CIFAR's format that are too small to pass its checksums, in a folder that may not be written."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my data é" / "cifar-10-batches-py"
    if root == "renamed/files":
        folder = tmp_path / "renamed" / "files"
    folder.mkdir(parents=True)
    for name in [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]:
        batch = {"data": np.zeros((2, 3072), dtype=np.uint8), "labels": [0, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    monkeypatch.setattr(CIFAR10, "_check_integrity", lambda dataset: True)
    monkeypatch.setattr(CIFAR10, "_load_meta", lambda dataset: setattr(dataset, "classes", list("0123456789")))
    for path in (folder, folder.parent):
        path.chmod(0o555)
    data = load_dataset("cifar10", root.format("my data é"), CPU)
    assert data.train_images.shape == (10, 3, 32, 32) and data.test_labels.tolist() == [0, 9]
    assert ("reading" in capsys.readouterr().out) == (root != "{}")


def test_incomplete_data_are_not_completed_elsewhere(tmp_path, monkeypatch):
    """A renamed folder with some of the files: the download goes where it was asked for. A file is no folder."""
    for folder in ("renamed", "deep/other/cifar-10-batches-py"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "data_batch_1").touch()
    asked = []
    monkeypatch.setattr(CIFAR10, "download", lambda dataset: asked.append(dataset.root))
    for root in ("renamed", "deep"):
        with pytest.raises(OSError, match="no intact"):
            load_dataset("cifar10", str(tmp_path / root), CPU)
        assert asked.pop() == str(tmp_path / root)
    with pytest.raises(OSError, match="is a file"):
        load_dataset("cifar10", str(tmp_path / "renamed" / "data_batch_1"), CPU)
