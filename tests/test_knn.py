"""kNN against brute force in plain Python and numpy."""
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

import simsiam
from utils.augment import MEAN, STD
from utils.device import autocast
from utils.knn import batch_size, extract_features, knn_predict, monitor

FP32 = autocast(torch.device("cpu"), "fp32")


def brute_force(queries, bank, labels, k, temperature):
    queries, bank = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, bank))
    predicted = []
    for query in queries:
        similarities, votes = bank @ query, defaultdict(float)
        for i in np.argsort(-similarities)[:k]:
            votes[int(labels[i])] += math.exp(similarities[i] / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


@pytest.mark.parametrize("k", [1, 7, 200, 300])
def test_knn_predict_matches_brute_force(k, monkeypatch):
    monkeypatch.setattr("utils.knn.SIMILARITIES", 500 * 300)
    random = np.random.default_rng(0)
    labels = random.integers(10, size=300)
    bank = random.normal(size=(10, 16))[labels] + 2 * random.normal(size=(300, 16))
    queries = 3 * random.normal(size=(1203, 16))  # several chunks, the last one smaller
    predicted = knn_predict(*map(torch.tensor, (queries, bank, labels)), k, 0.1, 10)
    assert predicted.dtype == torch.int64 and predicted.tolist() == brute_force(queries, bank, labels, k, 0.1)


def test_low_temperatures_do_not_overflow_and_k_is_in_the_bank():
    queries, bank, labels = torch.eye(4) + 0.5, torch.eye(4).repeat(5, 1), torch.arange(4).repeat(5)
    assert knn_predict(queries, bank, labels, 10, 0.001, 4).tolist() == [0, 1, 2, 3]
    for k in (0, 21):
        with pytest.raises(ValueError, match="20"):
            knn_predict(queries, bank, labels, k, 0.1, 4)


@pytest.mark.parametrize("k", [1, 200])
def test_accuracy_counts_agreement_with_brute_force_on_every_test_image(shapes, k):
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(3072))  # in eval mode: pixels as features
    backbone.feature_dim = 3072
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    images = shapes.train_images, shapes.test_images[:333]
    bank, queries = (((x / 255 - mean) / std).flatten(1).numpy() for x in images)
    labels = torch.tensor(brute_force(queries, bank, shapes.train_labels.numpy(), k, 0.1))
    labels[:100] = -1
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    data = shapes._replace(test_images=images[1], test_labels=labels)
    assert abs(monitor(backbone, data, FP32)[f"knn{k}"] - 100 * 233 / 333) < 0.4  # one image: rounding may swap two
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.training


@pytest.mark.parametrize("arch, width, size, expected", [
    ("resnet18", 64, 32, 500), ("resnet18", 4, 32, 500), ("resnet50", 16, 32, 500), ("resnet18", 128, 32, 250),
    ("resnet50", 64, 32, 125), ("resnet18", 64, 224, 10), ("resnet50", 64, 600, 1)])
def test_a_batch_keeps_the_largest_activation_in_bounds(arch, width, size, expected):
    with torch.device("meta"):
        backbone, images = simsiam.ARCHS[arch](width), torch.empty(1000, 3, size, size)
        values = backbone.layer1(backbone.conv1(images[:1])).numel()  # the widest output at full resolution
    assert batch_size(backbone, images) == expected and (expected * values <= 500 * 64 * 32**2 or expected == 1)
    assert expected == 500 or (expected + 1) * values > 500 * 64 * 32**2


def test_features_do_not_depend_on_the_batch_size(shapes, monkeypatch):
    backbone = simsiam.resnet18(4)
    whole = extract_features(backbone, shapes.test_images, FP32)
    assert whole.shape == (500, 32)
    monkeypatch.setattr("utils.knn.ACTIVATION", 77 * 4 * 32**2)
    assert batch_size(backbone, shapes.test_images) == 77
    parts = extract_features(backbone, shapes.test_images, FP32)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ZeroDivisionError):
        extract_features(backbone, shapes.test_images, FP32, check=lambda: 1 / 0)
    assert backbone.training
