"""Partition-wise training: one partition is backpropagation, factors of 1 are greedy local updates, and whatever waits,
every example reaches every partition once, in order, also across a stop."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import Backprop, LocalUpdates
from leantrain.learn.fitting import Pair
from leantrain.learn.partition_wise import PartitionWise
from leantrain.learn.whole import Whole
from leantrain.ledger.activations import Activations
from leantrain.ledger.storages import storage_keys
from leantrain.nn import Llama, ResNetCifar
from leantrain.recipe import Component
from leantrain.train import train
from tests.small_runs import checkpoint_tensors, small_recipe


def mlp(depth: int = 4, width: int = 12, dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6 if i == 0 else width, width), nn.ReLU(), nn.Dropout(dropout))
              for i in range(depth)]  # fmt: skip
    return nn.Sequential(*layers, nn.Linear(width, 3))


def with_norm() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.3), nn.Linear(12, 3))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNetCifar(20, classes=3)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return Llama(vocab_size=16, hidden=16, mlp_hidden=24, layers=3, heads=2)


class Masked(nn.Module):
    """Looks at its inputs again in the second half."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        seen = (inputs.sum(1, keepdim=True) > 0).float()
        return self.second(self.first(inputs).relu()) * seen


def batches(kind: str, count: int, size: int = 4) -> list[Pair]:
    draws = torch.Generator().manual_seed(3)

    def batch() -> Pair:
        if kind == "llama":
            tokens = torch.randint(16, (size, 9), generator=draws)
            return Pair(tokens[:, :-1].clone(), tokens[:, 1:].clone())
        shape = (size, 3, 32, 32) if kind == "resnet" else (size, 6)
        return Pair(torch.randn(shape, generator=draws), torch.randint(3, (size,), generator=draws))

    return [batch() for _ in range(count)]


TASKS = {"llama": "next_token", "mlp": "classification", "resnet": "classification", "masked": "classification"}
MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "resnet": resnet, "llama": llama, "masked": Masked}


def trained(learner: Whole, given: list[Pair], lr: float = 0.1) -> list[Tensor]:
    """Weights after SGD with momentum, heads included."""
    params = list(learner.module.parameters())
    optimizer = torch.optim.SGD(params, lr=lr, momentum=0.9)
    for number, batch in enumerate(given):
        torch.manual_seed(number)
        learner.step(batch)
        learner.hand_over()
        optimizer.step()
        optimizer.zero_grad()
    return [param.detach().clone() for param in params]


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_partition_is_backpropagation_bit_for_bit(precision: Any):
    given = batches("mlp", 6)
    ours = PartitionWise(with_norm(), "classification", sample=given[0].inputs, blocks=1, precision=precision)
    theirs = Backprop(with_norm(), "classification", precision)
    assert same(trained(ours, given), trained(theirs, given))
    assert same(list(ours.model.buffers()), list(theirs.model.buffers()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", MODELS)
def test_factors_of_one_are_greedy_local_updates_bit_for_bit(kind: str, precision: Any):
    given, blocks = batches(kind, 4), 2 if kind == "masked" else 3
    torch.manual_seed(5)
    ours = PartitionWise(MODELS[kind](), TASKS[kind], sample=given[0].inputs, blocks=blocks, precision=precision)
    theirs = LocalUpdates(MODELS[kind](), TASKS[kind], sample=given[0].inputs, cut=ours.cut.names, precision=precision)
    theirs.load_state_dict({"auxiliaries": ours.state_dict()["auxiliaries"]})
    assert same(trained(ours, given), trained(theirs, given))
    assert ours.queued_bytes == 0
    assert ours._inputs_needed == (kind in ("llama", "masked"))


def test_a_partition_gathers_its_batch_and_follows_the_mean_over_it():
    model, (first, second) = mlp().double(), batches("mlp", 2)
    first, second = (Pair(each.inputs.double(), each.targets) for each in (first, second))
    learner = PartitionWise(model, "classification", sample=first.inputs, cut=["2"], batch_factors=[1, 2])
    head = learner.local_loss(0).head
    lower, upper = model[:2], model[2:]
    features = []
    for number, batch in enumerate((first, second)):
        made = lower(batch.inputs)
        features.append(made.detach())
        wanted = torch.autograd.grad(F.cross_entropy(head(made), batch.targets), list(lower.parameters()))
        learner.step(batch)
        torch.testing.assert_close([param.grad for param in lower.parameters()], list(wanted))
        if number == 0:
            assert all(param.grad is None for param in upper.parameters())  # optimizers leave it as it is
            with torch.no_grad():
                for param in lower.parameters():  # as a step would; what waits was made before it
                    param -= 0.1 * param.grad
        lower.zero_grad()
        head.zero_grad()
    loss = F.cross_entropy(upper(torch.cat(features)), torch.cat([first.targets, second.targets]))
    wanted = torch.autograd.grad(loss, list(upper.parameters()))
    torch.testing.assert_close([param.grad for param in upper.parameters()], list(wanted))


@pytest.mark.parametrize("factors", [[2, 1, 1], [1, 2, 3], [3, 2, 1]])
def test_pieces_of_a_batch_give_the_gradients_of_the_whole(factors: list[int]):
    learners = []
    for _ in range(2):
        torch.manual_seed(4)
        learners.append(PartitionWise(mlp().double(), "classification", sample=torch.randn(2, 6).double(),
                                      cut=["1", "3"], batch_factors=factors))  # fmt: skip
    whole, pieces = learners
    for batch in batches("mlp", 7):
        inputs, targets = batch.inputs.double(), batch.targets
        whole.step(Pair(inputs, targets))
        whole.hand_over()
        for half in (slice(0, 2), slice(2, 4)):
            pieces.step(Pair(inputs[half], targets[half]), weight=0.5)
        pieces.hand_over()
        for one, other in zip(whole.module.parameters(), pieces.module.parameters(), strict=True):
            assert (one.grad is None) == (other.grad is None)
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad)
        whole.module.zero_grad()
        pieces.module.zero_grad()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.integers(1, 3), st.integers(1, 14))
def test_every_example_reaches_every_partition_once_and_in_order(factors: list[int], pieces: int, count: int):
    seen: list[list[int]] = [[] for _ in factors]
    now: list[int] = []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if now and torch.is_grad_enabled():
            seen[now[-1]] += targets.tolist()
        return outputs.square().mean()

    cut = [str(number) for number in range(1, len(factors))]
    learner = PartitionWise(mlp(), loss, sample=torch.randn(2, 6), cut=cut, batch_factors=factors)
    run = learner.cut.run

    def spied(block: int, inputs: Tensor, features: Tensor | None) -> Tensor:
        now.append(block)
        return run(block, inputs, features)

    learner.cut.run = spied  # type: ignore[method-assign]
    ids = torch.arange(2 * pieces * count).view(count, pieces, 2)
    for batch in ids:
        for piece in batch:
            before = len(now)
            learner.step(Pair(torch.randn(2, 6), piece), weight=1 / pieces)
            assert now[before:] == sorted(set(now[before:]))  # each at most once, from first to last
        learner.hand_over()
    wait = 0  # batches that may be on their way
    for block, factor in enumerate(factors):
        wait += factor - 1 if block == 0 else factors[block - 1] + factor
        for piece in range(pieces):
            mine = [each for each in seen[block] if (each // 2) % pieces == piece]
            whole = ids[:, piece].flatten().tolist()
            assert mine == whole[: len(mine)]
            assert len(mine) % (2 * factor) == 0
            assert len(mine) >= len(whole) - 2 * wait


@pytest.mark.parametrize("factors", [[1, 1, 1], [4, 2, 1], [1, 2, 4], [2, 4, 2]])
def test_no_more_waits_than_the_plan_says(factors: list[int]):
    sample = torch.randn(4, 6)
    learner = PartitionWise(mlp(), "classification", sample=sample, cut=["1", "3"], batch_factors=factors)
    first, *others = learner.plan.partitions
    assert first.waiting == 6 * 4 + 8
    assert [each.waiting for each in others] == [12 * 4 + 8] * 2
    peak = 0
    for batch in batches("mlp", 24):
        learner.step(batch)
        learner.hand_over()
        peak = max(peak, learner.queued_bytes)
    own = [factor * (each.kept + each.beside) for factor, each in zip(factors, learner.plan.partitions, strict=True)]
    blank = 4 * 2 * sum(factors)  # the number in place of a batch's inputs
    assert peak <= 4 * (learner.plan.held(factors) - min(own)) + blank
    assert (peak == 0) == (max(factors) == 1)


def kept_by_a_step(learner: Whole, given: list[Pair]) -> int:
    """Bytes that autograd holds at most, in the last of several steps."""
    for batch in given:
        meter = Activations()
        held = [*learner.module.parameters(), *learner.model.buffers(), batch.inputs, batch.targets]
        with meter.recording(storage_keys(held), follow_operations=False):
            learner.step(batch)
        learner.hand_over()
        learner.module.zero_grad()
    assert meter.peak is not None
    return meter.peak


def deep(width: int = 64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(6 if i == 0 else width, width), nn.ReLU()) for i in range(16)]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def test_four_partitions_keep_less_than_half_of_what_backpropagation_does():
    given = batches("mlp", 2, size=64)
    whole = kept_by_a_step(Backprop(deep(), "classification"), given)
    learner = PartitionWise(deep(), "classification", sample=given[0].inputs, blocks=4)
    kept = kept_by_a_step(learner, given)
    assert kept <= 0.45 * whole
    assert kept == pytest.approx(64 * max(each.kept for each in learner.plan.partitions), rel=0.02)


def test_in_the_memory_of_backpropagation_every_batch_is_at_least_doubled():
    given = batches("mlp", 5, size=64)
    whole = kept_by_a_step(Backprop(deep(), "classification"), given)
    learner = PartitionWise(deep(), "classification", sample=given[0].inputs, blocks=4, batch_factors="auto")
    assert min(learner.batch_factors) >= 2
    assert kept_by_a_step(learner, given) + learner.queued_bytes <= whole + 64 * (6 * 4 + 8)


def test_learning_rates_grow_with_the_batch():
    def rates(**how: Any) -> list[float]:
        learner = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), cut=["1", "3"], **how)
        trained = [param for part in learner.parts for param in part.params]
        assert len(trained) == len(list(learner.module.parameters()))
        return [part.rate for part in learner.parts]

    assert rates(batch_factors=[1, 4, 32]) == [1, 4, 16]  # 8 times, and from there on the square root of 4
    assert rates(batch_factors=[1, 4, 32], rates="sqrt") == pytest.approx([1, 2, 32**0.5])
    assert rates(batch_factors=[1, 4, 32], rates="same") == [1, 1, 1]
    assert rates() == [1, 1, 1]


def test_with_replay_partitions_learn_from_the_past_and_use_nothing_too_often():
    uses: dict[tuple[int, int], int] = {}
    learner = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), cut=["1", "3"], schedule="replay",
                            replay=3, reuse=2)  # fmt: skip
    drawn = learner._drawn

    def spied(block: int, piece: int) -> Any:
        found = drawn(block, piece)
        if found is not None and block == 1:
            uses[block, found.made] = uses.get((block, found.made), 0) + 1
        return found

    learner._drawn = spied  # type: ignore[method-assign]
    ages = []
    for number, batch in enumerate(batches("mlp", 40)):
        result = learner.step(batch)
        learner.hand_over()
        assert ("block2/loss" in result.metrics) == (number > 0)  # nothing was there in the first step
        assert all(len(entries) <= 3 for queue in learner._queues for entries in queue.values())
        if "block2/staleness" in result.metrics:
            ages.append(result.metrics["block2/staleness"].item())
    assert min(ages) >= 1 and max(ages) <= 3 and len(set(ages)) > 1
    assert max(uses.values()) == 2


@pytest.mark.parametrize(
    ("how", "changes"),
    [
        ({"batch_factors": [1, 2]}, {"accumulate": 2}),
        ({"batch_factors": [2, 1]}, {"optim": Component("leantrain.optim.GaLoreAdamW", {"rank": 4}), "clip": 1.0}),
        ({"schedule": "replay", "replay": 3}, {"precision": "bf16"}),
    ],
)
def test_a_run_that_was_stopped_ends_as_one_that_was_not(how: dict[str, Any], changes: dict[str, Any], tmp_path: Path):
    learn = Component("leantrain.learn.partition_wise.PartitionWise", {"blocks": 2, **how})
    recipe = small_recipe(learn=learn, steps=11, checkpoint_every=5, eval_every=0, keep=3, **changes)
    train(recipe, tmp_path / "whole")
    stopped = tmp_path / "stopped" / "checkpoints"
    stopped.mkdir(parents=True)
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-0000005", stopped / "step-0000005")
    train(recipe, tmp_path / "stopped")
    one, other = (checkpoint_tensors(tmp_path / name, 11) for name in ("whole", "stopped"))
    assert any(name.startswith("learner/") and "queues" in name for name in one)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("kind", MODELS)
def test_what_waits_is_part_of_the_state(kind: str):
    given = batches(kind, 7)
    how = {"sample": given[0].inputs, "blocks": 2, "batch_factors": [2, 3]}
    learner, other = (PartitionWise(MODELS[kind](), TASKS[kind], **how) for _ in range(2))
    for batch in given[:5]:
        learner.step(batch)
        learner.hand_over()
        learner.module.zero_grad()
    other.model.load_state_dict(learner.model.state_dict())
    other.load_state_dict(learner.state_dict())
    assert learner.queued_bytes == other.queued_bytes > 0
    for batch in given[5:]:
        for each in (learner, other):
            each.step(batch)
            each.hand_over()
    found = [[param.grad for param in each.module.parameters()] for each in (learner, other)]
    assert any(grad is not None for grad in found[0])
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(*found, strict=True))


def test_a_step_for_nothing_leaves_nothing_waiting():
    learner = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), blocks=2, batch_factors=[2, 2])
    learner.step(batches("mlp", 1)[0], weight=0.0)
    assert learner.queued_bytes == 0


def test_the_loss_is_real_from_the_first_step_on():
    given = batches("mlp", 4)
    model = mlp()
    learner = PartitionWise(model, "classification", sample=given[0].inputs, blocks=2, batch_factors=[1, 3])
    losses = [learner.step(batch).loss for batch in given[:3]]
    for batch, loss in zip(given[:2], losses[:2], strict=True):
        torch.testing.assert_close(loss, F.cross_entropy(model(batch.inputs), batch.targets))
    together = Pair(torch.cat([b.inputs for b in given[:3]]), torch.cat([b.targets for b in given[:3]]))
    torch.testing.assert_close(losses[2], F.cross_entropy(model(together.inputs), together.targets))
    assert learner.step(given[3]).loss is losses[2]


@pytest.mark.parametrize("how", [{"batch_factors": "auto"}, {"batch_factors": [1, 2, 4]}, {"schedule": "replay"}, {}])
def test_it_learns(how: dict[str, Any]):
    draws = torch.Generator().manual_seed(0)
    centres = 2 * torch.randn(3, 6, generator=draws)
    targets = torch.randint(3, (512,), generator=draws)
    inputs = centres[targets] + torch.randn(512, 6, generator=draws)
    given = [Pair(inputs[n : n + 16], targets[n : n + 16]) for n in range(0, 512, 16)]
    learner = PartitionWise(mlp(width=32), "classification", sample=inputs[:2], blocks=3, **how)
    learner.fit(given, lambda params: torch.optim.SGD(params, lr=0.05), epochs=6)
    found = learner.evaluate(Pair(inputs, targets))
    assert found["correct"] / 512 > 0.95
    assert found["block1/correct"] / 512 > 0.95


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"schedule": "seriel"}, "did you mean 'serial'"),
        ({"rates": "cubic"}, "rates 'cubic' is unknown"),
        ({"replay": 0}, "replay=0"),
        ({"reuse": 0}, "reuse=0"),
        ({"balance": "time"}, "divides by plan"),
        ({"plan": "speed"}, "plan 'speed' is unknown"),
        ({"blocks": 2, "batch_factors": [1]}, "must be 2 numbers"),
        ({"blocks": 2, "batch_factors": [1, 0]}, "must be 2 numbers"),
        ({"blocks": 2, "batch_factors": "atuo"}, "must be 2 numbers"),
        ({"blocks": 1, "batch_factors": [2]}, "larger batch_size"),
        ({"blocks": 2, "batch_factors": [1, 2], "schedule": "replay"}, "need schedule='serial'"),
        ({"blocks": 2, "batch_factors": "auto", "budget": -1.0}, "budget must be above 0"),
        ({"blocks": 2, "cut": ["1"]}, "one of the two"),
        ({"blocks": 99}, "blocks must be 1 to 5"),
    ],
)
def test_what_it_cannot_do_is_refused_in_one_sentence(arguments: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said):
        PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), **arguments)


def test_several_processes_are_refused_only_where_batches_would_wait(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("leantrain.learn.partition_wise.world_size", lambda: 2)
    for how, refused in (({}, False), ({"batch_factors": [1, 2]}, True), ({"schedule": "replay"}, True)):
        learner = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), blocks=2, **how)
        if refused:
            with pytest.raises(UsageError, match="works in one process; got 2"):
                learner.attach(learner.module)
        else:
            learner.attach(learner.module)


def test_the_state_of_other_partitions_is_refused():
    state = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), blocks=2).state_dict()
    with pytest.raises(UsageError, match="other blocks"):
        PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), blocks=3).load_state_dict(state)
    learner = PartitionWise(mlp(), "classification", sample=torch.randn(2, 6), blocks=2)
    with pytest.raises(UsageError, match="not of PartitionWise with 2"):
        learner.load_state_dict({"auxiliaries": state["auxiliaries"]})
