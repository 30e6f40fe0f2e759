"""The residual networks used on CIFAR-sized images.

Two families share the name:

- depth 20, 32, 44, 56, 110: three stages of 16, 32 and 64 channels with (depth - 2) / 6 blocks each and
  shortcuts without parameters (He et al. 2016, arXiv 1512.03385, section 4.2). 0.27 M parameters at depth 20.
- depth 18: the ImageNet network's four stages of 64, 128, 256 and 512 channels with two blocks each and
  projection shortcuts, behind a 3x3 first convolution without pooling. 11.17 M parameters.

Batch normalisation uses the statistics of the (micro-)batch a process sees: accumulating gradients over
smaller batches, or splitting a batch over processes, is then not the same computation as one big batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.nn.sizes import require_images, require_sizes


@dataclass(frozen=True)
class _Family:
    widths: tuple[int, ...]
    blocks: int
    """Per stage."""
    projection: bool
    """Whether a shortcut that changes shape is a learned 1x1 convolution rather than padding with zeros."""


_FAMILIES = {
    18: _Family((64, 128, 256, 512), 2, projection=True),
    **{depth: _Family((16, 32, 64), (depth - 2) // 6, projection=False) for depth in (20, 32, 44, 56, 110)},
}


class ResNetCifar(nn.Module):
    """A ResNet for small images: [B, channels, H, W] in, logits [B, classes] out, for any H and W.

    Args:
        depth: 18 (wide), or 20, 32, 44, 56 or 110 (narrow).
        classes: Number of classes.
        channels: Channels of the images: 3 for colour, 1 for grey.

    Convolutions start normal with variance 2 / fan-out (He et al. 2015, arXiv 1502.01852), the head uniform
    as in `torch.nn.Linear`, normalisation at scale 1 and shift 0.

    Raises:
        UsageError: an unknown depth or a size that is not an integer >= 1; in `forward`, inputs that are not
            such images.
    """

    def __init__(self, depth: int = 20, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        if depth not in _FAMILIES:
            raise UsageError(f"depth must be one of {', '.join(map(str, _FAMILIES))}, got depth={depth!r}")
        require_sizes(classes=classes, channels=channels)
        family = _FAMILIES[depth]
        self.channels = channels
        self.stem = nn.Conv2d(channels, family.widths[0], 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(family.widths[0])
        self.layers = nn.ModuleList()
        inputs = family.widths[0]
        for stage, width in enumerate(family.widths):
            for block in range(family.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                self.layers.append(Block(inputs, width, stride, projection=family.projection))
                inputs = width
        self.head = nn.Linear(inputs, classes)
        self.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        require_images(inputs, self.channels)
        h = F.relu(self.stem_norm(self.stem(inputs)))
        for layer in self.layers:
            h = layer(h)
        return self.head(h.mean((2, 3)))

    def reset_parameters(self) -> None:
        """Draw the weights again, from torch's global generator; forget the normalisation's statistics."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()


class Block(nn.Module):
    """Two 3x3 convolutions added to a shortcut: relu(f(x) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module
        if inputs == outputs and stride == 1:
            self.shortcut = nn.Identity()
        elif projection:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        else:
            self.shortcut = SubsampleAndPad(stride, outputs - inputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class SubsampleAndPad(nn.Module):
    """The shortcut without parameters: every `stride`-th pixel, and zeros for the channels that are new."""

    def __init__(self, stride: int, new_channels: int) -> None:
        super().__init__()
        self.stride = stride
        self.new_channels = new_channels

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
