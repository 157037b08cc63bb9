"""Backbone features of a whole data set, in evaluation mode."""
import torch
from tqdm import tqdm

from utils.augment import normalize


@torch.no_grad()
def extract_features(backbone, images, autocast, batch_size=500):
    """Features of every picture, none dropped: uint8 [N, 3, H, W] -> float32 [N, feature_dim].

    The backbone sees the pictures without augmentation, in evaluation mode, and is left in the mode it
    came in. Pictures on another device than the backbone go there chunk by chunk. autocast: the context manager of utils.device.autocast that sets the precision.
    """
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    features = []
    chunks = images.split(batch_size)
    for chunk in tqdm(chunks, desc="features", unit="batch", leave=False, delay=2, disable=None):
        with autocast():
            features.append(backbone(normalize(chunk.to(device)).contiguous(memory_format=torch.channels_last)).float())
    backbone.train(was_training)
    return torch.cat(features)
