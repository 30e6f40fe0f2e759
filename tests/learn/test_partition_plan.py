"""Plans of partitions: the division is the best there is, and what it says of memory is what is then kept."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.cutting import Cut
from leantrain.errors import UsageError
from leantrain.learn import Backprop
from leantrain.learn.fitting import Pair
from leantrain.learn.local_losses import make_local_loss
from leantrain.learn.losses import objective
from leantrain.learn.partition_plan import Partition, PartitionPlan, divide, plan_partitions
from leantrain.ledger.activations import Activations
from leantrain.ledger.storages import storage_keys
from leantrain.nn import Llama, ResNetCifar


def mlp(depth: int = 6, width: int = 16, inputs: int = 12) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(inputs if i == 0 else width, width), nn.BatchNorm1d(width), nn.ReLU(),
                            nn.Dropout(0.2)) for i in range(depth)]  # fmt: skip
    return nn.Sequential(*layers, nn.Linear(width, 10))


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNetCifar(20)


def llama() -> nn.Module:
    torch.manual_seed(0)
    return Llama(vocab_size=64, hidden=32, mlp_hidden=48, layers=4, heads=2)


def sample_of(kind: str, examples: int = 0) -> Tensor:
    """By default so many that what does not grow with the batch hardly counts."""
    torch.manual_seed(1)
    examples = examples or (256 if kind == "mlp" else 4)
    return {
        "mlp": torch.randn(examples, 12),
        "resnet": torch.randn(examples, 3, 32, 32),
        "llama": torch.randint(64, (examples, 24)),
    }[kind]


MODELS = {"mlp": mlp, "resnet": resnet, "llama": llama}


def every_division(layers: int, groups: int, floor: int) -> list[list[int]]:
    found = [list(begins) for begins in combinations(range(1, layers), groups - 1)]
    return [each for each in found if all(end - start >= floor for start, end in pairwise([0, *each, layers]))]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_no_other_division_has_a_cheaper_dearest_group(data: st.DataObject):
    layers = data.draw(st.integers(1, 10))
    floor = data.draw(st.integers(1, layers))
    groups = data.draw(st.integers(1, layers // floor))
    own = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))
    behind = data.draw(st.lists(st.integers(0, 20), min_size=layers, max_size=layers))

    def cost(start: int, end: int) -> float:
        return sum(own[start:end]) + behind[end - 1]  # as heads do, what a group costs depends on where it ends

    def judged(begins: Sequence[int]) -> tuple[float, float]:
        costs = [cost(start, end) for start, end in pairwise([0, *begins, layers])]
        return max(costs), sum(each * each for each in costs)

    found = divide(cost, layers, groups, floor)
    allowed = every_division(layers, groups, floor)
    assert found in allowed
    assert judged(found)[0] == min(judged(each)[0] for each in allowed)


def test_of_equally_cheap_divisions_the_even_one_is_taken():
    costs = [9, 1, 1, 1, 1]
    assert divide(lambda start, end: sum(costs[start:end]), 5, 3) == [1, 3]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_what_a_plan_says_of_memory_is_what_autograd_then_keeps(kind: str, blocks: int):
    model, sample = MODELS[kind](), sample_of(kind)
    task = "next_token" if kind == "llama" else "classification"
    plan = plan_partitions(model, task, sample=sample, blocks=blocks)
    cut, judged = Cut(model, sample, cut=plan.names), objective(task)
    targets = torch.zeros(cut.output.shape[:-1], dtype=torch.int64)
    assert [each.begins for each in plan.partitions] == ["", *cut.names]
    assert [each.parameters for each in plan.partitions] == [sum(p.numel() for p in ps) for ps in cut.parameters]
    for block, partition in enumerate(plan.partitions):
        features = cut.features[block - 1].clone() if block else None
        local = None
        if block + 1 < len(cut):
            local = make_local_loss("prediction", "linear", cut.features[block], cut.output, model, judged)
        held = [*model.parameters(), *model.buffers(), sample, *([] if local is None else local.parameters())]
        meter = Activations()
        with meter.recording(storage_keys(held), follow_operations=False):
            output = cut.run(block, sample, features)
            loss = judged.mean(output, targets) if local is None else local(output, targets, sample, features)
        assert meter.peak is not None
        given = 0 if features is None else features.numel() * 4
        assert partition.features == given // len(sample)
        # The input is there, whether autograd saves it or, as nothing before it is trained, does not.
        assert 0.98 * meter.peak <= partition.kept * len(sample) <= 1.02 * (meter.peak + given)
        del loss, output


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_is_what_backpropagation_keeps(kind: str):
    model, sample = MODELS[kind](), sample_of(kind)
    task = "next_token" if kind == "llama" else "classification"
    plan = plan_partitions(model, task, sample=sample, blocks=2)
    targets = sample if kind == "llama" else torch.zeros(len(sample), dtype=torch.int64)
    learner, meter = Backprop(model, task), Activations()
    batch = Pair(sample, targets)
    held = storage_keys([*model.parameters(), *model.buffers(), sample, targets])
    with meter.recording(held, follow_operations=False):
        loss = learner.objective.mean(model(batch.inputs), targets)
    assert meter.peak is not None
    beside = (sample.numel() * sample.element_size() + targets.numel() * 8) / len(sample)
    assert plan.whole == pytest.approx(meter.peak / len(sample) + beside, rel=0.02)
    del loss


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("floor", [1, 2])
def test_no_other_cut_of_the_model_keeps_less(kind: str, floor: int):
    model, sample = MODELS[kind](), sample_of(kind, 2)
    task = "next_token" if kind == "llama" else "classification"
    plan = plan_partitions(model, task, sample=sample, blocks=3, floor=floor)
    finest = plan_partitions(model, task, sample=sample, blocks=sum(each.layers for each in plan.partitions))
    assert all(each.layers >= floor for each in plan.partitions)
    places = finest.names
    others = every_division(len(places) + 1, 3, floor)
    others = others[:: max(1, len(others) // 6)]
    for begins in others:
        other = plan_partitions(model, task, sample=sample, cut=[places[index - 1] for index in begins])
        assert max(each.kept for each in plan.partitions) <= max(each.kept for each in other.partitions)


def test_what_does_not_grow_with_the_batch_does_not_count():
    few, many = (plan_partitions(mlp(), "classification", sample=sample_of("mlp", n), blocks=3) for n in (2, 64))
    assert few.to_dict() | {"partitions": None} == many.to_dict() | {"partitions": None}
    assert [each.kept for each in few.partitions] == [each.kept for each in many.partitions]


def test_by_parameters_it_divides_as_the_sums_say():
    plan = plan_partitions(mlp(), "classification", sample=sample_of("mlp"), blocks=2, plan="parameters")
    # 12 x 16, five 16 x 16 with biases and norms, 16 x 10 with biases: 240 + 5 * 304 + 170
    assert [each.parameters for each in plan.partitions] == [240 + 2 * 304, 3 * 304 + 170]


def test_by_time_the_slow_layer_is_alone():
    class Slow(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            for _ in range(300):
                inputs = inputs + 0.0
            return super().forward(inputs)

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), Slow(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    plan = plan_partitions(model, "classification", sample=torch.randn(2, 8), blocks=3, plan="time")
    assert plan.names == ["2", "3"]


def test_planning_leaves_no_trace():
    model, sample = mlp(), sample_of("mlp")
    model[1].eval()
    model[0][0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes, drawn = [module.training for module in model.modules()], torch.get_rng_state()
    plan_partitions(model, "classification", sample=sample, blocks=3, head="mlp", local="both")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(drawn, torch.get_rng_state())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert all(param.grad is None for param in model.parameters())


def test_a_loss_of_ones_own_is_taken_for_what_cross_entropy_keeps():
    own = plan_partitions(mlp(), lambda outputs, targets: F.mse_loss(outputs, targets), sample=sample_of("mlp"),
                          blocks=2)  # fmt: skip
    known = plan_partitions(mlp(), "classification", sample=sample_of("mlp"), blocks=2)
    assert own.names == known.names
    assert own.whole == pytest.approx(known.whole, rel=0.02)


def plan_of(*partitions: tuple[int, int, int], whole: int = 100) -> PartitionPlan:
    made = [Partition(f"layer{n}", 1, kept, features, beside, 1, 1.0)
            for n, (kept, features, beside) in enumerate(partitions)]  # fmt: skip
    return PartitionPlan(tuple(made), whole)


@pytest.mark.parametrize(
    ("factors", "held"),
    [
        ([1, 1], 11),  # nothing waits
        ([1, 2], 22),  # the second works on two
        ([2, 1], 22),  # the first does
        ([4, 1], 44),
        ([4, 4], 44),
    ],
)
def test_what_is_held_with_factors_counted_by_hand(factors: list[int], held: int):
    assert plan_of((10, 0, 1), (10, 4, 1)).held(factors) == held


def test_what_waits_while_another_works_counts():
    plan = plan_of((10, 0, 1), (1, 4, 1))
    assert plan.held([1, 4]) == 11 + 3 * 5  # the first works while three batches wait before the second


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 10), st.integers(1, 5)), min_size=1, max_size=4),
       st.floats(0.1, 4.0))  # fmt: skip
def test_factors_fit_the_budget_and_none_could_be_doubled(partitions: list[tuple[int, int, int]], budget: float):
    plan = plan_of(*partitions)
    factors = plan.batch_factors(budget)
    ones = [1] * len(factors)
    assert plan.held(factors) <= budget * plan.whole or factors == ones
    assert plan.held([2 * factor for factor in factors]) > budget * plan.whole
    for index in range(len(factors)):
        larger = [factor * (1 + (n == index)) for n, factor in enumerate(factors)]
        assert plan.held(larger) > budget * plan.whole


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "one of the two"),
        ({"blocks": 2, "cut": ["1"]}, "one of the two"),
        ({"blocks": 2, "plan": "memry"}, "did you mean 'memory'"),
        ({"blocks": 14}, "blocks must be 1 to 13"),
        ({"blocks": 7, "floor": 2}, "blocks must be 1 to 6"),
        ({"blocks": 1, "floor": 0}, "floor >= 1"),
        ({"cut": ["nowhere"]}, "cannot be cut before nowhere"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_sentence(arguments: dict[str, object], said: str):
    with pytest.raises(UsageError, match=said):
        plan_partitions(mlp(), "classification", sample=sample_of("mlp"), **arguments)  # type: ignore[arg-type]


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(UsageError, match="budget must be above 0"):
        plan_of((10, 0, 1)).batch_factors(0.0)


def test_a_plan_is_a_table_and_plain_data():
    plan = plan_of((10, 0, 1), (20, 4, 1))
    assert "layer1" in str(plan) and len(str(plan).splitlines()) == 4
    assert plan.to_dict()["partitions"][1]["kept"] == 20
