"""Processes meet, lose one another with a name, and stop when asked."""

from __future__ import annotations

import os
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from leantrain.errors import RunError, UsageError
from leantrain.processes import choose_device, joined, stop_on_signals
from leantrain.recipe import Component
from tests.small_runs import Forgetful, Processes, free_port, small_recipe


def test_one_process_alone_never_touches_torch_distributed() -> None:
    with joined("cpu") as world:
        assert (world.rank, world.size, world.first) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert world.highest(1.5, -2.0) == [1.5, -2.0]
        assert world.total({"a": 3.0}) == {"a": 3.0}


def test_a_dead_process_ends_the_others_with_one_line_that_names_it(tmp_path: Path) -> None:
    recipe = small_recipe(steps=100_000, batch_size=9, checkpoint_every=2)
    processes = Processes(3, [(recipe, tmp_path / "run")], tmp_path)
    processes.until(lambda events: len(events) > 3)
    processes.signal(signal.SIGKILL, rank=1)
    assert processes.wait() == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        message = next(event["message"] for event in processes.events(rank) if event["kind"] == "error")
        assert message.startswith(f"rank 1 of 3 stopped answering rank {rank}: ")
        assert "\n" not in message


class Stuck(Forgetful):
    """In the process STUCK it goes well for a few steps, and then forward never ends."""

    def forward(self, inputs: Tensor) -> Tensor:
        if self.passes > 5 and os.environ["RANK"] == os.environ["STUCK"]:
            if os.environ["HOW"] == "frozen":
                os.kill(os.getpid(), signal.SIGSTOP)
            while True:
                time.sleep(0.0 if os.environ["HOW"] == "spinning" else 1.0)
        return super().forward(inputs)


@pytest.mark.parametrize(("stuck", "how"), [(0, "frozen"), (1, "sleeping"), (2, "spinning")])
def test_a_process_that_hangs_is_named_by_all_others(stuck: int, how: str, tmp_path: Path) -> None:
    recipe = small_recipe(steps=100_000, batch_size=12, eval_every=0, model=Component("tests.test_processes.Stuck"))
    others = [rank for rank in range(4) if rank != stuck]
    processes = Processes(
        4, [(recipe, tmp_path / "run")], tmp_path, LEANTRAIN_TIMEOUT_S="2", STUCK=str(stuck), HOW=how
    )  # fmt: skip
    for rank in others:
        processes.workers[rank].join(40)
    processes.signal(signal.SIGKILL, rank=stuck)
    assert [processes.wait()[rank] for rank in others] == [1, 1, 1]
    where = "" if how == "frozen" else r"hangs \(in forward, test_processes.py line \d+\) and "
    for rank in others:
        expected = rf"rank {stuck} of 4 {where}stopped answering rank {rank}( \(|: )"
        assert re.match(expected, processes.events(rank)[-1]["message"]), processes.events(rank)[-1]


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        processes = Processes(1, [(small_recipe(), tmp_path)], tmp_path, WORLD_SIZE="2", MASTER_PORT=port)
        assert processes.wait() == [1]
    assert f"port 127.0.0.1:{port} is already taken; choose another" in processes.events()[-1]["message"]


def test_a_missing_first_process_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for name, value in {**address, "LEANTRAIN_TIMEOUT_S": "1"}.items():
        monkeypatch.setenv(name, value)
    expected = r"process 1 of 2 cannot meet the others at 127\.0\.0\.1:\d+: "
    with pytest.raises(RunError, match=expected) as found, joined("cpu"):
        pass
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(("name", "value"), [("WORLD_SIZE", "two"), ("RANK", "x"), ("LEANTRAIN_TIMEOUT_S", "-1")])
def test_variables_that_make_no_sense_are_named(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"{name} must be .* got '{value}'"), joined("cpu"):
        pass


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(UsageError, match="sees no CUDA GPU"):
        choose_device("cuda")
    assert choose_device("auto") == torch.device("cpu")


def test_signals_are_noted_and_the_old_handlers_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
        os.kill(os.getpid(), signal.SIGINT)  # at once, as torchrun passes it on: means nothing
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_later_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("leantrain.processes.time.monotonic", lambda: now[0])
    with stop_on_signals():
        signal.raise_signal(signal.SIGINT)
        now[0] += 2.0
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_train_without_handlers() -> None:
    before, found = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with stop_on_signals() as stop:
            found.append((stop.signal, signal.getsignal(signal.SIGTERM) is before))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(None, True)]
