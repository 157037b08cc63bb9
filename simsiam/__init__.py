"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads and loss. Needs torch only."""
from simsiam.loss import feature_std, simsiam_loss
from simsiam.model import SimSiam
from simsiam.resnet import resnet18, resnet34, resnet50

__all__ = ["SimSiam", "feature_std", "resnet18", "resnet34", "resnet50", "simsiam_loss"]
