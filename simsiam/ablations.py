"""SimSiam with one part changed or left out: the variants of the paper's study (Sec. 4)."""
from torch import nn

from simsiam.model import SimSiam
from simsiam.resnet import BasicBlock, Bottleneck

PREDICTORS = ("learned", "fixed", "none")


class WithoutStopGradient(SimSiam):
    """SimSiam whose targets pass gradients as well (Sec. 4.1, Figure 2). It collapses."""

    def forward(self, x1, x2):
        """As SimSiam.forward, but z1 and z2 are not detached."""
        z1 = self.projector(self.backbone(x1))  # [B, dim]
        z2 = self.projector(self.backbone(x2))
        return self.predictor(z1), self.predictor(z2), z1, z2


def make_simsiam(
    backbone, dim=2048, pred_dim=512, num_proj_layers=2, head_bn="default", predictor="learned", stop_gradient=True, zero_init_residual=False,
):
    """A SimSiam, or a variant of it, in training mode; all variants start from the same random numbers.

    predictor: one of PREDICTORS (Sec. 4.2, Table 1): 'fixed' keeps its random initial weights, with 'none' p is z.
    stop_gradient: Sec. 4.1. zero_init_residual: let each residual block begin as its shortcut. The rest as for SimSiam.
    """
    model = (SimSiam if stop_gradient else WithoutStopGradient)(backbone, dim, pred_dim, num_proj_layers, head_bn)
    if predictor == "fixed":
        model.predictor.requires_grad_(False)
    elif predictor == "none":
        model.predictor = nn.Identity()
    if zero_init_residual:
        for block in backbone.modules():
            if isinstance(block, (BasicBlock, Bottleneck)):
                last = block.bn3 if isinstance(block, Bottleneck) else block.bn2
                nn.init.zeros_(last.weight)
    return model
