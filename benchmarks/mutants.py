"""How many deliberate mistakes in the optimizers the tests notice.

mutmut changes src/leantrain/optim one small thing at a time (a sign, a constant, an argument, a condition) and runs the
tests of tests/optim that reach the changed function. What to change and what to run stands in pyproject.toml.

    make mutants                            # or: python -m benchmarks.mutants
    mutmut results; mutmut show MUTANT      # the mistakes that nobody noticed
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from benchmarks.result import write_result

SURVIVED = 0
NO_TEST = 33


def main() -> None:
    shutil.rmtree("mutants", ignore_errors=True)  # verdicts of earlier tests must not count
    subprocess.run([sys.executable, "-m", "mutmut", "run", "--max-children", "2"], check=True)
    rows = []
    total: Counter[str] = Counter()
    for file in sorted(Path("mutants/src/leantrain/optim").glob("*.meta")):
        found = count(json.loads(file.read_text(encoding="utf-8"))["exit_code_by_key"])
        if found["all"]:
            rows.append(as_row(file.name.removesuffix(".meta"), found))
            total += found
    if not total["all"]:
        sys.exit("mutmut made no mutants: see its output above")
    write_result(
        "mutants",
        title="Deliberate mistakes in src/leantrain/optim noticed by tests/optim",
        columns=["module", "mutants", "noticed", "not noticed", "noticed %"],
        rows=[*rows, as_row("all", total)],
        notes=["Functions under a decorator other than `staticmethod` and `classmethod` are not mutated."],
    )


def count(exit_codes: dict[str, int | None]) -> Counter[str]:
    """Mutants by what became of them. A test that fails, crashes or hangs has noticed; one that is missing has not."""
    if None in exit_codes.values():
        sys.exit("the run was cut short: nothing is recorded")
    missed = sum(code in (SURVIVED, NO_TEST) for code in exit_codes.values())
    return Counter({"all": len(exit_codes), "missed": missed})


def as_row(name: str, found: Counter[str]) -> list[str | int]:
    noticed = found["all"] - found["missed"]
    return [name, found["all"], noticed, found["missed"], f"{100 * noticed / found['all']:.1f}"]


if __name__ == "__main__":
    main()
