"""What every chain of rules does for its rule: grouping, state, decay, resume, refusals."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from leantrain.optim import Adam, Chain, GaLoreAdamW, LowRank
from leantrain.optim.rules import State


@dataclass(frozen=True)
class Plain:
    """Gradient descent that remembers the shapes of the stacks it was given."""

    moments: ClassVar[dict[str, int]] = {}
    elementwise: ClassVar[bool] = True
    seen: ClassVar[list[tuple[int, ...]]] = []

    def init(self, param: Tensor) -> State:
        return {"count": torch.zeros_like(param)}

    def update(self, grad: Tensor, state: State, step: Tensor) -> Tensor:
        self.seen.append(tuple(grad.shape))
        state["count"] += 1
        return grad


def params(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    made = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in made:
        param.grad = torch.full_like(param, 0.5)
    return made


def test_same_shaped_parameters_are_stepped_together_and_large_ones_alone() -> None:
    Plain.seen.clear()
    Chain(params((3, 2), (2, 3), (3, 2), (256, 256), (256, 256)), Plain()).step()
    assert sorted(Plain.seen) == [(1, 2, 3), (1, 256, 256), (1, 256, 256), (2, 3, 2)]


def test_state_of_stacked_parameters_is_held_once() -> None:
    weights = params((3, 2), (3, 2))
    optimizer = Chain(weights, Plain())
    optimizer.step()
    first, second = (optimizer.state[w]["count"] for w in weights)
    assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert torch.equal(first, torch.ones(3, 2)) and first.untyped_storage().nbytes() == 2 * 24


def test_a_parameter_without_a_gradient_is_left_alone_and_may_join_later() -> None:
    weights = params((3, 2), (3, 2))
    weights[1].grad = None
    optimizer = Chain(weights, Plain(), lr=1.0)
    optimizer.step()
    weights[1].grad = torch.ones(3, 2)
    optimizer.step()
    assert torch.equal(weights[0], torch.zeros(3, 2)) and torch.equal(weights[1], torch.zeros(3, 2))
    assert [int(optimizer.state[w]["step"]) for w in weights] == [2, 1]
    assert [float(optimizer.state[w]["count"][0, 0]) for w in weights] == [2, 1]


def test_decay_is_decoupled_and_comes_first() -> None:
    weights = params((3,))
    Chain(weights, Plain(), lr=0.1, weight_decay=0.2).step()
    torch.testing.assert_close(weights[0].detach(), torch.full((3,), 1 - 0.1 * 0.2 - 0.1 * 0.5))


@pytest.mark.parametrize("rule", [Adam(), LowRank(Adam(), 2), Plain()], ids=["adam", "low rank", "plain"])
def test_a_deep_copy_goes_on_alike_and_alone(rule: object) -> None:
    weights = params((6, 4), (6, 4))
    optimizer = Chain(weights, rule, lr=0.1)
    optimizer.step()
    twin_weights, twin = copy.deepcopy((weights, optimizer))
    for param, other in zip(weights, twin_weights, strict=True):
        other.grad = param.grad.clone()
    twin.step()
    assert not torch.equal(weights[0], twin_weights[0])
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, twin_weights, strict=True))


@pytest.mark.parametrize("contiguous", [True, False])
def test_a_factored_update_equals_the_whole_one(contiguous: bool) -> None:
    start = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    weight = nn.Parameter(start.clone() if contiguous else start.clone().transpose(1, 2).contiguous().transpose(1, 2))
    weight.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(1))
    rule = LowRank(Adam(), 2)
    state = {name: value.unsqueeze(0) for name, value in rule.init(weight.detach()).items()}
    whole = rule.update(weight.grad.unsqueeze(0), state, torch.zeros(1, dtype=torch.float64)).dense()[0]
    Chain([weight], rule, lr=0.1).step()
    torch.testing.assert_close(weight.detach(), start - 0.1 * whole.view(start.shape))


def test_state_that_somebody_cleared_starts_anew() -> None:
    weights = params((3, 2), (3, 2))
    optimizer = Chain(weights, Plain())
    optimizer.step()
    optimizer.state.clear()
    optimizer.step()
    assert [float(optimizer.state[w]["count"][0, 0]) for w in weights] == [1, 1]


def test_state_of_another_optimizer_is_refused() -> None:
    saved = Chain(params((3, 2)), Plain())
    saved.step()
    with pytest.raises(ValueError, match="1 parameters in 1 groups, this one 2 in 1"):
        Chain(params((3, 2), (3, 2)), Plain()).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"parameter 0 has count of shape \(3, 2\).*need \(4, 2\)"):
        Chain(params((4, 2)), Plain()).load_state_dict(saved.state_dict())
    with pytest.raises(ValueError, match=r"has count of shape \(3, 2\), but these settings of Chain need none"):
        Chain(params((3, 2)), Adam()).load_state_dict(saved.state_dict())
    joining = Chain(params((3, 2), (4, 2)), Plain())
    joining.param_groups[0]["params"][0].grad = None
    joining.step()  # only the second parameter has state
    with pytest.raises(ValueError, match="parameter 1 has count"):
        Chain(params((3, 2), (5, 2)), Plain()).load_state_dict(joining.state_dict())
    late = saved.state_dict()
    del late["state"][0]["count"]
    with pytest.raises(ValueError, match="has count of shape missing, but"):
        Chain(params((3, 2)), Plain()).load_state_dict(late)


def test_loaded_state_is_a_copy() -> None:
    weights = params((3, 2))
    saved, loaded = Chain(weights, Plain()), Chain(weights, Plain())
    saved.step()
    loaded.load_state_dict(saved.state_dict())
    loaded.step()
    assert float(saved.state[weights[0]]["count"][0, 0]) == 1


def test_sparse_and_complex_gradients_are_refused_by_name() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"sparse gradients.*\(4, 3\)"):
        Chain(table.parameters(), Plain()).step()
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match="complex"):
        Chain([weight], Plain()).step()


def test_a_wrong_group_is_refused_and_not_kept() -> None:
    optimizer = Chain(params((2,)), Plain())
    with pytest.raises(ValueError, match="lr=-1"):
        optimizer.add_param_group({"params": params((3,)), "lr": -1})
    assert len(optimizer.param_groups) == 1


# --- one parameter at a time ------------------------------------------------------------------------------------------


def layers(count: int = 3) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(12, 8), (8, 12), (5,)][:count]
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def gradients(params: list[torch.nn.Parameter], step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step + 1)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def galore(params: list[torch.nn.Parameter]) -> GaLoreAdamW:
    return GaLoreAdamW(params, lr=0.1, weight_decay=0.1, rank=3, refresh=4)


def test_stepping_parameters_one_by_one_is_stepping_them_all() -> None:
    together, single = layers(), layers()
    whole, parts = galore(together), galore(single)
    for step in range(6):
        for param, grad in zip(together, gradients(together, step), strict=True):
            param.grad = grad
        whole.step()
        for param, grad in reversed(list(zip(single, gradients(single, step), strict=True))):
            parts.step_param(param, grad)
    for a, b in zip(together, single, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_projected_gradient_is_enough_between_refreshes() -> None:
    whole, pieces = layers(2), layers(2)
    one, two = galore(whole), galore(pieces)
    for step in range(6):
        for param, other, grad in zip(whole, pieces, gradients(whole, step), strict=True):
            one.step_param(param, grad)
            assert two.projects(other)
            if two.basis_due(other):
                two.refit(other, grad)
            assert not two.basis_due(other)
            accumulated = sum(two.project(other, part) for part in (0.3 * grad, 0.7 * grad))
            assert isinstance(accumulated, Tensor) and accumulated.shape == two.state[other]["exp_avg"].shape
            # What is lifted holds what is projected, and nothing beside it.
            lifted = two.lift(other, accumulated)
            torch.testing.assert_close(two.project(other, lifted), accumulated, rtol=0, atol=1e-12)
            two.step_param(other, projected=accumulated)
    for a, b in zip(whole, pieces, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_what_one_parameter_alone_cannot_do_is_said() -> None:
    params = layers()
    optimizer = galore(params)
    with pytest.raises(ValueError, match="either grad or projected"):
        optimizer.step_param(params[0])
    with pytest.raises(ValueError, match=r"no basis yet; call refit first"):
        optimizer.project(params[0], torch.ones(12, 8))
    with pytest.raises(ValueError, match=r"\(5,\) is not projected"):
        optimizer.lift(params[2], torch.ones(3, 3))
    with pytest.raises(ValueError, match=r"holds no such parameter of shape \(2, 2\)"):
        optimizer.step_param(torch.nn.Parameter(torch.ones(2, 2)), torch.ones(2, 2))
    assert not optimizer.projects(params[2])


def test_a_parameters_group_is_found_after_loading_and_adding_groups() -> None:
    params = layers()
    optimizer = GaLoreAdamW(params[:1], rank=2)
    assert optimizer.group_of(params[0])["rank"] == 2
    optimizer.add_param_group({"params": params[1:2], "rank": None})
    assert optimizer.group_of(params[1])["rank"] is None and not optimizer.projects(params[1])
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.param_groups[1]["rank"] = 3
    assert optimizer.group_of(params[1])["rank"] == 3
