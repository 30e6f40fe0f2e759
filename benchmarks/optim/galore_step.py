"""One optimizer step on four GPT-2-small blocks: GaLore, galore-torch and AdamW side by side on one thread.

    python -m benchmarks.optim.galore_step

Every optimizer has its own copy of the same 28.3 M weights and gradients; the optimizers take turns, so that a change
in the machine's speed meets all of them. The two projections alone (`floor`) are timed in the same turns: no
implementation of GaLore in float32 can be faster than its matrix products. Also checks the two figures that are not
times: state bytes against the formula, and weights against galore-torch after 20 steps.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.optim import AdamW, GaLoreAdamW, state_bytes

WIDTH, RANK, REFRESH, BLOCKS = 768, 192, 200, 4
SHAPES = ([(WIDTH, WIDTH)] * 4 + [(4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH)]) * BLOCKS
TURNS = 25


def main() -> None:
    torch.set_num_threads(1)
    optimizers = {
        "torch AdamW, fused": torch.optim.AdamW(weights(), weight_decay=0.0, fused=True),
        "leantrain AdamW": AdamW(weights()),
        "leantrain GaLore, subspace": GaLoreAdamW(weights(), rank=RANK, refresh=REFRESH, basis="subspace"),
        "leantrain GaLore, svd": GaLoreAdamW(weights(), rank=RANK, refresh=REFRESH, basis="svd"),
        "galore-torch": galore_torch(weights()),
    }
    first = {name: seconds(optimizer.step) for name, optimizer in optimizers.items()}
    steps: dict[str, Callable[[], object]] = {name: o.step for name, o in optimizers.items()} | {"floor": products()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            times[name].append(seconds(step))

    # The staggered refreshes: as many steps as there are between two of one matrix see each matrix's refresh once.
    ours = optimizers["leantrain GaLore, subspace"]
    period = [seconds(ours.step) for _ in range(REFRESH)]
    plain = sorted(period)[: REFRESH - len(SHAPES)]
    amortised = (sum(period) - REFRESH * statistics.mean(plain)) / REFRESH

    base = statistics.median(times["torch AdamW, fused"])
    rows = []
    for name in steps:
        median = statistics.median(times[name])
        held = state_bytes(optimizers[name]) / 1e6 if name in optimizers else None
        worst = max([first[name], *times[name], *(period if name.endswith("subspace") else [])]) if held else None
        rows.append([
            name if held else "two projections alone (32-bit matrix products)",
            f"{1e3 * median:.0f}",
            f"{median / base:.2f}",
            f"{first[name] / median:.1f}" if held else "",
            f"{worst / median:.1f}" if worst else "",
            f"{held:.2f}" if held else "",
        ])  # fmt: skip
    formula = 4 * sum(GaLoreAdamW.state_numel(shape, RANK) for shape in SHAPES)
    training = training_step_seconds()
    write_result(
        "optim/galore_step",
        title=f"Optimizer step, four GPT-2-small blocks ({sum(a * b for a, b in SHAPES) / 1e6:.1f} M), rank {RANK}",
        columns=["optimizer", "median ms", "x fused AdamW", "first / median", "worst / median", "state MB"],
        rows=rows,
        notes=[
            f"GaLore state by the formula R (2 L + S): {formula / 1e6:.2f} MB; "
            f"measured equals it: {state_bytes(ours) == formula}.",
            f"Refreshes cost {1e3 * amortised:.2f} ms a step on average, {100 * amortised / training:.2f} % of a "
            f"training step of these blocks (8 x 128 tokens, {1e3 * training:.0f} ms).",
            f"Largest difference from galore-torch's weights after 20 steps, rank 4, same SVD, refreshed at step 7 and "
            f"14: {difference_from_galore_torch():.1e} (weights of size 1, tall, wide and square).",
        ],
    )


def weights(shapes: list[tuple[int, int]] = SHAPES, scale: float = 0.02) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator) * scale) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return params


def galore_torch(params: list[nn.Parameter], **options: object) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW as Peer

    settings = {"rank": RANK, "update_proj_gap": REFRESH, "scale": 0.25, "proj_type": "std"} | options
    return Peer([{"params": params, **settings}], lr=1e-3, eps=1e-8, no_deprecation_warning=True)


def products() -> Callable[[], None]:
    """The projection and the back-projection of every matrix, and nothing else."""
    params = weights()
    bases = [torch.linalg.qr(torch.randn(min(p.shape), RANK)).Q for p in params]
    targets = [p.detach().clone() for p in params]

    def step() -> None:
        for param, basis, target in zip(params, bases, targets, strict=True):
            grad: Tensor = param.grad  # type: ignore[assignment]
            if grad.shape[0] >= grad.shape[1]:
                target.addmm_(grad @ basis, basis.T, alpha=1e-9)
            else:
                target.addmm_(basis, basis.T @ grad, alpha=1e-9)

    return step


def difference_from_galore_torch() -> float:
    shapes = [(24, 16), (16, 24), (16, 16)]
    mine, theirs = weights(shapes, scale=1.0), weights(shapes, scale=1.0)
    ours = GaLoreAdamW(mine, lr=1e-2, rank=4, refresh=7, stagger=False)
    peer = galore_torch(theirs, rank=4, update_proj_gap=7)
    peer.param_groups[0]["lr"] = 1e-2
    for step in range(20):
        generator = torch.Generator().manual_seed(step)
        for a, b in zip(mine, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=generator)
            b.grad = a.grad.clone()
        ours.step()
        peer.step()
    return max((a - b).abs().max().item() for a, b in zip(mine, theirs, strict=True))


def training_step_seconds() -> float:
    """Forward, backward and GaLore's step of these blocks as a transformer, 8 sequences of 128 tokens."""
    layer = nn.TransformerEncoderLayer(WIDTH, 12, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)
    optimizer = GaLoreAdamW(model.parameters(), rank=RANK, refresh=REFRESH, basis="subspace")
    inputs = torch.randn(8, 128, WIDTH)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    step()
    return statistics.median(seconds(step) for _ in range(5))


def seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
