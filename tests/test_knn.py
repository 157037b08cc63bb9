"""kNN against brute force in plain Python and numpy."""
import math
from collections import defaultdict

import numpy as np
import pytest
import torch

import simsiam
from utils.augment import MEAN, STD
from utils.device import autocast
from utils.features import extract_features
from utils.knn import knn_accuracy, knn_predict

FP32 = autocast(torch.device("cpu"), "fp32")


def brute_force(queries, bank, labels, k, temperature):
    queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    bank = bank / np.linalg.norm(bank, axis=1, keepdims=True)
    predicted = []
    for query in queries:
        similarities = bank @ query
        votes = defaultdict(float)
        for i in np.argsort(-similarities)[:k]:
            votes[int(labels[i])] += math.exp(similarities[i] / temperature)
        predicted.append(max(votes, key=votes.get))
    return predicted


@pytest.mark.parametrize("k", [1, 7, 200, 300])
def test_equals_brute_force(k, monkeypatch):
    monkeypatch.setattr("utils.knn.SIMILARITIES", 500 * 300)
    random = np.random.default_rng(0)
    centers = random.normal(size=(10, 16))
    labels = random.integers(10, size=300)
    bank = centers[labels] + 2 * random.normal(size=(300, 16))
    queries = random.normal(size=(1203, 16)) * 3  # more than one chunk, and no multiple of it
    predicted = knn_predict(*(torch.tensor(x) for x in (queries, bank, labels)), k, 0.1, 10)
    assert predicted.dtype == torch.int64
    assert predicted.tolist() == brute_force(queries, bank, labels, k, 0.1)


def test_low_temperatures_do_not_overflow():
    bank = torch.eye(4).repeat(5, 1)
    labels = torch.arange(4).repeat(5)
    assert knn_predict(torch.eye(4), bank, labels, 10, 0.001, 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("k", [0, 21])
def test_k_beyond_the_bank_is_an_error(k):
    with pytest.raises(ValueError, match="bank has 20"):
        knn_predict(torch.ones(1, 4), torch.ones(20, 4), torch.zeros(20, dtype=torch.int64), k, 0.1, 2)


def test_accuracy_counts_every_test_picture(shapes):
    backbone = simsiam.resnet18(4)
    data = shapes._replace(test_images=shapes.test_images[:333], test_labels=shapes.test_labels[:333])
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    knn1, knn200 = knn_accuracy(backbone, data, FP32)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert backbone.training

    backbone.eval()
    normalized = [
        (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        for images in (data.train_images, data.test_images)
    ]
    with torch.no_grad():
        bank, queries = (backbone(images).numpy() for images in normalized)
    for accuracy, k in ((knn1, 1), (knn200, 200)):
        predicted = brute_force(queries, bank, data.train_labels.numpy(), k, 0.1)
        right = sum(p == label for p, label in zip(predicted, data.test_labels.tolist()))
        assert abs(accuracy - 100 * right / 333) < 0.7  # two pictures: the batch's size changes the last bits


def test_features_do_not_depend_on_the_batch_size(shapes):
    backbone = simsiam.resnet18(4).train()
    whole = extract_features(backbone, shapes.test_images, FP32)
    parts = extract_features(backbone, shapes.test_images, FP32, batch_size=77)
    assert whole.shape == (500, 32)
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)
