"""Train deep networks on less, and see what was saved and what it cost."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"
__all__ = ["Ledger", "__version__"]

if TYPE_CHECKING:
    from leantrain.ledger.ledger import Ledger


def __getattr__(name: str) -> object:
    # Lazy, so that `leantrain --help` and `import leantrain` do not wait for torch.
    if name == "Ledger":
        return import_module("leantrain.ledger.ledger").Ledger
    raise AttributeError(f"module 'leantrain' has no attribute {name!r}")
