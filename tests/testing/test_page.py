"""The page about the checks says what the code does, and its code runs."""

from __future__ import annotations

import re

from leantrain.testing import OPTIMIZER_CHECKS, OptimizerCase


def test_the_page_lists_every_check_with_its_first_sentence(repository):
    page = (repository / "docs" / "testing.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", page, flags=re.MULTILINE))
    for name, check in OPTIMIZER_CHECKS.items():
        first_paragraph = " ".join((check.__doc__ or "").split("\n\n")[0].split())
        assert rows.get(name) == first_paragraph


def test_the_page_names_every_field_of_a_case(repository):
    page = (repository / "docs" / "testing.md").read_text(encoding="utf-8")
    fields = OptimizerCase.__dataclass_fields__
    assert not [name for name in fields if f"`{name}`" not in page and f"{name}=" not in page]


def test_the_code_on_the_page_runs(repository, capsys):
    page = (repository / "docs" / "testing.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(block, "docs/testing.md", "exec"), names)
    assert "SGD: 0 checks failed" in capsys.readouterr().out
    assert "test_optimizer" in names
