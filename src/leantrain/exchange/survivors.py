"""Going on without a lost process and without a restart: the step at hand is done again by those who are left.

A step's exchange is a row of jobs (one per bucket) on a gloo group. Nothing of it is used before all have it all:

    attempt    do a job; if the connection is lost, leave the group and only note the later jobs
    settle     one small all-reduce. It succeeds in a process only if every process has done all its jobs
    regroup    if anything failed: every survivor s says in the store (step_s, complete_s), then one list is fixed
    decide     some step_s = t + 1, or all complete_s  ->  everybody has step t: keep its results
               otherwise                               ->  nobody has gone past t: all drop them and do t again
    redo       the same jobs, from the same gradients, in a new group of the survivors, who divide by their number

Why that is safe: who is past step t has seen the all-reduce of t succeed, so every process had its results of t.
State that jobs stage is committed after `settle`, once, whether a step took one attempt or three. All survivors act
on the one list that was fixed first (compare-and-set), so they hold the same bits.

A process leaves a broken group at once, because its closed sockets are what tells those who are not its neighbours.
A silent process is waited for as long as it lives, up to the timeout: it may still be in its backward pass.

What must survive is the store through which all this is agreed. It is that of the default group, so it has to be held
by a process that trains nothing; see docs/elastic.md. A link that breaks between processes that all live is an error.

Costs: one all-reduce of 4 bytes per step, and the results of a step beside its gradients until it is settled.

The recipe follows the recovery by reconfigured groups of torchft (Meta, 2024), without its helper process.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from leantrain.errors import RunError
from leantrain.exchange.channel import Channel
from leantrain.lifeline import Lifeline, address_towards, knock
from leantrain.processes import is_lost_connection, timeout_s

Job = Callable[[], list[Tensor]]

_LOOK_AGAIN_S = 0.01


class Survivors:
    """The processes that are left, and the exchange of the step at hand. All processes make one at the same time.

    Args:
        channel: what the jobs send on; it gets another group, rank and size when a process is lost.
        on_lost: told the ranks of the default group that were lost, after each loss.

    Attributes:
        members: ranks of the default group that are left, in order.
    """

    def __init__(self, channel: Channel, on_lost: Callable[[list[int]], None] = lambda lost: None) -> None:
        self._channel, self._on_lost = channel, on_lost
        self._rank = dist.get_rank()
        self.members = list(range(dist.get_world_size()))
        self._patience_s = timeout_s() if channel.timeout_s is None else channel.timeout_s
        self._store = _store_of_the_default_group()
        self._lifeline = Lifeline(_own_address())
        self._store.set(f"lifeline/{self._rank}", self._lifeline.address)
        self._lifelines = {rank: self._store.get(f"lifeline/{rank}").decode() for rank in self.members}
        self._jobs: list[Job] = []
        self._results: list[list[Tensor]] = []
        self._lost = False
        self._step = self._epoch = 0

    def attempt(self, job: Job) -> None:
        """Do a job of this step, now and again if the step must be done again. All processes have the same jobs."""
        self._jobs.append(job)
        self._do(job)

    def settle(self, undo: Callable[[], None]) -> list[list[Tensor]]:
        """End the step; afterwards everybody who is left has these results.

        Args:
            undo: called before the jobs are done again: forgets what the last attempt has staged.

        Returns:
            What the jobs gave, in their order.

        Raises:
            RunError: the others have given this process up, the store is gone, or a link broke though all live.
        """
        try:
            while not self._everybody_has_it():
                undo()
                self._results = []
                for job in self._jobs:
                    self._do(job)
            self._step += 1
            return self._results
        finally:
            self._jobs, self._results = [], []

    def _do(self, job: Job) -> None:
        if self._lost:
            return
        try:
            self._results.append(job())
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            self._lost = True
        if self._lost:  # outside of the handler: the error's traceback holds the group
            self._leave()

    def _everybody_has_it(self) -> bool:
        """Whether all who are left have all results. If not, there is a new group to try again in."""
        complete = not self._lost
        if complete:
            self._do(self._meet)
            if not self._lost:
                self._results.pop()
                return True
        decided = self._regroup(complete)
        while not self._join():
            self._regroup(False)
        return decided

    def _meet(self) -> list[Tensor]:
        return [self._channel.all_reduce(torch.zeros(1))]

    def _leave(self) -> None:
        """Drop the group for good: with any reference left its sockets stay open, and others wait for the timeout."""
        group, self._channel.group = self._channel.group, None
        if group is not None:
            dist.destroy_process_group(group)

    def _join(self) -> bool:
        """Make the new group. False if another process was lost meanwhile."""
        try:
            self._channel.join(self.members)
            self._lost = False
        except RuntimeError as error:
            if not is_lost_connection(error):
                raise
            self._lost = True
        if self._lost:
            self._leave()
        return not self._lost

    def _regroup(self, complete: bool) -> bool:
        """Fix who is left; whether they all have this step."""
        try:
            reports = self._agree(complete)
        except dist.DistNetworkError as error:
            raise RunError(
                "a process was lost, and with it the store through which the others would have found together; "
                "let a process that trains nothing hold it"
            ) from error
        if self._rank not in reports:
            raise RunError(f"rank {self._rank} was too late: the others go on without it")
        lost = [rank for rank in self.members if rank not in reports]
        if not lost:
            raise RunError(f"a connection between ranks {', '.join(map(str, reports))} broke, and all of them live")
        self.members = sorted(reports)
        self._on_lost(lost)
        return to_keep(self._step, list(reports.values()))

    def _agree(self, complete: bool) -> dict[int, tuple[int, bool]]:
        """What each survivor said of itself, the same in all of them."""
        self._epoch += 1
        store, deadline = PrefixStore(str(self._epoch), self._store), time.monotonic() + self._patience_s
        store.set(str(self._rank), json.dumps([self._step, complete]))
        while not store.check(["list"]):
            silent = [rank for rank in self.members if not store.check([str(rank)])]
            if time.monotonic() > deadline or not self._any_alive(silent):
                said = {rank: json.loads(store.get(str(rank))) for rank in self.members if rank not in silent}
                store.compare_set("list", "", json.dumps(said))
            time.sleep(_LOOK_AGAIN_S)
        return {int(rank): (said[0], said[1]) for rank, said in json.loads(store.get("list")).items()}

    def _any_alive(self, ranks: list[int]) -> bool:
        answers = knock({rank: self._lifelines[rank] for rank in ranks})
        return any(answer == "connected" for answer in answers.values())


def to_keep(step: int, reports: list[tuple[int, bool]]) -> bool:
    """Whether a process that is at `step` keeps what it has of that step, which then all have.

    Args:
        reports: of each survivor, the step it is at, and whether it has all results of that step.
    """
    first = min(each for each, _ in reports)
    someone_is_past_it = any(each > first for each, _ in reports)
    return step == first and (someone_is_past_it or all(complete for _, complete in reports))


def _store_of_the_default_group() -> Store:
    """On a connection of its own: a waiting one blocks whoever shares it."""
    store: Any = dist.distributed_c10d._get_default_store()
    own = store.clone()
    assert isinstance(own, Store)
    return PrefixStore("survivors", own)


def _own_address() -> str:
    return address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "1")))
