"""Checkpoints of every layout give the features of the network that wrote them; what does not fit is named."""
import argparse
import sys

import numpy
import pytest
import torch

import layouts
import simsiam

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TENSORS = simsiam.resnet18(4).state_dict()
OTHER = {name: value + 1 for name, value in TENSORS.items()}


@torch.no_grad()
def features(model):
    return model(IMAGES)


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_features_of_every_layout_agree(name, tmp_path, capsys):
    layout, *printed = layouts.LAYOUTS[name]
    padding, relu = 2 if "stem padded by 2" in printed else 1, "no ReLU after the stem" not in printed
    model = layouts.reference(stem_padding=padding, stem_relu=relu)
    torch.save(layout(model.state_dict()), tmp_path / "theirs.pt")
    backbone = simsiam.load_backbone(tmp_path / "theirs.pt")
    line = capsys.readouterr().out
    assert line.count("\n") == 1 and all(words in line for words in ["120 tensors matched", *printed])
    expected = features(model)
    torch.testing.assert_close(features(backbone), expected, rtol=1e-4, atol=1e-5)
    assert not backbone.training
    # With any other stem the features differ by far more than that.
    for other in {(1, True), (1, False), (2, True)} - {(padding, relu)}:
        backbone.conv1.padding, backbone.stem_relu = other[:1] * 2, other[1]
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
    backbone = simsiam.load_backbone(f"{finished_run}/{name}")
    assert f"{place}.weight: 120 tensors matched" in capsys.readouterr().out and backbone.feature_dim == 32
    own = torch.load(f"{finished_run}/backbone.pt", weights_only=True)
    assert all(torch.equal(value, own[key]) for key, value in backbone.state_dict().items())


def test_float16_weights_load_as_float32():
    half = {name: value.half() for name, value in TENSORS.items()}
    weight = simsiam.load_backbone(half, verbose=False).conv1.weight
    assert weight.dtype == torch.float32 and torch.equal(weight, half["conv1.weight"].float())


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
    changed = {key: tensor for key, tensor in {**TENSORS, name: value}.items() if tensor is not None}
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
    lambda tensors: {name.replace("layer1.", "layer1._fsdp_wrapped_module."): tensors[name] for name in tensors},
    lambda tensors: {name: value for name, value in tensors.items() if "num_batches" not in name},
])
def test_a_complete_backbone_is_found_anywhere(nest):
    backbone = simsiam.load_backbone(nest(layouts.reference().state_dict()), verbose=False)
    assert torch.equal(features(backbone), features(simsiam.load_backbone(layouts.reference().state_dict())))


@pytest.mark.parametrize("prefix", ["", "module.", "net."])
def test_what_stands_beside_a_backbone_is_ignored(prefix):
    for name in ("n_averaged", "module.temperature", "queue", "projection_head.0.weight"):
        backbone = simsiam.load_backbone(layouts.under(prefix, TENSORS) | {name: torch.zeros(2)}, verbose=False)
        assert torch.equal(backbone.conv1.weight, TENSORS["conv1.weight"])


def test_two_backbones_do_not_become_one_and_do_not_complete_each_other(capsys):
    for bare in (TENSORS, {"conv1.weight": TENSORS["conv1.weight"]}):
        backbone = simsiam.load_backbone(layouts.under("module.", OTHER) | bare)
        assert torch.equal(backbone.bn1.weight, (bare if len(bare) > 1 else OTHER)["bn1.weight"])
        assert ("not the one at module.conv1" in capsys.readouterr().out) == (len(bare) > 1)


@pytest.mark.parametrize("online, average", [
    ("online_encoder.", "target_encoder."), ("backbone.", "ema."), ("student.backbone.", "teacher."),
    ("backbone.", "momentum_backbone."), ("encoder_q.", "encoder_k."), ("model.net.", "model_ema."),
    ("a.b.", "modelEma."), ("onlineModel.", "emaModel."), ("encoder_query.", "encoder_key."), ("encoder.", "encoderK."),
    ("encoder.", "shadow."), ("ts.student.", "ts.teacher."), ("byol_ema.online.", "byol_ema.target.")])
@pytest.mark.parametrize("separate", [False, True])
def test_of_two_backbones_the_online_one_is_taken(online, average, separate, capsys):
    def placed(prefix, tensors):
        return {prefix.strip("."): tensors} if separate else layouts.under(prefix, tensors)
    first = placed(average, OTHER)
    backbone = simsiam.load_backbone({"state_dict": first | placed(online, TENSORS)})
    assert torch.equal(backbone.bn1.running_var, TENSORS["bn1.running_var"])
    line = capsys.readouterr().out
    assert f"not the one at state_dict.{average}conv1" in line and "a moving average" not in line
    simsiam.load_backbone({"state_dict": first})
    assert "a moving average" in capsys.readouterr().out


def test_other_files_are_refused_with_the_reason(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Conv2d(3, 4, 3)), tmp_path / "TorchScript")
    numpy.savez(tmp_path / "arr_0.npy", numpy.zeros(3))
    (tmp_path / "arr_0.npy.npz").rename(tmp_path / "arr_0.npy")
    code = [TENSORS, argparse.Namespace()]
    torch.save(code, tmp_path / "needs pickled code (argparse.Namespace); save its state_dict")
    torch.save(code, tmp_path / "(argparse.Namespace)", _use_new_zipfile_serialization=False)
    torch.save(TENSORS, tmp_path / "damaged")
    intact = (tmp_path / "damaged").read_bytes()
    changed = bytearray(intact)  # by one bit
    changed[intact.index(TENSORS["layer4.1.conv2.weight"].numpy().tobytes())] ^= 4
    for name, content in {
            "begins with b'version https://git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
            "begins with b'<!DOCTYPE html>": b"<!DOCTYPE html><html>Sign in</html>",
            "the file is empty": b"", "truncated or damaged": intact[:1000], "damaged": changed}.items():
        (tmp_path / name.replace("/", "|")).write_bytes(content)
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError) as error:
            simsiam.load_backbone(path)
        reason = str(error.value).removeprefix(str(path))
        assert path.name.replace("|", "/") in reason and "\n" not in reason
    with pytest.raises(IsADirectoryError, match="name backbone.pt"):
        simsiam.load_backbone(tmp_path)
    with pytest.raises(FileNotFoundError):
        simsiam.load_backbone(tmp_path / "none.pt")


def test_safetensors_load_where_the_package_is(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(TENSORS, tmp_path / "theirs.bin")
    backbone = simsiam.load_backbone(tmp_path / "theirs.bin", verbose=False)
    assert all(torch.equal(value, TENSORS[name]) for name, value in backbone.state_dict().items())
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ValueError, match="safetensors"):
        simsiam.load_backbone(tmp_path / "theirs.bin")
