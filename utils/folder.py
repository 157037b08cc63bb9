"""What a folder of images means: which files are images, of which class, for training or for testing."""
import collections
import hashlib
import os
import re
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from utils import log
from utils.cli import info, warn

TRAIN, UNLABELED = ["train", "training", "labeled", "labelled"], ["unlabeled", "unlabelled"]
TEST = ["test", "val", "valid", "validation", "testing"]  # the first that has classes is used
LIKE_SPLIT = re.compile("(?<![a-z])(train|test|val|pred|dev|eval|holdout)"
                        "(id|idation|ing|val|set|data|images?|[ab])?(?![a-z])")
SYSTEM = {"__macosx", "__pycache__", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",
          "lost+found", "lost.dir", "found.000", "$recycle.bin", "recycler", "system volume information",
          "temporary items", "network trash folder", "thumbs.db", "desktop.ini"}
OUTPUTS = [{log.LOG, "config.json"}, {"features.json", "neighbors.png"}, {"ablations.md"}, {"loss-plot.png"}]


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


def say_found(root, line, classes, passed):
    """Say what a folder has, with its first classes, and warn of what is passed over."""
    if classes:
        line += f"; classes {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}"
    info(f"{root}: {line}")
    if passed:
        warn(root + words_of(passed))


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


def group_labeled(files):
    """The same without a folder called unlabeled beside others, and its images."""
    place, groups = group(files)
    unlabeled = {path for name in groups if name.lower() in UNLABELED and len(groups) > 1 for path in groups[name]}
    if unlabeled:
        place, groups = group([file for file in files if file not in unlabeled])
    return place, groups, [*unlabeled]


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
    place, groups, unlabeled = group_labeled(files)
    names = sorted({*groups} - {""})
    trains, tests = ([name for kind in kinds for name in names if name.lower() == kind] for kinds in (TRAIN, TEST))
    likes = [LIKE_SPLIT.search(name.lower()) for name in names]
    if len(trains) == 1 and len(trains + tests) == len(names):
        top, folders, more = group_labeled(groups[trains[0]])
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
    line = f"training images {os.path.relpath(top, root)}/ ({len(classes) or 'no'} classes, {len(images):,})"
    if extra:
        line += f" and unlabeled ones ({len(extra):,})"
    tested = len({number for _, number in held_out})
    some = f", {tested:,} of the classes" if tested < len(classes) else ""
    line += f", test images {where} ({len(held_out):,}{some})" if held_out else ", no test images"
    say_found(root, line, classes, passed)
    return images, extra, held_out, classes


def list_images(root):
    """All images of a folder, or one file, as [(path, label)], and class names: the folders in it. Images
    in none have the label -1. Raises what `find_images` does."""
    files, passed = find_images(root)
    tops = [os.path.relpath(file, root).split(os.sep) for file in files]
    classes = sorted({top[0] for top in tops if len(top) > 1})
    labels = {name: number for number, name in enumerate(classes)}
    say_found(root, f"{len(files):,} images, {len(classes) or 'no'} classes", classes, passed)
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
