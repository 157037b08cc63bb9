"""Load a backbone from this project's checkpoints and from those of other SimSiam code, by the names of the tensors."""
import contextlib
import io
import os
import pickle
import re
import warnings
import zipfile
from typing import NamedTuple

import torch

from simsiam.resnet import ARCHS

CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # of every ResNet here, in this order
PART = re.compile(r"(conv|bn|layer)?\d+")  # what a part of a ResNet is called, here or elsewhere; the rest are heads
WRAPPERS = re.compile(r"(?<![^./])(module|_[a-z_]+)[./]")  # of DataParallel, torch.compile, FSDP and others
STEM = re.compile(r"((?:.*[./])?)(?:conv1|0)[./]weight")
WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
AVERAGED = set("ema momentum target teacher average averaged avg shadow slow swa key k m".split())
ONLINE = {"online", "student", "query", "q", "source"}
IMAGENET = "0.485 0.456 0.406 and std 0.229 0.224 0.225"
KINDS = {  # first bytes of other files, in lower case
    b"version https://git-lfs": "a Git LFS pointer; git lfs pull fetches the file itself",
    b"<?xml": "XML, as failed downloads leave", b"<": "an HTML page, as failed downloads leave",
    b"\x80": "it needs pickled code, or is damaged",
    b"\x93numpy": "a NumPy array", b"\x89hdf": "an HDF5 file", b"gguf": "a GGUF file",
    b"\x1f\x8b": "compressed by gzip", b"bzh": "compressed by bzip2", b"\xfd7zxz": "compressed by xz",
}
ZIP_KINDS = {  # patterns of names in other zip archives
    r"\.npy$": "a NumPy .npz file", r"/code/|constants\.pkl$": "TorchScript; save its state_dict with torch.save",
    r"archive_format$|serialized_exported_program": "an exported program (.pt2); save its state_dict with torch.save",
}


class Origin(NamedTuple):
    """Whose layout a checkpoint has, and what its network does differently."""
    name: str
    normalization: str = ""  # mean and std of the images there, where they differ from this project's
    stem_padding: int = 1


def load_backbone(source, arch="resnet18", width=None, verbose=True):
    """Load the backbone of a checkpoint as a ResNet in eval mode, float32, on the CPU.

    source: path of a file of torch.save or safetensors, or what torch.load returned for it. arch: a key of ARCHS.
    width: channels of the stem (default: those of the checkpoint). verbose: print what was recognized, or a function to
    call with this line. The backbone is found anywhere in nested dicts, under any prefix; every tensor must be present
    with its name and shape, except num_batches_tracked. Of several, the one that is no moving average is taken, then
    the one with the shortest name. The stem becomes that of the code which wrote the file: solo-learn pads by 2, and
    lightly's CIFAR benchmark has no ReLU after it.

    Files are read with weights_only=True: pickled code never runs. Raises OSError if the file cannot be read, and
    ValueError that says what it is instead, or that lists missing, unexpected and misshapen tensors.
    """
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    label = ""
    if isinstance(source, (str, os.PathLike)):
        label, source = f"{source}: ", read_file(source)
    tensors, first_error = dict(flatten(source)), None
    stems = {name: stem[1] for name, value in tensors.items()  # possible first convolutions, and what precedes them
             if (stem := STEM.fullmatch(name)) and value.ndim == 4 and value.shape[1] == 3}
    words = {stem: [word.lower() for word in WORD.findall(stems[stem])] for stem in stems}
    averaged, online = ({stem: sum(word in known for word in words[stem]) for stem in stems}
                        for known in (AVERAGED, ONLINE))
    for stem in sorted(stems, key=lambda stem: (averaged[stem], -online[stem], len(stem))):
        try:
            backbone, line = build(source, tensors, stem, stems[stem], arch, width)
            break
        except ValueError as error:
            first_error = first_error or error
    else:
        known = ", ".join(list(tensors)[:3]) or "no tensors"
        raise ValueError(f"{label}{first_error or f'no backbone found: no 3x3 conv1.weight among {known} ...'}")
    others = [f"{stems[each]}*".replace("/", ".") for each in stems if not torch.equal(tensors[each], tensors[stem])
              and any(name.startswith(stems[each]) and name.endswith("running_mean") for name in tensors)]
    line += " (a moving average)" * (averaged[stem] > online[stem])
    line += f", not the one at {' and '.join(others)}" * bool(others)
    if verbose:
        (verbose if callable(verbose) else print)(f"{label}{line}")
    return backbone.eval()


def read_file(path):
    """The content of a file of torch.save, or of safetensors if that package is installed. Raises OSError if it cannot
    be read, ValueError that says what it is if it is neither, damaged, or holds more than tensors and plain values."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{str(path)!r} is a folder; name backbone.pt or checkpoint.pt in it")
    with open(path, "rb") as file:
        content = file.read()
    try:
        if content[8:9] == b"{" and int.from_bytes(content[:8], "little") < len(content):
            import safetensors.torch
            return safetensors.torch.load(content)
        if zipfile.is_zipfile(io.BytesIO(content)) and zipfile.ZipFile(io.BytesIO(content)).testzip() is not None:
            raise zipfile.BadZipFile  # torch.load does not verify the checksums
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: torch.load parses arbitrary bytes
        raise ValueError(f"{path}: not a checkpoint that can be loaded: {kind_of(content, error)}") from error


def kind_of(content, error):
    """What a file is that could not be loaded, in words."""
    if isinstance(error, ImportError):
        return "safetensors; pip install safetensors reads it"
    for magic, words in KINDS.items():
        if content[:64].removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(magic):
            return words
    if re.fullmatch(rb"[\s -~]+", content[:64]):
        return f"text that begins with {content[:40].decode()!r}"
    if content[257:262] == b"ustar":
        return "a tar archive"
    with contextlib.suppress(Exception):  # of any type, as above
        names = zipfile.ZipFile(io.BytesIO(content)).namelist()
        for form, words in ZIP_KINDS.items():
            if any(re.search(form, name) for name in names):
                return words
        if not any(name.endswith("data.pkl") for name in names):
            return f"a zip archive of {', '.join(names[:3]) or 'nothing'}"
        if isinstance(error, pickle.UnpicklingError):
            code = torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(content))
            return f"it needs pickled code ({', '.join(code[:3])}); save its state_dict alone"
        return "truncated or damaged"
    damaged = "truncated or damaged" if content.startswith(b"PK") else "not a file of torch.save"
    return damaged if content else "the file is empty"


def flatten(item, name=""):
    """Yield (name, tensor) for all tensors in nested dicts and lists; '/' separates the levels."""
    if torch.is_tensor(item):
        yield name, item
    pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, (list, tuple)) else ()
    for key, value in pairs:
        yield from flatten(value, f"{name}/{key}" if name else str(key))


def build(file, tensors, stem, prefix, arch, width):
    """The backbone at `prefix`, whose first convolution is `stem`, and a line that says what it is. Raises ValueError
    if it does not fit."""
    if tuple(tensors[stem].shape[2:]) == (7, 7):
        raise ValueError(f"{stem} is 7x7: an ImageNet stem; only CIFAR ResNets with a 3x3 stem are supported")
    inside = {}
    for name in (name.removeprefix(prefix) for name in tensors if name.startswith(prefix)):
        if PART.fullmatch(re.split("[./]", name)[0]):
            inside[WRAPPERS.sub("", name).replace("/", ".")] = tensors[prefix + name]
    inside, stem_relu = (inside, True) if "conv1.weight" in inside else name_children(inside)
    found = {name.replace(".shortcut.", ".downsample."): value for name, value in inside.items()
             if name.split(".")[0] != "head" and (value.dtype == torch.int64 or not name.endswith("batches_tracked"))}
    backbone = ARCHS[arch](found["conv1.weight"].shape[0] if width is None else width)
    own = backbone.state_dict()
    counters = {name: own[name] for name in own if name.endswith("num_batches_tracked") and name not in found}
    load_tensors(backbone, counters | found)  # counters have no effect in evaluation
    origin = recognize(file, tensors, WRAPPERS.sub("", prefix))
    backbone.conv1.padding, backbone.stem_relu = (origin.stem_padding, origin.stem_padding), stem_relu
    others = sum(name.startswith(re.match("(.*?/)?", prefix)[0]) for name in tensors) - len(found)
    notes = [f"{origin.name}; {len(found)} of {len(own)} backbone tensors matched"]
    notes += [f"{others} other tensors (heads, copies) ignored"] * (others > 0)
    notes += [f"stem padded by {origin.stem_padding}"] * (origin.stem_padding != 1)
    notes += ["no ReLU after the stem"] * (not stem_relu)
    notes += [f"trained there on images normalized by mean {origin.normalization}"] * bool(origin.normalization)
    return backbone, ", ".join(notes)


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
    """The Origin of a checkpoint, from the names in it."""
    parts = {part for name in tensors for part in re.split("[./]", name)}
    if isinstance(file, dict) and {"format", "machine", "config"} <= file.keys():
        return Origin("checkpoint.pt of this project")
    if parts & {"projection_head", "prediction_head"}:
        return Origin("lightly checkpoint", IMAGENET)
    if "classifier" in parts and "pytorch-lightning_version" in file:
        return Origin("solo-learn checkpoint", stem_padding=2)
    where = f"CIFAR ResNet at {prefix.replace('/', '.')}*" if prefix else "state dict of a CIFAR ResNet"
    if {"classifier", "projector", "predictor"} <= parts:
        return Origin(f"{where} (a solo-learn state dict? its stem pads by 2, which is not set here)")
    if any("encoder.fc." in name for name in tensors):
        return Origin("facebookresearch/simsiam checkpoint", IMAGENET)
    if {"backbone", "encoder"} <= parts:
        if any(".shortcut." in name for name in tensors):
            return Origin("Reza-Safdari/SimSiam-91.9-top1-acc-on-CIFAR10 checkpoint",
                          "0.4914 0.4822 0.4465 and std 0.2023 0.1994 0.2010")
        return Origin("PatrickHua/SimSiam checkpoint", IMAGENET)
    return Origin(where)


def load_tensors(module, tensors):
    """Copy a state dict into the module; names and shapes must match exactly. Raises ValueError that lists what is
    missing, unexpected, or of another shape or type, and for weights that are not finite."""
    if not (isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
            and all(map(torch.is_tensor, tensors.values()))):
        raise ValueError("not a state dict")
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
    """A hint: the network with exactly these names and shapes, apart from num_batches_tracked."""
    def shapes_of(tensors):
        return {name: value.shape for name, value in tensors.items() if not name.endswith("num_batches_tracked")}

    width = max(1, len(tensors.get("conv1.weight", ())))
    for arch, make in ARCHS.items():
        with torch.device("meta"):
            if shapes_of(make(width).state_dict()) == shapes_of(tensors):
                return f"they fit {arch} of width {width}"
    return "check arch and width"
