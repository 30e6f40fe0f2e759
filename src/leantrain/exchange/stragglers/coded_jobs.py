"""Several models trained in turn by n worker processes and a master that does not wait for the late ones.

    process 0         the master: holds every model and optimizer, computes no gradients
    process i + 1     worker i of the scheme

Job j is one optimizer step of model j mod M. In every round the master tells each worker that is free what to compute,
with the weights that it lacks. A round ends (1 + mu) times as long after its start as the first answer took, if the
scheme can do without those still missing; otherwise as soon as it can. Who is late finishes what it does, is told that
nobody wants it, sends nothing, and goes on with the round that is then open.

    sent to a worker      weights of each job once                            4 P bytes in float32
    sent by a worker      one vector per task, its coded loss with it         4 (P + 1) bytes each

A worker that dies is a straggler from then on. Where the scheme cannot do without its answer, a living worker that has
answered already computes it as well. Gradients are those of plain training up to rounding: see `Scheme.amplification`.

Each worker has a gloo group of its own with the master, and a thread there: a process that is late, hangs or is killed
holds up nobody else's connection.

Source: Krishnan, Ebrahimi and Khisti 2023 (Sequential Gradient Coding for Straggler Mitigation, ICLR), for the rule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from leantrain.errors import RunError, UsageError
from leantrain.exchange.stragglers.coded_master import DONE, FAILED, STOP, Link, Master, Report, flat, trained
from leantrain.exchange.stragglers.coding_scheme import Scheme

Loss = Callable[[nn.Module, int, slice], Tensor]
"""loss(model, job, examples): the SUM of the losses of these of the job's examples, 0-dim. A pure function of its
arguments, the weights and torch's random numbers: several workers compute the same piece and must find the same."""

WORST_ERROR = 1e-4
"""Largest relative error of a decoded gradient that is put up with."""


class CodedJobs:
    """Made in every process, with the same arguments; then `run` in every process.

    Args:
        scheme: who computes what, such as GC(4, 1) or MSGC(8, 1, 2, 3).
        models: M >= T + 1 independent models on the CPU, of one floating-point type. Weights are the master's.
        optimizers: one for each model; only the master's are used, so workers may pass none.
        loss: see `Loss`. Called in the workers, with torch's random numbers set by (seed, job, chunk).
        examples: how many examples a job has. `loss` is asked for slices of range(examples).
        mu: the grace that a round gives to the late ones, in times of the fastest answer. By default 1 where jobs have
            time to be made up for (T > 0), and 0 otherwise: then what is not needed is not waited for.
        seed: of the workers' random numbers.
        patience_s: seconds after which a worker that the scheme needs is stood in for by another.
        timeout_s: seconds after which a process that says nothing at all counts as dead.
        pause: called as pause(round, worker) in the worker's process before it computes, for tests and measurements.

    Raises:
        UsageError: too few models for the scheme, another number of processes than n + 1, BatchNorm, several types, or
            a code that would lose more than 1e-4 of the gradient to rounding.
    """

    def __init__(
        self,
        scheme: Scheme,
        models: Sequence[nn.Module],
        optimizers: Sequence[Optimizer],
        loss: Loss,
        examples: int,
        *,
        mu: float | None = None,
        seed: int = 0,
        patience_s: float = 60.0,
        timeout_s: float = 1800.0,
        pause: Callable[[int, int], None] | None = None,
    ) -> None:
        self.scheme, self.models, self.optimizers, self.loss = scheme, list(models), list(optimizers), loss
        self.examples, self.seed, self.patience_s, self.pause = examples, seed, patience_s, pause
        self.mu = (1.0 if scheme.delay else 0.0) if mu is None else mu
        self._check()
        self.rank = dist.get_rank()
        for model in self.models:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, 0)
        wait = timedelta(seconds=timeout_s)
        links: dict[int, Link] = {}
        for worker in range(scheme.n):
            group = dist.new_group([0, worker + 1], timeout=wait, backend="gloo")  # all processes have to call it
            if isinstance(group, dist.ProcessGroup) and self.rank in (0, worker + 1):
                links[worker] = Link(group, 0 if self.rank else worker + 1)
        self._links = links
        self._master = (
            Master(scheme, self.models, self.optimizers, links, examples, self.mu, patience_s)
            if self.rank == 0
            else None
        )

    def run(self, jobs: range) -> Report | None:
        """Train these jobs to the last one. Afterwards none is in flight, so models and optimizers may be saved.

        Args:
            jobs: consecutive job numbers; a later call goes on with the next ones.

        Returns:
            What happened, for the master; None for workers.

        Raises:
            UsageError: the range has another step than 1, or is empty.
            RunError: no worker is left, a gradient is not finite, or (in a worker) the master is gone.
        """
        if jobs.step != 1 or not jobs:
            raise UsageError(f"jobs must be a range of consecutive numbers, at least one, got {jobs}")
        if self._master:
            return self._master.run(jobs)
        try:
            self._work(self._links[self.rank - 1], jobs)
        except RuntimeError as error:
            if isinstance(error, RunError) or "gloo" not in str(error).lower():
                raise
            raise RunError(
                f"worker {self.rank - 1} has lost the master: {str(error).strip().splitlines()[0]}"
            ) from error
        return None

    def _work(self, master: Link, jobs: range) -> None:
        weights: dict[int, Tensor] = {}
        bounds = self.scheme.bounds(self.examples)
        while True:
            kind, number, worker, tasks, news = master.receive(5).tolist()
            if kind == STOP:
                return
            table = master.receive(tasks, 2).tolist()
            for job in master.receive(news).tolist() if news else ():
                weights[job] = master.receive(self._numel(job), dtype=self.dtype)
            try:
                if self.pause:
                    self.pause(number, worker)
                vectors = torch.cat([self._vector(job, part, weights[job], bounds) for job, part in table])
            except BaseException:
                master.send(torch.tensor([FAILED]))
                raise
            weights = {job: each for job, each in weights.items() if job >= jobs.start + number - self.scheme.delay}
            master.send(torch.tensor([DONE]))
            if master.receive(1).item():
                master.send(vectors)

    def _vector(self, job: int, part: int, weights: Tensor, bounds: list[int]) -> Tensor:
        """The coded gradient of a part of a job, and its coded loss: [P + 1]."""
        model = self._model(job)
        params = trained(model)
        for param, value in zip(params, weights.split([p.numel() for p in params]), strict=True):
            param.data.copy_(value.view_as(param))
            param.grad = None
        total = 0.0
        for chunk, coefficient in self.scheme.encode(part):
            if bounds[chunk] < bounds[chunk + 1]:
                torch.manual_seed(((self.seed * 1_000_003 + job) * 1_000_003 + chunk) % 2**63)
                loss = self.loss(model, job, slice(bounds[chunk], bounds[chunk + 1])) * coefficient
                loss.backward()
                total += loss.item()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
        return torch.cat([flat(grads), torch.tensor([total], dtype=self.dtype)])

    def _numel(self, job: int) -> int:
        return sum(param.numel() for param in trained(self._model(job)))

    def _model(self, job: int) -> nn.Module:
        return self.models[job % len(self.models)]

    def _check(self) -> None:
        scheme, models = self.scheme, self.models
        if len(models) <= scheme.delay:
            raise UsageError(
                f"{scheme} knows a gradient only T = {scheme.delay} rounds after its start, so it needs at least "
                f"T + 1 = {scheme.delay + 1} independent models in turn, got {len(models)}; "
                + ("one model alone can use GC" if len(models) == 1 else "GC works with any number")
            )
        types = {param.dtype for model in models for param in model.parameters()}
        if len(types) != 1 or any(param.device.type != "cpu" for model in models for param in model.parameters()):
            raise UsageError(f"models must be on the CPU and of one floating-point type, got {sorted(map(str, types))}")
        (self.dtype,) = types
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for model in models for module in model.modules()):
            raise UsageError("BatchNorm's statistics depend on who computes what; use GroupNorm or LayerNorm")
        if self.examples < 1 or self.mu < 0:
            raise UsageError(f"needs examples >= 1 and mu >= 0, got examples={self.examples}, mu={self.mu}")
        error = scheme.amplification * torch.finfo(self.dtype).eps
        if error > WORST_ERROR:
            raise UsageError(
                f"{scheme} decodes with a relative error of up to {error:.0e} in {self.dtype}, "
                f"above {WORST_ERROR:.0e}; "
                "choose s (or lam) such that s + 1 divides n or n + s is odd, or a wider type"
            )
        if not dist.is_initialized() or dist.get_world_size() != scheme.n + 1:
            world = dist.get_world_size() if dist.is_initialized() else 1
            raise UsageError(f"{scheme} needs n + 1 = {scheme.n + 1} processes, of which 0 is the master, got {world}")
