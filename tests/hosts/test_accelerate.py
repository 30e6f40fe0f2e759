"""Accelerate, the real one: what it clips, accumulates, schedules and saves is what a loop by hand does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from leantrain.optim import GaLoreAdamW, parameter_groups
from leantrain.optim.in_backward import step_in_backward
from tests.hosts.plain_loop import BATCH, CHANGES, DEFAULTS, REFRESH, STEPS, Run, examples, factor, model, plain_loop

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
pytest.importorskip("transformers", reason="the model is one of transformers")


def train(
    folder: Path | None = None, *, stop: int = STEPS, resume: bool = False, in_backward: bool = False, **settings: Any
) -> Run:
    """`STEPS` steps, or as many as `stop`; their checkpoint is saved in `folder`, and taken up again with `resume`."""
    s = DEFAULTS | settings
    trained = model()
    groups = parameter_groups(trained, [{"params": "all-linear", "rank": s["rank"]}], no_decay=True)
    optimizer: Any = GaLoreAdamW(
        groups, lr=s["lr"], betas=s["betas"], eps=s["eps"], weight_decay=s["weight_decay"], refresh=REFRESH
    )
    if in_backward:
        exact = {"clip": "exact", "basis_from": "whole"}
        optimizer = step_in_backward(trained, optimizer, accumulate=s["accumulate"], max_norm=s["max_norm"], **exact)
    scheduler = LambdaLR(optimizer, factor)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=s["accumulate"])
    data = DataLoader(examples(STEPS * s["accumulate"] * BATCH), batch_size=BATCH)  # type: ignore[arg-type]
    trained, optimizer, scheduler, data = accelerator.prepare(trained, optimizer, scheduler, data)
    if resume:
        accelerator.load_state(str(folder))
        data = accelerator.skip_first_batches(data, stop * s["accumulate"])
    run = Run({})
    for batch in data:
        with accelerator.accumulate(trained):
            accelerator.backward(trained(input_ids=batch, labels=batch).loss)
            if accelerator.sync_gradients:
                limit = float("inf") if s["max_norm"] is None or in_backward else s["max_norm"]
                norm = accelerator.clip_grad_norm_(trained.parameters(), limit)
                run.lrs.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            run.norms.append(float(optimizer.optimizer.grad_norm if in_backward else norm))
        if not resume and len(run.norms) == stop:
            break
    if folder is not None and not resume:
        accelerator.save_state(str(folder))
    return Run.of(trained, run.lrs, run.norms)


each_way = pytest.mark.parametrize("in_backward", [False, True], ids=["ordinary", "in backward"])


@each_way
@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_does_what_it_does_in_a_loop(change: str, in_backward: bool) -> None:
    ours, loop = train(in_backward=in_backward, **CHANGES[change]), plain_loop(**CHANGES[change])
    assert ours.distance(loop) < 1e-5
    assert ours.lrs == pytest.approx(loop.lrs)
    assert ours.norms == pytest.approx(loop.norms, rel=0.2 if in_backward and change == "accumulation" else 1e-4)
    if change != "nothing":
        assert loop.distance(plain_loop()) > 1e-3  # otherwise this test could not fail


@each_way
def test_stopping_and_going_on_is_bit_for_bit_never_stopping(in_backward: bool, tmp_path: Path) -> None:
    settings = {"weight_decay": 0.5, "max_norm": 0.1, "accumulate": 2, "in_backward": in_backward}
    whole = train(**settings)
    begun = train(tmp_path, stop=4, **settings)
    resumed = train(tmp_path, stop=4, resume=True, **settings)
    assert resumed.distance(whole) == 0 and begun.distance(whole) > 1e-3
    assert (begun.lrs + resumed.lrs, begun.norms + resumed.norms) == (whole.lrs, whole.norms)
    saved = torch.load(tmp_path / "optimizer.bin", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for state in saved["state"].values() for value in state.values())


@each_way
def test_a_checkpoint_of_another_rank_is_refused(in_backward: bool, tmp_path: Path) -> None:
    train(tmp_path, stop=1, in_backward=in_backward)
    with pytest.raises(ValueError, match=r"basis of shape \(16, 4\).*need \(16, 3\)"):
        train(tmp_path, stop=1, resume=True, in_backward=in_backward, rank=3)
