"""SimSiam: one backbone and projector for both views, a predictor, and the stop-gradient (paper, Sec. 3)."""
from torch import nn

# Whether a batch norm follows the projector's hidden layers and its output, the predictor's hidden layer and its
# output; the rows of the paper's Table 3.
HEAD_BN = {
    "none": (False, False, False, False),
    "hidden": (True, False, True, False),
    "default": (True, True, True, False),
    "all": (True, True, True, True),
}


def make_head(dims, hidden_bn, output_bn):
    """An MLP from dims[0] to dims[-1] numbers: Linear-BN-ReLU for every layer but the last, which is Linear-BN without
    affine; each batch norm if so asked. A linear layer has a bias where no batch norm follows it."""
    layers = []
    for i, (in_dim, out_dim) in enumerate(zip(dims, dims[1:])):
        last = i == len(dims) - 2
        bn = output_bn if last else hidden_bn
        layers.append(nn.Linear(in_dim, out_dim, bias=not bn))
        if bn:
            layers.append(nn.BatchNorm1d(out_dim, affine=not last))
        if not last:
            layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class SimSiam(nn.Module):
    """Backbone, projector and predictor, held as separate attributes.

    backbone: a module [B, 3, H, W] -> [B, backbone.feature_dim]; dim: width of z and p;
    pred_dim: the predictor's bottleneck; num_proj_layers: 2 on CIFAR (appendix D), 3 on ImageNet;
    head_bn: which batch norms the heads have, a key of HEAD_BN.
    """

    def __init__(self, backbone, dim=2048, pred_dim=512, num_proj_layers=2, head_bn="default"):
        super().__init__()
        if num_proj_layers < 1:
            raise ValueError(f"num_proj_layers is {num_proj_layers}, at least 1 is needed")
        bn = HEAD_BN[head_bn]
        self.backbone = backbone
        self.projector = make_head([backbone.feature_dim] + num_proj_layers * [dim], *bn[:2])
        self.predictor = make_head([dim, pred_dim, dim], *bn[2:])

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
