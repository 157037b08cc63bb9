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

TRAIN, UNLABELED = ["train", "training", "labeled", "labelled"], ["unlabeled", "unlabelled"]
TEST = ["test", "val", "valid", "validation", "testing"]  # the first that has classes is used
LIKE_SPLIT = re.compile("(?<![a-z])(train|test|val|pred|dev|eval|holdout)"
                        "(id|idation|ing|val|set|data|images?|[ab])?(?![a-z])")
SYSTEM = {"__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",
          "lost+found", "lost.dir", "found.000", "$recycle.bin", "recycler", "system volume information",
          "temporary items", "network trash folder", "thumbs.db", "desktop.ini"}
OUTPUTS = [{log.LOG, "config.json"}, {"features.json", "map.png"}, {"ablations.md"}, {"loss-plot.png"}]
BATCH_BYTES = 2**20  # of images from one process to another
HEADER = 128         # bytes of a cache before its images


def find_images(root):
    """Paths of the images below a folder, or of one file, and a Counter of what is passed over, in words.
    Raises OSError for a folder that cannot be read or has no images."""
    root, files, errors, followed, passed = os.path.normpath(root), [], [], set(), collections.Counter()
    if os.path.isfile(root):
        return [root], passed
    real = Path(root).resolve()
    for place, folders, names in os.walk(root, onerror=errors.append, followlinks=True):
        if place != root and any(each <= {*names} for each in OUTPUTS):
            passed["outputs of this program"] += 1
            names = []
        elif not folders and not names:
            passed["empty folders"] += 1
        litter = {name for name in folders + names if name.startswith(".") or name.lower() in SYSTEM}
        passed.update("hidden" if name.startswith(".") else name for name in litter)
        folders[:] = [name for name in folders if name not in litter]
        for name in [name for name in folders if os.path.islink(os.path.join(place, name))]:
            target = Path(place, name).resolve()  # may be read already, or lead back here
            if target in followed or target.is_relative_to(real) or real.is_relative_to(target):
                passed["links to folders among these"] += 1
                folders.remove(name)
            followed.add(target)
        for name in {*names} - litter:
            extension = os.path.splitext(name)[1].lower()
            if extension in IMG_EXTENSIONS:
                files.append(os.path.join(place, name).removeprefix(os.path.join(".", "")))
            else:
                passed[f"{extension or 'other'} files"] += 1
    if errors:
        raise errors[0]
    if not files:
        raise OSError(f"{root!r}: no images ({', '.join(IMG_EXTENSIONS)}){words_of(passed)}")
    return sorted(files, key=lambda file: (os.path.basename(file), file)), passed


def words_of(passed):
    """What is passed over, a Counter, in words after a semicolon; '' for nothing."""
    what = ", ".join(f"{name} ({count:,})" for name, count in sorted(passed.items()))
    return f"; passed over: {what}" if what else ""


def group(files):
    """The folder that has all the files, and these by the folder in it, '' for those in none: {name: paths}.
    Where it has one folder, of several folders, and files beside that: the same of that folder."""
    place = os.path.commonpath({os.path.dirname(file) for file in files}) or "."
    groups, start = collections.defaultdict(list), os.path.join(place, "")
    for file in files:
        name, inside, _ = file.removeprefix(start).partition(os.sep)
        groups[name if inside else ""].append(file)
    if len(groups) == 2 and "" in groups:
        inner = group(groups[max(groups)])
        if len({*inner[1]} - {""}) > 1:
            return inner
    return place, groups


def without_unlabeled(files):
    """The files but those in a folder called unlabeled beside others, and these."""
    groups = group(files)[1]
    extra = {path for name in groups if name.lower() in UNLABELED and len(groups) > 1 for path in groups[name]}
    return [file for file in files if file not in extra], [file for file in files if file in extra]


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
        first = os.path.relpath(path, os.path.join(place, name)).split(os.sep)[0]
        if first in classes:  # a test folder with one class
            path, folders = os.path.join(place, name), {first: groups[name]}
        unknown = sorted({*folders} - {"", *classes})
        if {*folders} & {*classes} or len(unknown) > 1:
            if unknown:
                raise ValueError(f"{path}: {', '.join(unknown[:3])}: its classes must be those of the training images")
            return path, label(folders, classes)
    return None


def check_classes(top, folders, classes):
    """Raise ValueError if a class has a folder called as another one, or as a split: copies, or no classes."""
    for name in classes:
        start = os.path.join(os.path.normpath(os.path.join(top, name)), "")
        inner = {path.removeprefix(start).partition(os.sep)[0] for path in folders[name]}
        strange = [each for each in inner if each in folders or each.lower() in TRAIN]
        if strange:
            raise ValueError(f"{start}{min(strange)} is called as a class or a split, but lies in a class: move "
                             "it, or choose another folder")


def choose_splits(root, test_share):
    """Training images, unlabeled ones and test images of a folder, each as [(path, label)], and class
    names, by the rules in docs/data.md. Says what is used for what, and what is passed over. Raises
    what `find_images` does, and ValueError for a layout that may mean something else."""
    files, passed = find_images(root)
    rest, unlabeled = without_unlabeled(files)
    place, groups = group(rest)
    names = sorted({*groups} - {""})
    trains, tests = ([name for kind in kinds for name in names if name.lower() == kind] for kinds in (TRAIN, TEST))
    likes = [LIKE_SPLIT.search(name.lower()) for name in names]
    if len(trains) == 1 and len(trains + tests) == len(names):
        rest, more = without_unlabeled(groups[trains[0]])
        top, folders = group(rest)
        unlabeled += more
    elif len(trains + tests) > 1 or all(likes) and len({like[1] for like in likes}) > 1:
        raise ValueError(f"{place} has {', '.join(names[:6])}: call the folders of the splits train and "
                         "test, and leave no others beside them")
    else:
        top, folders, tests = place, groups, []
    classes, held_out, where = sorted({*folders} - {""}), [], "held out"
    if "" in folders and len(classes) < 2:  # nothing to tell apart
        classes = []
    check_classes(top, folders, classes)
    images, extra = label(folders, classes), label({"": unlabeled}, [])
    test = choose_test(place, groups, tests, classes) if len(classes) > 1 else None
    if test:
        where, held_out = f"{os.path.relpath(test[0], root)}/", test[1]
    elif len(classes) > 1:
        images, held_out = split_by_hash(images, top, test_share)
    for path in {*files}.difference(path for path, _ in images + extra + held_out):
        name = path.removeprefix(os.path.join(place, "")).split(os.sep)[0]
        passed[f"images in {name}/" if name in tests else "images in no class folder"] += 1
    words = f"{len(classes):,} classes" if classes else "no classes"
    line = f"{root}: training images {os.path.relpath(top, root)}/ ({words}, {len(images):,})"
    if extra:
        line += f" and unlabeled ones ({len(extra):,})"
    tested = len({number for _, number in held_out})
    some = f", {tested:,} of the classes" if tested < len(classes) else ""
    line += f", test images {where} ({len(held_out):,}{some})" if held_out else ", no test images"
    if classes:
        line += f"; classes {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    info(line)
    if passed:
        warn(root + words_of(passed))
    return images, extra, held_out, classes


def list_images(root):
    """All images of a folder, or one file, as [(path, label)], and class names: the folders in it. Images
    in none have the label -1. Raises what `find_images` does."""
    files, passed = find_images(root)
    tops = [os.path.relpath(file, root).split(os.sep) for file in files]
    classes = sorted({top[0] for top in tops if len(top) > 1})
    labels = {name: number for number, name in enumerate(classes)}
    info(f"{root}: {len(files):,} images, {len(classes) or 'no'} classes")
    if passed:
        warn(root + words_of(passed))
    return [(file, labels.get(top[0], -1)) for file, top in zip(files, tops)], classes


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


def load_splits(root, size, test_share, cache_dir, skip_broken):
    """A folder of images as [(train images, labels), (test images, labels)], as of `load_cached`, and class
    names; unlabeled images come last. Raises what `choose_splits` and `load_cached` do."""
    train, extra, test, classes = choose_splits(root, test_share)
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
            images = numpy.memmap(file, dtype, "r", HEADER, shape)
        except OSError:  # some file systems, and limits of memory, do not allow that
            file.seek(HEADER)
            return numpy.fromfile(file, dtype, math.prod(shape)).reshape(shape), broken
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows
        with contextlib.suppress(OSError):
            images._mmap.madvise(mmap.MADV_RANDOM)
    return images, broken


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


def load_images(files, size, skip_broken):
    """The same of a list of paths, without a cache."""
    broken = {}
    parts = list(read_batches(files, size, skip_broken, broken))
    say_broken(broken, len(files))
    return torch.from_numpy(numpy.concatenate(parts)), broken


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
