"""Image files as arrays, read by several processes, and the cache of a folder."""
import contextlib
import functools
import hashlib
import json
import math
import os
import warnings

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional

from utils import checkpoint, device, folder
from utils.cli import bar, info, warn

BATCH_BYTES = 2**20  # of images from one process to another
HEADER = 128         # bytes of a cache before its images


def load_splits(root, size, test_share, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)], as of `load_cached`, and class
    names; unlabeled images come last. Raises what `choose_splits` and `load_cached` do."""
    train, extra, test, classes = folder.choose_splits(root, test_share)
    images, broken = load_cached(root, train + extra + test, size, cache_dir, skip_broken)
    labels = [number for i, (_, number) in enumerate(train + extra + test) if i not in broken]
    count = sum(i not in broken for i in range(len(train + extra)))
    if count == 0:
        raise ValueError(f"{root}: none of the training images can be read")
    for number in sorted({*labels[count:]} - {*labels[:count]})[:3]:
        warn(f"{root}: {classes[number]} has test images, but no training images that can be read")
    labels = torch.tensor(labels)
    return [(images[:count], labels[:count]), (images[count:], labels[count:])], classes


def load_cached(root, files, size, cache_dir, skip_broken):
    """The images of [(path, label)], below root, uint8 [N, 3, size, size], and {index: why} of those that cannot be
    read. They are mapped from an .npy file in cache_dir, which is made again if files, their sizes or
    times change. Raises OSError, and ValueError for a file that cannot be read without skip_broken."""
    source = {"image_size": size, "files": []}
    for file, _ in files:
        stat = os.stat(file, follow_symlinks=os.path.exists(file))  # also of a broken link
        source["files"].append([os.path.abspath(file), stat.st_size, stat.st_mtime_ns])
    place = os.path.abspath(root)
    digest = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
    path = os.path.join(cache_dir, f"{os.path.basename(place)}-{size}px-{digest}.npy")
    found = read_cache(path, source, skip_broken)
    if found is None:
        os.makedirs(cache_dir, exist_ok=True)
        with checkpoint.lock(f"{path}.lock", wait=True):  # another process may make it meanwhile
            found = read_cache(path, source, skip_broken)
            for _ in range(3):  # or, where nothing can be locked, replace what is made here
                if found is None:
                    make_cache(path, source, skip_broken)
                    found = read_cache(path, source, skip_broken, new=True)
    if found is None:
        raise OSError(f"{path} changes while it is read; choose another --cache_dir")
    images, broken = found
    say_broken(broken, len(files))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is mapped to be read, and nothing writes images
        return torch.from_numpy(images), broken


def read_cache(path, source, skip_broken, new=False):
    """The images and {index: why} in a cache, images as .npy with JSON after them. None unless it is whole,
    of this source, and lacks no files or, with skip_broken, those that, if it is not new, still cannot be read."""
    if not os.path.exists(path):
        return None
    with open(path, "rb") as file:
        try:
            numpy.lib.format.read_magic(file)
            shape, _, dtype = numpy.lib.format.read_array_header_1_0(file)
            file.seek(HEADER + math.prod(shape))
            about = json.load(file)
            broken, size = dict(about["broken"]), source["image_size"]
            expected = (len(source["files"]) - len(broken), 3, size, size)
            if (about["source"], shape, dtype) != (source, expected, numpy.uint8) or broken and not skip_broken:
                return None
            _, failures = read_images([(i, source["files"][i][0]) for i in broken], size)
        except Exception:  # of any type: the file may hold anything
            return None
        if len(failures) < len(broken) and not new:
            return None
        try:
            return numpy.memmap(file, dtype, "r", HEADER, shape), broken
        except OSError:  # some file systems, and limits of memory, do not allow that
            file.seek(HEADER)
            return numpy.fromfile(file, dtype, math.prod(shape)).reshape(shape), broken


def make_cache(path, source, skip_broken):
    """Write a cache, as `read_cache` reads it. Raises ValueError for a file that cannot be read."""
    files, size, broken = [file for file, _, _ in source["files"]], source["image_size"], {}
    info(f"{path}: made once from {len(files):,} images, {len(files) * 3 * size**2 / 1e9:.3f} GB")
    with checkpoint.writing(path) as file:
        file.seek(HEADER)  # the header is written last, when the number of images is known
        for images in read_batches(files, size, skip_broken, broken):
            file.write(images)
        file.write(json.dumps({"source": source, "broken": list(broken.items())}).encode())
        file.seek(0)
        shape = (len(files) - len(broken), 3, size, size)
        numpy.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))


def load_images(root, size, skip_broken):
    """The images of a folder, or one file, that can be read, without a cache: uint8 [N, 3, size, size], their
    paths and labels, and class names, as of `list_images`. Raises what it does, and ValueError as `read_batches`."""
    found, classes = folder.list_images(root)
    broken = {}
    parts = list(read_batches([file for file, _ in found], size, skip_broken, broken))
    say_broken(broken, len(found))
    files, labels = zip(*[each for i, each in enumerate(found) if i not in broken])
    return torch.from_numpy(numpy.concatenate(parts)), files, torch.tensor(labels), classes


def say_broken(broken, count):
    """Warn of the files that cannot be read, of `count`."""
    if broken:
        warn(f"{len(broken)} of {count} images cannot be read and are skipped: "
             + "; ".join(list(broken.values())[:3]))


def read_batches(files, size, skip_broken, broken):
    """Yield batches of images uint8 [N, 3, size, size]; add {index: why} of those that cannot be read to
    `broken`. Raises ValueError for such a file without skip_broken, or if there are no others."""
    for images, failures in bar(decode(files, size), desc="images", unit="batch", delay=2):
        broken |= failures
        if broken and not skip_broken:
            raise ValueError(f"{list(broken.values())[0]}; --skip_broken skips such files")
        yield images
    if len(broken) == len(files):
        raise ValueError(f"none of {len(files)} images can be read; the first: {broken[0]}")


def decode(files, size):
    """The results of `read_images` of batches of files, in order, from a process on each core. Arrays go
    through pipes: tensors would take shared memory, of which a container may have 64 MB."""
    batch = max(1, BATCH_BYTES // (3 * size**2))
    workers = device.cores() if len(files) > batch else 0
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
    return numpy.ascontiguousarray(images.transpose(0, 3, 1, 2)), failures


def read_image(file):
    """What `decode_image` returns or, at a second try, raises: a network fails for a moment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large images and damaged tags
        try:
            return decode_image(file)
        except OSError:
            return decode_image(file)


def decode_image(file):
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
