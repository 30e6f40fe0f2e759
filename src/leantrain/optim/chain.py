"""A `torch.optim.Optimizer` made of rules: stacks same-shaped parameters, steps each stack once, applies the result.

For every parameter group, with u the rule's update:   w = w - lr * (weight_decay * w + u)

Per-parameter state stays where PyTorch's tools look for it, in `optimizer.state[param]`, as tensors: for parameters
that are stepped together those are slices of the stack, so nothing is stored twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from leantrain.errors import UsageError
from leantrain.optim.adam import Adam
from leantrain.optim.low_bit import LowBit
from leantrain.optim.low_rank import LowRank
from leantrain.optim.rules import Factored, Rule, State
from leantrain.optim.stacks import Stack, as_state, gradient, local, row_group, share_out

_STACK_BELOW = 1 << 16
"""Numbers in a parameter from which it is stepped alone: its arithmetic then outweighs the calls, and stacking would
only copy its gradient."""


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
        >>> sorted(name for name, value in optimizer.state[weight].items() if value.ndim)
        ['basis', 'exp_avg', 'exp_avg_sq']
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
        self._stacks: dict[int, tuple[list[int], list[Stack]]] = {}
        self._group_numbers: dict[int, int] = {}
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **group_options})

    def rule_for(self, param: Tensor, group: dict[str, Any]) -> Rule:
        """The rule that steps `param`. Subclasses build it from the group's options, read anew at every step."""
        assert self._rule is not None
        if isinstance(self._rule, LowRank):
            return replace(self._rule, rows=row_group(param))
        return self._rule

    def init_state(self, param: Tensor, group: dict[str, Any]) -> State:
        """State of a parameter before its first step."""
        rule = self.rule_for(param, group)
        begun = rule.init(local(param.detach()))
        return {
            "step": torch.tensor(0.0, device=_counter_device(rule, param)),
            **{name: as_state(value, param, _by_rows(rule, name)) for name, value in begun.items()},
        }

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
        whole: dict[Rule, list[Tensor]] = {}
        stacked: list[Tensor] = []
        for param in group["params"]:
            if param.grad is None:
                continue
            self._check_gradient(param, param.grad)
            self._begin(param, group)
            rule = self.rule_for(param, group)
            if _ends_chain(rule):
                whole.setdefault(rule, []).append(param)
            else:
                stacked.append(param)
        for rule, params in whole.items():
            self._descend(rule, params, [gradient(param) for param in params], group)
        for stack in self._stacks_of(index, stacked):
            self._step_stack(stack, stack.grads(), group)

    def _begin(self, param: Tensor, group: dict[str, Any]) -> None:
        if not self.state[param]:
            self.state[param].update(self.init_state(param, group))

    def _descend(self, rule: Any, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> None:
        rule.descend(params, grads, [self.state[p] for p in params], group["lr"], group["weight_decay"])

    def _step_stack(self, stack: Stack, grads: Tensor, group: dict[str, Any], projected: bool = False) -> None:
        param = stack.params[0]
        rule, step = self.rule_for(param, group), stack.state["step"].double()
        if projected:
            assert isinstance(rule, LowRank)
            update: Tensor | Factored = rule.update_projected(grads, stack.state, step, local(param).shape)
        else:
            update = rule.update(grads, stack.state, step)
        stack.state["step"] += 1
        lr = float(group["lr"])
        for index, moved in enumerate(stack.params):
            if group["weight_decay"]:
                local(moved).mul_(1 - lr * group["weight_decay"])
            _apply(local(moved), update, index, lr)

    def _stacks_of(self, index: int, params: list[Tensor]) -> list[Stack]:
        """The stacks of these parameters, made again only when others than last time have gradients, or other state."""
        members = [id(self.state[param]) for param in params]  # stacks keep these alive, so an id is not used again
        known = self._stacks.get(index)
        if known is None or known[0] != members:
            together: dict[tuple[Any, ...], list[Tensor]] = {}
            for param in params:
                alone = id(param) if param.numel() >= _STACK_BELOW else None
                together.setdefault((param.shape, param.dtype, param.device, alone), []).append(param)
            stacks = [Stack.of(ps, [self.state[p] for p in ps]) for ps in together.values()]
            self._stacks[index] = known = (members, stacks)
        return known[1]

    # One parameter at a time, and gradients that exist in a subspace only: for steps in the backward pass and for
    # processes that send each other projected gradients.

    def projects(self, param: Tensor) -> bool:
        """Whether `param` is stepped from a projection of its gradient, and never needs the whole one between two
        computations of its basis."""
        return isinstance(self.rule_for(param, self.group_of(param)), LowRank)

    def basis_due(self, param: Tensor) -> bool:
        """Whether the next step of a projected parameter computes a new basis; so it is as long as there is none."""
        state = self.state[param]
        return not state or bool(state["step"] >= state["next_refresh"])

    @torch.no_grad()
    def refit(self, param: Tensor, grad: Tensor) -> None:
        """Compute the basis of a projected parameter from this gradient if one is due; its next step will not."""
        self._begin(param, self.group_of(param))
        rule, stack = self._with_basis(param)
        rule.prepare(local(grad).unsqueeze(0), stack.state, stack.state["step"].double())

    @torch.no_grad()
    def project(self, param: Tensor, grad: Tensor) -> Tensor:
        """A gradient of a projected parameter in its basis, [rows, rank] or [rank, columns]. Linear in `grad`."""
        rule, stack = self._with_basis(param)
        return rule.project(local(grad).unsqueeze(0), stack.state)[0]

    @torch.no_grad()
    def lift(self, param: Tensor, projected: Tensor) -> Tensor:
        """A projected gradient in the space of `param` again: what the basis kept of the gradient."""
        rule, stack = self._with_basis(param)
        return rule.lift(projected.unsqueeze(0), stack.state, local(param).shape)[0]

    @torch.no_grad()
    def step_param(self, param: Tensor, grad: Tensor | None = None, *, projected: Tensor | None = None) -> None:
        """One step of this parameter alone, with its group's present options, from its gradient or a projected one.

        Raises:
            UsageError: both or neither are given, or this kind of gradient has no rule.
        """
        if (grad is None) == (projected is None):
            raise UsageError("step_param needs either grad or projected")
        group = self.group_of(param)
        if grad is not None:
            self._check_gradient(param, grad)
        self._begin(param, group)
        rule = self.rule_for(param, group)
        if projected is not None:
            self._step_stack(self._with_basis(param)[1], projected.unsqueeze(0), group, projected=True)
        elif _ends_chain(rule):
            self._descend(rule, [param], [grad], group)  # type: ignore[list-item]
        else:
            self._step_stack(Stack.of([param], [self.state[param]]), local(grad).unsqueeze(0), group)  # type: ignore[arg-type]

    def group_of(self, param: Tensor) -> dict[str, Any]:
        """The parameter group that holds `param`.

        Raises:
            UsageError: none does.
        """
        if id(param) not in self._group_numbers:
            self._group_numbers = {id(p): n for n, group in enumerate(self.param_groups) for p in group["params"]}
        if id(param) not in self._group_numbers:
            raise UsageError(f"this {type(self).__name__} holds no such parameter of shape {tuple(param.shape)}")
        return self.param_groups[self._group_numbers[id(param)]]

    def _with_basis(self, param: Tensor) -> tuple[LowRank, Stack]:
        rule = self.rule_for(param, self.group_of(param))
        if not isinstance(rule, LowRank):
            raise UsageError(f"the parameter of shape {tuple(param.shape)} is not projected: its rule is {rule}")
        if not self.state[param]:
            raise UsageError(f"the parameter of shape {tuple(param.shape)} has no basis yet; call refit first")
        return rule, Stack.of([param], [self.state[param]])

    # Settings and saved state.

    def _check(self, group: dict[str, Any]) -> None:
        if not float(group["lr"]) >= 0 or not math.isfinite(float(group["lr"])):
            raise UsageError(f"lr must be a finite number >= 0, got lr={group['lr']}")
        if not group["weight_decay"] >= 0:
            raise UsageError(f"weight_decay must be >= 0, got weight_decay={group['weight_decay']}")
        for param in group["params"]:
            self.rule_for(param, group)

    def _check_gradient(self, param: Tensor, grad: Tensor) -> None:
        if grad.layout != torch.strided or param.is_complex():
            kind = "complex" if param.is_complex() else "sparse"
            raise UsageError(
                f"{type(self).__name__} has no rule for {kind} gradients, got one of shape {tuple(param.shape)}; "
                f"give that parameter to another optimizer"
            )
        if isinstance(param, DTensor):
            self._check_sharded(param)

    def _check_sharded(self, param: Tensor) -> None:
        rule = self.rule_for(param, self.group_of(param))
        alone = rule.inner if isinstance(rule, LowRank) and rule.rows is not None else rule
        # Blocks of quantised state do not end where rows do.
        if alone.elementwise and not isinstance(alone, LowBit):
            return
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
                rule = self.rule_for(param, group)
                counters = _counter_device(rule, param)
                self.state[param] = {
                    name: share_out(
                        value.detach().clone().to(param.device if value.ndim else counters), param, _by_rows(rule, name)
                    )
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
            expected = {n: tuple(t.shape) for n, t in rule.init(_whole_meta(param)).items()} | {"step": ()}
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
        return {**super().__getstate__(), "_rule": self._rule, "_stacks": {}, "_group_numbers": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._stacks, self._group_numbers = {}, {}


def _ends_chain(rule: Rule) -> bool:
    """Whether the rule takes the whole step itself (see `EndsChain`)."""
    return isinstance(rule, Adam) or (isinstance(rule, LowBit) and rule.inner.elementwise)


def _counter_device(rule: Rule, param: Tensor) -> torch.device:
    """PyTorch's fused kernel wants its step count beside the parameter; our rules read theirs on the CPU."""
    return param.device if isinstance(rule, Adam) else torch.device("cpu")


def _by_rows(rule: Rule, name: str) -> bool:
    """Whether a state tensor of a sharded parameter is split as its rows are; what is not is the same everywhere."""
    return name in (rule.inner.moments if isinstance(rule, LowRank) else rule.moments)


def _whole_meta(param: Tensor) -> Tensor:
    """A tensor like the parameter, whole and without memory."""
    return torch.empty(param.shape, dtype=param.dtype, device="meta")


def _apply(param: Tensor, update: Tensor | Factored, index: int, lr: float) -> None:
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
