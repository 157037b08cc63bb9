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
    """Paths of the images below a folder, and a Counter of what is passed over, in words. Raises OSError
    for a folder that cannot be read or has no images."""
    files, errors, passed = [], [], collections.Counter()
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
    return files, passed


def enter(place, files, classes=()):
    """A place and the files below it by the folder in it, '' for those in none: {name: paths}. If it has
    but one folder, which is no class and has nothing but folders, or is called train: those of that one."""
    groups = collections.defaultdict(list)
    for file in files:
        name, inside, _ = file[len(place):].lstrip(os.sep).partition(os.sep)
        groups[name if inside else ""].append(file)
    names = [name for name in groups if name]
    if len(names) == 1 and names[0] not in classes:
        inner = enter(os.path.join(place, names[0]), groups[names[0]], classes)
        only_folders = "" not in inner[1] and ("" not in groups or len(inner[1]) > 1)
        if only_folders or names[0].lower() in TRAIN:
            return inner
    return place, groups


def labeled(groups, classes):
    """Images as [(path, label)] by file name, then by path; without classes the label is -1."""
    labels = {name: label for label, name in enumerate(classes)}
    images = [(path, labels.get(name, -1)) for name in groups for path in groups[name]]
    return sorted(images, key=lambda image: (os.path.basename(image[0]), image[0]))


def classify(groups):
    """Class names, and the groups with images of these; none for one folder and images beside it."""
    classes = sorted({*groups} - {""})
    if "" in groups and len(classes) < 2:
        return [], groups
    return classes, {name: groups[name] for name in classes}


def choose_test(place, groups, names, classes):
    """Of the folders called names the first that has folders of these classes: its path and images, or
    None. Raises ValueError if one has folders of others."""
    problem = None
    for name in names:
        path, folders = enter(os.path.join(place, name), groups[name], classes)
        folders.pop("", None)
        unknown = sorted({*folders} - {*classes})
        if folders and not unknown:
            return path, labeled(folders, classes)
        if len(folders) > 1 and problem is None:
            problem = f"{path}: {', '.join(unknown[:3])}: its classes must be those of the training images"
    if problem:
        raise ValueError(problem)
    return None


def choose_splits(root, test_share):
    """Training images, unlabeled ones and test images of a folder, each as [(path, label)], and class
    names, by the rules in docs/data.md. Says what is used for what, and what is passed over. Raises
    what `find_images` does, and ValueError for a layout that may mean something else."""
    files, passed = find_images(root)
    place, groups = enter(root, files)
    names = sorted({*groups} - {""})
    trains, tests, unlabeled = ([name for kind in kinds for name in names if name.lower() == kind]
                                for kinds in (TRAIN, TEST, UNLABELED))
    likes = [LIKE_SPLIT.search(name.lower()) for name in names]
    if len(trains) == 1 and len(trains + tests + unlabeled) == len(names):
        top, folders = enter(os.path.join(place, trains[0]), groups[trains[0]])
    elif len(trains + tests) > 1 or all(likes) and len({like[1] for like in likes}) > 1:
        raise ValueError(f"{place} has {', '.join(names[:6])}: call the folders of the splits train and "
                         "test, and leave no others beside them")
    else:
        tests, unlabeled = [], unlabeled if len(names) > 1 else []
        top, folders = place, {name: groups[name] for name in groups if name not in unlabeled}
    classes, folders = classify(folders)
    images, held_out, where = labeled(folders, classes), [], "held out"
    extra = labeled({name: groups[name] for name in unlabeled}, [])
    test = choose_test(place, groups, tests, classes) if len(classes) > 1 else None
    if test:
        where, held_out = f"{os.path.relpath(test[0], root)}/", test[1]
    elif len(classes) > 1:
        images, held_out = split_by_hash(images, top, test_share)
    for path in {*files}.difference(path for path, _ in images + extra + held_out):
        name = path[len(place):].lstrip(os.sep).split(os.sep)[0]
        passed[f"images in {name}/" if name in tests else "images in no class folder"] += 1
    tested, count = len({label for _, label in held_out}), f"{len(classes) or 'no'} classes"
    line = f"training images {os.path.relpath(top, root)}/ ({count}, {len(images):,})"
    if extra:
        line += f" and {', '.join(unlabeled)}/ ({len(extra):,})"
    some = f", of {tested:,} classes" if tested < len(classes) else ""
    line += f", test images {where} ({len(held_out):,}{some})" if held_out else ", no test images"
    say_layout(root, line, passed)
    return images, extra, held_out, classes


def list_images(root):
    """All images of a folder as [(path, label)], and class names: the folders in it, if it has no others.
    A file is a folder of one. Raises what `find_images` does."""
    if os.path.isfile(root):
        return [(root, -1)], []
    files, passed = find_images(root)
    classes, groups = classify(enter(root, files)[1])
    images = labeled(groups, classes)
    if len(images) < len(files):
        passed["images in no class folder"] = len(files) - len(images)
    say_layout(root, f"{len(images):,} images, {len(classes) or 'no'} classes", passed)
    return images, classes


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
            for _ in range(3):  # or, where nothing can be locked, replace what is made here
                found = read_cache(path, source, skip_broken)
                if found:
                    break
                make_cache(path, source, skip_broken)
            else:
                raise OSError(f"{path} changes while it is read; choose another --cache_dir")
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
        if (about["source"], shape, dtype) == (source, expected, numpy.uint8):
            _, failures = read_images([(i, source["files"][i][0]) for i in broken], size)
            if len(failures) == len(broken) and (skip_broken or not broken):
                return map_images(file, shape), broken
    return None


def map_images(file, shape):
    """The images in an open cache, uint8: mapped, or read where a file system, or a limit of memory,
    does not allow that."""
    try:
        images = numpy.memmap(file, numpy.uint8, "r", HEADER, shape)
    except OSError:
        file.seek(HEADER)
        return numpy.fromfile(file, numpy.uint8, math.prod(shape)).reshape(shape)
    if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows
        images._mmap.madvise(mmap.MADV_RANDOM)
    return images


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
