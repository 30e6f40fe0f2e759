"""Help and the page about recipes say what the code says, and every recipe shown or shipped can be read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from leantrain.errors import UsageError
from leantrain.recipe import Comparison, Recipe, comparison_from_dict, read_comparison, recipe_from_dict
from leantrain.recipe.describe import class_help, flag_roots, recipe_help, rows
from leantrain.recipe.merge import normalised, with_overrides
from leantrain.recipe.schema import field_names
from leantrain.recipe.yaml import load_text

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "recipes.md").read_text(encoding="utf-8")
BLOCKS = [load_text(text, "recipes.md") for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)]


@pytest.mark.parametrize("described", [Recipe, Comparison])
def test_the_page_has_every_key_with_its_meaning(described: type) -> None:
    for name, kind, meaning in rows(described):
        if name != "allow":
            assert f"| `{name}` | {kind} | {' '.join(meaning.split())} |" in PAGE


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: next(iter(block)))
def test_every_recipe_on_the_page_can_be_read(block: dict[str, Any]) -> None:
    if "runs" in block:
        comparison_from_dict({"name": "page", **block})
        return
    if "transformers" in str(block):
        pytest.importorskip("transformers")
    recipe_from_dict(with_overrides(normalised({"name": "page", **BLOCKS[0]}), block))


PEERS = ["bitsandbytes", "torchao", "galore_torch", "pytorch_optimizer", "apollo_torch"]


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_we_ship_can_be_read(path: Path) -> None:
    allow = PEERS if path.stem == "peers" else []
    for package in allow:
        pytest.importorskip(package)
    assert read_comparison(path, allow=allow).name == path.stem


def test_help_has_every_key_and_no_line_too_long() -> None:
    lines = recipe_help(width=90).splitlines()
    assert max(map(len, lines)) <= 100
    assert [name for name in field_names() if not any(line.startswith(f"  --{name} ") for line in lines)] == []


def test_help_on_a_class_says_type_default_and_meaning() -> None:
    text = " ".join(class_help("optim", "leantrain.optim.GaLoreAdamW").split())
    assert "--optim.refresh steps between two computations of a matrix's basis" in text
    assert "(a whole number; default: 200)" in text
    text = " ".join(class_help("model", "torch.nn.Linear").split())
    assert "(a whole number; required)" in text
    text = " ".join(class_help("model", "torch.nn.TransformerEncoder").split())
    assert re.search(r"--model\.encoder_layer .*?\(a Python object, not from a recipe; required\)", text)


def test_help_on_a_class_asks_for_leave_too() -> None:
    with pytest.raises(UsageError, match="--allow stranger"):
        class_help("optim", "stranger.Adam")
    with pytest.raises(UsageError, match="optm is not a key that names a class; did you mean 'optim'"):
        class_help("optm", "torch.optim.SGD")


def test_a_comparison_takes_its_own_keys_and_those_of_its_base_as_flags() -> None:
    assert set(flag_roots("compare")) - set(flag_roots("train")) == {
        "baseline", "tune", "tune_steps", "tune_seed", "seeds", "budget", "budget_value",
    }  # fmt: skip
