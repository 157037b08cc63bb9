"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads, loss, and backbones out of files. Needs torch only."""
from simsiam.ablations import PREDICTORS, make_simsiam
from simsiam.loss import asymmetric_loss, cross_entropy, feature_std, negative_cosine, simsiam_loss
from simsiam.model import HEAD_BN, SimSiam
from simsiam.resnet import ARCHS, resnet18, resnet34, resnet50
from simsiam.weights import is_plain, load_backbone, load_tensors

__all__ = [
    "ARCHS", "HEAD_BN", "PREDICTORS", "SimSiam", "asymmetric_loss", "cross_entropy", "feature_std", "is_plain", "load_backbone", "load_tensors",
    "make_simsiam", "negative_cosine", "resnet18", "resnet34", "resnet50", "simsiam_loss",
]
