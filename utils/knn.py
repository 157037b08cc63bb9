"""Weighted k-nearest-neighbor classification of backbone features: the monitor of pre-training.

Features are l2-normalized; every training picture is in the bank and every test picture is classified.
k = 200 neighbors vote with weight exp(similarity / 0.1); k = 1 takes the nearest one's class.
"""
import torch
import torch.nn.functional as F

from utils.features import extract_features

K = 200
TEMPERATURE = 0.1
SIMILARITIES = 25_000_000  # at a time: 100 MB, 500 queries with a bank of 50,000


def nearest(queries, bank, k):
    """Yield, for chunks of the queries in order, the cosine similarities and the bank indices of the k
    nearest bank rows, each [chunk, k], most similar first."""
    bank = F.normalize(bank, dim=1).T.contiguous()  # [D, N]
    for chunk in F.normalize(queries, dim=1).split(max(1, SIMILARITIES // bank.shape[1])):
        yield (chunk @ bank).topk(k, dim=1)


def vote(similarities, neighbors, temperature, num_classes):
    """Classes [Q] from similarities and classes of the neighbors, each [Q, k]."""
    # Less the largest, which every query's votes share as a factor: float32 holds any temperature.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    votes = weights.new_zeros(len(weights), num_classes)
    return votes.scatter_add_(1, neighbors, weights).argmax(dim=1)


@torch.no_grad()
def knn_predict(queries, bank, labels, k, temperature, num_classes):
    """Classes [Q], int64, of queries float [Q, D] by a vote of the k nearest rows of bank float [N, D],
    whose classes are labels int64 [N]. Raises ValueError unless 1 <= k <= N."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank has {len(bank)} rows")
    return torch.cat([
        vote(similarities, labels[indices], temperature, num_classes)
        for similarities, indices in nearest(queries, bank, k)
    ])


@torch.no_grad()
def knn_accuracy(backbone, data, autocast):
    """Top-1 accuracies on all test pictures of `data`, in percent, for k = 1 and k = 200 (or the whole
    bank where it is smaller), both from one search."""
    bank = extract_features(backbone, data.train_images, autocast)
    queries = extract_features(backbone, data.test_images, autocast)
    predicted = [
        (data.train_labels[indices[:, 0]],
         vote(similarities, data.train_labels[indices], TEMPERATURE, len(data.classes)))
        for similarities, indices in nearest(queries, bank, min(K, len(bank)))
    ]
    return tuple(
        100 * (torch.cat(classes) == data.test_labels).double().mean().item() for classes in zip(*predicted)
    )
