"""Processes meet, lose one another with a name, and stop when asked."""

from __future__ import annotations

import os
import signal
import socket
import threading
from pathlib import Path

import pytest
import torch

from leantrain.errors import RunError, UsageError
from leantrain.processes import choose_device, joined, stop_on_signals
from tests.small_runs import Processes, free_port, small_recipe


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


def test_a_process_that_hangs_is_given_up_after_the_timeout(tmp_path: Path) -> None:
    recipe = small_recipe(steps=100_000)
    processes = Processes(2, [(recipe, tmp_path / "run")], tmp_path, LEANTRAIN_TIMEOUT_S="1")
    processes.until(lambda events: len(events) > 3)
    processes.signal(signal.SIGSTOP, rank=1)
    processes.workers[0].join(20)
    processes.signal(signal.SIGKILL, rank=1)
    assert processes.wait()[0] == 1
    assert "stopped answering rank 0" in processes.events()[-1]["message"]


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
