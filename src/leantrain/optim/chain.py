"""A `torch.optim.Optimizer` made of rules: stacks same-shaped parameters, steps each stack once, applies the result.

For every parameter group, with u the rule's update:   w = w - lr * (weight_decay * w + u)

Per-parameter state stays where PyTorch's tools look for it, in `optimizer.state[param]`, as tensors: for parameters
that are stepped together those are slices of the stack, so nothing is stored twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leantrain.errors import UsageError
from leantrain.optim.adam import Adam
from leantrain.optim.rules import Factored, Rule, State

_STACK_BELOW = 1 << 16
"""Numbers in a parameter from which it is stepped alone: its arithmetic then outweighs the calls, and stacking would
only copy its gradient."""


@dataclass
class _Stack:
    """Parameters of one shape and their state, joined along a new first axis."""

    params: list[Tensor]
    states: list[State]
    """Each parameter's own, made of slices of `state`."""
    state: State

    @classmethod
    def of(cls, params: list[Tensor], states: list[State]) -> _Stack:
        joined: State = {}
        for name in states[0]:
            parts = [state[name] for state in states]
            joined[name] = parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
            for index, state in enumerate(states):
                state[name] = joined[name][index]
        return cls(params, states, joined)

    def grads(self) -> Tensor:
        grads = [_gradient(param) for param in self.params]
        return grads[0].unsqueeze(0) if len(grads) == 1 else torch.stack(grads)


class Chain(torch.optim.Optimizer):
    """One rule as an optimizer, with decoupled weight decay.

    Args:
        params: parameters, named parameters or parameter groups.
        rule: what turns a gradient into a step, such as `LowRank(Adam(), rank=64)`. Its matrices must fit it.
        lr: step size, >= 0; a number or a tensor of one element.
        weight_decay: decoupled decay, >= 0; each step multiplies a weight by `1 - lr * weight_decay`.

    Raises:
        UsageError: a value outside its range.

    Examples:
        >>> from leantrain.optim import Adam, LowRank
        >>> weight = torch.nn.Parameter(torch.ones(6, 4))
        >>> optimizer = Chain([weight], LowRank(Adam(), rank=2), lr=0.1)
        >>> weight.square().sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[weight])
        ['basis', 'exp_avg', 'exp_avg_sq', 'fallbacks', 'moments_since', 'next_refresh', 'step']
    """

    whole_matrices = False
    """Whether the rules need a parameter's whole matrix, so that sharded parameters (FSDP) are refused."""

    def __init__(
        self,
        params: Iterable[Any],
        rule: Rule | None = None,
        *,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.0,
        **group_options: Any,
    ) -> None:
        self._rule = rule
        self._stacks: dict[int, tuple[list[int], list[_Stack]]] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **group_options})

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        """The rule that steps `param`. Subclasses build it from the group's options, read anew at every step."""
        assert self._rule is not None
        return self._rule

    def init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        """State of a parameter before its first step."""
        rule = self.rule_for(param, group)
        return {"step": torch.tensor(0.0, device=_counter_device(rule, param)), **rule.init(param)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except UsageError:
            del self.param_groups[-1]
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    # The step decides on numbers (is a refresh due?) and is not worth tracing; a compiled loop calls it as it is.
    @torch.compiler.disable
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient. `closure`, if given, is called first and its loss returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            self._step_group(index, group)
        return loss

    def _step_group(self, index: int, group: dict[str, Any]) -> None:
        direct: dict[Adam, list[Tensor]] = {}
        stacked: list[Tensor] = []
        for param in group["params"]:
            if param.grad is None:
                continue
            self._check_gradient(param)
            if not self.state[param]:
                self.state[param].update(self.init_state(param, group))
            rule = self.rule_for(param, group)
            if isinstance(rule, Adam):
                direct.setdefault(rule, []).append(param)
            else:
                stacked.append(param)
        for adam, params in direct.items():
            grads = [_gradient(param) for param in params]
            adam.descend(params, grads, [self.state[p] for p in params], group["lr"], group["weight_decay"])
        for stack in self._stacks_of(index, stacked):
            self._step_stack(stack, group)

    def _step_stack(self, stack: _Stack, group: dict[str, Any]) -> None:
        rule = self.rule_for(stack.params[0], group)
        update = rule.update(stack.grads(), stack.state, stack.state["step"].double())
        stack.state["step"] += 1
        lr = float(group["lr"])
        for index, param in enumerate(stack.params):
            if group["weight_decay"]:
                param.mul_(1 - lr * group["weight_decay"])
            _descend(param, update, index, lr)

    def _stacks_of(self, index: int, params: list[Tensor]) -> list[_Stack]:
        """The stacks of these parameters, made again only when others than last time have gradients, or other state."""
        members = [id(self.state[param]) for param in params]  # stacks keep these alive, so an id is not used again
        known = self._stacks.get(index)
        if known is None or known[0] != members:
            together: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in params:
                alone = id(param) if param.numel() >= _STACK_BELOW else None
                together.setdefault((param.shape, param.dtype, param.device, alone), []).append(param)
            stacks = [_Stack.of(ps, [self.state[p] for p in ps]) for ps in together.values()]
            self._stacks[index] = known = (members, stacks)
        return known[1]

    def _check(self, group: dict[str, Any]) -> None:
        if not float(group["lr"]) >= 0 or not math.isfinite(float(group["lr"])):
            raise UsageError(f"lr must be a finite number >= 0, got lr={group['lr']}")
        if not group["weight_decay"] >= 0:
            raise UsageError(f"weight_decay must be >= 0, got weight_decay={group['weight_decay']}")
        for param in group["params"]:
            self.rule_for(param, group)

    def _check_gradient(self, param: Tensor) -> None:
        if _gradient(param).layout != torch.strided or param.is_complex():
            kind = "complex" if param.is_complex() else "sparse"
            raise UsageError(
                f"{type(self).__name__} has no rule for {kind} gradients, got one of shape {tuple(param.shape)}; "
                f"give that parameter to another optimizer"
            )
        if self.whole_matrices and isinstance(param, DTensor) and param.ndim > 1:
            raise UsageError(
                f"{type(self).__name__} needs whole matrices, got a parameter of shape {tuple(param.shape)} that is "
                f"sharded over processes; use DDP, or another optimizer with FSDP"
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state. Tensors keep their own dtype, whatever the parameter's is.

        Raises:
            UsageError: the state belongs to other settings or shapes. This optimizer is then left as it was.
        """
        self._check_state(state_dict)
        super().load_state_dict(state_dict)
        for (group, param), key in zip(self._numbered(), self._saved_keys(state_dict), strict=True):
            if key in state_dict["state"]:
                # PyTorch casts state to the parameter's dtype, counters too, and may share memory with the caller.
                counters = _counter_device(self.rule_for(param, group), param)
                self.state[param] = {
                    name: value.detach().clone().to(param.device if value.ndim else counters)
                    for name, value in state_dict["state"][key].items()
                }
        self._stacks.clear()

    def _check_state(self, state_dict: dict[str, Any]) -> None:
        keys = self._saved_keys(state_dict)
        numbered = list(self._numbered())
        if len(keys) != len(numbered) or len(state_dict["param_groups"]) != len(self.param_groups):
            raise UsageError(
                f"the saved state is of another optimizer: it has {len(keys)} parameters in "
                f"{len(state_dict['param_groups'])} groups, this one {len(numbered)} in {len(self.param_groups)}"
            )
        for (group, param), key in zip(numbered, keys, strict=True):
            saved = state_dict["state"].get(key)
            if saved is None:
                continue
            rule = self.rule_for(param, group)
            expected = {n: tuple(t.shape) for n, t in rule.init(param.detach().to("meta")).items()} | {"step": ()}
            found = {n: tuple(t.shape) if isinstance(t, Tensor) else t for n, t in saved.items()}
            for name in sorted(expected.keys() | found.keys()):
                if expected.get(name) != found.get(name):
                    raise UsageError(
                        f"the saved state of parameter {key} has {name} of shape {found.get(name, 'missing')}, but "
                        f"these settings of {type(self).__name__} need {expected.get(name, 'none')}"
                    )

    def _numbered(self) -> Iterable[tuple[dict[str, Any], Tensor]]:
        return ((group, param) for group in self.param_groups for param in group["params"])

    @staticmethod
    def _saved_keys(state_dict: dict[str, Any]) -> list[Any]:
        return [key for group in state_dict["param_groups"] for key in group["params"]]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_rule": self._rule, "_stacks": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks = {}


def _counter_device(rule: Rule, param: Tensor) -> torch.device:
    """PyTorch's fused kernel wants its step count beside the parameter; our rules read theirs on the CPU."""
    return param.device if isinstance(rule, Adam) else torch.device("cpu")


def _descend(param: Tensor, update: Tensor | Factored, index: int, lr: float) -> None:
    """w -= lr * update[index], without making a factored update whole where the memory layout allows."""
    if isinstance(update, Tensor):
        param.sub_(update[index], alpha=lr)
        return
    left, right, alpha = update.left[index], update.right[index], -lr * update.scale
    if param.ndim == 2 or param.is_contiguous():
        matrix = param if param.ndim == 2 else param.view(len(left), -1)
        matrix.addmm_(left.to(param.dtype), right.to(param.dtype), alpha=alpha)
    else:
        param.add_((left @ right).view(param.shape), alpha=alpha)


def _gradient(param: Tensor) -> Tensor:
    assert param.grad is not None
    return param.grad
