"""Two hosts train the default recipe with every exchange, by the torchrun line of the README, over 100 Mbit/s.

    python -m benchmarks.exchange.two_hosts         four minutes, as root

Hosts are network namespaces of this machine (`benchmarks.netlab`). Every run is a command as a user types it, on both
hosts, to its end; what it says of itself in result.json stands in the table.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.netlab import Lab, Unavailable
from benchmarks.result import write_result

RATE, STEPS = "100mbit", 40
COMMON = (
    "--steps", str(STEPS), "--batch_size", "16", "--eval_batches", "2", "--ledger", "true", "--trackers", "[]",
    "--device", "cpu", "--quiet",
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """An exchange as flags, and the optimizer that goes with it."""

    exchange: tuple[str, ...]
    optim: tuple[str, ...] = ()


def _sgd(rate: float) -> tuple[str, ...]:
    return ("--optim", "torch.optim.SGD", "--optim.lr", str(rate))


GALORE = ("--optim", "GaLoreAdamW", "--optim.lr", "0.01", "--optim.rank", "32")
WAYS = (
    Way(("Dense",)),
    Way(("HalfPrecision",)),
    Way(("PowerSGD", "--exchange.rank", "4")),
    Way(("Projected",), GALORE),
    Way(("MajorityVote",), _sgd(0.002)),
    Way(("DeepGradientCompression", "--exchange.warmup_steps", "20"), _sgd(0.1)),
    Way(("EntropyCoded",)),
    Way(("LocalSGD",)),
    Way(("DiLoCo", "--exchange.every", "20")),
    Way(("GradientCoding",)),
    Way(("MoNNA", "--exchange.byzantine", "0", "--exchange.momentum", "0.9"), _sgd(1.0)),
    Way(("FullyShard",)),
)


def main() -> None:
    rows = []
    for way in WAYS:
        with TemporaryDirectory() as folder, Lab(2, RATE) as lab:
            out = Path(folder) / "run"
            flags = ("--exchange", *way.exchange, *way.optim, *COMMON, "--out", str(out))
            lab.torchrun("-m", "leantrain", "train", *flags)
            result = json.loads((out / "result.json").read_text(encoding="utf-8"))
        first, last = result["curve"]["train"][0][-1], result["final"]["val_loss"]
        step_ms = 1e3 * result["ledger"]["step_seconds"]["median"]
        rows.append([
            " ".join(way.exchange), way.optim[1] if way.optim else "the recipe's", result["status"],
            str(result["steps"]), f"{first:.2f}", f"{last:.2f}",
            f"{result['ledger']['bytes_sent'] / result['steps'] / 1e3:.1f}", f"{step_ms:.0f}",
        ])  # fmt: skip
        print(rows[-1], file=sys.stderr, flush=True)
    write_result(
        "exchange/two_hosts",
        title=f"The default recipe on two hosts at {RATE[:-4]} Mbit/s, {STEPS} steps",
        columns=[
            "--exchange",
            "--optim",
            "ended",
            "steps",
            "first held-out loss",
            "last",
            "kB per step",
            "ms per step",
        ],
        rows=rows,
        notes=["Learning rates not tuned, and too few steps for anything but seeing that every one of them trains."],
    )


if __name__ == "__main__":
    try:
        main()
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
