"""Step every parameter in the backward pass, as soon as its gradient is complete, and free that gradient there.

Saves: gradients. The largest single one exists at a time instead of the whole model's. Costs: parameters are stepped
one by one, and the norm of each gradient is looked at before its step, for which a GPU has to be waited for.

A step on A micro-batches, for a matrix that a low-rank optimizer projects (P [N, r]: its basis):

    micro-batch 1 .. A    R += G_i P       [M, r] is all that stays; G_i [M, N] is freed
    micro-batch A         step on R, which is the step on sum_i(G_i): the sum of the projections is that of the sum

Whatever is not projected accumulates in `.grad`, and is stepped and freed in the last micro-batch. The global norm is
exact where whole gradients are seen, and estimated where they never exist (`leantrain.optim.projected_sum`).

Sources: Lv et al. 2024 (LOMO, ACL) for fusing step and backward pass; Zhao et al. 2024 (GaLore, ICML) for doing so with
projected gradients.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, NoReturn, get_args, overload

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from leantrain.errors import RunError, UsageError
from leantrain.ledger import record
from leantrain.optim.chain import Chain
from leantrain.optim.one_by_one import OneByOne
from leantrain.optim.projected_sum import ProjectedSum, square_of, wide
from leantrain.optim.stacks import local

Clip = Literal["previous", "exact"]
BasisFrom = Literal["first", "whole"]
NonFinite = Literal["skip", "raise"]

_KEY = "in_backward"
"""Of what is saved beside the wrapped optimizer's state."""


def step_in_backward(
    model: nn.Module,
    optimizer: Optimizer,
    *,
    accumulate: int = 1,
    max_norm: float | None = None,
    clip: Clip = "previous",
    basis_from: BasisFrom = "first",
    nonfinite: NonFinite = "skip",
    process_group: dist.ProcessGroup | None = None,
) -> InBackward:
    """Let `optimizer` step each parameter of `model` inside `backward()`, and free its gradient there.

    The loop stays the usual one, with what is returned in the optimizer's place: `accumulate` backward passes, then
    `step()`. Learning rates and all other options are read from the parameter groups when a parameter is stepped.

    Args:
        model: the plain module, or one that `fully_shard` has sharded.
        optimizer: one of `leantrain.optim`, or any other that leaves parameters without a gradient alone and keeps
            nothing that belongs to several of them.
        accumulate: backward passes per step that reach a parameter, >= 1; not all need reach all parameters.
        max_norm: clip gradients to this global norm, > 0; None measures the norm and clips nothing.
        clip: "previous" scales by the norm of the step before, and frees gradients at once. (The first step of a run
            has none before it; it scales by the norm of the gradients that have arrived so far.) "exact" waits for the
            norm and updates in `step()`; until then it keeps projected gradients of projected matrices, and whole
            gradients of all other parameters.
        basis_from: where a basis that is due comes from when there are several micro-batches. "first" computes it from
            the gradient of the first, so that at most one whole gradient of a projected matrix exists at a time.
            "whole" keeps the gradients of those matrices to the last micro-batch, and takes the ordinary step.
        nonfinite: what infinities or NaN in a gradient do. "skip" leaves out that parameter's update (with "exact", the
            step) and counts it; "raise" stops before it, when parameters that came earlier may have been stepped.
        process_group: processes that train together, each on its own plain copy of the model. Gradients are averaged
            over them: the projected ones of projected matrices, unless a basis is due. All processes have to use the
            same parameters in every step. Leave it out with `fully_shard`, which averages by itself.

    Raises:
        UsageError: a value outside its range; a model wrapped in DistributedDataParallel or FSDP1; an optimizer of
            other parameters, or one that needs a closure. In use: more than `accumulate` backward passes without
            `step()`, `step()` without any, or a GradScaler.
        RunError: in use: a gradient that is not finite, with "raise".

    Examples:
        >>> from leantrain.optim import GaLoreAdamW
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> optimizer = step_in_backward(model, GaLoreAdamW(model.parameters(), rank=2), accumulate=2, max_norm=1.0)
        >>> for micro_batch in torch.ones(2, 3, 8):
        ...     (model(micro_batch).square().mean() / 2).backward()
        >>> [parameter.grad for parameter in model.parameters()]
        [None, None, None, None]
        >>> optimizer.step()
        >>> bool(optimizer.grad_norm > 0)
        True
    """
    return InBackward(model, optimizer, accumulate, max_norm, clip, basis_from, nonfinite, process_group)


class InBackward(Optimizer):
    """An optimizer most of whose work is done when `step()` is called; `step_in_backward` makes it.

    Parameter groups and state are those of the optimizer it wraps: either may be given to schedulers and loggers.
    """

    inner: Optimizer
    """The optimizer that moves the parameters."""
    skipped: int
    """Updates of single parameters that were left out because a gradient was not finite."""

    # Tells GradScaler to call step() without unscaling anything, so that step() can say what is wrong.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        accumulate: int = 1,
        max_norm: float | None = None,
        clip: Clip = "previous",
        basis_from: BasisFrom = "first",
        nonfinite: NonFinite = "skip",
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        _check_options(accumulate, max_norm, clip, basis_from, nonfinite)
        _check_model(model)
        _check_optimizer(optimizer)
        self.inner, self.skipped = optimizer, 0
        self._chain = optimizer if isinstance(optimizer, Chain) else None
        self._one_by_one = OneByOne(optimizer)
        self._accumulate, self._max_norm, self._basis_from = accumulate, max_norm, basis_from
        self._deferred, self._raises = max_norm is not None and clip == "exact", nonfinite == "raise"
        self._group = process_group
        self._names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
        self._check_parameters(model)
        self._lock = threading.Lock()  # a model on several GPUs has its backward pass in as many threads
        self._steps, self._norm = 0, math.nan  # steps made, and the last one's norm
        self._previous: float | None = None  # the last norm that was finite
        self._begin_step()
        super().__setstate__({})  # what every Optimizer has; not __init__, which would make groups of its own
        self._numbers: dict[Tensor, int] = {}  # of every parameter, in the order of the groups
        self._group_numbers: dict[Tensor, int] = {}
        self._handles = [model.register_forward_pre_hook(_refuse_ddp)]
        self._attach()

    def _begin_step(self) -> None:
        self._passes: Counter[Tensor] = Counter()  # backward passes that each parameter has had a gradient in
        self._sums: dict[Tensor, ProjectedSum] = {}
        self._waiting: dict[Tensor, None] = {}  # those whose gradient is complete and waits for the norm
        self._square = 0.0  # of the norm of all complete gradients
        self._spoiled = False  # whether one of them was not finite
        self._order = 0  # a fingerprint of the order in which they were completed
        self._one_by_one.begin()

    # What a training loop calls.

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """End a step: update what the backward passes have left. `closure`, if given, is called first.

        After fewer backward passes than `accumulate` (the short end of an epoch) everything is updated here.

        Raises:
            UsageError: there was no backward pass since the last step, or a GradScaler has scaled the loss.
            RunError: with `process_group`, the processes did not use the same parameters.
        """
        if hasattr(self, "found_inf"):
            raise UsageError(
                "a step in backward cannot wait for GradScaler to unscale gradients; use bfloat16 without it"
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        left = [p for p in self._numbers if p not in self._waiting and (p in self._sums or p.grad is not None)]
        if not self._passes and not left:
            raise UsageError("step() without a backward pass since the last one: no parameter has a gradient")
        for param in left:
            self._complete(param)
        self._check_order()
        self._norm = math.nan if self._spoiled else self._norm_so_far()
        if self._spoiled:
            self._skip(self._waiting)
        else:
            self._previous = self._norm
            for param in self._waiting:
                self._update(param, self._coefficient(self._norm))
        self._steps += 1
        self._begin_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Throw away what has been accumulated for the next step. After `step()` there is nothing to throw away."""
        self._begin_step()
        for param in self._numbers:
            param.grad = None

    @property
    def grad_norm(self) -> Tensor:
        """Global norm of the last step's gradient before clipping; NaN before the first step, or if it was not finite.

        Exact with one micro-batch. With several, the part of it that the bases leave out is an unbiased estimate.
        """
        return torch.tensor(self._norm)

    def remove(self) -> None:
        """Take the hooks off again, after which `inner` is an ordinary optimizer.

        Raises:
            UsageError: gradients have been accumulated here for the next step.
        """
        if self._sums:
            raise UsageError("remove() in the middle of a step: call step() or zero_grad() first")
        while self._handles:
            self._handles.pop().remove()

    # What makes it an optimizer to others.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> Any:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.inner.defaults)  # a copy: Optimizer adds to it

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.inner.add_param_group(param_group)
        self._attach()

    def held_gradients(self) -> Iterator[Tensor]:
        """What is kept of gradients elsewhere than in `.grad`. The ledger counts it."""
        for kept in self._sums.values():
            yield from (tensor for tensor in (kept.projected, kept.sketch) if tensor is not None)

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state and, under "in_backward", its own: norms, counts, and what an unfinished step
        has accumulated.

        Raises:
            UsageError: in the middle of a step of several processes, where each has accumulated something else.
        """
        sums = {self._numbers[param]: dict(vars(kept)) for param, kept in self._sums.items()}
        whole = {n: param.grad for param, n in self._numbers.items() if self._passes and param.grad is not None}
        several = self._group is not None or any(isinstance(param, DTensor) for param in self._numbers)
        if several and (sums or whole):
            raise UsageError("in the middle of a step every process holds other gradients; save after step()")
        own = {
            "accumulate": self._accumulate, "steps": self._steps, "norm": self._norm, "previous": self._previous,
            "skipped": self.skipped, "square": self._square, "spoiled": self._spoiled,
            "passes": {self._numbers[param]: passes for param, passes in self._passes.items()},
            "waiting": [self._numbers[param] for param in self._waiting], "sums": sums, "whole": whole,
        }  # fmt: skip
        return {**self.inner.state_dict(), _KEY: own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a saved state; that of the bare optimizer too, which knows of no earlier norm.

        Raises:
            UsageError: it was saved in the middle of a step with another `accumulate`.
        """
        own: dict[str, Any] | None = state_dict.get(_KEY)
        if own is not None and own["passes"] and own["accumulate"] != self._accumulate:
            raise UsageError(
                f"the state was saved in the middle of a step with accumulate={own['accumulate']}, "
                f"got accumulate={self._accumulate}"
            )
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != _KEY})
        self.zero_grad()
        if own is None:
            self._steps, self._norm, self._previous, self.skipped = 0, math.nan, None, 0
            return
        self._steps, self._norm, self._previous, self.skipped = (
            own[name] for name in ("steps", "norm", "previous", "skipped")
        )
        self._square, self._spoiled = own["square"], own["spoiled"]
        params = list(self._numbers)
        self._passes = Counter({params[number]: passes for number, passes in own["passes"].items()})
        self._waiting = dict.fromkeys(params[number] for number in own["waiting"])
        for number, kept in own["sums"].items():
            own_tensors = {key: v.clone().to(params[number].device) for key, v in kept.items() if isinstance(v, Tensor)}
            self._sums[params[number]] = ProjectedSum(**{**kept, **own_tensors})
        for number, grad in own["whole"].items():
            params[number].grad = grad.clone().to(params[number].device)

    def __getstate__(self) -> NoReturn:
        raise UsageError(
            "an optimizer that steps in backward belongs to its model's hooks; copy its state_dict() instead"
        )

    # What happens in a backward pass.

    @torch.no_grad()
    def _arrived(self, param: Tensor) -> None:
        """The hook: the gradient of one more backward pass has been added to `param.grad`."""
        with self._lock:
            self._count_pass(param)
            if not self._stays_whole(param):
                self._project(param)
            if self._passes[param] == self._accumulate:
                self._complete(param)

    def _count_pass(self, param: Tensor) -> None:
        if self._passes[param] == self._accumulate:
            raise UsageError(
                f"another backward pass after accumulate={self._accumulate} of them without step(): each backward() "
                f"that reaches {self._names.get(param, 'a parameter')} counts"
            )
        self._passes[param] += 1

    def _stays_whole(self, param: Tensor) -> bool:
        """Whether this parameter's gradients are added up in `.grad`."""
        if param in self._sums:
            return False
        if self._chain is None or not self._chain.projects(param):
            return True
        if self._accumulate == 1:
            return self._group is None or self._chain.basis_due(param)
        return self._basis_from == "whole" and self._chain.basis_due(param)

    def _project(self, param: Tensor) -> None:
        """Move a projected matrix' gradient from `.grad` into its sum."""
        assert self._chain is not None and param.grad is not None
        if param not in self._sums and self._chain.basis_due(param):
            # Averaged first, so that all processes find the same basis. To average once more changes nothing.
            if not math.isfinite(self._average_and_measure(param)):
                return  # no basis comes of it; it stays in .grad, and is not finite when it is complete either
            self._chain.refit(param, param.grad)
        grad, param.grad = param.grad, None
        projected, matrix = self._chain.project(param, grad), local(grad).flatten(1)
        if param in self._sums:
            self._sums[param].add(matrix, projected)
        else:
            seed = 1_000_003 * self._steps + self._numbers[param]
            self._sums[param] = ProjectedSum.of(matrix, projected, seed)

    def _complete(self, param: Tensor) -> None:
        """The gradient of `param` is the step's: measure it, then update `param` or keep what the update needs."""
        self._order = (1_000_003 * self._order + self._numbers[param] + 1) % 2**61
        square = self._average_and_measure(param)
        if not math.isfinite(square):
            self._spoiled = True
            if self._raises:
                raise RunError(f"the gradient of {self._names.get(param, 'a parameter')} is not finite")
            self._skip([param])
            return
        self._square += square
        if not self._deferred:
            norm = self._norm_so_far() if self._previous is None else self._previous
            self._update(param, self._coefficient(norm))
            return
        self._waiting[param] = None
        if self._chain is not None and param not in self._sums and self._chain.projects(param):
            assert param.grad is not None
            self._chain.refit(param, param.grad)
            self._sums[param] = ProjectedSum(wide(self._chain.project(param, param.grad)), None, by_rows=True, seed=0)
            param.grad = None

    def _average_and_measure(self, param: Tensor) -> float:
        """Make what is held of the gradient its mean over the processes; the squared norm of the whole of it."""
        kept = self._sums.get(param)
        if kept is None:
            assert param.grad is not None
            self._average(param.grad)
            return _over_shards(square_of(local(param.grad)), param)
        assert kept.sketch is not None
        self._average(kept.projected)
        self._average(kept.sketch)
        return _over_shards(kept.square(), param)

    def _norm_so_far(self) -> float:
        return math.sqrt(max(self._square, 0.0))  # a sum of estimates

    def _coefficient(self, norm: float) -> float:
        return 1.0 if self._max_norm is None else min(1.0, self._max_norm / (norm + 1e-6))

    def _update(self, param: Tensor, coefficient: float) -> None:
        kept = self._sums.pop(param, None)
        gradient = param.grad if kept is None else kept.projected
        assert gradient is not None
        if coefficient < 1:
            gradient.mul_(coefficient)
        if self._chain is None:
            self._one_by_one.step(param, self._group_numbers[param])
        elif kept is None:
            self._chain.step_param(param, gradient)
        else:
            self._chain.step_param(param, projected=gradient)
        param.grad = None

    def _skip(self, params: Iterable[Tensor]) -> None:
        for param in params:
            self._sums.pop(param, None)
            param.grad = None
            self.skipped += 1
            record.event("nonfinite_gradient")

    def _attach(self) -> None:
        """Put the hook on every parameter that has none yet. One without a gradient of its own is left to `step()`."""
        for number, group in enumerate(self.inner.param_groups):
            for param in group["params"]:
                if param not in self._numbers:
                    self._numbers[param], self._group_numbers[param] = len(self._numbers), number
                    if param.requires_grad:
                        self._handles.append(param.register_post_accumulate_grad_hook(self._arrived))

    # Several processes.

    def _average(self, tensor: Tensor) -> None:
        if self._group is None:
            return
        if tensor.layout != torch.strided:
            raise UsageError(
                f"sparse gradients cannot be averaged over processes, got one of shape {tuple(tensor.shape)}"
            )
        packed = tensor.div_(self._group.size()).contiguous()  # divided first: a sum might leave the range of float16
        dist.all_reduce(packed, group=self._group)
        if packed is not tensor:
            tensor.copy_(packed)

    def _check_order(self) -> None:
        device = next(iter(self._numbers)).device
        if not self._same_everywhere(torch.tensor(self._order, device=device)):
            raise RunError("the processes did not use the same parameters in this step, and mixed up their gradients")

    def _check_parameters(self, model: nn.Module) -> None:
        params = [param for group in self.inner.param_groups for param in group["params"]]
        if not any(param in self._names for param in params):
            raise UsageError(
                f"the optimizer holds no parameter of this {type(model).__name__}; make it from this model"
            )
        if any(isinstance(getattr(hook, "__self__", None), InBackward) for param in params for hook in _hooks(param)):
            raise UsageError("these parameters are stepped in backward already; call remove() on the earlier one first")
        if self._group is not None and any(isinstance(param, DTensor) for param in params):
            raise UsageError(
                "process_group is for plain models; fully_shard averages gradients itself, so leave it out"
            )
        if not self._same_everywhere(torch.tensor([square_of(p.detach()) for p in params], device=params[0].device)):
            raise UsageError("the processes start from different weights; seed them alike, or broadcast those of one")

    def _same_everywhere(self, value: Tensor) -> bool:
        if self._group is None:
            return True
        both = torch.stack([value, -value])
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        return torch.equal(both[0], -both[1])


def _check_options(accumulate: int, max_norm: float | None, clip: str, basis_from: str, nonfinite: str) -> None:
    if not isinstance(accumulate, int) or accumulate < 1:
        raise UsageError(f"accumulate must be an integer >= 1, got accumulate={accumulate!r}")
    if max_norm is not None and not max_norm > 0:
        raise UsageError(f"max_norm must be > 0 or None, got max_norm={max_norm!r}")
    choices = {"clip": (clip, Clip), "basis_from": (basis_from, BasisFrom), "nonfinite": (nonfinite, NonFinite)}
    for name, (value, allowed) in choices.items():
        if value not in get_args(allowed):
            raise UsageError(f"{name} must be one of {get_args(allowed)}, got {name}={value!r}")


def _check_model(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, DistributedDataParallel):
            raise UsageError(_NO_DDP)
        if isinstance(module, FullyShardedDataParallel):
            raise UsageError("FSDP1 flattens parameters, which are no matrices then; use fully_shard (FSDP2)")


def _check_optimizer(optimizer: Optimizer) -> None:
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UsageError(f"{type(optimizer).__name__} calls backward() itself, so it cannot step inside of it")


_NO_DDP = (
    "DistributedDataParallel averages gradients only after a step in backward has used them. Train the plain model "
    "with step_in_backward(..., process_group=dist.group.WORLD)"
)


def _refuse_ddp(module: nn.Module, inputs: Any) -> None:
    """Before the model's forward pass, because a host may wrap it after it was passed to `step_in_backward`."""
    if DistributedDataParallel._active_ddp_module is not None:
        raise UsageError(_NO_DDP)


def _hooks(param: Tensor) -> Iterable[Any]:
    return (getattr(param, "_post_accumulate_grad_hooks", None) or {}).values()


def _over_shards(square: float, param: Tensor) -> float:
    """The sum over the processes that hold other parts of this parameter (FSDP2)."""
    if not isinstance(param, DTensor):
        return square
    placements = [Partial() if placement.is_shard() else Replicate() for placement in param.placements]
    part = torch.tensor(square, dtype=torch.float64, device=local(param).device)
    return float(DTensor.from_local(part, param.device_mesh, placements, run_check=False).full_tensor())
