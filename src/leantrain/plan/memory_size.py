"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from leantrain.errors import UsageError

UNITS = {
    "B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
}  # fmt: skip


def memory_size(text: str) -> int:
    """Bytes: `24GB` is 24e9, `24GiB` is 24 * 2^30. Units are written exactly so; parts are allowed (`1.5GB`).

    Raises:
        UsageError: no number, no unit known here, or nothing at all.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([A-Za-z]+)", text)
    size = round(float(found[1]) * UNITS[found[2]]) if found and found[2] in UNITS else 0
    if size < 1:
        raise UsageError(
            f"memory must be a number above 0 and a unit, such as 24GB or 22.5GiB, got {text!r} "
            f"(allowed units: {', '.join(UNITS)})"
        )
    return size
