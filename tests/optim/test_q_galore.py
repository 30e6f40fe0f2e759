"""Q-GaLore is GaLore with other defaults; what they do together is tested here, each part where it is written."""

from __future__ import annotations

import inspect
import math

import torch

from leantrain.nn import Llama
from leantrain.optim import GaLoreAdamW, QGaLoreAdamW, parameter_groups, state_bytes


def loss_of(model: Llama, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 40, (8, 1), generator=generator)
    tokens = (start + 3 * torch.arange(17)) % 64  # each token is told by the one before
    return torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def trained(optimizer_class: type[GaLoreAdamW], **options: object) -> tuple[float, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = Llama(vocab_size=64, context=16, hidden=32, mlp_hidden=64, layers=2, heads=2)
    groups = parameter_groups(model, [{"params": "hidden", "rank": 8}])
    optimizer = optimizer_class(groups, lr=0.02, refresh=5, full_precision_below=0, **options)  # type: ignore[arg-type]
    for step in range(60):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        return loss_of(model, 1000).item(), optimizer


def test_it_is_galore_with_these_defaults_and_no_others() -> None:
    ours, galore = (inspect.signature(c).parameters for c in (QGaLoreAdamW, GaLoreAdamW))
    assert list(ours) == list(galore)
    differing = {name: p.default for name, p in ours.items() if p.default != galore[name].default}
    assert differing == {"state_bits": 8, "basis_bits": 4, "settled": 0.4}


def test_it_learns_nearly_as_well_with_a_fraction_of_the_state() -> None:
    loss, optimizer = trained(QGaLoreAdamW)
    whole, galore = trained(GaLoreAdamW)
    assert whole < 0.5 * math.log(64) and loss < 1.3 * whole
    assert state_bytes(optimizer) < 0.3 * state_bytes(galore)


def test_matrices_that_have_settled_are_refreshed_less() -> None:
    """The same task in the same basis all along: after two times five refreshes most periods have grown."""
    _, optimizer = trained(QGaLoreAdamW)
    periods = [int(state["period"]) for state in optimizer.state.values() if "period" in state]
    assert min(periods) >= 5 and sum(period > 5 for period in periods) > len(periods) / 2
    _, fixed = trained(QGaLoreAdamW, settled=None)
    assert {int(state["period"]) for state in fixed.state.values() if "period" in state} == {5}


def test_bases_in_four_bits_share_a_byte_between_two_numbers() -> None:
    weight = torch.nn.Parameter(torch.ones(256, 128))
    optimizer = QGaLoreAdamW([weight], rank=16)
    weight.grad = torch.randn(256, 128, generator=torch.Generator().manual_seed(0))
    optimizer.step()
    state = optimizer.state[weight]
    assert state["basis"].dtype == torch.uint8 and state["basis"].numel() == 128 * 16 // 2
    directions = optimizer.rule_for(weight, optimizer.param_groups[0]).basis.directions(  # type: ignore[attr-defined]
        {name: value.unsqueeze(0) for name, value in state.items() if name.startswith("basis")}, 128, 16
    )[0]
    exact = torch.linalg.svd(weight.grad, full_matrices=False).Vh[:16].T
    assert (directions - exact).abs().max() < 1 / 15 * (exact.max() - exact.min())
