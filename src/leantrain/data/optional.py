"""Packages that only some data sets need, imported when one is asked for."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from leantrain.errors import UsageError


def need(module: str, package: str, wanted: str) -> Any:
    """The module, imported now.

    Args:
        module: what is imported, for instance `PIL.Image`.
        package: what to install to have it, for instance `pillow`.
        wanted: what the user asked for, to begin the message with.

    Raises:
        UsageError: it is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UsageError(f"{wanted} needs the package {package!r}: pip install {package} ({error})") from error
