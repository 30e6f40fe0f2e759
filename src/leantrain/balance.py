"""Contiguous groups of layers, none of which costs much more than the others."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from leantrain.modes import evaluation_mode

_REPEATS = 5


def balanced(costs: Sequence[float], groups: int) -> list[int]:
    """Where to divide `costs` into contiguous groups, none of them empty, so that the dearest is as cheap as can be.

    Args:
        costs: [n] what each layer costs, >= 0.
        groups: how many groups, 1 to n.

    Returns:
        [groups - 1] rising indices of the layers with which the second and later groups begin. Of several divisions
        with an equally cheap dearest group, one whose other groups are balanced among themselves as well.
    """
    sums = [0.0, *accumulate(costs)]
    n = len(costs)
    # best[g][i]: (dearest, sum of squares) of the first i layers in g groups, and where the last of these begins.
    best: list[list[tuple[float, float, int]]] = [
        [(float("inf"), float("inf"), 0)] * (n + 1) for _ in range(groups + 1)
    ]
    best[0][0] = (0.0, 0.0, 0)
    for g in range(1, groups + 1):
        for i in range(g, n + 1):
            for start in range(g - 1, i):
                dearest, squares, _ = best[g - 1][start]
                cost = sums[i] - sums[start]
                best[g][i] = min(best[g][i], (max(dearest, cost), squares + cost * cost, start))
    found, end = [], n
    for g in range(groups, 1, -1):
        end = best[g][end][2]
        found.append(end)
    return found[::-1]


@torch.no_grad()
def seconds_between(model: nn.Module, sample: Tensor, names: Sequence[str]) -> list[float]:
    """Seconds of a forward pass from the start, and from the input of every named module, to the next of them or the
    end: the median of a few passes. [len(names) + 1]."""
    marks: list[float] = []
    modules = dict(model.named_modules())
    handles = [modules[name].register_forward_pre_hook(lambda *_: marks.append(_now(sample))) for name in names]
    passes = []
    try:
        with evaluation_mode(model):
            for _ in range(_REPEATS + 1):
                marks.clear()
                start = _now(sample)
                model(sample)
                times = [start, *marks, _now(sample)]
                passes.append([after - before for before, after in pairwise(times)])
    finally:
        for handle in handles:
            handle.remove()
    return [statistics.median(each) for each in zip(*passes[1:], strict=True)]  # the first one warms up


def _now(sample: Tensor) -> float:
    if sample.device.type == "cuda":
        torch.cuda.synchronize(sample.device)
    return time.perf_counter()
