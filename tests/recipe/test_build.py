"""Recipes become objects: models take sizes from data, every parameter has one optimizer, refusals name the class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leantrain.errors import UsageError
from leantrain.learn import Whole
from leantrain.optim import hidden_matrices
from leantrain.recipe import (
    Component,
    Recipe,
    build_data,
    build_exchange,
    build_learner,
    build_model,
    build_optimizers,
    recipe_from_dict,
)  # fmt: skip
from leantrain.recipe.build import build_loss
from leantrain.train import train


def digits(**changes: Any) -> Recipe:
    keys = {
        "name": "digits",
        "model": {"class": "leantrain.nn.MLP", "hidden": [16, 16]},
        "data": {"class": "leantrain.data.Sklearn", "name": "digits"},
        "optim": {"class": "torch.optim.AdamW", "lr": 0.01},
        "steps": 3,
        "batch_size": 32,
    }
    return recipe_from_dict({**keys, **changes})


def small_model() -> nn.Module:
    recipe = digits()
    return build_model(recipe, build_data(recipe))


def names_of(model: nn.Module, group: dict[str, Any]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for parameter in group["params"]]


def test_the_model_takes_its_sizes_from_the_data() -> None:
    recipe = digits()
    data = build_data(recipe)
    model = build_model(recipe, data)
    batch = data.train_batch(0, 0, 5)
    assert model(batch.inputs).shape == (5, 10)


def test_what_the_recipe_says_goes_before_what_the_data_say() -> None:
    recipe = digits(model={"class": "leantrain.nn.MLP", "classes": 12})
    assert build_model(recipe, build_data(recipe))(torch.zeros(1, 64)).shape == (1, 12)


def test_the_seed_alone_decides_the_initial_weights_and_the_callers_random_state_is_kept() -> None:
    def weights(seed: int) -> Tensor:
        recipe = digits(seed=seed)
        return torch.cat([p.flatten() for p in build_model(recipe, build_data(recipe)).parameters()])

    torch.manual_seed(1)
    first = weights(3)
    next_draw = torch.rand(())
    torch.manual_seed(1)
    assert torch.rand(()) == next_draw
    assert torch.equal(first, weights(3))
    assert not torch.equal(first, weights(4))


def test_a_configuration_of_transformers_becomes_a_language_model() -> None:
    pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    recipe = digits(model={"class": "transformers.LlamaConfig", **sizes, "num_key_value_heads": 2})
    text = SimpleNamespace(spec={"vocab_size": 50, "context": 12})
    model = build_model(recipe, text)
    assert model(torch.zeros(2, 12, dtype=torch.long)).shape == (2, 12, 50)
    assert model.model.config.max_position_embeddings == 12


def test_names_behind_the_signature_of_a_configuration_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="LlamaConfig has no argument 'auto_map'"):
        digits(model={"class": "transformers.LlamaConfig", "auto_map": {"AutoModelForCausalLM": "x--y.Z"}})


def test_one_optimizer_without_groups_gets_every_parameter() -> None:
    model = small_model()
    (optimizer,) = build_optimizers(digits(), model)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sorted(names_of(model, optimizer.param_groups[0])) == sorted(dict(model.named_parameters()))
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_rank_goes_to_hidden_matrices_alone() -> None:
    model = small_model()
    (optimizer,) = build_optimizers(digits(optim={"class": "GaLoreAdamW", "rank": 4, "lr": 0.02}), model)
    low_rank, others = optimizer.param_groups
    assert names_of(model, low_rank) == hidden_matrices(model)
    assert (low_rank["rank"], others["rank"]) == (4, None)
    assert (low_rank["lr"], others["lr"]) == (0.02, 0.02)


def test_groups_of_the_recipe_go_before_that() -> None:
    model = small_model()
    optim = {"class": "GaLoreAdamW", "rank": 4}
    (optimizer,) = build_optimizers(digits(optim=optim, groups=[{"params": "bias$", "lr": 0.5}]), model)
    biases, others = optimizer.param_groups
    assert all(name.endswith("bias") for name in names_of(model, biases))
    assert (biases["lr"], biases["rank"], others["rank"]) == (0.5, 4, 4)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest_with_the_same_lr() -> None:
    model = small_model()
    recipe = digits(
        optim={"class": "torch.optim.Muon", "lr": 0.03}, groups=[{"params": "hidden"}], rest="torch.optim.AdamW"
    )
    muon, adamw = build_optimizers(recipe, model)
    assert names_of(model, muon.param_groups[0]) == hidden_matrices(model)
    both = [*names_of(model, muon.param_groups[0]), *names_of(model, adamw.param_groups[0])]
    assert sorted(both) == sorted(dict(model.named_parameters()))
    assert adamw.param_groups[0]["lr"] == 0.03
    recipe = digits(
        optim="torch.optim.Muon", groups=[{"params": "hidden"}], rest={"class": "torch.optim.AdamW", "lr": 0.1}
    )
    assert build_optimizers(recipe, model)[1].param_groups[0]["lr"] == 0.1


def test_rest_without_anything_left_is_refused() -> None:
    recipe = digits(groups=[{"params": "."}], rest="torch.optim.SGD")
    with pytest.raises(UsageError, match=r"rest \(torch.optim.SGD\) has nothing to do"):
        build_optimizers(recipe, small_model())


def test_a_group_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="matches no trainable parameter"):
        build_optimizers(digits(groups=[{"params": "attention"}]), small_model())


def test_an_optimizer_of_another_package_needs_no_adapter() -> None:
    pytest.importorskip("galore_torch")
    keys = {"name": "x", "model": {"class": "MLP", "hidden": [16]}, "data": {"class": "Sklearn", "name": "digits"},
            "steps": 1, "batch_size": 4}  # fmt: skip
    options = {"rank": 4, "update_proj_gap": 10, "scale": 1.0, "proj_type": "std"}
    recipe = recipe_from_dict(
        {**keys, "optim": {"class": "galore_torch.GaLoreAdamW", "lr": "1e-2", "no_deprecation_warning": True},
         "groups": [{"params": "hidden", **options}]},
        allow=["galore_torch"],
    )  # fmt: skip
    model = build_model(recipe, build_data(recipe))
    (optimizer,) = build_optimizers(recipe, model)
    model(torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    (hidden,) = hidden_matrices(model)
    state = optimizer.state[dict(model.named_parameters())[hidden]]
    assert 4 in state["exp_avg"].shape


def test_learner_and_exchange_are_built_as_the_recipe_says() -> None:
    learner = build_learner(digits(precision="bf16"), small_model(), build_data(digits()))
    outputs, targets = torch.randn(4, 10), torch.arange(4)
    assert torch.equal(learner.objective.mean(outputs, targets), F.cross_entropy(outputs, targets))
    assert learner.precision == "bf16"
    model = small_model()
    assert build_exchange(digits()).attach(model) is model


LOSSES = [
    ("classification", (6, 4), (6,)), ("next_token", (2, 4, 4), (2, 4)), ("next_token", (3, 5, 7), (3, 5)),
]  # fmt: skip


@pytest.mark.parametrize(("task", "outputs", "targets"), LOSSES)
def test_a_loss_of_the_recipe_is_given_rows_of_classes(
    task: str, outputs: tuple[int, ...], targets: tuple[int, ...]
) -> None:
    recipe = digits(loss={"class": "torch.nn.CrossEntropyLoss", "label_smoothing": 0.1})
    data = SimpleNamespace(task=task)
    objective = build_learner(recipe, small_model(), data).objective
    z, y = torch.randn(outputs), torch.randint(4, targets)
    expected = F.cross_entropy(z.flatten(0, -2), y.flatten(), label_smoothing=0.1)
    assert torch.equal(objective.mean(z, y), expected)
    found = objective.sums(z, y)
    assert found["count"] == y.numel() and found["correct"] == (z.argmax(-1) == y).sum()
    torch.testing.assert_close(found["loss_sum"], expected * y.numel())
    assert objective.mean(z.bfloat16(), y).dtype == torch.float32
    with pytest.raises(UsageError, match=f"{task} takes outputs"):
        objective.mean(z[:1], y)


def test_a_loss_of_numbers_is_given_one_shape() -> None:
    recipe = digits(loss={"class": "torch.nn.HuberLoss", "delta": 0.5})
    loss = build_loss(recipe, small_model(), SimpleNamespace(task="regression"))
    outputs, targets = torch.randn(5, 1), torch.randn(5)
    assert torch.equal(loss(outputs, targets), F.huber_loss(outputs[:, 0], targets, delta=0.5))


def test_without_a_loss_it_is_that_of_the_task() -> None:
    assert build_loss(digits(), small_model(), build_data(digits())) == "classification"


def test_a_loss_that_is_no_mean_is_refused() -> None:
    recipe = digits(loss={"class": "torch.nn.CrossEntropyLoss", "reduction": "none"})
    loss = build_loss(recipe, small_model(), build_data(recipe))
    with pytest.raises(UsageError, match=r"the batch's mean, one number; CrossEntropyLoss\(\) returns \[5\]"):
        loss(torch.zeros(5, 10), torch.arange(5))


def test_buffers_of_a_loss_follow_the_model() -> None:
    recipe = digits(loss={"class": "leantrain.nn.output_loss.OutputLoss", "class_weight": [1] * 10})
    loss = build_loss(recipe, small_model().to("meta"), build_data(recipe))
    assert loss(torch.zeros(5, 10, device="meta"), torch.zeros(5, dtype=torch.int64, device="meta")).is_meta


def test_a_recipe_with_a_loss_trains_by_it_and_another_loss_is_another_run(tmp_path: Path) -> None:
    loss = {"class": "leantrain.nn.output_loss.OutputLoss", "kind": "cubic"}
    recipe = digits(loss=loss, steps=60, optim={"class": "torch.optim.SGD", "lr": 0.03, "momentum": 0.9}, trackers=[])
    found = train(recipe, tmp_path).final
    assert found["val_accuracy"] > 0.5
    with pytest.raises(UsageError, match=r"is of a run with loss=.*OutputLoss.*, this recipe has loss=None"):
        train(replace(recipe, loss=None, steps=61), tmp_path)


class Deaf(Whole):
    """A learner that knows no precisions."""

    def __init__(self, model: nn.Module, loss: str) -> None:
        super().__init__(model, loss)


def test_a_precision_that_the_learner_cannot_honour_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leantrain.learn.Deaf", Deaf, raising=False)
    data = build_data(digits())
    assert isinstance(build_learner(digits(learn="Deaf"), small_model(), data), Deaf)
    with pytest.raises(UsageError, match=r"precision='bf16' is not available with learn=leantrain\.learn\.Deaf"):
        build_learner(digits(learn="Deaf", precision="bf16"), small_model(), data)


def test_what_a_constructor_refuses_names_key_class_and_arguments() -> None:
    recipe = digits(data={"class": "Sklearn", "name": "digit"})
    with pytest.raises(UsageError, match=r"data: scikit-learn has no bundled set 'digit'; did you mean 'digits'"):
        build_data(recipe)
    recipe = digits(model={"class": "torch.nn.Linear", "in_features": 3, "out_features": -1})
    with pytest.raises(UsageError, match=r"model: Linear\(in_features=3, out_features=-1\) is refused: .*negative"):
        build_model(recipe, SimpleNamespace(spec={}))


def test_a_size_that_neither_recipe_nor_data_give_is_named() -> None:
    recipe = digits(model={"class": "torch.nn.Linear", "in_features": 3})
    with pytest.raises(UsageError, match=r"model: Linear needs a value for model\.out_features"):
        build_model(recipe, SimpleNamespace(spec={"features": 3}))


def test_a_model_too_small_for_the_data_is_refused() -> None:
    recipe = digits(model={"class": "leantrain.nn.MLP", "classes": 9})
    with pytest.raises(UsageError, match=r"model\.classes=9 is too small: the data need 10"):
        build_model(recipe, build_data(recipe))


def test_lists_from_yaml_reach_the_constructor_as_it_declares_them() -> None:
    (optimizer,) = build_optimizers(digits(optim={"class": "torch.optim.AdamW", "betas": [0.5, 0.9]}), small_model())
    assert optimizer.defaults["betas"] == (0.5, 0.9)


def test_a_recipe_made_in_python_is_built_like_one_from_a_file() -> None:
    recipe = Recipe(
        name="python",
        model=Component("torch.nn.Linear", {"in_features": 2, "out_features": 1}),
        data=Component("leantrain.data.Sklearn", {"name": "digits"}),
        optim=Component("torch.optim.SGD", {"lr": 0.1}),
        steps=1,
        batch_size=1,
    )
    assert isinstance(build_model(recipe, SimpleNamespace(spec={})), nn.Linear)
