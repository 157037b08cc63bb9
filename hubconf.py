"""torch.hub entries; a local clone works as well as a repository:

    backbone = torch.hub.load(".", "simsiam_resnet18_w32_cifar10", source="local")
"""
import hashlib as _hashlib
import json as _json
import os as _os

from simsiam import load_backbone as _load_backbone
from simsiam import resnet18 as _resnet18

dependencies = ["torch"]
_WEIGHTS = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), "weights")


def simsiam_resnet18_cifar10(pretrained=True, folder=_WEIGHTS):
    """CIFAR ResNet-18 (11.17 M parameters) in eval mode, pre-trained by SimSiam on CIFAR-10 or new. RGB images
    float32 [B, 3, H, W] in [0, 1], H and W at least 8, normalized by mean (0.4914, 0.4822, 0.4465) and std (0.2470,
    0.2435, 0.2616) -> features [B, 512]. Raises FileNotFoundError without weights, ValueError for others."""
    return _load("simsiam_resnet18_cifar10", 64, pretrained, folder)


def simsiam_resnet18_w32_cifar10(pretrained=True, folder=_WEIGHTS):
    """The same at half the width (2.80 M), trained two hours on two CPU cores -> features [B, 256]."""
    return _load("simsiam_resnet18_w32_cifar10", 32, pretrained, folder)


def simsiam_resnet18_w16_cifar10(pretrained=True, folder=_WEIGHTS):
    """The same at a quarter of the width (0.70 M), trained two hours on a CPU core -> features [B, 128]."""
    return _load("simsiam_resnet18_w16_cifar10", 16, pretrained, folder)


def _load(name, width, pretrained, folder):
    if not pretrained:
        return _resnet18(width).eval()
    path = _os.path.join(folder, f"{name}.pt")
    if not _os.path.exists(path):
        raise FileNotFoundError(f"{path}: not released yet; pretrained=False gives the network with new weights")
    with open(path, "rb") as file, open(_os.path.join(folder, f"{name}.json"), encoding="utf-8") as about:
        if _hashlib.sha256(file.read()).hexdigest() != _json.load(about)["sha256"]:
            raise ValueError(f"{path}: its SHA-256 is not the published one")
    return _load_backbone(path, width=width, verbose=False)
