"""Image files, read once: found in folders, decoded by several processes, kept as one memory-mapped array."""
import collections
import contextlib
import hashlib
import mmap
import os

import numpy
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2 import functional

from utils import checkpoint
from utils.cli import bar, info, warn

BATCH_BYTES = 2**20  # of decoded images, from one process to another: containers have little shared memory


def list_images(folder):
    """Paths, labels and class names of the images of a folder, by file name and then by path, in the order of code
    points. Classes are the subfolders, as in ImageFolder; without any, every label is -1. Hidden files and folders, of
    macOS too, are ignored; files of other types are counted in a warning. Raises OSError for a folder, or a class,
    without images."""
    def fail(error):
        raise error

    if not os.path.isdir(folder):
        raise OSError(f"{folder!r}: no such folder")
    classes, found, skipped = [], [], collections.Counter()
    for place, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        above = os.path.join(os.path.realpath(place), "")
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX" and
                      not above.startswith(os.path.join(os.path.realpath(os.path.join(place, name)), ""))]  # no loops
        classes = sorted(folders) if place == folder else classes
        name, *_ = os.path.relpath(place, folder).split(os.sep)
        label = classes.index(name) if place != folder and classes else -1
        for name in names:
            if name.startswith("."):
                continue
            if not name.lower().endswith(IMG_EXTENSIONS):
                skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
            elif classes and place == folder:
                skipped["images outside the class folders"] += 1
            else:
                found.append((name, os.path.join(place, name), label))
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
        raise ValueError(f"{next(iter(broken.values()))}; --skip_broken trains without such files")
    if broken:
        named = "; ".join([*broken.values()][:3])
        warn(f"{len(broken)} of {len(files)} images cannot be read and are skipped: {named}")
    return images, broken


def read_cache(path, source):
    """The images and {index: why not} in a cache; None unless it is whole, of this source, and what it lacks still
    cannot be read."""
    with contextlib.suppress(Exception):  # of any type: the files may hold anything
        about = checkpoint.read_json(f"{path}.json", "source", "broken")
        images, broken, size = numpy.load(f"{path}.npy", mmap_mode="c"), dict(about["broken"]), source["image_size"]
        again = ImageFiles([source["files"][i][0] for i in broken], size)
        if (about["source"] == source and images.shape == (len(source["files"]) - len(broken), 3, size, size)
                and images.dtype == numpy.uint8 and all(isinstance(again[i], str) for i in range(len(again)))):
            if hasattr(mmap, "MADV_RANDOM"):  # not on Windows; batches are random rows: reading ahead is in vain
                images._mmap.madvise(mmap.MADV_RANDOM)
            return images, broken
    return None


def make_cache(path, source, skip_broken):
    """Write path.npy and, when it is whole, path.json."""
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
    checkpoint.write_json(f"{path}.json", {"source": source, "broken": broken})


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
    stacked = numpy.stack(images or [numpy.empty((0, 0, 3), dtype=numpy.uint8)]).transpose(0, 3, 1, 2)
    return torch.from_numpy(stacked.copy()), failures


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
            if image.mode not in ("I", "F"):
                return image.convert("RGB")
    except Exception as error:  # of any type: Pillow parses arbitrary bytes
        raise OSError(f"{file}: not an image that can be read ({error})") from error
    raise ValueError(f"{file}: the range of 32-bit values is not known; save it with 8 or 16 bits")
