"""Cutting a model into blocks at named modules, without rewriting it.

A cut is made before the input of a module: what that module is called with is the output of the block before. It may be
made where this is the only way on which gradients come back. Whether it is, one forward pass tells: every input of a
module is marked there, and the graph that autograd has built of the pass is searched for other ways around each mark.

    h_k = f_k(h_{k-1})        blocks f_1 ... f_K, cut before the modules whose inputs are h_1 ... h_{K-1}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from leantrain.balance import balanced, seconds_between
from leantrain.errors import UsageError, nearest
from leantrain.modes import evaluation_mode
from leantrain.outputs import logits_of

Balance = Literal["parameters", "time"]
At = Callable[[int, Tensor], Tensor]
"""Called with a block's number, from 0, and its output; returns what the next block is to be given."""


@dataclass(frozen=True)
class Place:
    """The input of a module."""

    name: str
    """The module's name."""
    features: Tensor
    """What it was called with, detached."""
    node: Node
    problem: str | None
    """Why the model cannot be cut there, or None."""


@dataclass(frozen=True)
class Call:
    """One call of a module: when it began and ended, counted in such moments, and what a tensor it returned is like."""

    name: str
    began: int
    ended: int
    node: Node | None
    """Of what it returned, in autograd's graph."""
    like: Tensor | None
    """On the meta device; None unless a single tensor was returned that requires gradients."""


@dataclass(frozen=True)
class Survey:
    """What a forward pass showed: where a model can be cut, in the order in which the pass comes by."""

    places: tuple[Place, ...]
    calls: tuple[Call, ...]
    end: Node
    output: Tensor
    """The pass's logits, detached."""

    @property
    def clean(self) -> list[Place]:
        """Those at which the model can be cut."""
        return [place for place in self.places if place.problem is None]

    def parameters(self, cuts: Sequence[Place]) -> list[list[nn.Parameter]]:
        """Which parameters each block has, for cuts in the pass's order."""
        ends = [*(place.node for place in cuts), self.end]
        starts = [None, *(place.node for place in cuts)]
        return [_leaves(_reached(end, start)) for start, end in zip(starts, ends, strict=True)]


class Cut:
    """A model's blocks. The model keeps its hooks, which do nothing outside of `stops`.

    Args:
        model: any module whose `forward` takes a tensor.
        sample: [n, ...] inputs for the forward pass in which the model is looked at, in evaluation mode; n >= 1.
        cut: names of modules before which to cut, in any order.
        blocks: instead of `cut`, how many blocks to make, as equal as can be, 1 to as many as there are.
        balance: what is to be equal then: "parameters" or forward "time" on `sample`.

    Raises:
        UsageError: both or neither of `cut` and `blocks`; a name that does not exist; a place at which the model
            cannot be cut, with what to cut instead; more blocks than there are.
    """

    def __init__(
        self, model: nn.Module, sample: Tensor, *, cut: Sequence[str] | None = None, blocks: int | None = None,
        balance: Balance = "parameters",
    ) -> None:  # fmt: skip
        if (cut is None) == (blocks is None):
            raise UsageError(f"give cut=[names of modules] or blocks=number, one of the two; got {cut=}, {blocks=}")
        if balance not in get_args(Balance):
            raise UsageError(f"balance {balance!r} is unknown{nearest(str(balance), get_args(Balance))}")
        found = survey(model, sample)
        if blocks is not None:
            chosen = _automatic(model, sample, found, blocks, balance)
        else:
            chosen = _named(model, found, cut or ())
        self.names: tuple[str, ...] = tuple(place.name for place in chosen)
        """The modules before which the model is cut, in the order of the pass."""
        self.features: tuple[Tensor, ...] = tuple(place.features for place in chosen)
        """The blocks' outputs for `sample`, without the last one's."""
        self.output: Tensor = found.output
        """The model's logits for `sample`."""
        owner = {id(param): number for number, each in enumerate(found.parameters(chosen)) for param in each}
        self.parameters: list[list[nn.Parameter]] = [[] for _ in range(len(self))]
        """Of every block those that are trained, in the model's order; what the pass did not touch is the last's."""
        for param in model.parameters():
            if param.requires_grad:
                self.parameters[owner.get(id(param), len(self) - 1)].append(param)
        for number, params in enumerate(self.parameters):
            if not params:
                raise UsageError(f"block {number + 1} of {len(self)} has nothing to train: {self.described()[number]}")
        self._at: At | None = None
        self._model = model
        self._skipped = [_before(found.calls, place) for place in chosen]
        likes = {call.name: call.like for call in found.calls if call.like is not None}
        self._shapes: dict[tuple[int, ...], dict[str, Tensor]] = {tuple(sample.shape): likes}
        """By the inputs' shape: what modules return for them."""
        modules = dict(model.named_modules())
        for number, name in enumerate(self.names):
            hook = partial(self._arrived, number)
            modules[name].register_forward_pre_hook(hook, with_kwargs=True)

    def __len__(self) -> int:
        """The number of blocks."""
        return len(self.names) + 1

    def described(self) -> list[str]:
        """Every block in words."""
        ends = ["the input", *(f"the input of {name}" for name in self.names), "the output"]
        return [f"from {start} to {end}" for start, end in pairwise(ends)]

    def run(self, block: int, inputs: Tensor, features: Tensor | None) -> Tensor:
        """The output of one block alone: of the last, the model's logits.

        What lies before it is not computed. The model's forward pass goes through it with made-up tensors, because
        what it prepares there without gradients (positions, masks) the block may need.

        Args:
            block: which, from 0.
            inputs: [B, ...] what the model is given.
            features: [B, ...] the block's input, the output of the one before; None for block 0.
        """

        def at(number: int, arrived: Tensor) -> Tensor:
            if number == block:
                raise _Reached(arrived)
            return features if number == block - 1 and features is not None else arrived

        with self._skipping(block, inputs), self.stops(at):
            try:
                return logits_of(self._model(inputs))
            except _Reached as reached:
                return reached.features

    @contextmanager
    def _skipping(self, block: int, inputs: Tensor) -> Iterator[None]:
        """In the block, modules that are done before `block` begins return made-up tensors."""
        modules = [(self._model.get_submodule(name), name) for name in (self._skipped[block - 1] if block else ())]
        shapes = self._shapes_for(inputs) if modules else {}
        own = [vars(module).get("forward") for module, _ in modules]  # activation checkpointing puts one there
        for module, name in modules:
            module.forward = partial(_made_up, shapes[name], inputs.device)  # in front of the class's method
        try:
            yield
        finally:
            for (module, _), forward in zip(modules, own, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward

    def _shapes_for(self, inputs: Tensor) -> Mapping[str, Tensor]:
        """What modules return for inputs of this shape: found by a forward pass when it comes for the first time."""
        shape = tuple(inputs.shape)
        if shape not in self._shapes:
            # Without autocast: some versions keep weights, cast here without gradients, for the pass that is next.
            with torch.no_grad(), torch.autocast(inputs.device.type, enabled=False), evaluation_mode(self._model):
                self._shapes[shape] = _returned(self._model, inputs, {name for each in self._skipped for name in each})
        return self._shapes[shape]

    @contextmanager
    def stops(self, at: At) -> Iterator[None]:
        """In the block, a forward pass calls `at` at every cut."""
        self._at = at
        try:
            yield
        finally:
            self._at = None

    def _arrived(
        self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._at is None:
            return None
        return _with_features(args, kwargs, partial(self._at, number))


class _Reached(Exception):
    """The end of the block that is run alone; not an error."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


def _made_up(like: Tensor, device: torch.device, *_: Any, **__: Any) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype, device=device)


def _returned(model: nn.Module, inputs: Tensor, names: Iterable[str]) -> dict[str, Tensor]:
    """What modules return in a forward pass, on the meta device."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        found[name] = output.to("meta")

    handles = [model.get_submodule(name).register_forward_hook(partial(note, name)) for name in names]
    try:
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _before(calls: Sequence[Call], place: Place) -> list[str]:
    """The outermost modules that were called once, were done by then, and work for the features at `place` alone: what
    another branch has made of the inputs, the next block needs."""
    counts = Counter(call.name for call in calls)
    start, behind = next(call.began for call in calls if call.name == place.name), _reached(place.node, None)
    done = [call for call in calls if call.ended < start and call.node in behind and counts[call.name] == 1]
    return [
        call.name for call in done if not any(other.began < call.began and call.ended < other.ended for other in done)
    ]


def survey(model: nn.Module, sample: Tensor) -> Survey:
    """Run the model once on `sample` and see where it can be cut.

    Raises:
        UsageError: nothing in the model requires gradients.
    """
    seen: dict[str, list[tuple[Tensor, Node]]] = {}
    calls: list[Call] = []
    moments, open_calls = count(), list[int]()

    def mark(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def marked(features: Tensor) -> Tensor:
            copy = features.clone()  # a node of its own: what leads to it leads through this module
            if copy.grad_fn is not None:
                seen.setdefault(name, []).append((features.detach(), copy.grad_fn))
            return copy

        open_calls.append(next(moments))
        return _with_features(args, kwargs, marked)

    def returned(name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        trained = isinstance(output, Tensor) and output.requires_grad
        node, like = (output.grad_fn, output.detach().to("meta")) if trained else (None, None)
        calls.append(Call(name, open_calls.pop(), next(moments), node, like))

    # What computes a weight (torch.nn.utils.parametrize) is no place in the pass.
    modules = {
        name: module for name, module in model.named_modules() if name and ".parametrizations." not in f".{name}."
    }
    handles = [
        module.register_forward_pre_hook(partial(mark, name), with_kwargs=True) for name, module in modules.items()
    ]
    handles += [module.register_forward_hook(partial(returned, name)) for name, module in modules.items()]
    try:
        with evaluation_mode(model), torch.enable_grad():
            output = logits_of(model(sample))
    finally:
        for handle in handles:
            handle.remove()
    if output.grad_fn is None:
        raise UsageError(f"{type(model).__name__} has nothing to train: its output does not require gradients")
    names = {id(param): name for name, param in model.named_parameters()}
    used = _reached(output.grad_fn, None)
    places = []
    for name, ((features, node), *again) in seen.items():
        if again:
            problem: str | None = _CALLED_TWICE
        else:
            problem = _problem(output.grad_fn, node, names) if node in used else _UNUSED
        places.append(Place(name, features, node, problem))
    return Survey(tuple(places), tuple(calls), output.grad_fn, output.detach())


_TIED = "a tied weight"
_UNUSED = "the model's output does not depend on it"
_CALLED_TWICE = "it is called several times in one forward pass"


def _with_features(
    args: tuple[Any, ...], kwargs: dict[str, Any], change: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """A call's arguments with the features, the first tensor of floating-point numbers, put through `change`."""
    for index, value in enumerate(args):
        if isinstance(value, Tensor) and value.is_floating_point():
            return (*args[:index], change(value), *args[index + 1 :]), kwargs
    for key, value in kwargs.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            return args, {**kwargs, key: change(value)}
    return None


def _problem(end: Node, mark: Node, names: Mapping[int, str]) -> str | None:
    """What of the part before `mark` is also reached on another way, in words."""
    shared = _reached(end, mark) & _reached(mark, None)
    if not shared:
        return None
    if (tied := _leaves(shared)) and all(hasattr(node, "variable") for node in shared):
        return f"{names.get(id(tied[0]), 'a parameter')} is used before and after it ({_TIED})"
    return "it lies inside a residual connection: another way leads around it"


def _reached(start: Node, stop: Node | None) -> set[Node]:
    """All nodes behind `start` that `stop` is not the only way to; with `stop`, `start` itself as well."""
    found, waiting = {start}, [start]
    while waiting:
        for following, _ in waiting.pop().next_functions:
            if following is not None and following is not stop and following not in found:
                found.add(following)
                waiting.append(following)
    return found if stop is not None else found - {start}


def _leaves(nodes: set[Node]) -> list[nn.Parameter]:
    return [node.variable for node in nodes if hasattr(node, "variable")]


def _named(model: nn.Module, found: Survey, names: Sequence[str]) -> list[Place]:
    known = {place.name: place for place in found.places}
    modules = [name for name, _ in model.named_modules() if name]
    chosen = []
    for name in dict.fromkeys(names):
        if name not in modules:
            raise UsageError(f"cut: {type(model).__name__} has no module {name!r}{nearest(name, modules)}")
        if name not in known:
            raise UsageError(
                f"cut: the model cannot be cut before {name}: no features that something was trained for go into it"
                f"{_instead(found, modules, name)}"
            )
        if (problem := known[name].problem) is not None:
            raise UsageError(f"cut: the model cannot be cut before {name}: {problem}{_instead(found, modules, name)}")
        chosen.append(known[name])
    return sorted(chosen, key=found.places.index)


def _instead(found: Survey, modules: Sequence[str], name: str) -> str:
    """The clean places on both sides of a module that is none."""
    clean = {place.name for place in found.clean}
    at = modules.index(name)
    before = next((each for each in reversed(modules[:at]) if each in clean), None)
    after = next((each for each in modules[at:] if each in clean), None)
    if before is None and after is None:
        return f"; there is no place at which it can{_untie(found)}"
    return f"; cut before {' or '.join(each for each in (before, after) if each)} instead"


def _untie(found: Survey) -> str:
    tied = [place.problem for place in found.places if place.problem is not None and _TIED in place.problem]
    return "; build it without tied weights (in transformers, tie_word_embeddings=False)" if tied else ""


def sensible(model: nn.Module, found: Survey) -> list[Place]:
    """Of clean places between which nothing is trained, one: the outermost module that has something to train."""
    trained = {name for name, module in model.named_modules() if any(p.requires_grad for p in module.parameters())}
    groups: list[list[Place]] = []
    for place in found.clean:
        if not groups or _leaves(_reached(place.node, groups[-1][-1].node)):
            groups.append([])
        groups[-1].append(place)
    return [min(group, key=lambda place: (place.name not in trained, place.name.count("."))) for group in groups]


def _automatic(model: nn.Module, sample: Tensor, found: Survey, blocks: int, balance: Balance) -> list[Place]:
    places = sensible(model, found)
    if not 1 <= blocks <= len(places) + 1:
        raise UsageError(
            f"blocks must be 1 to {len(places) + 1}, as many as {type(model).__name__} can be cut into; got {blocks}"
            f"{_untie(found)}"
        )
    holders = {name for name, module in model.named_modules() if isinstance(module, (nn.ModuleList, nn.Sequential))}
    repeated = [place for place in places if place.name.rpartition(".")[0] in holders]
    if blocks <= len(repeated) + 1:  # between the model's own blocks, if there are so many
        places = repeated
    if balance == "time":
        costs = seconds_between(model, sample, [place.name for place in places])
    else:
        costs = [float(sum(param.numel() for param in params)) for params in found.parameters(places)]
    return [places[index - 1] for index in balanced(costs, blocks)]
