"""The multilayer perceptron."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain.errors import UsageError
from leantrain.nn import MLP, num_parameters


@given(
    features=st.integers(1, 9),
    hidden=st.lists(st.integers(1, 9), max_size=3),
    outputs=st.integers(1, 4),
    activation=st.sampled_from(["relu", "gelu"]),
    examples=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_it_equals_linear_layers_and_activations_in_sequence(
    features: int, hidden: list[int], outputs: int, activation: str, examples: int
) -> None:
    model = MLP(features, outputs=outputs, hidden=hidden, activation=activation)  # type: ignore[arg-type]
    x = torch.randn(examples, features)
    expected = x
    for layer in model.layers:
        expected = (nn.ReLU() if activation == "relu" else nn.GELU())(expected @ layer.weight.T + layer.bias)
    expected = expected @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)
    widths = [features, *hidden, outputs]
    assert num_parameters(model) == sum((n + 1) * m for n, m in pairwise(widths))


def test_images_are_flattened() -> None:
    torch.manual_seed(0)
    model = MLP(channels=2, image_size=5, classes=3)
    images = torch.randn(4, 2, 5, 5)
    assert torch.equal(model(images), model(images.reshape(4, 50)))


def test_classes_and_outputs_are_two_names_of_the_heads_width() -> None:
    assert MLP(4, classes=3).head.out_features == MLP(4, outputs=3).head.out_features == 3


def test_weights_start_with_hes_variance_and_biases_at_zero() -> None:
    torch.manual_seed(0)
    model = MLP(400, classes=100, hidden=(300,))
    assert model.layers[0].weight.std().item() == pytest.approx((2 / 400) ** 0.5, rel=0.03)
    assert model.head.weight.std().item() == pytest.approx((1 / 300) ** 0.5, rel=0.03)
    assert not model.layers[0].bias.any()
    assert not model.head.bias.any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": 2}, r"needs features=\.\.\., or channels=\.\.\. and image_size"),
        ({"channels": 1, "classes": 2}, r"needs features=\.\.\., or channels=\.\.\. and image_size"),
        ({"features": 4}, r"classes \(classification\) or outputs .*classes=None and outputs=None"),
        ({"features": 4, "classes": 2, "outputs": 1}, r"one of the two; got classes=2 and outputs=1"),
        ({"features": 4, "channels": 1, "image_size": 3, "classes": 2}, r"features must be .* = 9"),
        ({"features": 0, "classes": 2}, r"features must be an integer >= 1, got features=0"),
        ({"features": 4, "classes": -2}, r"classes must be an integer >= 1, got classes=-2"),
        ({"features": 4, "outputs": 0}, r"outputs must be an integer >= 1, got outputs=0"),
        ({"features": 4, "classes": 2, "hidden": (8, 0)}, r"hidden\[1\] must be an integer >= 1"),
        ({"features": 4, "classes": 2, "activation": "rele"}, r"'rele' is unknown; did you mean 'relu'\?"),
    ],
)
def test_sizes_that_cannot_work_are_refused_by_name(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MLP(**arguments)  # type: ignore[arg-type]


def test_a_vector_is_not_taken_for_a_batch_of_single_features() -> None:
    with pytest.raises(UsageError, match=r"features=1 numbers per example, got shape \[4\]"):
        MLP(1, classes=2)(torch.zeros(4))


@pytest.mark.parametrize(
    "inputs", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, 4)]
)
def test_inputs_with_other_features_are_refused(inputs: torch.Tensor) -> None:
    with pytest.raises(UsageError, match=r"inputs must be floating-point with features=4 .*got shape"):
        MLP(4, classes=2)(inputs)
