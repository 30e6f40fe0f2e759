"""Checkpoints: bit for bit, whole or not at all, and never of something else."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from leantrain import checkpoint
from leantrain.errors import RunError, UsageError
from leantrain.optim import GaLoreAdamW
from tests.small_runs import Forgetful, OpaqueSGD

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


class Odd(torch.optim.Optimizer):
    """Keeps state of every kind a checkpoint promises to hold."""

    def __init__(self, params: Any, lr: float = 0.1) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), "note": None})
        self.made = 0

    def fill(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.state["shared"] = {"calls": 7, "table": torch.rand(3, generator=generator)}
        for group in self.param_groups:
            for param in group["params"]:
                stack = torch.rand(2, *param.shape, generator=generator)
                self.state[param] = {
                    "step": torch.tensor(3.0, dtype=torch.float64),
                    "codes": (param.detach() * 100).to(torch.uint8),
                    "exact": stack[0].double() / 3,
                    "view": stack[1].T if param.ndim == 2 else stack[1],
                    "half": stack[1].bfloat16(),
                    "number": 0.1,
                    "none": None,
                    "list": [torch.zeros(0), 1, (stack[0], "text", {2: stack[1]})],
                    "twice": [stack[0], stack[0]],
                }


def make(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Forgetful(11, 6)
    return model, optimizer(model.parameters(), **arguments)


def trained(optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW, **arguments: Any) -> tuple[nn.Module, Any]:
    model, made = make(optimizer, **arguments)
    for _ in range(2):
        model(torch.arange(8).reshape(2, 4)).square().sum().backward()
        made.step()
        made.zero_grad()
    return model, made


def assert_same(left: Any, right: Any, where: str = "") -> None:
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_same(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_same(a, b, f"{where}/{index}")
    else:
        assert left == right, where


OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.AdamW, {"amsgrad": True}),
    (torch.optim.AdamW, {"fused": True}),
    (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (torch.optim.Adafactor, {}),
    (torch.optim.Adagrad, {}),
    (torch.optim.Rprop, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.LBFGS, {}),
    (GaLoreAdamW, {"rank": 2}),
]


@pytest.mark.parametrize(("optimizer", "arguments"), OPTIMIZERS, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_loaded_is_what_was_saved(optimizer: Any, arguments: dict[str, Any], tmp_path: Path) -> None:
    if optimizer is torch.optim.LBFGS:
        model, saved = make(optimizer)

        def closure() -> torch.Tensor:
            saved.zero_grad()
            loss = model(torch.arange(8).reshape(2, 4)).square().sum()
            loss.backward()
            return loss

        saved.step(closure)
    else:
        model, saved = trained(optimizer, **arguments)
    path = checkpoint.save(tmp_path, 2, model, [saved], {"a": [1, None]})
    fresh, loaded = make(optimizer, **arguments)
    assert checkpoint.load(path, fresh, [loaded]) == (2, {"a": [1, None]})
    assert_same(dict(fresh.state_dict()), dict(model.state_dict()))
    assert_same(loaded.state_dict(), saved.state_dict())


def test_state_of_every_kind_comes_back_exactly_and_owns_its_memory(tmp_path: Path) -> None:
    model, saved = make(Odd)
    saved.fill(seed=1)
    path = checkpoint.save(tmp_path, 0, model, [saved], {})
    fresh, loaded = make(Odd)
    checkpoint.load(path, fresh, [loaded])
    assert_same(loaded.state_dict(), saved.state_dict())
    for param in fresh.parameters():
        view = loaded.state[param]["exact"]
        assert view.untyped_storage().nbytes() == view.nbytes


@settings(max_examples=15, deadline=None)
@given(dtype=st.sampled_from(DTYPES), shape=st.lists(st.integers(0, 3), max_size=3), param=st.sampled_from(DTYPES[:3]))
def test_state_keeps_its_dtype_whatever_the_parameter_has(
    dtype: torch.dtype, shape: list[int], param: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def one() -> tuple[nn.Module, torch.optim.SGD]:
        model = nn.Linear(2, 2).to(param)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, saved = one()
    state = (torch.rand(shape) * 3).to(dtype)
    saved.state[model.weight]["s"] = state
    path = checkpoint.save(tmp_path_factory.mktemp("c"), 1, model, [saved], {})
    fresh, loaded = one()
    checkpoint.load(path, fresh, [loaded])
    assert_same(loaded.state[fresh.weight]["s"], state)


def test_a_tied_weight_is_saved_once(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, [optimizer], {})
    size = (path / "model.safetensors").stat().st_size
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers * 4 < size < numbers * 4 + 1000
    fresh, loaded = make()
    checkpoint.load(path, fresh, [loaded])
    assert fresh.head.weight is fresh.embedding.weight


DAMAGE = {
    "truncated": lambda path: (path / "optimizer-0.safetensors").write_bytes(b"12"),
    "flipped": lambda path: flip(path / "model.safetensors"),
    "missing": lambda path: (path / "state.json").unlink(),
    "no manifest": lambda path: (path / "manifest.json").unlink(),
    "foreign": lambda path: (path / "manifest.json").write_text("[1]"),
    "half a manifest": lambda path: (path / "manifest.json").write_text('{"schema": 1, "fil'),
    "later format": lambda path: (path / "manifest.json").write_text('{"schema": 99, "files": {}}'),
}


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_intact_checkpoint_is_found(damage: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    good = checkpoint.save(tmp_path, 9, model, [optimizer], {})
    bad = checkpoint.save(tmp_path, 10, model, [optimizer], {})
    assert checkpoint.newest_intact(tmp_path) == bad
    DAMAGE[damage](bad)
    notes: list[str] = []
    assert checkpoint.newest_intact(tmp_path, notes.append) == good
    assert len(notes) == 1
    assert "step-0000010" in notes[0]
    DAMAGE[damage](good)
    with pytest.raises(RunError, match=r"step-0000010 \(.*step-0000009 \("):
        checkpoint.newest_intact(tmp_path)


def test_nothing_saved_is_not_an_error(tmp_path: Path) -> None:
    assert checkpoint.newest_intact(tmp_path / "nowhere") is None
    (tmp_path / ".step-0000001.123.tmp").mkdir()
    (tmp_path / "step-one").mkdir()
    assert checkpoint.newest_intact(tmp_path) is None


def test_old_checkpoints_and_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / ".step-0000001.123.tmp").mkdir()
    (tmp_path / ".step-0000001.123.tmp" / "model.safetensors").write_bytes(b"x")
    for step in (1, 5, 30):
        checkpoint.save(tmp_path, step, model, [optimizer], {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000005", "step-0000030"]
    checkpoint.save(tmp_path, 7, model, [optimizer], {}, keep=2)  # went on from 5 because 30 was damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-0000005", "step-0000007"]


@pytest.mark.parametrize("stage", ["safetensors", "json", "replace"])
def test_a_failed_save_names_the_last_good_one_and_harms_nothing(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = trained()
    good = checkpoint.save(tmp_path, 1, model, [optimizer], {}, keep=1)
    before = {file.name: file.read_bytes() for file in good.iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        target = {"safetensors": "leantrain.checkpoint.save_file", "json": "pathlib.Path.write_text"}
        patched.setattr(target.get(stage, "leantrain.atomic.os.replace"), full)
        expected = r"cannot save checkpoint .*step-0000002: No space left on device; the last good .*step-0000001$"
        with pytest.raises(RunError, match=expected):
            checkpoint.save(tmp_path, 2, model, [optimizer], {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000001"]
    assert {file.name: file.read_bytes() for file in good.iterdir()} == before


def test_a_first_save_that_fails_says_there_is_none_yet(tmp_path: Path) -> None:
    model, optimizer = trained()
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot save checkpoint .*there is none yet"):
        checkpoint.save(tmp_path / "file", 2, model, [optimizer], {})


def test_state_that_is_not_tensors_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    model, optimizer = trained(OpaqueSGD, lr=0.1)
    with pytest.raises(checkpoint.UnsavableState, match=r"OpaqueSGD keeps a object .*state/embedding.weight/projector"):
        checkpoint.save(tmp_path / "run", 1, model, [optimizer], {})
    assert not (tmp_path / "run").exists()


class Other(Forgetful):
    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__(vocab_size, width)
        self.blocks.append(nn.Linear(width, width))


FOREIGN = {
    "has no 'blocks.2.weight'": lambda: Other(11, 6),
    r"'embedding.weight' is float32\[11, 6\] there, float32\[11, 8\] here": lambda: Forgetful(11, 8),
    r"'embedding.weight' is float32\[11, 6\] there, bfloat16\[11, 6\] here": lambda: Forgetful(11, 6).bfloat16(),
}


@pytest.mark.parametrize("message", FOREIGN)
def test_a_checkpoint_of_another_model_is_refused(message: str, tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, [optimizer], {})
    other = FOREIGN[message]()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UsageError, match=message):
        checkpoint.load(path, other, [torch.optim.AdamW(other.parameters())])
    assert_same(dict(other.state_dict()), before)


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, [optimizer], {})
    named = dict(model.named_parameters())
    few = torch.optim.AdamW([named["embedding.weight"]])
    two = torch.optim.AdamW([{"params": [p]} for p in named.values()])
    with pytest.raises(UsageError, match=r"torch\.optim\.adamw\.AdamW there, torch\.optim\.sgd\.SGD here"):
        checkpoint.load(path, model, [torch.optim.SGD(model.parameters(), lr=0.1)])
    with pytest.raises(UsageError, match=r"group 0 .* holds other parameters: 'blocks\.0\.bias'"):
        checkpoint.load(path, model, [few])
    with pytest.raises(UsageError, match=r"has 1 parameter groups, this one has 5"):
        checkpoint.load(path, model, [two])
    with pytest.raises(UsageError, match=r"has 1 optimizers, this run has 2"):
        checkpoint.load(path, model, [optimizer, few])


def test_files_are_safetensors_and_json_and_nothing_else(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = checkpoint.save(tmp_path, 1, model, [optimizer], {"x": 1})
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    assert json.loads((path / "state.json").read_text()) == {"step": 1, "extra": {"x": 1}}
