"""How well a classifier does: accuracies and the confusion of classes."""
import torch


def top_k(logits, labels, k):
    """The share of rows in percent whose class is among the k largest logits: logits [N, C], labels int64 [N]."""
    return 100 * (logits.topk(k, dim=1).indices == labels[:, None]).any(dim=1).double().mean().item()


def confusion_matrix(predicted, labels, num_classes):
    """How often each class was taken for each: int64 [C, C], true classes in rows, on the CPU."""
    return torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view(num_classes, num_classes).cpu()


def class_accuracies(confusion):
    """The accuracy on each class's pictures in percent, [C]; NaN for a class without pictures."""
    return 100 * confusion.diagonal() / confusion.sum(dim=1)
