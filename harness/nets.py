"""Small networks for scikit-learn's 8 x 8 digits, which train in seconds and make dataset-wide techniques quick to try, and what
torchvision does not have by itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DigitsLinear(nn.Module):
    """s = Wx + b: ten templates of 8 x 8."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 8, 8) -> (N, classes)
        return self.linear(self.flatten(x))


class LinearClassifier(nn.Module):
    """s = Wx + b over all pixels: one template of (channels, size, size) a class."""

    def __init__(self, channels: int = 3, size: int = 32, classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.linear = nn.Linear(channels * size * size, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, size, size) -> (N, classes)
        return self.linear(self.flatten(x))


class DigitsCNN(nn.Module):
    """Three convolutions, one pooling, two linear layers."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.ReLU(inplace=True),
        )
        self.classifier = nn.Sequential(nn.Flatten(), nn.Linear(2 * width * 16, 64), nn.ReLU(inplace=True), nn.Linear(64, classes))

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 8, 8) -> (N, classes)
        return self.classifier(self.features(x))


class SmallCNN(nn.Module):
    """Three convolutions with max pooling and one linear layer; for pictures of about 32 x 32.

    `zero_init`: the linear layer starts at zero. Cross-entropy sees only differences between logits, so what random numbers give to
    all of them alike would stay, and show in the gradients of a single one.
    """

    def __init__(self, channels: int = 3, size: int = 32, width: int = 12, classes: int = 2, zero_init: bool = False) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        last = nn.Linear(4 * width * (size // 8) ** 2, classes)
        if zero_init:
            nn.init.zeros_(last.weight)
        self.classifier = nn.Sequential(nn.Flatten(), last)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, classes)
        return self.classifier(self.features(x))


class _Block(nn.Module):
    """Two 3 x 3 convolutions with batch norm around a shortcut (He et al. 2015); its ReLU is functional."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(out)))


class DigitsResNet(nn.Module):
    """A stem and three residual blocks, global average pooling and one linear layer."""

    def __init__(self, width: int = 24, blocks: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(blocks)))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, 1, 8, 8) -> (N, classes)
        return self.fc(self.pool(self.blocks(self.stem(x))).flatten(1))


class _PreActBlock(nn.Module):
    """Batch norm and ReLU before each of two 3 x 3 convolutions; the shortcut starts after the first ReLU where shapes change."""

    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(into)
        self.conv1 = nn.Conv2d(into, out, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(into, out, 1, stride, bias=False) if stride != 1 or into != out else None

    def forward(self, x: Tensor) -> Tensor:
        start = torch.relu(self.bn1(x))
        beside = x if self.shortcut is None else self.shortcut(start)
        out: Tensor = self.conv2(torch.relu(self.bn2(self.conv1(start))))
        return out + beside


class PreActResNet(nn.Module):
    """ResNet with activations first (He et al. 2016, arXiv:1603.05027) for pictures of about 32 x 32; width 64 and two blocks a stage
    are PreAct ResNet-18."""

    def __init__(self, width: int = 64, blocks: int = 2, channels: int = 3, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        stages: list[nn.Module] = []
        into = width
        for stage in range(4):
            for block in range(blocks):
                out = width * 2**stage
                stages.append(_PreActBlock(into, out, 2 if stage and not block else 1))
                into = out
        self.blocks = nn.Sequential(*stages)
        self.bn = nn.BatchNorm2d(into)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(into, classes)

    def forward(self, x: Tensor) -> Tensor:  # (N, channels, H, W) -> (N, classes)
        found: Tensor = self.fc(self.pool(torch.relu(self.bn(self.blocks(self.stem(x))))).flatten(1))
        return found


class VGG16Features(nn.Module):
    """The convolutions of VGG-16 (Simonyan & Zisserman 2014, arXiv:1409.1556, configuration D) under torchvision's names, without the
    classifier that takes nine tenths of its weights: gives maps (N, 512, H / 32, W / 32) and no class scores."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            for _ in range(convolutions):
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 512, H / 32, W / 32)
        return self.features(x)
