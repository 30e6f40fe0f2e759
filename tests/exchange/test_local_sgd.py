"""Local SGD and DiLoCo: where they must be something that is known already."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from leantrain.exchange import DiLoCo, LocalSGD
from tests.gloo import in_processes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def after(rank: int, every: int) -> Tensor:
    """Weights after six steps of plain SGD: averaged by DDP for every=0."""
    plain = network()
    exchange = LocalSGD(every=every) if every else None
    model = exchange.attach(plain) if exchange else DistributedDataParallel(plain)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(6):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(7 * step + rank))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if exchange:
            exchange.after_step()
    return torch.cat([param.detach().flatten() for param in plain.parameters()])


def test_meeting_after_every_step_of_plain_sgd_is_averaging_gradients() -> None:
    local, gradients = in_processes(3, after, 1), in_processes(3, after, 0)
    torch.testing.assert_close(local[0], gradients[0], atol=1e-6, rtol=1e-5)
    assert torch.equal(local[0], local[2])


def test_meeting_seldom_is_something_else() -> None:
    seldom, gradients = in_processes(3, after, 3), in_processes(3, after, 0)
    assert torch.equal(seldom[0], seldom[1])
    assert (seldom[0] - gradients[0]).abs().max() > 1e-4


def test_diloco_alone_looks_ahead_with_nesterov_momentum() -> None:
    model, reference = network(), network()
    exchange = DiLoCo(every=2)
    exchange.attach(model)
    outer = torch.optim.SGD(reference.parameters(), lr=0.7, momentum=0.9, nesterov=True)
    local = network()
    for step in range(8):
        inputs = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for each in (model, local):
            each.zero_grad()
            each(inputs).square().mean().backward()
            with torch.no_grad():
                for param in each.parameters():
                    param.sub_(param.grad, alpha=0.05)
        exchange.after_step()
        if step % 2:
            for agreed, own in zip(reference.parameters(), local.parameters(), strict=True):
                agreed.grad = agreed.detach() - own.detach()
            outer.step()
            local.load_state_dict(reference.state_dict())
    for found, expected in zip(model.parameters(), local.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
