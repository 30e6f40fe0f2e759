"""A stranger's recipe runs no code: nothing it names is imported unless its package was allowed and its class fits."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from leantrain.errors import UsageError
from leantrain.recipe import read_comparison, read_recipe, recipe_from_dict
from leantrain.recipe.arguments import arguments_of
from leantrain.recipe.locate import ROLES, check_path, locate
from leantrain.recipe.schema import COMPONENTS
from leantrain.recipe.yaml import dump

BASE: dict[str, Any] = {
    "model": "leantrain.nn.MLP",
    "data": {"class": "leantrain.data.Sklearn", "name": "digits"},
    "optim": "torch.optim.AdamW",
    "name": "x",
    "steps": 1,
    "batch_size": 2,
}
STRANGER = """
from pathlib import Path
Path(__file__).with_name("imported").touch()
import torch

class Evil(torch.optim.SGD):
    def __init__(self, params, lr=0.1, strength: int = 1, **more):
        super().__init__(params, lr)

class Other:
    pass

def run():
    Path(__file__).with_name("called").touch()
"""


@pytest.fixture
def stranger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the path with a module that leaves a file `imported` when it is imported."""
    (tmp_path / "evil_module.py").write_text(STRANGER, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    # The ways in which jsonargparse can be told things from outside.
    monkeypatch.setenv("JSONARGPARSE_DEFAULT_ENV", "true")
    monkeypatch.setenv("VALUE", "evil_module.Evil")
    yield tmp_path
    sys.modules.pop("evil_module", None)


def test_the_trap_works(stranger: Path) -> None:
    """Otherwise the tests below could not fail."""
    locate("optim", "evil_module.Evil")
    assert (stranger / "imported").exists()


def untouched(folder: Path) -> bool:
    return not (folder / "imported").exists() and "evil_module" not in sys.modules


@pytest.mark.parametrize("key", COMPONENTS)
@pytest.mark.parametrize(
    "path",
    ["evil_module.Evil", "evil_module", "torch.os.evil_module.Evil", "leantrain.evil_module.Evil", "Evil",
     "torch.optim.sys.modules.evil_module.Evil", "..evil_module.Evil", "evil_module:Evil", "torch.__main__.Evil"],
)  # fmt: skip
def test_no_class_of_a_stranger_is_imported(stranger: Path, key: str, path: str) -> None:
    for form in (path, {"class_path": path}, {"class": path, "lr": 1}):
        with pytest.raises(UsageError):
            recipe_from_dict({**BASE, "groups": [{"params": "hidden"}], key: form})
    assert untouched(stranger)


def test_the_refusal_names_the_class_and_the_flag(stranger: Path) -> None:
    with pytest.raises(UsageError, match=r"optim: evil_module\.Evil .*--allow evil_module "):
        recipe_from_dict({**BASE, "optim": "evil_module.Evil"})
    assert untouched(stranger)


def test_an_allowed_package_is_used_like_our_own(stranger: Path) -> None:
    recipe = recipe_from_dict({**BASE, "optim": {"class": "evil_module.Evil", "strength": "3"}}, ["evil_module"])
    assert recipe.optim.init_args == {"strength": 3}
    with pytest.raises(UsageError, match="evil_module has no 'Evli'; nearest: Evil"):
        recipe_from_dict({**BASE, "optim": "evil_module.Evli"}, ["evil_module"])
    with pytest.raises(UsageError, match=r"optim must be a subclass of torch\.optim\.Optimizer"):
        recipe_from_dict({**BASE, "optim": "evil_module.Other"}, ["evil_module"])


def test_options_of_groups_that_only_the_allowed_class_knows_are_passed_on(stranger: Path) -> None:
    groups = [{"params": "hidden", "projector": "std"}]
    recipe = recipe_from_dict({**BASE, "optim": "evil_module.Evil", "groups": groups}, ["evil_module"])
    assert recipe.groups == groups


TARGETS = [
    ("optim", "torch.optim.AdamW"), ("optim", "torch.optim.Muon"), ("optim", "leantrain.optim.GaLoreAdamW"),
    ("optim", "leantrain.optim.Chain"), ("model", "leantrain.nn.Llama"), ("model", "torch.nn.Transformer"),
    ("model", "torch.nn.TransformerEncoder"), ("model", "torch.distributed.nn.RemoteModule"),
    ("model", "torch.fx.GraphModule"), ("data", "leantrain.data.Text"), ("learn", "leantrain.learn.Backprop"),
    ("loss", "torch.nn.CrossEntropyLoss"), ("loss", "leantrain.nn.output_loss.BoostGrad"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "path"), TARGETS)
@pytest.mark.parametrize(
    "value",
    ["evil_module.Evil", "evil_module.run", {"class_path": "evil_module.Evil"}, ["evil_module.run"],
     {"a": {"class_path": "evil_module.Evil", "init_args": {}}}, {"class_path": "evil_module.run", "dict_kwargs": {}}],
)  # fmt: skip
def test_no_value_of_any_argument_is_imported(stranger: Path, key: str, path: str, value: Any) -> None:
    names = [*arguments_of(locate(key, path))[0], "class_path", "other"]
    for name in names:
        try:
            recipe_from_dict({**BASE, key: {"class_path": path, "init_args": {name: value}}})
        except UsageError as refusal:
            assert name in str(refusal) or "needs a value" in str(refusal)
    assert untouched(stranger)


@pytest.mark.parametrize("key", [key for key in (*BASE, "groups", "trackers", "precision", "clip") if key not in ROLES])
def test_no_value_of_any_key_is_imported(stranger: Path, key: str) -> None:
    for value in ("evil_module.Evil", {"class_path": "evil_module.Evil"}, [{"class_path": "evil_module.Evil"}]):
        if (key, value) != ("name", "evil_module.Evil"):
            with pytest.raises(UsageError):
                recipe_from_dict({**BASE, key: value})
    assert untouched(stranger)


@pytest.mark.parametrize(
    "text",
    ["optim: !!python/name:evil_module.Evil", "optim: !!python/object/apply:evil_module.run []",
     "optim: !!python/module:evil_module", "optim: !!python/object/new:evil_module.Evil [[]]",
     "config: other.yaml", "__default_config__: other.yaml", "steps: evil_module.yaml"],
)  # fmt: skip
def test_yaml_tags_and_includes_do_nothing(stranger: Path, text: str) -> None:
    (stranger / "other.yaml").write_text(dump(BASE), encoding="utf-8")
    path = stranger / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError):
        read_recipe(path, ["--steps", "1"])
    assert untouched(stranger)


def test_a_file_cannot_allow_itself(stranger: Path) -> None:
    path = stranger / "recipe.yaml"
    path.write_text(dump({**BASE, "optim": "evil_module.Evil", "allow": ["evil_module"]}), encoding="utf-8")
    with pytest.raises(UsageError, match="no key 'allow'"):
        read_recipe(path)
    comparison = {"base": BASE, "runs": {"a": {"optim": "evil_module.Evil"}}, "baseline": "a"}
    path.write_text(dump({**comparison, "allow": ["evil_module"]}), encoding="utf-8")
    with pytest.raises(UsageError, match="no key 'allow'"):
        read_comparison(path)
    path.write_text(dump(comparison), encoding="utf-8")
    with pytest.raises(UsageError, match="--allow evil_module"):
        read_comparison(path)
    path.write_text(dump({**comparison, "runs": {"a": {}}, "tune": {"optim": ["evil_module.Evil"]}}), encoding="utf-8")
    with pytest.raises(UsageError, match="--allow evil_module"):
        read_comparison(path)
    assert untouched(stranger)


@pytest.mark.parametrize(
    ("key", "path"),
    [("optim", "torch.load"), ("optim", "torch.hub.load"), ("model", "torch.hub.load"), ("model", "torch.load"),
     ("model", "torch.jit.load"), ("data", "torch.load"), ("exchange", "torch.utils.cpp_extension.load"),
     ("learn", "torch.os.system"), ("data", "torch.package.PackageImporter"), ("data", "torch.utils.data.DataLoader"),
     ("model", "leantrain.atomic.shutil.rmtree"), ("rest", "torch.nn.Linear"), ("model", "torch.optim.SGD"),
     ("loss", "torch.nn.ReLU"), ("loss", "torch.nn.functional.mse_loss")],
)  # fmt: skip
def test_trusted_packages_give_only_what_the_place_calls_for(key: str, path: str) -> None:
    with pytest.raises(UsageError, match=f"{key} must be "):
        recipe_from_dict({**BASE, "groups": [{"params": "hidden"}], key: path})


def test_a_package_that_is_not_installed_is_named() -> None:
    with pytest.raises(UsageError, match="needs the package 'not_there', which is not installed"):
        recipe_from_dict({**BASE, "optim": "not_there.Adam"}, ["not_there"])


def test_a_package_that_lacks_one_of_its_own_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lacking.py").write_text("import absent_friend", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UsageError, match="needs the package 'absent_friend', which is not installed"):
        recipe_from_dict({**BASE, "optim": "lacking.Adam"}, ["lacking"])


def test_submodules_that_nothing_imported_yet_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "deep_package" / "inner"
    package.mkdir(parents=True)
    (package / "leaf.py").write_text("from torch.optim import SGD as Leaf", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert locate("optim", "deep_package.inner.leaf.Leaf").__name__ == "SGD"


@pytest.mark.parametrize(
    "path", ["leantrain.__main__.Net", "torch._C.Net", "leantrain", "torch..Net", "torch.nn Net", ""]
)
def test_programs_private_parts_and_malformed_paths_are_refused_before_any_import(path: str) -> None:
    with pytest.raises(UsageError, match="is not the path of a public class"):
        check_path("model", path, ())


def test_a_module_that_a_trusted_package_uses_opens_no_way_into_its_other_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "used_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "leaf.py").write_text("from torch.optim import SGD as Leaf", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("torch.used_package", import_module("used_package"), raising=False)
    with pytest.raises(UsageError):
        locate("optim", "torch.used_package.leaf.Leaf")
    assert "used_package.leaf" not in sys.modules


def test_names_that_only_pass_through_a_trusted_constructor_are_refused() -> None:
    """`torch.nn.Identity(*args, **kwargs)` swallows anything; transformers' configurations keep what they get."""
    with pytest.raises(UsageError, match="Identity has no argument 'anything'"):
        recipe_from_dict({**BASE, "model": {"class": "torch.nn.Identity", "anything": 1}})
