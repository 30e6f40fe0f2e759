"""Predicted bytes against measured ones: the recipes' models and others, with every kind of optimizer, two real steps.

    python -m benchmarks.plan.accuracy

Measured are each kind as the ledger does it, and the peak of PyTorch's allocator: on a CPU from its profiler, which is
told of every allocation. Misses are not left out.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Muon, Optimizer
from torch.optim import AdamW as TorchAdamW

from benchmarks.result import write_result
from leantrain.data import Batch
from leantrain.learn import Backprop
from leantrain.nn import MLP, Llama, ResNetCifar, ViT
from leantrain.plan import Combination, Prediction, Subject, from_recipe, language_model, measure, predict
from leantrain.plan.methods import METHODS

ROOT = Path(__file__).parent.parent.parent
RECIPES = ("demo", "galore", "galore-one-rate")
Make = Callable[[nn.Module], Sequence[Optimizer]]


def main() -> None:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, misses = [], []
    for subject, combination in cases():
        predicted = predict(subject, combination, device)
        gc.collect()
        measured = measure(
            subject, combination.make, dtype=getattr(torch, combination.dtype), checkpoint=combination.checkpointing,
            in_backward=combination.in_backward, device=device,
        )  # fmt: skip
        off = predicted.peak / measured.peak - 1
        misses.append(abs(off))
        rows.append([
            subject.name, str(combination), *(_difference(predicted, measured.by_kind, kind) for kind in KINDS),
            f"{predicted.peak:,}", f"{measured.peak:,}", f"{100 * off:+.2f} %",
        ])  # fmt: skip
        print(rows[-1], flush=True)
    write_result(
        "plan/accuracy",
        title="The planner's predictions against two real steps",
        columns=["model", "combination", "parameters", "gradients", "state", "activations", "predicted peak",
                 "measured peak", "off by"],
        rows=rows,
        notes=[
            f"On {device}. Under each kind: predicted less measured bytes, 0 where they are equal. Of {len(rows)} "
            f"peaks {sum(miss == 0 for miss in misses)} are equal to the byte; the largest miss is "
            f"{100 * max(misses):.2f} %.",
            "Peaks are those of PyTorch's allocator. What the process holds beside it (Python, libraries, data) is not "
            "predicted.",
        ],
    )  # fmt: skip


KINDS = ("parameters", "gradients", "optimizer_state", "activations")


def cases() -> Iterator[tuple[Subject, Combination]]:
    """What is predicted and measured."""
    for name in RECIPES:
        subject = from_recipe(ROOT / "recipes" / f"{name}.yaml")
        for run, way in (subject.own or {}).items():
            yield subject, Combination(run, "float32", way.in_backward, way.checkpointing, way.make, own=True)
    tiny = language_model("Llama 9M", lambda context: Llama(512, context, "9M"), 512, batch=4, context=128)
    for method in METHODS:
        for dtype, in_backward, checkpointing in (("float32", False, False), ("bfloat16", True, True)):
            yield (
                tiny,
                Combination(method.name.replace(" r={rank}", ""), dtype, in_backward, checkpointing, method.make),
            )
    others: dict[str, Make] = {
        "torch.AdamW": lambda model: [TorchAdamW(model.parameters())],
        "torch.SGD": lambda model: [SGD(model.parameters(), lr=0.1, momentum=0.9)],
        METHODS[0].name: METHODS[0].make,
        "GaLore": next(method.make for method in METHODS if method.name.startswith("GaLore ")),
    }
    for subject in (tiny, *images()):
        for name, make in others.items():
            yield subject, Combination(name, "float32", False, False, make)
    yield tiny, Combination("torch.Muon", "float32", False, False, _muon)


def images() -> Iterator[Subject]:
    """Models that are no language models."""
    yield _classifier("ResNet-20", lambda: ResNetCifar(20), 16, (3, 32, 32))
    yield _classifier("ViT", lambda: ViT(32, 10), 16, (3, 32, 32))
    yield _classifier("MLP", lambda: MLP(64, classes=10, hidden=(512, 512)), 64, (64,))


def _classifier(name: str, build: Callable[[], nn.Module], batch: int, shape: tuple[int, ...]) -> Subject:
    return Subject(
        name=name,
        build_model=build,
        batch=lambda: Batch(torch.randn(batch, *shape), torch.randint(10, (batch,)), torch.arange(batch)),
        build_learner=lambda model, sample: Backprop(model, "classification"),
        shape={"batch": batch},
        resized=lambda batch: _classifier(name, build, batch, shape),
    )


def _muon(model: nn.Module) -> list[Optimizer]:
    matrices = [param for param in model.parameters() if param.ndim == 2]
    rest = [param for param in model.parameters() if param.ndim != 2]
    return [Muon(matrices, lr=0.02), TorchAdamW(rest)]


def _difference(predicted: Prediction, measured: dict[str, int | None], kind: str) -> str:
    found = measured[kind]
    return "not measured" if found is None else f"{predicted.peaks[kind] - found:+,}".replace("+0", "0")


if __name__ == "__main__":
    main()
