"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads and loss. Needs torch only."""
from simsiam.loss import feature_std, simsiam_loss
from simsiam.model import SimSiam
from simsiam.resnet import ARCHS, resnet18, resnet34, resnet50

__all__ = ["ARCHS", "SimSiam", "feature_std", "resnet18", "resnet34", "resnet50", "simsiam_loss"]
