"""Data sets as uint8 tensors: torchvision's, the built-in shapes, and folders of images."""
import os
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN
from torchvision.transforms.v2.functional import resize

from utils import checkpoint, shapes
from utils.folder import load_splits

TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10, "svhn": SVHN}
DATASETS = (*TORCHVISION, "folder", "shapes")
SIZES = {"stl10": 96}  # of the images, in pixels, where it is not 32
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # default sizes
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED, VALIDATION_SEED = 0, 1, 2


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
    train_size: int | None = None    # the first N images in file order; of shapes, the number drawn
    test_size: int | None = None
    image_size: int | None = None    # in pixels, to which images are resized; None: the data set's own
    validation: int | None = None    # number of training images in place of the test images
    test_share: float | None = None  # of each class of a folder without test images; None: 0.1
    cache_dir: str = "cache"         # of the decoded images of a folder
    skip_broken: bool = False        # skip images of a folder that cannot be read
    unlabeled: bool = True           # with STL-10's images without labels


def options_in(settings, inherited=()):
    """The options of load_dataset in the settings of a script or a run. inherited: a dict of those
    that stand where none is typed."""
    found = {name: settings[name] for name in Options._fields if name in settings}
    return found | {name: value for name, value in dict(inherited).items() if found[name] is None}


def load_dataset(name, root, device, **options):
    """Load one of DATASETS as a Dataset. root: data folder; downloaded into if missing. options: the
    fields of `Options`. Raises ValueError for an unknown name and sizes beyond the data set's, OSError
    if files cannot be had, TypeError for other options. For folders see `load_splits`."""
    options = Options(**options)
    size = options.image_size or SIZES.get(name, 32)
    if name == "shapes":
        splits = [shapes.draw_shapes(options.train_size or SHAPES_TRAIN, SHAPES_TRAIN_SEED),
                  shapes.draw_shapes(options.test_size or SHAPES_TEST, SHAPES_TEST_SEED)]
        classes = list(shapes.CLASSES)
    elif name == "folder":
        splits, classes = load_splits(root, size, options.test_share or 0.1, options.cache_dir,
                                      options.skip_broken)
    elif name in TORCHVISION:
        splits, classes = load_torchvision(name, root, options.unlabeled)
    else:
        raise ValueError(f"unknown data set {name!r}; choose from {', '.join(DATASETS)}")
    train, train_labels = to_tensors(*splits[0], size, options.train_size, "train")
    test, test_labels = to_tensors(*splits[1], size, options.test_size, "test")
    if options.validation is not None:
        if len(classes) < 2:
            raise ValueError("--validation: no labels of several classes to validate with")
        train, train_labels, test, test_labels = hold_out(train, train_labels, options.validation)
    fits = device.type != "cuda" or train.nbytes + test.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    home = device if fits else torch.device("cpu")
    return Dataset(train.to(home), train_labels.to(device), test.to(home), test_labels.to(device), classes)


def to_tensors(images, labels, size, count, split):
    """Images and labels of a split as tensors, the first `count` or all: uint8 [N, 3, size, size],
    contiguous, resized bilinearly and antialiased, and int64 [N]."""
    if count is not None and count > len(images):
        raise ValueError(f"--{split}_size {count}: the {split} split has {len(images)} images")
    images = torch.from_numpy(images[:count])
    if images.shape[3] == 3:  # channels last
        images = images.permute(0, 3, 1, 2)
    if images.shape[2] != size:
        images = torch.cat([resize(part, [size, size], antialias=True) for part in images.split(1000)])
    return images.contiguous(), torch.as_tensor(labels[:count], dtype=torch.int64)


def hold_out(images, labels, count):
    """Split training images [N, 3, H, W] and labels [N] into the rest and `count` images with labels, for
    validation, at random but alike in all runs; as copies. Raises ValueError if no labels remain."""
    labeled = int((labels >= 0).sum())
    if count >= labeled:
        raise ValueError(f"--validation {count}: {labeled} training images have labels")
    order = torch.randperm(labeled, generator=torch.Generator().manual_seed(VALIDATION_SEED))
    held, rest = order[:count].sort().values, order[count:].sort().values
    rest = torch.cat((rest, torch.arange(labeled, len(labels))))
    return images[rest], labels[rest], images[held], labels[held]


def load_torchvision(name, root, unlabeled):
    """Both splits as (images, labels), and class names; missing or damaged files (by MD5) are downloaded.
    root may also be the folder of the files itself, if it has torchvision's name (cifar-10-batches-py)."""
    if os.path.isfile(root):
        raise NotADirectoryError(f"{root!r} is a file, not the folder of the data")
    dataset = TORCHVISION[name]
    files = getattr(dataset, "base_folder", "*_32x32.mat")  # SVHN's are in no folder of their own
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
    except ImportError as error:
        raise OSError(f"--dataset {name} requires the package {error.name} (pip install {error.name})") from error
    except (OSError, RuntimeError) as error:
        if not existed and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(f"{root!r}: {files} is missing or damaged and could not be downloaded ({error}); "
                      "point --data_root (main_lincls.py: DIR) at a copy, or try --dataset shapes") from error


def balanced_subset(labels, fraction, seed):
    """Indices, int64 and sorted, of a fraction of each class, at least one, drawn by the seed."""
    generator = torch.Generator().manual_seed(seed)
    classes = [torch.nonzero(labels.cpu() == label)[:, 0] for label in labels.unique().tolist()]
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:max(1, round(fraction * len(rows)))]]
              for rows in classes]
    return torch.cat(chosen).sort().values
