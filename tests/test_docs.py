"""The documentation is true: its code runs, its commands exist, its tables are those of the last measurement."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
import textwrap
from pathlib import Path

import pytest
import torch

import leantrain
from docs import generate
from leantrain.registry import METHODS

ROOT = Path(__file__).parent.parent
HANDWRITTEN = [file for file in generate.pages() if file != ROOT / "docs" / "index.md"] + [ROOT / "CONTRIBUTING.md"]
each_page = pytest.mark.parametrize("page", HANDWRITTEN, ids=lambda page: page.relative_to(ROOT).as_posix())


TOO_LONG = "<!-- takes minutes: only compiled -->"
"""On the line before a code block whose work is too much for a test; its imports are still carried out."""


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in these languages."""
    text = page.read_text(encoding="utf-8").replace(f"{TOO_LONG}\n```python\n", f"```python\n{TOO_LONG}\n")
    found = re.findall(r"^( *)```([\w-]+)[^\n]*\n(.*?)^\1```", text, re.DOTALL | re.MULTILINE)
    return [textwrap.dedent(code) for _, language, code in found if language in languages]


def tree_of(code: str) -> ast.Module:
    """The block's program, or only its imports where the page says that the rest takes too long."""
    tree = ast.parse(code.removeprefix(f"{TOO_LONG}\n"))
    if code.startswith(TOO_LONG):
        tree.body = [statement for statement in tree.body if isinstance(statement, ast.Import | ast.ImportFrom)]
    return tree


WITH_CODE = [page for page in HANDWRITTEN if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for number, code in enumerate(blocks(page, "python"), start=1):
        exec(compile(tree_of(code), f"{page.name}, code block {number}", "exec"), names)


def modules() -> list[str]:
    """Every module of the package except the ones that are commands."""
    found = pkgutil.walk_packages(leantrain.__path__, "leantrain.")
    return [module.name for module in found if not module.name.endswith("__main__")]


@pytest.mark.parametrize("name", modules())
def test_the_examples_in_docstrings_are_true(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as missing:
        assert not (missing.name or "").startswith("leantrain")
        pytest.skip(f"needs {missing.name}")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


def public_symbols() -> list[tuple[str, str]]:
    rooms = [module.name for module in pkgutil.iter_modules(leantrain.__path__, "leantrain.") if module.ispkg]
    packages = ["leantrain", *rooms]
    return [(room, symbol) for room in packages for symbol in getattr(importlib.import_module(room), "__all__", ())]


@pytest.mark.parametrize(("room", "symbol"), public_symbols())
def test_a_public_name_exists_and_says_what_it_is(room: str, symbol: str):
    found = getattr(importlib.import_module(room), symbol)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return  # constants and type aliases cannot carry a docstring
    text = found.__doc__ or ""  # not inspect.getdoc, which would take the parent's
    made_by_dataclass = text.startswith(f"{symbol}(")
    assert text.strip() and not made_by_dataclass, f"{room}.{symbol} has no docstring of its own"


@pytest.mark.parametrize("page", generate.pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_generated_parts_are_up_to_date(page: Path):
    assert page.read_text(encoding="utf-8") == generate.filled(page), "run `make generated`"


@each_page
def test_every_promised_figure_has_been_measured(page: Path):
    missing = re.findall(rf"<!-- begin:(.+?) -->\n{re.escape(generate.NOT_MEASURED)}", page.read_text("utf-8"))
    assert not missing, f"run the benchmarks of {', '.join(missing)}"


@each_page
def test_links_to_files_lead_somewhere(page: Path):
    targets = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@each_page
def test_the_commands_of_a_page_exist(page: Path):
    lines = [line.strip() for code in blocks(page, "bash", "console", "sh") for line in code.splitlines()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for words in (line.removeprefix("$ ").partition("#")[0].split() for line in lines):
        match words:
            case ["make", *targets]:
                missing = [t for t in targets if "=" not in t and not re.search(rf"^{t}:", makefile, re.MULTILINE)]
                assert not missing, f"the Makefile has no {missing}"
            case ["leantrain", command, *rest] if not command.startswith("-"):
                assert command in ("train", "compare", "plan", "report", "methods", "env"), " ".join(words)
                recipes = [word for word in rest if word.startswith("recipes/")]
                assert all((ROOT / recipe).is_file() for recipe in recipes), " ".join(words)
            case ["python", "-m", module, *_] if module.startswith(("benchmarks.", "docs.")):
                assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), " ".join(words)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_card_gives_costs_verdict_limits_figures_and_source(method):
    text = (ROOT / "docs" / method.card).read_text(encoding="utf-8")
    for part in (
        "**Saves**",
        "**Costs**",
        "\n> ",
        "```python",
        "<!-- begin:result ",
        "When not to use it",
        "## Reference",
    ):
        assert part in text, f"{method.card} has no {part.strip()}"


def test_a_page_with_an_unknown_or_unfinished_part_is_refused(tmp_path: Path):
    page = tmp_path / "page.md"
    for text in ("<!-- begin:figures -->\n<!-- end:figures -->", "<!-- begin:methods -->\nno end"):
        page.write_text(text)
        with pytest.raises(ValueError, match=r"page\.md"):
            generate.filled(page)
