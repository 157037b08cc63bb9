"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100 from torchvision, the built-in shapes, and folders of images."""
import os
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional

from utils import shapes
from utils.cli import bar, warn

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
DATASETS = (*CIFAR, "shapes")
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # default sizes
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 0, 1
DEVICE_SHARE = 0.5                         # of a GPU's free memory may hold images; larger data sets stay on the host


class Dataset(NamedTuple):
    """Images and labels of both splits, on the device; images that do not fit there stay on the host."""

    train_images: torch.Tensor  # uint8 [N, 3, H, W]
    train_labels: torch.Tensor  # int64 [N]
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list               # names, in the order of the labels


def load_dataset(name, root, device, train_size=None, test_size=None):
    """Load 'cifar10', 'cifar100' or 'shapes' as a Dataset.

    root: folder that has, or gets, `cifar-10-batches-py` or `cifar-100-python`; unused for shapes. train_size,
    test_size: the first N images in file order; for shapes, the number drawn. Raises ValueError for an unknown name,
    damaged files (MD5) and sizes beyond the data set's, OSError if the download fails.
    """
    if name == "shapes":
        splits = [shapes.draw_shapes(train_size or SHAPES_TRAIN, SHAPES_TRAIN_SEED),
                  shapes.draw_shapes(test_size or SHAPES_TEST, SHAPES_TEST_SEED)]
        classes = list(shapes.CLASSES)
    elif name in CIFAR:
        cifar = open_cifar(name, root)
        splits = [(split.data, split.targets) for split in cifar]
        classes = cifar[0].classes
    else:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    train_images, train_labels = first_images(*splits[0], train_size, "train")
    test_images, test_labels = first_images(*splits[1], test_size, "test")
    home = device
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        home = device if train_images.nbytes + test_images.nbytes <= DEVICE_SHARE * free else torch.device("cpu")
    return Dataset(
        train_images.to(home), train_labels.to(device), test_images.to(home), test_labels.to(device), classes,
    )


def open_cifar(name, root):
    """Both splits as torchvision data sets, downloaded if the folder is missing."""
    cifar = CIFAR[name]
    folder = os.path.join(root, cifar.base_folder)
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    if os.path.lexists(folder):
        damaged = [file for file, md5 in files if not check_integrity(os.path.join(folder, file), md5)]
        if damaged:
            raise ValueError(f"{folder}: missing or damaged: {', '.join(damaged)}; remove it to download it again")
    new_root = not os.path.lexists(root)
    try:
        train = cifar(root, train=True, download=not os.path.lexists(folder))
    except (OSError, RuntimeError) as error:
        if new_root and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(f"{root!r} has no {cifar.base_folder}, and the download failed ({error}); point --data_root "
                      "(main_lincls.py: DIR) at a copy, or try --dataset shapes") from error
    return train, cifar(root, train=False)


def first_images(images, labels, size, split):
    """The first `size` images (None: all) of a split, numpy HWC, as host tensors."""
    if size is not None and size > len(images):
        raise ValueError(f"--{split}_size {size}: the {split} split has {len(images)} images")
    images = torch.from_numpy(images[:size]).permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(labels[:size], dtype=torch.int64)


def load_folder(folder, size):
    """Load the images of a folder, resized (short side) and center-cropped to size x size pixels.

    Returns images uint8 [N, 3, size, size], labels int64 [N], class names and file paths. Classes are the subfolders,
    as in torchvision's ImageFolder; without subfolders every label is -1. Hidden names are ignored. Raises OSError for
    a folder without images and for an image that cannot be read.
    """
    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda e: e.name)
    files = [entry.path for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file()]
    labels, classes = [-1] * len(files), [entry.name for entry in entries if entry.is_dir()]
    if classes:
        if files:
            warn(f"{folder}: {len(files)} images outside the class folders are ignored")
        files, labels = zip(*make_dataset(folder, {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS))
    if not files:
        raise OSError(f"{folder!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(bar(files, desc="images", leave=False, delay=2)):
        try:
            image = pil_loader(file)
        except Exception as error:  # of any type: Pillow parses arbitrary bytes
            raise OSError(f"{file}: not an image that can be read") from error
        image = functional.center_crop(functional.resize(image, [size]), [size, size])
        images[i] = functional.pil_to_tensor(image)
    return images, torch.tensor(labels), classes, list(files)


def balanced_subset(labels, fraction, seed):
    """Indices, int64 and sorted, of a fraction of each class drawn by the seed: the same on every device. Each class
    keeps at least one image."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels.cpu() == label)[:, 0]
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values
