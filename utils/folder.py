"""Folders of images as data sets: what a layout means, reading the files, and their cache."""
import collections
import contextlib
import functools
import hashlib
import json
import math
import mmap
import os
import re
import warnings
from pathlib import Path

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from utils import checkpoint, device, log
from utils.cli import bar, info, warn

TRAIN, UNLABELED = ["train", "training"], ["unlabeled", "unlabelled"]
TEST = ["test", "val", "valid", "validation", "testing"]  # the first that has classes is used
LIKE_SPLIT = re.compile("(?<![a-z])(train|test|val|pred|label|unlabel)"
                        "(ing|id|idation|l?ed|set|data|images?|[ab])?(?![a-z])")
SYSTEM = {"__macosx", "@eadir", "#recycle", "@recycle", "lost+found", "$recycle.bin", "recycler",
          "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
OUTPUTS = {log.LOG, "features.json"}  # one is in every folder to which this program draws plots
BATCH_BYTES = 2**20  # of images from one process to another
HEADER = 128         # bytes of a cache before its images


def find_images(root):
    """Paths of the images below a folder, or of one file, and a Counter of what is passed over, in words.
    Raises OSError for a folder that cannot be read or has no images."""
    files, errors, passed, root = [], [], collections.Counter(), os.path.normpath(root)
    if os.path.isfile(root):
        return [root], passed
    for place, folders, names in os.walk(root, onerror=errors.append, followlinks=True):
        if OUTPUTS & {*names} and place != root:
            passed["outputs of this program"] += 1
            folders.clear()
            continue
        litter = {name for name in folders + names if name.startswith(".") or name.lower() in SYSTEM}
        passed.update("hidden" if name.startswith(".") else name for name in litter)
        real = Path(place).resolve()  # a link to it, or above it, would be followed for ever
        folders[:] = [name for name in folders
                      if name not in litter and not real.is_relative_to(Path(place, name).resolve())]
        kinds = {name: os.path.splitext(name)[1].lower() for name in names if name not in litter}
        images = [os.path.join(place, name) for name, kind in kinds.items() if kind in IMG_EXTENSIONS]
        passed.update(f"{kind or 'other'} files" for kind in kinds.values() if kind not in IMG_EXTENSIONS)
        passed["folders without images"] += not images and not folders
        files += images
    if errors:
        raise errors[0]
    if not files:
        raise OSError(f"{root!r}: no images ({', '.join(IMG_EXTENSIONS)})")
    return sorted(files, key=lambda file: (os.path.basename(file), file)), passed


def group(files):
    """The folder that has all the files, and these by the folder in it, '' for those in none: {name: paths}.
    Where it has but one folder, of folders alone, and files beside that: the same of that folder."""
    place = os.path.commonpath([os.path.dirname(file) for file in files])
    groups = collections.defaultdict(list)
    for file in files:
        name, inside, _ = file.removeprefix(os.path.join(place, "")).partition(os.sep)
        groups[name if inside else ""].append(file)
    for name in {*groups} - {""} if len(groups) == 2 and "" in groups else ():
        inner = group(groups[name])
        if "" not in inner[1]:
            return inner
    return place, groups


def label(groups, classes):
    """Images of the classes as [(path, label)] by file name, then by path; without classes all, with -1."""
    labels = {name: number for number, name in enumerate(classes)}
    images = [(path, labels.get(name, -1)) for name in groups for path in groups[name] if name or not classes]
    return sorted(images, key=lambda image: (os.path.basename(image[0]), image[0]))


def choose_test(place, groups, names, classes):
    """Of the folders called names the first that has class folders: its path and images; else None.
    Raises ValueError if these are of other classes."""
    for name in names:
        path, folders = group(groups[name])
        if path != os.path.join(place, name) and os.path.basename(path) in classes:  # the only one
            path, folders = os.path.dirname(path), {os.path.basename(path): groups[name]}
        unknown = sorted({*folders} - {"", *classes})
        if {*folders} & {*classes} or len(unknown) > 1:
            if unknown:
                raise ValueError(f"{path}: {', '.join(unknown[:3])}: its classes must be those of the training images")
            return path, label(folders, classes)
    return None


def choose_splits(root, test_share):
    """Training images, unlabeled ones and test images of a folder, each as [(path, label)], and class
    names, by the rules in docs/data.md. Says what is used for what, and what is passed over. Raises
    what `find_images` does, and ValueError for a layout that may mean something else."""
    files, passed = find_images(root)
    place, groups = group(files)
    names = sorted({*groups} - {""})
    trains, tests, unlabeled = ([name for kind in kinds for name in names if name.lower() == kind]
                                for kinds in (TRAIN, TEST, UNLABELED))
    likes = [LIKE_SPLIT.search(name.lower()) for name in names]
    if len(trains) == 1 and len(trains + tests + unlabeled) == len(names):
        top, folders = group(groups[trains[0]])
    elif len(trains + tests) > 1 or all(likes) and len({like[1] for like in likes}) > 1:
        raise ValueError(f"{place} has {', '.join(names[:6])}: call the folders of the splits train and "
                         "test, and leave no others beside them")
    else:
        tests, unlabeled = [], unlabeled if len(names) > 1 else []
        top, folders = place, {name: groups[name] for name in groups if name not in unlabeled}
    classes, held_out, where = sorted({*folders} - {""}), [], "held out"
    if "" in folders and len(classes) < 2:  # nothing to tell apart
        classes = []
    images, extra = label(folders, classes), label({name: groups[name] for name in unlabeled}, [])
    test = choose_test(place, groups, tests, classes) if len(classes) > 1 else None
    if test:
        where, held_out = f"{os.path.relpath(test[0], root)}/", test[1]
    elif len(classes) > 1:
        images, held_out = split_by_hash(images, top, test_share)
    for path in {*files}.difference(path for path, _ in images + extra + held_out):
        name = path.removeprefix(os.path.join(place, "")).split(os.sep)[0]
        passed[f"images in {name}/" if name in tests else "images in no class folder"] += 1
    tested, count = len({number for _, number in held_out}), f"{len(classes) or 'no'} classes"
    line = f"training images {os.path.relpath(top, root)}/ ({count}, {len(images):,})"
    if extra:
        line += f" and {', '.join(unlabeled)}/ ({len(extra):,})"
    some = f", of {tested:,} classes" if tested < len(classes) else ""
    line += f", test images {where} ({len(held_out):,}{some})" if held_out else ", no test images"
    say_layout(root, line, passed)
    return images, extra, held_out, classes


def list_images(root):
    """All images of a folder, or one file, as [(path, label)], and class names: the folders in it. Images
    in none have the label -1. Raises what `find_images` does."""
    files, passed = find_images(root)
    tops = [os.path.relpath(file, root).split(os.sep) for file in files]
    classes = sorted({top[0] for top in tops if len(top) > 1})
    labels = {name: number for number, name in enumerate(classes)}
    say_layout(root, f"{len(files):,} images, {len(classes) or 'no'} classes", passed)
    return [(file, labels.get(top[0], -1)) for file, top in zip(files, tops)], classes


def say_layout(root, line, passed):
    """Say what a folder has, and what is passed over."""
    info(f"{root}: {line}")
    words = [f"{what} ({n:,})" for what, n in sorted(passed.items()) if n]
    if words:
        warn(f"{root}: passed over: {', '.join(words)}")


def split_by_hash(images, folder, share):
    """Split [(path, label)] into training and test images: about a share of each class, at least one
    image, but not all. A hash of the path decides, so that other images stay when some are added."""
    hashes, bounds = {}, {}  # uniform in [0, 1); of each class the lowest and the highest
    for path, label in images:
        digest = hashlib.sha256(os.fsencode(os.path.relpath(path, folder))).hexdigest()
        hashes[path] = value = int(digest, 16) / 2**256
        low, high = bounds.get(label, (value, value))
        bounds[label] = min(low, value), max(high, value)
    splits = [], []
    for path, label in images:
        low, high = bounds[label]
        held_out = hashes[path] < high and (hashes[path] < share or hashes[path] == low)
        splits[held_out].append((path, label))
    return splits


def load_splits(root, size, test_share, unlabeled, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)], as of `load_images`, and
    class names. unlabeled: with the unlabeled images. Raises what `choose_splits` does, too."""
    train, extra, test, classes = choose_splits(root, test_share)
    images, labels, read = load_images(root, train + extra + test, size, cache_dir, skip_broken)
    end, first = numpy.searchsorted(read, [len(train), len(train) + len(extra)])
    for label in sorted({*labels[first:].tolist()} - {*labels[:end].tolist()})[:3]:
        warn(f"{root}: {classes[label]} has test images, but no training images that can be read")
    if unlabeled:
        end = first
    return [(images[:end], labels[:end]), (images[first:], labels[first:])], classes


def load_images(root, files, size, cache_dir, skip_broken):
    """The images of [(path, label)], below root, that can be read: uint8 [N, 3, size, size], labels int64
    [N], and indices. They are mapped from an .npy file in cache_dir, which is made again if files, their
    sizes or times change. Raises OSError, and ValueError, also for a file that cannot be read."""
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
            while found is None:  # or, where nothing can be locked, replace what is made here
                make_cache(path, source, skip_broken)
                found = read_cache(path, source, skip_broken)
    images, broken = found
    if broken:
        warn(f"{len(broken)} of {len(files)} images cannot be read and are skipped: "
             + "; ".join(list(broken.values())[:3]))
    read = [i for i in range(len(files)) if i not in broken]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the file is mapped to be read, and nothing writes images
        return torch.from_numpy(images), torch.tensor([files[i][1] for i in read]), read


def read_cache(path, source, skip_broken):
    """The images and {index: why} in a cache, images as .npy with JSON after them. None unless it is whole,
    of this source, and lacks no files or, with skip_broken, those that still cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError), open(path, "rb") as file:
        numpy.lib.format.read_magic(file)
        shape, _, dtype = numpy.lib.format.read_array_header_1_0(file)
        file.seek(HEADER + math.prod(shape))
        about = json.load(file)
        broken, size = dict(about["broken"]), source["image_size"]
        expected = (len(source["files"]) - len(broken), 3, size, size)
        if (about["source"], shape, dtype) != (source, expected, numpy.uint8) or broken and not skip_broken:
            return None
        _, failures = read_images([(i, source["files"][i][0]) for i in broken], size)
        if len(failures) < len(broken):
            return None
        try:
            images = numpy.memmap(file, dtype, "r", HEADER, shape)
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows
                images._mmap.madvise(mmap.MADV_RANDOM)
        except OSError:  # some file systems, and limits of memory, do not allow that
            file.seek(HEADER)
            images = numpy.fromfile(file, dtype, math.prod(shape)).reshape(shape)
        return images, broken


def make_cache(path, source, skip_broken):
    """Write a cache, as `read_cache` reads it. Raises ValueError for a file that cannot be read."""
    files, size = [file for file, _, _ in source["files"]], source["image_size"]
    info(f"{path}: made once from {len(files):,} images, {len(files) * 3 * size**2 / 1e9:.3f} GB")
    broken = {}
    with checkpoint.writing(path) as file:
        file.seek(HEADER)  # the header is written last, when the number of images is known
        for images, failures in bar(decode(files, size), desc="images", unit="batch"):
            broken |= failures
            if broken and not skip_broken:
                raise ValueError(f"{list(broken.values())[0]}; --skip_broken skips such files")
            file.write(images)
        if len(broken) == len(files):
            raise ValueError(f"none of {len(files)} images can be read; the first: {broken[0]}")
        file.write(json.dumps({"source": source, "broken": list(broken.items())}).encode())
        file.seek(0)
        shape = (len(files) - len(broken), 3, size, size)
        numpy.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=shape))


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
