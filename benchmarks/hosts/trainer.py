"""What a user sets in Hugging Face's Trainer, and what comes of it: GaLore as the Trainer has it, and ours.

    python -m benchmarks.hosts.trainer

Every setting is changed alone. The weights after six steps of a tiny model are compared with those of a loop written
by hand around the same optimizer class (`tests/hosts/plain_loop.py`): "honoured" where they agree to 1e-5, "ignored"
where they are, to the bit, those without the setting. The log is compared with the rates at which parameters were
really stepped, and with the norms of the loop.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.result import write_result
from leantrain.hosts import TrueGradNorm, trainer_optimizer
from leantrain.optim import GaLoreAdamW
from tests.hosts.plain_loop import (
    BATCH,
    CHANGES,
    DEFAULTS,
    RANK,
    REFRESH,
    STEPS,
    WARMUP,
    Run,
    examples,
    model,
    plain_loop,
)

STOCK, LAYERWISE, OURS, IN_BACKWARD = (
    'optim="galore_adamw"',
    'optim="galore_adamw_layerwise"',
    "leantrain",
    "leantrain, in backward",
)
PLAIN = {"scheduled": False}
SETTINGS = {
    "learning rate": CHANGES["lr"],
    "warm-up and schedule": {"scheduled": True},
    **{name: changes for name, changes in CHANGES.items() if name not in ("nothing", "lr")},
}
AGREES = 1e-5
THEIR_EPS = 1e-6
"""galore-torch's default, in force unless someone hands the Trainer's on."""


@dataclass
class Watched(Run):
    """A run of the Trainer, and the learning rates of its steps."""

    applied: list[float] = field(default_factory=list)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    rows = [[setting, *(outcome(way, changes) for way in WAYS)] for setting, changes in SETTINGS.items()]
    rows.append(["logged learning rate", *(logged_rate(way) for way in WAYS)])
    rows.append(["logged gradient norm", *(logged_norm(way) for way in WAYS)])
    rows.append(["resume", *(resumed(way) for way in WAYS)])
    import galore_torch
    import transformers

    write_result(
        "hosts/trainer",
        title="Settings of Hugging Face's Trainer with GaLore",
        columns=["set in TrainingArguments", *WAYS],
        rows=rows,
        notes=[
            f"transformers {transformers.__version__}, galore-torch {version_of(galore_torch)}; "
            f"LLaMA of {sum(p.numel() for p in model().parameters())} numbers, {STEPS} steps.",
            "In backward: clip='exact', basis_from='whole'.",
        ],
    )


def outcome(way: str, changes: dict[str, Any]) -> str:
    """What became of one setting."""
    try:
        run = WAYS[way](fresh_folder(), **PLAIN | changes)
    except Exception as error:  # any kind: what a user would see is the result
        return f"refused: {type(error).__name__}"
    expected = reference(way, **PLAIN | changes)
    assert expected.distance(reference(way, **PLAIN)) > 10 * AGREES, f"{changes} change nothing in a loop either"
    if run.distance(expected) < AGREES:
        return "honoured"
    return (
        "ignored" if run.distance(WAYS[way](fresh_folder(), **PLAIN)) == 0 else f"off by {run.distance(expected):.1e}"
    )


def logged_rate(way: str) -> str:
    """Whether the log has the learning rates of the steps."""
    run = WAYS[way](fresh_folder())
    return compared(run.lrs, run.applied)


def logged_norm(way: str) -> str:
    """Whether the log has the gradients' norms. Rates stay as they are, because not every way has a schedule."""
    return compared(WAYS[way](fresh_folder(), **PLAIN).norms, reference(way, **PLAIN).norms)


def compared(found: list[float], true: list[float]) -> str:
    wrong = [(f, t) for f, t in zip(found, true, strict=True) if abs(f - t) > 1e-3 * abs(t)]
    return f"wrong: {wrong[-1][0]:.3g} where it was {wrong[-1][1]:.3g}" if wrong else "right"


def resumed(way: str) -> str:
    """What stopping after four steps and going on from the checkpoint makes of the weights."""
    folder = fresh_folder()
    whole = WAYS[way](folder)
    try:
        run = WAYS[way](folder, resume=True)
    except Exception as error:
        return f"refused: {type(error).__name__}"
    return "bit for bit" if run.distance(whole) == 0 else f"without an error, but off by {run.distance(whole):.1e}"


def reference(way: str, **settings: Any) -> Run:
    """The loop by hand, around the optimizer of this way."""
    if way in (OURS, IN_BACKWARD):
        return plain_loop(**settings)
    return plain_loop(make=galore_torch_optimizer, **{"eps": THEIR_EPS, **settings})


def galore_torch_optimizer(groups: list[dict[str, Any]], refresh: int, **options: Any) -> torch.optim.Optimizer:
    from galore_torch import GaLoreAdamW as Peer

    matrices, rest, norms = groups
    # The Trainer's "all-linear" takes the output layer, too.
    embedding, head = rest["params"]
    low_rank = {"update_proj_gap": refresh, "scale": 0.25, "proj_type": "std"}
    groups = [
        {**matrices, "params": [*matrices["params"], head], **low_rank},
        {**rest, "params": [embedding]},
        norms,
    ]
    return Peer(groups, no_deprecation_warning=True, **options)


def arguments(folder: Path, **options: Any) -> Any:
    from transformers import TrainingArguments

    return TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **options,
    )


def in_trainers_words(settings: dict[str, Any]) -> dict[str, Any]:
    s = DEFAULTS | settings
    return {
        "learning_rate": s["lr"],
        "weight_decay": s["weight_decay"],
        "adam_beta1": s["betas"][0],
        "adam_beta2": s["betas"][1],
        "adam_epsilon": s["eps"],
        "max_grad_norm": s["max_norm"] or 0.0,
        "gradient_accumulation_steps": s["accumulate"],
        "lr_scheduler_type": "linear" if s["scheduled"] else "constant",
        "warmup_steps": WARMUP if s["scheduled"] else 0,
    }


def finish(trainer: Any, trained: nn.Module, folder: Path, resume: bool) -> Watched:
    from transformers import PrinterCallback, TrainerCallback

    applied: list[float] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
            stepping = optimizer.optimizer
            if hasattr(stepping, "optimizer_dict"):  # layer-wise: an optimizer for each parameter
                stepping = next(iter(stepping.optimizer_dict.values()))
            applied.append(stepping.param_groups[0]["lr"])

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch())
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    rates, norms = [entry["learning_rate"] for entry in logs], [entry["grad_norm"] for entry in logs]
    return Watched(Run.of(trained, [], []).weights, rates, norms, applied)


def dataset() -> list[dict[str, Any]]:
    return [{"input_ids": row, "labels": row} for row in examples()]


def stock(name: str, folder: Path, resume: bool = False, **settings: Any) -> Watched:
    from transformers import Trainer

    trained = model()
    args = arguments(
        folder,
        optim=name,
        optim_target_modules="all-linear",
        optim_args=f"rank={RANK},update_proj_gap={REFRESH},scale=0.25",
        **in_trainers_words(settings),
    )
    return finish(Trainer(trained, args, train_dataset=dataset()), trained, folder, resume)


def ours(in_backward: bool, folder: Path, resume: bool = False, **settings: Any) -> Watched:
    from transformers import Trainer

    class Reports(TrueGradNorm, Trainer):
        pass

    trained, words = model(), in_trainers_words(settings)
    how: bool | dict[str, Any] = False
    if in_backward:
        how = {"clip": "exact", "basis_from": "whole", "max_norm": words.pop("max_grad_norm") or None}
        words["max_grad_norm"] = 0.0
    args = arguments(folder, **words)
    groups = [{"params": "all-linear", "rank": RANK}]
    optimizer = trainer_optimizer(trained, args, GaLoreAdamW, groups, in_backward=how, refresh=REFRESH)
    trainer = Reports(trained, args, train_dataset=dataset(), optimizers=(optimizer, None))
    return finish(trainer, trained, folder, resume)


WAYS: dict[str, Callable[..., Watched]] = {
    STOCK: lambda *args, **settings: stock("galore_adamw", *args, **settings),
    LAYERWISE: lambda *args, **settings: stock("galore_adamw_layerwise", *args, **settings),
    OURS: lambda *args, **settings: ours(False, *args, **settings),
    IN_BACKWARD: lambda *args, **settings: ours(True, *args, **settings),
}


def fresh_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / "leantrain-benchmark-hosts"
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def version_of(package: Any) -> str:
    from importlib.metadata import version

    return version(package.__name__)


if __name__ == "__main__":
    main()
