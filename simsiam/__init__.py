"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads, loss, and backbones from checkpoints. Imports torch only."""
from simsiam.loss import (
    DISTANCES, LOSSES, asymmetric_loss, cross_entropy, feature_std, negative_cosine, simsiam_loss,
)
from simsiam.model import HEAD_BN, PREDICTORS, SimSiam
from simsiam.resnet import ARCHS, resnet18, resnet34, resnet50
from simsiam.weights import load_backbone, load_tensors, read_file

__all__ = [
    "ARCHS", "DISTANCES", "HEAD_BN", "LOSSES", "PREDICTORS", "SimSiam", "asymmetric_loss", "cross_entropy", "feature_std", "load_backbone",
    "load_tensors", "negative_cosine", "read_file", "resnet18", "resnet34", "resnet50", "simsiam_loss",
]
