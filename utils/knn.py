"""Features of a frozen backbone: k-nearest-neighbor classification and geometry. The bank holds the
l2-normalized features of all training images; 200 of them vote with weight exp(similarity / 0.1)."""
import statistics

import torch
import torch.nn.functional as F

from utils.augment import MEAN, STD, normalize
from utils.cli import bar

K = 200
TEMPERATURE = 0.1
RANKED = 10_000            # images for the effective rank, at most
SIMILARITIES = 25_000_000  # at a time: 100 MB, 500 queries with a bank of 50,000
CONFUSION_CLASSES = 200    # more make a confusion matrix that nobody reads, of many MB
ACTIVATION = 32_768_000    # values at a time: 131 MB, 500 images of 32 pixels at width 64


def batch_size(backbone, images):
    """How many images [N, 3, H, W] a CIFAR ResNet takes at a time, 1 to 500."""
    values = images.shape[2] * images.shape[3] * backbone.feature_dim // 8  # of the largest activation
    return max(1, min(500, ACTIVATION // values))


@torch.no_grad()
def extract_features(backbone, images, autocast, mean=MEAN, std=STD, check=lambda: None):
    """Features of images without augmentation, in eval mode: uint8, or float in [0, 1], [N, 3, H, W] ->
    float32 [N, feature_dim]. autocast makes its context; check is called before each batch, may raise."""
    was_training, device = backbone.training, next(backbone.parameters()).device
    features, batches = [], images.split(batch_size(backbone, images))
    backbone.eval()
    try:
        for batch in bar(batches, desc="features", unit="batch", leave=False, delay=2):
            check()
            x = normalize(batch.to(device), mean, std).contiguous(memory_format=torch.channels_last)
            with autocast():
                features.append(backbone(x).float())
    finally:
        backbone.train(was_training)
    return torch.cat(features)


def nearest(queries, bank, k):
    """Cosine similarities and indices [Q, k] of the k most similar rows of the bank [N, D] to queries [Q, D]."""
    norms = bank.norm(dim=1).clamp(min=1e-12)
    bank = bank.T.clone(memory_format=torch.contiguous_format)  # [D, N]
    bank /= norms  # in place: the one copy
    chunks = F.normalize(queries, dim=1).split(max(1, SIMILARITIES // bank.shape[1]))
    found = [(chunk @ bank).topk(k, dim=1) for chunk in chunks]
    return tuple(torch.cat(parts) for parts in zip(*found))


def vote(similarities, neighbors, temperature, num_classes):
    """Predicted classes [Q] from similarities and classes of the neighbors, [Q, k] each."""
    # Relative to the largest, a common factor of a query's votes: float32 holds any temperature.
    weights = ((similarities - similarities[:, :1]) / temperature).exp()
    predicted, rows = [], max(1, SIMILARITIES // num_classes)
    for part, classes in zip(weights.split(rows), neighbors.split(rows)):
        votes = part.new_zeros(len(part), num_classes)
        predicted.append(votes.scatter_add_(1, classes, part).argmax(dim=1))
    return torch.cat(predicted)


@torch.no_grad()
def knn_predict(queries, bank, labels, k, temperature, num_classes):
    """Predicted classes, int64 [Q], of queries float [Q, D] by a vote of the k nearest rows of the
    bank float [N, D], of classes int64 [N]. Raises ValueError unless 1 <= k <= N."""
    if not 1 <= k <= len(bank):
        raise ValueError(f"k is {k}, but the bank has {len(bank)} rows")
    similarities, indices = nearest(queries, bank, k)
    return vote(similarities, labels[indices], temperature, num_classes)


@torch.no_grad()
def monitor(backbone, data, autocast, check=lambda: None):
    """Metrics: effective_rank of the features of the first RANKED training images and, if the data
    have classes, top-1 accuracies on all test images in percent, knn1 and knn200 (k at most N)."""
    images, labels = data.labeled() if data.has_classes else (data.train_images[:RANKED], None)
    bank = extract_features(backbone, images, autocast, check=check)
    rank = effective_rank(bank[:RANKED])
    if labels is None:
        return {"effective_rank": rank}
    queries = extract_features(backbone, data.test_images, autocast, check=check)
    similarities, indices = nearest(queries, bank, min(K, len(bank)))
    predicted = vote(similarities, labels[indices], TEMPERATURE, len(data.classes))
    knn1, knn200 = (accuracy(each, data.test_labels) for each in (labels[indices[:, 0]], predicted))
    return {"knn1": knn1, "knn200": knn200, "effective_rank": rank}


def accuracy(predicted, labels):
    """Share of correct predictions in percent."""
    return 100 * (predicted == labels).double().mean().item()


def top_k(logits, labels, k):
    """Percentage of rows whose class is among the k largest logits: [N, C], labels int64 [N]."""
    return 100 * (logits.topk(k).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(predicted, labels, num_classes):
    """Counts int64 [C, C] on the CPU: true classes in rows, predicted ones in columns."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, -1).cpu()


def of_classes(predicted, labels, classes):
    """Accuracies in percent: class_top1, by name, None for a class without images; their mean,
    balanced_accuracy; for at most CONFUSION_CLASSES classes the confusion matrix, in lists."""
    total = torch.bincount(labels, minlength=len(classes)).tolist()
    correct = torch.bincount(labels[predicted == labels], minlength=len(classes)).tolist()
    shares = [100 * right / count if count else None for right, count in zip(correct, total)]
    balanced = statistics.fmean(share for share in shares if share is not None)
    found = {"balanced_accuracy": balanced, "class_top1": dict(zip(classes, shares))}
    if len(classes) <= CONFUSION_CLASSES:
        found["confusion"] = confusion_matrix(predicted, labels, len(classes)).tolist()
    return found


def spectrum(features):
    """Eigenvalues of the covariance of features float [N, D], largest first: float64 [D] on the CPU.
    Collapsed dimensions have 0 (Jing et al., arXiv 2110.09348, Sec. 3)."""
    covariance = torch.cov(features.double().cpu().T).view(features.shape[1], -1)
    return torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)


def effective_rank(features):
    """Number of dimensions in use, 1 to min(N, D) (RankMe, arXiv 2210.02885): exp of the entropy of the
    normalized singular values of raw features float [N, D]. 0 if all are 0, or one is not finite."""
    features = features.double().cpu()
    if not features.isfinite().all() or not features.any():
        return 0.0
    singular = torch.linalg.eigvalsh(features.T @ features).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()
