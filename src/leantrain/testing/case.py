"""One optimizer to be checked: its class, its settings, and what is promised about them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol
from unittest import SkipTest

from torch import Tensor
from torch.optim import Optimizer


class NotApplicable(SkipTest):
    """Raised by a check that has nothing to look at in this case; pytest shows it as a skip with its reason."""


class Twin(Protocol):
    """A slow, obvious float64 transcription of a method; see `leantrain.testing.twins`."""

    def step(self, weights: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Move float64 `weights` in place, given one float64 gradient of the same shape for each."""


@dataclass(frozen=True, kw_only=True)
class OptimizerCase:
    """A row of the conformance table: everything the checks need to know about one method.

    Choose settings under which every part of the method is at work within a dozen steps: a weight decay, an eps of
    1e-3 or so (at 1e-8 nobody sees where it is added), a refresh of a few steps.
    """

    name: str
    """What the tests call the row; letters, digits and dashes read best."""

    optimizer_class: Callable[..., Optimizer]
    """The class, or a function, called as `optimizer_class(params, **settings)`."""

    settings: Mapping[str, Any]
    """The settings everything is checked with; must contain `lr`."""

    knobs: Mapping[str, Any] = field(default_factory=dict)
    """{argument: another value}: each, changed alone, must change the weights."""

    switches: Mapping[str, Any] = field(default_factory=dict)
    """{argument: another value} that chooses an implementation only: the weights must stay the same to rounding."""

    untested: Mapping[str, str] = field(default_factory=dict)
    """{argument: why} for constructor arguments that are neither a knob nor a switch."""

    bad: Sequence[tuple[Mapping[str, Any], str | Sequence[str]]] = ()
    """(settings, words): these settings must raise ValueError with a message that contains all the words."""

    twin: Callable[..., Twin] | None = None
    """Makes the slow float64 twin from those settings whose names it accepts; raises NotImplementedError for a value
    it does not describe."""

    predicted_bytes: Callable[[list[Tensor], Mapping[str, Any]], int] | None = None
    """(parameters, settings) -> bytes of state that the method says it will hold, step counters excluded."""

    off_equals: tuple[Mapping[str, Any], Callable[[list[Tensor]], Optimizer]] | None = None
    """(settings that turn the method off, factory of the plain optimizer it must then equal bit for bit). The settings
    replace `settings` as a whole."""

    matrices_only: bool = False
    """True for a method that accepts nothing but 2-D parameters."""

    trains_below: float = 0.5
    """Fraction of the first loss that 100 steps on the small model must reach."""

    skips: Mapping[str, str] = field(default_factory=dict)
    """{name of a check: why it is not run}."""

    def __post_init__(self) -> None:
        if "lr" not in self.settings:
            raise ValueError(f"settings must contain lr, got settings={dict(self.settings)}")
        twice = sorted(set(self.knobs) & set(self.switches) | set(self.untested) & {*self.knobs, *self.switches})
        if twice:
            raise ValueError(f"each argument is a knob, a switch or untested, but {', '.join(twice)} is in two of them")

    def build(self, params: Iterable[Any], **changes: Any) -> Optimizer:
        """The optimizer of this case over `params`, with some of its settings replaced by `changes`."""
        return self.optimizer_class(params, **{**self.settings, **changes})

    def build_twin(self, **changes: Any) -> Twin:
        """The slow twin under the same settings, those dropped that it does not know (implementation switches)."""
        assert self.twin is not None
        known = inspect.signature(self.twin).parameters
        return self.twin(**{key: value for key, value in {**self.settings, **changes}.items() if key in known})

    def arguments(self) -> list[str]:
        """Names of the constructor's arguments after the parameters."""
        kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = list(inspect.signature(self.optimizer_class).parameters.values())[1:]
        return [parameter.name for parameter in parameters if parameter.kind not in kinds]
