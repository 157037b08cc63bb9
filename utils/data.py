"""Data sets as uint8 tensors: torchvision's, the built-in shapes, and folders of images."""
import collections
import contextlib
import glob
import hashlib
import os
from typing import NamedTuple

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.datasets import CIFAR10, CIFAR100, STL10, SVHN
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from utils import checkpoint, shapes
from utils.cli import bar, info, warn

TORCHVISION = {"cifar10": CIFAR10, "cifar100": CIFAR100, "stl10": STL10, "svhn": SVHN}
DATASETS = (*TORCHVISION, "folder", "shapes")
SIZES = {"stl10": 96}  # of the images, in pixels, where it is not 32
SHAPES_TRAIN, SHAPES_TEST = 10_000, 2_000  # default sizes
SHAPES_TRAIN_SEED, SHAPES_TEST_SEED = 0, 1
BATCH_BYTES = 2**20  # of decoded images, from one process to another: containers have little shared memory


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

    def labeled(self):
        """Training images that have labels, and these: the bank of kNN, and what a classifier is trained on."""
        count = int((self.train_labels >= 0).sum())
        return self.train_images[:count], self.train_labels[:count]


def load_dataset(name, root, device, train_size=None, test_size=None, image_size=None, test_share=0.1,
                 cache_dir="cache", skip_broken=False, unlabeled=True):
    """Load one of DATASETS as a Dataset. root: folder that has or gets the files; for 'folder' see `load_splits`, which
    takes the last options. train_size, test_size: the first N images in file order; for shapes, the number drawn.
    image_size: images are resized to it (default: the data set's own). unlabeled: with STL-10's images without labels.
    Raises ValueError for an unknown name and sizes beyond the data set's, OSError if files cannot be had."""
    image_size = image_size or SIZES.get(name, 32)
    if name == "shapes":
        splits = [shapes.draw_shapes(train_size or SHAPES_TRAIN, SHAPES_TRAIN_SEED),
                  shapes.draw_shapes(test_size or SHAPES_TEST, SHAPES_TEST_SEED)]
        classes = list(shapes.CLASSES)
    elif name == "folder":
        splits, classes = load_splits(root, image_size, test_share, cache_dir, skip_broken)
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
    train, train_labels, test, test_labels = tensors
    fits = device.type != "cuda" or train.nbytes + test.nbytes <= torch.cuda.mem_get_info(device)[0] / 2
    home = device if fits else torch.device("cpu")
    return Dataset(train.to(home), train_labels.to(device), test.to(home), test_labels.to(device), classes)


def resize(images, size):
    """Square images uint8 [N, 3, H, H] as contiguous [N, 3, size, size]: bilinear, antialiased."""
    if images.shape[2] == size:
        return images.contiguous()
    return torch.cat([functional.resize(part, [size, size], antialias=True) for part in images.split(1000)])


def open_torchvision(name, root, unlabeled=True):
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
    root/train and root/test (or val), else of root, where test_share of each class becomes the test split. Images are
    read once, into cache_dir. Without classes, or with only one, there are no test images. Raises OSError and
    ValueError, as `list_images` and `cached_images` do, and for test images of classes without training images."""
    folder = os.path.join(root, "train") if os.path.isdir(os.path.join(root, "train")) else root
    tests = [path for path in (os.path.join(root, "test"), os.path.join(root, "val")) if os.path.isdir(path)]
    files, labels, classes = list_images(folder)
    test_files, test_labels = [], []
    if len(classes) > 1 and folder != root and tests:
        test_files, test_labels, test_classes = list_images(tests[0])
        unknown = [name for name in test_classes if name not in classes]
        if unknown or not test_classes:
            raise ValueError(f"{tests[0]}: {', '.join(unknown) or 'no class folders'}: not a class of {folder}")
        test_labels = [classes.index(test_classes[label]) for label in test_labels]
    elif len(classes) > 1:
        held_out = set(balanced_subset(torch.tensor(labels), test_share, 0).tolist())
        test_files, test_labels = ([of_all[i] for i in sorted(held_out)] for of_all in (files, labels))
        files, labels = ([each for i, each in enumerate(of_all) if i not in held_out] for of_all in (files, labels))
        lost = [classes[label] for label in sorted(set(test_labels) - set(labels))]
        if lost:
            raise ValueError(f"{folder}: too few images of {lost[0]!r} to hold out --test_share {test_share:g}")
    images, broken = cached_images(root, files + test_files, size, cache_dir, skip_broken)
    whole = [i not in broken for i in range(len(files) + len(test_files))]
    count = sum(whole[:len(files)])
    labels = numpy.array(labels + test_labels, dtype=numpy.int64)[whole]
    return [(images[:count], labels[:count]), (images[count:], labels[count:])], classes


def list_images(folder):
    """Paths, labels and class names of the images of a folder, by file name and then by path, in the order of code
    points. Classes are the subfolders, as in ImageFolder; without any, every label is -1. Hidden files and folders, of
    macOS too, are ignored; files of other types are counted in a warning. Raises OSError for a folder, or a class,
    without images."""
    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    classes, found, skipped = [], [], collections.Counter()
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        classes = sorted(folders) if place == folder else classes
        parents = os.path.relpath(place, folder).split(os.sep)
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMG_EXTENSIONS):
                skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
            elif classes and place == folder:
                skipped["images outside the class folders"] += 1
            else:
                found.append((name, os.path.join(place, name), classes.index(parents[0]) if classes else -1))
    found.sort()
    files, labels = [file for _, file, _ in found], [label for *_, label in found]
    empty = [os.path.join(folder, classes[label]) for label in sorted(set(range(len(classes))) - set(labels))]
    if empty or not files:
        raise OSError(f"{(empty or [folder])[0]!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warn(f"{folder}: {skipped.total()} files skipped: {kinds}")
    return files, labels, classes


def cached_images(root, files, size, cache_dir, skip_broken):
    """The images of files as an array uint8 [N, 3, size, size], mapped from a .npy file in cache_dir, and {index: why}
    of the files that cannot be read, which it lacks. It is made again if files, their sizes or their times have
    changed; the .json beside it has these. Raises ValueError for a file that cannot be read unless skip_broken."""
    def of_file(file):
        try:
            return [file, (about := os.stat(file)).st_size, about.st_mtime_ns]
        except OSError:  # when it is read, this is said
            return [file, None, None]

    root = os.path.abspath(root)
    source = {"image_size": size, "files": [of_file(file) for file in map(os.path.abspath, files)]}
    name = f"{os.path.basename(root)}-{size}px-{hashlib.sha256(os.fsencode(root)).hexdigest()[:8]}"
    path = os.path.join(cache_dir, name)
    os.makedirs(cache_dir, exist_ok=True)
    with checkpoint.lock(f"{path}.lock", wait=True):
        try:
            about = checkpoint.read_json(f"{path}.json", "source", "broken")
            images = numpy.load(f"{path}.npy", mmap_mode="c") if about["source"] == source else None
        except (OSError, ValueError):
            images = None
        if images is None:
            about = make_cache(path, source, skip_broken)
            images = numpy.load(f"{path}.npy", mmap_mode="c")
    broken = dict(about["broken"])
    if broken and not skip_broken:
        raise ValueError(f"{next(iter(broken.values()))}; --skip_broken trains without such files")
    if broken:
        named = "; ".join([*broken.values()][:3])
        warn(f"{len(broken)} of {len(files)} images cannot be read and are skipped: {named}")
    return images, broken


def make_cache(path, source, skip_broken):
    """Write path.npy and, when it is whole, path.json; returns the content of the latter."""
    files, size, broken, done = [file for file, *_ in source["files"]], source["image_size"], [], 0
    info(f"{path}.npy: made once from {len(files):,} images, {len(files) * 3 * size**2 / 1e9:.3f} GB")
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{path}.json")  # of other images
    with checkpoint.writing(f"{path}.npy") as file, bar(total=len(files), desc="images", unit=" images") as progress:
        def write_header(count):  # always 128 bytes long
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, 3, size, size)}
            numpy.lib.format.write_array_header_1_0(file, header)
        write_header(len(files))
        for images, failures in decode(files, size):
            broken += [(done + i, failure) for i, failure in failures.items()]
            if broken and not skip_broken:
                raise ValueError(f"{broken[0][1]}; --skip_broken trains without such files")
            file.write(images.numpy())
            done += len(images) + len(failures)
            progress.update(done - progress.n)
        if len(broken) == len(files):
            raise ValueError(f"{len(files)} images, and none of them can be read; the first: {broken[0][1]}")
        file.seek(0)
        write_header(len(files) - len(broken))
    about = {"source": source, "broken": broken}
    checkpoint.write_json(f"{path}.json", about)
    return about


def decode(files, size):
    """Yield batches of the images of files, in order, read by one process per thread of torch: uint8
    [B, 3, size, size], resized (short side, antialiased) and center-cropped, and {index in the batch: why not} of files
    that cannot be read, which the images lack."""
    batch = max(1, BATCH_BYTES // (3 * size**2))
    workers = torch.get_num_threads() if len(files) > batch else 0
    return torch.utils.data.DataLoader(ImageFiles(files, size), batch, num_workers=workers, collate_fn=collate)


class ImageFiles(torch.utils.data.Dataset):
    """The images of files as uint8 arrays [size, size, 3], or, of what cannot be read, the reason."""

    def __init__(self, files, size):
        self.files, self.size = files, size

    def __len__(self):
        return len(self.files)

    def __getitem__(self, index):
        try:
            image = read_image(self.files[index])
            if image.size != (self.size, self.size):
                image = functional.center_crop(functional.resize(image, [self.size]), [self.size, self.size])
            return numpy.asarray(image)
        except (OSError, ValueError) as error:
            return str(error)


def collate(batch):
    images = [image for image in batch if not isinstance(image, str)]
    failures = {i: image for i, image in enumerate(batch) if isinstance(image, str)}
    stacked = numpy.stack(images or [numpy.empty((0, 0, 3), dtype=numpy.uint8)])
    return torch.from_numpy(stacked.transpose(0, 3, 1, 2).copy()), failures


def load_folder(folder, size):
    """All images of a folder: uint8 [N, 3, size, size], labels int64 [N], class names and file paths, in the order of
    `list_images`. Raises what that raises, and OSError, naming it, for an image that cannot be read."""
    files, labels, classes = list_images(folder)
    parts = []
    for images, failures in bar(decode(files, size), desc="images", leave=False, delay=2):
        if failures:
            raise OSError(next(iter(failures.values())))
        parts.append(images)
    return torch.cat(parts), torch.tensor(labels), classes, files


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
