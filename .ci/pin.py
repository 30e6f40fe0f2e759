"""Print the packages installed beside this interpreter as pip constraints: what `make constraints` writes.

A package whose pinned version needs a newer Python than ours is pinned only there: pip is free to choose an older one
for the rest. PyTorch's local suffix (+cpu, +cu130) is left out, so that the pin holds for every build of it.
"""

from __future__ import annotations

import re
from importlib.metadata import Distribution, distributions

OURS = (3, 10)
UNPINNED = {"leantrain", "pip", "setuptools", "wheel"}


def pin(package: Distribution) -> str:
    """One line, such as `numpy==2.4.6; python_version >= "3.11"`."""
    name, version = package.metadata["Name"], package.version.split("+")[0]
    lowest = re.search(r">=\s*3\.(\d+)", package.metadata.get("Requires-Python") or "")
    newer = lowest is not None and (3, int(lowest[1])) > OURS
    return f"{name}=={version}" + (f'; python_version >= "3.{lowest[1]}"' if newer and lowest else "")


if __name__ == "__main__":
    print("# The set of packages the project is tested with; written by `make constraints`, used by every make target.")
    found = {package.metadata["Name"].lower().replace("_", "-"): package for package in distributions()}
    print(*(pin(found[name]) for name in sorted(found.keys() - UNPINNED)), sep="\n")
