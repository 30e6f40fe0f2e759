"""The loss on held-out data, shared out over the processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from torch import Tensor

from leantrain.data import Batch, Data
from leantrain.learn import Learner
from leantrain.processes import World


def evaluate(
    learner: Learner, data: Data, world: World, size: int, limit: int | None, *, in_nats: bool = True
) -> dict[str, float]:
    """Mean loss over the held-out data, the same in every process.

    Args:
        size: examples per forward pass of one process.
        limit: most batches of `size`, over all processes together; None: all held-out data.
        in_nats: whether the loss of text is cross entropy, so that there is a perplexity.

    Returns:
        `val_loss`; for text its `val_perplexity`; for classes the `val_accuracy`, a part from 0 to 1.
    """
    found: dict[str, Tensor] = {}
    for batch, counts in _share(data.eval_batches(size, limit), world):
        for name, value in learner.evaluate(batch.to(world.device)).items():
            # Added in float64 on the device, so that nothing waits for it before the end.
            found[name] = value.double() * counts + found.get(name, 0.0)
    sums = world.total({name: value.item() for name, value in found.items()})
    if not sums.get("count"):
        return {"val_loss": math.nan}
    values = _means("", sums, data.task, in_nats)
    for output in dict.fromkeys(name.rpartition("/")[0] for name in sums if "/" in name):
        values |= _means(f"{output}/", sums, data.task, in_nats)
    return values


def _means(output: str, sums: Mapping[str, float], task: str, in_nats: bool) -> dict[str, float]:
    """Of the sums of one output, whose names begin with `output`."""
    loss = sums[f"{output}loss_sum"] / sums[f"{output}count"]
    values = {f"{output}val_loss": loss}
    if task == "next_token" and in_nats:
        values[f"{output}val_perplexity"] = math.exp(loss) if loss < 700 else math.inf
    if task == "classification":
        values[f"{output}val_accuracy"] = sums[f"{output}correct"] / sums[f"{output}count"]
    return values


def _share(batches: Iterator[Batch], world: World) -> Iterator[tuple[Batch, int]]:
    """Batches in rounds, one to each process, with 1 if it counts. All processes get the same number, because a
    sharded model needs all of them in every forward pass: in a last round that is short, some repeat a batch for 0."""
    this_round: list[Batch] = []
    for batch in batches:
        this_round.append(batch)
        if len(this_round) == world.size:
            yield this_round[world.rank], 1
            this_round = []
    if this_round:
        yield this_round[min(world.rank, len(this_round) - 1)], int(world.rank < len(this_round))
