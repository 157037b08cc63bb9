"""The loss (paper, Eq. 1 and 2), its variants (Sec. 4.5 and 4.6) and the collapse monitor (Sec. 4.1)."""
import torch.nn.functional as F


def negative_cosine(p, z):
    """D(p, z): negative cosine similarity of p and z, [B, dim] each; float32 scalar, mean over the batch."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p, z):
    """D(p, z) = -softmax(z) · log softmax(p), softmax over the channels of [B, dim]; float32 scalar (Sec. 4.5)."""
    return F.cross_entropy(p.float(), z.float().softmax(dim=1))


def simsiam_loss(p1, p2, z1, z2, distance=negative_cosine):
    """L = D(p1, z2) / 2 + D(p2, z1) / 2: float32 scalar, in [-1, 1] for the negative cosine. All inputs are [B, dim];
    z1 and z2 are targets, which SimSiam.forward returns detached."""
    return 0.5 * distance(p1, z2) + 0.5 * distance(p2, z1)


def asymmetric_loss(p1, p2, z1, z2, distance=negative_cosine):
    """L = D(p1, z2): only the first view predicts the second (Sec. 4.6)."""
    return distance(p1, z2)


def feature_std(z):
    """Std of l2-normalized outputs z [B, dim] over the batch, averaged over channels, times sqrt(dim) (Sec. 4.1). About
    1 for a healthy network, 0 for constant outputs. Behind a batch norm, which keeps the mean at 0, a collapse is
    2 / sqrt(B) instead: all outputs but one point the same way."""
    z = F.normalize(z.float(), dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5


DISTANCES = {"cosine": negative_cosine, "cross_entropy": cross_entropy}  # Sec. 4.5
LOSSES = {  # Sec. 4.6; asymmetric_2x is the mean of the asymmetric loss over two pairs of views
    "symmetric": simsiam_loss, "asymmetric": asymmetric_loss, "asymmetric_2x": asymmetric_loss,
}
