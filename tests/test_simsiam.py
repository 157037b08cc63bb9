"""Backbone, heads and loss against torchvision, the paper's counts and written-out forms."""
import pytest
import torch
import torchvision

import simsiam


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_resnet18_has_the_papers_number_of_parameters():
    backbone = simsiam.resnet18()
    assert count(backbone) == 11_168_832
    assert count(backbone) + count(torch.nn.Linear(backbone.feature_dim, 10)) == 11_173_962


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_equals_torchvision_with_a_cifar_stem(arch):
    torch.manual_seed(0)
    backbone = getattr(simsiam, arch)()
    reference = getattr(torchvision.models, arch)()
    reference.conv1 = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    reference.maxpool = torch.nn.Identity()
    reference.fc = torch.nn.Identity()
    reference.load_state_dict(backbone.state_dict())
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(backbone(x), reference(x), rtol=1e-4, atol=1e-5)  # training mode
    backbone.eval(), reference.eval()
    torch.testing.assert_close(backbone(x), reference(x), rtol=1e-4, atol=1e-5)


def test_initial_spread_of_weights_is_torchvisions():
    torch.manual_seed(0)
    ours, reference = simsiam.resnet18().state_dict(), torchvision.models.resnet18().state_dict()
    for name in ("layer1.0.conv1.weight", "layer4.1.conv2.weight", "layer3.0.downsample.0.weight"):
        assert ours[name].std().item() == pytest.approx(reference[name].std().item(), rel=0.02)


@pytest.mark.parametrize("height, width", [(8, 8), (9, 15), (32, 32), (33, 64)])
def test_any_picture_size_from_8(height, width):
    backbone = simsiam.resnet18(width=4)
    assert backbone(torch.randn(2, 3, height, width)).shape == (2, 32)


@pytest.mark.parametrize("arch, factor", [("resnet18", 8), ("resnet34", 8), ("resnet50", 32)])
def test_width_scales_the_features(arch, factor):
    backbone = getattr(simsiam, arch)(width=6)
    assert backbone.feature_dim == 6 * factor
    assert backbone(torch.randn(2, 3, 8, 8)).shape == (2, 6 * factor)


def test_heads_follow_the_paper():
    model = simsiam.SimSiam(simsiam.resnet18())
    # Linear 512 -> 2048 -> 2048 without biases; the last batch norm has no affine parameters.
    assert count(model.projector) == 512 * 2048 + 2 * 2048 + 2048 * 2048
    assert count(model.predictor) == 2048 * 512 + 2 * 512 + 512 * 2048 + 2048
    three = simsiam.SimSiam(simsiam.resnet18(), num_proj_layers=3)
    assert count(three.projector) == 512 * 2048 + 2 * 2048 * 2048 + 2 * 2 * 2048
    with pytest.raises(ValueError, match="num_proj_layers"):
        simsiam.SimSiam(simsiam.resnet18(4), num_proj_layers=0)


def test_no_state_is_stored_twice():
    state = simsiam.SimSiam(simsiam.resnet18(4), 32, 16).state_dict()
    assert {name.split(".")[0] for name in state} == {"backbone", "projector", "predictor"}
    assert len({value.data_ptr() for value in state.values() if value.ndim}) == sum(value.ndim > 0 for value in state.values())


def test_each_view_has_its_own_batch_statistics():
    torch.manual_seed(0)
    model = simsiam.SimSiam(simsiam.resnet18(4), 32, 16)
    x1, x2 = torch.randn(8, 3, 16, 16), 3 * torch.randn(8, 3, 16, 16) + 1
    p1, p2, z1, z2 = model(x1, x2)
    for x, p, z in ((x1, p1, z1), (x2, p2, z2)):
        alone = model.projector(model.backbone(x))
        torch.testing.assert_close(z, alone.detach())
        torch.testing.assert_close(p, model.predictor(alone))


def test_loss_is_the_papers_formula():
    torch.manual_seed(0)
    p1, p2, z1, z2 = torch.randn(4, 16, 32)

    def distance(p, z):  # Eq. 1, row by row
        return torch.stack([-(a / a.norm()) @ (b / b.norm()) for a, b in zip(p, z)]).mean()

    expected = distance(p1, z2) / 2 + distance(p2, z1) / 2
    torch.testing.assert_close(simsiam.simsiam_loss(p1, p2, z1, z2), expected)
    assert simsiam.simsiam_loss(p1, p2, p2, p1).item() == pytest.approx(-1)
    assert simsiam.simsiam_loss(*(t.bfloat16() for t in (p1, p2, z1, z2))).dtype == torch.float32


def test_targets_pass_no_gradient():
    torch.manual_seed(0)
    model = simsiam.SimSiam(simsiam.resnet18(4), 32, 16)
    x1, x2 = torch.randn(2, 8, 3, 16, 16)
    simsiam.simsiam_loss(*model(x1, x2)).backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]

    # The same with targets that are constants, made by a copy of the network.
    model.zero_grad()
    with torch.no_grad():
        targets = [model.projector(model.backbone(x)) for x in (x2, x1)]
    for x, target in zip((x1, x2), targets):
        p = model.predictor(model.projector(model.backbone(x)))
        (-0.5 * torch.nn.functional.cosine_similarity(p, target).mean()).backward()
    for gradient, parameter in zip(gradients, model.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-4, atol=1e-7)


def test_feature_std_tells_collapse_from_health():
    torch.manual_seed(0)
    assert simsiam.feature_std(torch.randn(4096, 512)).item() == pytest.approx(1, abs=0.01)
    assert simsiam.feature_std(torch.ones(64, 512)).item() == pytest.approx(0, abs=1e-4)
    # Two opposite unit vectors in 4 dimensions, each half of the time: std 1 in one channel, 0 in three.
    z = torch.zeros(1000, 4)
    z[:500, 0], z[500:, 0] = 7, -3
    assert simsiam.feature_std(z).item() == pytest.approx(2 / 4, rel=1e-3)
