"""Folders of images as data sets: which files there are, which are test images, and their cache."""
import collections
import contextlib
import functools
import hashlib
import mmap
import os
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from utils import checkpoint
from utils.cli import bar, info, warn

SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}  # not class names
BATCH_BYTES = 2**20  # of images from one process to another: containers have little shared memory


def list_images(folder):
    """The images of a folder as [(path, label)], by file name, then by path, and class names: its
    subfolders, as in ImageFolder; without any, labels are -1. Hidden files are ignored, others
    counted in a warning. Raises OSError for a folder, or a class, without images."""
    classes, found, skipped, errors = [], [], collections.Counter(), []
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        here = Path(place).resolve()  # a link to it, or above it, would be followed for ever
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"
                      and not here.is_relative_to(Path(place, name).resolve())]
        top = os.path.relpath(place, folder).split(os.sep)[0]  # "." in the folder itself
        if top == ".":
            classes = sorted(folders)
        for name in names:
            kind = os.path.splitext(name)[1].lower()
            if kind in IMG_EXTENSIONS and not name.startswith(".") and not (classes and top == "."):
                found.append((name, os.path.join(place, name), top))
            elif not name.startswith("."):
                skipped[kind or "without extension"] += 1
    if errors:
        raise errors[0]
    empty = sorted({*classes} - {top for *_, top in found})
    if empty or not found:
        place = os.path.join(folder, *empty[:1])
        raise OSError(f"{place!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warn(f"{folder}: {skipped.total()} files are no images, or in no class folder: {kinds}")
    return [(path, classes.index(top) if classes else -1) for _, path, top in sorted(found)], classes


def choose_splits(root, test_share):
    """Training and test images as [(path, label)], and class names: root/train with root/test or
    root/val; else `split_by_hash` splits root/train, or root. With fewer than two classes there are
    no test images. Raises what `list_images` does, ValueError for folders that do not fit."""
    train, *tests = [os.path.join(root, name) for name in ("train", "test", "val")]
    folder = train if os.path.isdir(train) else root
    tests = [path for path in tests if os.path.isdir(path) and folder == train]
    images, classes = list_images(folder)
    named = [name for name in classes if name.lower() in SPLITS]
    if len(named) > 1:
        raise ValueError(f"{folder} has {', '.join(named)}: splits are called train and test")
    if len(classes) < 2:
        return images, [], classes
    if not tests:
        return *split_by_hash(images, folder, test_share), classes
    test_images, test_classes = list_images(tests[0])
    unknown = sorted({*test_classes} - {*classes})
    if unknown or not test_classes:
        unknown = ", ".join(unknown) or "no class folders"
        raise ValueError(f"{tests[0]}: {unknown}; its classes must be those of {folder}")
    return images, [(path, classes.index(test_classes[i])) for path, i in test_images], classes


def split_by_hash(images, folder, share):
    """Split [(path, label)] into training and test images: about a share of each class, at least
    one image. A hash of its path decides, so the split is stable when images are added."""
    hashes, least = {}, {}  # uniform in [0, 1), and the least of each class
    for path, label in images:
        digest = hashlib.sha256(os.fsencode(os.path.relpath(path, folder))).hexdigest()
        hashes[path] = int(digest, 16) / 2**256
        least[label] = min(hashes[path], least.get(label, 1))
    splits = [], []
    for path, label in images:
        splits[hashes[path] < share or hashes[path] == least[label]].append((path, label))
    return splits


def load_splits(root, size, test_share, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)] and class names: arrays
    uint8 [N, 3, size, size], mapped from an .npy file in cache_dir, which is made again if files, their
    sizes or times change, and int64 [N]. Raises what `choose_splits` and `make_cache` do."""
    if os.path.realpath(cache_dir).startswith(os.path.join(os.path.realpath(root), "")):
        raise ValueError(f"--cache_dir {cache_dir} lies among the images of {root}; choose another")
    train, test, classes = choose_splits(root, test_share)
    source = {"image_size": size, "files": []}
    for file, _ in train + test:
        stat = os.stat(file, follow_symlinks=os.path.exists(file))  # also of a broken link
        source["files"].append([os.path.abspath(file), stat.st_size, stat.st_mtime_ns])
    place = os.path.abspath(root)
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    path = os.path.join(cache_dir, f"{os.path.basename(place)}-{size}px-{digest}")
    found = read_cache(path, source, skip_broken)
    if found is None:
        os.makedirs(cache_dir, exist_ok=True)
        with checkpoint.lock(f"{path}.lock", wait=True):  # another process may make it meanwhile
            found = read_cache(path, source, skip_broken) or make_cache(path, source, skip_broken)
    images, broken = found
    if broken:
        warn(f"{len(broken)} of {len(source['files'])} images cannot be read and are skipped: "
             + "; ".join(list(broken.values())[:3]))
    labels = numpy.array([label for i, (_, label) in enumerate(train + test) if i not in broken])
    count = sum(i not in broken for i in range(len(train)))
    lost = [classes[label] for label in sorted(set(labels[count:]) - set(labels[:count]))]
    if lost:
        raise ValueError(f"{root}: {', '.join(lost)}: test images, but no training images")
    return [(images[:count], labels[:count]), (images[count:], labels[count:])], classes


def load_folder(folder, size):
    """All images of a folder: uint8 [N, 3, size, size], labels int64 [N], class names and paths, as
    `list_images` orders them. Raises OSError, also for an image that cannot be read."""
    images, classes = list_images(folder)
    files, labels = zip(*images)
    parts = []
    for part, failures in bar(decode(files, size), desc="images", leave=False, delay=2):
        if failures:
            raise OSError(list(failures.values())[0])
        parts.append(part)
    return torch.cat(parts), torch.tensor(labels), classes, files


def read_cache(path, source, skip_broken):
    """The images and {index: why} in a cache; None unless it is whole, of this source, and lacks no
    files or, with skip_broken, those that still cannot be read."""
    with contextlib.suppress(Exception):  # of any type: the files may hold anything
        about = checkpoint.read_json(f"{path}.json", "source", "broken")
        images = numpy.load(f"{path}.npy", mmap_mode="c")
        broken, size = dict(about["broken"]), source["image_size"]
        shape = (len(source["files"]) - len(broken), 3, size, size)
        if about["source"] == source and images.shape == shape and images.dtype == numpy.uint8:
            _, failures = read_images([(i, source["files"][i][0]) for i in broken], size)
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows
                images._mmap.madvise(mmap.MADV_RANDOM)
            if len(failures) == len(broken) and (skip_broken or not broken):
                return images, broken


def make_cache(path, source, skip_broken):
    """Write path.npy, then path.json; as `read_cache`. ValueError for a file that cannot be read."""
    files, size = [file for file, _, _ in source["files"]], source["image_size"]
    info(f"{path}.npy: made once from {len(files):,} images, {len(files) * 3 * size**2 / 1e9:.3f} GB")
    broken = {}
    with checkpoint.writing(f"{path}.npy") as file:
        file.seek(128)  # the header is written last, when the number of images is known
        for images, failures in bar(decode(files, size), desc="images", unit="batch"):
            broken |= failures
            if broken and not skip_broken:
                raise ValueError(f"{list(broken.values())[0]}; --skip_broken skips such files")
            file.write(images.numpy())
        if len(broken) == len(files):
            raise ValueError(f"none of {len(files)} images can be read; the first: {broken[0]}")
        file.seek(0)
        shape = (len(files) - len(broken), 3, size, size)
        numpy.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.json")  # of other images
    checkpoint.write_json(f"{path}.json", {"source": source, "broken": list(broken.items())})
    return read_cache(path, source, skip_broken)


def decode(files, size):
    """The results of `read_images` of batches of files, in order, from a process per thread."""
    batch = max(1, BATCH_BYTES // (3 * size**2))
    workers = torch.get_num_threads() if len(files) > batch else 0
    return torch.utils.data.DataLoader(list(enumerate(files)), batch, num_workers=workers,
                                       collate_fn=functools.partial(read_images, size=size))


def read_images(files, size):
    """Images of [(index, path)], uint8 [N, 3, size, size], and {index: why} of those it cannot read."""
    images, failures = [], {}
    for index, file in files:
        try:
            image = read_image(file)
            if image.size != (size, size):  # short side resized, antialiased; center crop
                image = functional.center_crop(functional.resize(image, [size]), [size, size])
            images.append(numpy.asarray(image))
        except (OSError, ValueError) as error:
            failures[index] = str(error)
    images = numpy.array(images, dtype=numpy.uint8).reshape(-1, size, size, 3)
    return torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), failures


def read_image(file):
    """An image file as RGB, by Pillow: turned as its orientation tag says, transparent parts on
    white, the first frame, 16-bit gray divided by 257. Raises OSError, also for 32-bit values."""
    try:
        if not os.path.isfile(file):
            raise FileNotFoundError("no such file")  # opening a named pipe would wait for a writer
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
            if image.mode in ("I", "F"):
                raise ValueError("the range of 32-bit values is not known; save it with 8 or 16 bits")
            return image.convert("RGB")
    except Exception as error:  # of any type: Pillow parses arbitrary bytes
        raise OSError(f"{file}: not an image that can be read ({error})") from error
