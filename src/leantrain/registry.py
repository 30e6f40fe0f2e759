"""Every method in one table: what `leantrain methods`, the docs and the conformance tests read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row: the name users search for, its room, where its class or function is, and what it does in one line."""

    name: str
    room: str
    class_path: str
    summary: str
    source: str
    """Authors and year, or the project it is taken from."""

    @property
    def card(self) -> str:
        """The method's page, relative to the docs folder."""
        return f"methods/{self.class_path.split('.')[-2]}.md"


METHODS: tuple[Method, ...] = (
    Method("AdamW", "optim", "leantrain.optim.adamw.AdamW",
           "PyTorch's AdamW step with its fused kernel: the baseline everything is measured against.",
           "Loshchilov & Hutter 2019"),
    Method("AdamW8bit", "optim", "leantrain.optim.adamw_low_bit.AdamW8bit",
           "AdamW with its averages stored in 8 bits: a quarter of the optimizer memory.",
           "Dettmers et al. 2022"),
    Method("AdamW4bit", "optim", "leantrain.optim.adamw_low_bit.AdamW4bit",
           "AdamW with its averages stored in 4 bits: an eighth of the optimizer memory.",
           "Li, Chen & Zhu 2023"),
    Method("GaLoreAdamW", "optim", "leantrain.optim.galore.GaLoreAdamW",
           "AdamW whose moments live in a few directions of each gradient matrix: less optimizer memory.",
           "Zhao et al. 2024"),
    Method("GaLoreAdafactor", "optim", "leantrain.optim.galore_adafactor.GaLoreAdafactor",
           "Adafactor in a few directions of each gradient matrix: the second average shrinks to two vectors.",
           "Zhao et al. 2024"),
    Method("QGaLoreAdamW", "optim", "leantrain.optim.q_galore.QGaLoreAdamW",
           "GaLore with 4-bit bases, 8-bit averages and fewer refreshes where subspaces have settled.",
           "Zhang et al. 2024"),
    Method("DCTAdamW", "optim", "leantrain.optim.dct_adamw.DCTAdamW",
           "AdamW in columns of the cosine transform that are chosen anew at every step; no decomposition.",
           "Modoranu et al. 2025"),
    Method("APOLLO", "optim", "leantrain.optim.apollo.APOLLO",
           "Gradients scaled per channel by what Adam would do in a few random directions; nothing else is kept.",
           "Zhu et al. 2025"),
    Method("APOLLOMini", "optim", "leantrain.optim.apollo.APOLLOMini",
           "APOLLO with one random direction and one scale per matrix: next to no optimizer memory.",
           "Zhu et al. 2025"),
    Method("step_in_backward", "optim", "leantrain.optim.in_backward.step_in_backward",
           "Updates each parameter during the backward pass and frees its gradient, with accumulation and clipping.",
           "Lv et al. 2024; Zhao et al. 2024"),
    Method("Projected", "exchange", "leantrain.exchange.projected.Projected",
           "DDP that sends only the projected gradients of matrices that a low-rank optimizer projects.",
           "Zhao et al. 2024"),
    Method("int8_weights", "nn", "leantrain.nn.int8.int8_weights",
           "Weights stored in 8 bits and updated with stochastic rounding: a quarter of the weight memory.",
           "Zhang et al. 2024"),
    Method("welore", "compress", "leantrain.compress.welore.welore",
           "A trained model with low-rank factors in place of the matrices that bear it, and tuning of those alone.",
           "Jaiswal et al. 2024"),
)  # fmt: skip
