"""The linear classifier: its fit by L-BFGS, and its accuracies."""
import torch
import torch.nn.functional as F

from utils import cli, knn


def fit_lbfgs(classifier, features, labels, weight_decay, check=lambda: None):
    """Minimize cross-entropy + weight_decay / 2 * |W|^2 with L-BFGS in float64 until no entry of the
    gradient exceeds 1e-6; W are weights and biases on standardized features. Returns the cross-entropy
    and the number of iterations; check is called before every 20."""
    features = features.double()
    mean, std = features.mean(dim=0), features.std(dim=0).clamp(min=1e-6)
    features = (features - mean) / std
    weight, bias = (torch.zeros_like(each, dtype=torch.float64, requires_grad=True)
                    for each in (classifier.weight, classifier.bias))
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=20, history_size=20, tolerance_grad=0,
                                  tolerance_change=0, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        loss = F.cross_entropy(F.linear(features, weight, bias), labels)
        loss = loss + weight_decay / 2 * (weight.square().sum() + bias.square().sum())
        loss.backward()
        return loss

    for _ in cli.bar(range(100), desc="L-BFGS", leave=False):
        check()
        optimizer.step(objective)
        objective()  # the line search may have computed the gradient last at another point
        if max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-6:
            break
    else:
        cli.warn(f"L-BFGS has not converged at weight decay {weight_decay:g}")
    with torch.no_grad():
        loss = F.cross_entropy(F.linear(features, weight, bias), labels).item()
        classifier.weight.copy_(weight / std)  # for features that are not standardized
        classifier.bias.copy_(bias - weight @ (mean / std))
    return loss, optimizer.state[weight]["n_iter"]


@torch.no_grad()
def test(classifier, features, labels):
    """Test accuracies for the log: top-1, and top-5 for more than 5 classes, in percent."""
    logits = classifier(features)
    return {f"test_top{k}": knn.top_k(logits, labels, k) for k in (1, 5) if k < logits.shape[1]}
