"""Hugging Face's Trainer, the real one: every setting of its arguments ends in the weights that a loop by hand has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from leantrain.hosts import TrueGradNorm, trainer_optimizer
from leantrain.optim import GaLoreAdamW
from leantrain.optim.groups import all_linear
from tests.hosts.plain_loop import (
    BATCH,
    CHANGES,
    DEFAULTS,
    RANK,
    REFRESH,
    STEPS,
    WARMUP,
    Run,
    examples,
    model,
    plain_loop,
)

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="the Trainer needs accelerate")


class Reports(TrueGradNorm, transformers.Trainer):
    """A Trainer as the documentation has it."""


def arguments(folder: Path, in_backward: bool = False, save: bool = False, **settings: Any) -> Any:
    """TrainingArguments for these settings, in the words of plain_loop.py."""
    s = DEFAULTS | settings
    return transformers.TrainingArguments(
        output_dir=str(folder),
        learning_rate=s["lr"],
        weight_decay=s["weight_decay"],
        adam_beta1=s["betas"][0],
        adam_beta2=s["betas"][1],
        adam_epsilon=s["eps"],
        max_grad_norm=0.0 if in_backward else s["max_norm"] or 0.0,
        gradient_accumulation_steps=s["accumulate"],
        warmup_steps=WARMUP,
        lr_scheduler_type="linear",
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="steps" if save else "no",
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )


def train(
    folder: Path,
    *,
    save: bool = False,
    resume: bool = False,
    in_backward: bool | dict[str, Any] = False,
    **settings: Any,
) -> Run:
    trained, args = model(), arguments(folder, in_backward is not False, save, **settings)
    if isinstance(in_backward, dict):
        in_backward = {**in_backward, "max_norm": settings.get("max_norm")}
    groups = [{"params": "all-linear", "rank": settings.get("rank", RANK)}]
    optimizer = trainer_optimizer(trained, args, GaLoreAdamW, groups, in_backward=in_backward, refresh=REFRESH)
    data = [{"input_ids": row, "labels": row} for row in examples()]
    trainer = Reports(trained, args, train_dataset=data, optimizers=(optimizer, None))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    return Run.of(trained, [entry["learning_rate"] for entry in logs], [entry["grad_norm"] for entry in logs])


WAYS: dict[str, bool | dict[str, Any]] = {
    "ordinary": False,
    # What is exact: the loop's norm, and its bases. Cheaper ways are tested where they belong, with the optimizer.
    "in backward": {"clip": "exact", "basis_from": "whole"},
}
each_way = pytest.mark.parametrize("way", WAYS)


@each_way
@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_of_the_trainer_does_what_it_does_in_a_loop(change: str, way: str, tmp_path: Path) -> None:
    ours, loop = train(tmp_path, in_backward=WAYS[way], **CHANGES[change]), plain_loop(**CHANGES[change])
    assert ours.distance(loop) < 1e-5
    assert ours.lrs == pytest.approx(loop.lrs)
    assert ours.norms == pytest.approx(loop.norms, rel=1e-4 if way == "ordinary" or change != "accumulation" else 0.2)
    if change != "nothing":
        assert loop.distance(plain_loop()) > 1e-3  # otherwise this test could not fail


def test_clipping_by_the_norm_before_is_what_the_loop_makes_of_it(tmp_path: Path) -> None:
    # Above the first norm: without one before it, the first step of a run is clipped by what it knows of its own.
    limit = 1.085
    ours = train(tmp_path, in_backward={"clip": "previous"}, max_norm=limit)
    loop = plain_loop(previous_norm=True, max_norm=limit)
    assert loop.norms[0] < limit < max(loop.norms[:-1])
    assert ours.distance(loop) < 1e-5
    assert ours.norms == pytest.approx(loop.norms, rel=1e-4)
    assert loop.distance(plain_loop(max_norm=limit)) > 2e-5


@each_way
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.5, "max_norm": 0.1, "accumulate": 3}], ids=["plain", "all"]
)
def test_stopping_and_going_on_is_bit_for_bit_never_stopping(
    settings: dict[str, Any], way: str, tmp_path: Path
) -> None:
    whole = train(tmp_path, save=True, in_backward=WAYS[way], **settings)
    resumed = train(tmp_path, resume=True, in_backward=WAYS[way], **settings)
    assert resumed.distance(whole) == 0
    assert (resumed.lrs, resumed.norms) == (whole.lrs, whole.norms)
    fresh = Run.of(model(), [], [])
    assert fresh.distance(whole) > 1e-3


@each_way
def test_a_checkpoint_is_read_without_unpickling_anything(way: str, tmp_path: Path) -> None:
    train(tmp_path, save=True, in_backward=WAYS[way])
    saved = torch.load(tmp_path / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for state in saved["state"].values() for value in state.values())


@each_way
def test_a_checkpoint_of_another_rank_is_refused(way: str, tmp_path: Path) -> None:
    train(tmp_path, save=True, in_backward=WAYS[way])
    with pytest.raises(ValueError, match=r"saved state of parameter .*basis of shape \(16, 4\).*need \(16, 3\)"):
        train(tmp_path, resume=True, in_backward=WAYS[way], rank=3)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    # The Trainer would read the weights first, and complain of them: so only the optimizer's file is of another shape.
    train(tmp_path, save=True)
    path = tmp_path / "checkpoint-4" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    state = saved["state"][0]
    state["exp_avg"] = state["exp_avg"][:, 1:].clone()
    torch.save(saved, path)
    with pytest.raises(ValueError, match="exp_avg of shape"):
        train(tmp_path, resume=True)


def test_a_short_epoch_is_accumulated_as_far_as_it_goes(tmp_path: Path) -> None:
    """8 micro-batches in threes: the third step of each epoch has two."""

    def run(folder: str, in_backward: bool | dict[str, Any]) -> Run:
        trained = model()
        args = arguments(tmp_path / folder, accumulate=3)
        groups = [{"params": "all-linear", "rank": RANK}]
        optimizer = trainer_optimizer(trained, args, GaLoreAdamW, groups, in_backward=in_backward, refresh=REFRESH)
        data = [{"input_ids": row, "labels": row} for row in examples(8 * BATCH)]
        Reports(trained, args, train_dataset=data, optimizers=(optimizer, None)).train()
        return Run.of(trained, [], [])

    assert run("a", False).distance(run("b", WAYS["in backward"])) < 1e-5


def test_the_trainers_own_norm_is_what_is_logged_without_steps_in_backward(tmp_path: Path) -> None:
    trained, args = model(), arguments(tmp_path, max_norm=0.1)
    data = [{"input_ids": row, "labels": row} for row in examples()]
    trainer = Reports(trained, args, train_dataset=data)  # the Trainer's AdamW
    trainer.evaluate(data)  # logs before there is an optimizer
    trainer.train()
    assert all(entry["grad_norm"] > 0.5 for entry in trainer.state.log_history if "loss" in entry)


def test_the_trainers_own_all_linear_takes_the_output_layer_and_no_conv1d(tmp_path: Path) -> None:
    """What docs/hosts.md says of it."""
    pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    args = transformers.TrainingArguments(str(tmp_path), optim="galore_adamw", optim_target_modules="all-linear")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, tie_word_embeddings=False)
    for theirs in (model(), transformers.GPT2LMHeadModel(config)):
        _, kwargs = transformers.Trainer.get_optimizer_cls_and_kwargs(args, theirs)
        chosen = {id(param) for group in kwargs["params"] if "rank" in group for param in group["params"]}
        names = {name for name, param in theirs.named_parameters() if id(param) in chosen}
        assert names == {"lm_head.weight"} | (set() if "GPT2" in type(theirs).__name__ else set(all_linear(theirs)))
        assert "lm_head.weight" not in all_linear(theirs)


def test_options_that_are_for_matrices_go_to_all_linear(tmp_path: Path) -> None:
    trained = model()
    optimizer = trainer_optimizer(trained, arguments(tmp_path, weight_decay=0.1), GaLoreAdamW, rank=3)
    ranks = {name: group["rank"] for group in optimizer.param_groups for name in group["param_names"]}
    decays = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {name for name, rank in ranks.items() if rank == 3} == {name for name in ranks if "_proj" in name}
    assert {name for name, decay in decays.items() if decay == 0} == {name for name in ranks if "norm" in name}


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {"lr": 1e-3}, "lr is the training arguments' to say: set learning_rate there"),
        ({}, {"betas": (0.9, 0.9)}, "set adam_beta1 and adam_beta2 there"),
        ({}, {"in_backward": {"accumulate": 2}}, "set gradient_accumulation_steps there"),
        ({"optim": "galore_adamw"}, {}, "another optimizer, optim='galore_adamw'"),
        ({"optim_args": "rank=4"}, {}, "optim_args='rank=4' is for the Trainer's own"),
        ({"optim_target_modules": "all-linear"}, {}, "optim_target_modules='all-linear' is for"),
        ({}, {"groups": [{"params": "all-linear"}], "rank": 2}, "rank is given beside groups"),
        ({"adam_beta1": 0.8}, {"optimizer_class": torch.optim.SGD}, "SGD has no use for adam_beta1"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    extra: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    args = arguments(tmp_path, eps=1e-8)
    for name, value in extra.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(model(), args, **{"optimizer_class": GaLoreAdamW, **options})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("fp16", True, "loss scaling of fp16=True"),
        ("max_grad_norm", 0.5, r"set max_grad_norm=0 and in_backward={'max_norm': 0.5}"),
    ],
)
def test_what_cannot_be_honoured_in_backward_is_refused(name: str, value: Any, message: str, tmp_path: Path) -> None:
    args = arguments(tmp_path)
    setattr(args, name, value)
    with pytest.raises(ValueError, match=message):
        trainer_optimizer(model(), args, GaLoreAdamW, rank=2, in_backward=True)
