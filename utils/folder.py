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
HINT = "--skip_broken trains without such files"


def list_images(folder):
    """The images of a folder as [(path, label)], by file name, then by path, and class names. Classes
    are its subfolders, as in ImageFolder; without any, labels are -1. Hidden files are ignored; other
    types are counted in a warning. Raises OSError for a folder, or a class, without images."""
    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    classes, found, skipped, errors = [], [], collections.Counter(), []
    for place, folders, names in os.walk(folder, onerror=errors.append, followlinks=True):
        here = Path(place).resolve()  # a link to it, or above it, would be followed for ever
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"
                      and not here.is_relative_to(Path(place, name).resolve())]
        top = os.path.relpath(place, folder).split(os.sep)[0]  # "." in the folder itself
        if top == ".":
            classes = sorted(folders)
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMG_EXTENSIONS):
                skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
            elif classes and top == ".":
                skipped["images outside the class folders"] += 1
            else:
                label = classes.index(top) if classes else -1
                found.append((name, os.path.join(place, name), label))
    if errors:
        raise errors[0]
    labels = {label for _, _, label in found}
    empty = [os.path.join(folder, name) for i, name in enumerate(classes) if i not in labels]
    if empty or not found:
        raise OSError(f"{(empty or [folder])[0]!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(skipped.items()))
        warn(f"{folder}: {skipped.total()} files skipped: {kinds}")
    return [(path, label) for _, path, label in sorted(found)], classes


def choose_splits(root, test_share):
    """Training and test images as [(path, label)], and class names: root/train with root/test, or
    root/val; without these `split_by_hash` splits root/train, or root. With fewer than two classes there
    are no test images. Raises what `list_images` does, ValueError for folders that do not fit."""
    train, *tests = [os.path.join(root, name) for name in ("train", "test", "val")]
    folder = train if os.path.isdir(train) else root
    tests = [path for path in tests if os.path.isdir(path) and folder == train]
    images, classes = list_images(folder)
    named = [name for name in classes if name.lower() in SPLITS]
    if len(named) > 1:
        raise ValueError(f"{folder} has {', '.join(named)}: splits are called train and test (or val)")
    if len(classes) < 2:
        return images, [], classes
    if not tests:
        return *split_by_hash(images, folder, test_share), classes
    test_images, test_classes = list_images(tests[0])
    if not test_classes:
        raise ValueError(f"{tests[0]}: no class folders")
    unknown = [name for name in test_classes if name not in classes]
    if unknown:
        raise ValueError(f"{tests[0]}: {', '.join(unknown)}: not a class of {folder}")
    return images, [(path, classes.index(test_classes[i])) for path, i in test_images], classes


def split_by_hash(images, folder, share):
    """Split [(path, label)] into training and test images: about a share of each class, at least
    one image. A hash of its path decides, so the split is stable when images are added."""
    hashes = [hashlib.sha256(os.fsencode(os.path.relpath(path, folder))) for path, _ in images]
    values = [int(digest.hexdigest(), 16) / 2**256 for digest in hashes]  # uniform in [0, 1)
    least = {}  # of each class
    for (_, label), value in zip(images, values):
        least[label] = min(value, least.get(label, 1))
    test = {image for image, value in zip(images, values) if value < share or value == least[image[1]]}
    return [image for image in images if image not in test], [image for image in images if image in test]


def load_splits(root, size, test_share, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)] and class names:
    arrays uint8 [N, 3, size, size] and int64 [N]. Raises what `choose_splits` and `cached_images`
    do, and ValueError for test images of a class without training images."""
    if os.path.realpath(cache_dir).startswith(os.path.join(os.path.realpath(root), "")):
        raise ValueError(f"--cache_dir {cache_dir} lies among the images of {root}; choose another")
    train, test, classes = choose_splits(root, test_share)
    files, labels = zip(*train, *test)
    images, broken = cached_images(root, files, size, cache_dir, skip_broken)
    labels = numpy.array([label for i, label in enumerate(labels) if i not in broken])
    count = sum(i not in broken for i in range(len(train)))
    lost = [classes[label] for label in sorted(set(labels[count:]) - set(labels[:count]))]
    if lost:
        raise ValueError(f"{root}: {', '.join(lost)}: test images, but no training images")
    return [(images[:count], labels[:count]), (images[count:], labels[count:])], classes


def load_folder(folder, size):
    """All images of a folder: uint8 [N, 3, size, size], labels int64 [N], class names and paths, in
    the order of `list_images`. Raises OSError as that does, and for an image that cannot be read."""
    images, classes = list_images(folder)
    files, labels = zip(*images)
    parts = []
    for part, failures in bar(decode(files, size), desc="images", leave=False, delay=2):
        if failures:
            raise OSError(list(failures.values())[0])
        parts.append(part)
    return torch.cat(parts), torch.tensor(labels), classes, files


def cached_images(root, files, size, cache_dir, skip_broken):
    """The images of files as an array uint8 [N, 3, size, size], mapped from a .npy file in cache_dir,
    and {index: why} of the files that cannot be read, which it lacks. It is made again if files,
    their sizes or times have changed. Raises ValueError for such a file unless skip_broken."""
    root = os.path.abspath(root)
    source = {"image_size": size, "files": [stamp(os.path.abspath(file)) for file in files]}
    digest = hashlib.sha256(os.fsencode(root)).hexdigest()[:8]
    path = os.path.join(cache_dir, f"{os.path.basename(root)}-{size}px-{digest}")
    found = read_cache(path, source)
    if found is None:
        os.makedirs(cache_dir, exist_ok=True)
        with checkpoint.lock(f"{path}.lock", wait=True):
            found = read_cache(path, source)  # another process may have made it meanwhile
            if found is None:
                make_cache(path, source, skip_broken)
                found = read_cache(path, source)
    images, broken = found
    if broken and not skip_broken:
        raise ValueError(f"{list(broken.values())[0]}; {HINT}")
    if broken:
        some = "; ".join(list(broken.values())[:3])
        warn(f"{len(broken)} of {len(files)} images cannot be read and are skipped: {some}")
    return images, broken


def stamp(file):
    """[path, bytes, time of change], by which a changed file is recognized."""
    if not os.path.exists(file):  # a broken link, say; reading it fails
        return [file, None, None]
    return [file, os.stat(file).st_size, os.stat(file).st_mtime_ns]


def read_cache(path, source):
    """The images and {index: why} in a cache; None unless it is whole, of this source, and the
    files that it lacks still cannot be read."""
    with contextlib.suppress(Exception):  # of any type: the files may hold anything
        about = checkpoint.read_json(f"{path}.json", "source", "broken")
        images = numpy.load(f"{path}.npy", mmap_mode="c")
        broken, size = dict(about["broken"]), source["image_size"]
        shape = (len(source["files"]) - len(broken), 3, size, size)
        if about["source"] == source and images.shape == shape and images.dtype == numpy.uint8:
            _, failures = read_images([(i, source["files"][i][0]) for i in broken], size)
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows
                images._mmap.madvise(mmap.MADV_RANDOM)
            return (images, broken) if len(failures) == len(broken) else None
    return None


def make_cache(path, source, skip_broken):
    """Write path.npy and, when it is whole, path.json; ValueError also if no file can be read."""
    files, size = [file for file, _, _ in source["files"]], source["image_size"]
    info(f"{path}.npy: made once from {len(files):,} images, {len(files) * 3 * size**2 / 1e9:.3f} GB")
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{path}.json")  # of other images
    broken = {}
    with checkpoint.writing(f"{path}.npy") as file:
        file.seek(128)  # the header is written last, when the number of images is known
        for images, failures in bar(decode(files, size), desc="images", unit="batch"):
            broken |= failures
            if broken and not skip_broken:
                raise ValueError(f"{list(broken.values())[0]}; {HINT}")
            file.write(images.numpy())
        if len(broken) == len(files):
            raise ValueError(f"{len(files)} images, and none of them can be read; the first: {broken[0]}")
        file.seek(0)
        shape = (len(files) - len(broken), 3, size, size)
        numpy.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))
    checkpoint.write_json(f"{path}.json", {"source": source, "broken": list(broken.items())})


def decode(files, size):
    """The results of `read_images` of batches of files, in order, by a process per thread of torch."""
    batch = max(1, BATCH_BYTES // (3 * size**2))
    workers = torch.get_num_threads() if len(files) > batch else 0
    return torch.utils.data.DataLoader(list(enumerate(files)), batch, num_workers=workers,
                                       collate_fn=functools.partial(read_images, size=size))


def read_images(files, size):
    """Images of [(index, path)]: uint8 [N, 3, size, size], resized (short side, antialiased) and
    center-cropped, and {index: why} of the files that cannot be read, which the images lack."""
    images, failures = [], {}
    for index, file in files:
        try:
            image = read_image(file)
            if image.size != (size, size):
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
