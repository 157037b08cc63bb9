"""Checkpoints of every layout give the features of the network that wrote them; what does not fit is named."""
import os
import sys

import numpy
import pytest
import torch

import layouts
import simsiam

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TENSORS = simsiam.resnet18(4).state_dict()
BESIDE = dict.fromkeys(("n_averaged", "module.temperature", "queue", "projection_head.0.weight"), torch.zeros(2))


@torch.no_grad()
def features(model):
    return model(IMAGES)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_features_of_every_layout_agree(name, tmp_path, capsys):
    layout, *printed = layouts.LAYOUTS[name]
    model, content = layout()
    torch.save(content, tmp_path / "theirs.pt")
    backbone = simsiam.load_backbone(tmp_path / "theirs.pt")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and all(words in line for words in ["120 tensors matched", *printed])
    expected = features(model)
    torch.testing.assert_close(features(backbone), expected, rtol=1e-4, atol=1e-5)
    assert not backbone.training
    # With any other stem the features differ by far more than that.
    stem = backbone.conv1.padding[0], backbone.stem_relu
    for padding, relu in {(1, True), (1, False), (2, True)} - {stem}:
        backbone.conv1.padding, backbone.stem_relu = (padding, padding), relu
        assert (features(backbone) - expected).abs().max() > 0.01


@pytest.mark.parametrize("arch", ["resnet34", "resnet50"])
def test_other_architectures_load_and_are_suggested(arch):
    model = layouts.reference(arch)
    content = {"state_dict": layouts.under("backbone.", layouts.with_shortcuts(model.state_dict()))}
    backbone = simsiam.load_backbone(content, arch=arch, verbose=False)
    torch.testing.assert_close(features(backbone), features(model), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=f"{arch} of width 64") as error:
        simsiam.load_backbone(content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("name, place", [("checkpoint.pt", "model.backbone.conv1"), ("backbone.pt", " conv1")])
def test_own_files_load(finished_run, capsys, name, place):
    backbone = simsiam.load_backbone(os.path.join(finished_run, name))
    assert f"{place}.weight: 120 tensors matched" in capsys.readouterr().out and backbone.feature_dim == 32
    own = torch.load(os.path.join(finished_run, "backbone.pt"), weights_only=True)
    assert all(torch.equal(value, own[key]) for key, value in backbone.state_dict().items())
    own["conv1.weight"] = own["conv1.weight"].half()
    weight = simsiam.load_backbone(own).conv1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, own["conv1.weight"].float())


@pytest.mark.parametrize("name, value, words", [
    ("layer1.0.bn1.bias", None, "Missing.*: \"layer1.0.bn1.bias\""),
    ("layer1.0.bn1.extra", torch.zeros(2), "Unexpected.*: \"layer1.0.bn1.extra\""),
    ("layer1.0.bn1.bias", torch.zeros(2), r"layer1.0.bn1.bias: .*\[2\].*\[4\]"),
    ("conv1.weight", torch.zeros(64, 3, 7, 7), "no backbone.*ImageNet.*7x7"),
    ("conv1.weight", None, "no backbone"),
    ("bn1.bias", torch.zeros(4, dtype=torch.int64), "bn1.bias .*not finite floating-point"),
    ("bn1.bias", torch.full((4,), float("nan")), "bn1.bias .*not finite floating-point"),
])
@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_tensors_that_do_not_fit_are_named(prefix, name, value, words):
    changed = {**TENSORS, name: value} if value is not None else {key: TENSORS[key] for key in TENSORS if key != name}
    with pytest.raises(ValueError, match=words):
        simsiam.load_backbone({"state_dict": layouts.under(prefix, changed)}, verbose=False)


@pytest.mark.parametrize("content", [{}, [1, 2], torch.zeros(3), {"state_dict": {}}, {"conv1.weight": 3}])
def test_files_without_a_backbone_and_unknown_architectures_are_rejected(content):
    with pytest.raises(ValueError, match="no backbone"):
        simsiam.load_backbone(content)
    with pytest.raises(ValueError, match="resnet19.*resnet18"):
        simsiam.load_backbone(content, arch="resnet19")


@pytest.mark.parametrize("nest", [
    lambda tensors: {"trainer": {"net": {"online": layouts.under("module._orig_mod.encoder.", tensors)}}, "step": 3},
    lambda tensors: [{"args": {}}, {"anything": {"f": layouts.under("f.net.0.", tensors)}}],
    lambda tensors: {**tensors, "optimizer": {"state": {0: {"momentum_buffer": tensors["conv1.weight"]}}}},
    lambda tensors: {"opt": {"m": {"conv1.weight": tensors["conv1.weight"]}}, "a": {"b": {"long_name": tensors}}},
    lambda tensors: {"model": {name.replace("layer1.", "layer1._fsdp_wrapped_module."): value
                               for name, value in tensors.items()}},
    lambda tensors: tensors | BESIDE,
    lambda tensors: layouts.under("_orig_mod.", layouts.with_shortcuts(tensors)),
    lambda tensors: layouts.under("module.", tensors) | BESIDE,
    lambda tensors: layouts.under("net.", tensors) | BESIDE,
    lambda tensors: {name: value for name, value in tensors.items() if "num_batches" not in name},
    lambda tensors: {name: value.half() if "num_batches" in name else value for name, value in tensors.items()},
])
def test_a_complete_backbone_is_found_anywhere(nest):
    backbone = simsiam.load_backbone(nest(layouts.reference().state_dict()), verbose=False)
    assert torch.equal(features(backbone), features(simsiam.load_backbone(layouts.reference().state_dict())))


def test_two_backbones_do_not_become_one(capsys):
    """module.* and bare names; and an incomplete one is not filled up."""
    other = {name: value + 1 for name, value in TENSORS.items()}
    for bare in (TENSORS, {"conv1.weight": TENSORS["conv1.weight"]}):
        backbone = simsiam.load_backbone(layouts.under("module.", other) | bare)
        assert torch.equal(backbone.bn1.weight, (bare if len(bare) > 1 else other)["bn1.weight"])
        assert ("not the one at module.conv1" in capsys.readouterr().out) == (len(bare) > 1)


@pytest.mark.parametrize("online, average", [
    ("online_encoder.", "target_encoder."), ("backbone.", "ema."), ("student.backbone.", "teacher."),
    ("backbone.", "momentum_backbone."), ("encoder_q.", "encoder_k."), ("model.net.", "model_ema."),
    ("a.b.", "modelEma."), ("onlineModel.", "emaModel."), ("encoder_query.", "encoder_key."), ("encoder.", "encoderK."),
    ("encoder.", "shadow."), ("mean_teacher.student.", "mean_teacher.teacher."),
    ("byol_ema.online.", "byol_ema.target."),
])
@pytest.mark.parametrize("separate", [False, True])
def test_of_two_backbones_the_online_one_is_taken(online, average, separate, capsys):
    other = {name: value + 1 for name, value in TENSORS.items()}
    first, second = layouts.under(average, other), layouts.under(online, TENSORS)
    if separate:
        first, second = {average.strip("."): other}, {online.strip("."): TENSORS}
    backbone = simsiam.load_backbone({"state_dict": first | second})
    assert torch.equal(backbone.bn1.running_var, TENSORS["bn1.running_var"])
    line = capsys.readouterr().out
    assert f"not the one at state_dict.{average}conv1" in line and "a moving average" not in line
    simsiam.load_backbone({"state_dict": first})
    assert "a moving average" in capsys.readouterr().out


class Network(torch.nn.Module):
    """As people save whole networks: loading it needs this code."""


def test_other_files_are_refused_with_the_reason(tmp_path):
    with open(tmp_path / "arr_0.npy", "wb") as file:
        numpy.savez(file, numpy.zeros(3))
    torch.save(Network(), tmp_path / "needs pickled code (test_weights.Network)")
    torch.save(Network(), tmp_path / "(test_weights.Network)", _use_new_zipfile_serialization=False)
    for name, content in {
        "begins with b'version https:": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
        "begins with b'<!DOCTYPE html>": b"<!DOCTYPE html><html>Sign in</html>",
        "begins with b'\\x89PNG": b"\x89PNG\r\n\x1a\n" + bytes(100),
        "the file is empty": b"",
        "truncated or damaged": (tmp_path / "arr_0.npy").read_bytes()[:100],
    }.items():
        (tmp_path / name).write_bytes(content)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError) as error:
            simsiam.load_backbone(path)
        line = str(error.value).removeprefix(str(path))
        assert path.name in line and "\n" not in line
    with pytest.raises(IsADirectoryError, match="name backbone.pt"):
        simsiam.load_backbone(tmp_path)


def test_safetensors_load_where_the_package_is(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    path = str(tmp_path / "theirs.bin")
    safetensors.save_file(TENSORS, path)
    backbone = simsiam.load_backbone(path, verbose=False)
    assert all(torch.equal(value, TENSORS[name]) for name, value in backbone.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="safetensors"):
        simsiam.load_backbone(path)


def test_a_damaged_and_a_missing_file_are_refused(tmp_path):
    torch.save(TENSORS, tmp_path / "backbone.pt")
    content = bytearray((tmp_path / "backbone.pt").read_bytes())
    content[content.index(TENSORS["layer4.1.conv2.weight"].numpy().tobytes())] ^= 4
    (tmp_path / "backbone.pt").write_bytes(content)
    with pytest.raises(ValueError, match="truncated or damaged"):
        simsiam.load_backbone(tmp_path / "backbone.pt")
    with pytest.raises(FileNotFoundError):
        simsiam.load_backbone(tmp_path / "none.pt")
