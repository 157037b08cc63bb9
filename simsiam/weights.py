"""Load a backbone from this project's checkpoints and from those of other SimSiam code."""
import io
import os
import re
import textwrap
import warnings
import zipfile

import torch

from simsiam.resnet import ARCHS

STEM = re.compile(r"((?:.*[./])?)(?:conv1|0)[./]weight")  # the first convolution, after a prefix
PART = re.compile(r"(conv|bn|layer)?\d+[./]")  # how names in a ResNet begin; those of heads do not
CHILDREN = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")  # of every ResNet, in order
WRAPPERS = re.compile(r"(?<![^./])(module|_[a-z_]+)[./]")  # of DataParallel, torch.compile, FSDP
AVERAGED = set("ema momentum target teacher average averaged avg shadow slow swa key k m".split())
ONLINE = {"online", "student", "query", "q", "source"}
HEADS = {"classifier", "projection_head", "prediction_head"}  # of solo-learn; of lightly


def load_backbone(source, arch="resnet18", width=None, verbose=True):
    """Load the backbone of a checkpoint as a ResNet in eval mode, float32, on the CPU. source: a path,
    or what torch.load returned for it. arch: a key of ARCHS. width: channels of the stem (default: the
    checkpoint's). verbose: print what was found, or a function to call with it. Nested dicts and any
    prefix are searched; online networks are preferred to moving averages, then short names. The stem
    is that of the code that wrote the file: solo-learn pads by 2, lightly's benchmark has no ReLU.
    Raises what `read_file` raises, and ValueError in one line for tensors that do not fit."""
    if arch not in ARCHS:
        raise ValueError(f"unknown architecture {arch!r}; choose from {', '.join(ARCHS)}")
    label = ""
    if isinstance(source, (str, os.PathLike)):
        label, source = f"{source}: ", read_file(source)
    tensors = dict(flatten(source))
    stems = [name for name in tensors if STEM.fullmatch(name) and tensors[name].shape[1:] == (3, 3, 3)]
    errors = []
    for stem in sorted(stems, key=preference):
        try:
            backbone, line = build(tensors, stem, arch, width)
            break
        except ValueError as error:
            errors.append(error)
    else:
        errors.append("no backbone: no conv1.weight of shape [N, 3, 3, 3] (ImageNet's is 7x7)")
        raise ValueError(f"{label}{errors[0]}")
    heads = HEADS & {part for name in tensors for part in re.split("[./]", name)}
    if "pytorch-lightning_version" in source and heads == {"classifier"}:
        backbone.conv1.padding = (2, 2)
        line += ", stem padded by 2"
    for other in stems:
        if not torch.equal(tensors[other], tensors[stem]):
            line += f", not the one at {other.replace('/', '.')}"
    if verbose:
        (verbose if callable(verbose) else print)(f"{label}{line}")
    return backbone.eval()


def load_model(path):
    """Load model.pt, a network that main_lincls.py has fine-tuned, in eval mode: normalized images
    [B, 3, H, W] -> logits [B, classes]. Its attribute `about` has classes, mean, std, and in `data` the
    image_size; [0] is the backbone, [1] the classifier. Raises as `read_file`, and ValueError for another file."""
    content = read_file(path)
    if not {"arch", "backbone", "classifier", "about"} <= set(content):
        raise ValueError(f"{path}: not a model.pt of main_lincls.py --weights finetune")
    backbone = load_backbone(content, content["arch"], verbose=False)
    classifier = torch.nn.Linear(backbone.feature_dim, len(content["about"]["classes"]))
    classifier.load_state_dict(content["classifier"])
    model = torch.nn.Sequential(backbone, classifier)
    model.about = content["about"]
    return model.eval()


def read_file(path):
    """The content of a file of torch.save, or of safetensors if installed; code in it never runs.
    Raises OSError, and ValueError in one line if it is no checkpoint, is damaged, or needs code."""
    if os.path.isdir(path):
        raise IsADirectoryError(f"{str(path)!r} is a folder; name backbone.pt, checkpoint.pt or model.pt in it")
    with open(path, "rb") as file:
        content = file.read()
    is_zip, safe = content.startswith(b"PK"), content[8:9] == b"{"
    try:
        if is_zip and zipfile.ZipFile(io.BytesIO(content)).testzip() is not None:
            raise zipfile.BadZipFile  # torch.load does not verify the checksums
        if safe and int.from_bytes(content[:8], "little") < len(content):
            import safetensors.torch
            return safetensors.torch.load(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: torch.load parses arbitrary bytes
        code = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it begins with {content[:32]!r}" if content else "the file is empty"
        if isinstance(error, zipfile.BadZipFile):
            reason = "truncated or damaged"
        elif code:
            reason = f"it needs pickled code ({code[1]}); save its state_dict alone"
        elif is_zip or safe:
            reason = textwrap.shorten(str(error), 100, placeholder=" ...")
        raise ValueError(f"{path}: not a checkpoint that can be loaded: {reason}") from error


def flatten(item, name=""):
    """Yield (name, tensor) for all tensors in nested dicts and lists; '/' separates the levels."""
    if torch.is_tensor(item):
        yield name, item
    if isinstance(item, (list, tuple)):
        item = dict(enumerate(item))
    if isinstance(item, dict):
        for key, value in item.items():
            yield from flatten(value, f"{name}/{key}" if name else str(key))


def preference(stem):
    """Sort key of stems: moving averages last, online networks first, then short names."""
    words = [word.lower() for word in re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+", stem)]
    return sum(word in AVERAGED for word in words), -sum(word in ONLINE for word in words), len(stem)


def build(tensors, stem, arch, width):
    """The backbone with this stem, and a line about it. Raises ValueError if it does not fit."""
    prefix, relu = STEM.fullmatch(stem)[1], True
    inside = {name.removeprefix(prefix): tensors[name] for name in tensors if name.startswith(prefix)}
    found = {WRAPPERS.sub("", name).replace("/", ".").replace(".shortcut.", ".downsample."): value
             for name, value in inside.items() if PART.match(name)}
    if "conv1.weight" not in found:  # the numbered children of an nn.Sequential; heads come last
        numbers = sorted({int(name.split(".")[0]) for name in found if name[0].isdecimal()})
        found = {f"{child}.{name.split('.', 1)[1]}": value for name, value in found.items()
                 for number, child in zip(numbers, CHILDREN) if name.startswith(f"{number}.")}
        relu = len(numbers) > 2 and numbers[2] > numbers[1] + 1  # it has a number too
    rest = len(tensors) - len(found)
    line = f"backbone at {stem.replace('/', '.')}: {len(found)} tensors matched, {rest} more ignored"
    if sum(preference(stem)[:2]) > 0:  # more words for moving averages than for online networks
        line += ", a moving average"
    if not relu:
        line += ", no ReLU after the stem"
    for name, value in list(found.items()):
        if name.endswith("running_mean"):  # beside it a counter, which has no effect in eval mode
            found.setdefault(name.replace("running_mean", "num_batches_tracked"), torch.tensor(0))
        if not (name.endswith("_tracked") or value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{name} has values that are not finite floating-point numbers")
    backbone = ARCHS[arch](width or len(found["conv1.weight"]))
    backbone.stem_relu = relu
    try:
        backbone.load_state_dict(found)
    except RuntimeError as error:
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        for each in ARCHS:
            if ARCHS[each](1).state_dict().keys() == found.keys():
                reason += f"; they fit {each} of width {len(found['conv1.weight'])}"
        raise ValueError(reason) from error
    return backbone, line
