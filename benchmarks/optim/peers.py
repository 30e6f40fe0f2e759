"""Ours beside galore-torch, apollo-torch, bitsandbytes, torchao and pytorch_optimizer: step time, state, loss.

    python -m benchmarks.optim.peers            all of it: three quarters of an hour
    python -m benchmarks.optim.peers times      the step times alone

Step time and state: one optimizer step on four GPT-2-small blocks (28.3 M weights), one thread, taking turns, as in
`benchmarks.optim.galore_step`. Loss: recipes/peers.yaml, every run tuned over three learning rates, three seeds.
"""

from __future__ import annotations

import statistics
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.optim.galore_step import RANK, REFRESH, seconds, weights
from benchmarks.result import write_result
from leantrain.compare import compare
from leantrain.optim import (
    APOLLO,
    AdamW,
    AdamW4bit,
    AdamW8bit,
    APOLLOMini,
    DCTAdamW,
    GaLoreAdafactor,
    GaLoreAdamW,
    QGaLoreAdamW,
    state_bytes,
)
from leantrain.recipe import read_comparison

ROOT = Path(__file__).parent.parent.parent
PEERS = ("bitsandbytes", "torchao", "galore_torch", "pytorch_optimizer", "apollo_torch")
TURNS = 9

Params = list[nn.Parameter]


def main() -> None:
    times()
    if "times" not in sys.argv[1:]:
        losses()


def optimizers() -> dict[str, Callable[[Params], torch.optim.Optimizer]]:
    """Every optimizer by the name of its run in the recipe."""
    import apollo_torch
    import bitsandbytes
    import galore_torch
    import pytorch_optimizer
    import torchao.optim

    low = {"rank": RANK, "update_proj_gap": REFRESH, "scale": 0.25}
    galore: dict[str, Any] = {"rank": RANK, "refresh": REFRESH, "basis": "subspace"}
    return {
        "torch AdamW, fused": lambda p: torch.optim.AdamW(p, weight_decay=0.0, fused=True),
        "adamw": AdamW,
        "adamw8bit": AdamW8bit,
        "adamw4bit": AdamW4bit,
        "bitsandbytes-adamw8bit": lambda p: bitsandbytes.optim.AdamW8bit(p, weight_decay=0.0),
        "torchao-adamw8bit": lambda p: torchao.optim.AdamW8bit(p, weight_decay=0.0),
        "galore": lambda p: GaLoreAdamW(p, **galore),
        "galore-8bit": lambda p: GaLoreAdamW(p, state_bits=8, **galore),
        "q-galore": lambda p: QGaLoreAdamW(p, **galore),
        "galore-adafactor": lambda p: GaLoreAdafactor(p, **galore),
        "galore-torch": lambda p: galore_torch.GaLoreAdamW(
            [{"params": p, "proj_type": "std", **low}], no_deprecation_warning=True
        ),
        "pytorch-optimizer-galore": lambda p: pytorch_optimizer.GaLore(
            [{"params": p, "projection_type": "std", **low}]
        ),
        "dct-adamw": lambda p: DCTAdamW(p, rank=RANK),
        "apollo": lambda p: APOLLO(p, rank=RANK, refresh=REFRESH),
        "apollo-mini": lambda p: APOLLOMini(p, rank=1, refresh=REFRESH),
        "apollo-torch": lambda p: apollo_torch.APOLLOAdamW(
            [{"params": p, "proj": "random", "scale_type": "channel", "proj_type": "std", **low, "scale": 1.0}]
        ),
    }


def times() -> None:
    """Time ordinary steps, all optimizers in turns; the first step, with all bases, apart."""
    torch.set_num_threads(1)
    made = {name: make(weights()) for name, make in optimizers().items()}
    first = {name: seconds(optimizer.step) for name, optimizer in made.items()}
    found: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(TURNS):
        for name, optimizer in made.items():
            found[name].append(seconds(optimizer.step))
    base = statistics.median(found["torch AdamW, fused"])
    numbers = sum(p.numel() for p in made["adamw"].param_groups[0]["params"])
    write_result(
        "optim/peers_step",
        title=f"One optimizer step on {numbers / 1e6:.1f} M weights, rank {RANK}, one thread",
        columns=["optimizer", "ms", "x fused AdamW", "first step / median", "state, bytes per weight"],
        rows=[
            [
                name,
                f"{1e3 * statistics.median(seen):.0f}",
                f"{statistics.median(seen) / base:.2f}",
                f"{first[name] / statistics.median(seen):.1f}",
                f"{state_bytes(made[name]) / numbers:.2f}",
            ]
            for name, seen in found.items()
        ],
        notes=[
            f"Median of {TURNS} ordinary steps in turns; all state in float32 unless the name says otherwise. The "
            "first step computes all bases, or compiles (torchao)."
        ],
    )


def losses() -> None:
    """Train with each and keep the validation losses."""
    warnings.filterwarnings("ignore")
    comparison = read_comparison(ROOT / "recipes" / "peers.yaml", [], list(PEERS))
    results = compare(comparison, ROOT / "runs" / "peers", on_event=tell)
    if results["status"] != "finished":
        raise SystemExit(f"peers ended as {results['status']}: nothing is recorded")
    runs, one = results["runs"], results["runs"]["adamw"]["results"][0]
    base = runs["adamw"]["summary"]["val_loss"]["mean"]
    write_result(
        "optim/peers",
        title=f"Loss at equal tokens: Llama of {one['parameters'] / 1e6:.2f} M parameters, {one['steps']} steps, "
        f"{one['tokens'] / 1e6:.1f} M bytes",
        columns=["run", "lr", "validation loss", "against AdamW", "p", "optimizer kB"],
        rows=[row(name, run, results["tune"][name]["best"], base) for name, run in runs.items()],
        notes=notes(runs, results["seeds"]),
    )


def row(name: str, run: dict[str, Any], lr: float, base: float) -> list[str]:
    loss, against = run["summary"]["val_loss"], run["versus_baseline"].get("val_loss")
    return [
        name,
        f"{lr:g}",
        f"{loss['mean']:.3f} ± {loss['std']:.3f}",
        f"{loss['mean'] - base:+.3f}" if against else "",
        f"{against['p_value']:.3f}" if against else "",
        f"{run['summary']['optimizer_state_bytes']['mean'] / 1e3:.0f}",
    ]


def notes(runs: dict[str, Any], seeds: Iterable[int]) -> list[str]:
    return [
        f"Mean ± standard deviation over seeds {', '.join(map(str, seeds))}; learning rates chosen from three values "
        "for each run on another seed. Rank is a quarter of the hidden size. Embedding, head and norms have the same "
        "AdamW in all runs and are in the bytes. p: paired t-test on the validation loss.",
        *(f"{name}: {note}." for name, run in runs.items() for note in run["notes"]),
    ]


def tell(event: dict[str, Any]) -> None:
    if event["kind"] == "end":
        print(event["name"], event["status"], event.get("final"), flush=True)


if __name__ == "__main__":
    main()
