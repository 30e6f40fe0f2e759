"""A recipe is read from YAML and flags in several forms, comes back as it was written, and is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leantrain.errors import UsageError
from leantrain.recipe import Component, Recipe, read_recipe, recipe_from_dict, recipe_to_dict
from leantrain.recipe.read import flags
from leantrain.recipe.yaml import dump, load_text

DIGITS: dict[str, Any] = {
    "name": "digits",
    "model": "leantrain.nn.MLP",
    "data": {"class": "leantrain.data.Sklearn", "name": "digits"},
    "optim": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
    "steps": 20,
    "batch_size": 32,
}


def write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(*argv: str, allow: tuple[str, ...] = ()) -> str:
    """The message with which the default recipe refuses these flags."""
    with pytest.raises(UsageError) as caught:
        read_recipe(None, list(argv), allow)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "written",
    [
        "optim: {class_path: torch.optim.AdamW, init_args: {lr: 1e-3, betas: [0.9, 0.99]}}",
        "optim: {class_path: torch.optim.AdamW, lr: 1e-3, betas: [0.9, 0.99]}",
        "optim: {class: torch.optim.AdamW, lr: 0.001, init_args: {betas: [0.9, 0.99]}}",
        "optim: torch.optim.AdamW\noptim.lr: 1e-3\noptim.betas: [0.9, 0.99]",
        "optim: torch.optim.AdamW\noptim.init_args.lr: 1e-3\noptim.init_args.betas: [0.9, 0.99]",
    ],
)
def test_every_way_to_write_a_component_means_the_same(tmp_path: Path, written: str) -> None:
    rest = "model: MLP\ndata: {class: Sklearn, name: digits}\nsteps: 3\nbatch_size: 4\n"
    recipe = read_recipe(write(tmp_path, rest + written))
    assert recipe.optim == Component("torch.optim.AdamW", {"lr": 0.001, "betas": [0.9, 0.99]})
    assert recipe.model.class_path == "leantrain.nn.MLP"
    assert recipe.name == "small"


def test_flags_go_before_the_file_and_a_class_goes_before_its_arguments(tmp_path: Path) -> None:
    path = write(tmp_path, dump(DIGITS))
    flags = ["--optim.rank", "8", "--steps=7", "--optim", "GaLoreAdamW"]
    recipe = read_recipe(path, flags)
    assert recipe.steps == 7
    assert recipe.optim == Component("leantrain.optim.GaLoreAdamW", {"rank": 8})


def test_another_class_leaves_no_argument_behind() -> None:
    recipe = read_recipe(None, ["--optim", "torch.optim.SGD"])
    assert recipe.optim.init_args == {}


def test_a_mapping_without_a_class_changes_single_arguments() -> None:
    before, after = read_recipe(None), read_recipe(None, ["--optim", "{lr: 0.5}"])
    assert after.optim == Component(before.optim.class_path, {**before.optim.init_args, "lr": 0.5})


def test_a_recipe_from_yaml_and_json_is_the_recipe_that_was_written() -> None:
    recipe = recipe_from_dict({**DIGITS, "groups": [{"params": "hidden", "lr": 1e-05}], "rest": "torch.optim.SGD",
                               "loss": {"class": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1}})  # fmt: skip
    plain = recipe_to_dict(recipe)
    assert recipe_from_dict(load_text(dump(plain), "here")) == recipe
    assert recipe_from_dict(json.loads(json.dumps(plain))) == recipe


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(plain_values)
@settings(max_examples=200, deadline=None)
def test_yaml_gives_back_any_plain_value_with_its_type(value: Any) -> None:
    back = load_text(dump(value), "here")
    assert back == value
    assert repr(back) == repr(value)  # 1, 1.0 and True are equal


@pytest.mark.parametrize("text", ["1e-3", "1E5", "-2e3", "0x10", "yes", "null", "12", "1.5", "~", "2024-01-01"])
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    assert load_text(dump([text]), "here") == [text]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--stps", "3"], "no key 'stps'; did you mean 'steps'?"),
        (["--steps", "0"], "steps must be a whole number, at least 1, got 0"),
        (["--steps", "1.5"], "steps must be a whole number, got 1.5"),
        (["--steps", "null"], "steps must be a whole number, got null"),
        (["--batch_size", "many"], "batch_size must be a whole number, got 'many'"),
        (["--accumulate", "3"], "accumulate must divide batch_size=16, got accumulate=3"),
        (["--schedule", "cosin"], "schedule must be one of 'cosine', 'linear', 'constant', got 'cosin'"),
        (["--clip", "0"], "clip must be a number above 0"),
        (["--warmup", "1"], "warmup is a part of the steps"),
        (["--warmup", ".nan"], "warmup is a part of the steps"),
        (["--min_lr", "1.5"], "min_lr is a part of the learning rate"),
        (["--compile", "maybe"], "compile must be true or false, got 'maybe'"),
        (["--seed", "-1"], "seed must be a whole number, at least 0"),
        (["--trackers", "[tensorbord]"], "trackers has no choice 'tensorbord'; did you mean 'tensorboard'?"),
        (["--name", "../elsewhere"], "name must be 1 to 100 letters"),
        (["--name", ".hidden"], "name must be 1 to 100 letters"),
        (["--optim.rnk", "4"], "GaLoreAdamW has no argument 'rnk'; did you mean 'rank'?"),
        (["--optim.lr", "high"], "optim.lr must be a number, got 'high'"),
        (["--optim.lr", "-1"], "optim: lr must be"),
        (["--optim.rank", "0"], "optim: rank must be"),
        (["--optim.rank", "2.5"], "optim.rank must be a whole number or null, got 2.5"),
        (["--optim.refresh", "0"], "optim: refresh must be"),
        (["--optim.on_refresh", "kep"], "optim.on_refresh must be one of 'keep', 'rotate', 'reset', got 'kep'"),
        (["--optim.betas", "[0.9]"], "optim.betas must be a list of 2"),
        (["--optim", "torch.optim.SGD", "--optim.lr", "-1"], "SGD(lr=-1.0) is refused: Invalid learning rate: -1.0"),
        (["--optim", "torch.optim.AdmaW"], "torch.optim has no 'AdmaW'; nearest: AdamW"),
        (["--optim", "torch.optm.AdamW"], "torch has no 'optm'; nearest: optim"),
        (["--optim", "torch.nn.Linear"], "optim must be a subclass of torch.optim.Optimizer, got torch.nn.Linear"),
        (["--optim", "torch.optim"], "optim must be a subclass of torch.optim.Optimizer, got torch.optim"),
        (["--model", "torch.optim.SGD"], "model must be a subclass of torch.nn.Module"),
        (["--data", "torch.nn.Linear"], "data must be a class with train_batch and eval_batches"),
        (["--optim", "torch.optim.Optimizer"], "optim: Optimizer needs a value for optim.defaults"),
        (["--optim", "[a, b]"], "optim must name a class"),
        (["--optim", "null"], "optim must name a class, got null"),
        (["--optim", "{class: torch.optim.SGD, class_path: torch.optim.SGD}"], "optim must name one class"),
        (["--optim", "{class: torch.optim.SGD, lr: 1, init_args: {lr: 2}}"], "optim.lr is given twice"),
        (["--rest.lr", "0.1"], "rest is given arguments (lr) but no class"),
        (["--rest", "torch.optim.SGD"], "rest needs groups"),
        (["--loss", "torch.nn.Linear"], "loss must be a subclass of torch.nn.Module, called with outputs and targets"),
        (["--loss", "torch.optim.SGD"], "loss must be a subclass of torch.nn.Module"),
        (["--loss.alpha", "0.1"], "loss is given arguments (alpha) but no class"),
        (["--loss", "leantrain.nn.output_loss.OutputLoss", "--loss.alpha", "-1"], "loss: alpha must be a number above"),
        (["--loss", "torch.nn.CrossEntropyLoss", "--loss.smoothing", "0.1"], "CrossEntropyLoss has no argument"),
        (["--loss", "torch.nn.AdaptiveLogSoftmaxWithLoss", "--loss.in_features", "9", "--loss.n_classes", "9",
          "--loss.cutoffs", "[4]"], "loss cannot have parameters to train"),
        (["--step_in_backward", "true", "--groups", "[{params: hidden}]", "--rest", "AdamW"], "takes one optimizer"),
        (["--groups", "[{rank: 4}]"], "groups[0] must be a mapping with params"),
        (["--groups", "[{params: hidden, rnk: 4}]"], "groups[0]: GaLoreAdamW has no option 'rnk'; did you mean 'rank'"),
        (["--groups", "[{params: hidden, rank: x}]"], "groups[0].rank must be a whole number or null, got 'x'"),
        (["--groups", "[{params: hidden, rank: 0}]"], "rank must be"),
        (["--optim", "torch.optim.SGD", "--groups", "[{params: hidden, lr: -1}]"], "Invalid learning rate"),
        (["--exchange", "FullyShard", "--optim", "APOLLO"], "FullyShard cannot be combined with optimizer APOLLO"),
        (["--exchange", "Projected", "--optim", "torch.optim.SGD"], "Projected cannot be combined with optimizer SGD"),
        (["--learn.task", "next_token"], "Backprop has no argument 'task'"),
        (["--optim.params", "x"], "GaLoreAdamW has no argument 'params'"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "1", "--steps", "2"], "--steps is given twice"),
        (["steps"], "expected --KEY VALUE, got 'steps'"),
        (["--steps", "[1"], "--steps: not understood as YAML"),
    ],
)  # fmt: skip
def test_what_is_not_allowed_is_refused_in_one_line_with_key_and_value(argv: list[str], words: str) -> None:
    assert words in refusal(*argv)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- a list", "must hold a mapping of keys to values, got list"),
        ("", "must hold a mapping"),
        ("steps: 1\nsteps: 2", "the key 'steps' stands twice"),
        ("steps: 3", "missing: model, data, optim, batch_size"),
        ("steps: &s 3\nbatch_size: *s", "an alias (*s) is not allowed"),
        ("steps: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[" * 5000, "nested too deeply"),
        ("3: 4", "no key 3"),
    ],
)
def test_files_that_are_no_recipe_are_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read_recipe(write(tmp_path, text))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read .*none\.yaml"):
        read_recipe(tmp_path / "none.yaml")


def test_a_recipe_made_in_python_is_checked_too() -> None:
    with pytest.raises(UsageError, match="steps must be a whole number"):
        Recipe("x", Component("a.B"), Component("a.B"), Component("a.B"), steps=-1, batch_size=1)


def test_what_is_given_is_not_changed() -> None:
    given_keys = json.loads(json.dumps(DIGITS))
    recipe_from_dict(given_keys)
    assert given_keys == DIGITS


def test_values_of_flags_are_yaml() -> None:
    assert flags(["--a.b", "1e-3", "--c=[x, 2]", "--d", "text", "--e="]) == {
        "a.b": 0.001, "c": ["x", 2], "d": "text", "e": None,
    }  # fmt: skip
