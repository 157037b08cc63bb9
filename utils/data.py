"""Data sets as uint8 tensors: torchvision's, the built-in shapes, and folders of images."""
import glob
import hashlib
import itertools
import os
import re
from typing import NamedTuple

import numpy
import torch
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN
from torchvision.transforms.v2 import functional

from utils import checkpoint, shapes
from utils.cli import info
from utils.images import cached_images, list_images

TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10, "svhn": SVHN}
DATASETS = (*TORCHVISION, "folder", "shapes")
SIZES = {"stl10": 96}  # of the images, in pixels, where it is not 32
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # default sizes
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED, VALIDATION_SEED = 0, 1, 2


class Dataset(NamedTuple):
    """Images and labels of both splits, on the device; images that do not fit there stay on the host."""
    train_images: torch.Tensor  # uint8 [N, 3, H, W]
    train_labels: torch.Tensor  # int64 [N]; -1 without a label, after all that have one
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list               # names, in the order of the labels

    @property
    def has_classes(self):
        """Whether there is anything to classify: labels, of more than one class, and test images."""
        return len(self.classes) > 1 and len(self.test_labels) > 0

    def digest(self):
        """SHA-256, hexadecimal, of the training labels and about a thousand training images: which data they are."""
        images = self.train_images[::max(1, len(self.train_images) // 1000)]
        return checkpoint.digest({"images": images, "labels": self.train_labels})

    def labeled(self):
        """Training images that have labels, and these: the bank of kNN, and what a classifier is trained on."""
        count = int((self.train_labels >= 0).sum())
        return self.train_images[:count], self.train_labels[:count]


def load_dataset(name, root, device, train_size=None, test_size=None, image_size=None, validation=None,
                 test_share=None, cache_dir="cache", skip_broken=False, unlabeled=True):
    """Load one of DATASETS as a Dataset. root: folder that has or gets the files; for 'folder' see `load_splits`, which
    takes the last options. train_size, test_size: the first N images in file order; for shapes, the number drawn.
    image_size: images are resized to it (default: the data set's own). validation: number of training images to test
    on, see `hold_out`. unlabeled: with STL-10's images without labels.
    Raises ValueError for an unknown name and sizes beyond the data set's, OSError if files cannot be had."""
    image_size = image_size or SIZES.get(name, 32)
    if name == "shapes":
        splits = [shapes.draw_shapes(train_size or SHAPES_TRAIN, SHAPES_TRAIN_SEED),
                  shapes.draw_shapes(test_size or SHAPES_TEST, SHAPES_TEST_SEED)]
        classes = list(shapes.CLASSES)
    elif name == "folder":
        splits, classes = load_splits(root, image_size, test_share or 0.1, cache_dir, skip_broken)
    elif name in TORCHVISION:
        opened = open_torchvision(name, root, unlabeled)
        splits = [(split.data, split.labels if hasattr(split, "labels") else split.targets) for split in opened]
        classes = getattr(opened[0], "classes", list("0123456789"))
    else:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    tensors = []
    for (images, labels), size, split in zip(splits, (train_size, test_size), ("train", "test")):
        if size is not None and size > len(images):
            raise ValueError(f"--{split}_size {size}: the {split} split has {len(images)} images")
        images = torch.from_numpy(images[:size])
        tensors.append(resize(images.permute(0, 3, 1, 2) if images.shape[3] == 3 else images, image_size))
        tensors.append(torch.as_tensor(labels[:size], dtype=torch.int64))
    if validation is not None:
        if len(classes) < 2:
            raise ValueError(f"--validation {validation}: no labels of several classes to validate with")
        tensors = hold_out(*tensors[:2], validation)
    train, train_labels, test, test_labels = tensors
    fits = device.type != "cuda" or train.nbytes + test.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    home = device if fits else torch.device("cpu")
    return Dataset(train.to(home), train_labels.to(device), test.to(home), test_labels.to(device), classes)


def hold_out(images, labels, count):
    """Split training images [N, 3, H, W] and labels [N] into the rest and, in place of test images, `count` images with
    labels: a random choice that is the same in all runs. Returns both splits' images and labels, as copies in memory.
    Raises ValueError unless images with labels remain."""
    labeled = int((labels >= 0).sum())
    if count >= labeled:
        raise ValueError(f"--validation {count}: {labeled} training images have labels")
    order = torch.randperm(labeled, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    held, rest = order[:count].sort().values, order[count:].sort().values
    rest = torch.cat((rest, torch.arange(labeled, len(labels))))
    return images[rest], labels[rest], images[held], labels[held]


def resize(images, size):
    """Square images uint8 [N, 3, H, H] as contiguous [N, 3, size, size]: bilinear, antialiased."""
    if images.shape[2] == size:
        return images.contiguous()
    return torch.cat([functional.resize(part, [size, size], antialias=True) for part in images.split(1000)])


def open_torchvision(name, root, unlabeled):
    """Both splits as torchvision data sets; missing or damaged files (by MD5) are downloaded. root may also be the
    folder of the files itself, of any name, or the parent of the one that has it, if all files are there."""
    if os.path.isfile(root):
        raise NotADirectoryError(f"{root!r} is a file, not the folder of the data")
    own, parent, found = TORCHVISION[name], root, TORCHVISION[name]
    if name != "svhn":  # whose files are not in a folder of their own
        below = sorted(glob.glob(os.path.join(glob.escape(root), "*", own.base_folder)))
        places = [os.path.join(root, own.base_folder), root, *below]
        place = next((place for place in places if all(os.path.exists(os.path.join(place, file))
                      for file, _ in (*own.train_list, *own.test_list))), places[0])
        if place != places[0]:
            info(f"{root}: reading {place}")
        parent, folder = os.path.split(os.path.abspath(place))
        found = type(own.__name__, (own,), {"base_folder": folder})  # torchvision's, in a folder of any name
    existed = os.path.lexists(root)
    try:
        if name.startswith("cifar"):
            return [found(parent, train=train, download=True) for train in (True, False)]
        splits = "train+unlabeled" if unlabeled and name == "stl10" else "train", "test"
        return [found(parent, split=split, download=True) for split in splits]
    except ImportError as error:
        raise OSError(f"--dataset {name} requires the package {error.name} (pip install {error.name})") from error
    except (OSError, RuntimeError) as error:
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        what = getattr(own, "base_folder", "SVHN")
        raise OSError(f"{root!r} has no intact {what}, and the download failed ({error}); point --data_root "
                      "(main_lincls.py: DIR) at a copy, or try --dataset shapes") from error


def load_splits(root, size, test_share, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)] and class names. The images are those of
    root/train and root/test (or val), else of root, where about test_share of each class, at least one image, become
    the test split, chosen by a hash of each path. Images are read once, into cache_dir. Without classes,
    or with only one, there are no test images. Raises OSError and ValueError, as `list_images` and `cached_images` do,
    and for test images of classes without training images."""
    folder = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    tests = [path for path in (os.path.join(root, "test"), os.path.join(root, "val")) if os.path.isdir(path)]
    if os.path.realpath(cache_dir).startswith(os.path.join(os.path.realpath(root), "")):
        raise ValueError(f"--cache_dir {cache_dir} lies among the images of {root}; choose another")
    files, labels, classes = list_images(folder)
    named_as_splits = [name for name in classes if re.fullmatch("train|training|test|testing|val|valid|validation",
                                                                name, re.IGNORECASE)]
    if len(named_as_splits) > 1:
        raise ValueError(f"{folder} has {', '.join(named_as_splits)}: splits are called train and test (or val)")
    test_files, test_labels = [], []
    if len(classes) > 1 and folder != root and tests:
        test_files, test_labels, test_classes = list_images(tests[0])
        unknown = [name for name in test_classes if name not in classes]
        if unknown or not test_classes:
            raise ValueError(f"{tests[0]}: " + (f"{', '.join(unknown)}: not a class of {folder}" if unknown else
                                                "no class folders"))
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
    elif len(classes) > 1:
        places = [int(hashlib.sha256(os.fsencode(os.path.relpath(file, folder))).hexdigest(), 16) / 2**256
                  for file in files]  # uniform in [0, 1)
        least = {}  # of each class
        for place, label in zip(places, labels):
            least[label] = min(place, least.get(label, 1))
        held_out = [place < test_share or place == least[label] for place, label in zip(places, labels)]
        test_files, test_labels = (list(itertools.compress(of_all, held_out)) for of_all in (files, labels))
        files, labels = ([each for each, held in zip(of_all, held_out) if not held] for of_all in (files, labels))
    images, broken = cached_images(root, files + test_files, size, cache_dir, skip_broken)
    whole = [i not in broken for i in range(len(files) + len(test_files))]
    count = sum(whole[:len(files)])
    labels = numpy.array(labels + test_labels, dtype=numpy.int64)[whole]
    lost = [classes[label] for label in sorted(set(labels[count:]) - set(labels[:count]))]
    if lost:
        raise ValueError(f"{root}: {', '.join(lost)}: test images, but no training images")
    return [(images[:count], labels[:count]), (images[count:], labels[count:])], classes


def balanced_subset(labels, fraction, seed):
    """Indices, int64 and sorted, of a fraction of each class, at least one, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(labels.cpu() == label)[:, 0] for label in labels.unique().tolist()]
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:max(1, round(fraction * len(rows)))]]
              for rows in classes]
    return torch.cat(chosen).sort().values
