"""LLaMA: the decoder-only transformer on which memory-saving optimizers are usually compared.

    h = embedding(tokens)
    h = h + attn(attention_norm(h));  h = h + mlp(ffn_norm(h))        in every layer
    logits = head(norm(h))

with RMSNorm, rotary positions, SwiGLU, causal attention and no biases.

Size: vocabulary V, hidden C, MLP M and L layers make  L (4 C^2 + 3 C M + 2 C) + C + V C (1 or 2)  parameters,
2 unless the head is tied. Shapes: B examples, T tokens.

Module names follow what users of low-rank optimizers search for: every matrix between the embedding and the
head lies in a module whose name contains "attn" or "mlp" (`layers.0.attn.q_proj`, `layers.0.mlp.gate_proj`).

Source: Touvron et al. 2023, arXiv 2302.13971; preset shapes: Zhao et al. 2024 (GaLore), arXiv 2403.03507.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError, nearest
from leantrain.nn.attention import Attention, Rotary, rotary_table
from leantrain.nn.sizes import require_multiple, require_sizes, require_tokens


@dataclass(frozen=True)
class LlamaShape:
    """What a preset decides; everything else is an argument of its own."""

    hidden: int
    mlp_hidden: int
    layers: int
    heads: int


PRESETS: dict[str, LlamaShape] = {
    # For runs of seconds: 0.38 M and 1.01 M parameters with the 256 byte values as vocabulary.
    "tiny": LlamaShape(96, 256, 3, 4),
    "1M": LlamaShape(160, 432, 3, 5),
    # The GaLore authors' configurations, named by their size with 32,000 tokens (5461 is theirs too).
    "9M": LlamaShape(128, 352, 4, 4),
    "20M": LlamaShape(256, 688, 4, 4),
    "60M": LlamaShape(512, 1376, 8, 8),
    "130M": LlamaShape(768, 2048, 12, 12),
    "350M": LlamaShape(1024, 2736, 24, 16),
    "1B": LlamaShape(2048, 5461, 24, 32),
    "3B": LlamaShape(2560, 6848, 32, 32),
    "7B": LlamaShape(4096, 11008, 32, 32),
}


class Llama(nn.Module):
    """A LLaMA language model: token ids [B, T] in, logits [B, T, vocab_size] out.

    Args:
        vocab_size: Number of different tokens.
        context: Longest input in tokens. Costs no parameters.
        preset: A name in `PRESETS`. A size given beside it replaces the preset's.
        hidden: Channels of the residual stream; a multiple of 2 * `heads`.
        mlp_hidden: Channels inside the MLP; by default 8/3 of `hidden`, rounded up to a multiple of 16.
        layers: Number of blocks.
        heads: Attention heads in each.
        tied: Whether the head uses the embedding's matrix; there is then no `head` module.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square before RMSNorm's square root.

    Weights start normal with standard deviation 0.02, the two projections of each block that write to the
    residual stream (`o_proj`, `down_proj`) with 0.02 / sqrt(2 * layers), so that its variance does not grow
    with depth (Radford et al. 2019); norms start at 1. On the meta device, call `reset_parameters` after
    `to_empty`.

    Raises:
        UsageError: no size, an unknown preset, or sizes that do not fit one another; in `forward`, inputs
            that are not integer [B, T] or are longer than `context`.

    Examples:
        >>> model = Llama(vocab_size=256, preset="tiny")
        >>> model(torch.zeros(2, 16, dtype=torch.int64)).shape
        torch.Size([2, 16, 256])
    """

    def __init__(
        self,
        vocab_size: int,
        context: int = 256,
        preset: str | None = None,
        *,
        hidden: int | None = None,
        mlp_hidden: int | None = None,
        layers: int | None = None,
        heads: int | None = None,
        tied: bool = False,
        rope_base: float = 10_000.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        shape = _shape(preset, hidden=hidden, mlp_hidden=mlp_hidden, layers=layers, heads=heads)
        require_sizes(vocab_size=vocab_size, context=context)
        _require_positive(rope_base=rope_base, norm_eps=norm_eps)
        self.context = context
        self.head_dim = shape.hidden // shape.heads
        self.rope_base = rope_base
        self.embedding = nn.Embedding(vocab_size, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, norm_eps) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=norm_eps)
        # A tied head is no second name for the embedding: shared tensors are untied by `to_empty` and refused
        # by safetensors.
        self.head = None if tied else nn.Linear(shape.hidden, vocab_size, bias=False)
        self.reset_parameters()

    def forward(self, inputs: Tensor) -> Tensor:
        require_tokens(inputs, self.context)
        h = self.embedding(inputs)
        rotary = rotary_table(
            inputs.shape[1],
            self.head_dim,
            self.rope_base,
            device=inputs.device,
            dtype=torch.promote_types(h.dtype, torch.float32),  # never less than float32; float64 stays exact
        )
        for layer in self.layers:
            h = layer(h, rotary)
        h = self.norm(h)
        return F.linear(h, self.embedding.weight) if self.head is None else self.head(h)

    def get_output_embeddings(self) -> nn.Module:
        """The module whose matrix makes the logits, under the name it has in Hugging Face models."""
        return self.embedding if self.head is None else self.head

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights again, from torch's global generator."""
        std = 0.02
        residual_std = std / math.sqrt(2 * len(self.layers))
        for name, parameter in self.named_parameters():
            if parameter.ndim == 1:
                nn.init.ones_(parameter)
            else:
                writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if writes_residual else std)


class Block(nn.Module):
    """One layer: attention, then the MLP, each added to what it read after normalising it."""

    def __init__(self, shape: LlamaShape, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.hidden, eps=norm_eps)
        self.attn = Attention(shape.hidden, shape.heads, causal=True, bias=False)
        self.ffn_norm = nn.RMSNorm(shape.hidden, eps=norm_eps)
        self.mlp = SwiGLU(shape.hidden, shape.mlp_hidden)

    def forward(self, h: Tensor, rotary: Rotary) -> Tensor:
        h = h + self.attn(self.attention_norm(h), rotary)
        return h + self.mlp(self.ffn_norm(h))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Source: Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, hidden: int, mlp_hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, mlp_hidden, bias=False)
        self.up_proj = nn.Linear(hidden, mlp_hidden, bias=False)
        self.down_proj = nn.Linear(mlp_hidden, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _shape(preset: str | None, **given: int | None) -> LlamaShape:
    """The preset's shape with what was given in place of its own, or the shape that was given."""
    sizes = {name: size for name, size in given.items() if size is not None}
    require_sizes(**sizes)
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"preset {preset!r} is unknown{nearest(preset, PRESETS)}")
        shape = replace(PRESETS[preset], **sizes)
    else:
        missing = [name for name in ("hidden", "layers", "heads") if name not in sizes]
        if missing:
            raise UsageError(
                f"Llama needs a preset ({', '.join(PRESETS)}) or hidden, layers and heads; "
                f"no preset was given and no {', '.join(missing)}"
            )
        shape = LlamaShape(**{"mlp_hidden": _default_mlp_hidden(sizes["hidden"]), **sizes})
    require_multiple("hidden", shape.hidden, "heads", shape.heads)
    if shape.hidden // shape.heads % 2:
        raise UsageError(
            "hidden / heads must be even, because rotary positions turn pairs of channels; "
            f"got hidden={shape.hidden} and heads={shape.heads}, which is {shape.hidden // shape.heads}"
        )
    return shape


def _default_mlp_hidden(hidden: int) -> int:
    # 8/3 gives the three SwiGLU matrices the parameters of the usual two with 4 * hidden.
    return 16 * math.ceil(hidden * 8 / 3 / 16)


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:
            raise UsageError(f"{name} must be > 0, got {name}={number!r}")
