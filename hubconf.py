"""torch.hub entries. A local clone does as well as a repository:

    backbone = torch.hub.load(".", "simsiam_resnet18_cifar10", source="local", pretrained=True)

Each takes a folder too, whose NAME.pt and NAME.json stand for those in this copy's weights/.
"""
import hashlib as _hashlib
import json as _json
import os as _os

from simsiam import load_backbone as _load_backbone
from simsiam import resnet18 as _resnet18

dependencies = ["torch"]
_WEIGHTS = _os.path.join(_os.path.dirname(_os.path.abspath(__file__)), "weights")


def simsiam_resnet18_cifar10(pretrained=True, folder=None):
    """CIFAR ResNet-18 (11.17 M parameters), pre-trained by SimSiam on CIFAR-10; pretrained=False: new weights.

    Returns it in evaluation mode, in float32, on the CPU: pictures float32 [B, 3, H, W], H and W at least 8 and best 32,
    -> features [B, 512]. Pictures are RGB in [0, 1], normalized by channel:

        >>> import torch
        >>> mean = torch.tensor((0.4914, 0.4822, 0.4465)).view(3, 1, 1)
        >>> std = torch.tensor((0.2470, 0.2435, 0.2616)).view(3, 1, 1)
        >>> pictures = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)  # yours
        >>> assert pictures.dtype == torch.uint8 and pictures.shape[1:] == (3, 32, 32)
        >>> x = (pictures / 255 - mean) / std
        >>> assert -2.1 < x.min() and x.max() < 2.2  # else they were no RGB in [0, 1], or normalized twice

    Raises FileNotFoundError where this copy has no weights, and ValueError if their SHA-256 is not the one released.
    """
    return _load("simsiam_resnet18_cifar10", 64, pretrained, folder)


def simsiam_resnet18_w16_cifar10(pretrained=True, folder=None):
    """The same with a quarter of the channels, 16 to 128 (0.70 M parameters), from a short run of a CPU's size:
    -> features [B, 128]. For laptops and lessons; the .json in weights/ has its accuracies."""
    return _load("simsiam_resnet18_w16_cifar10", 16, pretrained, folder)


def _load(name, width, pretrained, folder):
    if not pretrained:
        return _resnet18(width).eval()
    path, about = (_os.path.join(folder or _WEIGHTS, f"{name}.{ending}") for ending in ("pt", "json"))
    if not (_os.path.exists(path) and _os.path.exists(about)):
        raise FileNotFoundError(
            f"no {path} with its .json: they have not been released yet; pretrained=False has the network without them"
        )
    with open(path, "rb") as file, open(about) as text:
        digest, released = _hashlib.sha256(file.read()).hexdigest(), _json.load(text)["sha256"]
    if digest != released:
        raise ValueError(f"{path}: its SHA-256 is {digest}, the released file's {released}; fetch it again")
    return _load_backbone(path, width=width, verbose=False)
