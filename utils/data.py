"""Data sets as uint8 tensors: CIFAR-10 and CIFAR-100 from torchvision, the built-in shapes, and folders of images."""
import collections
import contextlib
import glob
import os
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from utils import shapes
from utils.cli import bar, info, warn

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
    """Both splits as torchvision data sets; missing or damaged files (by MD5) are downloaded. root may also be the
    folder of the files itself, of any name, or the parent of the one that has it, if all files are there."""
    if os.path.isfile(root):
        raise NotADirectoryError(f"{root!r} is a file, not the folder of the data")
    own = CIFAR[name]
    below = sorted(glob.glob(os.path.join(glob.escape(root), "*", own.base_folder)))
    places = [os.path.join(root, own.base_folder), root, *below]
    place = next((place for place in places if all(os.path.exists(os.path.join(place, file))
                  for file, _ in (*own.train_list, *own.test_list))), places[0])
    if place != places[0]:
        info(f"{root}: reading {place}")
    parent, folder = os.path.split(os.path.abspath(place))
    existed = os.path.lexists(root)
    try:
        found = type(own.__name__, (own,), {"base_folder": folder})  # torchvision's, in a folder of any name
        return [found(parent, train=train, download=train) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(f"{root!r} has no intact {own.base_folder}, and the download failed ({error}); point "
                      "--data_root (main_lincls.py: DIR) at a copy, or try --dataset shapes") from error


def load_folder(folder, size):
    """The images of a folder, resized (short side) and center-cropped: uint8 [N, 3, size, size]; labels int64 [N],
    class names and file paths. Classes are the subfolders, as in ImageFolder; without any, every label is -1. Hidden
    files and folders, of macOS too, are ignored; files of other types are counted in a warning. Raises OSError for a
    folder without images, and naming it for an image that cannot be read, ValueError for one of unknown range."""
    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    names = [name.split(os.sep) for name in glob.glob("**", root_dir=folder, recursive=True)]  # without hidden ones
    names = sorted(name for name in names if name != [""] and "__MACOSX" not in name)
    classes = [name[0] for name in names if len(name) == 1 and os.path.isdir(os.path.join(folder, *name))]
    files, labels, skipped = [], [], collections.Counter()
    for *parents, name in names:
        path = os.path.join(folder, *parents, name)
        if not (os.path.isfile(path) or os.path.islink(path)):
            continue
        if not name.lower().endswith(IMG_EXTENSIONS):
            skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
        elif classes and not parents:
            skipped["images outside the class folders"] += 1
        else:
            files.append(path)
            labels.append(classes.index(parents[0]) if classes else -1)
    empty = [os.path.join(folder, classes[label]) for label in sorted(set(range(len(classes))) - set(labels))]
    if empty or not files:
        raise OSError(f"{(empty or [folder])[0]!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(bar(files, desc="images", leave=False, delay=2)):
        image = functional.center_crop(functional.resize(read_image(file), [size]), [size, size])
        images[i] = functional.pil_to_tensor(image)
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warn(f"{folder}: {skipped.total()} files skipped: {kinds}")
    return images, torch.tensor(labels), classes, files


def read_image(file):
    """An image file as RGB, by Pillow: turned as its orientation tag says, transparent parts on white, the first of
    several frames, 16-bit gray divided by 257. Raises OSError, and ValueError for 32-bit and float values."""
    try:
        with Image.open(file) as opened:
            opened.load()
            image = opened
            with contextlib.suppress(Exception):  # a damaged tag says nothing
                image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode == "I" and opened.format in ("PNG", "PPM"):
                values = numpy.asarray(image)
                values = numpy.where(values == image.info.get("transparency"), 65535, values)
                image = Image.fromarray((values / 257).round().astype(numpy.uint8))
            elif "A" in image.getbands() or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            if image.mode not in ("I", "F"):
                return image.convert("RGB")
    except Exception as error:  # of any type: Pillow parses arbitrary bytes
        raise OSError(f"{file}: not an image that can be read ({error})") from error
    raise ValueError(f"{file}: the range of 32-bit values is not known; save it with 8 or 16 bits")


def balanced_subset(labels, fraction, seed):
    """Indices, int64 and sorted, of a fraction of each class, at least one, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(labels.cpu() == label)[:, 0] for label in labels.unique().tolist()]
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:max(1, round(fraction * len(rows)))]]
              for rows in classes]
    return torch.cat(chosen).sort().values
