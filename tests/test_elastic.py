"""torchrun starts the workers anew when one is lost, and the run ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leantrain.data import Batch
from leantrain.recipe import Component, recipe_to_dict
from leantrain.recipe.yaml import dump
from tests.small_runs import REPOSITORY, Tokens, checkpoint_tensors, free_port, log_without_times, small_recipe

STEPS, EVERY = 90, 10


class SlowTokens(Tokens):
    """Batches that take long enough for somebody to die in between."""

    def train_batch(self, seed: int, step: int, size: int) -> Batch:
        time.sleep(0.02)
        return super().train_batch(seed, step, size)


class Launched:
    """torchrun's agents, each with its workers, that train one recipe in `folder`/run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.out = folder, folder / "run"
        recipe = small_recipe(
            steps=STEPS, checkpoint_every=EVERY, batch_size=12, eval_every=0, log_every=1,
            data=Component("tests.test_elastic.SlowTokens"),
        )  # fmt: skip
        (folder / "recipe.yaml").write_text(dump(recipe_to_dict(recipe)))
        self.agents: list[subprocess.Popen[bytes]] = []

    def torchrun(self, *options: str) -> None:
        """Start one more agent."""
        with (self.folder / f"agent-{len(self.agents)}.txt").open("wb") as said:
            self.agents.append(
                subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", "--monitor-interval=0.1", *options,
                     "-m", "leantrain", "train", "recipe.yaml", "--out", "run", "--allow", "tests"],
                    stdout=said, stderr=subprocess.STDOUT, cwd=self.folder,
                    env={**os.environ, "PYTHONPATH": f"{REPOSITORY / 'src'}:{REPOSITORY}", "OMP_NUM_THREADS": "1"},
                )
            )  # fmt: skip

    def workers(self) -> dict[int, tuple[int, int]]:
        """{rank: (number of the agent, process id)} of the workers that live."""
        found = {}
        for number, agent in enumerate(self.agents):
            children = Path(f"/proc/{agent.pid}/task/{agent.pid}/children")
            for child in map(int, children.read_text().split() if agent.poll() is None else ()):
                try:
                    environment = Path(f"/proc/{child}/environ").read_text()
                except (FileNotFoundError, ProcessLookupError):  # it ended just now
                    continue
                variables = dict(each.partition("=")[::2] for each in environment.split("\0"))
                if "LOCAL_RANK" in variables:
                    found[int(variables["RANK"])] = (number, child)
        return found

    def newest(self) -> int:
        """The step of the newest checkpoint, 0 without one."""
        return max((int(each.name[5:]) for each in (self.out / "checkpoints").glob("step-*")), default=0)

    def until(self, condition: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.02)

    def wait(self, seconds: float = 120) -> list[int]:
        """The agents' exit statuses."""
        self.until(lambda: all(agent.poll() is not None for agent in self.agents), seconds)
        return [agent.returncode for agent in self.agents]

    def said(self) -> str:
        return "\n".join(file.read_text() for file in sorted(self.folder.glob("agent-*.txt")))

    def stop(self) -> None:
        for _, worker in self.workers().values():
            os.kill(worker, signal.SIGKILL)
        for agent in self.agents:
            agent.kill()
            agent.wait()


@pytest.fixture
def launched(tmp_path: Path) -> Iterator[Launched]:
    launched = Launched(tmp_path)
    yield launched
    launched.stop()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launched]:
    launched = Launched(tmp_path_factory.mktemp("undisturbed"))
    launched.torchrun("--standalone", "--nproc-per-node=3")
    assert launched.wait() == [0], launched.said()
    yield launched


def same_end(one: Launched, other: Launched) -> bool:
    ends = [checkpoint_tensors(each.out, STEPS) for each in (one, other)]
    return ends[0].keys() == ends[1].keys() and all(bool((ends[0][name] == ends[1][name]).all()) for name in ends[0])


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_no_bit(
    launched: Launched, undisturbed: Launched
) -> None:
    launched.torchrun("--standalone", "--nproc-per-node=3", "--max-restarts=3")
    for rank, after in ((1, EVERY), (0, 4 * EVERY)):
        launched.until(lambda after=after: launched.newest() >= after and len(launched.workers()) == 3)  # type: ignore[misc]
        os.kill(launched.workers()[rank][1], signal.SIGKILL)
        died = time.monotonic()
        left = {pid for _, pid in launched.workers().values()}
        launched.until(lambda left=left: not left & {pid for _, pid in launched.workers().values()})  # type: ignore[misc]
        assert time.monotonic() - died < 20
    assert launched.wait() == [0], launched.said()
    assert launched.said().count("going on from step") == 2
    assert same_end(launched, undisturbed)
    assert log_without_times(launched.out) == log_without_times(undisturbed.out)


def test_with_several_agents_the_others_go_on_when_one_of_them_is_killed(
    launched: Launched, undisturbed: Launched
) -> None:
    """A worker is killed first, and all three begin anew; then an agent with its worker, and two go on."""
    port = free_port()
    options = (
        "--nnodes=1:4", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=test",
        f"--rdzv-endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1",
        "--rdzv-conf=last_call_timeout=8,keep_alive_interval=1,keep_alive_max_attempt=5",
    )  # fmt: skip
    launched.torchrun(*options)
    launched.until(lambda: listens(port))  # so that it is the first agent that holds the rendezvous
    for _ in range(2):
        launched.torchrun(*options)
    launched.until(lambda: launched.newest() >= EVERY)
    assert "in 3 processes" in launched.said()
    os.kill(launched.workers()[2][1], signal.SIGKILL)
    launched.until(lambda: "in 3 processes (going on from step" in launched.said())
    # Neither the agent with the rendezvous nor that of rank 0: the job does not outlive these.
    number, worker = next(launched.workers()[rank] for rank in (1, 2) if launched.workers()[rank][0] != 0)
    os.kill(launched.agents[number].pid, signal.SIGKILL)
    os.kill(worker, signal.SIGKILL)
    ends = launched.wait()
    assert [ends[each] for each in range(3) if each != number] == [0, 0], launched.said()
    assert "in 2 processes (going on from step" in launched.said()
    steps = [line["step"] for line in log_without_times(launched.out)]
    assert [step for step in steps if step < STEPS] == list(range(1, STEPS))
    last = [log_without_times(each.out)[-2]["loss"] for each in (launched, undisturbed)]
    assert last[0] == pytest.approx(last[1], rel=1e-3)  # the sum over examples is taken in another order


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
