"""Training with int8 weights against float32 and bfloat16 ones, and against torchao's: loss, bytes, time of a step.

    python -m benchmarks.nn.int8

The digits of scikit-learn, an MLP, AdamW with a small learning rate, so that most updates are below a step of the int8
grid. All kinds of weights take turns in the timed steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import mean, median, stdev

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.result import write_result
from leantrain.ledger.storages import storage_bytes
from leantrain.nn import MLP
from leantrain.nn.int8 import Int8Weight, int8_weights

EPOCHS, BATCH, LR, SEEDS, TURNS, WIDTH, ROWS = 30, 64, 5e-4, (0, 1, 2), 15, 1024, 512


def main() -> None:
    torch.set_num_threads(1)
    kinds: dict[str, Callable[[nn.Module], nn.Module]] = {
        "float32": lambda model: model,
        "bfloat16": lambda model: model.to(torch.bfloat16),
        "int8, stochastic": lambda model: int8_weights(model, layers="."),
        "int8, rounded to nearest": rounded_to_nearest,
        "int8 of torchao": torchao_int8,
    }
    times = step_seconds(kinds)
    rows = []
    for name, convert in kinds.items():
        runs = [digits(convert, seed) for seed in SEEDS]
        losses, accuracies = [loss for loss, _ in runs], [100 * accuracy for _, accuracy in runs]
        model = convert(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)))
        rows.append([
            name,
            f"{storage_bytes(model.parameters()) / WIDTH**2:.3f}",
            f"{mean(losses):.3f} ± {stdev(losses):.3f}",
            f"{mean(accuracies):.1f} ± {stdev(accuracies):.1f}",
            f"{times[name] / times['float32']:.2f}",
        ])  # fmt: skip
    write_result(
        "nn/int8",
        title=f"Training with int8 weights: digits, AdamW at a learning rate of {LR:g}",
        columns=["weights", "bytes per number", "test loss", "test accuracy, %", "x float32's step"],
        rows=rows,
        notes=[
            f"Mean ± standard deviation over seeds {', '.join(map(str, SEEDS))}; MLP of 64-128-64-10, {EPOCHS} epochs "
            f"in batches of {BATCH}. Bytes and time: one layer of {WIDTH} x {WIDTH}; a step is forward and backward of "
            f"{ROWS} rows and PyTorch's AdamW without foreach; float32 takes {1e3 * times['float32']:.0f} ms."
        ],
    )


def digits(convert: Callable[[nn.Module], nn.Module], seed: int) -> tuple[float, float]:
    """Test loss and accuracy."""
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.25, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32) for part in split[:2])
    train_labels, test_labels = (torch.tensor(part) for part in split[2:])
    torch.manual_seed(seed)
    model = convert(MLP(64, classes=10, hidden=(128, 64)))
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, foreach=False)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(train)).split(BATCH):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(train[rows].to(dtype)).float(), train_labels[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        outputs = model(test.to(dtype)).float()
    loss = nn.functional.cross_entropy(outputs, test_labels).item()
    return loss, (outputs.argmax(1) == test_labels).float().mean().item()


def step_seconds(kinds: dict[str, Callable[[nn.Module], nn.Module]]) -> dict[str, float]:
    steps = {name: training_step(convert) for name, convert in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(TURNS):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: median(found[2:]) for name, found in times.items()}


def training_step(convert: Callable[[nn.Module], nn.Module]) -> Callable[[], None]:
    model = convert(nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)))
    inputs = torch.randn(ROWS, WIDTH, dtype=next(model.parameters()).dtype, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0, foreach=False)

    def step() -> None:
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()

    return step


class NearestWeight(Int8Weight):
    """What int8 weights would be without stochastic rounding."""

    def _write(self, values: Tensor) -> None:
        self.copy_(Int8Weight.of(values, draws=self.draws))


def rounded_to_nearest(model: nn.Module) -> nn.Module:
    for layer in int8_weights(model, layers=".").modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight
            parts = (getattr(weight, part) for part in ("codes", "scale", "low", "draws"))
            layer.weight = nn.Parameter(NearestWeight.from_parts(parts, weight.dtype))
    return model


def torchao_int8(model: nn.Module) -> nn.Module:
    from torchao.prototype.quantized_training import int8_weight_only_quantized_training
    from torchao.quantization import quantize_

    quantize_(model, int8_weight_only_quantized_training())
    return model


if __name__ == "__main__":
    main()
