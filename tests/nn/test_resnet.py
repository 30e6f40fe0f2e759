"""The CIFAR ResNets."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from leantrain.errors import UsageError
from leantrain.nn import ResNetCifar, num_parameters
from leantrain.nn.resnet import SubsampleAndPad


@pytest.mark.parametrize(
    ("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.73), (18, 11.17)]
)
def test_parameters_are_those_of_the_published_networks(depth: int, millions: float) -> None:
    with torch.device("meta"):
        assert num_parameters(ResNetCifar(depth, classes=10)) / 1e6 == pytest.approx(millions, abs=0.005)


@pytest.mark.parametrize("depth", [18, 20, 32, 44, 56, 110])
def test_the_depth_is_the_number_of_layers_with_weights_on_the_longest_path(depth: int) -> None:
    with torch.device("meta"):
        model = ResNetCifar(depth)
    weighted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and "shortcut" not in name
    ]
    assert len(weighted) == depth


@pytest.mark.parametrize(("depth", "final"), [(18, (512, 4)), (20, (64, 8))])
def test_stages_double_the_channels_and_halve_the_image(depth: int, final: tuple[int, int]) -> None:
    model = ResNetCifar(depth, classes=7)
    seen: list[torch.Size] = []
    model.layers[-1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert seen == [(2, final[0], final[1], final[1])]


def test_grey_images_of_28_pixels_work_too() -> None:
    assert ResNetCifar(20, classes=5, channels=1)(torch.randn(2, 1, 28, 28)).shape == (2, 5)


def test_the_shortcut_without_parameters_keeps_every_second_pixel_and_adds_empty_channels() -> None:
    x = torch.randn(2, 3, 6, 6)
    out = SubsampleAndPad(2, 4)(x)
    assert out.shape == (2, 7, 3, 3)
    assert torch.equal(out[:, :3], x[:, :, [0, 2, 4]][:, :, :, [0, 2, 4]])
    assert not out[:, 3:].any()


@pytest.mark.parametrize("depth", [18, 20])
def test_a_block_whose_convolutions_are_silenced_is_its_shortcut(depth: int) -> None:
    model = ResNetCifar(depth).eval()
    block = model.layers[1]
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(1, block.conv1.in_channels, 8, 8).relu()
    assert torch.equal(block(x), x)


def test_in_evaluation_examples_do_not_mix() -> None:
    torch.manual_seed(0)
    model = ResNetCifar(20).double().eval()
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(model(images), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("depth", [18, 20])
def test_the_network_equals_its_description_written_out(depth: int) -> None:
    torch.manual_seed(0)
    model = ResNetCifar(depth, classes=4).double().eval()
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name, tensor in state.items():  # statistics and scales away from 0 and 1
        tensor.copy_(torch.rand_like(tensor) + 0.5 if "norm" in name or "shortcut.1" in name else tensor)

    def conv_norm(x: torch.Tensor, conv: str, norm: str, stride: int) -> torch.Tensor:
        weight = state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)
        mean, var, scale, shift = (
            state[f"{norm}.{key}"][:, None, None] for key in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    h = conv_norm(images, "stem", "stem_norm", 1).relu()
    for index in range(len(model.layers)):
        name = f"layers.{index}"
        widens = state[f"{name}.conv1.weight"].shape[0] != h.shape[1]
        stride = 2 if widens else 1
        inner = conv_norm(h, f"{name}.conv1", f"{name}.norm1", stride).relu()
        inner = conv_norm(inner, f"{name}.conv2", f"{name}.norm2", 1)
        if widens and depth == 18:
            h = conv_norm(h, f"{name}.shortcut.0", f"{name}.shortcut.1", 2)
        elif widens:
            h = torch.cat((h[:, :, ::2, ::2], torch.zeros_like(h[:, :, ::2, ::2])), 1)
        h = (inner + h).relu()
    expected = h.sum((2, 3)) / h[0, 0].numel() @ state["head.weight"].T + state["head.bias"]
    torch.testing.assert_close(model(images), expected, rtol=1e-9, atol=1e-9)


def test_convolutions_start_with_hes_variance_of_what_leaves_them() -> None:
    torch.manual_seed(0)
    conv = ResNetCifar(18).layers[-2].conv1
    assert conv.weight.shape == (512, 256, 3, 3)
    assert conv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 50}, r"depth must be one of 18, 20, 32, 44, 56, 110, got depth=50"),
        ({"classes": 0}, r"classes must be an integer >= 1, got classes=0"),
        ({"channels": -3}, r"channels must be an integer >= 1, got channels=-3"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ResNetCifar(**arguments)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(2, 3, 8, 8, dtype=torch.uint8)]
)
def test_inputs_that_are_not_such_images_are_refused(inputs: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"floating-point images of shape \[batch, 3, height, width\], got shape"):
        ResNetCifar(20)(inputs)
