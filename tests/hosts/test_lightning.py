"""Lightning, the real one: what it clips, accumulates, schedules, logs and saves is what a loop by hand does."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from leantrain.optim import GaLoreAdamW, parameter_groups
from leantrain.optim.in_backward import step_in_backward
from tests.hosts.plain_loop import BATCH, CHANGES, DEFAULTS, REFRESH, STEPS, Run, examples, factor, model, plain_loop

pytest.importorskip("transformers", reason="the model is one of transformers")
lightning = pytest.importorskip("lightning", reason="lightning is not installed")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*(does not have many workers|was configured so|GPU available|litlogger):"
)

EXACT = {"clip": "exact", "basis_from": "whole"}


class Module(lightning.LightningModule):  # type: ignore[name-defined]
    """A model and the optimizer that `settings`, in the words of plain_loop.py, ask for."""

    def __init__(self, settings: dict[str, Any], in_backward: bool) -> None:
        super().__init__()
        self.trained, self.settings, self.in_backward = model(), settings, in_backward

    def training_step(self, batch: Tensor) -> Tensor:
        return self.trained(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        s = self.settings
        groups = parameter_groups(self.trained, [{"params": "all-linear", "rank": s["rank"]}], no_decay=True)
        optimizer: Any = GaLoreAdamW(
            groups, lr=s["lr"], betas=s["betas"], eps=s["eps"], weight_decay=s["weight_decay"], refresh=REFRESH
        )
        if self.in_backward:
            optimizer = step_in_backward(
                self.trained, optimizer, accumulate=s["accumulate"], max_norm=s["max_norm"], **EXACT
            )
        return [optimizer], [{"scheduler": LambdaLR(optimizer, factor), "interval": "step"}]

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if not self.in_backward:
            self.log("grad_norm", lightning.pytorch.utilities.grad_norm(self, norm_type=2)["grad_2.0_norm_total"])

    def on_train_batch_end(self, outputs: Any, batch: Tensor, batch_idx: int) -> None:
        if self.in_backward and (batch_idx + 1) % self.settings["accumulate"] == 0:
            self.log("grad_norm", self.optimizers().grad_norm)


def train(
    folder: Path,
    *,
    stop: int = STEPS,
    epoch: int = STEPS,
    resume: bool = False,
    in_backward: bool = False,
    **settings: Any,
) -> Run:
    """`STEPS` steps, or as many as `stop`; their checkpoint is saved in `folder`, and taken up again with `resume`.

    Data are gone through in epochs of `epoch` steps: Lightning goes on properly after whole ones only.
    """
    s = DEFAULTS | settings
    logger = lightning.pytorch.loggers.CSVLogger(folder, version="resumed" if resume else str(stop))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=(STEPS if resume else stop) // epoch,
        gradient_clip_val=None if in_backward else s["max_norm"],
        accumulate_grad_batches=s["accumulate"],
        log_every_n_steps=1,
        logger=logger,
        callbacks=[lightning.pytorch.callbacks.LearningRateMonitor("step")],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Module(s, in_backward)
    data = DataLoader(examples(epoch * s["accumulate"] * BATCH), batch_size=BATCH)  # type: ignore[arg-type]
    checkpoint = {"ckpt_path": str(folder / "stopped.ckpt"), "weights_only": True} if resume else {}
    trainer.fit(module, data, **checkpoint)
    if not resume:
        trainer.save_checkpoint(folder / "stopped.ckpt")
    logger.save()
    with (Path(logger.log_dir) / "metrics.csv").open() as file:
        logged = list(csv.DictReader(file))
    # Of the micro-batches of a step, Lightning logs the rate before each.
    key = next(key for key in logged[0] if key.startswith("lr-") and key.endswith("/pg1"))
    lrs = {row["step"]: float(row[key]) for row in logged if row[key]}
    return Run.of(module.trained, list(lrs.values()), [float(row["grad_norm"]) for row in logged if row["grad_norm"]])


each_way = pytest.mark.parametrize("in_backward", [False, True], ids=["ordinary", "in backward"])


@each_way
@pytest.mark.parametrize("change", CHANGES)
def test_a_setting_does_what_it_does_in_a_loop(change: str, in_backward: bool, tmp_path: Path) -> None:
    ours, loop = train(tmp_path, in_backward=in_backward, **CHANGES[change]), plain_loop(**CHANGES[change])
    assert ours.distance(loop) < 1e-5
    assert ours.lrs == pytest.approx(loop.lrs)
    assert ours.norms == pytest.approx(loop.norms, rel=0.2 if in_backward and change == "accumulation" else 1e-4)
    if change != "nothing":
        assert loop.distance(plain_loop()) > 1e-3  # otherwise this test could not fail


@each_way
def test_stopping_and_going_on_is_bit_for_bit_never_stopping(in_backward: bool, tmp_path: Path) -> None:
    settings = {"weight_decay": 0.5, "max_norm": 0.1, "accumulate": 2, "in_backward": in_backward, "epoch": 2}
    whole = train(tmp_path, **settings)
    begun = train(tmp_path, stop=4, **settings)
    resumed = train(tmp_path, resume=True, **settings)
    assert resumed.distance(whole) == 0 and begun.distance(whole) > 1e-3
    assert begun.lrs + resumed.lrs == whole.lrs
    assert begun.norms + resumed.norms == whole.norms


@each_way
def test_a_checkpoint_of_another_rank_is_refused(in_backward: bool, tmp_path: Path) -> None:
    train(tmp_path, in_backward=in_backward)
    with pytest.raises(ValueError, match=r"basis of shape \(16, 4\).*need \(16, 3\)"):
        train(tmp_path, resume=True, in_backward=in_backward, rank=3)
