"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100 from torchvision, the built-in shapes, and folders of images."""
import os
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader
from torchvision.transforms.v2 import functional

from utils import shapes
from utils.cli import bar, warn

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
DATASETS = (*CIFAR, "shapes")
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # default sizes
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 0, 1


class Dataset(NamedTuple):
    """Images and labels of both splits, on the device; images that do not fit there stay on the host."""
    train_images: torch.Tensor  # uint8 [N, 3, H, W]
    train_labels: torch.Tensor  # int64 [N]
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list               # names, in the order of the labels


def load_dataset(name, root, device, train_size=None, test_size=None):
    """Load 'cifar10', 'cifar100' or 'shapes' as a Dataset. root: folder that has or gets the files of CIFAR.
    train_size, test_size: the first N images in file order; for shapes, the number drawn. Raises ValueError for an
    unknown name and sizes beyond the data set's, OSError if the download fails."""
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
    tensors = []
    for (images, labels), size, split in zip(splits, (train_size, test_size), ("train", "test")):
        if size is not None and size > len(images):
            raise ValueError(f"--{split}_size {size}: the {split} split has {len(images)} images")
        tensors.append(torch.from_numpy(images[:size]).permute(0, 3, 1, 2).contiguous())
        tensors.append(torch.as_tensor(labels[:size], dtype=torch.int64))
    train, train_labels, test, test_labels = tensors
    fits = device.type != "cuda" or train.nbytes + test.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    home = device if fits else torch.device("cpu")
    return Dataset(train.to(home), train_labels.to(device), test.to(home), test_labels.to(device), classes)


def open_cifar(name, root):
    """Both splits as torchvision data sets; missing or damaged files (by MD5) are downloaded."""
    existed = os.path.lexists(root)
    try:
        return [CIFAR[name](root, train=train, download=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(f"{root!r} has no intact {CIFAR[name].base_folder}, and the download failed ({error}); point "
                      "--data_root (main_lincls.py: DIR) at a copy, or try --dataset shapes") from error


def load_folder(folder, size):
    """The images of a folder, resized (short side) and center-cropped: uint8 [N, 3, size, size]; labels int64 [N],
    class names and file paths. Classes are the subfolders, as in ImageFolder; without any, every label is -1. Hidden
    names are ignored. Raises OSError for a folder without images and for an image that cannot be read."""
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
    """Indices, int64 and sorted, of a fraction of each class, at least one, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for label in labels.unique().tolist():
        rows = torch.nonzero(labels.cpu() == label)[:, 0]
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values
