"""Every method of the registry is what it says it is, and has its test, benchmark and card."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path

import pytest

from leantrain.registry import METHODS, Method

each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


def stem(method: Method) -> str:
    """The name that a method's module, test, benchmark and card share."""
    return method.class_path.split(".")[-2]


def test_no_two_methods_share_a_name_or_a_class():
    for field in ("name", "class_path"):
        values = [getattr(method, field).lower() for method in METHODS]
        assert len(values) == len(set(values))


@each_method
def test_the_class_path_leads_to_what_its_room_offers(method: Method):
    package, room, *_, name = method.class_path.split(".")
    found = getattr(import_module(method.class_path.rpartition(".")[0]), name)
    assert inspect.isclass(found) or inspect.isfunction(found)
    assert (package, room, name) == ("leantrain", method.room, method.name)
    assert getattr(import_module(f"leantrain.{room}"), name) is found


@each_method
def test_the_summary_is_one_sentence_and_the_source_has_a_year(method: Method):
    assert method.summary.endswith(".") and "\n" not in method.summary and len(method.summary) <= 120
    assert any(word.isdigit() and len(word) == 4 for word in method.source.replace(",", " ").split())


@each_method
def test_a_method_has_its_test_its_benchmark_and_its_card(method: Method, repository: Path):
    _, room, *parts, _, _ = method.class_path.split(".")
    assert repository.joinpath("tests", room, *parts, f"test_{stem(method)}.py").is_file()
    of_its_own = list((repository / "benchmarks" / method.room).glob(f"{stem(method)}*.py"))
    assert of_its_own or method.name in (repository / "benchmarks" / "optim" / "peers.py").read_text(encoding="utf-8")
    assert (repository / "docs" / method.card).is_file()


@each_method
def test_the_module_of_a_method_says_what_it_saves_and_where_it_is_from(method: Method):
    text = import_module(method.class_path.rpartition(".")[0]).__doc__ or ""
    first_author = method.source.split()[0]
    assert first_author in text, f"{stem(method)}.py does not name {first_author}"
