"""Features of a frozen backbone: of all pictures as they are, and of random crops, epoch by epoch."""
import torch

from utils.augment import MEAN, STD, crop_flip, draw_views, epoch_generator, normalize
from utils.data import batches
from utils.progress import Bar

# Batches that go through the backbone at a time on a GPU: it is frozen, so no batch depends on the one before.
AHEAD = 8


@torch.no_grad()
def extract_features(backbone, images, autocast, mean=MEAN, std=STD, batch_size=500):
    """Features of every picture, none dropped: uint8 [N, 3, H, W] -> float32 [N, feature_dim].

    The backbone sees the pictures without augmentation, in evaluation mode, and is left in the mode it
    came in. Pictures on another device than the backbone go there chunk by chunk. autocast: the context manager of
    utils.device.autocast that sets the precision. mean, std: of each channel, to normalize the pictures by.
    """
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    features = []
    chunks = images.split(batch_size)
    for chunk in Bar(chunks, desc="features", unit="batch", leave=False, delay=2):
        with autocast():
            features.append(backbone(normalize(chunk.to(device), mean, std).contiguous(memory_format=torch.channels_last)).float())
    backbone.train(was_training)
    return torch.cat(features)


def make_augmented_features(backbone, autocast, mean, std, compiled):
    """A function from pictures uint8 [B, 3, H, W] and their Draws to the features of random crops and flips of them,
    float32 [B, feature_dim]. The backbone is in evaluation mode. compiled: whether by torch.compile."""

    def augmented_features(images, draws):
        views = normalize(crop_flip(images, draws), mean, std).contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), autocast():
            return backbone(views).float()

    return torch.compile(augmented_features, dynamic=False) if compiled else augmented_features


def feature_batches(features_of, data, seed, epoch, first, batch_size, scale, device):
    """Yield the features, float32 [<= batch_size, feature_dim], and labels of an epoch's batches from number `first` on: all
    training pictures in random order, the last batch smaller. A function of (seed, epoch).

    features_of: the features of all training pictures, [N, feature_dim], or the function of make_augmented_features;
    then scale has the bounds of the crop's share of the picture's area.
    """
    size = len(data.train_labels)
    generator = epoch_generator(seed, epoch, device)
    order = torch.randperm(size, generator=generator, device=device)
    rest = torch.arange(first * batch_size, size, device=device)
    if torch.is_tensor(features_of):
        for rows in rest.split(batch_size):
            yield features_of[order[rows]], data.train_labels[order[rows]]
        return
    draws = draw_views(size, generator, *data.train_images.shape[2:], scale=scale)
    chunk = batch_size * (AHEAD if device.type == "cuda" else 1)
    for rows, images in zip(rest.split(chunk), batches(data.train_images, order[rest], chunk, device)):
        features, labels = features_of(images, draws.rows(rows)), data.train_labels[order[rows]]
        yield from zip(features.split(batch_size), labels.split(batch_size))
