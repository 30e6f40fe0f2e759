"""WeLore against the same rank for every matrix, at equal size, and before and after tuning the factors alone.

    python -m benchmarks.compress.welore

A Llama of 0.67 million parameters is trained for 1000 steps on Python's standard library and compressed in several
ways; all are measured on the same held-out text. The loss is also measured after 200 more steps: on the factors alone,
and, as a control, on the whole dense model. Planning is timed on the shapes of a 60M model.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.compress import freeze_all_but_factors, plan_welore
from leantrain.data import Text
from leantrain.layers import chosen_linears, replace_layer
from leantrain.learn.losses import mean_loss
from leantrain.ledger.process_memory import ProcessPeak
from leantrain.nn import Llama, num_parameters
from leantrain.nn.factored import FactoredLinear, matrix_of
from leantrain.optim import parameter_groups
from leantrain.optim.schedules import schedule

CONTEXT, BATCH, STEPS, TUNING, SEEDS = 64, 16, 1000, 200, (0, 1, 2)
CRITERIA = ("normalised", "energy", "marchenko-pastur")


def main() -> None:
    torch.set_num_threads(1)
    planned = planning()  # first: a process that did other work before measures too little memory
    data = Text(context=CONTEXT)
    runs = [measure(trained(data, seed), data, seed) for seed in SEEDS]
    write_result(
        "compress/welore",
        title=f"Compressing a trained Llama of {num_parameters(llama()) / 1e6:.2f} M parameters",
        columns=["compression", "% of numbers", "% of ranks", "val loss", "x same rank's", "after 200 steps"],
        rows=[row(name, runs) for name in runs[0]],
        notes=[
            f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; {STEPS} steps of {BATCH} x {CONTEXT} "
            f"bytes, then a validation loss of {mean([run['dense'].loss for run in runs]):.3f} nats per byte. Numbers "
            "and ranks: kept, of the compressed matrices. Losses: above the dense model's. 'same rank' gives every "
            "matrix the same one, or one more. 'truncated' cuts also where nothing is saved by it. "
            "'after 200 steps' on the factors alone; for dense, on everything.",
            regained(runs),
            planned,
        ],
    )  # fmt: skip


@dataclass(frozen=True)
class Found:
    """What became of one model."""

    numbers: float
    """Part of the numbers kept."""
    ranks: float
    loss: float
    tuned: float | None = None
    """Loss after tuning, where that was done."""


Run = dict[str, Found]


def measure(model: nn.Module, data: Text, seed: int) -> Run:
    """The dense model and every compression of it, by name."""
    found: Run = {}

    def add(name: str, compressed: nn.Module, tuned: bool = False) -> None:
        loss = val_loss(compressed, data)
        numbers, ranks = kept(model, compressed)
        if tuned:
            tune(compressed, freeze_all_but_factors(compressed) if numbers < 1 else compressed.parameters(), data, seed)
        found[name] = Found(numbers, ranks, loss, val_loss(compressed, data) if tuned else None)

    def copied() -> nn.Module:
        return copy.deepcopy(model)

    add("dense", copied(), tuned=True)
    plan = plan_welore(model, 0.3)
    add("30 % of ranks: same rank", uniform(copied(), numbers=plan.parameters_after))
    add("30 % of ranks: normalised", plan.apply(copied()), tuned=True)
    for part in (0.3, 0.5):
        same = (1 - part) * plan.parameters_before
        add(f"{part:.0%} of numbers: same rank".replace("%", " %"), uniform(copied(), numbers=same))
        for criterion in CRITERIA:
            fitted = plan_welore(model, part, measure="parameters", criterion=criterion).apply(copied())
            add(f"{100 * part:.0f} % of numbers: {criterion}", fitted, tuned=(part, criterion) == (0.5, "normalised"))
    add("truncated: same rank", uniform(copied(), ranks=0.7 * total_rank(model)))
    for criterion in CRITERIA:
        cut = plan_welore(model, 0.3, criterion=criterion, even_without_saving=True).apply(copied())
        add(f"truncated: {criterion}", cut)
    return found


def uniform(model: nn.Module, numbers: float = math.inf, ranks: float = math.inf) -> nn.Module:
    """Every matrix cut to the same rank, and to one more as many of them, from the first, as the total allows."""
    layers = chosen_linears(model)
    kept = dict.fromkeys(layers, 0)
    for _ in range(min(min(matrix_of(layer).shape) for layer in layers.values())):
        for name, layer in layers.items():
            numbers -= sum(matrix_of(layer).shape)
            ranks -= 1
            if numbers < 0 or ranks < 0:
                break
            kept[name] += 1
    for name, layer in layers.items():
        replace_layer(model, layer, FactoredLinear.from_linear(layer, kept[name]))
    return model


def kept(dense: nn.Module, compressed: nn.Module) -> tuple[float, float]:
    """Parts of the numbers and of the ranks of the dense matrices that the compressed ones have."""
    before = sum(matrix_of(layer).numel() for layer in chosen_linears(dense).values())
    saved = num_parameters(dense) - num_parameters(compressed)
    ranks = sum(
        m.rank - min(m.in_features, m.out_features) for m in compressed.modules() if isinstance(m, FactoredLinear)
    )
    return 1 - saved / before, 1 + ranks / total_rank(dense)


def total_rank(model: nn.Module) -> int:
    return sum(min(matrix_of(layer).shape) for layer in chosen_linears(model).values())


def row(name: str, runs: list[Run]) -> list[str]:
    group, _, way = name.partition(": ")
    found = [run[name] for run in runs]
    ups = [run[name].loss - run["dense"].loss for run in runs]
    base = [run[f"{group}: same rank"].loss - run["dense"].loss for run in runs] if way else []
    then = [run[name].tuned - run["dense"].loss for run in runs if run[name].tuned is not None]  # type: ignore[operator]
    return [
        name,
        f"{100 * mean([f.numbers for f in found]):.1f}",
        f"{100 * mean([f.ranks for f in found]):.1f}",
        spread(ups, 4) if way else "",
        spread([up / b for up, b in zip(ups, base, strict=True)], 2) if way else "",
        spread(then, 4) if then else "",
    ]


def regained(runs: list[Run]) -> str:
    name = "50 % of numbers: normalised"
    lost = mean([run[name].loss - run["dense"].loss for run in runs])
    left = mean([run[name].tuned - run["dense"].loss for run in runs])  # type: ignore[operator]
    apart = mean([run[name].tuned - run["dense"].tuned for run in runs])  # type: ignore[operator]
    return (
        f"Of the {lost:.4f} nats that {name} costs, 200 steps on the factors regain {1 - left / lost:.0%}; measured "
        f"against the dense model after 200 steps more of its own, {1 - apart / lost:.0%}."
    )


def llama() -> Llama:
    return Llama(256, context=CONTEXT, hidden=128, mlp_hidden=352, layers=3, heads=4)


def trained(data: Text, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = llama()
    groups = parameter_groups(model, [{"params": "hidden", "lr": 3e-3}])
    descend(model, torch.optim.AdamW(groups, lr=3e-2, weight_decay=0.0), data, seed, STEPS)
    return model


def tune(model: nn.Module, params: Iterable[Tensor], data: Text, seed: int) -> None:
    descend(model, torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0), data, seed + 1000, TUNING)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, data: Text, seed: int, steps: int) -> None:
    factor, base = schedule(steps=steps), [group["lr"] for group in optimizer.param_groups]
    for step in range(steps):
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor(step)
        batch = data.train_batch(seed, step, BATCH)
        optimizer.zero_grad()
        mean_loss("next_token", model(batch.inputs), batch.targets).backward()
        optimizer.step()


@torch.no_grad()
def val_loss(model: nn.Module, data: Text) -> float:
    losses = [mean_loss("next_token", model(b.inputs), b.targets) for b in data.eval_batches(64, 10)]
    return torch.stack(losses).mean().item()


def spread(values: list[float], digits: int) -> str:
    return f"{mean(values):.{digits}f} ± {stdev(values) if len(values) > 1 else 0:.{digits}f}"


def planning() -> str:
    model = Llama(32_000, preset="60M")
    peak = ProcessPeak()
    peak.start(already_held=sum(p.numel() * p.element_size() for p in model.parameters()))
    start = time.perf_counter()
    plan = plan_welore(model, 0.3, measure="parameters")
    planned = time.perf_counter()
    plan.apply(model)
    peak.sample()
    return (
        f"A 60M model (vocabulary of 32,000) is planned in {planned - start:.1f} s and factored in "
        f"{time.perf_counter() - planned:.1f} s, {(peak.read() or 0) / 1e9:.2f} GB at the peak with the model's own."
    )


if __name__ == "__main__":
    main()
