"""Checkpoints of all kinds: what is recognized, that the features are those of the network that it came from, and what is refused."""
import collections
import os
import pickle
import shutil

import pytest
import torch

import layouts
import simsiam
from utils import checkpoint


@pytest.fixture(scope="module")
def pictures():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def features(model, pictures):
    with torch.no_grad():
        return model(pictures)


@pytest.mark.parametrize("layout", layouts.LAYOUTS, ids=lambda layout: layout.__name__)
def test_features_of_every_layout_agree(layout, pictures, tmp_path, capsys):
    model, content = layout()
    torch.save(content, tmp_path / "theirs.pt")
    backbone = simsiam.load_backbone(tmp_path / "theirs.pt")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and layouts.LAYOUTS[layout] in line and "120 of 120 backbone tensors matched" in line
    assert not backbone.training
    expected = features(model, pictures)
    torch.testing.assert_close(features(backbone, pictures), expected, rtol=1e-4, atol=1e-5)
    assert simsiam.is_plain(backbone) == (layout not in (layouts.lightly, layouts.solo_learn, layouts.solo_learn_early))
    # Not a coincidence: with another stem the features differ by far more than that.
    other = {1: 2, 2: 1}[backbone.conv1.padding[0]]
    backbone.conv1.padding = (other, other)
    assert (features(backbone, pictures) - expected).abs().max() > 0.01
    backbone.conv1.padding, backbone.stem_relu = (3 - other, 3 - other), not backbone.stem_relu
    assert (features(backbone, pictures) - expected).abs().max() > 0.01


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_other_architectures(arch, pictures, tmp_path):
    model = layouts.reference(arch)
    torch.save({"state_dict": layouts.under("backbone.", layouts.with_shortcuts(model.state_dict()))}, tmp_path / "theirs.pt")
    backbone = simsiam.load_backbone(str(tmp_path / "theirs.pt"), arch=arch, verbose=False)
    torch.testing.assert_close(features(backbone, pictures), features(model, pictures), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"they are those of a {arch} of width 64"):
        simsiam.load_backbone(tmp_path / "theirs.pt")


@pytest.mark.parametrize("name, origin, others", [
    ("checkpoint.pt", "a checkpoint.pt of this project", "18 other tensors"), ("backbone.pt", "the state dict", ""),
])
def test_our_own_files(finished_run, tmp_path, capsys, name, origin, others):
    backbone = simsiam.load_backbone(os.path.join(finished_run, name))
    assert origin in (line := capsys.readouterr().out) and others in line and backbone.feature_dim == 32
    own = checkpoint.load(os.path.join(finished_run, "backbone.pt"))
    assert all(torch.equal(value, own[key]) for key, value in backbone.state_dict().items())


def test_fp16_files_load_as_float32(finished_run, tmp_path):
    own = checkpoint.load(os.path.join(finished_run, "backbone.pt"))
    half = {key: value.half() if value.is_floating_point() else value for key, value in own.items()}
    backbone = simsiam.load_backbone(half, verbose=False)
    assert backbone.conv1.weight.dtype == torch.float32 and torch.equal(backbone.conv1.weight, half["conv1.weight"].float())


def change(tensors, **changes):
    """The tensors with some replaced or, for None, left out."""
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return {name: changes.get(name, value) for name, value in {**tensors, **changes}.items() if changes.get(name, value) is not None}


@pytest.mark.parametrize("changes, words", [
    ({"layer1__0__bn1__bias": None}, "missing: layer1.0.bn1.bias"),
    ({"layer1__0__bn1__extra": torch.zeros(2)}, "unexpected: layer1.0.bn1.extra"),
    ({"layer1__0__bn1__bias": torch.zeros(2)}, r"another shape: layer1.0.bn1.bias is \(2,\), not \(4,\)"),
    ({"conv1__weight": torch.zeros(64, 3, 7, 7)}, r"conv1.weight is \(64, 3, 7, 7\): an ImageNet stem"),
    ({"conv1__weight": None}, "no backbone in it"),
    ({"bn1__bias": torch.zeros(4, dtype=torch.int64)}, "another type: bn1.bias is torch.int64"),
    ({"bn1__bias": torch.full((4,), float("nan"))}, "not finite numbers: bn1.bias"),
])
def test_what_does_not_fit_is_named(finished_run, changes, words):
    own = checkpoint.load(os.path.join(finished_run, "backbone.pt"))
    for prefix in ("", "backbone."):
        with pytest.raises(ValueError, match=words):
            simsiam.load_backbone({"state_dict": layouts.under(prefix, change(own, **changes))}, verbose=False)


def test_names_like_solo_learns_without_lightning_keep_the_stem(finished_run, capsys):
    own = checkpoint.load(os.path.join(finished_run, "backbone.pt"))
    heads = {f"{head}.weight": torch.zeros(2, 2) for head in ("classifier", "projector", "predictor")}
    assert simsiam.is_plain(simsiam.load_backbone({**layouts.under("backbone.", own), **heads}))
    assert "if it comes from solo-learn: its stem pads by 2" in capsys.readouterr().out


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"state_dict": {}}, {"conv1.weight": 3}])
def test_files_without_a_backbone(content):
    with pytest.raises(ValueError, match="no backbone"):
        simsiam.load_backbone(content)


def test_unknown_architectures_are_refused():
    with pytest.raises(ValueError, match="resnet19.*resnet18"):
        simsiam.load_backbone({}, arch="resnet19")


class Settings:
    """What Lightning's hyperparameters may be: an object of a package that is not there."""


def test_a_file_that_needs_code_is_refused_with_the_reason(finished_run, tmp_path):
    path = tmp_path / "needs-code.pt"
    torch.save({"state_dict": checkpoint.load(os.path.join(finished_run, "backbone.pt")), "hyper_parameters": Settings()}, path)
    with pytest.raises(pickle.UnpicklingError, match="test_weights.Settings"):
        simsiam.load_backbone(path)
    with pytest.raises(ValueError, match="test_weights.Settings.*save its state_dict alone"):
        checkpoint.load(str(path))


def test_plain_collections_need_no_code(finished_run, tmp_path):
    torch.save({"state_dict": collections.OrderedDict(checkpoint.load(os.path.join(finished_run, "backbone.pt"))), "epoch": 3}, tmp_path / "a.pt")
    assert simsiam.load_backbone(tmp_path / "a.pt", verbose=False).feature_dim == 32


def test_damaged_files_are_noticed(finished_run, tmp_path):
    path = tmp_path / "backbone.pt"
    shutil.copy(os.path.join(finished_run, "backbone.pt"), path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        simsiam.load_backbone(path)
    path.write_bytes(content[:1000])
    with pytest.raises(RuntimeError):
        simsiam.load_backbone(path)
    with pytest.raises(FileNotFoundError):
        simsiam.load_backbone(tmp_path / "none.pt")
