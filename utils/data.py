"""Data sets as uint8 tensors: torchvision's, the built-in shapes, and folders of images."""
import ctypes
import mmap
import os
from typing import NamedTuple

import numpy
import torch
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN
from torchvision.transforms.v2.functional import resize

from utils import checkpoint, shapes
from utils.images import load_splits

TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10, "svhn": SVHN}
DATASETS = (*TORCHVISION, "folder", "shapes")


class Dataset(NamedTuple):
    """Images and labels of both splits, on the device; images too large for it stay on the host."""
    train_images: torch.Tensor  # uint8 [N, 3, H, W]
    train_labels: torch.Tensor  # int64 [N]; -1 without a label, after all that have one
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list               # names, in the order of the labels

    @property
    def has_classes(self):
        """Whether there is anything to classify: labels of more than one class, and test images."""
        return len(self.classes) > 1 and len(self.test_labels) > 0

    def digest(self):
        """SHA-256, hexadecimal, of the training labels and about a thousand of the images."""
        images = self.train_images[::max(1, len(self.train_images) // 1000)]
        return checkpoint.digest({"images": images, "labels": self.train_labels})

    def labeled(self):
        """Training images that have labels, and these: kNN's bank, and what a classifier trains on."""
        count = int((self.train_labels >= 0).sum())
        return self.train_images[:count], self.train_labels[:count]


class Options(NamedTuple):
    """What `load_dataset` takes by name."""
    train_size: int | None = None    # N images: the first; of a folder N drawn; of shapes, how many
    test_size: int | None = None
    image_size: int | None = None    # in pixels; None: the data set's own
    validation: int | None = None    # number of training images in place of the test images
    test_share: float | None = None  # of each class of a folder without test images; None: 0.1
    cache_dir: str = "cache"         # of the decoded images of a folder
    skip_broken: bool = False        # skip images of a folder that cannot be read
    unlabeled: bool = True           # with training images without labels
    seed: int = 0                    # draws train_size images of a folder


def options_in(settings, inherited=()):
    """The options of load_dataset in the settings of a script or a run; inherited: where one is None."""
    found = {name: settings[name] for name in Options._fields if name in settings}
    return found | {name: value for name, value in dict(inherited).items() if found[name] is None}


def load_dataset(name, root, device, **options):
    """One of DATASETS as a Dataset. root: data folder; downloaded into if missing. options: those of
    `Options`. Raises ValueError for another name or too large sizes, OSError if files cannot be had."""
    options = Options(**options)
    size = options.image_size or (96 if name == "stl10" else 32)
    if name == "shapes":
        splits = [shapes.draw_shapes(options.train_size or 10_000, seed=0),
                  shapes.draw_shapes(options.test_size or 2_000, seed=1)]
        classes = list(shapes.CLASSES)
    elif name == "folder":
        splits, classes = load_splits(root, size, options.test_share or 0.1, options.cache_dir,
                                      options.skip_broken)
        splits = [draw_subset(*splits[0], options.train_size, options.seed),
                  draw_subset(*splits[1], options.test_size, 0)]
    elif name in TORCHVISION:
        splits, classes = load_torchvision(name, root, options.unlabeled)
    else:
        raise ValueError(f"no data set is called {name!r}; choose from {', '.join(DATASETS)}")
    if name == "stl10" and options.train_size and not options.unlabeled:  # the labeled ones among them
        options = options._replace(train_size=min(options.train_size, len(splits[0][0])))
    train, train_labels = to_tensors(*splits[0], size, options.train_size, "train")
    if not options.unlabeled:
        labeled = int((train_labels >= 0).sum())
        train, train_labels = train[:labeled], train_labels[:labeled]
    test, test_labels = to_tensors(*splits[1], size, options.test_size, "test")
    if options.validation is not None:
        train, train_labels, test, test_labels = hold_out(train, train_labels, options.validation)
    home = device
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        share = 0.25 if whole < 16e9 else 0.5  # the rest is for training
        home = device if train.nbytes + test.nbytes <= share * free else torch.device("cpu")
    return Dataset(train.to(home), train_labels.to(device), test.to(home), test_labels.to(device), classes)


def take(images, rows, device):
    """The rows, int64 [B] beside the images, of images [N, ...], on the device. From the host to a GPU through
    pinned memory, which blocks nothing; rows that are still on the disk are read together, not one by one."""
    if images.device.type == "cpu" and hasattr(mmap, "MADV_WILLNEED"):  # not on Windows
        size, madvise = images[0].nbytes, ctypes.CDLL(None).madvise
        for row in rows.tolist():
            first = images.data_ptr() + row * size
            start = first - first % mmap.PAGESIZE
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(first + size - start), mmap.MADV_WILLNEED)
    batch = images[rows]
    if device.type == "cuda" and batch.device.type == "cpu":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def to_tensors(images, labels, size, count, split):
    """The first `count`, or all, of a split: contiguous uint8 [N, 3, size, size], and int64 [N]."""
    if count is not None and count > len(images):
        raise ValueError(f"--{split}_size {count}: the {split} split has {len(images)} images")
    images = torch.as_tensor(images[:count])
    if images.shape[3] == 3:  # channels last
        images = images.permute(0, 3, 1, 2)
    if images.shape[2] != size:
        images = torch.cat([resize(part, [size, size], antialias=True) for part in images.split(1000)])
    return images.contiguous(), torch.as_tensor(labels[:count], dtype=torch.int64)


def one_of_each(order, labels):
    """The order of rows, int64 [N], with the first one of each class at its beginning; how many these are."""
    first = torch.zeros(len(order), dtype=torch.bool)
    first[numpy.unique(labels[order], return_index=True)[1]] = True
    return torch.cat((order[first], order[~first])), int(first.sum())


def draw_subset(images, labels, count, seed):
    """`count` images, drawn by the seed, in their order, of every class if they are enough; all for None."""
    if count is None or count >= len(labels):
        return images, labels
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    rows = one_of_each(order, labels)[0][:count].sort().values
    return images[rows], labels[rows]


def hold_out(images, labels, count):
    """Split images [N, 3, H, W] and labels [N], at random but alike in all runs, into the rest and
    `count` images with labels. Raises ValueError if that leaves a class without an image."""
    labeled = int((labels >= 0).sum())
    order = torch.randperm(labeled, generator=torch.Generator().manual_seed(2))
    order, classes = one_of_each(order.flip(0), labels)
    if count > labeled - classes:
        raise ValueError(f"--validation {count}: {labeled} training images have labels, and each of the "
                         f"{classes} classes keeps one")
    order = order.flip(0)
    held = order[:count].sort().values
    rest = torch.cat((order[count:].sort().values, torch.arange(labeled, len(labels))))
    return images[rest], labels[rest], images[held], labels[held]


def load_torchvision(name, root, unlabeled):
    """Both splits as (images, labels), and class names; missing or damaged files are downloaded. root
    may also be the folder of the files itself, if it has torchvision's name (cifar-10-batches-py)."""
    dataset = TORCHVISION[name]
    files = getattr(dataset, "base_folder", "*_32x32.mat")  # SVHN's have no folder of their own
    if os.path.basename(os.path.abspath(root)) == files:
        root = os.path.dirname(os.path.abspath(root))
    existed = os.path.lexists(root)
    try:
        if name.startswith("cifar"):
            train, test = [dataset(root, train=train, download=True) for train in (True, False)]
            return [(train.data, train.targets), (test.data, test.targets)], train.classes
        training = "train+unlabeled" if unlabeled and name == "stl10" else "train"
        train, test = [dataset(root, split=split, download=True) for split in (training, "test")]
        classes = getattr(train, "classes", list("0123456789"))
        return [(train.data, train.labels), (test.data, test.labels)], classes
    except (OSError, RuntimeError) as error:
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(f"{root!r}: {files} is missing or damaged and could not be downloaded ({error}); "
                      "--data_root (main_lincls.py: DIR) may be a copy; --dataset folder takes your own images, and "
                      "--dataset shapes needs none") from error
    except Exception as error:  # of any type, of the package that reads SVHN's files
        if name != "svhn":
            raise
        raise OSError(f"--dataset svhn requires a scipy that works (pip install scipy): {error}") from error


def balanced_subset(labels, fraction, seed):
    """Indices, int64 and sorted, of a fraction of each class, at least one, drawn by the seed."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label in labels.unique():
        rows = torch.nonzero(labels == label)[:, 0].cpu()
        order = torch.randperm(len(rows), generator=generator)
        chosen.append(rows[order[:max(1, round(fraction * len(rows)))]])
    return torch.cat(chosen).sort().values
