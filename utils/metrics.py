"""Collapse threshold, classification metrics, and the geometry of features."""
import math

import torch
import torch.nn.functional as F

COLLAPSE_STD = 0.1   # of feature_std, where no batch norm keeps it above 0
COLLAPSE_EPOCHS = 3  # in a row below the threshold, before the warning


def collapse_std(batch_size, head_bn="default"):
    """The feature_std (healthy: about 1) below which the outputs have collapsed. Behind a batch norm, 2 / sqrt(B) means
    that all outputs but one point the same way, 2 sqrt(2 / B) that all but two do: hence 3 / sqrt(B), at most 0.6."""
    if head_bn in ("none", "hidden"):
        return COLLAPSE_STD
    return max(COLLAPSE_STD, min(3 / math.sqrt(batch_size), 0.6))


def collapse_warning(records, batch_size, head_bn):
    """A warning, once, when std has been below collapse_std for COLLAPSE_EPOCHS epochs of the log; else None."""
    least = collapse_std(batch_size, head_bn)
    low = [record["std"] < least for record in records if "std" in record]
    if len(low) < COLLAPSE_EPOCHS or not all(low[-COLLAPSE_EPOCHS:]) or any(low[:-COLLAPSE_EPOCHS][-1:]):
        return None
    return (f"epoch {records[-1]['epoch']}: std {records[-1]['std']:.4f}, for {COLLAPSE_EPOCHS} epochs below "
            f"{least:.2g} (healthy: about 1): the outputs have collapsed, whatever the loss")


def top_k(logits, labels, k):
    """Percentage of rows whose class is among the k largest logits: logits [N, C], labels int64 [N]."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(predicted, labels, num_classes):
    """Counts int64 [C, C] on the CPU: true classes in rows, predicted ones in columns."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(2 * [num_classes]).cpu()


def class_accuracies(confusion):
    """Accuracy of each class in percent, a list; None for a class without images."""
    counts = zip(confusion.diagonal().tolist(), confusion.sum(dim=1).tolist())
    return [100 * correct / total if total else None for correct, total in counts]


def alignment(first, second):
    """Mean squared distance of the l2-normalized features of two views, float [N, D] each: 0 to 4, lower is closer
    (Wang & Isola, arXiv 2005.10242, Sec. 4.1, alpha = 2)."""
    return (F.normalize(first, dim=1) - F.normalize(second, dim=1)).square().sum(dim=1).double().mean().item()


def uniformity(features):
    """log of the mean over all pairs of exp(-2 distance^2) of l2-normalized features float [N, D]: 0 if all are equal,
    lower is more uniform (Wang & Isola, Sec. 4.1.2, t = 2). Takes 2 N^2 bytes."""
    return torch.pdist(F.normalize(features, dim=1)).square_().mul_(-2).exp_().mean(dtype=torch.float64).log().item()


def spectrum(features):
    """Eigenvalues of the covariance of features float [N, D], largest first: float64 [D], on the CPU. Collapsed
    dimensions have 0 (Jing et al., arXiv 2110.09348, Sec. 3)."""
    features = features.double().cpu()
    return torch.linalg.eigvalsh(torch.cov(features.T).view(features.shape[1], -1)).flip(0).clamp(min=0)


def effective_rank(features):
    """Number of dimensions in use, as RankMe counts them (Garrido et al., arXiv 2210.02885): exp of the entropy of the
    singular values, divided by their sum, of features float [N, D] as they are, neither centered nor normalized: 1 to
    min(N, D). 0 if all features are 0, or one is not finite."""
    features = features.double().cpu()
    if not features.isfinite().all() or not features.any():
        return 0.0
    singular = torch.linalg.eigvalsh(features.T @ features).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum()).sum().exp().item()
