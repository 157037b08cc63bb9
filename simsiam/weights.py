"""Load a backbone from this project's checkpoints and from those of other SimSiam code, by the names of the tensors."""
import os
import zipfile
from typing import NamedTuple

import torch

from simsiam.resnet import ARCHS

CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # of every ResNet here, in this order
HEADS = ("fc", "linear", "classifier", "head", "projector", "predictor")  # what else may be stored beside them
IMAGENET = "0.485 0.456 0.406 and std 0.229 0.224 0.225"


class Origin(NamedTuple):
    """Whose layout a checkpoint has, and what its network does differently."""
    name: str
    normalization: str = ""  # mean and std of the images there, where they differ from this project's
    stem_padding: int = 1


def load_backbone(source, arch="resnet18", width=None, verbose=True, name=None):
    """Load the backbone of a checkpoint as a ResNet in eval mode, float32, on the CPU.

    source: path of a file, or what torch.load returned for it. arch: a key of ARCHS. width: channels of the stem
    (default: those of the checkpoint). verbose: print what was recognized, after `name` (default: the path). Every
    tensor of the backbone must be present with its name and shape. The stem becomes that of the code which wrote the
    file: solo-learn pads by 2, and lightly's CIFAR benchmark has no ReLU after it.

    Files are read with weights_only=True: pickled code never runs. Raises OSError if the file cannot be read,
    pickle.UnpicklingError if it holds more than tensors and plain values, RuntimeError or ValueError if it is damaged,
    and ValueError that lists missing, unexpected and misshapen tensors if it does not fit.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    if isinstance(source, (str, os.PathLike)):
        name = source if name is None else name
        if zipfile.is_zipfile(source):  # torch.load does not verify the checksums
            with zipfile.ZipFile(source) as archive:
                if archive.testzip() is not None:
                    raise ValueError(f"{source}: damaged, a checksum does not match")
        source = torch.load(source, map_location="cpu", weights_only=True)
    label = "" if name is None else f"{name}: "
    try:
        tensors, others, origin, stem_relu = find_backbone(source)
        backbone = ARCHS[arch](tensors["conv1.weight"].shape[0] if width is None else width)
        load_tensors(backbone, tensors)
    except ValueError as error:
        raise ValueError(f"{label}{error}") from error
    backbone.conv1.padding = (origin.stem_padding, origin.stem_padding)
    backbone.stem_relu = stem_relu
    if verbose:
        notes = [f"{origin.name}; {len(tensors)} of {len(tensors)} backbone tensors matched"]
        notes += [f"{others} other tensors (heads, copies) ignored"] * (others > 0)
        notes += [f"stem padded by {origin.stem_padding}"] * (origin.stem_padding != 1)
        notes += ["no ReLU after the stem"] * (not stem_relu)
        notes += [f"trained there on images normalized by mean {origin.normalization}"] * bool(origin.normalization)
        print(f"{label}{', '.join(notes)}")
    return backbone.eval()


def find_backbone(file):
    """Tensors of the backbone in a loaded checkpoint, named as in simsiam.resnet; the number of other tensors; the
    Origin; whether a ReLU follows the stem. Raises ValueError if there is no backbone, or one for ImageNet."""
    named = file
    for key in ("model", "state_dict", "model_state_dict", "net", "backbone", "encoder"):
        if isinstance(named, dict) and isinstance(named.get(key), dict):
            named = named[key]
    if not isinstance(named, dict):
        raise ValueError("no backbone found: there is no state dict")
    # DataParallel and torch.compile add their marks to every name.
    tensors = {str(name).replace("_orig_mod.", "").removeprefix("module."): value
               for name, value in named.items() if torch.is_tensor(value)}
    stems = [name for name, value in tensors.items() if value.ndim == 4 and value.shape[1] == 3]
    stems = [name for name in stems if name.split(".")[-2:] in (["conv1", "weight"], ["0", "weight"])]
    if not stems:
        raise ValueError(f"no backbone found: no 3x3 conv1.weight among {', '.join(map(str, list(named)[:3]))} ...")
    stem = min(stems, key=len)  # the shortest name of several copies: backbone.* before encoder.0.*
    if tuple(tensors[stem].shape[2:]) == (7, 7):
        raise ValueError(f"{stem} is 7x7: an ImageNet stem; only CIFAR ResNets with a 3x3 stem are supported")
    prefix = stem.removesuffix("conv1.weight" if stem.endswith("conv1.weight") else "0.weight")
    inside = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    inside, stem_relu = (inside, True) if stem.endswith("conv1.weight") else name_children(inside)
    backbone = {name.replace(".shortcut.", ".downsample."): value
                for name, value in inside.items() if name.split(".")[0] not in HEADS}
    return backbone, len(tensors) - len(backbone), recognize(file, tensors, prefix), stem_relu


def name_children(tensors):
    """Rename the tensors of an nn.Sequential of a ResNet's children, whose names are numbers. Children without a
    convolution or running statistics are heads. The ReLU after the stem is there if it has a number."""
    named, numbers, children = {}, {}, iter(CHILDREN)
    for number in sorted({int(name.split(".")[0]) for name in tensors if name.split(".")[0].isdecimal()}):
        own = {name.removeprefix(f"{number}."): value
               for name, value in tensors.items() if name.startswith(f"{number}.")}
        in_backbone = any(value.ndim == 4 for value in own.values()) or "running_mean" in own
        child = next(children, "head") if in_backbone else "head"
        numbers[child] = number
        named.update({f"{child}.{name}": value for name, value in own.items()})
    return named, numbers.get("layer1", 0) > numbers.get("bn1", 0) + 1


def recognize(file, tensors, prefix):
    """The Origin of a checkpoint, from the names of its tensors."""
    roots = {name.split(".")[0] for name in tensors}
    if roots - {"predictor"} == {"backbone", "projector"} and "model" in file:  # the study has runs without predictor
        return Origin("checkpoint.pt of this project")
    if roots & {"projection_head", "prediction_head"}:
        return Origin("lightly checkpoint", IMAGENET)
    if "classifier" in roots and "pytorch-lightning_version" in file:
        return Origin("solo-learn checkpoint", stem_padding=2)
    if {"classifier", "projector", "predictor"} <= roots:
        return Origin(f"CIFAR ResNet at {prefix}* (a solo-learn state dict? its stem pads by 2, which is not set here)")
    if any(name.startswith("encoder.fc.") for name in tensors):
        return Origin("facebookresearch/simsiam checkpoint", IMAGENET)
    if {"backbone", "encoder"} <= roots:
        if any(".shortcut." in name for name in tensors):
            return Origin("Reza-Safdari/SimSiam-91.9-top1-acc-on-CIFAR10 checkpoint",
                          "0.4914 0.4822 0.4465 and std 0.2023 0.1994 0.2010")
        return Origin("PatrickHua/SimSiam checkpoint", IMAGENET)
    return Origin(f"CIFAR ResNet at {prefix}*" if prefix else "state dict of a CIFAR ResNet")


def load_tensors(module, tensors):
    """Copy a state dict into the module; names and shapes must match exactly. Raises ValueError that lists what is
    missing, unexpected, or of another shape or type, and for weights that are not finite."""
    own = module.state_dict()
    pairs = {name: (tensors[name], own[name]) for name in own if name in tensors}
    problems = {
        "missing": [name for name in own if name not in tensors],
        "unexpected": [name for name in tensors if name not in own],
        "wrong shape": [f"{name} is {tuple(value.shape)}, not {tuple(needed.shape)}"
                        for name, (value, needed) in pairs.items() if value.shape != needed.shape],
        "wrong type": [f"{name} is {value.dtype}" for name, (value, needed) in pairs.items()
                       if value.is_floating_point() != needed.is_floating_point()],
    }
    listed = [f"{what}: {', '.join(names[:3])}" + f" and {len(names) - 3} more" * (len(names) > 3)
              for what, names in problems.items() if names]
    if listed:
        raise ValueError(f"the tensors do not fit the network; {'; '.join(listed)}; {fitting_arch(tensors)}")
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise ValueError(f"weights that are not finite: {broken[0]} and {len(broken) - 1} more")
    module.load_state_dict(tensors)


def fitting_arch(tensors):
    """A hint: the network with exactly these names and shapes."""
    shapes = {name: value.shape for name, value in tensors.items()}
    width = max(1, len(tensors.get("conv1.weight", ())))
    for arch, make in ARCHS.items():
        with torch.device("meta"):
            if {name: value.shape for name, value in make(width).state_dict().items()} == shapes:
                return f"they fit {arch} of width {width}"
    return "check arch and width"
