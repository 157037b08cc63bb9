"""Backbone, heads, losses and variants against torchvision, the paper's counts and written-out forms."""
import itertools
import math
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

import simsiam
from conftest import REPO
from utils import device
from utils.device import conv_as_matmul

VIEWS = torch.randn(2, 16, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def variant(**options):
    torch.manual_seed(0)
    return simsiam.SimSiam(simsiam.resnet18(4), 32, 16, **options)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def gradients(model, loss=simsiam.simsiam_loss):
    model.zero_grad()
    loss(*model(*VIEWS)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(first, second):
    assert first.keys() == second.keys()
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-6, msg=lambda text: f"{name}: {text}")
    assert max(gradient.abs().max() for gradient in first.values()) > 1e-3


@pytest.mark.parametrize("arch", simsiam.ARCHS)
def test_resnets_match_torchvision_with_a_cifar_stem(arch):
    torch.manual_seed(0)
    backbone, reference = simsiam.ARCHS[arch](), getattr(torchvision.models, arch)()
    reference.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = reference.fc = nn.Identity()
    for name in ("layer1.0.conv1.weight", "layer4.1.conv2.weight", "layer3.0.downsample.0.weight"):
        ours, theirs = (model.state_dict()[name].std().item() for model in (backbone, reference))
        assert ours == pytest.approx(theirs, rel=0.05)
    reference.load_state_dict(backbone.state_dict())
    x = torch.randn(4, 3, 16, 16)
    for training in (True, False):
        backbone.train(training), reference.train(training)
        torch.testing.assert_close(backbone(x), reference(x), rtol=1e-4, atol=1e-5)
    reference = getattr(torchvision.models, arch)(zero_init_residual=True).state_dict()
    zeros = {name for name, value in reference.items() if name.endswith("weight") and not value.any()}
    backbone = simsiam.ARCHS[arch](zero_init_residual=True).state_dict()
    assert zeros == {name for name, value in backbone.items() if name.endswith("weight") and not value.any()} != set()
    narrow = simsiam.ARCHS[arch](width=6)
    assert narrow.feature_dim == 6 * {"resnet18": 8, "resnet34": 8, "resnet50": 32}[arch]
    for size in ((8, 8), (9, 15), (32, 32), (33, 64)):
        assert narrow(torch.randn(2, 3, *size)).shape == (2, narrow.feature_dim)


def test_networks_have_the_papers_number_of_parameters():
    model = simsiam.SimSiam(simsiam.resnet18())
    assert count(model.backbone) == 11_168_832 == 11_173_962 - count(nn.Linear(model.backbone.feature_dim, 10))
    # Linear 512 -> 2048 -> 2048 without biases; the last batch norm has no affine parameters.
    assert count(model.projector) == 512 * 2048 + 2 * 2048 + 2048 * 2048
    assert count(model.predictor) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    assert count(variant(num_proj_layers=3).projector) == 3 * 32 * 32 + 2 * 2 * 32
    with pytest.raises(ValueError, match="num_proj_layers"):
        variant(num_proj_layers=0)


@pytest.mark.parametrize("head_bn, projector, predictor", [  # the rows of Table 3; + for a layer with a bias
    ("none", "Linear+ ReLU Linear+", "Linear+ ReLU Linear+"),
    ("hidden", "Linear BatchNorm1d+ ReLU Linear+", "Linear BatchNorm1d+ ReLU Linear+"),
    ("default", "Linear BatchNorm1d+ ReLU Linear BatchNorm1d", "Linear BatchNorm1d+ ReLU Linear+"),
    ("all", "Linear BatchNorm1d+ ReLU Linear BatchNorm1d", "Linear BatchNorm1d+ ReLU Linear BatchNorm1d")])
def test_head_bn_places_the_batch_norms_of_the_paper(head_bn, projector, predictor):
    model = variant(head_bn=head_bn)
    for head, expected in ((model.projector, projector), (model.predictor, predictor)):
        words = [type(layer).__name__ + ("+" if getattr(layer, "bias", None) is not None else "") for layer in head]
        assert " ".join(words) == expected
    state = variant().state_dict()  # each tensor once
    assert {name.split(".")[0] for name in state} == {"backbone", "projector", "predictor"}
    assert len({value.data_ptr() for value in state.values()}) == len(state)


def test_each_view_has_its_own_batch_statistics():
    model, views = variant(), (VIEWS[0], 3 * VIEWS[1] + 1, VIEWS[0] - VIEWS[1])
    p1, p2, p3, z1, z2, z3 = model(*views)
    for x, p, z in zip(views, (p1, p2, p3), (z1, z2, z3)):
        alone = model.projector(model.backbone(x))
        torch.testing.assert_close(z, alone.detach())
        torch.testing.assert_close(p, model.predictor(alone))


def test_targets_pass_no_gradient():
    model = variant()
    with torch.no_grad():
        z1, z2 = (model.projector(model.backbone(x)) for x in VIEWS)
    assert_same_gradients(gradients(variant()), gradients(model, lambda p1, p2, *_: -(
        F.cosine_similarity(p1, z2).mean() + F.cosine_similarity(p2, z1).mean()) / 2))


def test_without_stop_gradient_the_targets_learn_too():
    both, stopped = gradients(variant(stop_gradient=False)), gradients(variant())
    of_targets = gradients(variant(stop_gradient=False), lambda p1, p2, z1, z2: simsiam.simsiam_loss(
        p1.detach(), p2.detach(), z1, z2))
    assert_same_gradients(both, {name: value + of_targets.get(name, 0) for name, value in stopped.items()})
    # Sec. 4.2, without predictor: "equivalent to removing stop-gradient and scaling the loss by 1/2".
    stopped, free = (gradients(variant(predictor="none", stop_gradient=stop)) for stop in (True, False))
    assert_same_gradients({name: 2 * gradient for name, gradient in stopped.items()}, free)


def test_predictor_is_fixed_or_absent():
    fixed, absent = variant(predictor="fixed"), variant(predictor="none")
    assert {name.split(".")[0] for name in gradients(fixed)} == {"backbone", "projector"}
    p1, p2, z1, z2 = absent(*VIEWS)
    assert torch.equal(p1, z1) and torch.equal(p2, z2) and p1.requires_grad and not z1.requires_grad
    initial = variant().state_dict()  # all variants begin with the same weights
    for name, value in (fixed.state_dict() | absent.state_dict()).items():
        assert name.endswith(("running_mean", "running_var", "tracked")) or torch.equal(value, initial[name])


def test_losses_are_the_papers_formulas():
    p1, p2, z1, z2 = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    def cosine(p, z):  # Eq. 1, row by row
        return torch.stack([-(a / a.norm()) @ (b / b.norm()) for a, b in zip(p, z)]).mean()
    def cross_entropy(p, z):  # Sec. 4.5, row by row
        return torch.stack([-(b.exp() / b.exp().sum()) @ (a.exp() / a.exp().sum()).log() for a, b in zip(p, z)]).mean()
    for distance, expected in ((simsiam.negative_cosine, cosine), (simsiam.cross_entropy, cross_entropy)):
        symmetric = simsiam.simsiam_loss(p1, p2, z1, z2, distance=distance)
        torch.testing.assert_close(symmetric, expected(p1, z2) / 2 + expected(p2, z1) / 2)
        torch.testing.assert_close(simsiam.asymmetric_loss(p1, p2, z1, z2, distance=distance), expected(p1, z2))
        assert distance(p1.bfloat16(), z1.bfloat16()).dtype == torch.float32
    assert simsiam.simsiam_loss(p1, p2, p2, p1).item() == pytest.approx(-1)  # the cosine is the default


@pytest.mark.parametrize("count", [2, 3, 8])
def test_each_view_predicts_the_mean_of_the_others(count):
    """As written out in float64, with the gradient, in any order of the views; two have the bits of the paper's form."""
    generator, n = torch.Generator().manual_seed(0), range(count)
    p, z = torch.randn(2, count, 16, 32, generator=generator, dtype=torch.float64).requires_grad_()

    def written_out(p, z):
        loss = 0
        for i, row in itertools.product(n, range(16)):
            target = sum(z[j, row] for j in n if j != i) / (count - 1)
            loss -= p[i, row] @ target / (p[i, row].norm() * target.norm()) / (16 * count)
        return loss

    def with_gradient(function, inputs):
        loss = function(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    expected = with_gradient(written_out, (p, z))
    for order in (list(n), torch.randperm(count, generator=generator).tolist()):
        found = with_gradient(lambda p, z: simsiam.simsiam_loss(*(p[i] for i in order), *(z[i] for i in order)), (p, z))
        torch.testing.assert_close(found, expected, check_dtype=False, rtol=1e-5, atol=1e-6)
    if count == 2:
        inputs = (p.detach().float().requires_grad_(), z.detach().float().requires_grad_())
        both = (with_gradient(function, inputs) for function in (
            lambda p, z: simsiam.simsiam_loss(*p, *z),
            lambda p, z: 0.5 * simsiam.negative_cosine(p[0], z[1]) + 0.5 * simsiam.negative_cosine(p[1], z[0])))
        assert all(torch.equal(ours, paper) for ours, paper in zip(*both, strict=True))


def test_feature_std_is_1_for_spread_and_0_for_constant_outputs():
    torch.manual_seed(0)
    assert simsiam.feature_std(torch.randn(4096, 512)).item() == pytest.approx(1, abs=0.01)
    assert simsiam.feature_std(torch.ones(64, 512)).item() == pytest.approx(0, abs=1e-4)
    # Two opposite unit vectors in 4 dimensions, each half of the time: std 1 in one channel, 0 in three.
    opposite = torch.tensor([[7.0, 0, 0, 0], [-3, 0, 0, 0]]).repeat(500, 1)
    assert simsiam.feature_std(opposite).item() == pytest.approx(2 / 4, rel=1e-3)
    # Behind a batch norm 2 / sqrt(B) where all outputs but one point the same way, nearly sqrt(2) times that with two.
    for batch in (32, 512):
        bn, outputs = nn.BatchNorm1d(32, affine=False), torch.zeros(batch, 32)
        outputs[3] = torch.randn(32).sign()
        assert simsiam.feature_std(bn(outputs)).item() == pytest.approx(2 / math.sqrt(batch), rel=1e-3)
        outputs[4] = outputs[3]
        assert simsiam.feature_std(bn(outputs)).item() == pytest.approx(2 * math.sqrt(2 / batch), rel=2 / batch)


@pytest.mark.parametrize("size, stride", [(1, 1), (2, 1), (4, 1), (4, 2), (5, 2), (8, 2)])
def test_a_convolution_as_a_matrix_product_is_the_convolution(size, stride):
    results = []
    for function in (conv_as_matmul, partial(F.conv2d, padding=1)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(3, 5, size, size, generator=generator, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(7, 5, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        y = function(x, weight, stride=stride)
        y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float64))
        results.append((y, x.grad, weight.grad))
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs)


def test_small_maps_in_bf16_take_the_matrix_product(monkeypatch):
    """At width 64 the maps of layer4 at 32 pixels; at any width those of 2 pixels; and nothing in float32."""
    torch.manual_seed(0)
    recorded = mock.Mock(wraps=conv_as_matmul)
    monkeypatch.setattr(device, "conv_as_matmul", recorded)
    for width, size, expected in ((64, 32, [(512, 256)] + 3 * [(512, 512)]), (4, 32, []),
                                  (4, 16, [(32, 16)] + 3 * [(32, 32)])):
        model, images = device.with_fast_convolutions(simsiam.resnet18(width)), torch.randn(8, 3, size, size)
        recorded.reset_mock()
        exact = model(images)
        assert not recorded.called
        with torch.autocast("cpu", torch.bfloat16):
            features = model(images)
        assert [call.args[1].shape[:2] for call in recorded.call_args_list] == expected
        assert (features - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("arch", [*simsiam.ARCHS])
def test_other_tools_take_the_backbone(arch):
    """torch.fx, torchvision's feature extraction, torch.export; batch, height and width may be any. torch.export itself
    (also with torchvision's ResNet) cannot have maps that may be of one pixel, nor of more: 9 pixels are the least."""
    torch.manual_seed(0)
    backbone = simsiam.ARCHS[arch](4).eval()
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 2)
    traced = torch.fx.symbolic_trace(backbone)
    extractor = create_feature_extractor(backbone, {"layer4": "maps", "layer2.1": "middle"})
    sizes = {0: torch.export.Dim("batch", min=1, max=512), 2: torch.export.Dim("height", min=9, max=224),
             3: torch.export.Dim("width", min=9, max=224)}
    exported = torch.export.export(backbone, (torch.zeros(2, 3, 32, 40),), dynamic_shapes=(sizes,)).module()
    with torch.no_grad():
        for b, h, w in ((1, 8, 8), (3, 9, 15), (1, 17, 224), (2, 32, 32)):
            images = torch.randn(b, 3, h, w)
            expected, maps = backbone(images), extractor(images)
            torch.testing.assert_close(traced(images), expected)
            torch.testing.assert_close(maps["maps"].mean(dim=(2, 3)), expected)
            assert maps["middle"].shape[2] == (h + 1) // 2
            if h > 8:
                torch.testing.assert_close(exported(images), expected)


@pytest.mark.slow
def test_onnx_has_the_same_features(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    backbone = simsiam.load_backbone(REPO / "weights" / "simsiam_resnet18_w16_cifar10.pt", verbose=False)
    dim, path = torch.export.Dim, str(tmp_path / "backbone.onnx")
    sizes = {0: dim("batch"), 2: dim("height", min=9), 3: dim("width", min=9)}
    torch.onnx.export(backbone, (torch.zeros(2, 3, 32, 32),), path, dynamo=True, dynamic_shapes=(sizes,),
                      input_names=["images"], output_names=["features"], verbose=False)
    session = runtime.InferenceSession(path)
    for size in ((1, 3, 8, 8), (3, 3, 9, 15), (2, 3, 32, 32), (1, 3, 224, 224)):
        images = torch.randn(size)
        [features] = session.run(None, {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(features), backbone(images).detach(), rtol=1e-3, atol=1e-4)
