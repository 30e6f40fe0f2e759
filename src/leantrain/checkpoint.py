"""Checkpoints: all a run needs to go on as if it had never stopped, whole or not at all.

    step-0000100/
        model.safetensors          parameters and buffers by name
        optimizer-0.safetensors    the first optimizer's state tensors, `state/PARAMETER/KEY`
        optimizer-0.json           its class, groups and how the tensors belong together
        learner.safetensors, .json what the learner has beside the model, if anything: auxiliary heads
    state.json                 the step, and what the caller gave as `extra`
        rank-0.safetensors         what only process 0 has: its exchange's state (residuals, momenta); where processes
                                   have weights of their own between meetings, also these and its optimizers' state
        manifest.json              size and BLAKE2b checksum of every file above, written last

One process, DDP and FSDP2 write and read the same files. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.optim import Optimizer

from leantrain import own_state, snapshot
from leantrain.atomic import whole_folder
from leantrain.errors import RunError, UsageError
from leantrain.exchange import Dense, Exchange
from leantrain.learn import Learner
from leantrain.processes import rank, succeeded_everywhere
from leantrain.snapshot import UnsavableState

__all__ = ["UnsavableState", "load", "newest_intact", "read_state", "save"]

SCHEMA = 1
_NAME = re.compile(r"step-(\d{7,})")


def save(
    folder: Path | str, step: int, model: nn.Module, optimizers: Sequence[Optimizer], extra: dict[str, Any],
    *, keep: int = 2, exchange: Exchange | None = None, learner: Learner | None = None,
) -> Path:  # fmt: skip
    """Write `folder`/step-NNNNNNN and then remove all but the `keep` newest. All processes must call it.

    Args:
        step: optimizer steps taken, >= 0.
        model: as trained: bare, wrapped by DDP, or sharded by FSDP2.
        optimizers: in an order that will be the same when loading.
        extra: whatever JSON can hold; `load` gives it back.
        keep: how many checkpoints to leave, >= 1. Ones of later steps are leftovers of a damaged end and go too.
        exchange: the one whose state is to be saved, in every process; None: one without state.
        learner: the one that trains the model; None: one that has neither state nor parameters of its own.

    Returns:
        The checkpoint's folder.

    Raises:
        UnsavableState: an optimizer's state is more than tensors and plain values. Nothing was written.
        RunError: the disk is full, read-only or otherwise unwilling. What was saved before is untouched.
    """
    folder, exchange = Path(folder), exchange or Dense()
    trained = model if learner is None else learner.module
    own = own_state.pack(trained, optimizers, exchange)  # before the block, in which the model is everybody's
    path, problem = folder / _folder_name(step), None
    with exchange.consensus():
        snapshots = {"model": snapshot.of_model(model)}
        snapshots |= {f"optimizer-{i}": snapshot.of_optimizer(each, trained) for i, each in enumerate(optimizers)}
        if learner is not None and (state := learner.state_dict()):
            snapshots["learner"] = snapshot.of_values(state, type(learner).__name__)
        writes = rank() == 0
        tensors = {name: each.gathered(keep=writes) for name, each in snapshots.items()}
        texts = {name: json.dumps(each.structure) for name, each in snapshots.items() if each.structure}
        texts["state"] = json.dumps({"step": step, "extra": extra})
        with own_state.collected(own) as everyones:
            if writes:
                try:
                    _write(path, tensors, texts, everyones)
                    _keep_newest(folder, keep, step)
                except (OSError, SafetensorError) as error:
                    problem = error
    if not succeeded_everywhere(problem is None):
        reason = getattr(problem, "strerror", None) or problem or "rank 0 could not write it"
        good = max(_steps(folder), default=None)
        last = f"the last good checkpoint is {folder / _folder_name(good)}" if good is not None else "there is none yet"
        raise RunError(f"cannot save checkpoint {path}: {reason}; {last}") from problem
    return path


def newest_intact(folder: Path | str, on_damaged: Callable[[str], None] = lambda note: None) -> Path | None:
    """The checkpoint of the highest step whose every file is there with the right size and checksum.

    Args:
        on_damaged: told one sentence about each newer one that had to be passed over.

    Returns:
        Its folder, or None where nothing was ever saved.

    Raises:
        RunError: there are checkpoints, and every one of them is damaged.
    """
    folder = Path(folder)
    damaged: list[str] = []
    for step in sorted(_steps(folder), reverse=True):
        path = folder / _folder_name(step)
        problem = _damage(path)
        if problem is None:
            for note in damaged:
                on_damaged(f"skipped a damaged checkpoint: {note}")
            return path
        damaged.append(f"{path.name} ({problem})")
    if damaged:
        raise RunError(f"no checkpoint in {folder} is intact: {', '.join(damaged)}")
    return None


def read_state(path: Path | str) -> tuple[int, dict[str, Any]]:
    """The step and the `extra` of a checkpoint, without its tensors.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        state = _read_json(Path(path) / "state.json")
        return state["step"], state["extra"]
    except (OSError, ValueError, KeyError) as error:
        raise RunError(f"cannot read checkpoint {path}: {error}") from error


def load(
    path: Path | str, model: nn.Module, optimizers: Sequence[Optimizer], exchange: Exchange | None = None,
    learner: Learner | None = None,
) -> tuple[int, dict[str, Any]]:  # fmt: skip
    """Put the checkpoint's weights and states into `model`, `optimizers`, `exchange` and `learner`, in place.

    Returns:
        The step and the `extra` it was saved with.

    Raises:
        UsageError: it is of another model or other optimizers; the first difference is named, nothing was changed.
        RunError: a file cannot be read.
    """
    path, trained = Path(path), model if learner is None else learner.module
    try:
        stored = sorted(path.glob("optimizer-*.json"))
        if len(stored) != len(optimizers):
            raise UsageError(f"checkpoint {path} has {len(stored)} optimizers, this run has {len(optimizers)}")
        structures = [_read_json(path / f"optimizer-{i}.json") for i in range(len(optimizers))]
        with safe_open(path / "model.safetensors", "pt") as file:
            snapshot.check_model(model, file)
            for optimizer, structure in zip(optimizers, structures, strict=True):
                snapshot.check_optimizer(optimizer, trained, structure)
            snapshot.restore_model(model, file)
        for i, (optimizer, structure) in enumerate(zip(optimizers, structures, strict=True)):
            with safe_open(path / f"optimizer-{i}.safetensors", "pt") as file:
                snapshot.restore_optimizer(optimizer, structure, trained, file)
        if learner is not None and (path / "learner.json").exists():
            with safe_open(path / "learner.safetensors", "pt") as file:
                learner.load_state_dict(snapshot.values_of(_read_json(path / "learner.json"), file))
        own_state.restore(path, trained, optimizers, exchange or Dense())
    except UsageError as error:
        raise UsageError(f"cannot continue from {path}: {error}") from None
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise RunError(f"cannot read checkpoint {path}: {error}") from error
    return read_state(path)


def _write(
    path: Path, tensors: dict[str, dict[str, Any]], texts: dict[str, str], everyones: Iterator[tuple[str, bytes]]
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(".step-*.tmp"):  # of a process that was killed while writing or removing
        shutil.rmtree(leftover, ignore_errors=True)
    with whole_folder(path) as aside:
        for name, each in tensors.items():
            save_file(each, aside / f"{name}.safetensors")
        for name, text in texts.items():
            (aside / f"{name}.json").write_text(text, encoding="utf-8")
        for name, content in everyones:
            (aside / name).write_bytes(content)
        files = {file.name: {"bytes": file.stat().st_size, "blake2b": _checksum(file)} for file in aside.iterdir()}
        (aside / "manifest.json").write_text(json.dumps({"schema": SCHEMA, "files": files}), encoding="utf-8")


def _keep_newest(folder: Path, keep: int, step: int) -> None:
    """Remove all checkpoints but the `keep` newest up to `step`, each whole or not at all."""
    kept = sorted(each for each in _steps(folder) if each <= step)[-keep:]
    for each in set(_steps(folder)) - set(kept):
        aside = folder / f".{_folder_name(each)}.old.tmp"
        (folder / _folder_name(each)).replace(aside)  # so that a kill in the removal leaves no torn checkpoint
        shutil.rmtree(aside)


def _damage(path: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None."""
    try:
        manifest = _read_json(path / "manifest.json")
        if manifest["schema"] != SCHEMA:
            return f"written in format {manifest['schema']}, this version reads {SCHEMA}"
        for name, expected in manifest["files"].items():
            file = path / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            if _checksum(file) != expected["blake2b"]:
                return f"{name} has a wrong checksum"
    except FileNotFoundError:
        return "manifest.json is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error}"
    return None


def _checksum(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _steps(folder: Path) -> list[int]:
    if not folder.is_dir():
        return []
    return [int(match[1]) for each in folder.iterdir() if each.is_dir() and (match := _NAME.fullmatch(each.name))]


def _folder_name(step: int) -> str:
    return f"step-{step:07d}"


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
