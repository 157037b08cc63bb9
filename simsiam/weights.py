"""A backbone out of a file: this project's, and those that other SimSiam code for CIFAR writes.

Whose file it is shows in the names of its tensors; the values do not matter. The layouts are those of
Reza-Safdari/SimSiam-91.9-top1-acc-on-CIFAR10, PatrickHua/SimSiam, lightly, solo-learn and
facebookresearch/simsiam, and plain state dicts.
"""
import os
import zipfile
from typing import NamedTuple

import torch

from simsiam.resnet import ARCHS

CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # of every ResNet here, in this order
HEADS = ("fc", "linear", "classifier", "head", "projector", "predictor")  # what may stand beside them
IMAGENET = "0.485 0.456 0.406 and std 0.229 0.224 0.225"


class Found(NamedTuple):
    """A backbone in a file."""

    tensors: dict       # by the names that simsiam.resnet has
    origin: str         # whose layout the file has, in words
    others: int         # tensors of the file that are not in it: heads, and second copies
    normalization: str  # by which mean and std that code normalizes its pictures, where they are not this project's, else ""
    stem_padding: int   # of the stem's 3x3 convolution
    stem_relu: bool     # whether a ReLU follows the stem's batch norm


def load_backbone(source, arch="resnet18", width=None, verbose=True, name=None):
    """The backbone in a checkpoint, as a ResNet of this package in evaluation mode, on the CPU, in float32.

    source: the path of a file, or what torch.load has made of one; name: what messages call it (the path). arch: a key
    of ARCHS. width: channels of the stem, None for the file's. The result takes normalized pictures float32 [B, 3, H, W] and returns features
    [B, feature_dim]. Every tensor of the backbone has to be there in name and shape. A line (verbose) says
    what was recognized. Two kinds of files come from other functions of the same tensors, and the result is that function:
    solo-learn's stem pads by 2, and lightly's benchmark for CIFAR has no ReLU after the stem. In a state dict saved
    from the result that is lost again; `is_plain` tells.

    Only tensors and plain values are read: code in a file never runs. Raises OSError for a file that cannot be
    read, pickle.UnpicklingError for one that holds more, RuntimeError or ValueError for one that is damaged, and
    ValueError, which lists what is missing, unexpected or of another shape, for one that does not fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"no architecture {arch!r}; there are {', '.join(ARCHS)}")
    if isinstance(source, (str, os.PathLike)):
        name = source if name is None else name
        check_zip(source)
        source = torch.load(source, map_location="cpu", weights_only=True)
    label = "" if name is None else f"{name}: "
    try:
        found = find_backbone(source)
        backbone = ARCHS[arch](found.tensors["conv1.weight"].shape[0] if width is None else width)
        load_tensors(backbone, found.tensors)
    except ValueError as error:
        raise ValueError(f"{label}{error}") from error
    backbone.conv1.padding = (found.stem_padding, found.stem_padding)
    backbone.stem_relu = found.stem_relu
    if verbose:
        print(f"{label}{describe(found)}")
    return backbone.eval()


def is_plain(backbone):
    """Whether a backbone's function is the one that its state dict gives in a new network."""
    return backbone.stem_relu and backbone.conv1.padding == (1, 1)


def check_zip(path):
    """Raises ValueError if a file of torch.save does not agree with its checksums, which torch.load does not read."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise ValueError(f"{path}: damaged, the checksum of {damaged} does not agree")


def describe(found):
    """What was recognized, in a line."""
    parts = [f"{found.origin}; {len(found.tensors)} of {len(found.tensors)} backbone tensors matched"]
    if found.others:
        parts.append(f"{found.others} other tensors (heads, copies) left out")
    if found.stem_padding != 1:
        parts.append(f"its stem pads by {found.stem_padding}")
    if not found.stem_relu:
        parts.append("no ReLU after its stem")
    if found.normalization:
        parts.append(f"trained there with pictures normalized by mean {found.normalization}")
    return ", ".join(parts)


def find_backbone(file):
    """The backbone in what torch.load has made of a file. Raises ValueError if there is none, or one for ImageNet."""
    named = file
    for key in ("model", "state_dict", "model_state_dict", "net", "backbone", "encoder"):
        if isinstance(named, dict) and isinstance(named.get(key), dict):
            named = named[key]
    if not isinstance(named, dict):
        raise ValueError("no backbone in it: it holds no state dict")
    # Wrappers for several GPUs and compiled modules put their mark into every name.
    tensors = {
        str(name).replace("_orig_mod.", "").removeprefix("module."): value
        for name, value in named.items() if torch.is_tensor(value)
    }
    stems = [name for name, value in tensors.items() if value.ndim == 4 and value.shape[1] == 3]
    stems = [name for name in stems if name.split(".")[-2:] in (["conv1", "weight"], ["0", "weight"])]
    if not stems:
        raise ValueError(
            f"no backbone in it: there is no convolution of three channels named conv1.weight among {', '.join(map(str, list(named)[:3]))} ..."
        )
    stem = min(stems, key=len)  # of copies the one with the shortest name: 'backbone.' before 'encoder.0.' and 'backbone_momentum.'
    kernel = tuple(tensors[stem].shape[2:])
    if kernel == (7, 7):
        raise ValueError(
            f"{stem} is {tuple(tensors[stem].shape)}: an ImageNet stem (7x7, stride 2, then a max-pool); the networks here have "
            "the 3x3 stem of CIFAR, and no weights of the other fit"
        )
    prefix = stem.removesuffix("conv1.weight" if stem.endswith("conv1.weight") else "0.weight")
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    stem_relu = True
    if not stem.endswith("conv1.weight"):
        inside, stem_relu = name_children(inside)
    backbone = {
        name.replace(".shortcut.", ".downsample."): value
        for name, value in inside.items() if name.split(".")[0] not in HEADS
    }
    origin, normalization, stem_padding = recognize(file, tensors, prefix)
    return Found(backbone, origin, len(tensors) - len(backbone), normalization, stem_padding, stem_relu)


def name_children(tensors):
    """The names of a backbone that was made an nn.Sequential of its children, whose names are numbers: the stem, its
    batch norm, and the four stages; children with neither (a projector) are heads. And whether there is a ReLU after
    the stem: as a child it has a number, and where it was a call in the forward method, the Sequential is without."""
    named, numbers, children = {}, {}, iter(CHILDREN)
    for number in sorted({int(name.split(".")[0]) for name in tensors if name.split(".")[0].isdecimal()}):
        own = {name.removeprefix(f"{number}."): value for name, value in tensors.items() if name.startswith(f"{number}.")}
        in_backbone = any(value.ndim == 4 for value in own.values()) or "running_mean" in own
        child = next(children, "head") if in_backbone else "head"
        numbers[child] = number
        named.update({f"{child}.{name}": value for name, value in own.items()})
    return named, numbers.get("layer1", 0) > numbers.get("bn1", 0) + 1


def recognize(file, tensors, prefix):
    """Whose layout it is: words, the normalization and the stem's padding, as in Found."""
    roots = {name.split(".")[0] for name in tensors}
    if roots - {"predictor"} == {"backbone", "projector"} and "model" in file:  # without: a run of the study
        return "a checkpoint.pt of this project", "", 1
    if roots & {"projection_head", "prediction_head"}:
        return "a checkpoint of lightly", IMAGENET, 1
    if "classifier" in roots and "pytorch-lightning_version" in file:
        return "a checkpoint of solo-learn", "", 2
    if {"classifier", "projector", "predictor"} <= roots:
        return f"a state dict with a CIFAR ResNet as {prefix}* (if it comes from solo-learn: its stem pads by 2, which is not set here)", "", 1
    if any(name.startswith("encoder.fc.") for name in tensors):
        return "a checkpoint of facebookresearch/simsiam", IMAGENET, 1
    if {"backbone", "encoder"} <= roots:
        if any(".shortcut." in name for name in tensors):
            return "a checkpoint of Reza-Safdari/SimSiam-91.9-top1-acc-on-CIFAR10", "0.4914 0.4822 0.4465 and std 0.2023 0.1994 0.2010", 1
        return "a checkpoint of PatrickHua/SimSiam", IMAGENET, 1
    if not prefix:
        return "the state dict of a CIFAR ResNet", "", 1
    return f"a state dict with a CIFAR ResNet as {prefix}*", "", 1


def load_tensors(module, tensors):
    """Copy a state dict into the module, every tensor matched by name and shape. Raises ValueError that lists what is
    missing, unexpected or of another shape, and for weights that are not finite."""
    own = module.state_dict()
    shapes = [
        f"{name} is {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own if name in tensors and tensors[name].shape != own[name].shape
    ]
    types = [
        f"{name} is {tensors[name].dtype}"
        for name in own if name in tensors and tensors[name].is_floating_point() != own[name].is_floating_point()
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (
            ("missing:", [name for name in own if name not in tensors]),
            ("unexpected:", [name for name in tensors if name not in own]),
            ("another shape:", shapes), ("another type:", types),
        ) if names
    ]
    if problems:
        fitting = fitting_arch(tensors)
        hint = f"they are those of a {fitting}" if fitting else "see arch and width"
        raise ValueError(f"the tensors do not fit the network; {'; '.join(problems)}; {hint}")
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"weights that are not finite numbers: {broken[0]} and {len(broken) - 1} more")
    module.load_state_dict(tensors)


def fitting_arch(tensors):
    """Which network has just these names and shapes, in words, or None."""
    stem = tensors.get("conv1.weight")
    if stem is None or stem.ndim != 4:
        return None
    for arch, make in ARCHS.items():
        with torch.device("meta"):
            own = make(len(stem)).state_dict()
        if {name: value.shape for name, value in own.items()} == {name: value.shape for name, value in tensors.items()}:
            return f"{arch} of width {len(stem)}"
    return None
