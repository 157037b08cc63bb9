"""SimSiam: one backbone and projector for both views, a predictor, and the stop-gradient (paper, Sec. 3)."""
from torch import nn


def make_projector(in_dim, dim, num_layers):
    """Projection MLP: Linear-BN-ReLU for every layer but the last, which is Linear-BN without affine.

    No linear layer has a bias: a batch norm follows each.
    """
    layers = []
    for i in range(num_layers):
        last = i == num_layers - 1
        layers += [nn.Linear(in_dim if i == 0 else dim, dim, bias=False), nn.BatchNorm1d(dim, affine=not last)]
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def make_predictor(dim, pred_dim):
    """Prediction MLP, a bottleneck: Linear-BN-ReLU to pred_dim, Linear back to dim."""
    return nn.Sequential(
        nn.Linear(dim, pred_dim, bias=False),
        nn.BatchNorm1d(pred_dim),
        nn.ReLU(inplace=True),
        nn.Linear(pred_dim, dim),
    )


class SimSiam(nn.Module):
    """Backbone, projector and predictor, held as separate attributes.

    backbone: a module [B, 3, H, W] -> [B, backbone.feature_dim]; dim: width of z and p;
    pred_dim: the predictor's bottleneck; num_proj_layers: 2 on CIFAR (appendix D), 3 on ImageNet.
    """

    def __init__(self, backbone, dim=2048, pred_dim=512, num_proj_layers=2):
        super().__init__()
        if num_proj_layers < 1:
            raise ValueError(f"num_proj_layers is {num_proj_layers}, at least 1 is needed")
        self.backbone = backbone
        self.projector = make_projector(backbone.feature_dim, dim, num_proj_layers)
        self.predictor = make_predictor(dim, pred_dim)

    def forward(self, x1, x2):
        """Two views of the same images, [B, 3, H, W] each -> p1, p2, z1, z2, each [B, dim].

        The views go through the network one after the other, so that each is normalized by its
        own batch statistics.
        """
        z1 = self.projector(self.backbone(x1))  # [B, dim]
        z2 = self.projector(self.backbone(x2))
        p1 = self.predictor(z1)
        p2 = self.predictor(z2)
        return p1, p2, z1.detach(), z2.detach()  # the stop-gradient: no gradient reaches a target
