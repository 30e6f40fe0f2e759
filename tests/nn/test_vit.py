"""The vision transformer, against PyTorch's encoder layer and against its own symmetry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from leantrain.errors import UsageError
from leantrain.nn import ViT, num_parameters
from leantrain.nn.vit import Block


def small(**changes: int) -> ViT:
    torch.manual_seed(0)
    return ViT(**{"image_size": 12, "channels": 1, "hidden": 16, "layers": 2, "heads": 2, **changes})


@pytest.mark.parametrize(("image_size", "channels"), [(28, 1), (32, 3)])
def test_the_default_sizes_take_the_usual_images(image_size: int, channels: int) -> None:
    model = ViT(image_size, classes=7, channels=channels)
    assert model(torch.randn(2, channels, image_size, image_size)).shape == (2, 7)
    assert num_parameters(model) / 1e6 == pytest.approx(1.2, abs=0.05)


def test_parameters_follow_the_formula() -> None:
    c, m, tokens, classes = 16, 64, 9, 10
    in_layer = 4 * (c * c + c) + (c * m + m) + (m * c + c) + 4 * c
    assert num_parameters(small()) == (16 * c + c) + tokens * c + 2 * in_layer + 2 * c + (c * classes + classes)


def test_a_block_equals_pytorchs_encoder_layer_with_the_same_weights() -> None:
    torch.manual_seed(0)
    ours = Block(16, 40, 2).double()
    theirs = nn.TransformerEncoderLayer(
        16, 2, 40, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    ).double()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_(std=0.5)
        qkv = (ours.attn.q_proj, ours.attn.k_proj, ours.attn.v_proj)
        theirs.self_attn.in_proj_weight.copy_(torch.cat([p.weight for p in qkv]))
        theirs.self_attn.in_proj_bias.copy_(torch.cat([p.bias for p in qkv]))
        for mine, other in (
            (ours.attn.o_proj, theirs.self_attn.out_proj), (ours.mlp.up_proj, theirs.linear1),
            (ours.mlp.down_proj, theirs.linear2), (ours.attention_norm, theirs.norm1), (ours.ffn_norm, theirs.norm2),
        ):  # fmt: skip
            other.load_state_dict(mine.state_dict())
    x = torch.randn(3, 9, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_only_the_positions_tell_patches_apart() -> None:
    model = small().double()
    image = torch.randn(1, 1, 12, 12, dtype=torch.float64)
    swapped = image.clone()
    swapped[..., 0:4, 0:4], swapped[..., 4:8, 8:12] = image[..., 4:8, 8:12], image[..., 0:4, 0:4]
    assert (model(image) - model(swapped)).abs().max() > 1e-6
    nn.init.zeros_(model.positions)
    torch.testing.assert_close(model(image), model(swapped), rtol=0, atol=1e-12)


def test_weights_start_small_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    for name, parameter in ViT().named_parameters():
        if parameter.ndim > 1:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        else:
            expected = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            assert (parameter == expected).all(), name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 5}, r"image_size must be a multiple of patch, got image_size=12 and patch=5 .*1, 2, 3, 4, 6, 12"),
        ({"heads": 3}, r"hidden must be a multiple of heads, got hidden=16 and heads=3"),
        ({"layers": 0}, r"layers must be an integer >= 1, got layers=0"),
        ({"mlp_hidden": -1}, r"mlp_hidden must be an integer >= 1, got mlp_hidden=-1"),
        ({"image_size": 0}, r"image_size must be an integer >= 1, got image_size=0"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(changes: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        small(**changes)


@pytest.mark.parametrize("shape", [(2, 1, 12, 11), (2, 1, 16, 16), (2, 3, 12, 12), (1, 12, 12)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=r"images of shape \[batch, 1, 12, 12\], got shape"):
        small()(torch.zeros(shape))
