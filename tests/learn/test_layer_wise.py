"""Layer-wise training: the right block at the right time, all else untouched, and no trace of a stop or a cache."""

from __future__ import annotations

import copy
import signal
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from leantrain.cutting import survey
from leantrain.data import Batch
from leantrain.errors import RunError, UsageError
from leantrain.learn import Backprop
from leantrain.learn.feature_cache import FeatureCache, fingerprint
from leantrain.learn.layer_wise import LayerWise, between_layers
from leantrain.nn import MLP, Llama, ResNetCifar, ViT
from leantrain.recipe import Component, Recipe
from leantrain.train import train
from tests.learn.test_feature_cache import largest_file
from tests.small_runs import LLAMA, Processes, checkpoint_tensors, log_without_times, small_recipe

FEATURES, CLASSES = 12, 3


class Norms(nn.Module):
    """Layers with batch normalisation and dropout: what notices a wrong mode."""

    def __init__(self, features: int = FEATURES, classes: int = CLASSES, width: int = 8, layers: int = 3) -> None:
        super().__init__()
        widths = [features, *[width] * layers]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU(inplace=True), nn.Dropout(0.2))
            for a, b in pairwise(widths)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = inputs
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


class Points:
    """Points in three clouds; an id is a point, and keeps its inputs. 40 of them, so that epochs end within batches."""

    task = "classification"
    train_size = 40

    def __init__(self, augment: bool = False) -> None:
        self.spec = {"features": FEATURES, "classes": CLASSES}
        generator = torch.Generator().manual_seed(1)
        self.targets = torch.arange(60) % CLASSES
        centres = torch.randn(CLASSES, FEATURES, generator=generator)
        self.inputs = centres[self.targets] + torch.randn(60, FEATURES, generator=generator)
        self.augment = augment

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        ids = torch.cat([self._epoch(seed, epoch) for epoch in range((step + 1) * size // self.train_size + 1)])
        ids = ids[step * size : (step + 1) * size]
        return Batch(self.inputs[ids] + (0.1 * step if self.augment else 0), self.targets[ids], ids)

    def _epoch(self, seed: int, epoch: int) -> Tensor:
        return torch.randperm(self.train_size, generator=torch.Generator().manual_seed(1000 * seed + epoch))

    def eval_batches(self, size: int, limit: int | None = None) -> Iterator[Batch]:
        for start in list(range(40, 60, size))[:limit]:
            ids = torch.arange(start, min(start + size, 60))
            yield Batch(self.inputs[ids], self.targets[ids], ids)


def batch_of(count: int = 16, step: int = 0) -> Batch:
    return Points().train_batch(0, step, count)


def layer_wise(model: nn.Module | None = None, **how: Any) -> LayerWise:
    torch.manual_seed(0)
    return LayerWise(Norms() if model is None else model, "classification", sample=Points().inputs[:2], **how)


def points_recipe(learn: dict[str, Any], **changes: Any) -> Recipe:
    """24 steps on 3 blocks, 8 each: 3.2 epochs of a block."""
    defaults: dict[str, Any] = {
        "model": Component("tests.learn.test_layer_wise.Norms"),
        "data": Component("tests.learn.test_layer_wise.Points"),
        "learn": Component("leantrain.learn.layer_wise.LayerWise", learn), "steps": 24, "batch_size": 16, "keep": 30,
    }  # fmt: skip
    return small_recipe(**(defaults | changes))


# Which block, and when.


@settings(max_examples=60, deadline=None)
@given(blocks=st.integers(2, 4), laps=st.integers(1, 7), steps=st.integers(1, 13))
def test_every_block_has_its_share_of_the_steps_in_every_lap(blocks: int, laps: int, steps: int) -> None:
    learner = layer_wise(MLP(features=FEATURES, classes=CLASSES, hidden=[4] * 4), blocks=blocks, laps=laps)
    total = blocks * laps * steps
    seen = []
    for number in range(total):
        place = learner.enter(number / total)
        seen.append((learner.stage, learner.block, round(place * steps)))
        assert 0 <= place < 1
        assert place * steps == pytest.approx(number % steps, abs=1e-6)
    assert seen == [
        (lap * blocks + block, block, step) for lap in range(laps) for block in range(blocks) for step in range(steps)
    ]


def test_all_parameters_are_trained_once_in_a_lap_and_nothing_else_requires_gradients() -> None:
    learner = layer_wise()
    everything = {id(param) for param in learner.module.parameters()}
    seen: list[int] = []
    for stage in range(3):
        learner.enter(stage / 3)
        (part,) = learner.parts
        assert {id(p) for p in part.params} == {id(p) for p in learner.module.parameters() if p.requires_grad}
        seen += [id(param) for param in part.params]
    assert len(seen) == len(set(seen))
    assert set(seen) == everything


def test_what_the_user_has_frozen_stays_frozen() -> None:
    model = Norms()
    model.layers[1][0].bias.requires_grad_(False)
    learner = layer_wise(model)
    for spent in (0.0, 0.4, 0.7, 0.0):
        learner.enter(spent)
        assert not model.layers[1][0].bias.requires_grad


@pytest.mark.parametrize(
    ("model", "sample", "expected"),
    [
        (MLP(features=4, classes=3, hidden=[6] * 3), torch.randn(2, 4), ["layers.1", "layers.2"]),
        (
            Llama(vocab_size=16, context=8, hidden=16, mlp_hidden=24, layers=3, heads=2),
            torch.zeros(2, 8, dtype=torch.int64),
            ["layers.1", "layers.2"],
        ),
        (ResNetCifar(20), torch.randn(2, 3, 16, 16), [f"layers.{number}" for number in range(1, 9)]),
        (
            ViT(image_size=8, patch=4, channels=1, classes=3, hidden=8, layers=2, heads=2),
            torch.randn(2, 1, 8, 8),
            None,
        ),
        (
            nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2)),
            torch.randn(2, 4),
            ["3", "5"],
        ),
        (nn.Sequential(nn.Linear(4, 2)), torch.randn(2, 4), []),
    ],
)
def test_by_default_every_layer_is_a_block(model: nn.Module, sample: Tensor, expected: list[str] | None) -> None:
    found = between_layers(model, survey(model, sample))
    if expected is None:  # a stem and a head around two layers
        expected = [name for name in found if name.endswith(".1")]
        assert len(expected) == 1
    assert found == expected
    assert LayerWise(model, "classification", sample=sample).cut.names == tuple(expected)


# What a step does.


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("laps", [1, 3])
def test_one_block_is_backpropagation_bit_for_bit(precision: Any, laps: int) -> None:
    ours, theirs = Norms(), Norms()
    theirs.load_state_dict(ours.state_dict())
    learner = layer_wise(ours, blocks=1, laps=laps, precision=precision)
    reference = Backprop(theirs, "classification", precision=precision)
    for number in range(4):
        assert learner.enter(number / 4) == number / 4
        losses = []
        for each in (learner, reference):
            torch.manual_seed(number)
            losses.append(each.step(batch_of(step=number), weight=0.5).loss)
        assert torch.equal(*losses)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_block_gets_the_gradient_of_its_loss_and_no_other_any(block: int) -> None:
    learner = layer_wise()
    model, batch = learner.model, batch_of()
    expected = reference_gradients(copy.deepcopy(learner), block, batch)
    learner.enter(block / 3)
    torch.manual_seed(5)
    result = learner.step(batch, weight=0.25)
    assert result.examples_used == 16
    assert result.metrics.keys() == {f"block{block + 1}/loss"}
    found = {name: param.grad for name, param in learner.module.named_parameters() if param.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], 0.25 * gradient)
    assert model is learner.model


def reference_gradients(learner: LayerWise, block: int, batch: Batch) -> dict[str, Tensor]:
    """By hand: layers before the block in evaluation mode, then the block, then its head or the model's."""
    model = learner.model
    hidden = batch.inputs
    for layer in model.layers[:block]:
        hidden = layer.eval()(hidden)
    torch.manual_seed(5)
    hidden = model.layers[block](hidden.detach())
    logits = model.head(hidden) if block == 2 else learner.local_loss(block).head(hidden)
    F.cross_entropy(logits, batch.targets).backward()
    return {name: param.grad for name, param in learner.module.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("cache", ["recompute", "memory"])
def test_frozen_blocks_keep_every_bit_and_the_present_one_its_mode(cache: Any) -> None:
    learner = layer_wise(cache=cache)
    model = learner.model
    for block in range(3):
        learner.enter(block / 3)
        optimizer = torch.optim.AdamW(learner.parts[0].params, lr=0.1, weight_decay=0.5)
        others = [layer for number, layer in enumerate(model.layers) if number != block]
        before = [fingerprint(layer.state_dict().items()) for layer in others]
        own = fingerprint(model.layers[block].state_dict().items())
        batches = model.layers[block][1].num_batches_tracked.item()
        for number in range(3):
            learner.step(batch_of(step=number))
            optimizer.step()
            optimizer.zero_grad()
        learner.evaluate(batch_of())
        assert [fingerprint(layer.state_dict().items()) for layer in others] == before
        assert fingerprint(model.layers[block].state_dict().items()) != own
        assert model.layers[block][1].num_batches_tracked == batches + 3
        assert all(module.training for module in model.modules())


def test_a_second_lap_trains_an_earlier_block_with_later_ones_at_rest() -> None:
    learner = layer_wise(laps=2)
    learner.enter(0.5)
    assert (learner.stage, learner.block) == (3, 0)
    learner.step(batch_of())
    assert {name.split(".")[1] for name, p in learner.model.named_parameters() if p.grad is not None} == {"0"}


class Saved:
    """Counts the bytes that autograd saves, parameters left out."""

    def __init__(self, model: nn.Module) -> None:
        self.known = {param.untyped_storage().data_ptr() for param in model.parameters()}
        self.storages: dict[int, int] = {}

    def __call__(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    @property
    def nbytes(self) -> int:
        return sum(self.storages.values())


def saved_bytes(learner: Any, batch: Batch) -> int:
    saved = Saved(learner.module)
    with torch.autograd.graph.saved_tensors_hooks(saved, lambda tensor: tensor):
        learner.step(batch)
    return saved.nbytes


def test_what_is_saved_for_backward_is_one_block_s_however_deep_the_model() -> None:
    batch = Batch(torch.randn(64, 32), torch.randint(CLASSES, (64,)), torch.arange(64))
    most = {}
    for depth in (2, 4, 16):
        model = MLP(features=32, classes=CLASSES, hidden=[32] * depth)
        learner = LayerWise(model, "classification", sample=batch.inputs[:2])
        assert len(learner.cut) == depth
        found = []
        for block in range(depth):
            learner.enter(block / depth)
            found.append(saved_bytes(learner, batch))
        most[depth] = max(found)
    assert most[2] == most[4] == most[16]
    whole = saved_bytes(Backprop(MLP(features=32, classes=CLASSES, hidden=[32] * 16), "classification"), batch)
    assert most[16] <= 0.25 * whole


def test_batches_of_one_are_refused_with_batch_normalisation() -> None:
    with pytest.raises(UsageError, match="at least 2 examples"):
        layer_wise().step(batch_of(1))


# Caches.


@pytest.mark.parametrize(("precision", "laps"), [("fp32", 2), ("bf16", 1)])
def test_training_from_a_cache_is_training_without_bit_for_bit(precision: str, laps: int, tmp_path: Path) -> None:
    caches = {"recompute": {}, "memory": {}, "disk": {"cache_folder": str(tmp_path / "features")}}
    tensors = []
    for cache, how in caches.items():
        recipe = points_recipe({"cache": cache, "laps": laps, **how}, precision=precision, steps=24 * laps)
        train(recipe, tmp_path / cache)
        tensors.append(checkpoint_tensors(tmp_path / cache, 24 * laps))
    for found in tensors[1:]:
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors[0].items())


def test_frozen_blocks_run_once_per_example_and_block() -> None:
    learner = layer_wise(cache="memory")
    passes = Mock(wraps=learner._through_frozen)
    learner._through_frozen = passes  # type: ignore[method-assign]
    for block in (1, 2):
        learner.enter(block / 3)
        for number in range(15):  # six epochs of 40 examples
            learner.step(batch_of(step=number))
        # The first epoch ends within the third batch, which has some of the second epoch's examples.
        assert passes.call_count == 3
        passes.reset_mock()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_rounded_cache_takes_half_the_room(dtype: Any, tmp_path: Path) -> None:
    sizes = {}
    for kept in (None, dtype):
        folder = tmp_path / str(kept)
        learner = layer_wise(cache="disk", cache_folder=str(folder), cache_dtype=kept)
        learner.enter(0.4)
        learner.step(batch_of())
        sizes[kept] = (folder / "process-0" / "features.bin").stat().st_size
    assert sizes[dtype] * 2 == sizes[None] == 16 * 8 * 4


def test_augmented_examples_and_examples_without_ids_cannot_be_cached(tmp_path: Path) -> None:
    augmented = points_recipe(
        {"cache": "memory"}, data=Component("tests.learn.test_layer_wise.Points", {"augment": True})
    )
    with pytest.raises(UsageError, match="has other inputs than when its features were kept"):
        train(augmented, tmp_path)
    learner = layer_wise(cache="memory")
    learner.enter(0.5)
    with pytest.raises(UsageError, match="batches have no ids"):
        learner.fit([(batch_of().inputs, batch_of().targets)] * 3)


def test_a_cache_of_other_weights_is_not_used(tmp_path: Path) -> None:
    folder = str(tmp_path / "features")
    first = layer_wise(cache="disk", cache_folder=folder)
    first.enter(0.4)
    first.step(batch_of())
    assert first._cache is not None
    first._cache.close()
    changed = Norms()
    changed.load_state_dict(first.model.state_dict())
    changed.layers[0][1].running_mean[3] += 1e-3  # a buffer
    second = layer_wise(changed, cache="disk", cache_folder=folder)
    second.enter(0.4)
    second.step(batch_of())
    expected = changed.layers[0].eval()(batch_of().inputs)
    assert second._cache is not None
    assert torch.equal(second._cache.features(batch_of().ids, batch_of().inputs, no_pass), expected)


def no_pass(inputs: Tensor) -> Tensor:
    raise AssertionError("should be there")


# In the loop.


def stopping_at(step: int) -> Any:
    def on_event(event: dict[str, Any]) -> None:
        if event["kind"] == "step" and event["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    return on_event


RESUMED: dict[str, dict[str, Any]] = {
    "recompute": {"learn": {"laps": 2}},
    "memory, accumulated": {"learn": {"cache": "memory"}, "accumulate": 2},
    "disk, rounded, bf16": {"learn": {"cache": "disk", "cache_dtype": "bfloat16"}, "precision": "bf16"},
    "galore": {
        "learn": {},
        "model": LLAMA, "data": Component("tests.small_runs.Tokens"),
        "optim": Component("leantrain.optim.GaLoreAdamW", {"lr": 0.01, "rank": 4, "refresh": 3}),
    },
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_stopped_anywhere_ends_as_if_it_never_had_been(name: str, tmp_path: Path) -> None:
    case = {key: value for key, value in RESUMED[name].items() if key != "learn"}

    def recipe(out: str) -> Recipe:
        learn = dict(RESUMED[name]["learn"])
        if learn.get("cache") == "disk":
            learn["cache_folder"] = str(tmp_path / "features")
        return points_recipe(learn, log_every=1, **case)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe("whole"), whole)
    for stop in (7, 9, 15):  # the step after it is the last: 8 and 16 are where a block ends
        assert train(recipe("parts"), parts, on_event=stopping_at(stop)).status == "interrupted"
    assert train(recipe("parts"), parts).status == "finished"
    assert log_without_times(parts) == log_without_times(whole)
    left, right = checkpoint_tensors(parts, 24), checkpoint_tensors(whole, 24)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_only_the_present_block_has_optimizer_state_and_every_block_a_schedule_of_its_own(tmp_path: Path) -> None:
    train(points_recipe({}, log_every=1, checkpoint_every=1, warmup=0.25), tmp_path)
    for step, layer in ((1, "layers.0."), (8, "layers.0."), (9, "layers.1."), (24, "layers.2.")):
        names = {name.split("state/", 1)[1] for name in checkpoint_tensors(tmp_path, step) if "state/" in name}
        own = {name for name in names if not name.startswith("auxiliary")}
        assert all(name.startswith((layer, "head." if step == 24 else layer)) for name in own), names
        assert own
    rates = [line["lr"] for line in log_without_times(tmp_path) if "lr" in line]
    assert len(rates) == 24
    assert rates[8:16] == pytest.approx(rates[:8])
    assert rates[16:] == pytest.approx(rates[:8])
    assert rates.index(max(rates)) < 3
    assert log_without_times(tmp_path)[-1].keys() >= {"val_accuracy", "block1/val_accuracy", "block2/val_loss"}


def test_micro_batches_give_the_gradient_of_the_whole_batch(tmp_path: Path) -> None:
    model = Component("leantrain.nn.MLP", {"hidden": [8, 8, 8]})
    for name, accumulate in (("whole", 1), ("parts", 4)):
        train(points_recipe({}, model=model, accumulate=accumulate), tmp_path / name)
    left, right = checkpoint_tensors(tmp_path / "whole", 24), checkpoint_tensors(tmp_path / "parts", 24)
    for name in left:
        if name.startswith("model/"):
            torch.testing.assert_close(left[name], right[name], atol=2e-3, rtol=0)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    learn = Component("leantrain.learn.layer_wise.LayerWise", {"cut": ["layers.1"]})
    recipe = small_recipe(learn=learn, optim=Component("torch.optim.SGD", {"lr": 0.1, "momentum": 0.9}))
    train(recipe, tmp_path / "one")
    Processes(2, [(recipe, tmp_path / "two")], tmp_path).must_succeed()
    left, right = checkpoint_tensors(tmp_path / "one", 12), checkpoint_tensors(tmp_path / "two", 12)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], atol=1e-5, rtol=0)


def test_a_full_disk_ends_the_run_and_it_goes_on_when_there_is_room(tmp_path: Path) -> None:
    learn = {"cache": "disk", "cache_folder": str(tmp_path / "features")}
    recipe = points_recipe(learn, model=Component("tests.learn.test_layer_wise.Norms", {"width": 400}), trackers=[])
    train(recipe, tmp_path / "whole")
    with largest_file(60_000), pytest.raises(RunError, match="cannot write the feature cache"):
        train(replace(recipe, checkpoint_every=0), tmp_path / "parts")
    assert train(recipe, tmp_path / "parts").status == "finished"
    left, right = checkpoint_tensors(tmp_path / "parts", 24), checkpoint_tensors(tmp_path / "whole", 24)
    assert all(torch.equal(left[key], right[key]) for key in right)


def test_fit_trains_all_blocks() -> None:
    data = Points()
    loader = [data.train_batch(0, number, 20) for number in range(2)]
    held_out = next(data.eval_batches(20))
    learner = layer_wise(Norms(layers=2), cache="memory", laps=2)
    losses = learner.fit(loader, partial(torch.optim.AdamW, lr=0.02), epochs=40)
    assert losses[9] < losses[0]  # the first block
    found = learner.evaluate(held_out)
    assert found["correct"] / found["count"] >= 0.7
    assert found["block1/correct"] / found["block1/count"] >= 0.7


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"laps": 0}, "laps must be >= 1, got laps=0"),
        ({"cache": "ram"}, "cache 'ram' is unknown.*allowed: disk, memory, recompute"),
        ({"cache_dtype": "int8"}, "cache_dtype 'int8' is unknown"),
        ({"cache": "disk"}, "cache_folder belong together"),
        ({"cache_folder": "somewhere"}, "cache_folder belong together"),
        ({"blocks": 9}, "blocks must be 1 to"),
    ],
)
def test_what_cannot_be_is_refused_with_one_line(how: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layer_wise(**how)


def test_the_state_is_the_heads_and_a_loaded_one_opens_the_cache_anew() -> None:
    learner = layer_wise(cache="memory")
    learner.enter(0.4)
    learner.step(batch_of())
    assert isinstance(learner._cache, FeatureCache)
    learner.load_state_dict(learner.state_dict())
    assert learner._cache is None
    with pytest.raises(UsageError, match="other blocks"):
        layer_wise(blocks=2).load_state_dict(learner.state_dict())
