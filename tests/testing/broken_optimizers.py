"""An honest small optimizer, and ways to break it: each class below makes one mistake that people make."""

from __future__ import annotations

import functools
import inspect
import types
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Honest(torch.optim.Optimizer):
    """AdamW in twenty lines, without a mistake that the checks know of."""

    def __init__(
        self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False, maximize=False
    ) -> None:  # fmt: skip
        for name, value in (("lr", lr), ("eps", eps), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must be >= 0, got {name}={value}")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "fused": fused, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else self.evaluate(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.visit(p, group)
        return loss

    def evaluate(self, closure):
        return torch.enable_grad()(closure)()

    def visit(self, p: Tensor, group: dict[str, Any]) -> None:
        if p.grad is not None:
            self.step_one(p, p.grad, self.state[p], group)

    def step_one(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if g.is_complex() or g.is_sparse:
            raise RuntimeError("complex parameters and sparse gradients are not supported")
        update = self.update(p, -g if group["maximize"] else g, state, group)
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.sub_(group["lr"] * update)

    def update(self, p: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        (beta1, beta2), t = group["betas"], self.count(state)
        m, v = state.setdefault("exp_avg", self.zeros(p)), state.setdefault("exp_avg_sq", self.zeros(p))
        g = g.to(m.dtype)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        return (m / self.correction(beta1, t)) / ((v / self.correction(beta2, t)).sqrt() + group["eps"])

    def count(self, state: dict[str, Any]) -> Any:
        return state.setdefault("step", torch.zeros(())).add_(1)

    def zeros(self, p: Tensor) -> Tensor:
        return torch.zeros_like(p)

    def correction(self, beta: float, t: Any) -> Any:
        return 1 - beta ** t.double()


SIGNATURE = inspect.signature(Honest)
"""For subclasses that pass on whatever they are given."""


# --- numerics ---------------------------------------------------------------------------------------------------------


class Ascends(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, -g, state, group)


class MiscountsTheBias(Honest):
    def correction(self, beta, t):
        return 1 - beta ** (t.double() + 1)


class ForgetsTheBias(Honest):
    def correction(self, beta, t):
        return 1.0


class DrawsFromTheGlobalGenerator(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g, state, group) * (1 + 1e-3 * torch.rand(()))


class CountsInBfloat16(Honest):
    def count(self, state):
        return state.setdefault("step", torch.zeros((), dtype=torch.bfloat16)).add_(1)


class CorrectsInBfloat16(Honest):
    """1 - 0.999 is 0 in bfloat16."""

    def update(self, p, g, state, group):
        self.dtype = p.dtype
        return super().update(p, g, state, group)

    def correction(self, beta, t):
        if self.dtype == torch.bfloat16:
            return 1 - torch.tensor(beta, dtype=self.dtype) ** t
        return super().correction(beta, t)


class AssumesContiguousMemory(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, g.as_strided(g.shape, torch.empty(g.shape).stride()), state, group)


class IgnoresMaximize(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, g, state, {**group, "maximize": False})


class RefusesInRiddles(Honest):
    def step_one(self, p, g, state, group):
        if g.is_complex() or g.is_sparse:
            raise RuntimeError("error 17")
        super().step_one(p, g, state, group)


class UpdatesRealPartsOnly(Honest):
    def step_one(self, p, g, state, group):
        if g.is_complex():
            super().step_one(torch.view_as_real(p)[..., 0], torch.view_as_real(g)[..., 0], state, group)
        else:
            super().step_one(p, g, state, group)


class FlipsBits(Honest):
    """Differs from itself when turned 'off' by rounding only."""

    def update(self, p, g, state, group):
        return super().update(p, g, state, group) * (1 + 1e-6 * (group["weight_decay"] == 0))


class NormalizesWithoutCare(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g / g.norm(), state, group)


# --- arguments and options --------------------------------------------------------------------------------------------


class IgnoresWeightDecay(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, g, state, {**group, "weight_decay": 0.0})


class IgnoresEps(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g, state, {**group, "eps": 1e-3})


class FusedIsAnotherMethod(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g, state, group) * (1.001 if group["fused"] else 1.0)


class HasAHiddenArgument(Honest):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False,
                 maximize=False, secret=1.0):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused, maximize=maximize)


class AcceptsAnyValue(Honest):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False,
                 maximize=False):  # fmt: skip
        super().__init__(params, abs(lr), betas, abs(eps), weight_decay, fused=fused, maximize=maximize)


class NamesNothing(Honest):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False,
                 maximize=False):  # fmt: skip
        try:
            super().__init__(params, lr, betas, eps, weight_decay, fused=fused, maximize=maximize)
        except ValueError:
            raise ValueError("invalid value") from None


class SwallowsUnknownArguments(Honest):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False,
                 maximize=False, **rest):  # fmt: skip
        super().__init__(params, lr, betas, eps, weight_decay, fused=fused, maximize=maximize)


class AcceptsNoParameters(Honest):
    def __init__(self, params, *args, **options):
        super().__init__(list(params) or [torch.nn.Parameter(torch.zeros(1))], *args, **options)

    __signature__ = SIGNATURE


class UsesTheLrItWasBuiltWith(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, g, state, {**group, "lr": self.defaults["lr"]})


class UsesTheFirstGroupsLr(Honest):
    def step_one(self, p, g, state, group):
        super().step_one(p, g, state, {**group, "lr": self.param_groups[0]["lr"]})


class KeepsTheEpsOfItsFirstStep(Honest):
    def update(self, p, g, state, group):
        eps = state.setdefault("eps", torch.tensor(float(group["eps"])))
        return super().update(p, g, state, {**group, "eps": eps})


class TurnsLrIntoANumber(Honest):
    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, *, fused=False,
                 maximize=False):  # fmt: skip
        super().__init__(params, float(lr), betas, eps, weight_decay, fused=fused, maximize=maximize)


# --- state ------------------------------------------------------------------------------------------------------------


class ForgetsAMoment(Honest):
    def state_dict(self):
        state = super().state_dict()
        kept = {key: {n: v for n, v in one.items() if n != "exp_avg_sq"} for key, one in state["state"].items()}
        return {**state, "state": kept}


class LosesPrecisionOnLoading(Honest):
    """Keeps float32 moments for bf16 weights and lets load_state_dict cast them, which is what it does by itself."""

    def zeros(self, p):
        return torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))


class HidesStateInAnAttribute(Honest):
    def step_one(self, p, g, state, group):
        hidden = self.__dict__.setdefault("hidden", {}).setdefault(p, {})
        super().step_one(p, g, hidden, group)


class KeepsAnObject(Honest):
    def update(self, p, g, state, group):
        state.setdefault("notes", types.SimpleNamespace(text="any Python object"))
        return super().update(p, g, state, group)


class KeepsAView(Honest):
    def zeros(self, p):
        return p.new_zeros(4 * p.numel())[: p.numel()].view(p.shape)


class AdoptsTheGradient(Honest):
    def update(self, p, g, state, group):
        state["last_gradient"] = p.grad
        return super().update(p, g, state, group)


# --- the loop ---------------------------------------------------------------------------------------------------------


class StepsInBackward(Honest):
    """Moves a parameter as soon as its gradient arrives, and does nothing in step()."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        for p in self.param_groups[0]["params"]:
            p.register_post_accumulate_grad_hook(self._arrived)

    @torch.no_grad()
    def _arrived(self, p):
        self.step_one(p, p.grad, self.state[p], self.param_groups[0])
        p.grad = None

    __signature__ = SIGNATURE


class TakesSigns(Honest):
    """A method that has every right to be: clipping cannot mean anything to it."""

    def update(self, p, g, state, group):
        return super().update(p, g.sign(), state, group)


class ScalesGradientsInPlace(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g.mul_(1.0001), state, group)


class ClosureWithoutGradients(Honest):
    def evaluate(self, closure):
        return closure()


class DropsTheLoss(Honest):
    def evaluate(self, closure):
        super().evaluate(closure)


class DecaysWhatHasNoGradient(Honest):
    def visit(self, p, group):
        if p.grad is None:
            p.mul_(1 - group["lr"] * group["weight_decay"])
        super().visit(p, group)


class CountsForAllAtOnce(Honest):
    """One step count per group: parameters whose gradient comes late miss their bias correction."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.defaults["steps"] = 0
        for group in self.param_groups:
            group["steps"] = 0

    def visit(self, p, group):
        group["steps"] += p is group["params"][0]
        super().visit(p, group)

    def step_one(self, p, g, state, group):
        self.steps = group["steps"]
        super().step_one(p, g, state, group)

    def count(self, state):
        return torch.tensor(self.steps)

    __signature__ = SIGNATURE


class StepsTheFirstGroupOnly(Honest):
    def visit(self, p, group):
        if group is self.param_groups[0]:
            super().visit(p, group)


# Taken before the first instance is made: that is when torch.optim.Optimizer wraps the class's step with its hooks.
STEP_WITHOUT_HOOKS = Honest.step


class SkipsHooks(Honest):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.step = functools.partial(STEP_WITHOUT_HOOKS, self)

    __signature__ = SIGNATURE


# --- wrappers and processes -------------------------------------------------------------------------------------------


class ReadsLrAsANumber(Honest):
    """float(lr): a graph break under torch.compile, and a number that becomes part of the compiled code."""

    def step_one(self, p, g, state, group):
        lr = round(float(group["lr"]), 12)
        if hash(lr) % 2:  # any branch on the value
            g = g + 0
        super().step_one(p, g, state, {**group, "lr": lr})


class IsAnotherMethodWhenCompiled(Honest):
    def update(self, p, g, state, group):
        return super().update(p, g, state, group) * (1.01 if torch.compiler.is_compiling() else 1.0)


class IgnoresOverflow(Honest):
    """Tells the gradient scaler that it looks for overflow itself, and does not."""

    _step_supports_amp_scaling = True

    def step_one(self, p, g, state, group):
        scale = getattr(self, "grad_scale", None)
        super().step_one(p, g if scale is None else g / scale, state, group)


class StepsByRank(Honest):
    def update(self, p, g, state, group):
        rank = dist.get_rank() if dist.is_initialized() else 0
        return super().update(p, g, state, group) * (1 + 1e-3 * rank)
