"""SimSiam (Chen & He, arXiv 2011.10566): backbone, heads, loss, backbones from checkpoints."""
from simsiam.loss import (
    DISTANCES, LOSSES, asymmetric_loss, cross_entropy, feature_std, negative_cosine, simsiam_loss)
from simsiam.model import HEAD_BN, PREDICTORS, SimSiam
from simsiam.resnet import ARCHS, resnet18, resnet34, resnet50
from simsiam.weights import load_backbone, load_model, read_file
