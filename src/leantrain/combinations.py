"""What does not go together in a run, refused with the reason before anything is trained."""

from __future__ import annotations

from leantrain.data import Data
from leantrain.errors import UsageError
from leantrain.exchange import Exchange
from leantrain.learn import Learner
from leantrain.processes import World
from leantrain.recipe import Recipe
from leantrain.recipe.locate import locate


def check_processes(recipe: Recipe, world: World, exchange: Exchange) -> None:
    """Refuse, before data are read, what cannot be shared out over the processes."""
    for key, component in (("optim", recipe.optim), ("rest", recipe.rest)):
        if component is not None:
            exchange.check_optimizer(locate(key, component.class_path))
    if recipe.step_in_backward and world.size > 1 and not recipe.exchange.class_path.endswith(".FullyShard"):
        raise UsageError(
            f"step_in_backward works on one process or with exchange FullyShard, got {world.size} processes with "
            f"{recipe.exchange.class_path}"
        )
    if recipe.batch_size % (world.size * recipe.accumulate):
        raise UsageError(
            f"batch_size must be a multiple of processes x accumulate = {world.size} x {recipe.accumulate}, "
            f"got batch_size={recipe.batch_size}"
        )


def check_learner(recipe: Recipe, world: World, learner: Learner) -> None:
    """Refuse what only one backward pass of the whole model allows."""
    name = recipe.learn.class_path.rpartition(".")[2]
    cut = learner.module is not learner.model
    exchange = recipe.exchange.class_path.rpartition(".")[2]
    if cut and world.size > 1 and exchange == "FullyShard":
        raise UsageError(f"learn={name} works with models that every process holds whole, not with exchange FullyShard")
    if recipe.compile and cut:
        raise UsageError(f"compile is not available with learn={name}, whose hooks a compiled model would not run")
    if recipe.step_in_backward and learner.completes_late:
        raise UsageError(f"step_in_backward needs a learner that completes a gradient in one backward pass, not {name}")


def check_probes(recipe: Recipe, data: Data) -> None:
    """Refuse to look at layers where the probe cannot."""
    if not recipe.probe_every:
        return
    if data.task == "regression":
        raise UsageError(f"probe_every={recipe.probe_every} needs classes, and {recipe.data.class_path} has none")
    for key, hidden in (("compile", recipe.compile), ("exchange FullyShard", _shards(recipe))):
        if hidden:
            raise UsageError(f"probe_every={recipe.probe_every} is not available with {key}: hooks do not see layers")


def _shards(recipe: Recipe) -> bool:
    return recipe.exchange.class_path.endswith(".FullyShard")
