"""CIFAR ResNets: 3x3 stem with stride 1, no max-pool, no fc (paper, appendix D). torchvision's names."""
from functools import partial

import torch.nn.functional as F
from torch import nn


def conv_bn(in_channels, out_channels, kernel_size, stride=1):
    """A convolution without bias, padded to keep H and W at stride 1, and its batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(out_channels)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions (ResNet-18 and -34), or a bottleneck of 1x1, 3x3 and 1x1
    convolutions with four times as many output channels and the stride on the 3x3 (ResNet-50)."""

    def __init__(self, in_channels, channels, stride, bottleneck=False):
        super().__init__()
        self.bottleneck, out_channels = bottleneck, channels
        if bottleneck:
            out_channels = 4 * channels
            self.conv1, self.bn1 = conv_bn(in_channels, channels, 1)
            self.conv2, self.bn2 = conv_bn(channels, channels, 3, stride)
            self.conv3, self.bn3 = conv_bn(channels, out_channels, 1)
        else:
            self.conv1, self.bn1 = conv_bn(in_channels, channels, 3, stride)
            self.conv2, self.bn2 = conv_bn(channels, channels, 3)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(*conv_bn(in_channels, out_channels, 1, stride))

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = self.bn2(self.conv2(x))
        if self.bottleneck:
            x = self.bn3(self.conv3(F.relu(x, inplace=True)))
        x += identity
        return F.relu(x, inplace=True)


class ResNet(nn.Module):
    """A CIFAR ResNet: normalized images [B, 3, H, W], any H, W >= 8 -> features [B, feature_dim]. The four
    stages have 1, 2, 4 and 8 times `width` channels. Initial weights: He's normal, as torchvision's."""

    def __init__(self, depths, width=64, bottleneck=False, zero_init_residual=False):
        super().__init__()
        self.stem_relu = True  # simsiam.weights clears it for checkpoints of code without a ReLU after the stem
        self.conv1, self.bn1 = conv_bn(3, width, 3)
        in_channels = width
        for stage, depth in enumerate(depths):
            channels, blocks = width * 2**stage, []
            for i in range(depth):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(in_channels, channels, stride, bottleneck))
                in_channels = 4 * channels if bottleneck else channels
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.feature_dim = in_channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Block) and zero_init_residual:  # each branch starts at 0 (appendix A)
                nn.init.zeros_((module.bn3 if bottleneck else module.bn2).weight)

    def forward(self, x):
        x = self.bn1(self.conv1(x))                                # [B, width, H, W]
        if self.stem_relu:
            x = F.relu(x, inplace=True)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # [B, feature_dim, H/8, W/8]
        return x.mean(dim=(2, 3))


# Each takes the width. At 64, the paper's, ResNet-18 has 11,168,832 parameters.
resnet18 = partial(ResNet, (2, 2, 2, 2))                   # feature_dim is 8 * width (512)
resnet34 = partial(ResNet, (3, 4, 6, 3))                   # 8 * width (512)
resnet50 = partial(ResNet, (3, 4, 6, 3), bottleneck=True)  # 32 * width (2048)
ARCHS = {"resnet18": resnet18, "resnet34": resnet34, "resnet50": resnet50}
