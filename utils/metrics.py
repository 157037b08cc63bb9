"""How well a classifier does, and the geometry of features."""
import math

import torch
import torch.nn.functional as F

PAIRS = 25_000_000  # at a time: 100 MB
COLLAPSE_STD = 0.1  # of feature_std, where nothing keeps it from 0


def collapse_std(batch_size, head_bn="default"):
    """Below this, feature_std (healthy: about 1) means that the outputs are all but equal. With a batch norm at the projector's end
    it is 2 / sqrt(batch_size) when all outputs but one point the same way, 2 sqrt(2 / batch_size) when all but two do, so that it
    goes by the batch; in batches of 11 and less it cannot tell."""
    if head_bn in ("none", "hidden"):
        return COLLAPSE_STD
    return max(COLLAPSE_STD, min(3 / math.sqrt(batch_size), 0.6))


def top_k(logits, labels, k):
    """The share of rows in percent whose class is among the k largest logits: logits [N, C], labels int64 [N]."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(predicted, labels, num_classes):
    """How often each class was taken for each: int64 [C, C], true classes in rows, on the CPU."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).cpu()


def class_accuracies(confusion):
    """The accuracy on each class's pictures in percent, [C]; NaN for a class without pictures."""
    return 100 * confusion.diagonal() / confusion.sum(dim=1)


def alignment(first, second):
    """How near the features of two views of a picture are: the mean squared distance of l2-normalized features float
    [N, D], row by row. 0 to 4, less is nearer (Wang & Isola, arXiv 2005.10242, Sec. 4.1, alpha = 2)."""
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(dim=1).double().mean().item()


def uniformity(features):
    """How evenly l2-normalized features float [N, D] fill the sphere: log of the mean over all pairs of exp(-2 distance^2).
    0 where all are one, less is more even (Wang & Isola, Sec. 4.1.2, t = 2). Raises ValueError for fewer than 2 rows."""
    count = len(features)
    if count < 2:
        raise ValueError(f"{count} pictures have no pairs")
    features = F.normalize(features, dim=1)
    lengths = features.square().sum(dim=1)  # 1, or 0 for a row of zeros
    total = 0.0
    for first in range(0, count, max(1, PAIRS // count)):
        rows = slice(first, first + max(1, PAIRS // count))
        squares = (lengths[rows, None] + lengths - 2 * features[rows] @ features.T).clamp_(min=0)
        squares[:, rows].fill_diagonal_(math.inf)  # a row's pair with itself does not count
        total += squares.mul_(-2).exp_().sum(dtype=torch.float64).item()
    return math.log(total / (count * (count - 1)))


def spectrum(features):
    """The eigenvalues of the covariance of features float [N, D], largest first: float64 [D], on the CPU. Those of collapsed
    dimensions are 0 (Jing et al., arXiv 2110.09348, Sec. 3)."""
    features = features.double().cpu()
    return torch.linalg.eigvalsh(torch.cov(features.T).view(features.shape[1], -1)).flip(0).clamp(min=0)


def effective_rank(eigenvalues):
    """How many dimensions N features of D numbers use: exp of the entropy of the shares of their covariance's eigenvalues, 1 to
    min(D, N - 1); 0 for none (Roy & Vetterli, 2007; of eigenvalues here, not of singular values)."""
    if eigenvalues.sum() == 0:
        return 0.0
    shares = eigenvalues / eigenvalues.sum()
    return torch.special.entr(shares).sum().exp().item()


def principal_components(features, count=2):
    """The features float [N, D] along the `count` directions in which they vary most: float64 [N, count] on the CPU, and the
    shares of the variance, [count]. The signs are such that each direction's largest entry is positive."""
    centered = features.double().cpu()
    centered = centered - centered.mean(dim=0)
    values, vectors = torch.linalg.eigh(centered.T @ centered)
    vectors = vectors.flip(1)[:, :count]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True)).sign()
    return centered @ vectors, (values.flip(0) / values.sum().clamp(min=1e-300))[:count]
