"""Hugging Face's `Trainer`: optimizers with every setting of its arguments, and the true gradient norm in its log.

`Trainer` gives its settings to optimizers that it knows by name. For any other one the settings have to be carried over
by hand, and those forgotten do nothing without a word; `trainer_optimizer` carries them over or raises.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from leantrain.errors import UsageError
from leantrain.optim.groups import parameter_groups
from leantrain.optim.in_backward import step_in_backward

if TYPE_CHECKING:
    from transformers import TrainingArguments

_FROM_ARGUMENTS = {
    "lr": "learning_rate",
    "weight_decay": "weight_decay",
    "betas": "adam_beta1 and adam_beta2",
    "eps": "adam_epsilon",
    "accumulate": "gradient_accumulation_steps",
}
"""Options of optimizers and of steps in backward, and where a user of the Trainer sets them."""

_ADAMS_DEFAULTS = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}


def trainer_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    optimizer_class: type[Optimizer],
    groups: Sequence[dict[str, Any]] = (),
    *,
    in_backward: bool | Mapping[str, Any] = False,
    **options: Any,
) -> Optimizer:
    """The optimizer for `Trainer(model, args, optimizers=(optimizer, None), ...)`, with the settings of `args`.

    It takes `learning_rate`, `weight_decay`, `adam_beta1`, `adam_beta2` and `adam_epsilon` from `args`; as in the
    Trainer, biases and norms are not decayed. Clipping, accumulation, the schedule with its warm-up, logging and
    checkpoints remain the Trainer's.

    Args:
        model: the model that the Trainer is given.
        args: its `TrainingArguments`.
        optimizer_class: such as `GaLoreAdamW`.
        groups: as in `parameter_groups`: `[{"params": "all-linear", "rank": 128}]`. Without them, options that the
            class keeps to matrices (`rank`) go to "all-linear".
        in_backward: step each parameter during the backward pass, so that hardly a gradient is held (see
            `step_in_backward`): True, or a dictionary of its options such as `{"max_norm": 1.0}`. Clipping is then
            done there and has to be off in `args` (`max_grad_norm=0`). Use a Trainer with `TrueGradNorm`, because the
            gradients are gone when the Trainer measures them.
        **options: everything else that the class takes, for instance `refresh=200`.

    Raises:
        UsageError: something is set twice or for another optimizer, or cannot be honoured with this one.
    """
    _check(args, options, in_backward)
    accepted = inspect.signature(optimizer_class).parameters
    settings: dict[str, Any] = {"lr": args.learning_rate, "weight_decay": args.weight_decay}
    if "betas" in accepted and "eps" in accepted:
        settings |= {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    elif changed := [name for name, default in _ADAMS_DEFAULTS.items() if getattr(args, name) != default]:
        raise UsageError(f"{optimizer_class.__name__} has no use for {', '.join(changed)} of the training arguments")
    for_matrices = {name: options.pop(name) for name in getattr(optimizer_class, "hidden_only", ()) if name in options}
    if for_matrices and groups:
        raise UsageError(f"{', '.join(for_matrices)} is given beside groups; put it into the groups it is meant for")
    if for_matrices:
        groups = [{"params": "all-linear", **for_matrices}]
    optimizer = optimizer_class(parameter_groups(model, groups, no_decay=True), **settings, **options)
    if in_backward is False:
        return optimizer
    return step_in_backward(
        model,
        optimizer,
        accumulate=args.gradient_accumulation_steps,
        **({} if in_backward is True else in_backward),
    )


class TrueGradNorm:
    """Makes a Trainer log the gradient norm that an optimizer with steps in the backward pass has measured.

    To be put in front of a Trainer's class: `class MyTrainer(TrueGradNorm, Trainer): pass`. Without it the Trainer logs
    a norm of 0, that of the gradients that are left. With any other optimizer it changes nothing.
    """

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The Trainer's `log`, given the optimizer's `grad_norm` where there is one."""
        if "grad_norm" in logs:
            wrapped = self.optimizer  # type: ignore[attr-defined]
            optimizer = getattr(wrapped, "optimizer", wrapped)  # Accelerate's wrapper holds ours
            if hasattr(optimizer, "grad_norm"):
                logs = {**logs, "grad_norm": float(optimizer.grad_norm)}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]


def _check(args: TrainingArguments, options: Mapping[str, Any], in_backward: bool | Mapping[str, Any]) -> None:
    given = {*options, *(in_backward if isinstance(in_backward, Mapping) else ())}
    for name in sorted(given & _FROM_ARGUMENTS.keys()):
        raise UsageError(f"{name} is the training arguments' to say: set {_FROM_ARGUMENTS[name]} there")
    for name in ("optim_args", "optim_target_modules"):
        if getattr(args, name, None):
            raise UsageError(
                f"{name}={getattr(args, name)!r} is for the Trainer's own optimizers; give trainer_optimizer the "
                f"options and groups instead"
            )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim not in ("adamw_torch", "adamw_torch_fused"):  # its defaults
        raise UsageError(f"the training arguments ask for another optimizer, optim={optim!r}; leave optim out")
    if in_backward is False:
        return
    if args.max_grad_norm:
        raise UsageError(
            f"max_grad_norm={args.max_grad_norm} would have the Trainer clip what in_backward leaves of the gradients; "
            f"set max_grad_norm=0 and in_backward={{'max_norm': {args.max_grad_norm}}}"
        )
    if args.fp16:
        raise UsageError("in_backward cannot undo the loss scaling of fp16=True; use bf16=True")
