"""Are options honoured where PyTorch keeps them: per group, under a scheduler, changed by hand, as a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from leantrain.testing.case import OptimizerCase
from leantrain.testing.problem import STEPS, Stream, after_steps, assert_near, assert_same, copies, drive, same

CHANGE_AT = 5
CYCLED = ("lr", "betas", "momentum")  # what OneCycleLR moves


def group_options_equal_constructor_arguments(case: OptimizerCase) -> None:
    """A knob given in a parameter group has the effect it has as a constructor argument."""
    groups = case.build(Stream(case).parameters()).param_groups
    for name, value in case.knobs.items():
        if name not in groups[0]:
            continue
        stream = Stream(case)
        params = stream.parameters()
        drive(case.build([{"params": params, name: value}]), params, stream)
        assert_same(params, after_steps(case, **{name: value}), f"{name}={value!r} in the group")


def groups_do_not_touch_each_other(case: OptimizerCase) -> None:
    """A group with lr=0 stands still while the other one goes exactly where it goes anyway."""

    def run(lr_of_the_second: float) -> tuple[list[Tensor], list[Tensor]]:
        stream = Stream(case)
        params = stream.parameters()
        first, second = params[::2], params[1::2]
        drive(case.build([{"params": first}, {"params": second, "lr": lr_of_the_second}]), params, stream)
        return copies(first), copies(second)

    still_first, still_second = run(0.0)
    first, second = run(case.settings["lr"])
    assert_same(still_second, Stream(case).parameters()[1::2], "a group with lr=0")
    assert_same(still_first, first, "the group beside one with lr=0")
    assert not same(second, still_second), "the second group does not move with lr > 0 either"


def schedulers_change_the_step(case: OptimizerCase) -> None:
    """LambdaLR and OneCycleLR have the effect of setting their values by hand."""

    def with_scheduler(name: str) -> tuple[list[Tensor], list[dict[str, Any]]]:
        stream = Stream(case)
        params = stream.parameters()
        optimizer = case.build(params)
        scheduler = _scheduler(name, optimizer, float(case.settings["lr"]))
        history: list[dict[str, Any]] = []
        group = optimizer.param_groups[0]
        for step in range(STEPS):
            history.append({key: group[key] for key in CYCLED if key in group})
            drive(optimizer, params, stream, [step])
            scheduler.step()
        return copies(params), history

    def by_hand(history: list[dict[str, Any]]) -> list[Tensor]:
        stream = Stream(case)
        params = stream.parameters()
        # Another lr at construction: whoever remembers that one will be found out.
        optimizer = case.build(params, lr=7 * case.settings["lr"])
        drive(optimizer, params, stream, before_step=lambda step: optimizer.param_groups[0].update(history[step]))
        return copies(params)

    constant = after_steps(case)
    for name in ("LambdaLR", "OneCycleLR"):
        scheduled, history = with_scheduler(name)
        assert not same(scheduled, constant), f"{name} has no effect"
        assert_same(scheduled, by_hand(history), f"{name} against its values set by hand")


def options_changed_during_a_run_take_effect(case: OptimizerCase) -> None:
    """group[name] = value holds from the next step on, for every knob whose value is a number or numbers.

    Whole numbers and flags (a rank, nesterov) decide what the state looks like and may be fixed at the first step.
    """
    group = case.build(Stream(case).parameters()).param_groups[0]
    base = after_steps(case)
    for name, new in case.knobs.items():
        if name not in group or not _is_real(new):
            continue
        values = group[name], new
        changed = _changed_on_the_way(case, name, values, constructed=values[0])
        other = _changed_on_the_way(case, name, values, constructed=values[1])
        assert_same(other, changed, f"{name} set to {new!r} at step {CHANGE_AT}")
        if not same(after_steps(case, **{name: new}), base):  # an idle knob is another check's failure
            assert not same(changed, base), f"{name} set to {new!r} at step {CHANGE_AT} has no effect"


def lr_may_be_a_tensor(case: OptimizerCase) -> None:
    """lr=torch.tensor(x) equals lr=x, and filling that tensor with another value takes effect."""
    lr = float(case.settings["lr"])
    start = Stream(case).parameters()
    assert_near(after_steps(case, lr=torch.tensor(lr)), after_steps(case), start, 1e-5, "lr as a tensor")

    def halved_at(as_tensor: bool) -> list[Tensor]:
        stream = Stream(case)
        params = stream.parameters()
        optimizer = case.build(params, lr=torch.tensor(lr) if as_tensor else lr)
        drive(optimizer, params, stream, range(CHANGE_AT))
        group = optimizer.param_groups[0]
        if as_tensor:
            assert isinstance(group["lr"], Tensor), f"the group holds {group['lr']!r}, not the tensor it was given"
            group["lr"].fill_(lr / 2)
        else:
            group["lr"] = lr / 2
        drive(optimizer, params, stream, range(CHANGE_AT, STEPS))
        return copies(params)

    assert_near(halved_at(True), halved_at(False), start, 1e-5, "tensor lr halved in place")


def _changed_on_the_way(case: OptimizerCase, name: str, values: tuple[Any, Any], constructed: Any) -> list[Tensor]:
    """Weights after a run with group[name] = values[0] before CHANGE_AT and values[1] from there on."""
    stream = Stream(case)
    params = stream.parameters()
    optimizer = case.build(params, **{name: constructed})

    def set_option(step: int) -> None:
        optimizer.param_groups[0][name] = values[step >= CHANGE_AT]

    drive(optimizer, params, stream, before_step=set_option)
    return copies(params)


def _scheduler(name: str, optimizer: Optimizer, lr: float) -> LRScheduler:
    if name == "LambdaLR":
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))
    cycles_momentum = "betas" in optimizer.defaults or bool(optimizer.defaults.get("momentum"))
    return OneCycleLR(optimizer, max_lr=2 * lr, total_steps=STEPS + 1, cycle_momentum=cycles_momentum)


def _is_real(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(_is_real(part) for part in value)
    return isinstance(value, float)


CHECKS = (
    group_options_equal_constructor_arguments,
    groups_do_not_touch_each_other,
    schedulers_change_the_step,
    options_changed_during_a_run_take_effect,
    lr_may_be_a_tensor,
)
