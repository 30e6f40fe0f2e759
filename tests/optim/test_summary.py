"""The summary says of every parameter what the optimizer then does to it, and keeps of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain.optim import GaLoreAdamW, parameter_groups, state_bytes
from leantrain.optim.apollo import APOLLO
from leantrain.optim.in_backward import step_in_backward
from leantrain.optim.summary import Touched, summary, touched

pytestmark = pytest.mark.filterwarnings("ignore:rank=.* is too large")


def network(*sizes: int) -> nn.Module:
    return nn.Sequential(*[nn.Linear(fan_in, fan_out) for fan_in, fan_out in pairwise(sizes)])


def stepped(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    for param in model.parameters():
        param.grad = torch.randn_like(param) if param.requires_grad else None
    optimizer.step()
    return optimizer


SETTINGS = [
    {},
    {"rank": 1},
    {"rank": 3},
    {"rank": 3, "side": "reverse_std"},
    {"rank": 3, "side": "left", "basis": "subspace"},
]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=5), options=st.sampled_from(SETTINGS))
def test_every_parameter_is_in_one_row_whose_bytes_sides_and_rank_are_those_of_the_state(
    sizes: list[int], options: dict[str, object]
) -> None:
    model = network(*sizes)
    optimizer = GaLoreAdamW(parameter_groups(model, [{"params": "weight", **options}], no_decay=True))
    rows = touched(optimizer, model)
    assert sorted(name for row in rows for name in row.names) == sorted(name for name, _ in model.named_parameters())
    assert sum(row.numbers for row in rows) == sum(param.numel() for param in model.parameters())
    stepped(optimizer, model)
    assert sum(row.state_bytes for row in rows) == state_bytes(optimizer)
    for row in rows:
        params = [model.get_parameter(name) for name in row.names]
        state = [optimizer.state[param] for param in params]
        held = sum(t.numel() * t.element_size() for s in state for t in s.values() if t.ndim)
        assert row.state_bytes == held
        projected = [(p, s["basis"]) for p, s in zip(params, state, strict=True) if "basis" in s]
        assert row.columns + row.rows == len(projected)
        # A square matrix does not tell which side it was; its moments are of the other one's length either way.
        assert row.columns >= sum(p.shape[1] == len(basis) != p.shape[0] for p, basis in projected)
        assert row.rows >= sum(p.shape[0] == len(basis) != p.shape[1] for p, basis in projected)
        rank = options.get("rank")
        small = [p.ndim == 2 and rank is not None and min(p.shape) <= rank for p in params]
        assert row.too_small == (rank if small[0] else None) and len(set(small)) == 1


def test_the_text_has_a_line_for_each_row_and_for_each_reason() -> None:
    model = network(32, 64, 6, 32)
    model[2].bias.requires_grad_(False)
    groups = parameter_groups(model, [{"params": "^[01].weight", "rank": 8, "lr": 0.5}])
    optimizer = GaLoreAdamW(groups[:1], weight_decay=0.1)
    assert summary(optimizer, model).splitlines() == [
        "GaLoreAdamW: 2 tensors, 2.4 k numbers, 8.2 kB of state",
        "group  lr   decay  method            tensors  numbers  projected   state",
        "0      0.5    0.1  Adam, rank 8 SVD        1    2.0 k  columns 1  5.1 kB",
        "0      0.5    0.1  Adam                    1      384             3.1 kB",
        "Stepped whole, because rank 8 is not below their smaller side: 1.weight [6, 64].",
        "Frozen: 1 tensor, 32 numbers.",
        "Trainable, but not this optimizer's: 3 tensors, 262 numbers.",
    ]


def test_many_matrices_below_the_rank_are_named_once_and_counted() -> None:
    model = network(*[4] * 10)
    text = summary(GaLoreAdamW(parameter_groups(model, [{"params": "weight", "rank": 4}])), model)
    (line,) = [line for line in text.splitlines() if line.startswith("Stepped whole")]
    assert "0.weight [4, 4], 1.weight [4, 4]" in line and line.endswith("5.weight [4, 4] and 3 more.")


def test_the_sides_that_apollo_projects_are_counted() -> None:
    model = network(8, 16, 4)
    optimizer = APOLLO(parameter_groups(model, [{"params": "weight", "rank": 2}]))
    row = touched(optimizer, model)[0]
    assert (row.columns, row.rows, row.method) == (1, 1, "Adam, rank 2 Apollo")


def test_a_model_without_memory_is_enough() -> None:
    with torch.device("meta"):
        model = network(32, 64, 32)
    rows = touched(GaLoreAdamW(model.parameters(), rank=4), model)
    assert rows[0].state_bytes == 4 * 2 * 4 * (2 * 64 + 32)


def test_pytorchs_own_optimizers_are_summed_up_and_unknown_ones_refused() -> None:
    model = network(4, 8, 4)
    (row,) = touched(torch.optim.AdamW(model.parameters()), model)
    numbers = 4 * 8 + 8 + 8 * 4 + 4
    names = tuple(name for name, _ in model.named_parameters())
    assert row == Touched(group=0, method="AdamW", names=names, numbers=numbers, state_bytes=8 * numbers)
    with pytest.raises(ValueError, match="LBFGS cannot be predicted"):
        touched(torch.optim.LBFGS(model.parameters()), model)


def test_it_changes_nothing_of_the_optimizer() -> None:
    torch.manual_seed(0)
    twins = [network(8, 16, 8), network(8, 16, 8)]
    twins[1].load_state_dict(twins[0].state_dict())
    optimizers = [GaLoreAdamW(model.parameters(), rank=2, refresh=2) for model in twins]
    for seed in range(4):
        summary(optimizers[0], twins[0])
        for model, optimizer in zip(twins, optimizers, strict=True):
            torch.manual_seed(seed)
            stepped(optimizer, model)
    for one, other in zip(twins[0].parameters(), twins[1].parameters(), strict=True):
        assert torch.equal(one, other)


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group 0 has a parameter of shape \(8, 4\) that is not the model's"):
        summary(torch.optim.AdamW(network(4, 8).parameters()), network(4, 8))


def test_the_summary_on_the_page_about_hosts_is_the_one_that_is_printed() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    groups = parameter_groups(model, [{"params": "all-linear", "rank": 8}], no_decay=True)
    page = (Path(__file__).parents[2] / "docs" / "hosts.md").read_text(encoding="utf-8")
    assert f"```text\n{summary(GaLoreAdamW(groups, lr=1e-2, weight_decay=0.1), model)}\n```" in page


def test_an_optimizer_that_step_in_backward_wraps_is_the_one_inside() -> None:
    model = network(32, 64)
    optimizer = GaLoreAdamW(model.parameters(), rank=4)
    assert summary(step_in_backward(model, optimizer), model) == summary(optimizer, model)


def test_an_optimizer_that_accelerate_wraps_is_the_one_inside() -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = network(32, 64)
    optimizer = GaLoreAdamW(model.parameters(), rank=4)
    wrapped = accelerate.Accelerator(cpu=True).prepare(optimizer)
    assert type(wrapped) is not GaLoreAdamW
    assert summary(wrapped, model) == summary(optimizer, model)
