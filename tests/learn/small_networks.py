"""What the tests of the block learners share: examples, networks, and a loop written by hand."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from leantrain.nn import Llama


@dataclass
class Examples:
    """A batch."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


def points(examples: int = 6, seed: int = 0, dtype: torch.dtype = torch.float32) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 5, generator=generator, dtype=dtype)
    return Examples(inputs, torch.randint(4, (examples,), generator=generator))


def sentences(examples: int = 6, seed: int = 0) -> Examples:
    drawn = torch.randint(11, (examples, 8), generator=torch.Generator().manual_seed(seed))
    return Examples(drawn[:, :-1], drawn[:, 1:])


def network(depth: int = 5, seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """`depth` layers of tanh(linear), and a linear one: places "1" to f"{depth}"."""
    torch.manual_seed(seed)
    widths = [5, *[7] * depth]
    layers = [nn.Sequential(nn.Linear(n, m), nn.Tanh()) for n, m in pairwise(widths)]
    return nn.Sequential(*layers, nn.Linear(7, 4)).to(dtype)


def language_model(layers: int = 4, seed: int = 0) -> Llama:
    torch.manual_seed(seed)
    return Llama(11, 8, hidden=8, mlp_hidden=12, layers=layers, heads=2)


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    return {name: param.grad for name, param in module.named_parameters()}


def equal(left: dict[str, Tensor | None], right: dict[str, Tensor | None]) -> bool:
    """Whether the same names hold the same bits."""
    return left.keys() == right.keys() and all(
        (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
        for a, b in zip(left.values(), right.values(), strict=True)
    )
