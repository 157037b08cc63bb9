"""The symmetric loss (paper, Eq. 1 and 2), its variants (Sec. 4.5 and 4.6) and the collapse monitor (Sec. 4.1)."""
import torch.nn.functional as F


def negative_cosine(p, z):
    """D(p, z): minus the cosine similarity of p and z, both [B, dim]; the batch's mean, float32."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p, z):
    """D(p, z) = -softmax(z) · log softmax(p), both softmaxes over the channels of [B, dim]; the batch's mean, float32 (Sec. 4.5)."""
    return F.cross_entropy(p.float(), z.float().softmax(dim=1))


def simsiam_loss(p1, p2, z1, z2, distance=negative_cosine):
    """L = D(p1, z2) / 2 + D(p2, z1) / 2, a float32 scalar in [-1, 1]; collapsed and perfect are both -1.

    All are [B, dim]. z1 and z2 are targets: SimSiam.forward returns them detached. distance: D; cross_entropy is at least 0.
    """
    return 0.5 * distance(p1, z2) + 0.5 * distance(p2, z1)


def asymmetric_loss(p1, p2, z1, z2, distance=negative_cosine):
    """L = D(p1, z2): the first view predicts the second, and not the other way round (Sec. 4.6)."""
    return distance(p1, z2)


def feature_std(z):
    """Spread of the outputs z [B, dim], B >= 2: the std of l2-normalized z over the batch,
    averaged over channels, times sqrt(dim). About 1 for a healthy network, 0 for a collapsed one. Where a batch norm ends the
    projector it is then 2 / sqrt(B) instead: the batch's mean is 0, so the outputs cannot all be one, and all but one have
    the same direction, that one the opposite."""
    z = F.normalize(z.float(), dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5
