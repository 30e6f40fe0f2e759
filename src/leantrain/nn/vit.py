"""A small vision transformer for 28 to 32 pixel images.

The image is cut into patches, each patch becomes a token with a learned position, pre-norm blocks of
attention and a GELU MLP mix them, and the head reads their mean (no class token: Beyer et al. 2022, arXiv
2205.01580, found none is needed).

Shapes: B images, T = (image_size / patch)^2 tokens, C hidden channels.
Source: Dosovitskiy et al. 2021, arXiv 2010.11929.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.nn.attention import Attention
from leantrain.nn.sizes import require_images, require_multiple, require_sizes


class ViT(nn.Module):
    """A vision transformer: images [B, channels, image_size, image_size] in, logits [B, classes] out.

    Args:
        image_size: Height and width in pixels; a multiple of `patch`.
        classes: Number of classes.
        channels: Channels of the images: 3 for colour, 1 for grey.
        patch: Height and width of a patch in pixels.
        hidden: Channels C of a token; a multiple of `heads`.
        mlp_hidden: Channels inside the MLP; by default 4 * `hidden`.
        layers: Number of blocks.
        heads: Attention heads in each.

    With the defaults and 28 or 32 pixels: 1.2 M parameters, 49 or 64 tokens. Matrices and positions start
    truncated normal with standard deviation 0.02, biases at 0, norms at scale 1 and shift 0.

    Raises:
        UsageError: sizes that are not integers >= 1 or do not divide; in `forward`, inputs that are not such
            images.
    """

    def __init__(
        self,
        image_size: int = 32,
        classes: int = 10,
        channels: int = 3,
        *,
        patch: int = 4,
        hidden: int = 128,
        mlp_hidden: int | None = None,
        layers: int = 6,
        heads: int = 4,
    ) -> None:
        super().__init__()
        mlp_hidden = 4 * hidden if mlp_hidden is None else mlp_hidden
        require_sizes(image_size=image_size, classes=classes, channels=channels, patch=patch)
        require_sizes(hidden=hidden, mlp_hidden=mlp_hidden, layers=layers, heads=heads)
        require_multiple("image_size", image_size, "patch", patch)
        require_multiple("hidden", hidden, "heads", heads)
        self.image_size = image_size
        self.channels = channels
        self.patches = nn.Conv2d(channels, hidden, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty((image_size // patch) ** 2, hidden))
        self.layers = nn.ModuleList(Block(hidden, mlp_hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, classes)
        self.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        require_images(inputs, self.channels, self.image_size)
        h = self.patches(inputs).flatten(2).transpose(1, 2) + self.positions  # [B, T, C]
        for layer in self.layers:
            h = layer(h)
        return self.head(self.norm(h).mean(1))

    def reset_parameters(self) -> None:
        """Draw the weights again, from torch's global generator."""
        nn.init.trunc_normal_(self.positions, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to what it read after normalising it."""

    def __init__(self, hidden: int, mlp_hidden: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(hidden)
        self.attn = Attention(hidden, heads, causal=False, bias=True)
        self.ffn_norm = nn.LayerNorm(hidden)
        self.mlp = GeluMLP(hidden, mlp_hidden)

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.attn(self.attention_norm(h))
        return h + self.mlp(self.ffn_norm(h))


class GeluMLP(nn.Module):
    """down(gelu(up(x)))."""

    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.up_proj = nn.Linear(hidden, mlp_hidden)
        self.down_proj = nn.Linear(mlp_hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.up_proj(x)))
