"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads, loss, and backbones out of files. Needs torch only."""
from simsiam.loss import feature_std, simsiam_loss
from simsiam.model import SimSiam
from simsiam.resnet import ARCHS, resnet18, resnet34, resnet50
from simsiam.weights import is_plain, load_backbone, load_tensors

__all__ = [
    "ARCHS", "SimSiam", "feature_std", "is_plain", "load_backbone", "load_tensors", "resnet18", "resnet34", "resnet50", "simsiam_loss",
]
