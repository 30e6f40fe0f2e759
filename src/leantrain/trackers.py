"""Who else is told how a run goes: TensorBoard out of the box; W&B, MLflow and Trackio where they are installed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from leantrain.errors import UsageError, nearest

PROJECT = "leantrain"


class Tracker(Protocol):
    """What is asked of a tracker."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note `values`, named as `train/loss`, at `step`."""
        ...

    def close(self, finished: bool) -> None:
        """The run ended; `finished` is False where it was interrupted or failed."""
        ...


class TensorBoard:
    """Event files in `folder`/tensorboard, for `tensorboard --logdir`."""

    package = "tensorboard"

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        writer = import_module("torch.utils.tensorboard").SummaryWriter
        # purge_step hides what an earlier process wrote after the checkpoint that this one continues from.
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)

    def close(self, finished: bool) -> None:
        self._writer.close()


class WandB:
    """A Weights & Biases run in project `leantrain`; the same folder goes on with the same run."""

    package = "wandb"

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        wandb = import_module("wandb")
        self._run = wandb.init(
            project=PROJECT, name=name, dir=str(folder), config=dict(config), id=_identity(folder), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MLflow:
    """An MLflow run in experiment `leantrain`; the same folder goes on with the same run."""

    package = "mlflow"

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._mlflow = import_module("mlflow")
        self._mlflow.set_experiment(PROJECT)
        identity = folder / "mlflow-run-id.txt"
        earlier = identity.read_text(encoding="utf-8") if step and identity.exists() else None
        run = self._mlflow.start_run(run_id=earlier, run_name=None if earlier else name)
        if earlier is None:
            self._mlflow.log_params({key: str(value)[:500] for key, value in config.items()})
            identity.write_text(run.info.run_id, encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._mlflow.end_run("FINISHED" if finished else "KILLED")


class Trackio:
    """A Trackio run in project `leantrain`, named after the run and its folder."""

    package = "trackio"

    def __init__(self, name: str, folder: Path, config: Mapping[str, Any], step: int) -> None:
        self._trackio = import_module("trackio")
        identity = f"{name}-{_identity(folder)}"
        self._trackio.init(project=PROJECT, name=identity, config=dict(config), resume="allow")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._trackio.log(dict(values), step=step)

    def close(self, finished: bool) -> None:
        self._trackio.finish()


TRACKERS: dict[str, type[TensorBoard] | type[WandB] | type[MLflow] | type[Trackio]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_trackers(names: Sequence[str]) -> None:
    """Refuse, before any work, a tracker that does not exist or is not installed.

    Raises:
        UsageError: naming it, and what to install.
    """
    for name in names:
        if name not in TRACKERS:
            raise UsageError(f"tracker {name!r} does not exist{nearest(name, TRACKERS)}")
        package = TRACKERS[name].package
        try:
            import_module(package)
        except ImportError as error:
            raise UsageError(f"tracker {name!r} needs the package {package}: pip install {package} ({error})") from None


def open_trackers(
    names: Sequence[str], name: str, folder: Path, config: Mapping[str, Any], step: int = 0
) -> list[Tracker]:
    """Begin, or from `step` go on, telling each tracker of `names` about the run `name`.

    Args:
        folder: the run's folder.
        config: the recipe as plain data, shown beside the curves.
        step: the step the run continues from; 0: it begins.
    """
    check_trackers(names)
    return [TRACKERS[each](name, folder, config, step) for each in names]


def _identity(folder: Path) -> str:
    """A short name that is the same whenever the same folder is trained in."""
    return hashlib.blake2b(str(folder.resolve()).encode(), digest_size=6).hexdigest()
