"""The loss (paper, Eq. 1 and 2), its variants (Sec. 4.5 and 4.6) and the collapse monitor (Sec. 4.1)."""
import torch
import torch.nn.functional as F


def negative_cosine(p, z):
    """D(p, z): negative cosine similarity of p and z, [B, dim] each; mean over the batch, float32."""
    return -F.cosine_similarity(p.float(), z.float(), dim=1).mean()


def cross_entropy(p, z):
    """D(p, z) = -softmax(z) · log softmax(p), softmax over the channels of [B, dim] (Sec. 4.5)."""
    return F.cross_entropy(p.float(), z.float().softmax(dim=1))


def simsiam_loss(*outputs, distance=negative_cosine):
    """L = D(p1, z2) / 2 + D(p2, z1) / 2 of outputs p1, p2, z1, z2, [B, dim] each: float32 scalar, in
    [-1, 1] for the negative cosine. Of p1 to pN and z1 to zN the mean over i of D(p_i, the mean of the
    other z) (FastSiam, Pototzky et al. 2022). z are targets, which SimSiam.forward returns detached."""
    n = len(outputs) // 2
    p, z = outputs[:n], outputs[n:]
    others = [torch.stack(z[:i] + z[i + 1:]).mean(dim=0) for i in range(n)]
    return sum(map(distance, p, others)) / n


def asymmetric_loss(*outputs, distance=negative_cosine):
    """L = D(p1, z2) of outputs p1, p2, z1, z2 (Sec. 4.6); of more views, the mean over pairs of them: of
    four, D(p1, z2) / 2 + D(p3, z4) / 2, the paper's "asymmetric 2x"."""
    n = len(outputs) // 2
    p, z = outputs[:n:2], outputs[n + 1::2]  # the first views of the pairs; the second
    return sum(distance(*pair) for pair in zip(p, z, strict=True)) / len(p)


def feature_std(z):
    """Std of l2-normalized outputs z [B, dim] over the batch, averaged over channels, times sqrt(dim)
    (Sec. 4.1): about 1 for a healthy network, 0 for constant outputs. Behind a batch norm, which keeps
    the mean at 0, a collapse gives 2 / sqrt(B): all outputs but one point the same way."""
    z = F.normalize(z.float(), dim=1)
    return z.std(dim=0).mean() * z.shape[1] ** 0.5


DISTANCES = {"cosine": negative_cosine, "cross_entropy": cross_entropy}
LOSSES = {"symmetric": simsiam_loss, "asymmetric": asymmetric_loss}
