"""SimSiam: one backbone and projector for all views, a predictor, and the stop-gradient (paper, Sec. 3)."""
from torch import nn

PREDICTORS = ("learned", "fixed", "none")  # Sec. 4.2, Table 1
HEAD_BN = {  # Table 3: batch norms after the projector's hidden layers and output, the predictor's
    "none": (False, False, False, False),
    "hidden": (True, False, True, False),
    "default": (True, True, True, False),
    "all": (True, True, True, True),
}


def make_head(dims, hidden_bn, output_bn):
    """An MLP with layer sizes `dims`: Linear-BN-ReLU for hidden layers, Linear-BN without affine for the
    output. A linear layer has a bias only where no batch norm follows."""
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
    """backbone: module [B, 3, H, W] -> [B, backbone.feature_dim]. dim: size of z and p. pred_dim: the
    predictor's bottleneck. num_proj_layers: 2 on CIFAR (appendix D), 3 on ImageNet. The rest are the
    variants of Sec. 4, all with the same initial weights. head_bn: a key of HEAD_BN. predictor: 'fixed'
    keeps the initial weights, 'none' makes p equal z. stop_gradient: False trains the targets too."""

    def __init__(self, backbone, dim=2048, pred_dim=512, num_proj_layers=2, head_bn="default",
                 predictor="learned", stop_gradient=True):
        super().__init__()
        if num_proj_layers < 1:
            raise ValueError(f"num_proj_layers must be at least 1, not {num_proj_layers}")
        self.backbone = backbone
        self.projector = make_head([backbone.feature_dim] + num_proj_layers * [dim], *HEAD_BN[head_bn][:2])
        self.predictor = make_head([dim, pred_dim, dim], *HEAD_BN[head_bn][2:])
        self.stop_gradient = stop_gradient
        if predictor == "fixed":
            self.predictor.requires_grad_(False)
        elif predictor == "none":
            self.predictor = nn.Identity()

    def forward(self, *views):
        """Two views of the same images, [B, 3, H, W] each -> p1, p2, z1, z2, [B, dim] each; of N views
        p1 to pN, then z1 to zN. The views pass through the network one after the other: each has its
        own batch statistics."""
        z = [self.projector(self.backbone(x)) for x in views]  # [B, dim] each
        p = [self.predictor(each) for each in z]
        if self.stop_gradient:
            z = [each.detach() for each in z]  # the stop-gradient
        return *p, *z
