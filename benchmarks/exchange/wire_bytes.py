"""Bytes on the wire per weight that an exchange covers, by the kernel's count, fixed costs apart.

    python -m benchmarks.exchange.wire_bytes

Four hosts train two LLaMAs in which only matrices are trained, one with four times the layers of the other. What a host
sends more for the larger one, divided by the weights that it has more, is what a weight costs: what every step or every
message costs (agreeing, headers of packets, gloo's own messages) is in both and drops out. Beside it the same of what
the exchange says it sent, and 2 (W - 1) / W 4 = 6 bytes for Dense.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.exchange.break_even import CASES, DENSE, HOSTS, MODEL, Measured, measure, parameters, prepare
from benchmarks.netlab import Lab, Unavailable
from benchmarks.result import write_result

import torch  # isort: skip  # after netlab, which quietens it

from leantrain.nn import Llama
from leantrain.recipe import Component

NAMES = (
    DENSE, "bf16 hook", "PowerSGD, rank 4", "MajorityVote, sharded", "MajorityVote, gather", "DGC, 0.1 %",
    "DGC, 0.1 %, gaps", "EntropyCoded, every 8",
)  # fmt: skip
LAYERS, STEPS = (7, 28), 8


class MatricesOnly(Llama):
    """A LLaMA whose norms stay as they are."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        for param in self.parameters():
            param.requires_grad_(param.dim() > 1)


def main() -> None:
    prepare()
    models = [
        Component("benchmarks.exchange.wire_bytes.MatricesOnly", {**MODEL.init_args, "layers": layers})
        for layers in LAYERS
    ]
    more = parameters(models[1]) - parameters(models[0])
    costs = {}
    for name in NAMES:
        small, large = (_measure(name, model) for model in models)
        costs[name] = ((large.payload - small.payload) / more, (large.said - small.said) / more)
        print(name, small, large, file=sys.stderr, flush=True)
    dense = costs[DENSE][0]
    write_result(
        "exchange/wire_bytes",
        title=f"Bytes that each of {HOSTS} hosts sends per step and weight, by the kernel",
        columns=["exchange", "bytes per weight, kernel", "said", "kernel / said", "x fewer than Dense"],
        rows=[
            [name, f"{kernel:.4f}", f"{said:.4f}", f"{kernel / said:.4f}", f"{dense / kernel:.1f}"]
            for name, (kernel, said) in costs.items()
        ],
        notes=[
            f"The difference between LLaMAs of {LAYERS[0]} and {LAYERS[1]} layers, {more / 1e6:.2f} M weights, all in "
            f"matrices; mean over hosts and {STEPS} steps, headers of the network's packets apart, those of our own "
            "included. Where only every 8th step exchanges, the mean over a period."
        ],
    )


def _measure(name: str, model: Component) -> Measured:
    with Lab(HOSTS) as lab:
        return measure(CASES[name], lab, STEPS, model)


if __name__ == "__main__":
    torch.set_num_threads(1)
    try:
        main()
    except Unavailable as reason:
        print(f"skipped: {reason}", file=sys.stderr)
