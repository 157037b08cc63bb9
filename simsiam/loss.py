"""The symmetric loss (paper, Eq. 1 and 2) and the collapse monitor (Sec. 4.1)."""
import torch.nn.functional as F


def negative_cosine(p, z):
    """D(p, z): minus the cosine similarity of p and z, both [B, dim]; the batch's mean, float32."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def simsiam_loss(p1, p2, z1, z2):
    """L = D(p1, z2) / 2 + D(p2, z1) / 2, a float32 scalar in [-1, 1]; collapsed and perfect are both -1.

    All are [B, dim]. z1 and z2 are targets: SimSiam.forward returns them detached.
    """
    return 0.5 * negative_cosine(p1, z2) + 0.5 * negative_cosine(p2, z1)


def feature_std(z):
    """Spread of the outputs z [B, dim], B >= 2: the std of l2-normalized z over the batch,
    averaged over channels, times sqrt(dim). About 1 for a healthy network, 0 for a collapsed one."""
    z = F.normalize(z.float(), dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5
