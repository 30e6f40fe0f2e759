"""Who may import whom: cli -> compare -> train -> recipe -> rooms, and no room another."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "src" / "leantrain"
ROOMS = {"data", "nn", "learn", "exchange", "optim", "ledger", "solve", "compress", "generate", "analysis", "testing"}
LAYERS = (
    {"__main__"},
    {"cli"},
    {"compare", "plan"},
    {"tuning", "isolate", "display", "report"},
    {"results"},
    {"paired"},
    {"train"},
    {"combinations"},
    {"checkpoint", "evaluation", "journal", "progress"},
    {"own_state"},
    {"finite", "snapshot", "trackers"},
    {"recipe"},
    {"hosts"},
    ROOMS,
    {"cutting"},
    {"balance"},
    {"processes", "integers", "layers", "histogram", "modes", "outputs"},
    {"roll_call", "meeting"},
    {"lifeline"},
)
"""From the top down: each imports only what stands below it."""

FOR_ALL = {"", "errors", "atomic", "registry", "ledger.record"}
"""Free of torch and of the rest of leantrain, so that anything may import them. "" is the package's version."""

ROOM_MAY_IMPORT = {("testing", "optim"), ("compress", "nn")}


def part_of(module: str) -> str:
    """leantrain.optim.galore -> optim: the room or root file that a module belongs to."""
    return module.partition(".")[2].partition(".")[0]


def imported_by(file: Path) -> Iterator[str]:
    """Full names of the modules of ours that a file imports, wherever in it: `from a import b` may mean a or a.b."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] == "leantrain")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno} imports relatively: write leantrain. in full"
            for name in node.names if (node.module or "").split(".")[0] == "leantrain" else ():
                inner = f"{node.module}.{name.name}"
                folder = PACKAGE.parent / inner.replace(".", "/")
                yield inner if folder.is_dir() or folder.with_suffix(".py").is_file() else str(node.module)


def level(part: str) -> int:
    found = [number for number, layer in enumerate(LAYERS) if part in layer]
    assert found, f"src/leantrain/{part} stands in no layer: give it its place in {Path(__file__).name}"
    return found[0]


def allowed(importer: str, imported: str) -> bool:
    """Whether module `importer` may import module `imported`, both in full."""
    if imported.partition(".")[2] in FOR_ALL:
        return True
    here, there = part_of(importer), part_of(imported)
    if importer.partition(".")[2] in FOR_ALL:
        return not here and there == "ledger"  # the package offers Ledger, lazily
    return here == there or (here, there) in ROOM_MAY_IMPORT or level(there) > level(here)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_a_module_imports_only_what_stands_below_it(file: Path):
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    forbidden = [target for target in imported_by(file) if not allowed(name, target)]
    assert not forbidden, f"{name} may not import {', '.join(forbidden)}"


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("leantrain.optim.galore", "leantrain.nn.llama"),
        ("leantrain.optim.galore", "leantrain.ledger.memory"),
        ("leantrain.data", "leantrain.train"),
        ("leantrain.train", "leantrain.compare"),
        ("leantrain.nn.llama", "leantrain.testing"),
        ("leantrain.errors", "leantrain.atomic.x"),
        ("leantrain.ledger.record", "leantrain.ledger.clock"),
    ],
)
def test_the_rule_forbids_what_it_should(importer: str, imported: str):
    assert not allowed(importer, imported)


@pytest.mark.parametrize(
    "module", ["leantrain", "leantrain.cli", *(f"leantrain.{name}" for name in sorted(FOR_ALL - {""}))]
)
def test_importing_it_does_not_wait_for_torch(module: str):
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0
