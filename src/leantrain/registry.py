"""Every method in one table: what `leantrain methods`, the docs and the conformance tests read."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """One row: the name users search for, its room, where its class is, and what it does in one line."""

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
    Method("GaLoreAdamW", "optim", "leantrain.optim.galore.GaLoreAdamW",
           "AdamW whose moments live in a few directions of each gradient matrix: less optimizer memory.",
           "Zhao et al. 2024"),
)  # fmt: skip
