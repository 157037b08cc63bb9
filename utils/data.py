"""Data sets as uint8 tensors: CIFAR-10 and -100 through torchvision, and the built-in shapes; and batches of them on
the device, on which a data set lives as a whole unless it is too large."""
import os
from typing import NamedTuple

import torch
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset, pil_loader
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2 import functional as pictures
from tqdm import tqdm

from utils import shapes
from utils.cli import warn
from utils.device import require_memory

CIFAR = {"cifar10": CIFAR10, "cifar100": CIFAR100}
DATASETS = (*CIFAR, "shapes")
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # drawn unless other sizes are asked for
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 0, 1
DEVICE_SHARE = 0.5                         # of the device's free memory, at most, is for pictures
SLICE = 16                                 # batches that go to the device at a time where the pictures stay on the host


class Dataset(NamedTuple):
    """Pictures and labels of both splits; the labels on the device, the pictures too unless they are too many."""

    train_images: torch.Tensor  # uint8 [N, 3, H, W]
    train_labels: torch.Tensor  # int64 [N]
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: list               # names, in the order of the labels


def open_cifar(name, root):
    """Both splits of CIFAR as torchvision data sets, downloaded if the folder is not there yet."""
    cifar = CIFAR[name]
    folder = os.path.join(root, cifar.base_folder)
    files = [*cifar.train_list, *cifar.test_list, (cifar.meta["filename"], cifar.meta["md5"])]
    if os.path.lexists(folder):
        damaged = [file for file, md5 in files if not check_integrity(os.path.join(folder, file), md5)]
        if damaged:
            raise ValueError(
                f"{folder}: missing or damaged: {', '.join(damaged)}; "
                "remove the folder to have it downloaded again, or name one with a good copy"
            )
    new_root = not os.path.lexists(root)
    try:
        train = cifar(root, train=True, download=not os.path.lexists(folder))
    except (OSError, RuntimeError) as error:
        if new_root and os.path.isdir(root) and not os.listdir(root):
            os.rmdir(root)
        raise OSError(
            f"no {cifar.base_folder} in {root!r}, and the download failed ({error}); "
            "point --data_root (main_lincls.py: DIR) at the folder that has it, or try --dataset shapes"
        ) from error
    return train, cifar(root, train=False)


def take(images, labels, size, split):
    """The first `size` (None: all) of a split in file order, as tensors on the host."""
    if size is not None and size > len(images):
        raise ValueError(f"--{split}_size {size}: the {split} split has {len(images)} pictures")
    images = torch.from_numpy(images[:size]).permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(labels[:size], dtype=torch.int64)


def fits(count, device):
    """Whether a device has room for so many bytes of pictures beside the training itself."""
    return device.type != "cuda" or count <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]


def load_dataset(name, root, device, train_size=None, test_size=None):
    """Load 'cifar10', 'cifar100' or 'shapes' onto the device; pictures that do not fit there stay on the host,
    and `batches` feeds them.

    root: the folder that has, or gets, `cifar-10-batches-py` or `cifar-100-python`; unused for shapes.
    train_size, test_size: the first so many pictures in file order; for shapes, how many are drawn.
    Returns a Dataset. Raises ValueError for an unknown name, damaged files (MD5) and sizes beyond the
    data set's, OSError where the data cannot be downloaded.
    """
    if name == "shapes":
        train_size, test_size = train_size or SHAPES_TRAIN, test_size or SHAPES_TEST
        require_memory(
            (train_size + test_size) * 3 * shapes.SIZE**2, torch.device("cpu"), f"--train_size {train_size} --test_size {test_size}"
        )
        splits = (
            shapes.draw_shapes(train_size, SHAPES_TRAIN_SEED), shapes.draw_shapes(test_size, SHAPES_TEST_SEED),
        )
        classes = list(shapes.CLASSES)
    elif name in CIFAR:
        cifar = open_cifar(name, root)
        splits = [(split.data, split.targets) for split in cifar]
        classes = cifar[0].classes
    else:
        raise ValueError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    train_images, train_labels = take(*splits[0], train_size, "train")
    test_images, test_labels = take(*splits[1], test_size, "test")
    home = device if fits(train_images.nbytes + test_images.nbytes, device) else torch.device("cpu")
    return Dataset(
        train_images.to(home), train_labels.to(device), test_images.to(home), test_labels.to(device), classes
    )


def load_folder(folder, size):
    """The pictures of a folder, made `size` pixels square (the shorter side resized, the center cropped).

    Returns images uint8 [N, 3, size, size], labels int64 [N], the classes' names and the files' paths. Classes are the
    subfolders, as in torchvision's ImageFolder; pictures without subfolders have the label -1; names that begin with a
    dot do not count. Raises OSError for
    a folder without pictures and for a picture that cannot be read.
    """
    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    entries = sorted((entry for entry in os.scandir(folder) if not entry.name.startswith(".")), key=lambda entry: entry.name)
    files = [entry.path for entry in entries if entry.name.lower().endswith(IMG_EXTENSIONS) and entry.is_file()]
    labels, classes = [-1] * len(files), [entry.name for entry in entries if entry.is_dir()]
    if classes:
        if files:
            warn(f"{folder}: {len(files)} pictures beside the classes' folders are left out")
        samples = make_dataset(folder, {name: label for label, name in enumerate(classes)}, IMG_EXTENSIONS)
        files, labels = zip(*samples)
    if not files:
        raise OSError(f"{folder!r}: no pictures in it ({', '.join(IMG_EXTENSIONS)})")
    images = torch.empty(len(files), 3, size, size, dtype=torch.uint8)
    for i, file in enumerate(tqdm(files, "pictures", leave=False, delay=2, disable=None)):
        try:
            picture = pil_loader(file)
        except Exception as error:  # of any kind: Pillow parses whatever bytes there are
            raise OSError(f"{file}: not a picture that can be read") from error
        images[i] = pictures.pil_to_tensor(pictures.center_crop(pictures.resize(picture, [size]), [size, size]))
    return images, torch.tensor(labels), classes, list(files)


def balanced_subset(labels, fraction, seed):
    """Which pictures are a fraction (more than 0, at most 1) of each class, drawn by the seed: int64 indices, in order.

    The same on every device. A class has at least one picture, if it has any.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for rows in (torch.nonzero(labels.cpu() == label)[:, 0] for label in labels.unique().tolist()):
        count = max(1, round(fraction * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def batches(images, order, batch_size, device):
    """Yield images[order] on the device, batch_size at a time: uint8 [<= batch_size, 3, H, W].

    order: int64 [M], on the device. Pictures on the host go there in slices of SLICE batches through pinned memory:
    the host gathers and sends one while the device is still busy with the steps before.
    """
    if images.device == device:
        for chosen in order.split(batch_size):
            yield images.index_select(0, chosen)
    else:
        for chosen in order.cpu().split(SLICE * batch_size):
            slice_images = torch.empty(len(chosen), *images.shape[1:], dtype=images.dtype, pin_memory=device.type == "cuda")
            torch.index_select(images, 0, chosen, out=slice_images)
            yield from slice_images.to(device, non_blocking=True).split(batch_size)
