"""The training loop: a step is one trip from left to right.

    data ──► nn ──► learn ──► exchange ──► optim          ledger watches every station

Everything random in a step is decided by (seed, step, process), and its batch is a pure function of (seed, step). So a
checkpoint keeps no generator, and a run that was stopped and went on is bit for bit the run that never stopped.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from leantrain import checkpoint, combinations
from leantrain.analysis.probe import probe
from leantrain.data import Data
from leantrain.errors import RunError, UsageError
from leantrain.evaluation import evaluate
from leantrain.exchange import Exchange, Share
from leantrain.finite import FiniteGuard
from leantrain.journal import PROBED, Journal, OnEvent, RunResult, Status
from leantrain.learn import checkpoint_activations
from leantrain.ledger import record
from leantrain.ledger.environment import describe
from leantrain.ledger.ledger import Ledger
from leantrain.optim.in_backward import InBackward, step_in_backward
from leantrain.optim.schedules import schedule
from leantrain.processes import World, joined, stop_on_signals
from leantrain.progress import Progress, check_same_recipe
from leantrain.recipe import (
    Recipe,
    build_data,
    build_exchange,
    build_learner,
    build_model,
    build_optimizers,
    recipe_to_dict,
)  # fmt: skip
from leantrain.recipe.yaml import dump
from leantrain.snapshot import is_sharded
from leantrain.trackers import check_trackers

__all__ = ["RunResult", "train"]


def train(
    recipe: Recipe, out: Path | str, *,
    resume: bool = True, on_event: OnEvent = lambda event: None,
) -> RunResult:  # fmt: skip
    """Train as `recipe` says, in the folder `out`, going on from its newest intact checkpoint if there is one.

    Args:
        recipe: what to train.
        out: the run's folder: recipe.yaml, log.jsonl, checkpoints/, tensorboard/, result.json.
        resume: False throws away what `out` holds of an earlier run and begins anew.
        on_event: called with a dict for every event; its `kind` is start, step, eval, checkpoint, note or end.

    Returns:
        How the run ended: "finished", or "interrupted" by SIGTERM or Ctrl-C after saving a checkpoint.

    Raises:
        UsageError: the recipe cannot be trained, or `out` holds a run of another recipe.
        RunError: a loss or gradient that is not finite, a full disk, a lost process. What was saved is still there.
    """
    check_trackers(recipe.trackers)
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    with joined(recipe.device) as world, stop_on_signals() as stop:
        run = Run(recipe, world, Journal(Path(out), on_event, writes=world.first))
        try:
            run.begin(resume)
            with run.ledger or nullcontext():
                status = run.to_the_end(stop_requested=lambda: stop.signal is not None)
        except Exception:
            with suppress(OSError):  # the disk may be what failed
                run.end("failed")
            raise
        return run.end(status)


class Run:
    """The stations of a step, built from a recipe, and the loop over them."""

    def __init__(self, recipe: Recipe, world: World, journal: Journal) -> None:
        self.recipe, self.world, self.journal = recipe, world, journal
        self.exchange: Exchange = build_exchange(recipe)
        combinations.check_processes(recipe, world, self.exchange)
        self.data: Data = build_data(recipe)
        if recipe.max_tokens is not None and self.data.task != "next_token":
            raise UsageError(f"max_tokens={recipe.max_tokens} needs tokens, and {recipe.data.class_path} gives none")
        self.model = build_model(recipe, self.data).to(world.device)
        if recipe.activation_checkpointing:
            checkpoint_activations(self.model)
        self.learner = build_learner(recipe, self.model, self.data)
        combinations.check_learner(recipe, world, self.learner)
        combinations.check_probes(recipe, self.data)
        self.attached = self.exchange.attach(self.learner.module)
        self.learner.attach(self.attached)
        self.exchange.join(self.learner)
        if recipe.compile:
            self.attached.compile()
        self.entered = 0.0
        self.learner.enter(self.entered)
        self.in_backward: InBackward | None = None
        self.make_optimizers()
        self.ledger = Ledger(self.attached, self.optimizers) if recipe.ledger else None
        self.factor = schedule(recipe.schedule, steps=recipe.steps, warmup=recipe.warmup, min_ratio=recipe.min_lr)
        self.progress = Progress(recipe, world)
        self.guard = FiniteGuard()
        self.norm = torch.zeros(())
        self.saved: Path | None = None
        self.savable, self.stopping = True, False
        self.problem: str | None = None
        self.evaluated_at = self.probed_at = -1

    def make_optimizers(self) -> None:
        """Optimizers of what the learner trains in its present stage, at the recipe's rates."""
        recipe = self.recipe
        self.stage, self.parts = self.learner.stage, self.learner.parts
        staged = self.learner.stages > 1
        self.optimizers = build_optimizers(recipe, self.learner.module, self.parts, staged=staged)
        self.exchange.connect(self.optimizers)
        if self.in_backward is not None:
            self.in_backward.remove()
        if recipe.step_in_backward:
            (whole,) = self.optimizers
            self.in_backward = step_in_backward(
                self.learner.module, whole, accumulate=recipe.accumulate, max_norm=recipe.clip
            )
            self.optimizers = [self.in_backward]
        self.base_lr = [float(group["lr"]) for group in self.groups()]
        self.trained = [param for group in self.groups() for param in group["params"]]

    def to_the_end(self, stop_requested: Callable[[], bool]) -> Status:
        """Step until the budget is spent or somebody asks to stop. A step's checkpoint comes before its evaluation, so
        that stopping is quick; an evaluation that was missed is made up for when the run goes on."""
        recipe, progress = self.recipe, self.progress
        while True:
            if self.stopping and not progress.finished:
                return "interrupted"
            if (progress.finished or self.due(recipe.eval_every)) and self.evaluated_at < progress.step:
                self.evaluate()
            if self.probed_at < progress.step and self.probe_due():
                self.probe()
            if progress.finished:
                return "finished"
            self.step(stop_requested)
            if progress.finished or self.due(recipe.log_every):
                self.log()
            if progress.finished or self.due(recipe.checkpoint_every) or self.stopping:
                self.save()

    def step(self, stop_requested: Callable[[], bool]) -> None:
        """One optimizer step on one global batch, `batch_size` examples over all processes."""
        started, recipe, number, world = time.perf_counter(), self.recipe, self.progress.step, self.world
        with record.phase("data"):
            everyones = self.data.train_batch(recipe.seed, number, recipe.batch_size)
            shares = self.exchange.shares(everyones, world.rank, world.size, recipe.accumulate)
            shares = [replace(share, batch=share.batch.to(world.device)) for share in shares]
        self.set_rates()
        loss, used = self.find_gradients(shares)
        examples = round(used * len(everyones))
        with record.phase("update"):
            if self.in_backward is not None:  # the weights have moved already; this ends their step
                self.in_backward.step()
            self.norm = self.in_backward.grad_norm if self.in_backward is not None else _total_norm(self.trained)
            self.agree(self.guard.watch(number + 1, loss, self.norm), stop_requested())
            if self.in_backward is None:
                self.apply_gradients()
        with record.phase("exchange"):
            self.exchange.after_step(last=self.progress.spent(steps=1, tokens=everyones.tokens) >= 1)
        record.add("bytes_sent", self.exchange.bytes_sent_per_step(self.attached, world.size, recipe.accumulate))
        if self.ledger is not None:
            self.ledger.step_done(examples=examples, tokens=everyones.tokens)
        self.progress.stepped(loss, everyones.tokens, examples, time.perf_counter() - started)

    def find_gradients(self, shares: Sequence[Share]) -> tuple[Tensor, float]:
        """Fill `.grad` from this process's shares of the batch, one after another, and exchange it.

        Returns:
            The mean loss of this process's shares, or of the whole batch where the exchange knows it; and the part of
            the shares' examples that was used.
        """
        loss, used, place = torch.zeros((), device=self.world.device), 0, None
        for number, share in enumerate(shares, start=1):
            if share.place != place:
                place = share.place
                _seed_everything(self.recipe.seed, self.progress.step, place, self.world.device)
            with self.exchange.gradient_sync(self.attached, enabled=number == len(shares)):
                result = self.learner.step(share.batch, weight=share.weight)
                if number == len(shares):
                    self.learner.hand_over()
            loss = loss + share.weight * result.loss
            used += result.examples_used
        with record.phase("exchange"):
            self.exchange.tell_loss(loss)
            self.exchange.finish_gradients()
        return self.exchange.known_loss(), used / sum(len(share.batch) for share in shares) if shares else 1.0

    def enter_stage(self, spent: float) -> float:
        """Let the learner decide what it trains now; returns where its schedule stands, in steps."""
        self.entered, place = spent, self.learner.enter(spent)
        if self.learner.stage != self.stage:
            self.make_optimizers()
            if self.ledger is not None:
                self.ledger.watch(self.optimizers)
        return self.progress.position() if place == spent else place * self.recipe.steps

    def set_rates(self) -> None:
        """The schedule's learning rates for this step."""
        factor = self.factor(self.enter_stage(self.progress.spent()))
        for group, base_lr in zip(self.groups(), self.base_lr, strict=True):
            if isinstance(group["lr"], Tensor):  # some optimizers (torchao's) have compiled this very tensor in
                group["lr"].fill_(base_lr * factor)
            else:
                group["lr"] = base_lr * factor

    def apply_gradients(self) -> None:
        """Clip what is in `.grad`, step, and clear it."""
        if self.recipe.clip is not None and self.exchange.clips:
            if len(self.parts) == 1:
                clip_grads_with_norm_(self.trained, self.recipe.clip, self.norm)
            else:
                for part in self.parts:  # each as if it were trained alone
                    clip_grads_with_norm_(part.params, self.recipe.clip, _total_norm(part.params))
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def agree(self, problem: str | None, stop: bool, always: bool = False) -> None:
        """All processes count time and stop together, and one number that is not finite ends the run in all of them.
        Where they do not meet in every step, all of this waits until they do; with `always` they meet now."""
        self.problem = self.problem or problem
        worst = self.exchange.agree([stop or self.stopping, self.progress.seconds, self.problem is not None], always)
        if worst is None:
            return
        self.stopping, self.progress.agreed_seconds = bool(worst[0]), worst[1]
        if worst[2]:
            last = f"the last good checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
            raise RunError(f"{self.problem or 'another process found a loss that is not finite'}; {last}")

    def due(self, every: int) -> bool:
        """Whether something is due after this step that happens `every` so many, 0 meaning never."""
        return every > 0 and self.progress.step > 0 and self.progress.step % every == 0

    # What surrounds the steps. It counts neither as training time nor in the ledger.

    def begin(self, resume: bool) -> None:
        """Go on from the newest intact checkpoint, or start at step 0."""
        folder = self.journal.folder / "checkpoints"
        self.saved = checkpoint.newest_intact(folder, self.journal.note) if resume else None
        step, extra = checkpoint.read_state(self.saved) if self.saved else (0, {})
        newest, oldest = self.world.highest(step, -step)
        if newest != -oldest:
            raise RunError(f"processes see different checkpoints in {folder}; it must be on a disk that they share")
        if self.saved is not None:
            check_same_recipe(self.recipe, extra["progress"], self.saved)
            self.progress.restore(extra["progress"])
            # As before the checkpoint's last step, because it has the optimizers of that step's stage.
            self.enter_stage(extra.get("entered", 0.0))
            checkpoint.load(self.saved, self.model, self.optimizers, self.exchange, self.learner)
            self.journal.notes.extend(extra["notes"])
            if self.ledger is not None and extra["ledger"] is not None:
                self.ledger.load_state_dict(extra["ledger"])
        elif self.world.first:
            shutil.rmtree(folder, ignore_errors=True)
        self.journal.open(step, recipe_to_dict(self.recipe), dump(recipe_to_dict(self.recipe)))
        if self.recipe.clip is not None and not self.exchange.clips:
            exchange = type(self.exchange).__name__
            self.journal.note(f"clip={self.recipe.clip} is left out: what {exchange} gives has no norm to clip")
        self.arrange_buckets()
        last = self.world.highest(self.journal.last("val_loss"), self.journal.last(PROBED))
        self.evaluated_at, self.probed_at = map(int, last)
        self.journal.tell(
            "start", name=self.recipe.name, step=step, steps=self.recipe.steps, parameters=self.parameters(),
            device=str(self.world.device), world=self.world.size,
        )  # fmt: skip

    def arrange_buckets(self) -> None:
        """A backward pass for nothing, in three processes and more. DDP lays out its buckets anew after a process's
        first, and where in a bucket a number is decides in which order a ring adds its parts. So the first step of a
        run that goes on adds as that step of the run that was never stopped. Exchanges with state of their own add in
        an order of their own."""
        if self.world.size < 3 or not isinstance(self.attached, DistributedDataParallel) or self.exchange.state_dict():
            return
        batch = self.data.train_batch(self.recipe.seed, 0, self.recipe.batch_size)
        share = self.exchange.shares(batch, self.world.rank, self.world.size, self.recipe.accumulate)[0]
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        self.learner.step(share.batch.to(self.world.device), weight=0.0)
        self.learner.hand_over()
        for buffer, before in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(before)
        self.attached.zero_grad()

    def log(self) -> None:
        """One line: the mean loss since the line before, and where things stand."""
        with self.unmeasured():
            self.journal.line("step", {
                "step": self.progress.step, "loss": self.progress.take_mean_loss(self.exchange.knows_loss),
                "lr": float(self.groups()[0]["lr"]),
                "grad_norm": self.norm.item(), "tokens": self.progress.tokens, "examples": self.progress.examples,
                "seconds": self.progress.seconds,
                **{f"exchange/{name}": value for name, value in self.exchange.metrics().items()},
            })  # fmt: skip

    def evaluate(self) -> None:
        """One line about the held-out data, in forward passes as large as those of training."""
        parts = self.recipe.accumulate * self.world.size
        limit = None if self.recipe.eval_batches is None else self.recipe.eval_batches * parts
        with self.unmeasured(), self.exchange.consensus():
            found = evaluate(
                self.learner, self.data, self.world, self.recipe.batch_size // parts, limit,
                in_nats=self.recipe.loss is None,
            )  # fmt: skip
            counts = {"tokens": self.progress.tokens, "seconds": self.progress.seconds}
            self.journal.line("eval", {"step": self.progress.step, **found, **counts})
        self.evaluated_at = self.progress.step

    def probe_due(self) -> bool:
        """Before the first step, when it is time, and at the end; never where nobody asked for it."""
        every, progress = self.recipe.probe_every, self.progress
        return every > 0 and (progress.step == 0 or progress.finished or self.due(every))

    def probe(self) -> None:
        """One line about what the hidden layers do, on held-out data that are drawn once and for all."""
        size = self.recipe.batch_size // (self.recipe.accumulate * self.world.size)
        with self.unmeasured(), self.exchange.consensus():
            found = probe(self.model, self.data.eval_batches(size), shuffle=True)
            self.journal.line("probe", {"step": self.progress.step, **found.scalars()})
        self.probed_at = self.progress.step

    def save(self) -> None:
        """A checkpoint of this step. An optimizer that cannot be saved ends checkpoints with a note, not the run."""
        if not self.savable:
            return
        with self.unmeasured():
            self.agree(self.guard.settle(), self.stopping, always=True)
            self.journal.flush()
            ledger = self.ledger.state_dict() if self.ledger is not None else None
            extra = {
                "progress": self.progress.to_dict(), "notes": self.journal.notes, "ledger": ledger,
                "entered": self.entered,
            }  # fmt: skip
            folder, step = self.journal.folder / "checkpoints", self.progress.step
            try:
                self.saved = checkpoint.save(
                    folder, step, self.model, self.optimizers, extra,
                    keep=self.recipe.keep, exchange=self.exchange, learner=self.learner,
                )  # fmt: skip
            except checkpoint.UnsavableState as error:
                self.savable = False
                self.journal.note(f"this run cannot be resumed: {error}")
            else:
                self.journal.tell("checkpoint", step=step, path=str(self.saved))

    def end(self, status: Status) -> RunResult:
        """Write down how the run stands and close its journal."""
        progress = self.progress
        result = RunResult(
            name=self.recipe.name, seed=self.recipe.seed, status=status, steps=progress.step, tokens=progress.tokens,
            examples=progress.examples, seconds=progress.seconds, parameters=self.parameters(),
            final=self.journal.final(), curve=self.journal.curve(), probes=self.journal.probes(),
            ledger=self.ledger.summary() if self.ledger is not None and progress.step > 0 else None,
            environment=describe(), recipe=recipe_to_dict(self.recipe), notes=self.journal.notes,
        )  # fmt: skip
        self.journal.close(result)
        return result

    def groups(self) -> list[dict[str, Any]]:
        """Every optimizer's parameter groups. Asked for anew each time: loading a state replaces the dicts."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def unmeasured(self) -> AbstractContextManager[object]:
        return self.ledger.pause() if self.ledger is not None else nullcontext()

    def parameters(self) -> int:
        return sum(param.numel() for param in self.model.parameters())


def _seed_everything(seed: int, step: int, place: int, device: torch.device) -> None:
    """Dropout and the like draw other numbers in every step and share, and the same ones whenever it is repeated."""
    digest = hashlib.blake2b(f"{seed}/{step}/{place}".encode(), digest_size=8).digest()
    number = int.from_bytes(digest, "big")
    torch.default_generator.manual_seed(number)  # torch.manual_seed does the same in 300 times as many microseconds
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(number)


def _total_norm(params: Sequence[Tensor]) -> Tensor:
    """Norm of the whole gradient, also where processes hold only parts of it."""
    norm = get_total_norm([param.grad for param in params if param.grad is not None])
    return norm.full_tensor() if is_sharded(norm) else norm
